"""Masks: exact counts, achieved rates, what depends on what, and what happens to bad input."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlib.batch import MultimodalBatch, MultimodalDataset
from mmlib.missing import (
    KINDS,
    MissingMask,
    MissingPlan,
    bernoulli_mask,
    exact_count_mask,
    frame_mask,
    heterogeneous_mask,
    imbalanced_mask,
    lnln_protocol,
)
from mmlib.missing.operators import mix_, subset_counts

quick = settings(deadline=None, max_examples=30)
rate = st.floats(0, 1, allow_nan=False)
NAMES = ("audio", "language", "vision")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(n: int = 120, frames=(8, 8, 5), seed: int = 0, **options) -> MultimodalDataset:
    """Three modalities of unequal widths and lengths, four classes, ids that are not positions."""
    rng = np.random.default_rng(seed)
    features = {
        name: rng.normal(size=(n, t, d)).astype("float32") for name, t, d in zip(NAMES, frames, (3, 4, 2), strict=True)
    }
    lengths = {"vision": rng.integers(2, frames[2] + 1, n)}
    ids = [f"clip-{7 * i + 3}" for i in range(n)]
    return MultimodalDataset.from_arrays(
        features, rng.integers(0, 4, n), lengths=lengths, ids=ids, classes=4, **options
    )


def patterns(mask: torch.Tensor) -> dict[str, int]:
    rows = ["".join("01"[int(x)] for x in row) for row in mask.tolist()]
    return {p: rows.count(p) for p in sorted(set(rows))}


def same(a: MissingMask, b: MissingMask) -> bool:
    """Equal rows for equal ids, whatever the order."""
    rows = b.rows(a.ids)
    return torch.equal(a.present, b.present[rows]) and all(
        torch.equal(x, b.observed[m][rows]) for m, x in a.observed.items()
    )


# --- the positional functions ---------------------------------------------------------------------------------------


def test_imbalanced_mask_has_the_subset_counts_of_the_paper():
    """N = 5810, r = (.5, .7, .3) in (a, l, v): BALM's training set, worked by hand."""
    mask = imbalanced_mask(5810, (0.5, 0.7, 0.3), seeded())
    assert patterns(mask) == {
        "111": 610, "110": 261, "011": 610, "101": 1423, "100": 814, "010": 465, "001": 1627,
    }  # fmt: skip
    achieved = 1 - mask.float().mean(0)
    assert torch.allclose(achieved, torch.tensor([0.4651, 0.6651, 0.2651]), atol=1e-4)


def test_imbalanced_mask_is_shuffled():
    mask = imbalanced_mask(3000, (0.5, 0.7, 0.3), seeded())
    changes = (mask[1:] != mask[:-1]).any(-1).float().mean()
    assert changes > 0.7  # in blocks it would be 6 of 2999
    assert not torch.equal(mask, imbalanced_mask(3000, (0.5, 0.7, 0.3), seeded(1)))
    assert torch.equal(mask, imbalanced_mask(3000, (0.5, 0.7, 0.3), seeded()))


@pytest.mark.slow
@quick
@given(st.integers(1, 4000), st.lists(st.floats(0, 0.99), min_size=1, max_size=4))
def test_imbalanced_mask_achieves_its_bound(n, rates):
    mask = imbalanced_mask(n, rates, seeded())
    assert mask.shape == (n, len(rates))
    assert mask.dtype == torch.bool
    assert mask.any(-1).all()
    lost = (~mask).float().mean(0).tolist()
    slack = (2 ** len(rates)) / n + 1e-9
    if all(r > 0 for r in rates):
        assert all(abs(r - a) <= math.prod(rates) / len(rates) + slack for r, a in zip(rates, lost, strict=True))
    for r, a in zip(rates, lost, strict=True):
        if r == 0:
            assert a == 0


def test_subset_counts_against_a_loop():
    for n, rates in itertools.product((7, 100, 1234), ((0.3, 0.5, 0.7), (0.25, 0.75), (0.9, 0.9, 0.9, 0.9))):
        counts = {}
        for pattern in itertools.product((0, 1), repeat=len(rates)):
            ratio = 1.0
            for there, r in zip(pattern, rates, strict=True):
                ratio *= (1 - r) if there else r
            counts[pattern] = int(np.floor(n * ratio + 1e-9)) if any(pattern) else 0
        rest = n - sum(counts.values())
        for m in range(len(rates)):
            single = tuple(int(k == m) for k in range(len(rates)))
            counts[single] += rest // len(rates) + (m < rest % len(rates))
        assert {tuple(map(int, p)): c for p, c in subset_counts(n, rates)} == counts


def test_rates_of_zero_and_one():
    for function in (imbalanced_mask, bernoulli_mask):
        mask = function(500, (0.0, 0.5, 1.0), seeded())
        assert mask[:, 0].all()
        assert not mask[:, 2].any()
        assert function(50, (0.0, 0.0), seeded()).all()
    mask = imbalanced_mask(500, (1.0, 0.5, 0.5), seeded())
    assert not mask[:, 0].any()
    assert mask.any(-1).all()
    assert imbalanced_mask(10, (0.9, 0.5), seeded()).sum() >= 10  # 1 - 0.9 is a little less than 0.1 in binary
    assert patterns(imbalanced_mask(10, (0.9, 0.0), seeded())) == {"01": 9, "11": 1}


