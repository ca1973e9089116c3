"""The schematics of the chapter on DREAM: its wiring (Figure 2), one sample's coalitions (Figure 1), and the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from book.support import figures
from mmlib import coalitions
from mmlib.methods.dream import mask_weights
from mmlib.methods.released.dream import add_log_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXAMPLES", "coalition_card", "detection", "frames", "losses", "mask_curves", "overview"]

# Three samples with three modalities: what is predicted from {}, {0}, {1}, {0,1}, {2}, {0,2}, {1,2}, {0,1,2}
EXAMPLES = {
    "one modality decides": (0, 1, 0, 1, 0, 1, 0, 1),
    "so does the third, alone": (0, 1, 0, 1, 1, 1, 0, 1),
    "nothing matters": (1, 1, 1, 1, 1, 1, 1, 1),
}


def overview() -> Figure:
    """How DREAM is wired: the frozen evaluator's scores above, enhancement and fusion below."""
    fig, ax = figures.figure("page")
    fig.set_figheight(4.1)
    nodes = {
        "subsets": (2.1, 4, "every subset\n$2^M$ inputs"),
        "evaluator": (4.3, 4, "evaluator\ntrained, frozen"),
        "pss": (6.5, 4, "PSS\nwho shifts $\\hat y$?"),
        "pas": (8.7, 4, "PAS, in training\nwho is right?"),
        "input": (0, 2, "batch $x_m$\nzeros if missing"),
        "project": (2.1, 2, "Conv1d\n+ positions"),
        "enhance": (4.3, 2, "enhancement\nwhere PSS = 0"),
        "fuse": (6.5, 2, "cross attention\n$h_m$, weights $w$"),
        "mask": (8.7, 2, "softmax of\n$w\\,(PSS+1)$"),
        "out": (10.9, 2, "$H=\\sum$ w′$_m\\,h_m$\nprediction"),
        "kl": (8.7, 0.2, "$\\lambda$ KL($w$, PAS)\nin training"),
    }
    colours = dict.fromkeys(("subsets", "evaluator", "pss", "pas"), figures.GREEN)
    colours |= dict.fromkeys(("enhance", "fuse", "mask", "kl"), figures.BLUE)
    arrows = [
        ("input", "project"), ("project", "enhance"), ("enhance", "fuse"), ("fuse", "mask"), ("mask", "out"),
        ("subsets", "evaluator"), ("evaluator", "pss"),
    ]  # fmt: skip
    figures.boxes(nodes, arrows, ax=ax, colours=colours, width=1.88, height=0.92)
    bent = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.2, "shrinkA": 2, "shrinkB": 2}
    for start, end, shade, bend in (
        ((0, 2.46), (1.16, 4), figures.GREEN, -0.25),
        ((6.2, 3.54), (4.5, 2.46), figures.GREEN, 0.0),
        ((6.9, 3.54), (8.4, 2.46), figures.GREEN, 0.0),
        ((4.8, 4.46), (8.3, 4.46), figures.GREEN, -0.2),
        ((9.64, 3.9), (9.64, 0.3), figures.GREEN, -0.14),
        ((6.6, 1.54), (7.76, 0.2), "#555555", 0.3),
    ):
        ax.annotate("", end, start, arrowprops={**bent, "color": shade, "connectionstyle": f"arc3,rad={bend}"})
    ax.text(-0.95, 5.0, "what does each modality change?", color=figures.GREEN, fontsize=10, weight="bold")
    ax.text(-0.95, 0.9, "rebuild what changes nothing, trust the rest", color=figures.BLUE, fontsize=10, weight="bold")
    ax.set(xlim=(-1.1, 12), ylim=(-0.4, 5.5), title="DREAM asks a frozen model before it fuses")
    return fig


