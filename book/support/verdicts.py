"""What a comparison of two methods says, computed: supported, opposite, equivalent or undecided.

    pairs = [stored.pair(f"MCE - {m}", ("MCE",), (m,)) for m in others]   # book.support.stored; or `compare` on arrays
    table = verdicts.judge(pairs)        # one table of the page = one family of claims: Holm within it
    forest.plot(table, alt="...")        # and below it
    verdicts.table(table, "MCE minus ...")

Intervals are those of `mmlib.statistics.paired_interval`, for new seeds and new test samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from book.support import tables
from mmlib import statistics
from mmlib.metrics import Interval

__all__ = ["ALPHA", "FEW", "WORDS", "Comparison", "compare", "effect", "judge", "said", "sentence", "table", "tally"]

ALPHA = 0.05  # of a table, by Holm
FEW = 5  # below so many seeds a verdict is exploratory
WORDS = ("supported", "opposite", "equivalent", "undecided", "not run")
NOTHING = Interval(math.nan, math.nan, math.nan, 0)
CLAIMS = ("better", "equal", "")


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same seeds and samples: ``ours``, ``theirs`` [seeds, samples] or [seeds]; None: not run."""

    label: str
    ours: np.ndarray | None
    theirs: np.ndarray | None
    metric: str = "accuracy"
    lower: bool = False  # whether less is better
    percent: bool = True  # effects are shown in points, 100 times the values
    band: float = 0.01  # within it two methods are equivalent; in the unit of the values
    claim: str = "better"  # "better": ours is; "equal": no difference; "": none, the words are then better and worse
    paper: float | None = None  # the paper's difference, in points (per cent) or in the unit of the values
    group: str = ""  # comparisons of one group are drawn in one panel


def compare(label: str, ours: Any, theirs: Any = 0.0, **options: Any) -> Comparison:
    """A `Comparison` of arrays [seeds, samples] or [seeds]; a number for ``theirs`` is compared with as a constant.

    options : the other fields of `Comparison`. Its band, if not given, is a point, or .02 of "mae"
    """
    if options.get("claim", "better") not in CLAIMS:
        raise ValueError(f"claim: expected one of {CLAIMS}, got {options['claim']!r}")
    if ours is None or theirs is None:
        return Comparison(label, None, None, **_defaults(options))
    one = np.asarray(ours, float)
    two = np.asarray(theirs, float)
    return Comparison(label, one, np.broadcast_to(two, one.shape) if two.ndim == 0 else two, **_defaults(options))


