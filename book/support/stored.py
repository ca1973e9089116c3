"""Tables of stored runs for a chapter: means over seeds with intervals, differences, and computed verdicts.

A table's *cells* are a label per axis -> the configs of that cell, one a seed (such as `book.studies.mce`
gives). What is not stored is "not run"; nothing is ever run here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from book.support import results, verdicts
from mmlib import metrics
from mmlib.metrics import Interval

__all__ = ["Stored"]

Label = tuple[str, ...]
RESAMPLES = 2000  # of a bootstrap; a verdict is the same in every profile
NOT_RUN = Interval(math.nan, math.nan, math.nan, 0)


class Score(NamedTuple):
    """A metric as a function of sums over samples, so that a resample of the samples is a product of counts."""

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


def _by_zero(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The columns of `_signs` for negative against non-negative, all samples."""
    place = 2 * (t >= 0) + (p >= 0)
    return (place[:, None] == np.arange(4)) * 1.0


def _same_class(convention: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    said = lambda x: metrics.sentiment_classes(x, convention)
    return _average(lambda p, t: (said(p) == said(t)) * 1.0)


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
}


def _jackknife(parts: np.ndarray, kind: Score) -> np.ndarray:
    """Pseudo-values [n] of a score of the sums of ``parts`` [n, C], moved so that their mean is the score."""
    total, n = parts.sum(0), len(parts)
    values = n * kind.score(total) - (n - 1) * kind.score(total - parts)
    return values + kind.score(total) - values.mean()