def coalition_card(
    names: Sequence[str],
    predictions: Sequence[str],
    pss: Sequence[float],
    pas: Sequence[float],
    true: str,
    title: str = "",
) -> Figure:
    """What is predicted from every subset of the modalities, in the order of `coalitions.coalition_masks`; the scores.

    predictions : one word for each of the 2^M subsets; true : the right one, drawn in green
    """
    from matplotlib.patches import Circle

    M = len(names)
    masks = coalitions.coalition_masks(M)
    order = sorted(range(len(masks)), key=lambda k: (int(masks[k].sum()), k))
    fig, axes = figures.figure("page", columns=2, width_ratios=[1, 1.3])
    fig.set_figheight(0.9 + 0.29 * len(order))
    ax = axes[0]
    for place, k in enumerate(order):
        for m, name in enumerate(names):
            on = bool(masks[k, m])
            face = figures.colour(name) if on else "white"
            ax.add_patch(Circle((m, -place), 0.28, facecolor=face, edgecolor=figures.colour(name)))
        shade = figures.GREEN if predictions[k] == true else figures.INK
        ax.text(M + 1, -place, predictions[k], ha="center", va="center", color=shade, weight="bold")
    for m, name in enumerate(names):
        ax.text(m, 0.7, name, ha="center", va="bottom", fontsize=10, rotation=90)
    ax.text(M + 1, 0.7, "prediction", ha="center", va="bottom", fontsize=10)
    ax.set(xlim=(-0.6, M + 2.2), ylim=(0.4 - len(order), 3.4))
    ax.set_aspect("equal")
    ax.axis("off")
    ax = axes[1]
    for shift, values, hatch, label in ((-0.2, pss, "", "PSS"), (0.2, pas, "//", "PAS")):
        bars = ax.bar(
            np.arange(M) + shift, values, 0.38, color=[figures.colour(m) for m in names], hatch=hatch, edgecolor="white"
        )
        for bar, value in zip(bars, values, strict=True):
            up = value >= 0
            ax.text(bar.get_x() + 0.19, value, f"{label}\n{value:.2f}", ha="center", va="bottom" if up else "top",
                    fontsize=10)  # fmt: skip
    both = [*pss, *pas]
    ax.set_xticks(range(M), list(names))
    ax.set(title=title, ylabel="score", ylim=(min(0, *both) - 0.35 * (min(both) < 0), max(1, *both) * 1.3))
    ax.axhline(0, color="#555555", lw=0.8)
    return fig


def mask_curves() -> Figure:
    """The weight of one of three modalities against its PSS, for w = 1 and -1, with both masks; others w = PSS = 0."""
    fig, axes = figures.figure("wide", columns=2, sharey=True)
    pss = torch.linspace(0, 1, 41)
    for ax, mask, name in zip(
        axes, (mask_weights, add_log_weights), ("w (PSS + 1), Eq. 10", "w + log(PSS + 1)"), strict=True
    ):
        for w, shade, style in ((1.0, figures.BLUE, "-"), (-1.0, figures.AMBER, "--")):
            row = torch.tensor([w, 0.0, 0.0]).expand(len(pss), 3)
            scores = torch.stack([pss, torch.zeros(41), torch.zeros(41)], 1)
            weight = torch.softmax(mask(row, scores), -1)[:, 0]
            ax.plot(pss, weight, style, color=shade)
            _name_line(ax, 1.0, float(weight[-1]), f"w = {w:+g}", shade)
        ax.set(title=name, xlabel="PSS of the modality", ylim=(0, 0.85))
        ax.grid(True)
    axes[0].set_ylabel("its fusion weight w'")
    return fig


def losses(history: Any, watch: str) -> Figure:
    """Both losses of a training and what was watched on validation data, by epoch, each line with its name."""
    fig, axes = figures.figure("wide", columns=2)
    epochs = [e["epoch"] for e in history.epochs]
    for key, shade, style in (("train_task", figures.BLUE, "o-"), ("train_distillation", figures.AMBER, "s--")):
        if key in history.epochs[0]:
            values = [e[key] for e in history.epochs]
            axes[0].plot(epochs, values, style, color=shade, ms=4)
            _name_line(axes[0], epochs[-1], values[-1], key.removeprefix("train_"), shade)
    axes[1].plot(epochs, [e[watch] for e in history.epochs], "o-", color=figures.BLUE, ms=4)
    what = watch.removeprefix("valid_").replace("mae", "mean absolute error")
    axes[0].set(title="losses", xlabel="epoch", ylabel="loss")
    axes[1].set(title="validation", xlabel="epoch", ylabel=what)
    for ax in axes:
        ax.grid(True)
    return fig


