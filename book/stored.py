"""Tables of stored runs for a chapter: means over seeds with intervals, differences, and computed verdicts.

A table's *cells* are a label per axis -> the configs of that cell, one a seed (such as `book.mce_runs` gives). What is
not stored is "not run"; nothing is ever run here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmlib import experiments, metrics
from mmlib.metrics import Interval

__all__ = ["Stored"]

Label = tuple[str, ...]
RESAMPLES = 2000  # of a bootstrap; a verdict is the same in every profile
NOT_RUN = Interval(math.nan, math.nan, math.nan, 0)


class Stored:
    """The rows of ``cells`` in the results file ``path``, as far as they are there.

    ``tests`` everywhere: one test condition, several whose mean counts, or None for all of a run.
    """

    def __init__(self, path: str | Path, cells: Mapping[Label, Sequence[dict[str, Any]]], command: str = ""):
        self.path, self.cells, self.command = Path(path), cells, command
        self.keys = {label: [experiments.config_hash(c) for c in configs] for label, configs in cells.items()}
        self.seeds = {label: [int(c["seed"]) for c in configs] for label, configs in cells.items()}
        rows = experiments.load_rows(self.path)
        rows = rows[(rows["metric"] == "accuracy") & (rows["test"] != "valid")]
        self._scores: dict[str, dict[str, float]] = {}
        for key, test, value in zip(rows["config_hash"], rows["test"], rows["value"], strict=True):
            self._scores.setdefault(key, {})[test] = value
        self._shares: dict[tuple[str, tuple[str, ...]], np.ndarray | None] = {}
        self._compared: dict[Any, Interval] = {}

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
        asked = tuple(sorted(there)) if tests is None else (tests,) if isinstance(tests, str) else tuple(tests)
        return asked if all(t in there for t in asked) else None

    def scores(self, label: Label, tests: str | Sequence[str] | None = None) -> dict[int, float]:
        """The mean accuracy over the test conditions, by seed."""
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
        """The mean in per cent with half its 95 % interval, such as "76.4 ± 1.2", or "not run"."""
        found = self.mean(label, tests)
        if not found.n:
            return "not run"
        spread = "" if math.isnan(found.low) else f" ± {50 * (found.high - found.low):.1f}"
        return f"{100 * found.mean:.1f}{spread}"

    def right(self, key: str, tests: str | Sequence[str] | None = None) -> np.ndarray | None:
        """Per test sample the share of the test conditions in which it is predicted right [n]; None if not stored."""
        asked = self._of(key, tests)
        if asked is None:
            return None
        if (key, asked) not in self._shares:
            try:
                kept = experiments.predictions(self.path, key)
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
        pairs = [(self.right(one[s], tests), self.right(two[s], tests)) for s in both]
        a, b = [x for x, _ in pairs if x is not None], [y for _, y in pairs if y is not None]
        if len({x.shape for x in (*a, *b)}) != 1 or not len(a) == len(b) == len(both):
            mine, other = self.scores(ours, tests), self.scores(theirs, tests)
            a, b = [np.array([mine[s]]) for s in both], [np.array([other[s]]) for s in both]
        return metrics.paired_bootstrap(np.stack(a), np.stack(b), resamples=RESAMPLES)

    def verdict(self, ours: Label, theirs: Label, tests: str | Sequence[str] | None = None) -> str:
        """What the interval of `compare` says of "ours is better": holds, contradicted, inconclusive or not run."""
        found = self.compare(ours, theirs, tests)
        return metrics.verdict(found) if found.n else "not run"

    def claim(self, words: str, ours: Label, theirs: Label, tests: str | Sequence[str] | None = None) -> dict[str, Any]:
        """A row of a table of claims: the words, the difference in points, its interval, seeds, and the verdict."""
        found = self.compare(ours, theirs, tests)
        if not found.n:
            return {"claim": words, "difference": "", "95 % interval": "", "seeds": 0, "verdict": "not run"}
        return {
            "claim": words,
            "difference": f"{100 * found.mean:+.1f}",
            "95 % interval": f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
            "seeds": found.n,
            "verdict": metrics.verdict(found),
        }