def test_bernoulli_mask_has_the_conditional_distribution():
    """Every pattern's frequency against the product of rates, divided by the chance not to be empty."""
    rates, n = (0.6, 0.8, 0.9), 200_000
    mask = bernoulli_mask(n, rates, seeded())
    nothing = math.prod(rates)
    for pattern in itertools.product((False, True), repeat=3):
        share = math.prod(1 - r if there else r for there, r in zip(pattern, rates, strict=True)) / (1 - nothing)
        if not any(pattern):
            share = 0.0
        got = (mask == torch.tensor(pattern)).all(-1).double().mean().item()
        assert abs(got - share) < 5 * math.sqrt(share * (1 - share) / n) + 1e-12
    for m, r in enumerate(rates):
        expected = (r - nothing) / (1 - nothing)
        assert abs((~mask[:, m]).double().mean().item() - expected) < 5 * math.sqrt(0.25 / n)


@quick
@given(st.integers(1, 200), st.lists(rate, min_size=1, max_size=5), st.integers(0, 5))
def test_bernoulli_mask_never_empties_a_row(n, rates, seed):
    if all(r == 1 for r in rates):
        rates[0] = 0.999999
    mask = bernoulli_mask(n, rates, seeded(seed))
    assert mask.shape == (n, len(rates))
    assert mask.any(-1).all()


@quick
@given(st.integers(2, 300), st.lists(rate, min_size=1, max_size=4), st.integers(0, 5))
def test_exact_count_mask_is_exact_or_says_why_not(n, rates, seed):
    missing = [int(n * r) for r in rates]
    if all(r == 1 for r in rates) or sum(n - k for k in missing) < n:
        with pytest.raises(ValueError, match="rates"):
            exact_count_mask(n, rates, seeded(seed))
        return
    mask = exact_count_mask(n, rates, seeded(seed))
    assert (~mask).sum(0).tolist() == missing
    assert mask.any(-1).all()


def test_exact_count_mask_where_every_row_keeps_just_one():
    mask = exact_count_mask(999, (2 / 3, 2 / 3, 2 / 3), seeded())
    assert (~mask).sum(0).tolist() == [666, 666, 666]
    assert mask.sum(-1).eq(1).all()
    assert exact_count_mask(100, (0.29, 0.0), seeded())[:, 0].sum() == 72  # int(100 * 0.29) is 28


def test_exact_counts_are_drawn_independently():
    """Far from empty rows the modalities' absences are uncorrelated."""
    mask = exact_count_mask(20_000, (0.2, 0.3, 0.1), seeded()).double()
    assert torch.corrcoef(mask.T).fill_diagonal_(0).abs().max() < 0.05


@quick
@given(st.integers(1, 40), st.integers(1, 33), rate, st.booleans(), st.booleans(), st.integers(0, 99))
def test_frame_mask_stays_inside_the_lengths(n, frames, r, ends, one, seed):
    lengths = torch.randint(0, frames + 1, (n,), generator=seeded(seed))
    mask = frame_mask(lengths, frames, r, seeded(seed), keep_ends=ends, keep_one=one)
    inside = torch.arange(frames) < lengths[:, None]
    assert mask.shape == (n, frames)
    assert not (mask & ~inside).any()
    some = lengths > 0
    if ends:
        assert mask[some, 0].all()
        assert mask[some, lengths[some] - 1].all()
    if one:
        assert mask[some].any(-1).all()
    if r == 0:
        assert torch.equal(mask, inside)
    if r == 1 and not (ends or one):
        assert not mask.any()


def test_frame_mask_rates_and_nesting():
    lengths = torch.full((4000,), 50)
    for r in (0.1, 0.5, 0.93):
        assert abs(1 - frame_mask(lengths, 50, r, seeded()).double().mean().item() - r) < 5 * math.sqrt(0.25 / 2e5)
    low, high = (frame_mask(lengths, 50, r, seeded(3)) for r in (0.3, 0.6))
    assert not (high & ~low).any()
    per_sample = torch.linspace(0, 1, 4000)
    lost = 1 - frame_mask(lengths, 50, per_sample, seeded()).double().mean(-1)
    assert lost[0] == 0
    assert lost[-1] == 1
    assert abs((lost - per_sample).mean()) < 0.005
    assert (lost - per_sample).abs().max() < 0.4
    columns = frame_mask(lengths, 50, 0.5, seeded()).double()
    assert torch.corrcoef(columns.T).fill_diagonal_(0).abs().max() < 0.09  # no frame follows another one
    assert torch.equal(frame_mask([2, 3], 3, 0.0), torch.tensor([[True, True, False], [True, True, True]]))


@quick
@given(st.integers(5, 300), rate, st.integers(2, 4), st.integers(0, 9))
def test_heterogeneous_mask_has_disjoint_sets_of_the_stated_sizes(n, eta, m, seed):
    lengths = torch.randint(2, 9, (n, m), generator=seeded(seed))
    present, observed = heterogeneous_mask(lengths, [8] * m, eta, seeded(seed))
    inside = [torch.arange(8) < lengths[:, i, None] for i in range(m)]
    assert present.any(-1).all()
    lost_modality = ~present.all(-1)
    lost_frames = torch.zeros(n, dtype=torch.bool)
    for i in range(m):
        assert not (observed[i] & ~(inside[i] & present[:, i, None])).any()
        assert torch.equal(observed[i].any(-1), present[:, i])  # what is left keeps a frame
        lost_frames |= present[:, i] & (observed[i] != inside[i]).any(-1)
    two, one = math.floor(2 * eta * n / 5 + 1e-9), math.floor(eta * n / 5 + 1e-9)
    assert int((lost_modality & ~lost_frames).sum()) == two
    assert int((~lost_modality & lost_frames).sum()) == two
    assert int((lost_modality & lost_frames).sum()) == one


