"""Tables of stored runs for a chapter: means over seeds with intervals, and pairs of cells for verdicts.

A table's *cells* are a label per axis -> the configs of that cell, one a seed (such as `book.studies.mce`
gives). What is not stored is "not run"; nothing is ever run here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from book.support import experiments, results, verdicts
from mmlib import metrics
from mmlib.metrics import Interval

__all__ = ["Stored"]

Label = tuple[str, ...]
NOT_RUN = Interval(math.nan, math.nan, math.nan, 0)


class Score(NamedTuple):
    """A metric as a function of sums over samples, so that leaving one sample out is a subtraction."""

    parts: Callable[[np.ndarray, np.ndarray], np.ndarray]  # predictions [n], targets [n] -> summands [n, C]
    score: Callable[[np.ndarray], np.ndarray]  # their sums [..., C] -> [...]
    lower: bool = False  # whether less is better
    percent: bool = True  # shown in per cent, differences in points


def _average(values: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda p, t: np.stack([values(p, t), np.ones(len(t))], 1)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], np.nan)


def _signs(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    """One column for each pair of target > 0 and prediction > 0; samples whose target is 0 are in none."""
    place = 2 * (t > 0) + (p > 0)
    return (place[:, None] == np.arange(4)) * (t != 0)[:, None] * 1.0


def _weighted_f1(sums: np.ndarray) -> np.ndarray:
    """`metrics.weighted_f1` of two classes from how often each pair of target and prediction occurs."""
    negative, false_positive, false_negative, positive = (sums[..., k] for k in range(4))
    wrong = false_positive + false_negative
    f1 = lambda right: 2 * right / np.maximum(2 * right + wrong, 1e-300)
    weighted = (negative + false_positive) * f1(negative) + (positive + false_negative) * f1(positive)
    total = sums.sum(-1)
    return weighted / np.where(total > 0, total, np.nan)


def _confusion(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    """A column for each pair of target and predicted class."""
    classes = int(max(p.max(), t.max())) + 1
    return ((t * classes + p)[:, None] == np.arange(classes**2)) * 1.0


def _weighted_f1_of_classes(sums: np.ndarray) -> np.ndarray:
    """`metrics.weighted_f1` from how often each pair of target and predicted class occurs."""
    classes = math.isqrt(sums.shape[-1])
    table = sums.reshape(*sums.shape[:-1], classes, classes)
    actual, predicted, right = table.sum(-1), table.sum(-2), np.diagonal(table, axis1=-2, axis2=-1)
    total = actual.sum(-1)
    weighted = (actual * 2 * right / np.maximum(actual + predicted, 1e-300)).sum(-1)
    return weighted / np.where(total > 0, total, np.nan)


def _by_zero(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The columns of `_signs` for negative against non-negative, all samples."""
    place = 2 * (t >= 0) + (p >= 0)
    return (place[:, None] == np.arange(4)) * 1.0


def _same_class(convention: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    classes = lambda x: metrics.sentiment_classes(x, convention)
    return _average(lambda p, t: (classes(p) == classes(t)) * 1.0)


def _moments(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(t)), p, t, p * p, t * t, p * t], 1)


def _correlation(sums: np.ndarray) -> np.ndarray:
    n, p, t, pp, tt, pt = (sums[..., k] for k in range(6))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * pt - p * t) / np.sqrt((n * pp - p * p) * (n * tt - t * t))


SCORES = {
    "acc7": Score(_same_class("acc7"), _ratio),
    "acc5": Score(_same_class("acc5"), _ratio),
    "acc2_has0": Score(_same_class("has0"), _ratio),
    "acc2_non0": Score(lambda p, t: np.stack([((p > 0) == (t > 0)) * (t != 0), t != 0], 1) * 1.0, _ratio),
    "f1_has0": Score(_by_zero, _weighted_f1),
    "corr": Score(_moments, _correlation, percent=False),
    "accuracy": Score(_average(lambda p, t: (p == t) * 1.0), _ratio),
    "mae": Score(_average(lambda p, t: np.abs(p - t)), _ratio, lower=True, percent=False),
    "f1_non0": Score(_signs, _weighted_f1),
    "weighted_f1": Score(_confusion, _weighted_f1_of_classes),
}
OF_CLASSES = ("accuracy", "weighted_f1")  # where a prediction below 0 is none


