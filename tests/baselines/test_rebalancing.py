"""CGGM and OGM-GE: coefficients and scores by hand and by loops, noise, missing parts, the loop, several processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from baselines.runs import check_resumed, learned_digits, toy, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.test_balm import SGD, Joint, backbone, dialogues
from torch import nn
from torch.nn import functional as F

from book.support.experiments import train_and_score
from mmlib import MultimodalBatch, MultimodalDataset
from mmlib.backbones import AVMNISTBackbone, Backbone, GenericBackbone, GenericConfig
from mmlib.baselines import CGGM, OGMGE
from mmlib.baselines.ogm_ge import ogm_coefficients
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, random_state

PLAN = MissingPlan("bernoulli", rates=[0.3, 0.4], seed=2)


def make(method: type, data: MultimodalDataset, dropout: float = 0.0, seed: int = 0, **options):
    with random_state(seed):
        return method(backbone(data, dropout, seed), **options)


# CGGM


def test_cggm_by_hand_over_two_steps() -> None:
    """Gains in accuracy, coefficients of Eq. 21, and its own L_mod; the last, with current weights, by a loop."""
    data = toy()
    method = make(CGGM, data).train()
    assert (method.config.rho, method.config.tau, method.rebalancing.form) == (1.3, 0.2, "cggm")
    assert method.calibration is None
    last = np.zeros(2)
    for rows in (slice(0, 25), slice(25, 57)):
        batch = data[rows]
        output = method(batch)
        h = method.backbone.encode(batch)
        logits = method.rebalancing.heads([x.detach() for x in h.values()])
        accuracy = np.array([(x.argmax(-1) == batch.target).double().mean().item() for x in logits])
        gain = accuracy - last
        last = accuracy
        c = np.clip([(gain.sum() - g) / (gain.sum() + 1e-8) for g in gain], 0, 2)
        method.zero_grad()
        sum(output.losses.values()).backward()
        method.rebalance()
        np.testing.assert_allclose(method.last["mu"], 1.3 * c, rtol=1e-3)
        fused = method.backbone.decoder[-1].weight.detach().flatten().double().numpy()
        heads = method.rebalancing.heads.weight.detach().flatten(1).double().numpy()
        cos = heads @ fused / np.linalg.norm(heads, axis=1) / np.linalg.norm(fused)
        value = (np.abs(c).sum() - (c * cos).sum()) / 2
        assert method.rebalancing.lmod_value.item() == pytest.approx(value, rel=1e-3)
    term = method(data[:]).losses["modulation"]
    assert term.item() == pytest.approx(0.2 * value, rel=1e-3)


def test_cggm_is_bounded() -> None:
    for rho in (1.0, 1.3):
        method = make(CGGM, toy(), rho=rho)
        method.rebalancing.level.copy_(torch.tensor([0.5, 0.5]))
        method.rebalancing.advance(torch.tensor([48.0, 16.0]), torch.tensor([64.0, 64.0]))  # gains 1/4 and -1/4
        assert method.rebalancing.mu.min() >= 0
        assert method.rebalancing.mu.max() == pytest.approx(2 * rho)


@pytest.mark.parametrize("kind", ["classes", "scores", "labels"])
def test_cggm_watches_accuracies_of_classes_signs_and_labels(kind: str) -> None:
    target = {"classes": torch.arange(60) % 3, "scores": torch.randn(60), "labels": torch.rand(60, 3) < 0.4}[kind]
    data = MultimodalDataset(toy().data.replace(target=target), {"outputs": 1 if kind == "scores" else 3})
    method = make(CGGM, data, rho=1.6).train()
    unimodal = torch.randn(2, 60, 1 if kind == "scores" else 3)
    found = method.rebalancing.discrepancies(torch.randn_like(unimodal[0]), unimodal, target)
    for m in range(2):
        for i in range(60):
            x, y = unimodal[m, i], target[i]
            right = {
                "classes": lambda x=x, y=y: float(x.argmax() == y),
                "scores": lambda x=x, y=y: float((x[0] > 0) == (y > 0)),
                "labels": lambda x=x, y=y: float(((x > 0) == y).float().mean()),
            }[kind]()
            assert found[m, i].item() == pytest.approx(right)
    fit(method, data, config=TrainConfig(epochs=1, select="last"))


# OGM-GE


def coefficients_by_loops(score, alpha):
    ratio, k = [], []
    for m, s in enumerate(score):
        others = sum(x for j, x in enumerate(score) if j != m) / (len(score) - 1)
        ratio.append(s / others)
        k.append(1 - math.tanh(alpha * ratio[-1]) if ratio[-1] > 1 else 1.0)
    return ratio, k


def test_ogm_coefficients_by_hand() -> None:
    ratio, k = ogm_coefficients(torch.tensor([6.0, 3.0]), 0.4)
    assert ratio.tolist() == [2.0, 0.5]
    assert k.tolist() == pytest.approx([1 - math.tanh(0.8), 1.0])
    ratio, k = ogm_coefficients(torch.tensor([0.0, 0.0]), 0.4)
    assert ratio.tolist() == [1, 1]
    assert k.tolist() == [1, 1]
    ratio, k = ogm_coefficients(torch.tensor([2.0, 0.0]), 0.4)
    assert ratio.tolist() == [math.inf, 0]
    assert k.tolist() == [0, 1]
    for dtype in (torch.float32, torch.float64):  # (3 x .35 - .35) / 2 is less than .35
        assert ogm_coefficients(torch.full((3,), 0.35, dtype=dtype), 1.0)[1].tolist() == [1, 1, 1]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.01, 50), min_size=2, max_size=5), st.floats(0, 2))
def test_ogm_coefficients_by_loops(score, alpha) -> None:
    ratio, k = ogm_coefficients(torch.tensor(score, dtype=torch.float64), alpha)
    expected = coefficients_by_loops(score, alpha)
    np.testing.assert_allclose(ratio, expected[0], rtol=1e-9)
    clear = [abs(r - 1) > 1e-9 for r in expected[0]]
    np.testing.assert_allclose(k[clear], np.array(expected[1])[clear], rtol=1e-9)
    assert ((k >= 0) & (k <= 1)).all()
    assert bool((k == 1).any())  # somebody is not ahead


class Late(Backbone):
    """The release's net: encodings, concatenated, one linear layer."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.width = 4
        for name in ("a", "b"):
            self.encoders[name] = nn.Linear(3, 4)
        self.decoder = nn.Linear(8, outputs, bias=False)

    def encode_modality(self, name, x, valid):
        return torch.tanh(self.encoders[name](x[:, 0]))

    def fuse(self, h, present, batch):
        return torch.cat(list(h.values()), -1)

    def decode(self, z):
        return self.decoder(z)


