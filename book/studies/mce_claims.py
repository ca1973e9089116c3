"""The comparisons of the evidence page on MCE, and the verdicts that both pages open with.

A family (what is judged together, Holm within it) is a figure or table of the paper, or the paper's claim as a whole:
the mean over its settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from book import paper_tables
from book.studies import mce as study
from book.support import verdicts
from book.support.stored import Stored
from book.support.verdicts import Comparison

__all__ = [
    "CLAIMS",
    "METHODS5",
    "METHODS7",
    "ablation",
    "claims_as_a_whole",
    "figure7",
    "iemocap",
    "opening",
    "over_all",
    "presets",
    "stored",
    "table2",
    "table5",
    "welch",
]

METHODS7 = ("joint training", "modality dropout", "MBT-Sample", "MCE without B")
METHODS5 = ("joint training", "modality dropout", "PMR", "MBT-Sample")
CONDITIONS = ("image", "image+audio")
FRACTIONS = tuple(str(rate) for rate in study.AUDIO_RATES)
# Section 4.3 as differences of rows of Table 2: words, the row said to be better, the other
CLAIMS = (
    ("single loss alone helps", "b", "a"),
    ("subset loss alone helps", "c", "a"),
    ("completion loss alone helps", "d", "a"),
    ("three losses beat the best two", "h", "e"),
    ("A helps", "i", "h"),
    ("B helps", "j", "h"),
    ("A and B together help", "m", "h"),
    ("B helps on top of A", "m", "i"),
    ("A helps on top of B", "m", "j"),
    ("A, B, single are not enough", "m", "k"),
    ("A, B, completion are not enough", "m", "l"),
    ("all of MCE helps", "m", "a"),
    ("all of MCE beats the subset loss alone", "m", "c"),
)
RUNS = {row: 9 if row in "abcd" else 10 for row in study.ABLATIONS}  # behind the paper's Table 2, see its audit


def stored(results_dir: Path) -> dict[str, Stored]:
    """The chapter's tables, as far as they are stored."""
    return {
        name: Stored(study.path(name, results_dir), cells(), study.command(name))
        for name, cells in study.TABLES.items()
    }


def figure7(table: Stored) -> list[Comparison]:
    """MCE minus each method for every fraction of sounds, on pictures alone and with their sounds."""
    return [
        table.pair(m, ("MCE", s), (m, s), condition, group=f"{condition}, {s} % of sounds")
        for s in FRACTIONS
        for condition in CONDITIONS
        for m in METHODS7
    ]


def iemocap() -> pd.DataFrame:
    """The IEMOCAP column of the paper's Table 2: value, plus_minus, low, high by row."""
    cells = paper_tables.read("mce-table2")
    return cells[cells["column"] == "IEMOCAP (Accuracy)"].set_index("row")


def welch(one: str, two: str) -> tuple[float, float, float]:
    """The difference of two rows of the paper's Table 2 on IEMOCAP, and its 95 % interval."""
    from scipy import stats

    cells = iemocap()
    (m1, s1), (m2, s2) = (cells.loc[r, ["value", "plus_minus"]].astype(float) for r in (one, two))
    v1, v2, n1, n2 = s1**2 / RUNS[one], s2**2 / RUNS[two], RUNS[one], RUNS[two]
    freedom = (v1 + v2) ** 2 / (v1**2 / (n1 - 1) + v2**2 / (n2 - 1))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(v1 + v2)
    return m1 - m2, m1 - m2 - half, m1 - m2 + half


def table2(tables: dict[str, Stored], name: str) -> list[Comparison]:
    """The claims of section 4.3 on digits or avmnist, as far as their rows were planned."""
    table = tables[f"table2_{name}"]
    return [
        table.pair(f"{one} − {two}: {words}", (one,), (two,), group=name, paper=welch(one, two)[0])
        for words, one, two in CLAIMS
        if (one,) in table.cells and (two,) in table.cells
    ]