def _jackknife(parts: np.ndarray, kind: Score) -> np.ndarray:
    """Pseudo-values [n] of a score of the sums of ``parts`` [n, C], moved so that their mean is the score."""
    total, n = parts.sum(0), len(parts)
    values = n * kind.score(total) - (n - 1) * kind.score(total - parts)
    return values + kind.score(total) - values.mean()


class Stored:
    """The results of ``cells`` in the file ``path``, as far as they are there, in one metric of `SCORES`.

    ``conditions`` everywhere: one test condition, several whose mean counts, or None for all of a run; "valid", by
    which a run chose its epoch, is only had by that name.
    """

    def __init__(
        self,
        path: str | Path,
        cells: Mapping[Label, Sequence[dict[str, Any]]],
        command: str = "",
        metric: str = "accuracy",
    ):
        if metric not in SCORES:
            raise ValueError(f"metric: expected one of {sorted(SCORES)}, got {metric!r}")
        self.path, self.cells, self.command, self.metric = Path(path), cells, command, metric
        self.keys = {label: [results.config_hash(c) for c in configs] for label, configs in cells.items()}
        self.seeds = {label: [int(c["seed"]) for c in configs] for label, configs in cells.items()}
        found = results.load_results(self.path)
        self._results = found[found["metric"] == metric]
        self._scores: dict[str, dict[str, float]] = {}
        columns = (self._results[name] for name in ("config_hash", "condition", "value"))
        for key, condition, value in zip(*columns, strict=True):
            self._scores.setdefault(key, {})[condition] = value
        self._arrays: dict[str, dict[str, np.ndarray]] = {}
        self._right: dict[tuple[str, tuple[str, ...]], np.ndarray | None] = {}
        self._pseudo: dict[tuple[str, tuple[str, ...]], np.ndarray | None] = {}

    def note(self) -> str:
        """How many runs are not there, and the command that fills them in; how many there are if all are."""
        keys = {key for label in self.keys for key in self.keys[label]}
        missing = len(keys - self._scores.keys())
        if missing:
            return f"{missing} of {len(keys)} runs not run; `{self.command}` fills them in"
        return f"all {len(keys)} runs stored, {self.path.name}"

    def _of(self, key: str, conditions: str | Sequence[str] | None) -> tuple[str, ...] | None:
        """The conditions of a run by their names; None if one of them is not stored."""
        there = self._scores.get(key, {})
        if conditions is None:
            return tuple(sorted(there.keys() - {"valid"})) if there else None
        named = (conditions,) if isinstance(conditions, str) else tuple(conditions)
        return named if there.keys() >= set(named) and there else None

    def scores(self, label: Label, conditions: str | Sequence[str] | None = None) -> dict[int, float]:
        """The mean score over the conditions, by seed."""
        found = {}
        for seed, key in zip(self.seeds[label], self.keys[label], strict=True):
            if (named := self._of(key, conditions)) is not None:
                found[seed] = float(np.mean([self._scores[key][c] for c in named]))
        return found

    def mean(self, label: Label, conditions: str | Sequence[str] | None = None) -> Interval:
        """The mean over seeds with Student's interval; NaN with n = 0 where nothing is stored."""
        scores = list(self.scores(label, conditions).values())
        return metrics.t_interval(scores) if scores else NOT_RUN

    def best(self, labels: Iterable[Label]) -> Label:
        """Of several cells the one whose mean on the validation split is best: what a tuned method is shown at.

        The first of equals; what is not run counts as the worst. Raises ValueError where none is run.
        """
        sign = -1 if SCORES[self.metric].lower else 1
        found = {label: sign * self.mean(label, "valid").mean for label in labels}
        there = {label: mean for label, mean in found.items() if not math.isnan(mean)}
        if not there:
            raise ValueError(f"labels: expected cells with runs, got {list(found)}, of which none is run")
        return max(there, key=lambda label: there[label])

    def curves(self, label: Label) -> dict[str, np.ndarray]:
        """The curves of a cell's runs by name (`experiments.CURVES`): [seeds, epochs], NaN after a run's last epoch.

        Runs stored before curves were kept have none; where none has one the dict is empty.
        """
        found = {}
        for name in experiments.CURVES:
            kept = [self._kept(key) or {} for key in self.keys[label]]
            lines = [arrays[name] for arrays in kept if name in arrays]
            if lines:
                found[name] = np.full((len(lines), max(map(len, lines))), math.nan)
                for row, line in zip(found[name], lines, strict=True):
                    row[: len(line)] = line
        return found

    def samples(self, label: Label, condition: str) -> int | None:
        """How many test samples a condition was scored on; None where nothing is stored."""
        found = self._results[self._results["config_hash"].isin(self.keys[label])]
        counts = found.loc[found["condition"] == condition, "n"]
        return None if counts.empty else int(counts.iloc[0])

    def right(self, key: str, conditions: str | Sequence[str] | None = None) -> np.ndarray | None:
        """Per test sample the fraction of the conditions in which it is predicted right [n]; None if not stored."""
        named = self._of(key, conditions)
        if named is None:
            return None
        if (key, named) not in self._right:
            kept = self._kept(key)
            there = kept is not None and all((kept[c] >= 0).all() for c in named)
            hits = [kept[c] == kept["target"] for c in named] if kept is not None and there else None
            self._right[key, named] = None if hits is None else np.mean(hits, axis=0)
        return self._right[key, named]

    def pair(
        self,
        label: str,
        ours: Label,
        theirs: Label,
        conditions: str | Sequence[str] | None = None,
        against: str | Sequence[str] | None = None,
        **options: Any,
    ) -> verdicts.Comparison:
        """Two cells as a comparison for `verdicts.judge`, paired by seed and test sample; options: its other fields.

        ``against`` : the conditions of ``theirs`` where they are others than those of ``ours``, on the same samples.
        A metric that is no mean over samples enters by its pseudo-values (the jackknife's); without stored
        predictions there is one score a seed.
        """
        kind = SCORES[self.metric]
        options = {"metric": self.metric, "lower": kind.lower, "percent": kind.percent, **options}
        one = dict(zip(self.seeds[ours], self.keys[ours], strict=True))
        two = dict(zip(self.seeds[theirs], self.keys[theirs], strict=True))
        on = conditions, conditions if against is None else against
        both = [s for s in one if s in two and self._of(one[s], on[0]) and self._of(two[s], on[1])]
        if not both:
            return verdicts.compare(label, None, None, **options)
        found = [[self._by_sample(keys[s], c) for s in both] for keys, c in zip((one, two), on, strict=True)]
        values = [[x for x in side if x is not None] for side in found]
        if len({x.shape for side in values for x in side}) != 1 or any(len(side) != len(both) for side in values):
            scores = self.scores(ours, on[0]), self.scores(theirs, on[1])
            values = [[np.array([side[s]]) for s in both] for side in scores]
        return verdicts.compare(label, np.stack(values[0]), np.stack(values[1]), **options)

    def _by_sample(self, key: str, conditions: str | Sequence[str] | None) -> np.ndarray | None:
        """A run's pseudo-values [samples], whose mean is its score over the conditions; None without predictions."""
        name = key, self._of(key, conditions) or ()
        if name not in self._pseudo:
            kept, found = self._kept(key), None
            if kept is not None:
                kind = SCORES[self.metric]
                found = np.mean([_jackknife(self._parts(kept, c), kind) for c in name[1]], axis=0)
            self._pseudo[name] = found if found is not None and np.isfinite(found).all() else None
        return self._pseudo[name]

    def _kept(self, key: str) -> dict[str, np.ndarray] | None:
        """A run's stored predictions; None where there are none."""
        if key not in self._arrays:
            try:
                self._arrays[key] = results.predictions(self.path, key)
            except FileNotFoundError:
                return None
        return self._arrays[key]

    def _parts(self, arrays: Mapping[str, np.ndarray], condition: str) -> np.ndarray:
        """The summands [n, C] of a run's condition; zeros for a sample of which the condition left nothing."""
        predicted, target = arrays[condition].astype(np.float64), arrays["target"].astype(np.float64)
        there = ~np.isnan(predicted) & ((predicted >= 0) | (self.metric not in OF_CLASSES))
        parts = SCORES[self.metric].parts(np.where(there, predicted, 0), target)
        return parts * there[:, None]
