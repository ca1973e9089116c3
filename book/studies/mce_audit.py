"""The paper's tables on MCE checked against themselves: what stands in ``book/paper_tables/audit.csv``.

A recomputed value agrees if it can be had from the printed inputs within their rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from book import paper_tables
from mmlib.methods.mce import learning_state_factor

__all__ = ["audit", "intervals", "marks", "table6", "table7", "values2"]

PARTS = ("A", "B", "single", "sub", "aux")
IOU, ACCURACY = "nuScenes (IoU)", "IEMOCAP (Accuracy)"
Printed = tuple[float, int]  # a value and its decimals


def table6() -> pd.DataFrame:
    """The batches of Table 6 with B recomputed by Eq. 8 from the other columns, without the mask."""
    rows = []
    for group, part in paper_tables.read("mce-table6").groupby("group", sort=False):
        wide = part.pivot(index="column", columns="row", values="value").loc[part["column"].unique()]
        n = torch.tensor(wide["number"].tolist()).long()
        present = torch.arange(128)[:, None] < n  # as many samples with each modality as the batch had
        upper, phi = torch.tensor(wide["U"].tolist()), torch.tensor(wide["phi"].tolist())
        ours = learning_state_factor(upper, phi, present, mask=False)
        for name, row, b in zip(wide.index, wide.to_dict("records"), ours.tolist(), strict=True):
            agrees = abs(b - row["B"]) < 1.5e-4
            rows.append({"batch": group, "modality": name, **row, "B of Eq. 8": b, "agrees": agrees})
    return pd.DataFrame(rows)[["batch", "modality", "number", "U", "phi", "B", "B of Eq. 8", "agrees"]]


def intervals() -> pd.DataFrame:
    """Of each row of Table 2 on IEMOCAP: half-width over standard deviation, t(n - 1) / sqrt(n), and the n that fit."""
    from scipy import stats

    cells = paper_tables.read("mce-table2")
    rows = []
    for _, cell in cells[cells["column"] == ACCURACY].iterrows():
        half, sd = (cell["high"] - cell["low"]) / 2, cell["plus_minus"]
        low, high = (half - 0.005) / (sd + 0.005), (half + 0.005) / (sd - 0.005)
        fits = [k for k in range(3, 31) if low <= stats.t.ppf(0.975, k - 1) / np.sqrt(k) <= high]
        rows.append(
            {
                "row": cell["row"],
                "half-width": half,
                "standard deviation": sd,
                "ratio": half / sd,
                "runs": " or ".join(map(str, fits)) or "none",
                "centred": abs((cell["high"] + cell["low"]) / 2 - cell["value"]) < 0.0101,
            }
        )
    return pd.DataFrame(rows)


def audit() -> pd.DataFrame:
    """Every check: paper, item, printed, recomputed, severity, note."""
    rows = [*_table2(), *_across(), *_tables3_to_5(), *_table6(), *_table7(), *_table8()]
    return pd.DataFrame(rows).assign(paper="MCE")[["paper", "item", "printed", "recomputed", "severity", "note"]]


def _check(item: str, printed: str, recomputed: str, agrees: bool, severity: str = "minor", note: str = "") -> Any:
    """A row; ``severity`` and ``note`` are of what does not agree."""
    return {
        "item": item,
        "printed": printed,
        "recomputed": recomputed,
        "severity": "none" if agrees else severity,
        "note": "" if agrees else note,
    }


def _value(item: str, printed: Printed, f: Callable[..., float], *inputs: Printed, **options: str) -> Any:
    """A number that follows from others by ``f``, all of them as printed."""
    ends = [(v - 0.5 * 10.0**-d, v + 0.5 * 10.0**-d) for v, d in inputs]
    values = [f(*corner) for corner in itertools.product(*ends)]
    value, decimals = printed
    half = 0.5 * 10.0**-decimals
    agrees = min(values) <= value + half and max(values) >= value - half
    exact = f(*(v for v, _ in inputs))
    return _check(item, f"{value:.{decimals}f}", f"{exact:.{decimals + 1}f}", agrees, **options)


def _minus(a: float, b: float) -> float:
    return a - b


def _fall(a: float, b: float) -> float:
    return 100 * (1 - b / a)


def _rise(a: float, b: float) -> float:
    return 100 * (b / a - 1)


def values2() -> pd.DataFrame:
    """The paper's Table 2 as printed, rows by columns."""
    return paper_tables.read("mce-table2").pivot(index="row", columns="column", values="value")