class Stored:
    """The rows of ``cells`` in the results file ``path``, as far as they are there, in one metric of `SCORES`.

    ``tests`` everywhere: one test condition, several whose mean counts, or None for all of a run; "valid", by which a
    run chose its epoch, is only had by that name.
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
        rows = results.load_results(self.path)
        rows = rows[rows["metric"] == metric]
        self._rows = rows
        self._scores: dict[str, dict[str, float]] = {}
        for key, test, value in zip(rows["config_hash"], rows["condition"], rows["value"], strict=True):
            self._scores.setdefault(key, {})[test] = value
        self._shares: dict[tuple[str, tuple[str, ...]], np.ndarray | None] = {}
        self._compared: dict[Any, Interval] = {}
        self._arrays: dict[str, dict[str, np.ndarray]] = {}
        self._pseudo: dict[tuple[str, tuple[str, ...]], np.ndarray | None] = {}
        self._weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # of seeds and samples, resampled
        self._drawn: dict[tuple[int, str, str], np.ndarray] = {}  # a run's score in every resample

    def note(self) -> str:
        """How many runs are not there, and the command that fills them in; how many there are if all are."""
        keys = [key for label in self.keys for key in self.keys[label]]
        missing = len({key for key in keys if key not in self._scores})
        total = len(set(keys))
        if missing:
            return f"{missing} of {total} runs not run; `{self.command}` fills them in"
        return f"all {total} runs stored, {self.path.name}"

    def _of(self, key: str, tests: str | Sequence[str] | None) -> tuple[str, ...] | None:
        there = self._scores.get(key)
        if there is None:
            return None
        asked = (
            tuple(sorted(there.keys() - {"valid"}))
            if tests is None
            else (tests,)
            if isinstance(tests, str)
            else tuple(tests)
        )
        return asked if all(t in there for t in asked) else None

    def scores(self, label: Label, tests: str | Sequence[str] | None = None) -> dict[int, float]:
        """The mean score over the test conditions, by seed."""
        found = {}
        for seed, key in zip(self.seeds[label], self.keys[label], strict=True):
            if (asked := self._of(key, tests)) is not None:
                found[seed] = float(np.mean([self._scores[key][t] for t in asked]))
        return found

    def mean(self, label: Label, tests: str | Sequence[str] | None = None) -> Interval:
        """The mean over seeds with Student's interval; NaN with n = 0 where nothing is stored."""
        scores = list(self.scores(label, tests).values())
        return metrics.t_interval(scores) if scores else NOT_RUN

    def text(self, label: Label, tests: str | Sequence[str] | None = None) -> str:
        """The mean with half its 95 % interval, such as "76.4 ± 1.2" in per cent or "0.764 ± 0.012"; or "not run"."""
        found = self.mean(label, tests)
        if not found.n:
            return "not run"
        half = (found.high - found.low) / 2
        spread = "" if math.isnan(found.low) else f" ± {self._number(half)}"
        return f"{self._number(found.mean)}{spread}"

    def _number(self, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if SCORES[self.metric].percent else f"{value:{sign}.3f}"

    def samples(self, label: Label, test: str) -> int | None:
        """How many test samples a condition was scored on; None where nothing is stored."""
        rows = self._rows[self._rows["config_hash"].isin(self.keys[label]) & (self._rows["condition"] == test)]
        return None if rows.empty else int(rows["n"].iloc[0])

    def right(self, key: str, tests: str | Sequence[str] | None = None) -> np.ndarray | None:
        """Per test sample the share of the test conditions in which it is predicted right [n]; None if not stored."""
        asked = self._of(key, tests)
        if asked is None:
            return None
        if (key, asked) not in self._shares:
            try:
                kept = self._kept(key)
            except FileNotFoundError:
                self._shares[key, asked] = None
            else:
                hits = [kept[t] == kept["target"] for t in asked]
                self._shares[key, asked] = np.mean(hits, axis=0) if all((kept[t] >= 0).all() for t in asked) else None
        return self._shares[key, asked]

    def compare(self, ours: Label, theirs: Label, tests: str | Sequence[str] | None = None) -> Interval:
        """The difference of two cells, paired by seed and test sample: its mean and 95 % bootstrap interval.

        Without stored predictions the seeds alone are resampled. n = 0 where no seed has both.
        """
        key = (ours, theirs, tests if tests is None or isinstance(tests, str) else tuple(tests))
        if key not in self._compared:
            self._compared[key] = self._compare(*key)
        return self._compared[key]

    def _compare(self, ours: Label, theirs: Label, tests: str | tuple[str, ...] | None) -> Interval:
        one = dict(zip(self.seeds[ours], self.keys[ours], strict=True))
        two = dict(zip(self.seeds[theirs], self.keys[theirs], strict=True))
        both = [s for s in one if s in two and self._of(one[s], tests) and self._of(two[s], tests)]
        if not both:
            return NOT_RUN
        if (found := self._resampled([one[s] for s in both], [two[s] for s in both], tests)) is not None:
            return found
        pairs = [(self.right(one[s], tests), self.right(two[s], tests)) for s in both]
        a, b = [x for x, _ in pairs if x is not None], [y for _, y in pairs if y is not None]
        if len({x.shape for x in (*a, *b)}) != 1 or not len(a) == len(b) == len(both):
            mine, other = self.scores(ours, tests), self.scores(theirs, tests)
            a, b = [np.array([mine[s]]) for s in both], [np.array([other[s]]) for s in both]
        return metrics.paired_bootstrap(np.stack(a), np.stack(b), resamples=RESAMPLES)

    def verdict(self, ours: Label, theirs: Label, tests: str | Sequence[str] | None = None) -> str:
        """What the interval of `compare` says of "ours is better": holds, contradicted, inconclusive or not run.

        Better is more, but less of an error such as "mae".
        """
        found = self.compare(ours, theirs, tests)
        return metrics.verdict(found, self._better) if found.n else "not run"

    @property
    def _better(self) -> str:
        return "less" if SCORES[self.metric].lower else "greater"

    def _resampled(self, ours: list[str], theirs: list[str], tests: str | tuple[str, ...] | None) -> Interval | None:
        """The bootstrap of scores that are no mean over all samples; None where it needs none, or has no predictions.

        Weights for seeds and samples are drawn as in `metrics.paired_bootstrap`. Every condition is scored on the
        samples of which it leaves something, and the conditions' scores are averaged.
        """
        kind, asked = SCORES[self.metric], self._of(ours[0], tests)
        try:
            kept = [(self._kept(a), self._kept(b)) for a, b in zip(ours, theirs, strict=True)]
        except FileNotFoundError:
            return None
        whole = all((pair[0][t] >= 0).all() and (pair[1][t] >= 0).all() for pair in kept for t in asked or ())
        if asked is None or (self.metric == "accuracy" and whole):
            return None
        n, seeds = len(kept[0][0]["target"]), len(kept)
        if (seeds, n) not in self._weights:
            rng = np.random.default_rng(0)
            of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
            of_samples = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)
            self._weights[seeds, n] = of_seeds, np.vstack([np.ones((1, n)), of_samples])  # first the samples themselves
        of_seeds, weights = self._weights[seeds, n]
        gaps = np.zeros((RESAMPLES + 1, seeds))
        for s, (keys, pair) in enumerate(zip(zip(ours, theirs, strict=True), kept, strict=True)):
            for side, key, arrays in zip((1, -1), keys, pair, strict=True):
                for t in asked:
                    if (seeds, key, t) not in self._drawn:
                        self._drawn[seeds, key, t] = kind.score(weights @ self._parts(arrays, t))
                    gaps[:, s] += side * self._drawn[seeds, key, t] / len(asked)
        differences = (gaps[1:] * of_seeds).sum(1)
        differences = differences[np.isfinite(differences)]
        low, high = np.quantile(differences, [0.025, 0.975]) if len(differences) else (math.nan, math.nan)
        return Interval(float(gaps[0].mean()), float(low), float(high), seeds, n)

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
        asked = self._of(key, conditions) or ()
        name = (key, asked)
        if name not in self._pseudo:
            try:
                kept = self._kept(key)
            except FileNotFoundError:
                self._pseudo[name] = None
            else:
                found = np.mean([_jackknife(self._parts(kept, t), SCORES[self.metric]) for t in asked], axis=0)
                self._pseudo[name] = found if np.isfinite(found).all() else None
        return self._pseudo[name]

    def _kept(self, key: str) -> dict[str, np.ndarray]:
        if key not in self._arrays:
            self._arrays[key] = results.predictions(self.path, key)
        return self._arrays[key]

    def _parts(self, arrays: Mapping[str, np.ndarray], test: str) -> np.ndarray:
        """The summands [n, C] of a run's condition; zeros for a sample of which the condition left nothing."""
        said, target = arrays[test].astype(np.float64), arrays["target"].astype(np.float64)
        there = ~np.isnan(said) & ((said >= 0) | (self.metric != "accuracy"))
        parts = SCORES[self.metric].parts(np.where(there, said, 0), target)
        return parts * there[:, None]

    def claim(self, words: str, ours: Label, theirs: Label, tests: str | Sequence[str] | None = None) -> dict[str, Any]:
        """A row of a table of claims: the words, the difference (in points), its interval, seeds, and the verdict."""
        found = self.compare(ours, theirs, tests)
        if not found.n:
            return {"claim": words, "difference": "", "95 % interval": "", "seeds": 0, "verdict": "not run"}
        return {
            "claim": words,
            "difference": self._number(found.mean, "+"),
            "95 % interval": f"{self._number(found.low, '+')} to {self._number(found.high, '+')}",
            "seeds": found.n,
            "verdict": metrics.verdict(found, self._better),
        }
