"""What DREAM's pages show of the stored runs of `book.studies.dream`: frames to render, comparisons to judge.

Frames hold `Interval`s of fractions, so `tables.show` wants ``formats=".1%"``. Each function that gives comparisons
gives those of one table of a page: one family for `verdicts.judge`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from book import paper_tables
from book.studies import dream as study
from book.support import experiments, results, verdicts
from book.support.stored import Stored
from book.support.verdicts import Comparison
from mmlib import MultimodalDataset, metrics
from mmlib.metrics import Interval

__all__ = [
    "PAPER_COLUMNS",
    "Detection",
    "audit",
    "board",
    "before_and_now",
    "contrasts",
    "constant",
    "cost",
    "cost_facts",
    "fair",
    "fair_frame",
    "frames",
    "grid_frame",
    "headlines",
    "imbalance",
    "longer",
    "mask",
    "mean_frame",
    "mixed",
    "more_epochs",
    "opening",
    "paper_cost",
    "paper_gap",
    "paper_table1",
    "parameters",
    "sentiments",
    "slower",
    "stored",
    "table1",
    "table1_frame",
]

SCORES = {  # what a table is scored by, where it is not the accuracy
    "table1_synthetic": "f1_non0",
    "table1_mosi": "f1_non0",
    "mixed_synthetic": "f1_non0",
    "fig3_synthetic": "f1_non0",
    "interpretations_synthetic": "f1_non0",
    "longer_synthetic": "f1_non0",
    "longer_mosi": "f1_non0",
}
NAMES = {"synthetic": "synthetic", "mosi": "MOSI (public features)", "digits": "digits", "avmnist": "AV-MNIST"}
PAPER_COLUMNS = ["l", "a", "v", "l+a", "l+v", "a+v", "Avg", "l+a+v"]
OTHERS = ("CubeMLP", "evaluator alone", "modality dropout")
IN_THE_PAPER = {"CubeMLP": "CubeMLP", "evaluator alone": "CorrKD"}  # whose part our nets play in Table 1
PARTS = ("evaluator alone", "w/o dynamic enhancement", "w/o MMFM")


def stored(folder: Path) -> dict[str, Stored]:
    """Every table of trained methods, in the metric that the pages show."""
    apart = ("detection", "mask", "cost")
    return {
        name: Stored(study.path(name, folder), cells(), study.command(name), SCORES.get(name, "accuracy"))
        for name, cells in study.TABLES.items()
        if name not in apart
    }


def sentiments(folder: Path, metric: str) -> dict[str, Stored]:
    """The two tables of sentiment scores in another metric."""
    return {
        name: Stored(study.path(name, folder), study.TABLES[name](), study.command(name), metric)
        for name in ("table1_synthetic", "table1_mosi")
    }


# --- fair trials ------------------------------------------------------------------------------------------------------

TRIED = ("evaluator alone", "DREAM's net alone", "DREAM")
RIVALS = {"evaluator alone": "above its evaluator", "DREAM's net alone": "above its net without its parts"}
LONGER_RIVAL = {"evaluator, twice as long": "above its evaluator with twice the updates"}
VIEWS = ("left", "right", "projection")
SIX = [name for name in experiments.subsets(VIEWS) if name != "+".join(VIEWS)]
AS_TRAINED = "as in training"
WITH_LANGUAGE = ("language", "language+audio", "language+vision")


def grid_frame(tables: Mapping[str, Stored]) -> pd.DataFrame:
    """The grid of digits: accuracy on validation by the first seed, by the finalists' second, and what was chosen."""
    table, best = tables["grid_digits"], study.chosen("digits").values()
    rows = []
    for label, configs in table.cells.items():
        found = table.scores(label, "valid")
        first, second = (found.get(seed, math.nan) for seed in study.TUNING_SEEDS)
        rows.append({
            "method": label[0], "tried": label[1], "gaps as in training": first,
            "every subset": second if len(configs) > 1 else None, "chosen": "yes" if label in best else "",
        })  # fmt: skip
    return pd.DataFrame(rows)