def ablation(tables: dict[str, Stored]) -> pd.DataFrame:
    """Mean and interval of every row of Table 2 on digits and, where it was planned, on AV-MNIST."""
    found: dict[str, list[Any]] = {"parts": [on or "task loss alone" for on in study.ABLATIONS.values()]}
    for title, name in (("digits", "table2_digits"), ("AV-MNIST", "table2_avmnist")):
        table = tables[name]
        found[title] = [table.mean((row,)) if (row,) in table.cells else "" for row in study.ABLATIONS]
    return pd.DataFrame(found, index=list(study.ABLATIONS))


def table5(table: Stored) -> list[Comparison]:
    """MCE minus each method in the six settings, beside the paper's difference from MBT-Sample on IEMOCAP.

    The paper's difference from its own baseline, 3 to 29 points, would leave no room for ours.
    """
    printed = paper_tables.read("mce-table5").set_index(["row", "column"])["value"]
    found = []
    for setting, rates in study.SETTINGS.items():
        words = "/".join(f"{r:g}"[1:] for r in rates)
        for m in METHODS5:
            paper = printed["MCE", setting] - printed[m, setting] if m == "MBT-Sample" else None
            found.append(
                table.pair(m, ("MCE", setting), (m, setting), group=f"setting {setting}: {words}", paper=paper)
            )
    return found


def presets(table: Stored) -> list[Comparison]:
    """Each other interpretation minus the paper's on digits."""
    return [table.pair(what, (what,), ("paper",), claim="") for (what,) in table.cells if what != "paper"]


def over_all(pairs: Sequence[Comparison], label: str, group: str) -> Comparison:
    """The mean of comparisons on the same seeds and samples; not run where one of them is not."""
    ran = [(p.ours, p.theirs) for p in pairs]
    if any(a is None or b is None for a, b in ran) or len({a.shape for a, _ in ran if a is not None}) != 1:
        return verdicts.compare(label, None, None, group=group)
    ours, theirs = (np.mean(side, axis=0) for side in zip(*ran, strict=True))
    return verdicts.compare(label, ours, theirs, group=group)


def claims_as_a_whole(tables: dict[str, Stored]) -> pd.DataFrame:
    """Is MCE better on average over the settings? Table 5 on two data sets and Figure 7, a family each."""
    families = []
    for name in ("digits", "mfeat"):
        pairs = table5(tables[f"table5_{name}"])
        group = f"Table 5 on {name}, mean of six settings"
        families.append([over_all([p for p in pairs if p.label == m], m, group) for m in METHODS5])
    pairs = figure7(tables["fig7"])
    families.append(
        [
            over_all(
                [p for p in pairs if p.label == m and p.group.startswith(f"{condition},")],
                m,
                f"Figure 7, tested on {condition}, mean of five fractions",
            )
            for condition in CONDITIONS
            for m in METHODS7
        ]
    )
    return pd.concat([verdicts.judge(family) for family in families], ignore_index=True)


def opening(tables: dict[str, Stored], ratio: float) -> dict[str, str]:
    """The lines that both pages open with; ``ratio``: operations of an exact step over those of a plain one."""
    whole = claims_as_a_whole(tables)
    parts = verdicts.judge(table2(tables, "digits")).set_index("label")
    line = lambda start: verdicts.sentence(parts.loc[next(x for x in parts.index if x.startswith(start))])
    words = {
        name: verdicts.tally(whole[whole["group"].str.startswith(start)])
        for name, start in (("digits", "Table 5 on digits"), ("mfeat", "Table 5 on mfeat"), ("AV-MNIST", "Figure 7"))
    }
    return {
        "MCE against others": "mean over settings, " + "; ".join(f"{k}: {v}" for k, v in words.items()) + ".",
        "all of MCE": f"over the task loss alone, digits: {line('m − a')}.",
        "subset loss": f"alone, digits: {line('c − a')}. All of MCE minus the subset loss: {line('m − c')}.",
        "factors A and B": f"added to the three losses, digits: {line('m − h')}.",
        "cost": f"{ratio:.2f} times the operations of a plain step at the paper's IEMOCAP sizes; for B, a training of "
        "each modality alone beforehand.",
        "use it when": "a modality is rare in training and there in use. Begin with the losses; add A and B if "
        "validation asks for them.",
    }