def test_heterogeneous_mask_by_hand():
    present, observed = heterogeneous_mask(torch.full((1000, 3), 20), 20, 0.5, seeded())
    counts = patterns(present)
    assert counts.pop("111") == 700  # 200 lose modalities only, 100 both
    assert set(counts) == {"001", "010", "011", "100", "101", "110"}
    assert all(25 < c < 80 for c in counts.values())  # 300 over six patterns, uniform
    kept = torch.cat([x.double().mean(-1)[present[:, i]] for i, x in enumerate(observed)])
    hurt = kept[kept < 1]
    assert abs(1 - hurt.mean() - 0.5) < 0.03  # U(0.1, 0.9)
    ratios = torch.stack([x.double().mean(-1) for x in observed], -1)[present.all(-1)]
    ratios = ratios[ratios.min(-1).values < 1]
    assert torch.corrcoef(ratios.T)[0, 1] > 0.7  # one ratio per sample, shared by its modalities
    natural, _ = heterogeneous_mask(torch.tensor([[3, 0], [0, 3], [3, 3]] * 50), 3, 1.0, seeded())
    assert torch.equal(natural[::3], torch.tensor([[True, False]] * 50))


def test_the_global_generator_is_the_default():
    torch.manual_seed(5)
    a = [bernoulli_mask(50, (0.5, 0.5)), frame_mask([8] * 50, 8, 0.5)]
    torch.manual_seed(5)
    b = [bernoulli_mask(50, (0.5, 0.5)), frame_mask([8] * 50, 8, 0.5)]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(frame_mask([8] * 50, 8, 0.5), b[1])


@pytest.mark.parametrize("function", [imbalanced_mask, bernoulli_mask, exact_count_mask])
@pytest.mark.parametrize(
    ("n", "rates", "message"),
    [
        (0, (0.5, 0.5), "n: "),
        (-3, (0.5, 0.5), "n: "),
        (10, (0.5, 1.2), r"rates\[1\]: .*1\.2"),
        (10, (-0.1, 0.5), r"rates\[0\]: .*-0\.1"),
        (10, (float("nan"), 0.5), r"rates\[0\]: .*nan"),
        (10, (1.0, 1.0, 1), "below 1"),
        (10, (), "rates"),
    ],
)
def test_bad_rates_are_refused(function, n, rates, message):
    with pytest.raises(ValueError, match=message):
        function(n, rates)
    with pytest.raises(TypeError, match="rates"):
        function(10, "0.5")
    with pytest.raises(TypeError, match="rates"):
        function(10, [None, 0.5])
    with pytest.raises(TypeError, match="n: "):
        function(10.5, (0.5, 0.5))


def test_bad_frames_are_refused():
    with pytest.raises(ValueError, match="rate: .*1.5"):
        frame_mask([3, 4], 5, 1.5)
    with pytest.raises(ValueError, match="rate"):
        frame_mask([3, 4], 5, float("nan"))
    with pytest.raises(ValueError, match="rate: expected a float or 2"):
        frame_mask([3, 4], 5, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="lengths: .*from 3 to 9"):
        frame_mask([3, 9], 5, 0.1)
    with pytest.raises(ValueError, match="lengths"):
        frame_mask([-1, 2], 5, 0.1)
    with pytest.raises(ValueError, match="lengths"):
        frame_mask(torch.ones(3), 5, 0.1)
    with pytest.raises(ValueError, match="lengths"):
        frame_mask([], 5, 0.1)
    with pytest.raises(ValueError, match="max_len"):
        frame_mask([0], 0, 0.1)
    with pytest.raises(ValueError, match="eta"):
        heterogeneous_mask([[3, 3]], 3, 1.1)
    with pytest.raises(ValueError, match="lengths"):
        heterogeneous_mask([3, 3], 3, 0.1)
    with pytest.raises(ValueError, match="max_len: expected 2"):
        heterogeneous_mask([[3, 3]], [3, 3, 3], 0.1)
    with pytest.raises(ValueError, match="at least two modalities"):
        heterogeneous_mask([[3]], 3, 0.1)


