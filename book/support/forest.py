"""Comparisons as a picture: effect and interval on a line, the band of equivalence, the verdict in colour and shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from book.support import vector, verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LOOKS", "plot"]

# Verdict -> colour, marker, filled. The colours read on white and on black, the shapes without any colour.
LOOKS: dict[str, tuple[str, str, bool]] = {
    "supported": ("#2a8f5c", "o", True),
    "better": ("#2a8f5c", "o", True),
    "opposite": ("#d0483e", "X", True),
    "worse": ("#d0483e", "X", True),
    "equivalent": ("#3f7fd6", "s", True),
    "undecided": ("#8a8a8a", "o", False),
}
PAPER = "#c07f12"
ROW, WIDTH = 0.3, 7.6  # inches


def plot(judged: pd.DataFrame, alt: str, *, unit: str = "", better: str = "", columns: int = 1) -> vector.Picture:
    """A forest plot of what `verdicts.judge` gives: a panel a group (or metric), a line a comparison.

    alt : what it shows, in words
    unit : of the axis, default "points" or the metric's name
    better : who is better to the right, such as "MCE better"; an axis where less is better is turned round
    columns : how many panels stand beside each other; they then share the labels of the lines, which must be the same

    A line is labelled with its effect and interval in figures. A diamond is the paper's difference. What was not run
    has its label and the words "not run".
    """
    import matplotlib.pyplot as plt

    by = "group" if judged["group"].any() else "metric"
    panels = [(name, part.reset_index(drop=True)) for name, part in judged.groupby(by, sort=False)]
    rows = math.ceil(len(panels) / columns)
    if columns > 1 and len({tuple(part["label"]) for _, part in panels}) > 1:
        raise ValueError("columns: panels beside each other need the same labels in the same order")
    most = [max(len(part) for _, part in panels[i : i + columns]) for i in range(0, len(panels), columns)]
    heights = [ROW * n + 0.6 for n in most]
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, sum(heights) + 0.5), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for place, ax in enumerate(axes.flat):
        if place >= len(panels):
            ax.axis("off")
            continue
        name, part = panels[place]
        _panel(ax, part, labels=place % columns == 0, figures=columns == 1)
        title = str(name) if len(panels) > 1 or by == "group" else ""
        ax.set_title(title, fontsize=11, loc="left", weight="bold")
        label = _axis_label(part, unit, better)
        below = panels[place + 1][1] if place + 1 < len(panels) else None
        if columns == 1 and (below is None or _axis_label(below, unit, better) != label):
            ax.set_xlabel(label, fontsize=10)
    _key(figure, judged, label if columns > 1 else "")  # beside each other the labels would run together
    return vector.svg(figure, alt, text=_text(judged))


def _axis_label(part: pd.DataFrame, unit: str, better: str) -> str:
    first = part.iloc[0]
    unit = unit or ("points" if first["percent"] else str(first["metric"]))
    return f"difference in {unit}" + (f"; to the right: {better}" if better else "")


def _panel(ax: Axes, part: pd.DataFrame, labels: bool, figures: bool) -> None:
    n = len(part)
    band = float(part["band"].max())
    ax.axvspan(-band, band, color="#3f7fd6", alpha=0.14, lw=0)
    ax.axvline(0, color="#555555", lw=1)
    for y, (_, row) in enumerate(part.iterrows()):
        _line(ax, y, row, figures)
    ax.set_ylim(n - 0.4, -0.6)
    ax.set_yticks(range(n), list(part["label"]) if labels else [""] * n, fontsize=10)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=10)
    ax.spines[["top", "right", "left"]].set_visible(False)
    low, high = _limits(part)
    ax.set_xlim(*((high, low) if bool(part["lower"].iloc[0]) else (low, high)))


def _limits(part: pd.DataFrame) -> tuple[float, float]:
    band = float(part["band"].max())
    ends = np.concatenate([part[c].to_numpy(float) for c in ("effect", "low", "high", "paper")])
    ends = np.concatenate([ends[np.isfinite(ends)], [-1.3 * band, 1.3 * band]])
    room = 0.04 * (ends.max() - ends.min())
    return float(ends.min() - room), float(ends.max() + room)


def _line(ax: Axes, y: int, row: Any, figures: bool) -> None:
    beside: dict[str, Any] = {
        "xycoords": ax.get_yaxis_transform(),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": 10,
    }
    if row["verdict"] == "not run":
        ax.annotate("not run", (1, y), (8, 0), color="#555555", **beside)
    else:
        colour, marker, filled = LOOKS[row["verdict"]]
        if math.isfinite(row["low"]):
            style = (0, (2, 1.5)) if row["exploratory"] else "-"
            ax.plot([row["low"], row["high"]], [y, y], color=colour, lw=2, ls=style, solid_capstyle="butt")
        face = colour if filled else "none"
        ax.plot(row["effect"], y, marker, color=colour, mfc=face, mew=1.6, ms=7.5 if marker != "s" else 7)
        if figures:
            ax.annotate(
                f"{verdicts.effect(row, unit=False)}  {row['verdict']}", (1, y), (8, 0), color="#2b2b2b", **beside
            )
    if math.isfinite(row["paper"]):
        ax.plot(row["paper"], y, "D", color=PAPER, mfc="none", mew=1.6, ms=6)


def _key(figure: Any, judged: pd.DataFrame, title: str) -> None:
    """What the shapes mean, of those that occur, in one line below; above it the axes' common label."""
    from matplotlib.lines import Line2D

    handles = []
    for word, (colour, marker, filled) in LOOKS.items():
        if (judged["verdict"] == word).any():
            handles.append(
                Line2D([], [], color=colour, marker=marker, mfc=colour if filled else "none", mew=1.6, lw=2, label=word)
            )
    if judged["exploratory"].any():
        handles.append(Line2D([], [], color="#555555", ls=(0, (2, 1.5)), lw=2, label="exploratory (few seeds)"))
    if judged["paper"].notna().any():
        handles.append(Line2D([], [], color=PAPER, marker="D", mfc="none", mew=1.6, lw=0, label="paper"))
    handles.append(Line2D([], [], color="#3f7fd6", alpha=0.3, lw=8, label="band of equivalence"))
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=min(len(handles), 4),
        fontsize=10,
        frameon=False,
        title=title or None,
        title_fontsize=10,
        alignment="left",
    )


def _text(judged: pd.DataFrame) -> str:
    lines = [f"{r['group'] or r['metric']} | {r['label']} | {verdicts.sentence(r)}" for _, r in judged.iterrows()]
    return "\n".join(lines)
