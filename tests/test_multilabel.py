"""Samples with several labels: values, scores and discrepancies against loops, and every method on one small task."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from book.support import experiments
from mmlib import MultimodalBatch, MultimodalDataset, training
from mmlib.backbones import GenericBackbone, MLPEvaluator
from mmlib.baselines.cggm import CGGM
from mmlib.baselines.joint import JointTraining
from mmlib.baselines.mbt_sample import MBTSample
from mmlib.baselines.ogm_ge import OGMGE
from mmlib.baselines.pmr import PMR
from mmlib.batch import Output
from mmlib.coalitions import (
    accuracy_values,
    coalition_masks,
    prediction_accuracy_score,
    prediction_shift_score,
    shapley_values,
    subset_predictions,
    subset_values,
)
from mmlib.methods.balm import BALM, GradientRebalancing, discrepancies
from mmlib.methods.dear import DEAR
from mmlib.methods.dream import DREAM
from mmlib.methods.mce import MCE, prediction_value

K = 3


def task(n: int = 240, missing: float = 0.2, seed: int = 0) -> MultimodalDataset:
    """Label k is the sign of one feature: the first of "a", the second of "b", the third of both together."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, 1, 4, generator=generator) for _ in range(2))
    target = torch.stack([a[:, 0, 0] > 0.4, b[:, 0, 0] > 0.4, a[:, 0, 1] + b[:, 0, 1] > 0], -1)
    present = torch.rand(n, 2, generator=generator) > missing
    present[:, 0] |= ~present.any(-1)
    whole = MultimodalBatch({"a": a, "b": b}, torch.ones(n, 2, dtype=torch.bool), target, ids=torch.arange(n))
    return MultimodalDataset(whole.drop(present=present), {"task": "multilabel", "outputs": K})


@pytest.fixture(scope="module")
def splits() -> tuple[MultimodalDataset, MultimodalDataset, MultimodalDataset]:
    train, valid, test = task(), task(80, seed=1), task(200, seed=2)
    return train, valid, test


# --- values and scores against loops ----------------------------------------------------------------------------------


def phi(v: list[float]) -> list[float]:
    """Shapley values over all orders of arrival."""
    M = int(math.log2(len(v)))
    out, orders = [0.0] * M, list(itertools.permutations(range(M)))
    for order in orders:
        code = 0
        for m in order:
            out[m] += (v[code | 1 << m] - v[code]) / len(orders)
            code |= 1 << m
    return out


def test_the_value_is_the_fraction_of_right_labels() -> None:
    # Coalitions {}, {0}, {1}, {0, 1} of one sample with the labels 1, 0, 1; a logit of 0 says no.
    logits = torch.tensor([[9.0, 9, 9], [1, 1, 0], [-1, -1, 2], [1, -1, 3]])[:, None]
    target = torch.tensor([[True, False, True]])
    assert accuracy_values(logits, target).tolist() == [pytest.approx([0, 1 / 3, 2 / 3, 1])]
    assert accuracy_values(logits, target, empty=None)[0, 0] == pytest.approx(2 / 3)
    assert prediction_value(logits[1], target).tolist() == [pytest.approx(1 / 3)]
    assert shapley_values(accuracy_values(logits, target)).tolist() == [pytest.approx([1 / 3, 2 / 3])]
    # What the sample lacks changes nothing: {1} is empty to a sample without modality 1.
    alone = accuracy_values(logits, target, present=torch.tensor([[True, False]]))
    assert alone.tolist() == [pytest.approx([0, 1 / 3, 0, 1])]


def test_values_of_dialogues() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 5, K, generator=generator)
    target = torch.rand(2, 5, K, generator=generator) > 0.5
    present = torch.rand(2, 5, 2, generator=generator) > 0.3
    values = accuracy_values(logits, target, present=present)
    flat = accuracy_values(logits.flatten(1, 2), target.flatten(0, 1))
    assert values.shape == (2, 5, 4)
    assert torch.equal(values, flat.unflatten(0, (2, 5)))