def fair_frame(tables: Mapping[str, Stored]) -> pd.DataFrame:
    """Floors, each method at the fixed recipe and at its own, on digits: the accuracy of subsets of the views."""
    columns: dict[str, Any] = {
        "mean of six": SIX, AS_TRAINED: AS_TRAINED, **{v: v for v in VIEWS}, "all (ceiling)": "+".join(VIEWS),
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = _floors(columns)
    for recipe in ("fixed", "tuned"):
        table = tables[f"{recipe}_digits"]
        for name in (*TRIED, *LONGER_RIVAL) if recipe == "tuned" else TRIED:
            there = (name,) in table.cells
            rows[f"{name}, {recipe}"] = {
                c: table.mean((name,), on) if there else verdicts.NOTHING for c, on in columns.items()
            }
    return pd.DataFrame(rows).T[list(columns)]


def _floors(columns: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A constant and linear probes, as *How we compare* has them."""
    from book.studies import compare

    cells = compare.floors()
    rows = {}
    for what, words in (("constant", "a constant (floor)"), ("pooled probe", "a linear probe (floor)")):
        table = Stored(compare.path("floors"), {(what,): cells["digits", what]}, "")
        everywhere = what == "constant"
        places = {c: "all" if everywhere or c == "all (ceiling)" else c for c in columns}
        rows[words] = {c: table.mean((what,), place) for c, place in places.items()}
    return rows


def fair(tables: Mapping[str, Stored]) -> list[Comparison]:
    """DREAM against its evaluator and against its own net with the task loss alone, at both recipes, on digits."""
    pairs = []
    for recipe in ("fixed", "tuned"):
        table = tables[f"{recipe}_digits"]
        for column, on in (("mean of six", SIX), (AS_TRAINED, AS_TRAINED))[: 1 + (recipe == "tuned")]:
            for other, label in {**RIVALS, **(LONGER_RIVAL if recipe == "tuned" else {})}.items():
                pairs.append(_pair(table, f"{label}, {column}", other, on, group=f"digits, {recipe}"))
    return pairs


def _pair(table: Stored, label: str, other: str, on: Any, **options: Any) -> Comparison:
    if {("DREAM",), (other,)} - table.cells.keys():
        return verdicts.compare(label, None, None, **options)
    return table.pair(label, ("DREAM",), (other,), on, **options)


def before_and_now(tables: Mapping[str, Stored]) -> pd.DataFrame:
    """DREAM minus its evaluator and minus its own net on digits: at the recipe of before, and each at its own."""
    judged = verdicts.judge(fair(tables))
    rows = {}
    for label in dict.fromkeys(judged.loc[judged["group"] == "digits, fixed", "label"]):
        mine = judged[judged["label"] == label].set_index("group")
        said = {g: verdicts.sentence(row) for g, row in mine.iterrows()}
        rows[label] = {r: said.get(f"digits, {r}", "not run") for r in ("fixed", "tuned")}
    return pd.DataFrame(rows).T


# --- Table 1 ----------------------------------------------------------------------------------------------------------


def conditions() -> dict[str, Any]:
    """The columns of the paper's Table 1 -> our test conditions; "Avg" is the mean of the six incomplete ones."""
    subsets = list(experiments.subsets(["language", "audio", "vision"]))
    brief = {"+".join(m[0] for m in name.split("+")): name for name in subsets}
    found: dict[str, Any] = {c: brief[c] for c in PAPER_COLUMNS if c in brief}
    return {c: found.get(c, [s for s in subsets if s != brief["l+a+v"]]) for c in PAPER_COLUMNS}


def paper_table1(group: str) -> pd.DataFrame:
    """One data set of the paper's Table 1, F1 in per cent: methods down, subsets across."""
    frame = paper_tables.read("dream-table1")
    part = frame[frame["group"] == group].pivot(index="row", columns="column", values="value")
    return part.loc[frame["row"].unique(), PAPER_COLUMNS].rename_axis(None).rename_axis(None, axis=1)


def table1_frame(table: Stored) -> pd.DataFrame:
    """Our methods down, the paper's columns across."""
    return pd.DataFrame({c: {m: table.mean((m,), t) for (m,) in table.cells} for c, t in conditions().items()})


def constant(table: Stored) -> pd.Series:
    """The weighted F1 of a constant of the sign that fits better, in the paper's columns: what a method has to beat."""
    kept = results.predictions(table.path, table.keys["DREAM",][0])

    def score(name: str) -> float:
        there = ~np.isnan(kept[name])
        target = kept["target"][there]
        return max(metrics.msa_scores(np.full(len(target), sign), target)["f1_non0"] for sign in (-1.0, 1.0))

    found = {}
    for column, tests in conditions().items():
        scores = [score(name) for name in ([tests] if isinstance(tests, str) else tests)]
        found[column] = float(np.mean(scores))
    return pd.Series(found)


def table1(table: Stored, paper: str = "", with_language: bool = False) -> list[Comparison]:
    """DREAM against each other method in each column; ``paper`` names the group whose differences stand beside ours.

    with_language : only the columns with language; on CMU-MOSI a constant scores as well as any method in the others
    """
    printed = paper_table1(paper) if paper else None
    pairs = []
    for other in OTHERS:
        for column, tests in conditions().items():
            if with_language and "l" not in column:
                continue
            beside = None
            if printed is not None and other in IN_THE_PAPER:
                beside = float(printed.at["DREAM", column] - printed.at[IN_THE_PAPER[other], column])
            pairs.append(table.pair(column, ("DREAM",), (other,), tests, group=f"above {other}", paper=beside))
    return pairs


def paper_gap() -> pd.DataFrame:
    """The paper's {l} minus the mean of {a} and {v}, points of F1: DREAM's, and the extremes of the eight methods."""
    rows = {}
    for group in ("MOSI", "MOSEI", "IEMOCAP"):
        part = paper_table1(group)
        gap = (part["l"] - part[["a", "v"]].mean(axis=1)).sort_values()
        rows[group] = {
            "DREAM": gap["DREAM"],
            "place of 8": 1 + list(gap.index).index("DREAM"),
            "smallest": f"{gap.index[0]} {gap.iloc[0]:.2f}",
            "largest": f"{gap.index[-1]} {gap.iloc[-1]:.2f}",
        }
    return pd.DataFrame(rows).T.astype({"DREAM": float, "place of 8": int})


def imbalance(tables: Mapping[str, Stored]) -> pd.DataFrame:
    """Ours: language minus the mean of audio and vision, a mean over seeds for each method and data set."""
    frame = {}
    for name in ("table1_synthetic", "table1_mosi"):
        table = tables[name]
        frame[NAMES[name.removeprefix("table1_")]] = {m: _language_gap(table, (m,)) for (m,) in table.cells}
    return pd.DataFrame(frame)


def _language_gap(table: Stored, label: tuple[str, ...]) -> Interval:
    one = {m: table.scores(label, m) for m in ("language", "audio", "vision")}
    gaps = [one["language"][s] - (one["audio"][s] + one["vision"][s]) / 2 for s in one["language"]]
    return metrics.t_interval(gaps) if gaps else verdicts.NOTHING


LONGER = {"longer": "digits", "longer_synthetic": "synthetic", "longer_mosi": "mosi"}


def longer(tables: Mapping[str, Stored]) -> pd.DataFrame:
    """The mean over the seven subsets after 12 and after 36 epochs."""
    rows = {}
    for name, source in LONGER.items():
        for method in dict.fromkeys(m for m, _ in tables[name].cells):
            rows[NAMES[source], method] = {f"{e} epochs": tables[name].mean((method, e)) for e in ("12", "36")}
    return pd.DataFrame(rows).T


def more_epochs(tables: Mapping[str, Stored]) -> list[Comparison]:
    """36 epochs against 12 for every method, and DREAM against the others after 36."""
    pairs = []
    for name, source in LONGER.items():
        table, group = tables[name], NAMES[source]
        methods = list(dict.fromkeys(m for m, _ in table.cells))
        pairs += [table.pair(f"{m}: 36 epochs − 12", (m, "36"), (m, "12"), group=group, claim="") for m in methods]
        pairs += [
            table.pair(f"DREAM − {m}, 36 epochs", ("DREAM", "36"), (m, "36"), group=group, claim="")
            for m in methods
            if m != "DREAM"
        ]
    return pairs


# --- Figures 3, 4 and 5 -----------------------------------------------------------------------------------------------


def mean_frame(table: Stored, methods: Iterable[str], places: Iterable[str]) -> pd.DataFrame:
    """Methods down, places (a rate, an eta) across."""
    methods = list(methods)
    return pd.DataFrame({p: {m: table.mean((m, p)) for m in methods} for p in places})


def frames(tables: Mapping[str, Stored]) -> list[Comparison]:
    """Figure 3: DREAM against the two others where more than half of the frames are missing."""
    pairs = []
    for source in ("avmnist", "synthetic"):
        table = tables[f"fig3_{source}"]
        for other in OTHERS[:2]:
            for rate in study.FRAME_RATES[2:]:
                place = str(rate)
                pairs.append(
                    table.pair(f"above {other} at {rate}", ("DREAM", place), (other, place), group=NAMES[source])
                )
    return pairs


def slower(tables: Mapping[str, Stored]) -> list[Comparison]:
    """Figure 3: what DREAM loses from all frames to a tenth of them, against what the others lose; less is better."""
    first, last = str(study.FRAME_RATES[0]), str(study.FRAME_RATES[-1])
    pairs = []
    for source in ("avmnist", "synthetic"):
        table = tables[f"fig3_{source}"]
        for other in OTHERS[:2]:
            ends = [[table.scores((m, place)) for place in (first, last)] for m in ("DREAM", other)]
            seeds = sorted(set.intersection(*(set(scores) for pair in ends for scores in pair)))
            values: list[Any] = [[a[s] - b[s] for s in seeds] if seeds else None for a, b in ends]
            label = f"lost, minus {other}"
            pairs.append(
                verdicts.compare(
                    label,
                    *values,
                    metric=table.metric,
                    lower=True,
                    group=f"{NAMES[source]}: from all frames to a tenth",
                )
            )
    return pairs


def mixed(tables: Mapping[str, Stored], figure: int) -> list[Comparison]:
    """Figure 4: DREAM against its parts. Figure 5: Self-MM as the evaluator against the others. At every eta."""
    pairs = []
    for name, etas in (("mixed_digits", study.ETAS), ("mixed_synthetic", study.ETAS[::2])):
        table, source = tables[name], NAMES[name.removeprefix("mixed_")]
        for eta in map(str, etas):
            group = f"{source}, eta {eta}"
            if figure == 4:
                pairs += [table.pair(m, ("DREAM", eta), (m, eta), group=group) for m in PARTS]
            else:
                rivals = {"Table 3's": "DREAM", "insufficiently trained": "insufficiently trained", "MLP": "MLP"}
                pairs += [table.pair(k, ("Self-MM", eta), (m, eta), group=group) for k, m in rivals.items()]
    return pairs


# --- Tables 2 and 3 ---------------------------------------------------------------------------------------------------


def paper_cost() -> pd.DataFrame:
    """The paper's Table 2, seconds."""
    frame = paper_tables.read("dream-table2")
    wide = frame.assign(key=frame["group"] + " " + frame["column"]).pivot(index="row", columns="key", values="value")
    order = [f"{g} {w}" for g in ("MOSI", "MOSEI", "IEMOCAP") for w in ("train", "test")]
    return wide.loc[frame["row"].unique(), order].rename_axis(None).rename_axis(None, axis=1)


def cost(folder: Path) -> dict[str, pd.Series]:
    """The least seconds of each piece, by size; a size that was not run is empty."""
    rows = results.load_results(study.path("cost", folder))
    found = {}
    for (size,), configs in study.cost().items():
        mine = rows[rows["config_hash"].isin([results.config_hash(c) for c in configs])]
        found[size] = mine.groupby("metric")["value"].min()
    return found


def cost_facts(seconds: pd.Series) -> dict[str, float]:
    """Ratios of one size: DREAM over the network that it consults and over CubeMLP, and the scores."""
    found = {}
    for what, each in (("a training step, scores looked up", "train"), ("testing, scores included", "test")):
        for other in ("evaluator", "CubeMLP"):
            found[f"{what}: DREAM / {other}"] = seconds[f"{each}, DREAM"] / seconds[f"{each}, {other}"]
    found["scores of a batch / a training step with live scores"] = (
        seconds["scores"] / seconds["train, DREAM, live scores"]
    )
    found["scores by 2^M forwards / in one pass"] = seconds["scores, 2^M forwards"] / seconds["scores"]
    return found


def parameters() -> pd.DataFrame:
    """Table 3: the paper's counts, and those of nets that are made at the paper's sizes."""
    from mmlib.backbones import Table3Evaluator
    from mmlib.methods import DREAM

    paper = paper_tables.read("dream-table3").pivot(index="row", columns="column", values="value")
    paper = paper.loc[["Pre-trained model", "DREAM", "Total"], ["MOSI", "MOSEI", "IEMOCAP"]].astype(int)
    ours = {}
    for name, (audio, vision, outputs) in {"MOSI": (5, 20, 1), "MOSEI": (74, 35, 1), "IEMOCAP": (74, 35, 8)}.items():
        arrays = {"language": torch.zeros(2, 50, 300), "audio": torch.zeros(2, 50, audio)}
        arrays["vision"] = torch.zeros(2, 50, vision)
        target = torch.zeros(2) if outputs == 1 else torch.zeros(2, 4, dtype=torch.int64)
        split = MultimodalDataset.from_arrays(arrays, target, classes=2 if outputs == 8 else None)
        net = Table3Evaluator.for_data(split).eval()
        count = lambda parts: sum(p.numel() for p in parts)
        evaluator, total = count(net.parameters()), count(DREAM.for_data(split, net).parameters())
        ours[name] = [evaluator, total - evaluator, total]
    ours_frame = pd.DataFrame(ours, index=paper.index)
    columns = {f"{name}, {who}": f[name] for name in paper for who, f in (("paper", paper), ("ours", ours_frame))}
    return pd.DataFrame(columns).rename_axis(None)


# --- detection and the mask -------------------------------------------------------------------------------------------

MODALITIES = {
    "confounded": ("language", "audio", "echo", "useless"),
    "synthetic": ("language", "audio", "vision"),
    "digits": ("left", "right", "projection"),
    "mosi": ("language", "audio", "vision"),
    "avmnist": ("image", "audio"),
}


class Detection:
    """The stored counts of PSS by presence: PSS = 0 as a detector of what is missing."""

    def __init__(self, folder: Path):
        self.path, self.cells = study.path("detection", folder), study.detection()

    def counts(self, label: tuple[str, str], rate: float) -> tuple[np.ndarray, np.ndarray] | None:
        """Values of PSS [V] and counts [M, 2, V] over the seeds: where a modality is there, where it is missing."""
        total: dict[float, np.ndarray] = {}
        for config in self.cells[label]:
            try:
                kept = results.predictions(self.path, config)
            except FileNotFoundError:
                return None
            for k, value in enumerate(kept[f"values {rate}"].round(6)):
                total[value] = total.get(value, 0) + kept[f"counts {rate}"][:, :, k]
        values = sorted(total)
        return np.array(values), np.stack([total[v] for v in values], -1)

    def facts(self, label: tuple[str, str], rate: float, modality: int | None = None) -> dict[str, float] | None:
        """Recall, precision, q (the fraction of what is there that has PSS 0), and the fraction that is missing."""
        if (found := self.counts(label, rate)) is None:
            return None
        values, counts = found[0], found[1].sum(0) if modality is None else found[1][modality]
        zero = counts[:, values == 0].sum(1)
        return {
            "recall": zero[1] / counts[1].sum(),
            "precision": zero[1] / zero.sum(),
            "q": zero[0] / counts[0].sum(),
            "missing": counts[1].sum() / counts.sum(),
        }

    def frame(self, key: str) -> pd.DataFrame:
        """One of the facts: data sets and evaluators down, missing rates across."""
        word = {"table3": "", "weak": ", weak evaluator", "mlp": ", MLP"}
        return pd.DataFrame(
            {
                f"{r} missing": {
                    f"{NAMES.get(source, source)}{word[net]}": self._cell(self.facts((source, net), r), key)
                    for source, net in self.cells
                }
                for r in study.DETECTION_RATES
            }
        )

    def by_modality(self, rate: float) -> pd.DataFrame:
        """q and precision of each modality, where the evaluator is that of Table 3."""
        rows = []
        for source, names in MODALITIES.items():
            for m, name in enumerate(names):
                found = self.facts((source, "table3"), rate, m)
                rows.append({
                    "data": NAMES.get(source, source), "modality": name,
                    **{k: self._cell(found, k) for k in ("q", "precision")},
                })  # fmt: skip
        return pd.DataFrame(rows)

    @staticmethod
    def _cell(found: dict[str, float] | None, key: str) -> Any:
        return "not run" if found is None else float(found[key])


def mask(folder: Path) -> pd.DataFrame:
    """What Eq. 10 does in trained models: mean and range over seeds, a column a data set."""
    rows = results.load_results(study.path("mask", folder))
    frame: dict[str, dict[str, str]] = {}
    for (source,), configs in study.mask().items():
        mine = rows[rows["config_hash"].isin([results.config_hash(c) for c in configs])]
        frame[source] = {
            str(k): f"{g.mean():.3f} [{g.min():.3f}, {g.max():.3f}]"
            for k, g in mine.groupby("metric", sort=False)["value"]
        }
    return pd.DataFrame(frame).fillna("not run")


# --- what the paper leaves open ---------------------------------------------------------------------------------------


def contrasts(table: Stored, base: str, group: str, labels: Mapping[str, str] | None = None) -> list[Comparison]:
    """Every cell of a table against the cell ``base``; there is no claim, so the words are better and worse."""
    return [
        table.pair((labels or {}).get(what, what), (what,), (base,), group=group, claim="")
        for (what,) in table.cells
        if what != base
    ]


# --- the audit of Table 1 ---------------------------------------------------------------------------------------------


def audit() -> pd.DataFrame:
    """What of Table 1 does not follow from itself: an "Avg." that is not its row's mean, a difference in the text."""
    frame = paper_tables.read("dream-table1")
    rows = []
    for (group, row), part in frame.groupby(["group", "row"], sort=False):
        value = part.set_index("column")["value"]
        mean, printed = value[PAPER_COLUMNS[:6]].mean(), value["Avg"]
        off = abs(printed - mean)
        if off <= 0.0051 and round(mean + 1e-9, 2) == printed:
            continue
        severity = "rounding" if off <= 0.0101 else "minor" if off < 0.5 else "major"
        note = "cut, not rounded" if severity == "rounding" else "not the mean of the row's six columns"
        rows.append((f"Table 1, {group}, {row}, Avg.", f"{printed:.2f}", f"{mean:.3f}", severity, note))
    at = frame.set_index(["group", "row", "column"])["value"]
    for column, name, printed in (("a+v", "MSPs", 6.51), ("a", "MSPs", 11.04), ("Avg", "CorrKD", 7.51)):
        gap = at["IEMOCAP", "DREAM", column] - at["IEMOCAP", name, column]
        severity = "none" if abs(gap - printed) < 0.0051 else "minor"
        item = f"sec. 4.2, IEMOCAP {{{column}}}, DREAM − {name}"
        rows.append((item, f"{printed:.2f}", f"{gap:.2f}", severity, "the text against the table"))
    best = frame.loc[frame.groupby(["group", "column"])["value"].idxmax()]
    lost = best[best["row"] != "DREAM"]
    where = ", ".join(f"{g} {{{c}}}" for g, c in zip(lost["group"], lost["column"], strict=True))
    rows.append((
        "sec. 4.2, \"consistently outperforms\"", f"{len(best)} of {len(best)} columns",
        f"{len(best) - len(lost)} of {len(best)}", "minor", f"not best in {where}",
    ))  # fmt: skip
    columns = ["item", "printed", "recomputed", "severity", "note"]
    return pd.DataFrame(rows, columns=columns).assign(paper="DREAM")[["paper", *columns]]


# --- the verdict ------------------------------------------------------------------------------------------------------


def headlines(tables: Mapping[str, Stored]) -> pd.DataFrame:
    """The comparisons that the top of a page names, one for each claim, judged together."""
    pairs = []
    for other, words in (
        ("evaluator alone", "its evaluator at equal updates"),
        ("evaluator, twice as long", "its evaluator with twice the updates"),
        ("DREAM's net alone", "its own net without its parts"),
    ):
        pairs.append(_pair(tables["tuned_digits"], f"above {words}, each tuned, digits", other, SIX))
    for source, column, on in (("synthetic", "Avg.", conditions()["Avg"]), ("mosi", "with language", WITH_LANGUAGE)):
        table = tables[f"table1_{source}"]
        for other, words in zip(OTHERS, ("CubeMLP", "its own evaluator", "modality dropout"), strict=True):
            label = f"above {words} on {NAMES[source]} (fixed, Table 1, {column})"
            pairs.append(table.pair(label, ("DREAM",), (other,), on))
    last = str(study.FRAME_RATES[-1])
    for source in ("avmnist", "synthetic"):
        label = f"above its own evaluator with a tenth of the frames, {NAMES[source]} (Fig. 3)"
        pairs.append(tables[f"fig3_{source}"].pair(label, ("DREAM", last), ("evaluator alone", last)))
    for other in PARTS[1:]:
        label = f"above DREAM {other}, digits, eta 0.6 (Fig. 4)"
        pairs.append(tables["mixed_digits"].pair(label, ("DREAM", "0.6"), (other, "0.6")))
    label = "Self-MM above an MLP as the evaluator, digits, eta 0.6 (Fig. 5)"
    pairs.append(tables["mixed_digits"].pair(label, ("Self-MM", "0.6"), ("MLP", "0.6")))
    pairs.append(tables["inexact_digits"].pair("above DREAM without any scores, digits", ("all",), ("no scores",)))
    return verdicts.judge(pairs)


def opening(tables: Mapping[str, Stored], folder: Path) -> dict[str, str]:
    """The five lines at the top of both pages, all computed."""
    judged = headlines(tables)
    open_ = judged[judged["verdict"].isin(["equivalent", "undecided"])]
    lines = {
        "supported": _named(judged, "supported"),
        "opposite on our analogue": _named(judged, "opposite"),
        "equivalent or undecided": f"{len(open_)} of {len(judged)} headline comparisons; each at its best on digits, "
        f"DREAM minus its evaluator {verdicts.sentence(judged.iloc[0])}, minus its evaluator with twice the updates "
        f"{verdicts.sentence(judged.iloc[1])}, minus its own net without enhancement, mask "
        f"and distillation {verdicts.sentence(judged.iloc[2])}",
    }
    detection = Detection(folder)
    found = {r: detection.facts(("digits", "table3"), r) for r in (study.DETECTION_RATES[0], study.DETECTION_RATES[2])}
    known = {r: f for r, f in found.items() if f is not None}
    if known:
        recall = min(f["recall"] for f in known.values())
        precise = ", ".join(f"{f['precision']:.2f} where {r:.0%} are missing" for r, f in known.items())
        lines["PSS = 0 as a detector of gaps"] = f"recall {recall:.3f}; precision {precise} (digits, 5 seeds)"
    seconds = cost(folder)["small"]
    if not seconds.empty:
        facts = cost_facts(seconds)
        step, test = (facts[f"{what}: DREAM / evaluator"] for what in _COSTS)
        lines["cost"] = f"a training step of {step:.0f}, a prediction of {test:.0f} times its evaluator's"
    lines["use it when"] = "you ask of each sample which modality matters; compare with the evaluator alone first"
    return lines


def _named(judged: pd.DataFrame, word: str) -> str:
    """The comparisons with a verdict, with their effects."""
    few = {True: " (exploratory)", False: ""}
    chosen = judged[judged["verdict"] == word]
    said = [f"{r['label']}: {verdicts.effect(r)}{few[bool(r['exploratory'])]}" for _, r in chosen.iterrows()]
    return "; ".join(said) or f"none of {len(judged)} headline comparisons"


_COSTS = ("a training step, scores looked up", "testing, scores included")


def board(families: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """How often each verdict, a family of claims a row."""
    words = [w for w in verdicts.WORDS if any((f["verdict"] == w).any() for f in families.values())]
    return pd.DataFrame({
        claim: {**{w: int((f["verdict"] == w).sum()) for w in words}, "fewest seeds": int(f["seeds"].min())}
        for claim, f in families.items()
    }).T  # fmt: skip