def test_the_hash_is_splitmix64():
    """Against the same steps on Python's unbounded integers, and the generator's published first output for seed 0."""

    def reference(z: int) -> int:
        mask = (1 << 64) - 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert reference(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    values = [random.Random(0).randrange(-(1 << 63), 1 << 63) for _ in range(5)] + [0, 1, -1, (1 << 63) - 1]
    got = mix_(torch.tensor(values)).tolist()
    assert [g & ((1 << 64) - 1) for g in got] == [reference(v & ((1 << 64) - 1)) for v in values]


# --- plans ----------------------------------------------------------------------------------------------------------

PLANS = {
    "none": MissingPlan("none"),
    "fixed": MissingPlan("fixed", present=("language",)),
    "imbalanced": MissingPlan("imbalanced", (0.5, 0.7, 0.3), seed=4),
    "blocked": MissingPlan("imbalanced", (0.5, 0.7, 0.3), assign="blocked"),
    "bernoulli": MissingPlan("bernoulli", {"audio": 0.8, "vision": 0.9}),
    "exact_count": MissingPlan("exact_count", (0.2, 0.5, 0.8)),
    "kept": MissingPlan("exact_count", 0.7, all_missing="keep"),
    "frames": MissingPlan("frames", 0.6, keep_one=True),
    "per sample": MissingPlan("frames", {"audio": (0.2, 0.9), "language": 0.3}),
    "lnln": MissingPlan("lnln"),
    "lnln test": MissingPlan("lnln", 0.4),
    "heterogeneous": MissingPlan("heterogeneous", 0.9),
    "per_class": MissingPlan("per_class", counts={"audio": 5, "vision": 2}),
    "mar": MissingPlan("mar", {"audio": 0.5, "language": 0.3}, on="vision"),
    "mar class": MissingPlan("mar", {"audio": [0.1, 0.4, 0.6, 0.9]}, on="class"),
    "mnar": MissingPlan("mnar", 0.4, statistic="norm"),
    "burst": MissingPlan("burst", 0.5, blocks=2),
    "both": MissingPlan("bernoulli", 0.5, then=MissingPlan("frames", 0.5)),
}
INDEPENDENT = ("none", "fixed", "bernoulli", "frames", "per sample", "lnln test", "mar class", "burst", "both")


def test_every_kind_is_tested():
    assert {p.kind for p in PLANS.values()} == set(KINDS)


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_a_plan_depends_on_ids_and_not_on_their_order(plan, tmp_path):
    data = toy()
    mask = plan.draw(data)
    shuffled = data.subset(torch.randperm(len(data), generator=seeded(1)))
    again = plan.draw(shuffled)
    assert same(mask, again)
    assert mask.fingerprint == again.fingerprint
    if plan.kind not in ("none", "fixed"):
        other = MissingPlan.from_dict({**plan.to_dict(), "seed": 99})
        assert same(mask, other.draw(data)) == (plan is PLANS["blocked"])  # blocks do not draw anything

    mask.save(tmp_path / "mask.pt")
    loaded = MissingMask.load(tmp_path / "mask.pt")
    assert same(mask, loaded)
    assert loaded.fingerprint == mask.fingerprint
    assert loaded.plan == plan
    assert loaded.realised() == mask.realised()

    left = mask.apply(shuffled)
    assert torch.equal(left.present, mask.present[mask.rows(shuffled.ids)])
    for m in mask.observed:
        assert torch.equal(left.data.observed[m], mask.observed[m][mask.rows(shuffled.ids)])
        assert not (left.data.features[m] * ~left.data.observed[m][..., None]).any()
        assert not (mask.observed[m] & ~data.data.valid[m]).any()
    if not plan.may_empty:
        assert left.present.any(-1).all()
        assert mask.realised()["empty"] == 0
    assert json.loads(json.dumps(mask.realised()))["samples"] == len(data)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_plans_give_a_part_what_they_give_the_whole(name):
    data = toy()
    whole, part = PLANS[name].draw(data), data.subset(torch.arange(10, 70, 3))
    assert same(PLANS[name].draw(part), whole)


def test_the_order_of_the_modalities_does_not_matter_to_independent_plans():
    data = toy()
    turned = data.select(["vision", "audio", "language"])
    plan = MissingPlan("frames", {"audio": 0.5, "vision": 0.2}, keep_one=True)
    a, b = plan.draw(data), plan.draw(turned)
    assert torch.equal(a.observed["audio"], b.observed["audio"])
    left = a.apply(turned)
    assert torch.equal(left.data.observed["vision"], a.observed["vision"])
    one = a.apply(data.select(["vision"]))
    assert torch.equal(one.data.observed["vision"], a.observed["vision"])


def test_resampling_and_epochs():
    data = toy()
    still, moving = MissingPlan("bernoulli", 0.5), MissingPlan("bernoulli", 0.5, resample=True)
    assert same(still.draw(data, epoch=0), still.draw(data, epoch=7))
    assert same(moving.draw(data, epoch=3), moving.draw(data, epoch=3))
    assert not same(moving.draw(data, epoch=3), moving.draw(data, epoch=4))
    assert moving.draw(data, epoch=3).epoch == 3


def test_plans_in_a_chain_draw_different_numbers():
    data = toy(2000)
    plan = MissingPlan("frames", {"audio": 0.5}, then=MissingPlan("frames", {"audio": 0.5}))
    assert abs(plan.draw(data).realised()["frames"]["audio"] - 0.75) < 0.02


def test_fixed_patterns_and_natural_gaps():
    there = np.ones((120, 3), dtype=bool)
    there[:10, 1] = False
    data = toy(present=there)
    with pytest.raises(ValueError, match="10 of 120 samples"):
        MissingPlan("fixed", present=("language",)).draw(data)
    mask = MissingPlan("fixed", present=("language",), allow_empty=True).draw(data)
    report = mask.realised()
    assert report["empty"] == 10
    assert report["natural"] == {"audio": 0.0, "language": 10 / 120, "vision": 0.0}
    assert report["rates"] == {"audio": 1.0, "language": 0.0, "vision": 1.0}
    assert report["subsets"] == {"010": 110, "000": 10}


@pytest.mark.parametrize("name", [n for n, p in PLANS.items() if p.kind != "fixed" and not p.may_empty])
def test_nobody_is_emptied_where_data_are_missing_by_nature(name):
    rng = np.random.default_rng(3)
    there = rng.random((120, 3)) < 0.5
    there[~there.any(-1), 0] = True
    data = toy(present=there)
    left = PLANS[name].draw(data).apply(data)
    assert left.present.any(-1).all()
    assert not (left.present & ~data.present).any()


def test_hard_frame_rates_keep_one_frame_per_sample():
    data = toy()
    mask = MissingPlan("frames", 0.97).draw(data)
    frames = sum(x.sum(-1) for x in mask.observed.values())
    report = mask.realised()
    assert report["restored"] > 0
    assert report["empty"] == 0
    assert (frames >= 1).all()
    empty = MissingPlan("frames", 0.97, allow_empty=True).draw(data).realised()
    assert empty["empty"] == report["restored"]
    with pytest.raises(ValueError, match="rates of 1"):
        MissingPlan("frames", 1.0).draw(data)
    one = MissingPlan("frames", 1.0, keep_one=True).draw(data)
    assert all((x.sum(-1) == 1).all() for x in one.observed.values())
    nothing = MissingPlan("frames", 1.0, allow_empty=True).draw(data)
    assert not nothing.present.any()


def test_the_report_against_counting():
    data = toy()
    mask = PLANS["both"].draw(data)
    left = mask.apply(data)
    report = mask.realised()
    for m, name in enumerate(NAMES):
        assert report["rates"][name] == pytest.approx(1 - left.present[:, m].double().mean().item())
        gone = 1 - left.data.observed[name].sum().item() / data.data.observed[name].sum().item()
        assert report["frames"][name] == pytest.approx(gone)
    assert report["subsets"] == dict(sorted(report["subsets"].items(), key=lambda x: -x[1]))
    assert {k: v for k, v in report["subsets"].items() if v} == patterns(left.present)
    assert sum(report["subsets"].values()) == 120


def test_lnln_training_rates():
    """Half of the samples (rounded down) lose nothing of a modality, the others U(0, 1) of its frames."""
    rng = np.random.default_rng(0)
    n = 4001
    data = MultimodalDataset.from_arrays({m: rng.normal(size=(n, 40, 1)) for m in ("a", "v")}, rng.integers(0, 2, n))
    mask = MissingPlan("lnln").draw(data)
    lost = {m: 1 - x.double().mean(-1) for m, x in mask.observed.items()}
    for x in lost.values():
        assert int((x == 0).sum()) >= 2000
        hurt = x[x > 0]
        assert abs(hurt.mean() - 0.5) < 0.03
        assert abs(hurt.std() - math.sqrt(1 / 12 + 1 / 6 / 40)) < 0.03
    assert abs(torch.corrcoef(torch.stack(list(lost.values())))[0, 1]) < 0.08  # modalities are independent
    shared = MissingPlan("frames", 0.5, shared=True).draw(data)
    assert torch.equal(shared.observed["a"], shared.observed["v"])


def test_shared_frames_of_equally_long_modalities():
    rng = np.random.default_rng(0)
    frames = {"language": 12, "audio": 30, "vision": 30}
    data = MultimodalDataset.from_arrays({m: rng.normal(size=(40, T, 1)) for m, T in frames.items()}, np.arange(40) % 2)
    seen = MissingPlan("lnln", 0.5, shared="equal").draw(data).observed
    assert torch.equal(seen["audio"], seen["vision"])
    assert not torch.equal(seen["language"], seen["audio"][:, :12])
    assert MissingPlan.from_dict(MissingPlan("lnln", shared="equal").to_dict()).shared == "equal"
    with pytest.raises(ValueError, match="shared: expected True or False or 'equal'"):
        MissingPlan("lnln", shared="some")


def test_lnln_protocol():
    rng = np.random.default_rng(0)
    frames = {"language": 12, "audio": 30, "vision": 30}
    arrays = {m: rng.normal(size=(300, T, 1)) for m, T in frames.items()}
    data = MultimodalDataset.from_arrays(arrays, np.arange(300) % 2)
    train, tests = lnln_protocol(seed=3, keep_ends=["language"])
    assert list(tests) == [f"r={r / 10}" for r in range(10)]
    assert train == MissingPlan("lnln", seed=3, resample=True, keep_ends=("language",))
    one, two = train.draw(data, epoch=1), train.draw(data, epoch=2)
    assert one.fingerprint != two.fingerprint
    for name, plan in tests.items():
        mask = plan.draw(data)
        rate = float(name[2:])
        assert not mask.restored  # text keeps its ends, so nothing is left empty
        for m in ("audio", "vision"):
            assert mask.realised()["frames"].get(m, 0.0) == pytest.approx(rate, abs=0.02)
        if rate:
            assert mask.realised()["frames"]["language"] == pytest.approx(rate * 10 / 12, abs=0.03)
            assert mask.observed["language"][:, [0, -1]].all()
            assert not torch.equal(mask.observed["audio"], mask.observed["vision"])
    # The tests do not follow the run's seed, training does; as released neither does, and nothing is drawn again.
    other, same = lnln_protocol(seed=4, keep_ends=["language"])
    assert same == tests
    assert other.draw(data, epoch=1).fingerprint != one.fingerprint
    (a, tests_a), (b, _) = (lnln_protocol(seed=s, static_masks=True) for s in (3, 4))
    assert a == b
    assert a.draw(data, epoch=1).fingerprint == a.draw(data, epoch=2).fingerprint
    seen = tests_a["r=0.4"].draw(data).observed
    assert torch.equal(seen["audio"], seen["vision"])
    assert list(lnln_protocol(rates=[0.25, 1])[1]) == ["r=0.25", "r=1.0"]
    with pytest.raises(ValueError, match="rates"):
        lnln_protocol(rates=[1.5])


def test_masks_are_drawn_where_asked():
    data = toy(60, frames=(20, 20, 9))
    for name in ("frames", "lnln", "lnln test", "bernoulli"):
        here = PLANS[name].draw(data)
        again = PLANS[name].draw(data, device="cpu")
        assert here.fingerprint == again.fingerprint
        assert here.to("cpu") is here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "plan", [MissingPlan("lnln", resample=True), MissingPlan("lnln", 0.4), MissingPlan("frames", 0.2)]
)
def test_masks_on_a_gpu_are_those_of_the_cpu(plan):
    data = toy(200, frames=(20, 20, 9))
    here, there = plan.draw(data, epoch=2), plan.draw(data.to("cuda"), epoch=2, device="cuda")
    assert there.present.is_cuda
    assert here.fingerprint == there.fingerprint
    assert torch.equal(here.apply(data).present, there.apply(data.to("cuda")).present.cpu())


