"""What DEAR's pages show of the stored runs of `book.studies.dear`: frames to render, comparisons to judge.

    told = Tables(setup.results_dir)
    told.table1                      # the judged comparisons of a table of the paper: one family, see `verdicts.judge`
    told.scores("table1_synthetic")  # means over seeds, to render

Every property is judged once, when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from book import paper_tables
from book.studies import dear as study
from book.studies import dear_checks
from book.support import results, verdicts
from book.support.stored import Stored
from book.support.verdicts import Comparison

__all__ = ["BERT", "BEST", "FORMATS", "FOUR", "SOURCES", "TWO", "Tables", "printed"]

TWO = {"F1": "f1_non0", "MAE": "mae"}
FOUR = {"Acc-7": "acc7", "F1": "f1_non0", "MAE": "mae", "Corr": "corr"}
SIX = {"Acc-7": "acc7", "Acc-5": "acc5", "Acc-2": "acc2_non0", "F1": "f1_non0", "MAE": "mae", "Corr": "corr"}
SCORES = {"acc7": "Acc-7", "acc5": "Acc-5", "acc2_has0": "Acc-2 has0", "acc2_non0": "Acc-2 non0",
          "f1_has0": "F1 has0", "f1_non0": "F1 non0", "mae": "MAE", "corr": "Corr"}  # fmt: skip
FORMATS = {name: ".3f" if name in ("MAE", "Corr") else ".1%" for name in SIX}
BEST = {name: "min" if name == "MAE" else "max" for name in SIX}
SOURCES = {
    "table1_synthetic": "synthetic",
    "table1_mosi": "MOSI (public features)",
    "table1_mosi_ids": "MOSI, encoded after dropping",
}
RIVALS = [name for name in study.METHODS if name != "DEAR"]
SUBSETS = {"L": "language", "A": "audio", "V": "vision", "L+A": "language+audio", "L+V": "language+vision",
           "V+A": "audio+vision"}  # fmt: skip
WITHOUT = ["w/o language", "w/o audio", "w/o visual"]
MODALITIES = ("language", "audio", "vision")
AT = [float(rate[2:]) for rate in study.RATES]
FLAT = 0.02  # a slope this small over the whole range of missing rates counts as none
RANKED = 0.05  # and so does a rank correlation this small


def printed(name: str, group: str | None = None) -> pd.DataFrame:
    """A table of the paper, as printed."""
    cells = paper_tables.read(name)
    cells = cells if group is None else cells[cells["group"] == group]
    number = lambda v, d: f"{v:.{d}f}" if isinstance(v, float) else v
    cells = cells.assign(text=[number(v, d) for v, d in zip(cells["value"], cells["digits"], strict=True)])
    wide = cells.pivot(index="row", columns="column", values="text")
    return wide.loc[cells["row"].unique(), cells["column"].unique()].rename_axis(None).rename_axis(None, axis=1)


class BERT(nn.Module):
    """Stands for BERT-base: its sizes and how many parameters it has, counted by hand."""

    config = SimpleNamespace(hidden_size=768, vocab_size=30522, max_position_embeddings=512)

    @property
    def count(self) -> int:
        """109,482,240: embeddings, twelve layers, the pooler."""
        h, f = self.config.hidden_size, 3072
        tables = (self.config.vocab_size + self.config.max_position_embeddings + 2 + 2) * h
        return tables + 12 * (4 * (h * h + h) + (h * f + f) + (f * h + h) + 4 * h) + h * h + h


# Where the paper prints what a comparison is about, on MOSI: label -> (table, its line, the line of DEAR)
IN_THE_PAPER = {
    **{name: ("dear-table3", name, "DEAR") for name in study.ABLATIONS},
    **{name: ("dear-table12", name, "DEAR") for name in study.PAIRS},
    **{name: ("dear-table6", name, "0.3, 0.7, 0.8, 0.3") for name in study.WEIGHTS},
    **{name: ("dear-table7", name.split()[0], "2") for name in study.DEPTHS},
    "Sinkhorn": ("dear-table9", "WD", "MMD"),
    **{name: ("dear-table13", name, "DEAR") for name in WITHOUT},
    **{name: ("dear-table14", name, "DEAR") for name in study.QUERIES},
}


def paper_gap(label: str, column: str) -> float | None:
    """The paper's difference of DEAR to a line of its table on MOSI, in "F1" (points) or "MAE"; None if not printed."""
    if label not in IN_THE_PAPER:
        return None
    table, line, base = IN_THE_PAPER[label]
    cells = paper_tables.read(table)
    cells = cells[cells["group"].isin(["MOSI", ""]) & (cells["column"] == {"F1": "F1 non0"}.get(column, column))]
    found = {row: float(value) for row, value in zip(cells["row"], cells["value"], strict=True)}
    return found[base] - found[line] if found.keys() >= {base, line} else None