def _defaults(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("metric") == "mae":
        return {"band": 0.02, "lower": True, "percent": False, **options}
    return {"percent": options.get("metric") != "corr", **options}


def judge(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """The comparisons of one table, judged together: Holm's correction holds for all of them.

    Columns: label, group, metric, effect (ours - theirs), low, high (95 %), p (Holm), seeds, samples, detectable (the
    smallest difference that the design finds four times in five), verdict, exploratory, and for the drawing band,
    lower, percent, paper. Effects are in points where ``percent``. In this order a verdict is

    not run     : there is nothing, or not for the same seeds
    equivalent  : two one-sided tests say that the difference lies within the band
    supported   : the p-value is below `ALPHA` and the sign is the claim's (claim "equal": equivalent is supported)
    opposite    : so, and the sign is the other
    undecided   : all else, one seed too
    """
    pairs = list(comparisons)
    raw = [math.nan if c.ours is None else statistics.p_value(c.ours, c.theirs) for c in pairs]
    adjusted = statistics.holm(np.array(raw, float))
    return pd.DataFrame([_judged(c, p) for c, p in zip(pairs, adjusted, strict=True)])


def _judged(c: Comparison, p: float) -> dict[str, Any]:
    found, detectable, same = NOTHING, math.nan, False
    if c.ours is not None:
        found = statistics.paired_interval(c.ours, c.theirs)
        detectable = statistics.detectable(c.ours, c.theirs)
        same = found.n > 1 and statistics.equivalent(c.ours, c.theirs, c.band)
    scale = 100 if c.percent else 1
    return {
        "label": c.label,
        "group": c.group,
        "metric": c.metric,
        "effect": scale * found.mean,
        "low": scale * found.low,
        "high": scale * found.high,
        "p": float(p),
        "seeds": found.n,
        "samples": found.samples,
        "detectable": scale * detectable,
        "verdict": _word(c, found, p, same),
        "exploratory": 0 < found.n < FEW,
        "band": scale * c.band,
        "lower": c.lower,
        "percent": c.percent,
        "paper": math.nan if c.paper is None else c.paper,
    }


def _word(c: Comparison, found: Interval, p: float, same: bool) -> str:
    if not found.n:
        return "not run"
    if same:
        return "supported" if c.claim == "equal" else "equivalent"
    if not p < ALPHA:
        return "undecided"
    if c.claim == "equal":
        return "opposite"
    better = (found.mean < 0) == c.lower
    words = ("supported", "opposite") if c.claim else ("better", "worse")
    return words[0] if better else words[1]


def said(row: Any) -> str:
    """The verdict of a row of `judge` as the page says it, with "exploratory" below five seeds."""
    return row["verdict"] + (" (exploratory)" if row["exploratory"] else "")


def sentence(row: Any) -> str:
    """The effect of a row of `judge` in words: "+2.3 points [1.0, 3.6], 10 seeds: supported"."""
    if row["verdict"] == "not run":
        return "not run"
    seeds = f"{row['seeds']} seed" + ("s" if row["seeds"] != 1 else "")
    return f"{effect(row)}, {seeds}: {said(row)}"


def effect(row: Any, unit: bool = True) -> str:
    """The effect of a row of `judge` with its interval, such as "+2.3 points [+1.0, +3.6]"."""
    number = (lambda x: f"{x:+.1f}") if row["percent"] else (lambda x: f"{x:+.3f}")
    what = (" points" if row["percent"] else f" {row['metric']}") if unit else ""
    ends = "" if math.isnan(row["low"]) else f" [{number(row['low'])}, {number(row['high'])}]"
    return (number(row["effect"]) + what + ends).replace("-", "\u2212")


def tally(judged: pd.DataFrame) -> str:
    """How often each verdict, such as "7 of 12 supported, 1 opposite, 4 undecided"."""
    counts = judged["verdict"].value_counts()
    order = [w for w in (*WORDS, "better", "worse") if w in counts]
    parts = [f"{counts[w]} of {len(judged)} {w}" if i == 0 else f"{counts[w]} {w}" for i, w in enumerate(order)]
    return ", ".join(parts)


def table(
    judged: pd.DataFrame, caption: str, note: str = "", fold: bool = False, source: str = "stored"
) -> tables.Table:
    """The numbers of `judge` as a rendered table: effect, interval, seeds, the smallest detectable effect, verdict."""
    ran = judged[judged["verdict"] != "not run"]
    left_out = [
        r["label"] if not r["group"] else f"{r['group']}: {r['label']}"
        for _, r in judged.iterrows()
        if r["verdict"] == "not run"
    ]
    shown = pd.DataFrame(
        {
            "": [r["label"] for _, r in ran.iterrows()],
            **({"on": list(ran["group"])} if ran["group"].any() else {}),
            **({"metric": list(ran["metric"])} if ran["metric"].nunique() > 1 else {}),
            "difference [95 %]": [effect(r) for _, r in ran.iterrows()],
            **(
                {"paper": [None if math.isnan(x) else float(x) for x in ran["paper"]]}
                if ran["paper"].notna().any()
                else {}
            ),
            "p (Holm)": ["–" if math.isnan(p) else "< .001" if p < 0.001 else f"{p:.3f}" for p in ran["p"]],
            "seeds": list(ran["seeds"]),
            "detectable": [_size(r) for _, r in ran.iterrows()],
            "verdict": [said(r) for _, r in ran.iterrows()],
        }
    )
    words = [note, f"Not run: {', '.join(left_out)}." if left_out else ""]
    return tables.show(
        shown, caption, source=source, formats="+.2f", index=False, note=" ".join(filter(None, words)), fold=fold
    )


def _size(row: Any) -> str:
    return (
        "–"
        if math.isnan(row["detectable"])
        else f"{row['detectable']:.1f}"
        if row["percent"]
        else f"{row['detectable']:.3f}"
    )