def test_tokens_keep_their_ends():
    ids = torch.randint(200, 900, (50, 12), generator=seeded())
    lengths = torch.randint(2, 13, (50,), generator=seeded(1))
    audio = torch.randn(50, 6, 2, generator=seeded())
    data = MultimodalDataset.from_arrays(
        {"language": ids.numpy(), "audio": audio.numpy()}, lengths={"language": lengths.numpy()}, fill={"language": 100}
    )
    mask = MissingPlan("lnln", {"language": 1.0, "audio": 0.5}).draw(data)
    kept = mask.observed["language"]
    assert kept.sum(-1).tolist() == [2] * 50
    assert kept[:, 0].all()
    assert kept[torch.arange(50), lengths - 1].all()
    left = mask.apply(data).data.features["language"]
    inner = data.data.valid["language"] & ~kept
    assert (left[inner] == 100).all()
    assert torch.equal(left[kept], data.data.features["language"][kept])
    bare = MissingPlan("burst", {"language": 1.0}, keep_ends=()).draw(data)
    assert not bare.present[:, 0].any()


def test_bursts_are_contiguous():
    data = toy(600, frames=(20, 20, 9))
    for blocks in (1, 3):
        mask = MissingPlan("burst", {"audio": 0.35, "vision": 0.35}, blocks=blocks).draw(data)
        for name, keep in mask.observed.items():
            valid = data.data.valid[name]
            gone = (valid & ~keep).int()
            starts = (torch.diff(gone, prepend=torch.zeros(600, 1, dtype=torch.int32)) == 1).sum(-1)
            assert starts.max() <= blocks
            assert abs(gone.sum().item() / valid.sum().item() - 0.35) < 0.02
    shared = MissingPlan("burst", {"audio": 0.35, "language": 0.35}, shared=True).draw(data)
    assert torch.equal(shared.observed["audio"], shared.observed["language"])


