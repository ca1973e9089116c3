"""Intervals and tests for a difference of two methods that were run on the same seeds and test samples.

A repetition of an experiment has new seeds *and* new test samples. The paired differences d_ki of seed k = 1..n and
sample i = 1..N follow crossed random effects,

    d_ki = delta + a_k + b_i + e_ki,      Var(mean) = var_a / n + var_b / N + var_e / (n N),

and the classical mean squares estimate these: MS_a = N sum_k (d_k. - d..)^2 / (n - 1) has the mean N var_a + var_e,
MS_b the mean n var_b + var_e, and MS_e of the residuals the mean var_e (Searle, Casella and McCulloch, *Variance
components*, 1992, chapter 4). Few seeds are what makes an interval too short: the seeds' part is known with n - 1
degrees of freedom alone. So each part keeps its own quantile, and their squares are added (Graybill and Wang 1980):

    half^2 = (t_{n-1}^2 MS_a + t_{N-1}^2 max(MS_b - MS_e, 0)) / (n N).

With one value a seed (N = 1) this is Student's paired interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize, stats

from .checks import Number, shown
from .metrics import Interval

__all__ = ["detectable", "equivalent", "holm", "p_value", "paired_interval"]

LEVEL = Number(above=0, below=1)


def paired_interval(ours: Any, theirs: Any, level: float = 0.95) -> Interval:
    """The mean difference ours - theirs with its interval for new seeds and new test samples.

    ours, theirs : numbers [seeds, samples], one a seed and test sample (right or not, an absolute error, ...), of two
        methods that saw the same seeds and the same samples; [seeds, 1] or [seeds] for one score a seed. A score that
        is no mean over samples enters by its pseudo-values, or as one score a seed
    level : of the interval, in (0, 1)

    ``n`` is the number of seeds, ``samples`` of the samples. One seed says nothing about seeds: the ends are NaN.
    Raises TypeError for no numbers, ValueError for shapes that differ, no values, or values that are not finite.
    """
    LEVEL("level", level)
    d = _differences(ours, theirs)
    half = _half_width(d)
    mean = float(d.mean())
    if half is None:
        return Interval(mean, math.nan, math.nan, *d.shape)
    reach = half(1 - level)
    return Interval(mean, mean - reach, mean + reach, *d.shape)


def p_value(ours: Any, theirs: Any) -> float:
    """The p-value of "there is no difference", two-sided: 1 - the level at which `paired_interval` begins to hold 0.

    Arguments and errors as there; NaN for one seed.
    """
    return _p_value(_differences(ours, theirs), 0.0)


def equivalent(ours: Any, theirs: Any, band: float, level: float = 0.95) -> bool:
    """Whether the two are equivalent: both "the difference is at least ``band``" and "at most -band" are rejected.

    Two one-sided tests (Schuirmann 1987) at 1 - ``level`` each: whether the interval at 2 level - 1 lies within the
    band. Never so for one seed.

    band : > 0, in the unit of the differences, such as 0.01 for a point of accuracy
    level : in (0.5, 1)
    """
    Number(above=0)("band", band)
    Number(above=0.5, below=1)("level", level)
    found = paired_interval(ours, theirs, 2 * level - 1)
    return bool(-band < found.low and found.high < band)  # a comparison with NaN is False


def detectable(ours: Any, theirs: Any, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true difference whose interval at ``level`` leaves out 0 with probability ``power``, about.

    To the half width of `paired_interval` it adds that of the one-sided error 1 - power, with the variances that these
    data show: what such a design could have seen, whatever it did see. NaN for one seed.

    power : in (0.5, 1)
    """
    LEVEL("level", level)
    Number(above=0.5, below=1)("power", power)
    half = _half_width(_differences(ours, theirs))
    return math.nan if half is None else half(1 - level) + half(2 * (1 - power))


def holm(p: Any) -> np.ndarray:
    """Holm's adjusted p-values [m] of the p-values of one table [m]: below alpha, the family's error is too.

    A NaN (a comparison that was not run) stays NaN and is not counted. Raises ValueError for values outside [0, 1].
    """
    from statsmodels.stats.multitest import multipletests

    values = _numbers("p", p)
    if values.ndim != 1:
        raise ValueError(f"p: expected p-values [m], got shape {values.shape}")
    known = ~np.isnan(values)
    if not ((values[known] >= 0) & (values[known] <= 1)).all():
        raise ValueError(f"p: expected numbers in [0, 1], got {values[known].min():g} to {values[known].max():g}")
    adjusted = values.copy()
    if known.any():
        adjusted[known] = multipletests(values[known], method="holm")[1]
    return adjusted


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        found = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except ValueError as error:  # rows of unequal lengths
        raise ValueError(f"{name}: expected an array of numbers, got {shown(values)}") from error
    if found.dtype.kind not in "buif":
        raise TypeError(f"{name}: expected an array of numbers, got {type(values).__name__} of {found.dtype}")
    return found.astype(np.float64)


def _differences(ours: Any, theirs: Any) -> np.ndarray:
    """ours - theirs as [seeds, samples]."""
    one, two = _numbers("ours", ours), _numbers("theirs", theirs)
    for name, x in (("ours", one), ("theirs", two)):
        if x.ndim not in (1, 2) or not x.size:
            raise ValueError(f"{name}: expected [seeds, samples] or [seeds], none of them 0, got shape {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if one.shape != two.shape:
        raise ValueError(f"theirs: expected the shape {one.shape} of ours, got {two.shape}")
    d = one - two
    return d[:, None] if d.ndim == 1 else d


def _half_width(d: np.ndarray) -> Callable[[float], float] | None:
    """Half the width of the interval as a function of alpha = 1 - level; None for one seed."""
    n, samples = d.shape
    if n == 1:
        return None
    by_seed, by_sample = d.mean(1), d.mean(0)
    of_seeds = samples * by_seed.var(ddof=1)
    of_samples = 0.0
    if samples > 1:
        rest = d - by_seed[:, None] - by_sample + d.mean()
        residual = (rest**2).sum() / ((n - 1) * (samples - 1))
        of_samples = max(n * by_sample.var(ddof=1) - residual, 0.0)

    def half(alpha: float) -> float:
        seeds_part = stats.t.isf(alpha / 2, n - 1) ** 2 * of_seeds
        samples_part = stats.t.isf(alpha / 2, samples - 1) ** 2 * of_samples if samples > 1 else 0.0
        return math.sqrt((seeds_part + samples_part) / (n * samples))

    return half


def _p_value(d: np.ndarray, null: float) -> float:
    half, gap = _half_width(d), abs(float(d.mean()) - null)
    if half is None:
        return math.nan
    if gap == 0:
        return 1.0
    smallest = 1e-100
    if half(smallest) <= gap:
        return 0.0
    # half falls from infinity to 0 as alpha goes from 0 to 1; on the scale of log alpha the root is found to the digit
    return math.exp(optimize.brentq(lambda x: half(math.exp(x)) - gap, math.log(smallest), 0.0, xtol=1e-12))