@pytest.mark.parametrize("rows", ["all", "present"])
def test_ogm_scores_are_slices_of_the_linear_layer(rows: str) -> None:
    torch.manual_seed(1)
    y = torch.randint(0, 3, (20,))
    features = {name: torch.randn(20, 1, 3, dtype=torch.float64) for name in "ab"}
    present = torch.rand(20, 2) < 0.6
    batch = MultimodalBatch(features, torch.ones(20, 2, dtype=torch.bool), y).drop(present=present)
    method = OGMGE(Late().double(), alpha=0.7, noise=False, samples=rows).double().train()
    output = method(batch)
    torch.testing.assert_close(output.losses["task"], F.cross_entropy(output.logits, y))
    output.losses["task"].backward()
    before = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.rebalance()
    h, W = method.backbone.encode(batch), method.backbone.decoder.weight
    score = []
    for m, name in enumerate("ab"):
        p = (h[name] @ W[:, 4 * m : 4 * m + 4].T).softmax(-1)
        values = [p[i, y[i]].item() for i in range(20) if rows == "all" or present[i, m]]
        score.append(sum(values) / (1 if rows == "all" else len(values)))
    ratio, k = coefficients_by_loops(score, 0.7)
    torch.testing.assert_close(method.last["score"], torch.tensor(score, dtype=torch.float64))
    torch.testing.assert_close(method.last["ratio"], torch.tensor(ratio, dtype=torch.float64))
    assert min(k) < 1
    for name, p in method.named_parameters():
        factor = k["ab".index(name.split(".")[2])] if ".encoders." in name else 1.0
        torch.testing.assert_close(p.grad, factor * before[name])


def test_ogm_noise_has_the_spread_of_the_gradient_before_it_is_scaled() -> None:
    data = toy(M=2)
    grads = []
    for noise in (False, True):
        with random_state(0):
            net = GenericBackbone.for_data(data, width=64, dropout=0.0)
        method = OGMGE(net, alpha=2.0, noise=noise).train()
        method(data[:]).losses["task"].backward()
        raw = [net.encoders[m].net[3].weight.grad.clone() for m in data.modalities]
        method.rebalance()
        grads.append([net.encoders[m].net[3].weight.grad for m in data.modalities])
    for m in range(2):
        spread = (grads[1][m] - grads[0][m]).std() / raw[m].std()
        assert 0.95 < spread < 1.05
    assert method.last["coefficient"].min() < 0.1


def test_only_kernels_on_request() -> None:
    data = MultimodalDataset.from_arrays(
        {"image": torch.randn(8, 1, 28, 28), "audio": torch.randn(8, 1, 20, 20)}, torch.arange(8) % 3, classes=10
    )
    with random_state(0):
        method = OGMGE(AVMNISTBackbone(), alpha=1.0, noise=False, kernels_only=True)
    assert {p.ndim for parts in method.encoders.parts.values() for p, _ in parts} == {4}
    fit(method, data, config=TrainConfig(epochs=1, select="last"))
    with pytest.raises(ValueError, match=r"encoders\['m0'\]: expected an encoder with trainable parameters"):
        make(OGMGE, toy(), kernels_only=True)


