"""Is a difficulty any good? Small statistics of the chapter on DEAR, on what `book.studies.dear` stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from book.support import results

__all__ = ["Binned", "Selective", "Stories", "binned", "rank", "selective_risk", "slopes"]

Array = np.ndarray


class Binned(NamedTuple):
    """Means of equally full bins."""

    difficulty: Array
    error: Array


def binned(difficulty: Array, error: Array, bins: int = 10) -> Binned:
    """Mean error over mean difficulty in ``bins`` equally full bins of difficulty; NaN errors are left out."""
    kept = np.isfinite(difficulty) & np.isfinite(error)
    d, e = difficulty[kept].astype(np.float64), error[kept].astype(np.float64)
    if len(d) < bins:
        raise ValueError(f"difficulty: expected at least {bins} finite values, got {len(d)}")
    parts = np.array_split(np.argsort(d, kind="stable"), bins)
    return Binned(np.array([d[p].mean() for p in parts]), np.array([e[p].mean() for p in parts]))


def rank(one: Array, other: Array) -> float:
    """Spearman's correlation of two arrays of any shape; NaN where one is constant."""
    x, y = np.ravel(one).astype(np.float64), np.ravel(other).astype(np.float64)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = stats.rankdata(x[kept]), stats.rankdata(y[kept])
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else float("nan")


class Selective(NamedTuple):
    """Risk among the samples that are answered, by how many are."""

    coverage: Array
    risk: Array
    area: float  # the mean risk over coverages


def selective_risk(score: Array, error: Array, points: int = 20) -> Selective:
    """Answer the samples of lowest ``score`` first: mean ``error`` of those, at ``points`` coverages up to 1.

    Samples of equal score share their error.
    """
    s, e = np.ravel(score).astype(np.float64), np.ravel(error).astype(np.float64)
    if s.shape != e.shape or not len(s):
        raise ValueError(f"score, error: expected as many, at least one, got {s.shape} and {e.shape}")
    _, group = np.unique(s, return_inverse=True)
    shared = np.bincount(group, weights=e) / np.bincount(group)
    risk = shared[np.sort(group)].cumsum() / np.arange(1, len(s) + 1)
    at = np.unique(np.ceil(np.linspace(0, 1, points + 1)[1:] * len(s)).astype(int))
    return Selective(at / len(s), risk[at - 1], float(risk.mean()))


def slopes(x: Sequence[float], runs: Array) -> Array:
    """The slope of a straight line through each run [seeds, len(x)]; [seeds]."""
    return np.array([np.polyfit(np.asarray(x, float), run, 1)[0] for run in np.atleast_2d(runs)])


class Stories:
    """The stored runs of one variant of `book.studies.dear.reliability`: all that DEAR said of every sample."""

    def __init__(self, path: Path, configs: Sequence[Mapping[str, Any]]):
        self.runs: list[dict[str, Array]] = []
        for config in configs:
            try:
                self.runs.append(results.predictions(path, config))
            except FileNotFoundError:
                continue

    def __len__(self) -> int:
        return len(self.runs)

    def summary(self, column: str, conditions: Sequence[str]) -> Array:
        """[seeds, conditions] means over samples; [0, conditions] where nothing is stored."""
        found = []
        for run in self.runs:
            places = [list(run["conditions"]).index(c) for c in conditions]
            found.append(run["summary"][places, list(run["columns"]).index(column)])
        return np.array(found, float).reshape(len(self.runs), len(conditions))

    def arrays(self, what: str) -> Array:
        """[seeds, rates, n, ...] of "d", "e", "w", "said" or "deviation"."""
        return np.stack([run[what].astype(np.float64) for run in self.runs])

    @property
    def target(self) -> Array:
        """[n]"""
        return self.runs[0]["target"].astype(np.float64)
