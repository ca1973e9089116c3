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
from book.support import results, verdicts
from book.support.stored import Stored
from book.support.verdicts import Comparison

__all__ = [
    "CLAIMS",
    "METHODS5",
    "METHODS7",
    "ablation",
    "claims_as_a_whole",
    "figure7",
    "figure7_power",
    "power_means",
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


POWER = {"image": "image alone", "audio": "sound alone", "image+audio": "both"}  # conditions
RIVALS = ("joint training", "modality dropout")


def _by_recording(table: Stored, label: str, condition: str) -> dict[int, np.ndarray]:
    """Of each seed the accuracy on the samples of each test recording [450], scaled so that their mean is the accuracy.

    Image j of a class goes with sound j mod 45 of the class: samples that share a sound are one cluster.
    """
    found = {}
    for seed, key in zip(table.seeds[label,], table.keys[label,], strict=True):
        if (right := table.right(key, condition)) is None:
            continue
        target = results.predictions(table.path, key)["target"].astype(int)
        place = np.zeros(len(target), int)
        for c in np.unique(target):
            place[target == c] = 45 * c + np.arange((target == c).sum()) % 45
        found[seed] = np.bincount(place, right) * (place.max() + 1) / len(right)
    return found


def figure7_power(table: Stored) -> list[Comparison]:
    """MCE minus each rival at 33 sounds a class on 8,950 images, clustered by recording; and MCE minus a net of sounds.

    Both have the images that MCE has; the net of the sounds alone is what the sounds can do.
    """
    found = []
    for condition, words in POWER.items():
        for rival in (*RIVALS, *(["audio only"] if condition == "audio" else [])):
            ours, theirs = (_by_recording(table, m, condition) for m in ("MCE", rival))
            both = sorted(ours.keys() & theirs.keys())
            sides = [np.stack([side[s] for s in both]) if both else None for side in (ours, theirs)]
            found.append(verdicts.compare(rival, *sides, group=f"33 sounds a class, tested on {words}"))
    return found


def power_means(table: Stored) -> pd.DataFrame:
    """Accuracy of every method of `figure7_power` on each condition; blank where its network does not have it."""
    rows = [label for (label,) in table.cells]
    cell = lambda m, c: table.mean((m,), c) if m != "audio only" or c == "audio" else ""
    return pd.DataFrame({words: [cell(m, c) for m in rows] for c, words in POWER.items()}, index=rows)


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


def opening(tables: dict[str, Stored], ratios: dict[str, tuple[float, float]]) -> dict[str, str]:
    """The lines that both pages open with; ``ratios`` as `mce_live.step_ratios` gives them."""
    power = verdicts.judge(figure7_power(tables["fig7_power"]))
    whole = claims_as_a_whole(tables)
    parts = verdicts.judge(table2(tables, "digits")).set_index("label")
    line = lambda start: verdicts.sentence(parts.loc[next(x for x in parts.index if x.startswith(start))])
    words = {
        name: verdicts.tally(whole[whole["group"].str.startswith(start)])
        for name, start in (("digits", "Table 5 on digits"), ("mfeat", "Table 5 on mfeat"), ("AV-MNIST", "Figure 7"))
    }
    times = "; ".join(f"{x:.2f} and {y:.2f} at the paper's {k} sizes" for k, (x, y) in ratios.items())
    few = "; ".join(
        f"{k.partition('tested on ')[2]}: {verdicts.tally(p)}" for k, p in power.groupby("group", sort=False)
    )
    return {
        "MCE against others": "mean over settings, at this size, "
        + "; ".join(f"{k}: {v}" for k, v in words.items())
        + f". AV-MNIST, 33 sounds a class, 8,950 test images, {few}.",
        "all of MCE": f"over the task loss alone, digits: {line('m − a')}.",
        "subset loss": f"alone, digits: {line('c − a')}. All of MCE minus the subset loss: {line('m − c')}.",
        "factors A and B": f"added to the three losses, digits: {line('m − h')}.",
        "cost": f"operations of a step over those of the same network with f_rec, and of joint training without: "
        f"{times}; for B, a training of each modality alone beforehand.",
        "use it when": "a modality is rare in training and there in use. Begin with the losses; add A and B if "
        "validation asks for them.",
    }