def test_ogm_counts_real_utterances_alone() -> None:
    batch = dialogues(dtype=torch.float32)
    with random_state(0):
        method = OGMGE(GenericBackbone(GenericConfig({"a": (2, 3), "b": (1, 5)}, 3, width=8, dropout=0.0))).train()
    method(batch).losses["task"].backward()
    method.rebalance()
    real = batch.extras["utterance"]
    score = method.last["score"].clone()
    wrong = batch.replace(target=torch.where(real, batch.target, 1 - batch.target.clamp(max=1)))
    loss = method(wrong).losses["task"]
    method.rebalance()
    torch.testing.assert_close(method.last["score"], score)
    logits = method(batch).logits
    torch.testing.assert_close(loss, F.cross_entropy(logits[real], batch.target[real]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha: expected a number of at least 0, got -1.0"),
        ({"alpha": math.nan}, "alpha: expected"),
        ({"samples": "some"}, "samples: expected 'all' or 'present'"),
        ({"active_epochs": (3, 1)}, r"active_epochs: expected None or a pair \(first, last\)"),
        ({"encoders": {"m0": nn.Linear(1, 1)}}, r"encoders: expected one for each of \['m0', 'm1'\], got \['m0'\]"),
        ({"encoders": {"m0": nn.Linear(1, 1), "m1": nn.Linear(1, 1)}}, r"expected a part of GenericBackbone"),
    ],
)
def test_what_ogm_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(OGMGE, toy(), **options)


def test_ogm_refuses_scores_and_calls_out_of_order() -> None:
    data = toy()
    scores = data.data.replace(target=torch.randn(60))
    with pytest.raises(
        ValueError,
        match=r"target: OGM-GE expects integer classes \(60,\), one a sample, or bool labels, got torch.float",
    ):
        make(OGMGE, data).train()(scores)
    with pytest.raises(RuntimeError, match="rebalance: expected a training step's forward and backward pass"):
        make(OGMGE, data).rebalance()
    run = {"data": "synthetic", "data_options": {"task": "regression"}, "method": "OGMGE", "train": {"epochs": 1}}
    with pytest.raises(ValueError, match="data: expected classes, whose probabilities OGM-GE compares"):
        train_and_score(run)


def test_ogm_is_active_in_its_epochs() -> None:
    data = toy()
    seen = {}

    class Log:
        def on_backward(self, state):
            seen[state.epoch] = state.method.active

    method = make(OGMGE, data, active_epochs=(2, 2), alpha=1.0)
    fit(method, data, config=TrainConfig(epochs=3, select="last"), callbacks=[Log()])
    assert seen == {1: False, 2: True, 3: False}
    assert method.active


# Both


@pytest.mark.slow
@pytest.mark.parametrize("method", [CGGM, OGMGE])
def test_an_interrupted_run_resumes_to_the_bit(tmp_path: Path, method: type) -> None:
    config = TrainConfig(epochs=5, batch_size=16, lr=1e-2, clip=1.0, seed=5)
    check_resumed(lambda seed: make(method, toy(), 0.2, seed), 2, config, PLAN, 11, tmp_path / "run.pt")


def test_ogm_accumulates() -> None:
    data = toy(64)
    results = []
    for size, accumulation in ((32, 1), (8, 4)):
        method = make(OGMGE, data, alpha=0.8, noise=False)
        config = TrainConfig(epochs=3, batch_size=size, accumulation=accumulation, optimizer=SGD, select="last")
        fit(method, data, config=config, train_plan=PLAN)
        results.append(torch.cat([weights(method), method.last["score"]]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [CGGM, OGMGE])
def test_it_learns_digits_with_parts_missing(method: type) -> None:
    config = TrainConfig(epochs=12, lr=3e-3, clip=2.0)
    learned_digits(lambda train: method(GenericBackbone.for_data(train)), config, (0.5, 0.3, 0.7), [(None, 0.8)])


def test_ogm_takes_the_columns_of_a_joint_net() -> None:
    batch = dialogues(dtype=torch.float32)
    method = OGMGE(Joint(), alpha=1.0, noise=False).train()
    method(batch).losses["task"].backward()
    before = method.backbone.rnn.weight_ih_l0.grad.clone()
    method.rebalance()
    a, b = method.last["coefficient"]
    expected = torch.cat([a * before[:, :6], b * before[:, 6:]], 1)
    torch.testing.assert_close(method.backbone.rnn.weight_ih_l0.grad, expected)