def marks() -> pd.Series:
    """The parts that each row of Table 2 has, as printed."""
    values = values2()
    return pd.Series({row: " ".join(p for p in PARTS if values.loc[row, p]) or "-" for row in values.index})


def _table2() -> list[Any]:
    found, values = intervals(), values2()
    v = lambda row, column: (float(values.loc[row, column]), 2)
    by_runs = {n: "".join(found.loc[found["runs"] == n, "row"]) for n in ("9", "10")}
    both = marks()
    wrong = {"severity": "major", "note": "the number quoted belongs to another row"}
    return [
        _check(
            "Table 2: runs behind the intervals",
            "one number",
            f"9 for {by_runs['9']}, 10 for {by_runs['10']}",
            found["runs"].nunique() == 1,
            note="rows are compared over unequal numbers of runs",
        ),
        _value("sec. 4.3: h - best pair (e), IoU", (2.39, 2), _minus, v("h", IOU), v("e", IOU), **wrong),
        _value("sec. 4.3: h - c instead, IoU", (2.39, 2), _minus, v("h", IOU), v("c", IOU)),
        _value("sec. 4.3: h - best pair (e), accuracy", (0.86, 2), _minus, v("h", ACCURACY), v("e", ACCURACY), **wrong),
        _value("sec. 4.3: h - c instead, accuracy", (0.86, 2), _minus, v("h", ACCURACY), v("c", ACCURACY)),
        _value("sec. 4.3: k - m, IoU", (-3.52, 2), _minus, v("k", IOU), v("m", IOU)),
        _value("sec. 4.3: k - m, accuracy", (-5.47, 2), _minus, v("k", ACCURACY), v("m", ACCURACY), **wrong),
        _value("sec. 4.3: l - m instead, accuracy", (-5.47, 2), _minus, v("l", ACCURACY), v("m", ACCURACY)),
        _check(
            "Table 2: marks of rows j and m differ",
            "yes",
            f"both {both['j']}",
            both["j"] != both["m"],
            note="the prose says that row j is B without A",
        ),
    ]


def _across() -> list[Any]:
    """The same quantity in several tables."""
    values, five = values2(), paper_tables.read("mce-table5").set_index(["row", "column"])["value"]
    eight = paper_tables.read("mce-table8").pivot(index="row", columns="column", values="value")["Accuracy"]
    three = paper_tables.read("mce-table3").set_index(["row", "column"])["value"]
    plain = (float(values.loc["a", ACCURACY]), five["baseline", "a"], eight["Baseline"])
    whole = (float(values.loc["m", ACCURACY]), five["MCE", "a"], eight["MCE (Exact SV)"])
    words = lambda numbers: " / ".join(f"{x:.2f}" for x in numbers)
    names = "Tables 2, 5, 8: IEMOCAP"
    return [
        _check(
            f"{names} baseline, rates a",
            "one number",
            words(plain),
            len(set(plain)) == 1,
            "major",
            "three baselines, so three sizes of the improvement",
        ),
        _check(f"{names} MCE, rates a", "one number", words(whole), len(set(whole)) == 1),
        _check(
            "Tables 2, 3: nuScenes MCE, rates a",
            f"{values.loc['m', IOU]:.2f}",
            f"{three['MCE', 'a']:.2f}",
            three["MCE", "a"] == values.loc["m", IOU],
        ),
    ]


def _tables3_to_5() -> list[Any]:
    four = [part for _, part in paper_tables.read("mce-table4").groupby("group")]
    frames = [paper_tables.read("mce-table3"), *four, paper_tables.read("mce-table5")]
    wide = lambda frame, what: frame.pivot(index="row", columns="column", values=what)
    best = sum(int((wide(f, "value").idxmax() == "MCE").sum()) for f in frames)
    steady = [int((wide(f, "plus_minus").idxmin() == "MCE").sum()) for f in frames[1:]]
    columns = sum(f["column"].nunique() for f in frames)
    return [
        _check("Tables 3-5: MCE is best", "nearly all", f"{best} of {columns} columns", True),
        _check(
            "sec. 4.4: MCE varies least between runs",
            "yes",
            f"Table 4: {sum(steady[:3])} of 18, Table 5: {steady[3]} of 6 columns",
            False,
            "major",
            "the claim of the smallest spread does not hold",
        ),
    ]