def _name_line(ax: Any, x: float, y: float, name: str, shade: str) -> None:
    """The name of a line at its end."""
    ax.annotate(name, (x, y), (6, 0), textcoords="offset points", va="center", color=shade, fontsize=10)


def _apart(values: Sequence[float], least: float) -> np.ndarray:
    """Places for labels near ``values``, at least ``least`` from each other."""
    order, places = np.argsort(values), np.array(values, float)
    for lower, upper in zip(order[:-1], order[1:], strict=True):
        places[upper] = max(places[upper], places[lower] + least)
    return places


def detection(precision: Any, q: Mapping[str, float]) -> Figure:
    """Left the precision of PSS = 0 over the missing rate, a line a data set (frame: data sets x rates, NaN: not run);
    right the fraction q of each modality of the known world."""
    fig, axes = figures.figure("wide", columns=2, width_ratios=[1.35, 1])
    fig.set_figheight(3.4)
    rates = [float(str(c).split()[0]) for c in precision.columns]
    shades = dict(zip(precision.index, figures.PALETTE, strict=False))
    ends = precision.iloc[:, -1].to_numpy(float)
    for (name, line), place in zip(precision.iterrows(), _apart(ends, 0.065), strict=True):
        axes[0].plot(rates, line.to_numpy(float), "o-", color=shades[name], ms=4)
        _name_line(axes[0], rates[-1], place, str(name), shades[name])
    axes[0].plot(rates, rates, ":", color=figures.INK)
    axes[0].annotate("saying always “missing”", (0.32, 0.24), color=figures.INK, fontsize=10)
    axes[0].set(title="precision of PSS = 0", xlabel="missing rate", ylim=(0, 1), xlim=(0.05, 0.75), xticks=rates)
    axes[0].grid(True)
    places = range(len(q))
    axes[1].barh(places, list(q.values()), color=(figures.BLUE, figures.AMBER, figures.PURPLE, figures.GREY)[: len(q)])
    for k, value in enumerate(q.values()):
        label = "not run" if np.isnan(value) else f"{value:.2f}"
        axes[1].text(0.01 if np.isnan(value) else value + 0.01, k, label, va="center", fontsize=10)
    axes[1].set_yticks(places, list(q), fontsize=10)
    axes[1].set(title="present, yet PSS = 0", xlabel="fraction q", xlim=(0, 0.8), ylim=(len(q) - 0.5, -0.5))
    return fig


def frames(panels: Mapping[str, Any], rates: Sequence[float]) -> Figure:
    """A score over the fraction of missing frames, a panel a data set: frames of means, methods x rates."""
    fig, axes = figures.figure("wide", columns=len(panels))
    fig.set_figheight(3.2)
    shades = {"CubeMLP": figures.GREY, "evaluator alone": figures.AMBER, "DREAM": figures.BLUE}
    for ax, (title, frame) in zip(axes, panels.items(), strict=True):
        known = frame.loc[np.isfinite(frame.to_numpy(float)).all(1)]
        spread = float(np.ptp(known.to_numpy())) if len(known) else 1.0
        places = _apart(known.iloc[:, -1].to_numpy(float), 0.08 * spread)
        for (name, line), place in zip(known.iterrows(), places, strict=True):
            ax.plot(rates, line.to_numpy(float), "o-", color=shades[str(name)], ms=4)
            _name_line(ax, rates[-1], place, str(name), shades[str(name)])
        if not len(known):
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center")
        ax.set(title=title, xlabel="fraction of frames missing", xticks=list(rates))
        ax.grid(True)
    return fig