@pytest.mark.parametrize("absent", ["zero_feature", "zero_input"])
def test_the_engine_equals_one_forward_pass_for_each_coalition(absent: str) -> None:
    data = task(12, 0.4)
    torch.manual_seed(0)
    net = GenericBackbone.for_data(data, width=8).double().eval()
    batch = data.data.replace(features={m: x.double() for m, x in data.data.features.items()})
    use_present = absent == "zero_feature"
    found = subset_values(net, batch, absent=absent, use_present=use_present, empty=0.0)
    said = subset_predictions(net, batch, multilabel=True, absent=absent, use_present=use_present)
    assert said.shape == (12, K, 4)
    pss, pas = prediction_shift_score(said), prediction_accuracy_score(said, batch.target)
    for i in range(12):
        values, answers = [], []
        for mask in coalition_masks(2):
            one = batch[i].drop(present=mask)
            if absent == "zero_input":
                one = one.replace(present=torch.ones_like(one.present), observed=dict(one.valid))
            with torch.no_grad():
                answer = [z > 0 for z in net(one)[0].tolist()]
            there = (mask & batch.present[i]).any()
            right = [x == y for x, y in zip(answer, batch.target[i].tolist(), strict=True)]
            values.append(sum(right) / K if there else 0.0)
            answers.append(answer)
        assert found[i].tolist() == pytest.approx(values, abs=1e-6)
        for k in range(K):
            assert said[i, k].tolist() == [answer[k] for answer in answers]
            V = [bin(c).count("1") * (answers[c][k] == batch.target[i, k].item()) for c in range(4)]
            assert pas[i, k].tolist() == pytest.approx(phi(V), abs=1e-6)
            shifts = [[answers[c | 1 << m][k] != answers[c][k] for c in range(4) if not c >> m & 1] for m in (0, 1)]
            assert pss[i, k].tolist() == pytest.approx([sum(s) / 2 for s in shifts], abs=1e-6)
    # Efficiency label by label, so of the means too.
    right = said[..., -1] == batch.target
    assert torch.allclose(pas.mean(1).sum(-1), 2 * right.float().mean(1))
    if use_present:  # a modality that is not there is a dummy
        assert bool((pss.mean(1)[~batch.present] == 0).all())
        assert bool((shapley_values(found)[~batch.present].abs() < 1e-6).all())


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_discrepancies_are_means_of_bernoulli_ones(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    fused, unimodal = torch.randn(4, K, generator=generator), torch.randn(2, 4, K, generator=generator)
    target = torch.rand(4, K, generator=generator) > 0.5
    found = discrepancies(fused, unimodal, target, kind)
    sigmoid = lambda z: 1 / (1 + math.exp(-z))
    for m, i in itertools.product(range(2), range(4)):
        total = 0.0
        for k in range(K):
            p, q = sigmoid(fused[i, k].item()), sigmoid(unimodal[m, i, k].item())
            total += {
                "kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
                "mse": (p - q) ** 2,
            }[kind]
        assert found[m, i].item() == pytest.approx(total / K, abs=1e-6)


def test_shapes_that_do_not_fit_are_named() -> None:
    target = torch.zeros(4, K, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"value: bool labels expect 'accuracy'"):
        prediction_value(torch.zeros(4, K), target, "dice")
    with pytest.raises(ValueError, match=r"value: bool labels expect 'accuracy'"):
        prediction_value(torch.zeros(4, 2), target)
    with pytest.raises(ValueError, match=r"logits: expected \[S, \(4, 3\)\] for labels"):
        accuracy_values(torch.zeros(4, 4, 2), target)


# --- training ---------------------------------------------------------------------------------------------------------


def _joint(train: MultimodalDataset, valid: MultimodalDataset) -> torch.nn.Module:
    return JointTraining(GenericBackbone.for_data(train, width=32), modality_dropout=0.2)


def _mce(train: MultimodalDataset, valid: MultimodalDataset) -> torch.nn.Module:
    config = training.TrainConfig(epochs=8, lr=5e-3, select="last", device="cpu")
    method = MCE.for_data(train, GenericBackbone.for_data(train, width=32), valid, config, hidden=32)
    assert method.upper is not None
    assert set(method.upper.table.mul(K).round().unique().tolist()) == {0, 1, 2, 3}
    return method


def _dream(train: MultimodalDataset, valid: MultimodalDataset) -> torch.nn.Module:
    config = training.TrainConfig(epochs=15, lr=5e-3, device="cpu")
    evaluator = MLPEvaluator.for_data(train, width=32)
    return DREAM.for_data(train, evaluator, valid, config, width=20, heads=2, repeats=1, empty="majority")


def _dear(train: MultimodalDataset, valid: MultimodalDataset) -> torch.nn.Module:
    return DEAR.for_data(train, width=16, heads=2, head_width=8, hidden=32, layers=1)


METHODS: dict[str, Any] = {
    "joint": _joint,
    "mce": _mce,
    "mce-released": lambda t, v: MCE(
        GenericBackbone.for_data(t, width=32),
        preset="avmnist",
        single_loss="present",
        upper_source="current",
        hidden=32,
    ),
    "dream": _dream,
    "dear": _dear,
    "balm": lambda t, v: BALM.for_data(t, GenericBackbone.for_data(t, width=32)),
    "balm-m": lambda t, v: BALM.for_data(t, GenericBackbone.for_data(t, width=32), preset="BALM-M", samples="present"),
    "cggm": lambda t, v: CGGM(GenericBackbone.for_data(t, width=32)),
    "ogm-ge": lambda t, v: OGMGE(GenericBackbone.for_data(t, width=32)),
    "mbt-sample": lambda t, v: MBTSample(GenericBackbone.for_data(t, width=32), warmup=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_labels(name: str, splits: tuple[MultimodalDataset, ...]) -> None:
    train, valid, test = splits
    with training.random_state(0):
        method = METHODS[name](train, valid)
    config = training.TrainConfig(epochs=12, batch_size=48, lr=1e-2, device="cpu")
    history = training.fit(method, train, valid, config)
    logits = training.predict(method, test)
    assert logits.shape == (200, K)
    assert test.target is not None
    constant = train.target.float().mean(0) > 0.5  # type: ignore[union-attr]
    floor = (constant == test.target).float().mean().item()
    scores = training.validation_scores(logits, test.data)
    assert scores["hamming_accuracy"] > floor + 0.1
    assert scores["macro_auroc"] > 0.75
    best = max(row["valid_macro_f1"] for row in history.epochs)
    assert history.best_epoch is not None
    assert history.epochs[history.best_epoch - 1]["valid_macro_f1"] == best


def test_the_scores_of_validation_by_hand() -> None:
    batch = MultimodalBatch(
        {"a": torch.zeros(2, 1, 1)}, torch.ones(2, 1).bool(), torch.tensor([[True, False], [False, False]])
    )
    scores = training.validation_scores(torch.tensor([[0.0, -1.0], [-2.0, -1.0]]), batch)
    log = lambda z: math.log(1 + math.exp(z))
    assert scores["loss"] == pytest.approx((log(0) + log(-1) + log(-2) + log(-1)) / 4)
    assert scores["subset_accuracy"] == 0.5
    assert scores["macro_f1"] == 0
    assert scores["macro_auroc"] == 1


def test_dream_averages_the_labels_scores(splits: tuple[MultimodalDataset, ...]) -> None:
    train = splits[0]
    torch.manual_seed(0)
    evaluator = MLPEvaluator.for_data(train, width=8).eval()
    model = DREAM.for_data(train, evaluator, width=8, heads=2)
    batch = train[:40]
    pss, pas = model.contributions(batch)
    said = subset_predictions(evaluator, batch, multilabel=True, absent="zero_input", use_present=False)
    assert torch.allclose(pss, prediction_shift_score(said).mean(1))
    assert pas is not None
    assert torch.allclose(pas, prediction_accuracy_score(said, batch.target).mean(1))
    assert bool((pss[~batch.present] == 0).all())  # that a modality is missing shows in its PSS
    drawn = DREAM.for_data(train, evaluator, width=8, heads=2, permutations=64).contributions(batch)
    assert torch.allclose(drawn.pss, pss, atol=0.25)
    assert torch.equal(drawn.pss.sum(-1) == 0, pss.sum(-1) == 0)
    model.precompute(train)
    assert torch.equal(model.table(train.ids[:40]), said)


def test_methods_name_targets_that_they_do_not_take(splits: tuple[MultimodalDataset, ...]) -> None:
    train = splits[0]
    backbone = GenericBackbone.for_data(train, width=8)
    with pytest.raises(ValueError, match="target: PMR expects integer classes .*one a sample"):
        PMR(backbone, 3).train()(train[:8])
    released = MCE(backbone, single_loss="released", state_factor=False, present=train.present, attention_heads=2)
    with pytest.raises(ValueError, match="single_loss: 'released' gives missing samples the class 0"):
        released.train()(train[:8])
    classes = train.data.replace(target=train.data.target.long().argmax(-1))  # type: ignore[union-attr]
    evaluator = MLPEvaluator.for_data(train, width=8).eval()
    with pytest.raises(ValueError, match=r"target: expected bool labels \[B, 3\], got torch.int64"):
        DREAM.for_data(train, evaluator, width=8, heads=2).train()(classes)
    plain = DREAM.for_data(train, evaluator, width=8, heads=2, multilabel=False)
    with pytest.raises(ValueError, match=r"target: expected int64 classes \[B\], got torch.bool"):
        plain.train()(train[:8])
    with pytest.raises(ValueError, match="multilabel: expected neither regression"):
        DREAM.for_data(train, evaluator, width=8, heads=2, regression=True, outputs=1)
    scores = DEAR.for_data(train, width=8, heads=1, head_width=8, hidden=8, layers=1, regression=True, outputs=1)
    with pytest.raises(ValueError, match=r"target: expected float scores \[B\], got torch.bool"):
        scores.train()(train[:8])
    with pytest.raises(ValueError, match="target: expected one a sample"):
        BALM.for_data(train, backbone).train()(train[:8].replace(target=torch.zeros(8, 2, 2).long()))
    rebalancing = GradientRebalancing(backbone, dict(backbone.encoders.items()), backbone.decoder[-1], 8, catch=False)
    with pytest.raises(ValueError, match="logits: expected"):
        rebalancing(torch.zeros(8, K), torch.zeros(8, 2, dtype=torch.bool), {})


def test_padding_of_dialogues_does_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 1, 2, generator=generator)
    target = torch.rand(3, 4, K, generator=generator) > 0.5
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    batch = MultimodalBatch({"a": x, "b": x}, torch.ones(3, 4, 2).bool(), target, extras={"utterance": real})
    train = MultimodalDataset(batch, {"task": "multilabel", "outputs": K})
    other = batch.replace(target=torch.where(real[..., None], target, ~target))
    for build in (JointTraining, BALM, OGMGE):
        torch.manual_seed(0)
        method = build(GenericBackbone.for_data(train, width=4, dropout=0.0)).train()
        first: Output = method(batch)
        assert torch.equal(first.losses["task"], method(other).losses["task"])
    assert training.validation_scores(first.logits, batch) == training.validation_scores(first.logits, other)


def test_a_sweep_scores_and_keeps_the_labels(
    splits: tuple[MultimodalDataset, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = dict(zip(("train", "valid", "test"), splits, strict=True))
    monkeypatch.setattr(experiments, "_splits", lambda *_: parts)
    short = {"epochs": 2, "lr": 1e-2}
    rows = experiments.train_and_score(
        {"method": "JointTraining", "device": "cpu", "train": short, "conditions": "subsets"}
    )
    found = {(row["condition"], row["metric"]): row["value"] for row in rows}
    tests = {"a", "b", "a+b"}
    names = ("subset_accuracy", "hamming_accuracy", "micro_f1", "macro_f1", "macro_auroc", "macro_ap")
    assert set(found) == {(test, name) for test in tests for name in names} | {("valid", "macro_f1")}
    kept = rows.predictions
    there = splits[2].present
    assert kept["target"].shape == kept["a"].shape == (200, K)
    assert (kept["a"][~there[:, 0]] == -1).all()  # nothing to predict from
    said = kept["a"][there[:, 0]]
    assert set(said.ravel().tolist()) <= {0, 1}
    assert (said == kept["target"][there[:, 0]]).mean() == pytest.approx(found["a", "hamming_accuracy"])