def _table6() -> list[Any]:
    table = table6()
    agree = int(table["agrees"].sum())
    rows = [_check("Table 6: B = (U - phi) / number", f"{len(table)} values", f"{agree} agree", agree == len(table))]
    for name, part in table.groupby("batch", sort=False):
        if "IEMOCAP" in name:
            total = part["phi"].sum()
            rows.append(
                _check(
                    f"Table 6, {name}: sum of phi is whole",
                    "Eq. 5",
                    f"{total:.3f}",
                    abs(total - round(total)) < 2e-3,
                    "major",
                    "not values of Eq. 5; the released formula gives such thirds",
                )
            )
    bounds = table[table["batch"].str.contains("BraTS")].pivot(index="modality", columns="batch", values="U")
    same = bool(bounds.nunique(axis=1).eq(1).all())
    note = "the bounds are then of the data set, not of the batch"
    rows.append(
        _check(
            "Table 6, BraTS: U belongs to the batch",
            "Eq. 6",
            "the same values in both batches" if same else "differ",
            not same,
            note=note,
        )
    )
    return rows


def table7() -> pd.DataFrame:
    """The paper's Table 7 with short names."""
    frame = paper_tables.read("mce-table7").pivot(index="row", columns="column", values="value")
    frame.columns = ["consistency", "between", "ratio", "within"]
    return frame.rename_axis(None)[["within", "between", "ratio", "consistency"]]


def _table7() -> list[Any]:
    seven = table7()
    of = lambda column: [(seven.loc[row, column], 2) for row in ("Baseline", "MCE")]
    rows = [
        _value(f"Table 7: within / between, {row}", (seven.loc[row, "ratio"], 2), lambda a, b: a / b, within, between)
        for row, within, between in zip(("Baseline", "MCE"), of("within"), of("between"), strict=True)
    ]
    rows += [
        _value("sec. 4.5: distance within falls by, %", (69.0, 1), _fall, *of("within")),
        _value("sec. 4.5: ratio improves by, %", (32.0, 1), _fall, *of("ratio")),
        _value("sec. 4.5: consistency rises by, %", (14.1, 1), _rise, *of("consistency")),
    ]
    drop = _fall(seven.loc["Baseline", "between"], seven.loc["MCE", "between"])
    note = "the features shrink; only their ratio and the cosine compare two networks"
    rows.append(_check("sec. 4.5: distance between falls", "slightly", f"by {drop:.1f} %", drop < 10, "major", note))
    rows.append(_value("sec. 4.5: .38 to .66 is a rise by, %", (72.9, 1), _rise, (0.38, 2), (0.66, 2)))
    return rows


def _table8() -> list[Any]:
    eight = paper_tables.read("mce-table8").pivot(index="row", columns="column", values="value")["Time (ms)"]
    exact, drawn = eight["MCE (Exact SV)"] / eight["Baseline"], eight["MCE (MC-200 SV)"] / eight["Baseline"]
    return [
        _check("sec. 5, Table 8: exact values multiply time by", "about 12", f"{exact:.2f}", abs(exact - 12) < 1),
        _check("sec. 5, Table 8: sampled orders a sample", "K = 100", "MC-200", False, note="text against table"),
        _check(
            "Table 8: sampling saves subsets at M = 3",
            f"{drawn:.1f} < {exact:.1f}",
            "at most 7 either way, equal FLOPs",
            False,
            "major",
            "the times differ by how the values were computed, not by how many subsets were evaluated",
        ),
        _check(
            "sec. 4.1: IEMOCAP validation, test samples",
            "3,899, 3,696",
            "utterances: 557, 528, each 7 times",
            False,
            note="every subset of an utterance counts as a sample",
        ),
    ]
