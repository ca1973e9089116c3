"""Intervals that hold for new seeds and new samples: worked by hand, against scipy, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from mmlib.statistics import equivalent, holm, p_value, paired_interval

TABLES = arrays.arrays(np.float64, st.tuples(st.integers(2, 5), st.integers(1, 6)), elements=st.floats(-4, 4, width=16))


def test_two_seeds_and_three_samples_by_hand() -> None:
    ours = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 10.0]])
    # Means by seed 3, 5, by sample 2, 2, 8, of all 4. MS_a = 3 (1 + 1) / 1 = 6, MS_b = 2 (4 + 4 + 16) / 2 = 24;
    # residuals 0, 1, -1, 0, -1, 1, MS_e = 4 / 2 = 2.
    t1, t2 = 12.7062047362, 4.30265272991
    half = math.sqrt((t1**2 * 6 + t2**2 * (24 - 2)) / 6)
    found = paired_interval(ours, np.zeros((2, 3)))
    assert found.mean == 4
    assert (found.n, found.samples) == (2, 3)
    np.testing.assert_allclose([found.low, found.high], [4 - half, 4 + half], rtol=1e-9)


def test_one_score_a_seed_is_students_paired_interval() -> None:
    ours, theirs = np.array([0.81, 0.84, 0.79, 0.88]), np.array([0.80, 0.80, 0.80, 0.80])
    oracle = stats.ttest_rel(ours, theirs)
    for given_as in ((ours, theirs), (ours[:, None], theirs[:, None])):
        found = paired_interval(*given_as)
        np.testing.assert_allclose([found.low, found.high], oracle.confidence_interval(0.95), rtol=1e-9)
        np.testing.assert_allclose(p_value(*given_as), oracle.pvalue, rtol=1e-6)


@pytest.mark.slow
@given(TABLES, st.floats(0.05, 0.99))
def test_the_interval_is_symmetric_shifts_and_agrees_with_the_p_value(d: np.ndarray, level: float) -> None:
    zero = np.zeros_like(d)
    found, turned = paired_interval(d, zero, level), paired_interval(zero, d, level)
    np.testing.assert_allclose([found.low, found.high], [-turned.high, -turned.low], atol=1e-9)
    moved = paired_interval(d + 3, zero, level)
    np.testing.assert_allclose([moved.low, moved.high], [found.low + 3, found.high + 3], atol=1e-6)
    p = p_value(d, zero)
    if abs(p - (1 - level)) > 1e-6 and found.high - found.low > 1e-6:
        assert (p < 1 - level) == (not found.low <= 0 <= found.high)


DESIGNS = [  # standard deviations of seeds, samples and what is left
    (0.0, 1.0, 0.3),
    (0.1, 0.3, 1.0),
    (0.3, 1.0, 1.0),
    (0.05, 1.0, 0.5),
]


@pytest.mark.slow
@pytest.mark.parametrize("skewed", [False, True], ids=["normal", "skewed"])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_it_holds_the_truth_and_is_no_wider_than_it_must_be(n: int, skewed: bool) -> None:
    """Seeds of unequal variance, samples that all seeds find hard alike, skew. The oracle knows all variances."""
    rng, worlds, samples = np.random.default_rng(n), 800, 150
    draw = (lambda *shape: rng.exponential(1, shape) - 1) if skewed else (lambda *shape: rng.normal(0, 1, shape))
    zero = np.zeros((n, samples))
    for of_seeds, of_samples, rest in DESIGNS:
        scale = rng.choice([0.5, 1.5], (worlds, n))  # mean square 1.25
        d = of_seeds * (scale * draw(worlds, n))[:, :, None] + of_samples * draw(worlds, samples)[:, None]
        d = d + rest * rng.normal(0, 1, (worlds, n, samples))
        intervals = np.array([paired_interval(x, zero)[1:3] for x in d])
        held = ((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)).mean()
        oracle = 1.96 * math.sqrt(1.25 * of_seeds**2 / n + of_samples**2 / samples + rest**2 / (n * samples))
        width = (intervals[:, 1] - intervals[:, 0]).mean() / (2 * oracle)
        error = 2 * math.sqrt(0.95 * 0.05 / worlds)
        assert held >= 0.93 - error, (of_seeds, of_samples, rest, held)
        students = stats.t.isf(0.025, n - 1) / 1.96  # if all of it came from seeds, whose variance is not known
        assert width < 1.1 * students, (of_seeds, of_samples, rest, width)


def test_only_what_lies_within_the_band_is_equivalent() -> None:
    rng = np.random.default_rng(0)
    close = 0.001 * rng.normal(0, 1, (5, 400))
    zero = np.zeros_like(close)
    assert equivalent(close, zero, band=0.01)
    assert not equivalent(close + 0.02, zero, band=0.01)
    assert not equivalent(rng.normal(0, 1, (5, 4)), np.zeros((5, 4)), band=0.01)
    assert not equivalent(close[:1], zero[:1], band=0.01)
    found = paired_interval(close, zero, 0.9)
    edge = max(abs(found.low), abs(found.high))
    assert equivalent(close, zero, band=edge * 1.001)
    assert not equivalent(close, zero, band=edge * 0.999)


@pytest.mark.slow
def test_holm_by_hand() -> None:
    # sorted .01, .02, .03, .4 times 4, 3, 2, 1, then never falling
    np.testing.assert_allclose(holm([0.03, 0.01, 0.4, 0.02]), [0.06, 0.04, 0.4, 0.06])
    np.testing.assert_allclose(holm([0.5, math.nan, 0.01]), [0.5, math.nan, 0.02])
    assert holm([]).shape == (0,)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = paired_interval([[1.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]])
    assert found.mean == pytest.approx(2 / 3)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(p_value([[1.0, 0.0]], [[0.0, 0.0]]))


def test_no_difference_at_all() -> None:
    same = np.ones((3, 4))
    assert paired_interval(same, same)[:3] == (0, 0, 0)
    assert p_value(same, same) == 1
    assert p_value(same + 1, same) == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "error", "said"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), ValueError, "theirs: expected the shape"),
        (np.ones((2, 3, 1)), np.ones((2, 3, 1)), ValueError, "ours: expected"),
        (np.ones((0, 3)), np.ones((0, 3)), ValueError, "ours: expected"),
        ([[1.0, math.nan]], [[1.0, 2.0]], ValueError, "ours: expected finite"),
        ([["a"]], [[1.0]], TypeError, "ours: expected an array of numbers"),
    ],
)
def test_what_cannot_be_compared_is_refused(ours: object, theirs: object, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        paired_interval(ours, theirs)


def test_levels_bands_and_p_values_out_of_range_are_refused() -> None:
    x, y = np.ones((2, 3)), np.zeros((2, 3))
    for level in (0, 1):
        with pytest.raises(ValueError, match="level: expected"):
            paired_interval(x, y, level)
    with pytest.raises(TypeError, match="level: expected"):
        paired_interval(x, y, "0.95")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="band: expected"):
        equivalent(x, y, 0)
    with pytest.raises(ValueError, match="p: expected numbers in"):
        holm([0.5, 1.5])
    with pytest.raises(ValueError, match="p: expected p-values"):
        holm([[0.5]])