def test_bursts_count_the_frames_that_are_there():
    """With holes in the middle the block spans them: of four frames at places 0, 3, 5, 9 half are lost, neighbours."""
    x = np.full((30, 10, 1), np.nan, dtype="float32")
    x[:, [0, 3, 5, 9]] = 1
    data = MultimodalDataset.from_arrays({"a": x, "b": np.ones((30, 2), dtype="float32")})
    keep = MissingPlan("burst", {"a": 0.5}).draw(data).observed["a"][:, [0, 3, 5, 9]]
    assert not keep.sum(-1).ne(2).any()
    rows = {tuple(r) for r in keep.int().tolist()}
    assert rows == {(0, 0, 1, 1), (1, 0, 0, 1), (1, 1, 0, 0)}


def test_per_class_counts():
    data = toy(400)
    mask = MissingPlan("per_class", counts={"audio": 21, "vision": 10_000}).draw(data)
    for c in range(4):
        assert int(mask.present[data.target == c, 0].sum()) == 21
    assert mask.present[:, 1:].all()
    more = MissingPlan("per_class", counts={"audio": 42}).draw(data)
    assert not (mask.present & ~more.present).any()  # the first 21 are among the first 42


def test_missing_at_random_depends_on_what_is_seen():
    data = toy(6000)
    seen = data.data.features["vision"]
    mean = seen.sum((1, 2)) / (data.data.valid["vision"].sum(-1) * 2)
    mask = MissingPlan("mar", {"audio": 0.3}, on="vision", slope=2.0).draw(data)
    lost = ~mask.present[:, 0]
    assert abs(lost.double().mean() - 0.3) < 0.03
    assert mean[lost].mean() > mean[~lost].mean() + 0.2
    inverse = ~MissingPlan("mar", {"audio": 0.3}, on="vision", slope=-2.0).draw(data).present[:, 0]
    assert mean[inverse].mean() < mean[~inverse].mean() - 0.2
    flat = ~MissingPlan("mar", {"audio": 0.3}, on="vision", slope=0.0).draw(data).present[:, 0]
    assert abs(mean[flat].mean() - mean[~flat].mean()) < 0.05
    assert mask.present[:, 2].all()  # the modality that decides is always seen
    everywhere = MissingPlan("mar", 0.3, on="vision").draw(data)
    assert everywhere.present[:, 2].all()
    assert not everywhere.present[:, 1].all()

    rates = [0.0, 0.3, 0.6, 1.0]
    by_class = ~MissingPlan("mar", {"audio": rates}, on="class").draw(data).present[:, 0]
    for c, r in enumerate(rates):
        assert abs(by_class[data.target == c].double().mean() - r) < 0.05


def test_missing_not_at_random_depends_on_what_is_gone():
    data = toy(6000)
    audio = data.data.features["audio"].mean((1, 2))
    lost = ~MissingPlan("mnar", {"audio": 0.4}, slope=3.0).draw(data).present[:, 0]
    assert abs(lost.double().mean() - 0.4) < 0.03
    assert audio[lost].mean() > audio[~lost].mean() + 0.2
    longer = MissingPlan("mnar", {"vision": 0.4}, statistic="length").draw(data)
    length = data.data.valid["vision"].sum(-1).double()
    assert length[~longer.present[:, 2]].mean() > length[longer.present[:, 2]].mean() + 0.5


def test_rates_per_sample_from_extras():
    data = toy(500)
    noise = torch.rand(500, generator=seeded())
    data = MultimodalDataset(data.data.replace(extras={"noise": noise}), data.info)
    plan = MissingPlan("frames", {"audio": "noise"})
    lost = 1 - plan.draw(data).observed["audio"].double().mean(-1)
    assert torch.corrcoef(torch.stack([lost, noise.double()]))[0, 1] > 0.8
    assert same(plan.draw(data.subset(torch.arange(100))), plan.draw(data))
    with pytest.raises(ValueError, match="'snr'.*noise"):
        MissingPlan("frames", {"audio": "snr"}).draw(data)
    loud = MultimodalDataset(data.data.replace(extras={"noise": noise * 3}), data.info)
    with pytest.raises(ValueError, match=r"extras\['noise'\]: .*\[0, 1\]"):
        plan.draw(loud)


