"""What DEAR's pages show of the main recipe, LNLN's token encoders, beside the one that was swept first.

main = Main(setup.results_dir)
main.headline                    # judged comparisons, a family of claims: see `verdicts.judge`
main.scores()                    # means over seeds, to render
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from book.studies import dear as study
from book.studies import dear_checks
from book.studies.dear_tables import AT, FLAT, FOUR, MODALITIES, RANKED, Tables
from book.support import results, verdicts
from book.support.stored import Stored
from book.support.verdicts import Comparison
from mmlib import data
from mmlib.methods.dear import SynergisticAttention
from mmlib.training import random_state

__all__ = ["Main", "noise_for_text"]

RIVALS = [name for name in study.MAIN if name != "DEAR"]
SWEPT = ["joint training", "DEAR's net, task loss"]
ONE, TUNED = "main recipe, one setting", "main recipe, each at its best setting"
SWEPT_GROUP = "swept recipe, one setting"
POOLED, WITHIN = "d and e, all rates together", "d and e, within a rate"
REFUSED = "refusing by the mean of d"
PRINTED = "e as printed, tau 10"
LOOK: dict[str, Any] = {"metric": "MAE", "band": 0.02, "lower": True, "percent": False}


class Main:
    """The stored runs of the tables ``main_*`` in a folder of results."""

    def __init__(self, folder: Path):
        self.folder, self.told = folder, Tables(folder)
        self._stored: dict[tuple[str, str], Stored] = {}

    def stored(self, table: str, metric: str = "mae") -> Stored:
        """The runs of a table in one metric."""
        if (table, metric) not in self._stored:
            made = study.TABLES[table](), study.command(table), metric
            self._stored[table, metric] = Stored(study.path(table, self.folder), *made)
        return self._stored[table, metric]

    def best(self, method: str) -> str:
        """The point of the grid that a method's validation error chooses, on the seeds that all points have.

        The fixed one where there is no such seed.
        """
        found = {cell: self.stored("main_grid").scores((method, cell), "valid") for cell in study.GRID}
        common = set.intersection(*(set(scores) for scores in found.values()))
        error = {cell: np.mean([scores[seed] for seed in common]) for cell, scores in found.items() if common}
        return min(error, key=lambda cell: error[cell]) if error else study.FIXED

    # --- each a family of claims ---

    @cached_property
    def headline(self) -> pd.DataFrame:
        """DEAR against its rivals: at one setting, each at its best by validation, and at the swept recipe."""
        fixed, grid, swept = (self.stored(t) for t in ("main_synthetic", "main_grid", "table1_synthetic"))
        pairs = [fixed.pair(m, ("DEAR",), (m,), study.RATES, group=ONE, **LOOK) for m in RIVALS]
        tuned = {m: (m, self.best(m)) for m in study.MAIN}
        pairs += [grid.pair(m, tuned["DEAR"], tuned[m], study.RATES, group=TUNED, **LOOK) for m in RIVALS]
        pairs += [swept.pair(m, ("DEAR",), (m,), study.RATES, group=SWEPT_GROUP, **LOOK) for m in SWEPT]
        return verdicts.judge(pairs)

    @cached_property
    def parts(self) -> pd.DataFrame:
        """DEAR against itself without a part, at both recipes."""
        tables = {"main_parts": "main recipe", "ablations_synthetic": "swept recipe"}
        return verdicts.judge(
            self.stored(table).pair(part, ("DEAR",), (part,), study.RATES, group=group, **LOOK)
            for table, group in tables.items()
            for part in study.MAIN_PARTS
            if (part,) in self.stored(table).cells
        )

    @cached_property
    def choices(self) -> pd.DataFrame:
        """One choice that the paper leaves changed at a time, against DEAR at the main recipe."""
        return verdicts.judge(
            self.stored("main_choices").pair(one, (one,), ("DEAR",), study.RATES, claim="", **LOOK)
            for one in study.MAIN_CHOICES
        )

    @cached_property
    def reliability(self) -> pd.DataFrame:
        """Does a difficulty rank the errors, and does refusing by it lower the error? By e, tau and gradient."""
        look = {"metric": "rank correlation", "percent": False, "band": RANKED}
        pairs = []
        for group, within in ((POOLED, False), (WITHIN, True)):
            for name in study.MAIN_RELIABILITY:
                ranks = self.ranks(name, within)
                seeds = None if ranks is None else ranks.mean(1)
                pairs.append(verdicts.compare(name, seeds, group=group, **look))
        return verdicts.judge([*pairs, *self._refusals(), *self._prices()])

    def _refusals(self) -> list[Comparison]:
        found = []
        for name, tale in self.stories.items():
            risks = None
            if len(tale):
                wrong = np.abs(tale.arrays("said") - tale.target)
                pairs = zip(tale.arrays("d").mean(-1), wrong, strict=True)
                risks = [dear_checks.selective_risk(d, e) for d, e in pairs]
            areas = None if risks is None else np.array([one.area for one in risks])
            whole = 0.0 if risks is None else np.array([one.risk[-1] for one in risks])
            found.append(verdicts.compare(name, areas, whole, group=REFUSED, **LOOK))
        return found

    def _prices(self) -> list[Comparison]:
        """The error of each variant minus that of e as a mean, the mean over rates of every test sample."""
        *names, base = study.MAIN_RELIABILITY
        return [
            verdicts.compare(name, *self._errors(name, base), claim="", group=f"minus {base}", **LOOK) for name in names
        ]

    def _errors(self, name: str, base: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        tales = self.stories[name], self.stories[base]
        seeds = min(map(len, tales))
        if not seeds:
            return None, None
        one, two = (np.abs(t.arrays("said") - t.target).mean(1)[:seeds] for t in tales)
        return one, two

    @cached_property
    def figure4(self) -> pd.DataFrame:
        """Figure 4's sentences with e as printed and tau = 10: each the sign of a slope over the missing rate."""
        tale = self.stories[PRINTED]
        columns = {
            "the entropy of the weights rises": ("entropy", False),
            "the gate falls": ("gate", True),
            "the weight of audio falls": ("w audio", True),
            "the weight of vision falls": ("w vision", True),
            "the weight of language rises": ("w language", False),
        }
        return verdicts.judge(
            verdicts.compare(
                words,
                dear_checks.slopes(AT, tale.summary(column, study.RATES)) if len(tale) else None,
                **{"metric": "slope", "percent": False, "band": FLAT, "lower": lower},
            )
            for words, (column, lower) in columns.items()
        )

    # --- to render ---

    def scores(self) -> pd.DataFrame:
        """Means over seeds and rates at one setting, a row a method."""
        columns = {
            c: [self.stored("main_synthetic", k).mean((m,), study.RATES) for m in study.MAIN] for c, k in FOUR.items()
        }
        return pd.DataFrame(columns, index=list(study.MAIN))

    def tuning(self) -> pd.DataFrame:
        """Validation error at every point of the grid, and the test error of the best one."""
        stored, rows = self.stored("main_grid"), {}
        for m in study.MAIN:
            tried = {cell: stored.mean((m, cell), "valid") for cell in study.GRID}
            best = self.best(m)
            rows[m] = {**tried, "best": best, "test": stored.mean((m, best), study.RATES)}
        return pd.DataFrame(rows).T

    def parts_scores(self, table: str, parts: Sequence[str]) -> pd.DataFrame:
        """Means over seeds and rates of DEAR and some changes of it."""
        names = ["DEAR", *parts]
        columns = {c: [self.stored(table, k).mean((n,), study.RATES) for n in names] for c, k in FOUR.items()}
        return pd.DataFrame(columns, index=names)

    @cached_property
    def stories(self) -> dict[str, dear_checks.Stories]:
        """By variant what was said of every test sample at every rate."""
        path = study.path("main_reliability", self.folder)
        return {name: dear_checks.Stories(path, configs) for (name,), configs in study.main_reliability().items()}

    def ranks(self, name: str, within: bool) -> np.ndarray | None:
        """Rank correlations of d and e [seeds, modalities], over all samples and rates or the mean of those of each."""
        tale = self.stories[name]
        if not len(tale):
            return None
        both = zip(tale.arrays("d"), tale.arrays("e"), strict=True)  # each [rates, n, M]
        one = lambda d, e: np.mean([dear_checks.rank(x, y) for x, y in zip(d, e, strict=True)])
        rank = one if within else dear_checks.rank
        return np.array([[rank(d[..., i], e[..., i]) for i in range(len(MODALITIES))] for d, e in both])

    def agreement(self) -> pd.DataFrame:
        """Per variant the mean rank correlations by modality, the test error and how many seeds there are."""
        rows = {}
        for name, tale in self.stories.items():
            if not len(tale):
                continue
            row = {}
            for words, within in (("all rates", False), ("within", True)):
                ranks = self.ranks(name, within)
                assert ranks is not None
                row |= {f"{words}, {m}": f"{r:+.2f}" for m, r in zip(MODALITIES, ranks.mean(0), strict=True)}
            error = np.abs(tale.arrays("said") - tale.target).mean()
            rows[name] = {**row, "MAE": f"{error:.3f}", "seeds": len(tale)}
        return pd.DataFrame(rows).T

    def cost(self) -> pd.DataFrame:
        """Of every method at one setting the parameters, the updates, and the mean seconds of a run."""
        found = results.load_results(study.path("main_synthetic", self.folder))
        split = data.load("synthetic", None, **study.DATA["synthetic"]["data_options"])["train"]
        steps = study.TRAIN["epochs"] * math.ceil(len(split) / study.TRAIN["batch_size"])
        rows = {}
        for (m,), configs in study.main_synthetic().items():
            keys = [results.config_hash(c) for c in configs]
            seconds = found[found["config_hash"].isin(keys)]["seconds"].mean()
            net = study.build(configs[0], split)
            rows[m] = {
                "parameters": sum(p.numel() for p in net.parameters()),
                "updates": steps,
                "seconds a run": "not run" if np.isnan(seconds) else f"{seconds:.0f}",
            }
        return pd.DataFrame(rows).T

    def opening(self) -> dict[str, str]:
        """The verdict at the top of both pages: each line is one comparison's."""
        told, say = self.told, lambda *which: verdicts.sentence(self.told.row(*which))
        own = "DEAR's net, task loss"
        mosi = verdicts.sentence(told.row(told.table1, "joint training", "MOSI (public features)", "MAE"))
        return {
            "DEAR over joint training": f"with LNLN's token encoders, {say(self.headline, 'joint training', ONE)}; "
            f"with pooled projections, {say(self.headline, 'joint training', SWEPT_GROUP)}; at this size, on our "
            "analogue",
            "its losses, weights and gate": "DEAR over its own net with the task loss alone, "
            f"{say(self.headline, own, ONE)}; at this size, on our analogue",
            "on MOSI": f"over joint training, {mosi}; two modalities, one of them with one frame",
            "its reliability": f"d ranks the errors of the repair, e as printed and tau 10: over all rates, "
            f"{say(self.reliability, PRINTED, POOLED)}; within a rate, {say(self.reliability, PRINTED, WITHIN)}",
            "use it when": "training data are complete, test data are not, and on your validation data it beats its "
            "own network with the task loss alone under the same masks",
        }

    def claims(self) -> pd.DataFrame:
        """The claims of the paper that one comparison here can speak to, and what it says."""
        told, main = self.told, ONE
        own = "DEAR's net, task loss"
        rows = {
            "Table 1: DEAR beats joint training": (self.headline, "joint training", main),
            "the same at equal parameters": (self.headline, "joint training, equal parameters", main),
            "the same as Table 1, pooled projections": (self.headline, "joint training", SWEPT_GROUP),
            "the same on MOSI, pooled projections": (told.table1, "joint training", "MOSI (public features)", "MAE"),
            "DEAR beats its own net with the task loss": (self.headline, own, main),
            "Table 3: the distances of HDCR help": (self.parts, "w/o HDCR", "main recipe"),
            "the distances of HDCR help, pooled projections": (self.parts, "w/o HDCR", "swept recipe"),
            "Table 3: SURE helps": (self.parts, "w/o SURE", "main recipe"),
            "Table 3: two streams and a gate help": (self.parts, "w/o DS", "main recipe"),
            "Table 9: MMD beats Sinkhorn, pooled projections": (told.variants, "Sinkhorn", "Table 9", "MAE"),
            "Table 7: two layers beat four, pooled projections": (told.sensitivity, "4 layers", "", "MAE"),
            **{f"Figure 4: {words}": (self.figure4, words) for words in self.figure4["label"]},
            **{f"Table 11: {words}, pooled projections": (told.table11, words) for words in told.table11["label"]},
            "d ranks e over all rates": (self.reliability, PRINTED, POOLED),
            "d ranks e within a rate": (self.reliability, PRINTED, WITHIN),
            "refusing by d lowers the error": (self.reliability, PRINTED, REFUSED),
        }
        return pd.DataFrame(
            {"ours": [verdicts.sentence(told.row(*which)) for which in rows.values()]}, index=list(rows)
        )


def noise_for_text(keys: Sequence[int]) -> pd.DataFrame:
    """How far Eq. 9's output moves when noise is put in place of the text, by how many keys it has; w is fixed."""
    rows = {}
    for count in keys:
        g = torch.Generator().manual_seed(0)
        draw = lambda frames: torch.randn(64, frames, 32, generator=g)  # noqa: B023
        with random_state(0), torch.no_grad():
            fusion = SynergisticAttention("language", ("language", "audio"), 32)
            h = {"language": draw(24), "audio": draw(count)}
            valid = {m: torch.ones(x.shape[:2], dtype=torch.bool) for m, x in h.items()}
            w = dict.fromkeys(h, torch.full((64,), 0.5))
            change = fusion(h, valid, w) - fusion({**h, "language": draw(24)}, valid, w)
        rows[str(count)] = {"largest change": change.abs().max().item()}
    return pd.DataFrame(rows).T.rename_axis("frames of audio")
