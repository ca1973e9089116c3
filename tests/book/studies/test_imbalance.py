"""The remedy that the imbalance chapter's runs bring along, and the cells of its tables."""

from __future__ import annotations

import pytest
import torch

from book.studies import imbalance as study
from book.support import results
from mmlib import data
from mmlib.backbones import GenericBackbone
from mmlib.baselines import JointTraining
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit


def train_split():
    train = data.load("digits")["train"].subset(range(100))
    return MissingPlan("exact_count", [0.2, 0.5, 0.8], seed=0).draw(train).apply(train)


class Once:
    """A hook that keeps what the optimizer does in the first step and stops there."""

    def on_backward(self, state):
        self.before = {k: (p.detach().clone(), p.grad.clone()) for k, p in state.method.backbone.named_parameters()}

    def on_step(self, state):
        if not hasattr(self, "moved"):
            now = dict(state.method.backbone.named_parameters())
            self.moved = {k: now[k].detach() - p for k, (p, _) in self.before.items()}


def one_step(method, optimizer):
    hook = Once()
    config = TrainConfig(steps=1, batch_size=100, lr=0.1, optimizer=optimizer, select="last", device="cpu")
    fit(method, train_split(), None, config, callbacks=[hook])
    return hook.moved


def net():
    torch.manual_seed(0)
    return GenericBackbone.for_data(train_split(), width=8, dropout=0.0)


@pytest.mark.parametrize("where", ["gradient", "rate"])
def test_an_encoder_steps_by_the_inverse_of_its_presence(where):
    plain = one_step(JointTraining(net()), "sgd")
    method = study.Reweighted(net(), where)
    moved = one_step(method, "sgd")
    torch.testing.assert_close(method.factors, torch.tensor([0.625, 1.0, 2.5]))  # .5 / (.8, .5, .2)
    for name, way in plain.items():
        factor = {"left": 0.625, "right": 1.0, "projection": 2.5}.get(name.split(".")[1], 1.0)
        torch.testing.assert_close(moved[name], factor * way, atol=1e-7, rtol=1e-4)


def test_adam_ignores_reweighted_gradients_but_not_reweighted_rates():
    plain = one_step(JointTraining(net()), "adam")
    gradient = one_step(study.Reweighted(net(), "gradient"), "adam")
    rate = one_step(study.Reweighted(net(), "rate"), "adam")
    name = "encoders.projection.first.weight"
    assert (gradient[name] - plain[name]).norm() < 0.01 * plain[name].norm()
    torch.testing.assert_close(rate[name], 2.5 * plain[name], atol=1e-6, rtol=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="where: expected 'gradient' or 'rate'"):
        study.Reweighted(net(), "loss")


def test_every_run_is_another_one_and_all_settings_have_one_mean():
    for table in study.TABLES.values():
        configs = [config for cell in table().values() for config in cell]
        assert len({results.config_hash(c) for c in configs}) == len(configs)
        assert all(sum(c["train_plan"]["rates"]) == pytest.approx(1.5) for c in configs)


def test_the_method_is_known_only_during_a_run():
    config = study.remedies_digits()["gradients reweighted",][0]
    rows = study.run({**config, "train": {"epochs": 1}, "device": "cpu"})
    assert {row["method"] for row in rows} == {"Reweighted"}


def test_names_of_settings():
    assert study.name_of((0.3, 0.5, 0.7)) == ".3 .5 .7"
