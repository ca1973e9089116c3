"""Sample-level resampling: values and copies by hand and by loops, the extended epochs inside the loop, resuming."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from baselines.runs import check_resumed, learned_digits, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from book.support.experiments import train_and_score
from mmlib import MultimodalBatch, MultimodalDataset
from mmlib.backbones import GenericBackbone
from mmlib.baselines import MBTSample
from mmlib.baselines.mbt_sample import resampling_copies
from mmlib.data import fingerprint as data_fingerprint
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, predict, random_state

ROOT = Path(__file__).resolve().parents[2]


class Oracle(nn.Module):
    """A stand-in for a backbone: table [n, 2**M] says for which samples (by id) and coalitions it is right."""

    def __init__(self, table: np.ndarray):
        super().__init__()
        self.table = torch.as_tensor(table)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch: MultimodalBatch) -> torch.Tensor:
        code = (batch.present.long() << torch.arange(batch.present.shape[-1])).sum(-1)
        right = self.table[batch.ids.clamp_min(0), code].float()
        return torch.stack([right, 1 - right], -1) + self.weight  # the target is class 0 everywhere


def split(n: int, M: int, present: np.ndarray | None = None) -> MultimodalDataset:
    rng = np.random.default_rng(n)
    features = {f"m{m}": rng.normal(size=(n, 3)).astype("float32") + 5 for m in range(M)}
    here = np.ones((n, M), dtype=bool) if present is None else present
    return MultimodalDataset.from_arrays(features, np.zeros(n, dtype=int), present=here, classes=2, allow_empty=True)


# References: loops that import nothing under test


def shapley_by_loops(right: np.ndarray, present: np.ndarray) -> np.ndarray:
    """right [n, 2**M], present [n, M]: the average gain of v(S) = |S| 1[right] over all orders of arrival."""
    n, M = present.shape
    phi = np.zeros((n, M))
    for i in range(n):
        players = [m for m in range(M) if present[i, m]]
        value = lambda members, i=i: len(members) * int(bool(members) and right[i, sum(1 << m for m in members)])
        for order in itertools.permutations(players):
            for place, m in enumerate(order):
                phi[i, m] += value(order[: place + 1]) - value(order[:place])
        phi[i] /= math.factorial(len(players))
    return phi


def copies_by_loops(phi: np.ndarray, present: np.ndarray, lowest: bool) -> np.ndarray:
    copies = np.zeros(phi.shape, dtype=int)
    for i in range(len(phi)):
        there = [phi[i, m] for m in range(phi.shape[1]) if present[i, m]]
        for m in range(phi.shape[1]):
            if not present[i, m] or (lowest and phi[i, m] > min(there) + 1e-6):
                continue
            if phi[i, m] < -0.1 - 1e-6:
                copies[i, m] = 3
            elif phi[i, m] < 0.4 - 1e-6:
                copies[i, m] = 2
            elif phi[i, m] < 1 - 1e-6:
                copies[i, m] = 1
    return copies


# Right or wrong alone (a, b) and together: the values, and the copies of each, worked out by hand
OUTCOMES = [
    ((1, 1, 1), (1.0, 1.0), (0, 0)),
    ((1, 0, 1), (1.5, 0.5), (0, 1)),
    ((0, 1, 1), (0.5, 1.5), (1, 0)),
    ((0, 0, 1), (1.0, 1.0), (0, 0)),
    ((1, 1, 0), (0.0, 0.0), (2, 2)),
    ((1, 0, 0), (0.5, -0.5), (1, 3)),
    ((0, 1, 0), (-0.5, 0.5), (3, 1)),
    ((0, 0, 0), (0.0, 0.0), (2, 2)),
]


def test_every_outcome_of_two_modalities_by_hand() -> None:
    # coalition 0 is claimed to be right, which must not count: v(nothing) = 0
    table = np.array([(1, a, b, both) for (a, b, both), _, _ in OUTCOMES], dtype=bool)
    method, data = MBTSample(Oracle(table), batch_size=3), split(8, 2)
    phi = method.valuate(data)
    torch.testing.assert_close(phi, torch.tensor([values for _, values, _ in OUTCOMES]))
    assert sorted(set(phi.flatten().tolist())) == [-0.5, 0, 0.5, 1, 1.5]
    copies = resampling_copies(phi, data.present)
    assert copies.dtype == torch.int64
    assert copies.tolist() == [list(c) for _, _, c in OUTCOMES]
    # of the lowest alone: the third and the last but one lose the copy of the better one
    assert resampling_copies(phi, data.present, "lowest").tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [0, 0],
        [2, 2],
        [0, 3],
        [3, 0],
        [2, 2],
    ]

    extended = method.resample(data)
    first, second = [2, 4, 4, 5, 6, 6, 6, 7, 7], [1, 4, 4, 5, 5, 5, 6, 7, 7]
    assert extended.ids.tolist() == [*range(8), *first, *second]
    assert extended.present[8:].tolist() == [[True, False]] * 9 + [[False, True]] * 9
    torch.testing.assert_close(method.last["shapley"], torch.tensor([0.5, 0.5]))
    assert method.last["copies"].tolist() == copies.sum(0).tolist()


def test_bounds_belong_to_the_band_above_them() -> None:
    phi = torch.tensor([[1.0], [0.99], [0.4], [0.39], [-0.1], [-0.11], [1 - 1e-7], [0.4 - 1e-7]])
    copies = resampling_copies(phi, torch.ones(8, 1, dtype=torch.bool))
    assert copies[:, 0].tolist() == [0, 1, 1, 2, 2, 3, 0, 1]


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    M=st.integers(1, 4),
    n=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    weak=st.sampled_from(["auto", "each", "lowest"]),
)
def test_values_and_copies_are_those_of_loops(M: int, n: int, seed: int, weak: str) -> None:
    rng = np.random.default_rng(seed)
    right, present = rng.random((n, 2**M)) < 0.5, rng.random((n, M)) < 0.7
    data = split(n, M, present)
    method = MBTSample(Oracle(right), weak=weak, batch_size=5)
    phi, expected = method.valuate(data), shapley_by_loops(right, present)
    np.testing.assert_allclose(phi.numpy(), expected, atol=1e-5)
    assert (phi[~data.present].abs() < 1e-6).all()  # an absent modality gets nothing

    lowest = weak == "lowest" or (weak == "auto" and M > 2)
    copies = copies_by_loops(expected, present, lowest)
    assert resampling_copies(phi, data.present, weak).tolist() == copies.tolist()
    extended = method.resample(data)
    assert data_fingerprint(extended.data[:n]) == data_fingerprint(data)
    found = sorted(
        (int(i), row.tolist().index(True)) for i, row in zip(extended.ids[n:], extended.present[n:], strict=True)
    )
    assert found == sorted((i, m) for i in range(n) for m in range(M) for _ in range(copies[i, m]))
    for row in range(n, len(extended)):
        i, kept = int(extended.ids[row]), extended.present[row].tolist().index(True)
        for m in range(M):
            x = extended.data.features[f"m{m}"][row]
            assert torch.equal(x, data.data.features[f"m{m}"][i] if m == kept else torch.zeros_like(x))
            assert bool(extended.data.observed[f"m{m}"][row].any()) is (m == kept)
        assert extended.target[row] == data.target[i]


def test_three_modalities_by_hand() -> None:
    """All together and {a, b} are right, nothing else: a and b share what c does not need to bring.

    v(ab) = 2, v(abc) = 3. phi_c = 1/3 (3 - 2) = 1/3; phi_a = 1/6 * 2 + 1/3 * 3 = 4/3 = phi_b; they sum to 3.
    """
    right = np.zeros((2, 8), dtype=bool)
    right[0, [0b011, 0b111]] = True
    data = split(2, 3)
    phi = MBTSample(Oracle(right)).valuate(data)
    torch.testing.assert_close(phi, torch.tensor([[4 / 3, 4 / 3, 1 / 3], [0, 0, 0]]))
    assert resampling_copies(phi, data.present).tolist() == [[0, 0, 2], [2, 2, 2]]  # ties are all chosen


def test_a_missing_modality_is_no_player_and_a_single_one_is_judged_alone() -> None:
    present = np.array([[1, 0], [1, 0], [0, 1], [0, 0]], dtype=bool)
    right = np.array([[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=bool)
    method, data = MBTSample(Oracle(right)), split(4, 2, present)
    assert method.valuate(data).tolist() == [[1, 0], [0, 0], [0, 1], [0, 0]]
    extended = method.resample(data)
    assert extended.ids.tolist() == [0, 1, 2, 3, 1, 1]
    assert data_fingerprint(extended.data[4:5]) == data_fingerprint(data.data[1:2])
    assert method.last["shapley"].tolist() == [0.5, 1.0]


def test_scores_are_right_within_the_tolerance() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, batch: MultimodalBatch) -> torch.Tensor:
            return batch.present.float().sum(-1, keepdim=True) + self.weight

    data = split(3, 2)
    data = MultimodalDataset(data.data.replace(target=torch.tensor([1.3, 2.0, 5.0])))
    # one of two says 1, both say 2: right alone, right together, never right
    assert MBTSample(Constant()).valuate(data).tolist() == [[0, 0], [1, 1], [0, 0]]
    assert MBTSample(Constant(), tolerance=1.0).valuate(data).tolist() == [[1, 1], [1, 1], [0, 0]]


# In training


def resampling(data: MultimodalDataset, seed: int = 0, dropout: float = 0.3, **options) -> MBTSample:
    with random_state(seed):
        return MBTSample(GenericBackbone.for_data(data, width=8, dropout=dropout), **options)


class Watch:
    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.copies: list[int] = []
        self.seen: dict[int, list[int]] = {}
        self.rates: list[float] = []

    def on_epoch_start(self, state) -> None:
        self.lengths.append(len(state.train))
        self.copies.append(int(state.method.last["copies"].sum()) if getattr(state.method, "last", None) else 0)

    def on_batch(self, state) -> None:
        self.seen.setdefault(state.epoch, []).extend(state.batch.ids.tolist())

    def on_step(self, state) -> None:
        self.rates.append(state.optimizer.param_groups[0]["lr"])


def test_valuation_is_in_eval_mode_without_gradients_and_leaves_no_trace() -> None:
    data = toy()
    method = resampling(data, dropout=0.5).train()
    method.backbone.decoder.eval()
    before = torch.get_rng_state()
    first, second = method.valuate(data), method.valuate(data)
    assert torch.equal(first, second)  # dropout is off
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    assert method.training
    assert method.backbone.encoders["m0"].training
    assert not method.backbone.decoder.training
    right = np.zeros((60, 4), dtype=bool)
    for code, present in ((1, [True, False]), (2, [False, True]), (3, [True, True])):
        right[:, code] = (predict(method, data, present=present).argmax(-1) == data.target).numpy()
    np.testing.assert_allclose(first.numpy(), shapley_by_loops(right, np.ones((60, 2), dtype=bool)), atol=1e-6)


def test_epochs_grow_after_the_warm_up_and_the_steps_stay_the_same() -> None:
    data = toy()
    method, watch = resampling(data, warmup=2), Watch()
    config = TrainConfig(epochs=8, batch_size=16, lr=1e-2, schedule="cosine", select="last")
    history = fit(method, data, config=config, callbacks=[watch])
    assert watch.lengths[:2] == [60, 60]
    assert watch.copies[:2] == [0, 0]
    assert min(watch.copies[2:]) > 0
    assert watch.lengths[2:] == [60 + c for c in watch.copies[2:]]  # each epoch begins with the split again
    assert len(watch.rates) == history.epochs[-1]["step"] == 8 * math.ceil(60 / 16)
    assert len(history.epochs) < 8
    assert watch.rates[-1] == pytest.approx(0, abs=1e-12)  # the schedule ends with the training
    for epoch in (1, 2, 3):  # whole epochs, of which every row is drawn once
        assert len(watch.seen[epoch]) == watch.lengths[epoch - 1]
        assert set(watch.seen[epoch]) == set(range(60))
    never = resampling(data, warmup=99)
    assert len(fit(never, data, config=config).epochs) == 8
    assert never.last == {}


@pytest.mark.parametrize(("factor", "epochs"), [(0.5, 6), (1, 3), (2, 2)])
@pytest.mark.parametrize("loader", ["resident", "stream"])
def test_any_hook_may_replace_the_epochs_data(factor: float, epochs: int, loader: str) -> None:
    class Replaces:
        def on_epoch_start(self, state):
            assert len(state.train) == 60
            state.train = state.train.subset(torch.arange(int(60 * factor)) % 60)

    data, watch = toy(), Watch()
    method = resampling(data, warmup=99)
    config = TrainConfig(epochs=3, batch_size=10, select="last", loader=loader)
    history = fit(method, data, config=config, callbacks=[Replaces(), watch])
    assert watch.lengths == [60 * factor] * epochs
    assert history.epochs[-1]["step"] == 18
    assert len(history.epochs) == epochs


@pytest.mark.slow
@pytest.mark.parametrize("resample", [False, True])
def test_an_interrupted_run_resumes_to_the_bit(tmp_path: Path, resample: bool) -> None:
    plan = MissingPlan("bernoulli", rates=[0.4, 0.2, 0.3], resample=resample)
    config = TrainConfig(epochs=6, batch_size=16, lr=1e-2, schedule="onecycle", seed=5)
    make = lambda seed: resampling(toy(M=3), seed, warmup=1)
    assert len(check_resumed(make, 3, config, plan, 20, tmp_path / "run.pt")) < 6  # epochs grew


@pytest.mark.slow
def test_it_learns_digits_with_parts_missing() -> None:
    make = lambda train: MBTSample(GenericBackbone.for_data(train), warmup=1)
    learned_digits(make, TrainConfig(epochs=8, lr=3e-3))


@pytest.mark.slow
def test_the_runner_knows_it() -> None:
    train = {"epochs": 3, "lr": 3e-3}
    rows = train_and_score(
        {"data": "digits", "method": "MBTSample", "method_options": {"warmup": 1, "weak": "each"}, "train": train}
    )
    assert {row["method"] for row in rows} == {"MBTSample"}
    assert rows[-1]["value"] > 0.5


def test_what_does_not_fit_is_named() -> None:
    for options, message in (
        ({"warmup": -1}, "warmup: expected an integer of at least 0, got -1"),
        ({"weak": "best"}, "weak: expected one of auto, each, lowest, got 'best'"),
        ({"tolerance": math.nan}, "tolerance: expected a number of at least 0"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            MBTSample(Oracle(np.zeros((1, 4))), **options)
    with pytest.raises(ValueError, match=r"present: expected bool \[n, M\] like shapley \(3, 2\)"):
        resampling_copies(torch.zeros(3, 2), torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="weak: expected"):
        resampling_copies(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), "both")
    dialogues = MultimodalBatch({"a": torch.randn(2, 3, 1, 4)}, torch.ones(2, 3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"data: expected samples \[n\], got the leading shape \(2, 3\)"):
        MBTSample(Oracle(np.zeros((1, 4)))).valuate(MultimodalDataset(dialogues))
    data = split(2, 2)
    with pytest.raises(ValueError, match="batch: expected one with a target"):
        MBTSample(Oracle(np.zeros((2, 4)))).valuate(MultimodalDataset(data.data.replace(target=None)))