def dialogues(seed: int = 0) -> MultimodalDataset:
    lengths = torch.tensor([5, 3, 7, 1, 6] * 8)
    real = torch.arange(7) < lengths[:, None]
    x = torch.randn(40, 7, 1, 4, generator=seeded(seed)) * real[..., None, None]
    present = real[..., None].expand(40, 7, 2).clone()
    batch = MultimodalBatch(
        {"audio": x, "language": x.clone()},
        present,
        torch.zeros(40, 7, dtype=torch.int64),
        ids=torch.arange(100, 140),
        extras={"utterance": real},
    )
    return MultimodalDataset(batch)


def test_dialogues_are_masked_per_utterance():
    data = dialogues()
    real = data.data.extras["utterance"]
    mask = MissingPlan("imbalanced", (0.4, 0.6)).draw(data)
    assert mask.present.shape == (40, 7, 2)
    assert not mask.present[~real].any()
    assert mask.present[real].any(-1).all()
    n = int(real.sum())
    report = mask.realised()
    assert report["samples"] == n == 176
    assert report["subsets"]["11"] == math.floor(n * 0.24)
    assert same(mask, MissingPlan("imbalanced", (0.4, 0.6)).draw(data.subset(torch.randperm(40))))
    left = mask.apply(data.subset(torch.tensor([7, 3])))
    assert torch.equal(left.present, mask.present[[7, 3]])
    mixed = [int(mask.present[i, : int(real[i].sum())].unique(dim=0).shape[0]) for i in range(40)]
    blocks = MissingPlan("imbalanced", (0.4, 0.6), assign="blocked").draw(data)
    block = [int(blocks.present[i, : int(real[i].sum())].unique(dim=0).shape[0]) for i in range(40)]
    assert sum(k == 1 for k in block) >= 37  # three patterns: two dialogues at most lie on a border
    assert sum(k == 1 for k in mixed) < 20
    frames = MissingPlan("frames", {"audio": 0.5}).draw(data)
    assert frames.observed["audio"].shape == (40, 7, 1)
    own = data.data.replace(ids=torch.arange(280).reshape(40, 7))
    keyed = MissingPlan("bernoulli", 0.5).draw(own)
    assert torch.equal(keyed.apply(own[[5, 2]]).present, keyed.present[[5, 2]])


# --- plans and masks, bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "error", "message"),
    [
        ({"kind": "random"}, ValueError, "kind: expected one of"),
        ({"kind": "bernoulli"}, ValueError, "needs missing rates"),
        ({"kind": "bernoulli", "rates": 1.5}, ValueError, "rates: .*1.5"),
        ({"kind": "bernoulli", "rates": [0.1, float("nan")]}, ValueError, r"rates\[1\]: .*nan"),
        ({"kind": "bernoulli", "rates": {"audio": -0.1}}, ValueError, r"rates\['audio'\]: .*-0.1"),
        ({"kind": "bernoulli", "rates": [1, 1.0]}, ValueError, "below 1"),
        ({"kind": "bernoulli", "rates": {"audio": (0.1, 0.2)}}, TypeError, r"rates\['audio'\]: expected a number in"),
        ({"kind": "bernoulli", "rates": True}, TypeError, "rates: expected a number in"),
        ({"kind": "frames", "rates": {"audio": (0.9, 0.2)}}, ValueError, "pair"),
        ({"kind": "bernoulli", "rates": 0.5, "seed": 1.5}, TypeError, "seed"),
        ({"kind": "bernoulli", "rates": 0.5, "counts": {"audio": 3}}, ValueError, "counts: .*does not use"),
        (
            {"kind": "imbalanced", "rates": 0.5, "assign": "sorted"},
            ValueError,
            "assign: expected 'shuffled' or 'blocked'",
        ),
        ({"kind": "fixed"}, ValueError, "present"),
        ({"kind": "per_class"}, ValueError, "counts"),
        ({"kind": "per_class", "counts": {"audio": -1}}, ValueError, "counts"),
        ({"kind": "mar", "rates": 0.5}, ValueError, "on: "),
        ({"kind": "mar", "rates": 0.5, "on": "class"}, TypeError, "rate per class"),
        ({"kind": "mnar", "rates": 0.5, "slope": float("inf")}, ValueError, "slope"),
        ({"kind": "burst", "rates": 0.5, "blocks": 0}, ValueError, "blocks"),
        ({"kind": "none", "then": "frames"}, TypeError, "then"),
        ({"kind": "none", "rate": 0.5}, ValueError, r"unknown settings \['rate'\]"),
    ],
)
def test_bad_plans_are_refused(settings_, error, message):
    with pytest.raises(error, match=message):
        MissingPlan.from_dict(settings_)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (MissingPlan("bernoulli", {"sound": 0.5}), r"unknown modalities \['sound'\].*audio"),
        (MissingPlan("bernoulli", (0.5, 0.5)), "expected 3 of them"),
        (MissingPlan("bernoulli", 1.0), "below 1"),
        (MissingPlan("exact_count", 0.8), "presences"),
        (MissingPlan("fixed", present="sound"), "unknown modalities"),
        (MissingPlan("per_class", counts={"sound": 3}), "unknown modalities"),
        (MissingPlan("frames", 0.5, keep_ends="sound"), "unknown modalities"),
        (MissingPlan("mar", {"audio": 0.5}, on="sound"), "unknown modalities"),
        (MissingPlan("mar", {"audio": 0.5}, on="audio"), "always seen"),
        (MissingPlan("mar", {"audio": [0.5, 0.5]}, on="class"), "one rate per class"),
    ],
)
def test_plans_that_do_not_fit_the_data_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        plan.draw(toy())


def test_classes_are_needed_where_they_decide():
    data = MultimodalDataset.from_arrays({"a": np.ones((5, 2)), "b": np.ones((5, 2))}, np.linspace(0, 1, 5))
    with pytest.raises(ValueError, match="integer classes"):
        MissingPlan("per_class", counts={"a": 1}).draw(data)
    tokens = MultimodalDataset.from_arrays({"a": np.ones((5, 2), dtype=int), "b": np.ones((5, 2))}, tokens=("a",))
    with pytest.raises(ValueError, match="token ids"):
        MissingPlan("mnar", {"a": 0.5}).draw(tokens)