def _named(column: str) -> dict[str, Any]:
    """How a comparison in a metric is called, and the band that `verdicts.compare` would give it."""
    return {"metric": column, **({"band": 0.02} if column == "MAE" else {})}


class Tables:
    """The stored runs of DEAR's tables in a folder of results."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._stored: dict[tuple[str, str], Stored] = {}

    def stored(self, table: str, metric: str = "mae") -> Stored:
        """The runs of a table in one metric."""
        if (table, metric) not in self._stored:
            made = study.TABLES[table](), study.command(table), metric
            self._stored[table, metric] = Stored(study.path(table, self.folder), *made)
        return self._stored[table, metric]

    def scores(
        self,
        table: str,
        labels: Sequence[str],
        conditions: str | Sequence[str] = study.RATES,
        columns: Mapping[str, str] = FOUR,
    ) -> pd.DataFrame:
        """Means over seeds and test conditions with intervals, a row a label."""
        found = {c: [self.stored(table, k).mean((one,), conditions) for one in labels] for c, k in columns.items()}
        return pd.DataFrame(found, index=list(labels))

    def by_rate(self, method: str, columns: Mapping[str, str] = SIX) -> pd.DataFrame:
        """A method's scores on synthetic at each missing rate."""
        found = {
            c: [self.stored("table1_synthetic", k).mean((method,), rate) for rate in study.RATES]
            for c, k in columns.items()
        }
        return pd.DataFrame(found, index=[rate[2:] for rate in study.RATES])

    def by_subset(self) -> pd.DataFrame:
        """F1 on synthetic by the modalities that are there."""
        stored = self.stored("table1_synthetic", "f1_non0")
        return pd.DataFrame(
            {m: [stored.mean((m,), where) for where in SUBSETS.values()] for m in study.METHODS}, index=list(SUBSETS)
        )

    def _pairs(
        self, table: str, rivals: Sequence[str], group: str = "", columns: Mapping[str, str] = TWO
    ) -> list[Comparison]:
        """DEAR against each of some cells of a table, in each of some metrics."""
        return [
            self.stored(table, k).pair(
                one, ("DEAR",), (one,), study.RATES, group=group, paper=paper_gap(one, c), **_named(c)
            )
            for c, k in columns.items()
            for one in rivals
        ]

    # --- each a family of claims ---

    @cached_property
    def table1(self) -> pd.DataFrame:
        """Tables 1, 2 and 15-17: DEAR against what it is compared with, on three data sets."""
        pairs = [p for table, words in SOURCES.items() for p in self._pairs(table, RIVALS, words)]
        return verdicts.judge(pairs)

    @cached_property
    def tuned(self) -> pd.DataFrame:
        """Each method at the learning rate that is best on its own validation split, and three times the epochs."""
        stored, epochs = self.stored("tuning"), str(3 * study.TRAIN["epochs"])
        pairs, look = [], _named("MAE")
        for source in ("synthetic", "mosi text and audio"):
            label = {m: (source, m, str(self.best_rate(source, m))) for m in study.METHODS}
            words = "synthetic" if source == "synthetic" else SOURCES["table1_mosi"]
            group = f"{words}, each at its best learning rate"
            pairs += [stored.pair(m, label["DEAR"], label[m], "r=0.5", group=group, **look) for m in RIVALS]
        both = ("DEAR", epochs), ("joint training", epochs)
        group = "synthetic, three times the epochs"
        pairs.append(self.stored("budget").pair("joint training", *both, "r=0.5", group=group, **look))
        return verdicts.judge(pairs)

    def best_rate(self, source: str, method: str) -> float:
        """The learning rate with the smallest validation error."""
        error = lambda lr: self.stored("tuning").mean((source, method, str(lr)), "valid").mean
        return min(study.RATES_TRIED, key=lambda lr: np.nan_to_num(error(lr), nan=9))

    def tuning(self, source: str) -> pd.DataFrame:
        """Validation error by learning rate, and the test error at a missing rate of .5 of the best one."""
        stored, rows = self.stored("tuning"), {}
        for method in study.METHODS:
            best = self.best_rate(source, method)
            tried = {f"{lr:g}": stored.mean((source, method, str(lr)), "valid") for lr in study.RATES_TRIED}
            rows[method] = {**tried, "best": f"{best:g}", "test": stored.mean((source, method, str(best)), "r=0.5")}
        return pd.DataFrame(rows).T

    @cached_property
    def ablations(self) -> pd.DataFrame:
        """Tables 3, 10 and 12: DEAR against itself without a part."""
        parts = [*study.ABLATIONS, *study.PAIRS]
        pairs = self._pairs("ablations_synthetic", parts, "synthetic")
        return verdicts.judge(pairs + self._pairs("ablations_mosi", list(study.ABLATIONS), "MOSI (public features)"))

    @cached_property
    def subsets(self) -> pd.DataFrame:
        """Table 4: F1 by the modalities that are there, on synthetic."""
        stored = self.stored("table1_synthetic", "f1_non0")
        return verdicts.judge(
            stored.pair(name, ("DEAR",), (m,), where, group=f"against {m}", metric="F1")
            for m in RIVALS
            for name, where in SUBSETS.items()
        )

    @cached_property
    def variants(self) -> pd.DataFrame:
        """Tables 9, 13 and 14 on synthetic."""
        tables = {"Table 9": ["Sinkhorn"], "Table 13": WITHOUT, "Table 14": list(study.QUERIES)}
        return verdicts.judge(
            p for words, rivals in tables.items() for p in self._pairs("alternatives_synthetic", rivals, words)
        )

    @cached_property
    def sensitivity(self) -> pd.DataFrame:
        """Tables 6 and 7 on synthetic."""
        tables = {"Table 6: loss weights": list(study.WEIGHTS), "Table 7: depth": list(study.DEPTHS)}
        return verdicts.judge(
            p for words, rivals in tables.items() for p in self._pairs("sensitivity_synthetic", rivals, words)
        )

    @cached_property
    def interpretations(self) -> pd.DataFrame:
        """One choice that the paper leaves changed at a time, against DEAR as it is here."""
        return verdicts.judge(
            self.stored("interpretations", k).pair(one, (one,), ("DEAR",), study.RATES, claim="", **_named(c))
            for c, k in TWO.items()
            for one in study.INTERPRETATIONS
        )

    # --- what DEAR says of itself ---

    @cached_property
    def stories(self) -> dict[str, dear_checks.Stories]:
        """By variant what was said of every test sample at every rate."""
        path = study.path("reliability", self.folder)
        return {name: dear_checks.Stories(path, configs) for (name,), configs in study.reliability().items()}

    def story(self, column: str, name: str = "DEAR", conditions: Sequence[str] = study.RATES) -> np.ndarray | None:
        """[seeds, conditions] means over samples; None where nothing is stored."""
        story = self.stories[name]
        return story.summary(column, conditions) if len(story) else None

    def says(self) -> pd.DataFrame:
        """Gate, entropy, weights, difficulties and errors by missing rate, means over samples and seeds."""
        columns = {"gate": "gate", "H(w)": "entropy", **{f"{k} {m}": f"{k} {m}" for k in "wde" for m in MODALITIES}}
        found = {words: self.story(c) for words, c in columns.items()}
        return pd.DataFrame({k: v.mean(0) for k, v in found.items() if v is not None}, index=AT).T

    @cached_property
    def figure4(self) -> pd.DataFrame:
        """Figure 4: four sentences, each the sign of a slope over the missing rate; and the same of d and e."""
        return verdicts.judge(
            [
                self._slope("the entropy of the weights", "entropy"),
                self._slope("the gate", "gate", lower=True),
                self._slope("the weight of audio", "w audio", lower=True),
                self._slope("the weight of vision", "w vision", lower=True),
                self._slope("the weight of language", "w language"),
                *(self._slope(f"the difficulty of {m}", f"d {m}", group="difficulty") for m in MODALITIES),
                *(self._slope(f"the error of {m}", f"e {m}", group="error of the repair") for m in MODALITIES),
            ]
        )

    def _slope(self, words: str, column: str, lower: bool = False, group: str = "the paper's sentences") -> Comparison:
        found = self.story(column)
        slopes = None if found is None else dear_checks.slopes(AT, found)
        options = {"metric": "slope", "percent": False, "band": FLAT, "lower": lower, "group": group}
        return verdicts.compare(f"{words} {'falls' if lower else 'rises'}", slopes, **options)

    @cached_property
    def table11(self) -> pd.DataFrame:
        """Table 11: three claims on noise on vision, each the sign of a slope over sigma."""
        claims = {
            "the weight of vision falls": ("w vision", True, 1, FLAT),
            "the weight of language rises": ("w language", False, 1, FLAT),
            "Acc-7 falls, in points": ("acc7", True, 100, 1.0),
        }
        return verdicts.judge(
            verdicts.compare(
                words,
                None if (found := self.noise(column)) is None else scale * dear_checks.slopes(study.SIGMAS, found),
                **{"metric": "slope", "percent": False, "band": band, "lower": lower, "group": words},
            )
            for words, (column, lower, scale, band) in claims.items()
        )

    def noise(self, column: str) -> np.ndarray | None:
        """[seeds, sigmas] under noise on vision."""
        return self.story(column, conditions=[f"sigma={s}" for s in study.SIGMAS])

    @cached_property
    def ranking(self) -> pd.DataFrame:
        """Does a difficulty rank the errors? Rank correlations over all samples and rates, one a seed."""
        return verdicts.judge(
            verdicts.compare(
                m, self.ranks(name, i), metric="rank correlation", percent=False, band=RANKED, group=f"d and e, {words}"
            )
            for name, words in (("DEAR", "beta = .3"), ("beta = 30", "beta = 30"))
            for i, m in enumerate(MODALITIES)
        )

    def ranks(self, name: str, place: int) -> np.ndarray | None:
        """Rank correlations of d and e of one modality, a seed each."""
        if not len(self.stories[name]):
            return None
        d, e = (self.stories[name].arrays(k)[..., place] for k in "de")
        return np.array([dear_checks.rank(one, other) for one, other in zip(d, e, strict=True)])

    def agreement(self, name: str) -> pd.DataFrame:
        """Rank correlation of d and e within a rate and of their means over rates; the fraction of e explained."""
        d, e = self.stories[name].arrays("d"), self.stories[name].arrays("e")
        rows = {}
        for i, m in enumerate(MODALITIES):
            pairs = [(d[s, ..., i], e[s, ..., i]) for s in range(len(d))]
            within = [dear_checks.rank(x, y) for one, other in pairs for x, y in zip(one, other, strict=True)]
            rows[m] = {
                "within a rate": np.mean(within),
                "across rates": np.mean([dear_checks.rank(x.mean(-1), y.mean(-1)) for x, y in pairs]),
                "explained": np.mean([1 - ((y - x) ** 2).mean() / y.var() for x, y in pairs]),
            }
        return pd.DataFrame(rows).T

    @cached_property
    def curves(self) -> dict[str, list[dear_checks.Selective]]:
        """Per score, by which samples are refused, and seed the risk against coverage, all rates together."""
        tale = self.stories["DEAR"]
        if not len(tale):
            return {}
        d, said, w = (tale.arrays(k) for k in ("d", "said", "w"))
        error = np.abs(said - tale.target)
        scores = {
            "mean difficulty": d.mean(-1),
            "largest difficulty": d.max(-1),
            "entropy of w": -(w * np.log(np.clip(w, 1e-9, None))).sum(-1),
            "minus mean difficulty": -d.mean(-1),
            "disagreement of five seeds": np.broadcast_to(said.std(0), error.shape),
            "the missing rate (not known)": np.broadcast_to(np.array(AT)[:, None], error.shape),
        }
        select = lambda score, wrong: [dear_checks.selective_risk(s, e) for s, e in zip(score, wrong, strict=True)]
        found = {name: select(score, error) for name, score in scores.items()}
        if len(other := self.stories["dropout"]):
            wrong = np.abs(other.arrays("said") - other.target)
            found["dropout deviation (own nets)"] = select(other.arrays("deviation"), wrong)
        return found

    @cached_property
    def refusal(self) -> pd.DataFrame:
        """Does refusing by a score lower the error? The mean error over coverages minus that of all samples."""
        names = self.curves or {"mean difficulty": None}
        return verdicts.judge(
            verdicts.compare(
                name,
                None if curves is None else np.array([c.area for c in curves]),
                0.0 if curves is None else np.array([c.risk[-1] for c in curves]),
                **{"lower": True, "percent": False, **_named("MAE")},
            )
            for name, curves in names.items()
        )

    # --- the rest ---

    def scales(self) -> pd.DataFrame:
        """Errors and weights at two missing rates, with e as it is and over the variance of X."""
        rows = {}
        for name, words in (("DEAR", "e"), ("e over the variance", "e over the variance")):
            for rate in ("r=0.0", "r=0.5"):
                found = {f"{k} {m}": self.story(f"{k} {m}", name, [rate]) for k in "ew" for m in MODALITIES}
                rows[f"{words}, rate {rate[2:]}"] = {k: "not run" if v is None else v.mean() for k, v in found.items()}
        return pd.DataFrame(rows).T

    def leak(self) -> pd.DataFrame:
        """How far a surviving word's vector moves when its neighbours are replaced, by missing rate."""
        found = results.load_results(study.path("leak", self.folder))
        if not len(found):
            return pd.DataFrame()
        wide = found.pivot(index="condition", columns="metric", values="value")
        return wide.rename_axis(None).rename_axis(None, axis=1)

    def selection(self) -> pd.DataFrame:
        """What the best epoch on test adds to each metric over the one chosen on validation, mean over seeds."""
        found, rows = results.load_results(study.path("selection", self.folder)), {}
        for (name,), configs in study.selection().items():
            mine = found[found["config_hash"].isin([results.config_hash(c) for c in configs])]
            if mine.empty:
                continue
            wide = mine.pivot(index=["metric", "seed"], columns="condition", values="value")
            gain = (wide["best on test"] - wide["chosen on validation"]).groupby("metric").mean()
            rows[name] = {SCORES[k]: gain[k] if k in ("mae", "corr") else 100 * gain[k] for k in SCORES if k in gain}
        return pd.DataFrame(rows).T

    def seconds(self) -> dict[str, float]:
        """Mean seconds of a run on synthetic, by method; NaN where none is stored."""
        found = results.load_results(study.path("table1_synthetic", self.folder))
        keys = {m: [results.config_hash(c) for c in cs] for (m,), cs in study.table1_synthetic().items()}
        return {m: float(found[found["config_hash"].isin(k)]["seconds"].mean()) for m, k in keys.items()}

    def row(self, family: pd.DataFrame, label: str, group: str = "", metric: str = "") -> Any:
        """One comparison of a family."""
        kept = family["label"] == label
        kept &= (family["group"] == group) if group else True
        kept &= (family["metric"] == metric) if metric else True
        return family[kept].iloc[0]
