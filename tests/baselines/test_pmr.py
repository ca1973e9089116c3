"""Prototypes, the prototype loss and who gets it: by hand, by loops, with parts missing, resuming."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from baselines.runs import check_resumed, learned_digits, toy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from book.support.experiments import train_and_score
from mmlib import MultimodalBatch, MultimodalDataset
from mmlib import data as sources
from mmlib.backbones import Backbone, GenericBackbone
from mmlib.baselines import PMR
from mmlib.baselines.pmr import prototype_log_probabilities
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, random_state


class Plain(Backbone):
    """Encodings are the scaled features themselves; in training mode they are moved by 100."""

    def __init__(self, modalities: int, width: int, classes: int):
        super().__init__()
        self.width = width
        for m in range(modalities):
            self.encoders[f"m{m}"] = nn.Linear(1, 1, bias=False)
            nn.init.ones_(self.encoders[f"m{m}"].weight)
        self.decoder = nn.Linear(modalities * width, classes)
        self.shift = 0.0

    def encode_modality(self, name: str, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return x[:, 0] * self.encoders[name].weight + (self.shift if self.training else 0)

    def fuse(self, h: dict[str, torch.Tensor], present: torch.Tensor, batch: MultimodalBatch) -> torch.Tensor:
        return torch.cat(list(h.values()), -1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z)


def plain(
    x: np.ndarray, y: list[int], K: int, present: np.ndarray | None = None, **options
) -> tuple[PMR, MultimodalBatch]:
    """x [M, n, d]: a method and the batch, in double precision."""
    M, n, d = x.shape
    torch.manual_seed(0)
    method = PMR(Plain(M, d, K), K, **options).double()
    features = {f"m{m}": torch.as_tensor(x[m], dtype=torch.float64)[:, None] for m in range(M)}
    batch = MultimodalBatch(features, torch.ones(n, M, dtype=torch.bool), torch.tensor(y))
    return method, batch if present is None else batch.drop(present=torch.as_tensor(present))


# References: loops that import nothing under test


def means_by_loops(x, y, present, K, old, seen, momentum):
    M, n, d = x.shape
    new, known = old.copy(), seen.copy()
    for m in range(M):
        for k in range(K):
            rows = [x[m, i] for i in range(n) if present[i, m] and y[i] == k]
            if rows:
                mean = sum(rows) / len(rows)
                new[m, k] = momentum * old[m, k] + (1 - momentum) * mean if seen[m, k] else mean
                known[m, k] = True
    return new, known


def terms_by_loops(x, y, present, prototypes, seen, coefficient):
    """Per modality: the score, the mean cross-entropy and the coefficient."""
    M, n, _ = x.shape
    scores, ce, count = np.zeros(M), np.zeros(M), np.zeros(M)
    for m in range(M):
        for i in range(n):
            if not present[i, m] or not seen[m, y[i]]:
                continue
            e = {k: math.exp(-math.dist(x[m, i], prototypes[m, k])) for k in range(seen.shape[1]) if seen[m, k]}
            p = {k: v / sum(e.values()) for k, v in e.items()}
            scores[m] += p[y[i]]
            ce[m] -= math.log(p[y[i]])
            count[m] += 1
    for m in range(M):
        if count[m]:
            ce[m] /= count[m]
    best = max((m for m in range(M) if count[m]), key=lambda m: scores[m], default=None)
    c = np.zeros(M)
    for m in range(M):
        if count[m] and scores[m] < scores[best]:
            c[m] = 1 if coefficient == "one" else min(scores[best] / scores[m] - 1, 1)
    return scores, ce, c


def test_probabilities_by_hand() -> None:
    h = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    prototypes = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]])
    seen = torch.tensor([True, True, False])
    p = prototype_log_probabilities(h, prototypes, seen).exp()
    a = 1 / (1 + math.exp(-5))
    torch.testing.assert_close(p, torch.tensor([[a, 1 - a, 0], [1 - a, a, 0]]))
    nothing = prototype_log_probabilities(h, prototypes, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(nothing.exp(), torch.full((2, 3), 1 / 3))
    assert prototype_log_probabilities(h.bfloat16(), prototypes, seen).dtype == torch.float32


def test_one_step_by_hand() -> None:
    """Two classes, encodings on a line. Prototypes of a at 0 and 4, of b at 0 and 1; samples sit on their prototypes.

    p_a = 1 / (1 + e^-4), p_b = 1 / (1 + e^-1): b is the weaker one and gets CE_b = log(1 + e^-1), a gets nothing.
    """
    x = np.array([[[0.0], [4.0]], [[0.0], [1.0]]])
    method, batch = plain(x, [0, 1], 2, alpha=0.5)
    method.update_prototypes(batch)
    assert method.prototypes[..., 0].tolist() == [[0, 4], [0, 1]]
    output = method(batch)
    assert set(output.losses) == {"task", "prototype"}
    p_a, p_b = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(-1))
    assert output.losses["prototype"].item() == pytest.approx(0.5 * math.log(1 + math.exp(-1)))
    assert method.last["score"].tolist() == pytest.approx([2 * p_a, 2 * p_b])
    assert method.last["coefficient"].tolist() == [0, 1]
    gradient = torch.autograd.grad(output.losses["prototype"], list(method.backbone.encoders.parameters()))
    assert gradient[0].item() == 0
    # sample 2: distance |w - 1| to its own prototype, w to the other; at w = 1 the first has no slope
    assert gradient[1].item() == pytest.approx(0.5 * 0.5 * -(1 - p_b))

    method, batch = plain(x, [0, 1], 2, coefficient="ratio")
    method.update_prototypes(batch)
    losses = method(batch).losses
    c = p_a / p_b - 1
    assert losses["prototype"].item() == pytest.approx(c * math.log(1 + math.exp(-1)))


def test_a_class_without_a_prototype_counts_in_no_term_of_that_modality() -> None:
    """b has met class 0 alone: its sample of class 1, far from everything, is not its fault, and p is 1 for class 0."""
    x = np.array([[[0.0], [200.0]], [[0.0], [200.0]]])
    method, batch = plain(x, [0, 1], 2)
    method.update_prototypes(plain(x, [0, 1], 2, np.array([[True, True], [True, False]]))[1])
    assert method.seen.tolist() == [[True, True], [True, False]]
    losses = method(batch).losses
    assert method.last["score"].tolist() == [2, 1]
    assert method.last["coefficient"].tolist() == [0, 1]
    assert losses["prototype"].item() == 0  # of one class, one is certain
    far = prototype_log_probabilities(
        torch.tensor([[200.0]]), torch.tensor([[0.0], [200.0]]), torch.tensor([True, False])
    )
    assert far.exp().tolist() == [[1, 0]]


def test_the_ratio_ends_at_one() -> None:
    x = np.array([[[0.0], [1.0], [0.0], [1.0]], [[0.0], [1.0], [0.0], [1.0]]])
    only_two = np.array([[True, True], [True, False], [True, False], [True, False]])
    method, batch = plain(x, [0, 1, 0, 1], 2, only_two, coefficient="ratio")
    method.update_prototypes(plain(x, [0, 1, 0, 1], 2)[1])
    method(batch)
    assert method.last["score"][0].item() == pytest.approx(4 * method.last["score"][1].item())  # 4 / 1 - 1 is 3
    assert method.last["coefficient"].tolist() == [0, 1]


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    M=st.integers(1, 3),
    n=st.integers(1, 9),
    K=st.integers(2, 4),
    seed=st.integers(0, 10_000),
    coefficient=st.sampled_from(["one", "ratio"]),
)
def test_prototypes_and_terms_are_those_of_loops(M: int, n: int, K: int, seed: int, coefficient: str) -> None:
    rng = np.random.default_rng(seed)
    x, present = rng.normal(size=(M, n, 3)) * 2, rng.random((n, M)) < 0.7
    y = rng.integers(0, K, n).tolist()
    options = {"coefficient": coefficient, "alpha": 0.7, "momentum": 0.4, "batch_size": 2}
    method, batch = plain(x, y, K, present, **options)
    prototypes, seen = np.zeros((M, K, 3)), np.zeros((M, K), dtype=bool)
    for first in (True, False):  # the second time with other samples, other classes and other gaps
        z = x if first else x[:, ::-1] + 1  # + makes a copy
        labels = y if first else [(k + 1) % K if k else 0 for k in y]
        there = present if first else present[::-1].copy()
        other = plain(z, labels, K, there)[1]
        method.update_prototypes(other)
        prototypes, seen = means_by_loops(z, labels, there, K, prototypes, seen, 0.4)
        assert method.seen.tolist() == seen.tolist()
        np.testing.assert_allclose(method.prototypes.numpy(), prototypes, atol=1e-12)

    output = method.train()(batch)
    scores, ce, c = terms_by_loops(x, y, present, prototypes, seen, coefficient)
    judged = (present & seen[:, y].T).any(0)
    assume(np.diff(np.sort(scores[judged])).min(initial=1) > 1e-9)  # rounding decides who leads in a tie
    np.testing.assert_allclose(method.last["score"].numpy(), scores, atol=1e-9)
    np.testing.assert_allclose(method.last["coefficient"].numpy(), c, atol=1e-9)
    assert output.losses["prototype"].item() == pytest.approx(0.7 * (c * ce).sum(), abs=1e-9)
    logits = method.backbone(batch)
    assert torch.equal(output.logits, logits)
    each = logits.logsumexp(-1) - logits[torch.arange(n), batch.target]
    assert output.losses["task"].item() == pytest.approx(each.mean().item(), abs=1e-9)
    sum(output.losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_dialogues_are_many_samples() -> None:
    rng = np.random.default_rng(0)
    x, present = rng.normal(size=(2, 6, 3)), rng.random((6, 2)) < 0.7
    method, flat = plain(x, [0, 1, 2, 2, 1, 0], 3, present)
    method.update_prototypes(flat)
    expected = method(flat).losses
    fold = lambda t: t.unflatten(0, (2, 3))
    dialogues = MultimodalBatch(
        {name: fold(v) for name, v in flat.features.items()}, fold(flat.present), fold(flat.target)
    )
    again, _ = plain(x, [0, 1, 2, 2, 1, 0], 3, present)
    again.update_prototypes(dialogues)
    torch.testing.assert_close(again.prototypes, method.prototypes)
    for name, loss in again(dialogues).losses.items():
        torch.testing.assert_close(loss, expected[name])


def test_before_any_prototype_and_with_a_modality_that_nobody_has_only_the_task_counts() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    method, batch = plain(x, [0, 1, 0, 1], 2)
    losses = method(batch).losses
    assert losses["prototype"].item() == 0
    only = np.array([[True, False]] * 4)
    method.update_prototypes(batch)
    method.prototypes[0] = 50.0  # the one that is there predicts badly, yet nothing is stronger
    method.prototypes[0, 0] = 0.0
    losses = method(plain(x, [0, 1, 0, 1], 2, only)[1]).losses
    assert losses["prototype"].item() == 0
    assert method.last["coefficient"].tolist() == [0, 0]


def test_means_are_taken_in_eval_mode_without_gradients_and_modes_come_back() -> None:
    x = np.array([[[0.0], [4.0]], [[0.0], [1.0]]])
    method, batch = plain(x, [0, 1], 2)
    method.backbone.shift = 100.0
    method.backbone.decoder.eval()
    before = torch.get_rng_state()
    method.update_prototypes(batch)
    assert method.prototypes[..., 0].tolist() == [[0, 4], [0, 1]]
    assert not method.prototypes.requires_grad
    assert method.backbone.training
    assert not method.backbone.decoder.training
    assert torch.equal(torch.get_rng_state(), before)


def test_out_of_training_there_are_no_losses() -> None:
    method, batch = plain(np.zeros((2, 3, 2)), [0, 1, 0], 2)
    assert method(batch.replace(target=None)).losses == {}
    assert method.eval()(batch).losses == {}


# In training


def pmr(data: MultimodalDataset, seed: int = 0, dropout: float = 0.3, **options) -> PMR:
    with random_state(seed):
        return PMR(GenericBackbone.for_data(data, width=8, dropout=dropout), data.info["outputs"], **options)


def test_each_epoch_begins_with_new_means_of_its_share() -> None:
    class Watch:
        rows: list[list[int]] = []

        def on_epoch_start(self, state):
            self.last = state.method.prototypes.clone()

    data, watch = toy(), Watch()
    method = pmr(data, fraction=0.25)
    seen: list[list[int]] = []
    update = method.update_prototypes
    method.update_prototypes = lambda d, samples: (seen.append(d.ids[samples].tolist()), update(d, samples))
    fit(method, data, config=TrainConfig(epochs=4, select="last"), callbacks=[watch])
    assert [len(rows) for rows in seen] == [15] * 4
    assert all(len(set(rows)) == 15 for rows in seen)
    assert len({tuple(sorted(rows)) for rows in seen}) == 4
    assert method.seen.all()
    assert torch.equal(method.prototypes, watch.last)
    expected = method.state_dict()
    assert {"prototypes", "seen"} <= set(expected)


@pytest.mark.slow
@pytest.mark.parametrize("resample", [False, True])
def test_an_interrupted_run_resumes_to_the_bit(tmp_path: Path, resample: bool) -> None:
    plan = MissingPlan("bernoulli", rates=[0.4, 0.2, 0.3], resample=resample)
    config = TrainConfig(epochs=4, batch_size=16, lr=1e-2, schedule="onecycle", seed=5)
    make = lambda seed: pmr(toy(M=3), seed, fraction=0.5, coefficient="ratio")
    check_resumed(make, 3, config, plan, 10, tmp_path / "run.pt")


@pytest.mark.slow
def test_it_learns_digits_with_parts_missing() -> None:
    make = lambda train: PMR(GenericBackbone.for_data(train), 10)
    method, test = learned_digits(make, TrainConfig(epochs=8, lr=3e-3)), sources.load("digits")["test"]
    # and the prototypes classify: what they are for
    device = method.prototypes.device
    with torch.no_grad():
        h = method.backbone.encode(test.data.to(device))
    for m, name in enumerate(test.modalities[:2]):
        p = prototype_log_probabilities(h[name], method.prototypes[m], method.seen[m])
        assert (p.argmax(-1) == test.target.to(device)).double().mean() > 0.5


@pytest.mark.slow
def test_the_runner_knows_it() -> None:
    train = {"epochs": 3, "lr": 3e-3}
    rows = train_and_score({"data": "digits", "method": "PMR", "method_options": {"fraction": 0.1}, "train": train})
    assert {row["method"] for row in rows} == {"PMR"}
    assert rows[-1]["value"] > 0.5
    with pytest.raises(ValueError, match="data: expected classes, whose means are PMR's prototypes"):
        train_and_score({"data": "synthetic", "data_options": {"task": "regression"}, "method": "PMR"})


def test_what_does_not_fit_is_named() -> None:
    backbone = Plain(2, 3, 4)
    for options, message in (
        ({"alpha": -1}, "alpha: expected a number of at least 0, got -1"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"fraction": 0}, r"fraction: expected a number in \(0, 1\], got 0"),
        ({"coefficient": "two"}, "coefficient: expected 'one' or 'ratio', got 'two'"),
        ({"batch_size": 0}, "batch_size: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            PMR(backbone, 4, **options)
    with pytest.raises(ValueError, match=r"classes: expected an integer of at least 2, got 1"):
        PMR(backbone, 1)
    del backbone.width
    with pytest.raises(ValueError, match="backbone: expected encodings of a common width, got Plain"):
        PMR(backbone, 4)

    method, batch = plain(np.zeros((2, 3, 2)), [0, 1, 0], 2)
    for target in (torch.zeros(3, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"target: PMR expects integer classes \(3,\), one a sample, got"):
            method(batch.replace(target=target))
    scores = toy()
    scores = MultimodalDataset(scores.data.replace(target=scores.target.float()))
    with pytest.raises(ValueError, match="target: PMR expects integer classes"):
        fit(pmr(toy()), scores, config=TrainConfig(epochs=1, select="last"))
    with pytest.raises(ValueError, match="classes: expected 3 as in the data, got 4"):
        fit(PMR(GenericBackbone.for_data(toy()), 4), toy(), config=TrainConfig(epochs=1, select="last"))
    wide = Plain(2, 5, 2).double()
    with pytest.raises(ValueError, match=r"h\['m0'\]: expected encodings \(3, 5\), got \(3, 2\)"):
        PMR(wide, 2).double().update_prototypes(batch)