def test_plans_compare_travel_and_hash():
    for plan in PLANS.values():
        again = MissingPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
        assert again == plan
        assert hash(again) == hash(plan)
        assert pickle.loads(pickle.dumps(plan)) == plan
    assert MissingPlan("bernoulli", (0.5, 0.25)) == MissingPlan("bernoulli", torch.tensor([0.5, 0.25]))
    assert MissingPlan("bernoulli", 0.5) != MissingPlan("bernoulli", 0.5, seed=1)


def test_ids_must_be_unique_and_known():
    data = toy(20)
    twice = data.subset(torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="ids: expected every id once"):
        MissingPlan("bernoulli", 0.5).draw(twice)
    mask = MissingPlan("bernoulli", 0.5).draw(data.subset(torch.arange(10)))
    with pytest.raises(ValueError, match="10 of 20 samples are not in this mask of 10"):
        mask.apply(data)
    assert mask.apply(data.subset(torch.tensor([1, 1, 1]))).present.unique(dim=0).shape[0] == 1
    renamed = MultimodalDataset.from_arrays({"sound": np.ones((20, 2))}, ids=data.names)
    with pytest.raises(ValueError, match=r"says nothing about \['sound'\]"):
        mask.apply(renamed)
    frames = MissingPlan("frames", 0.3).draw(data)
    longer = toy(20, frames=(9, 8, 5))
    with pytest.raises(ValueError, match="'audio' has 9 frames, the mask was drawn for 8"):
        frames.apply(longer)
    with pytest.raises(ValueError, match="without"):
        MissingPlan("none").draw(data.data.replace(ids=None))
    with pytest.raises(ValueError, match="without"):
        mask.apply(data.data.replace(ids=None))
    with pytest.raises(ValueError, match="at least one sample"):
        MissingPlan("none").draw(data.data[torch.zeros(20, dtype=torch.bool)])


def test_apply_keeps_the_complete_data_when_asked():
    data = toy(20)
    left = PLANS["bernoulli"].draw(data).apply(data, keep_complete=True)
    assert left.data.complete is not None
    assert torch.equal(left.data.complete.features["audio"], data.data.features["audio"])
    batch = PLANS["bernoulli"].draw(data).apply(data[[3, 1]])
    assert isinstance(batch, MultimodalBatch)


def test_your_own_table():
    data = toy(4)
    table = torch.tensor([[True, False, True], [True, True, True], [False, False, True], [True, True, False]])
    mask = MissingMask(table, None, data.ids, data.modalities)
    assert torch.equal(mask.apply(data).present, table)
    assert mask.realised()["rates"] == {"audio": 0.25, "language": 0.5, "vision": 0.25}
    assert "a table, 4 samples; missing: audio 25.0%" in repr(mask)
    for bad, message in (
        ({"present": table.float()}, "present"),
        ({"present": table[:, :2]}, "present"),
        ({"present": table[:0], "ids": data.ids[:0]}, "empty mask"),
        ({"ids": data.ids[:3]}, "ids"),
        ({"ids": data.ids.float()}, "ids"),
        ({"ids": torch.tensor([1, 1, 2, 3])}, "ids: expected every id once"),
        ({"observed": {"sound": table}}, "unknown modalities"),
        ({"observed": {"audio": table[:3]}}, r"observed\['audio'\]"),
        ({"available": table[:3]}, "available"),
    ):
        arguments = {"present": table, "observed": None, "ids": data.ids, "modalities": data.modalities, **bad}
        with pytest.raises((ValueError, TypeError), match=message):
            MissingMask(**arguments)


def test_fingerprints_tell_masks_apart():
    data = toy()
    prints = {PLANS[name].draw(data).fingerprint for name in PLANS}
    assert len(prints) == len(PLANS)
    a = PLANS["frames"].draw(data)
    b = MissingMask(a.present, a.observed, a.ids, a.modalities)
    assert a.fingerprint == b.fingerprint
    flipped = {**a.observed, "audio": a.observed["audio"].clone()}
    flipped["audio"][3, 3] ^= True
    assert MissingMask(a.present, flipped, a.ids, a.modalities).fingerprint != a.fingerprint
    assert a.fingerprint == "bb9ed0e97771f7c4"  # the same on every machine and in every version


def test_files_that_are_no_masks_are_refused(tmp_path):
    data, path = toy(), tmp_path / "mask.pt"
    mask = PLANS["both"].draw(data)
    mask.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["mask.pt"]
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated or not a mask"):
            MissingMask.load(path)
    path.write_bytes(b"{}" * 500)
    with pytest.raises(ValueError, match="truncated or not a mask"):
        MissingMask.load(path)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a mask file of this version"):
        MissingMask.load(path)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="truncated or not a mask"):
        MissingMask.load(path)
    torch.save(Hostile(), path)
    with pytest.raises(ValueError, match="truncated or not a mask"):
        MissingMask.load(path)
    assert not (tmp_path / "harm").exists()

    mask.save(path)
    content = torch.load(path, weights_only=True)
    content["present"][1][3] ^= 1
    torch.save(content, path)
    with pytest.raises(ValueError, match="altered"):
        MissingMask.load(path)
    del content["available"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="not a whole mask file"):
        MissingMask.load(path)
    with pytest.raises(FileNotFoundError, match="no mask file"):
        MissingMask.load(tmp_path / "nothing.pt")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mask.pt"
    mask = PLANS["both"].draw(toy())
    mask.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        PLANS["frames"].draw(toy()).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mask.pt"]
