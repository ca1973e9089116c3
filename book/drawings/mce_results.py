"""The plots of the two pages on MCE: what a training shows, and the paper's figures from stored runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from book.support import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["capability", "copies", "cycle", "factors", "fractions", "growth", "losses", "pairs"]
__all__ += ["probes", "relative_losses", "seeds", "weights"]

# One look a method, on every figure of the two pages
SHADES = {
    "baseline": figures.INK,
    "joint training": figures.INK,
    "modality dropout": figures.GREEN,
    "MBT-Sample": figures.BROWN,
    "PMR": figures.PURPLE,
    "MCE without B": figures.AMBER,
    "MCE": figures.BLUE,
    "image only": figures.GREY,
    "alone, complete data": figures.GREY,
}
DASHES: dict[str, Any] = {"baseline": ":", "joint training": ":", "MCE without B": "--", "modality dropout": "--"}
DASHES |= {"MBT-Sample": "-.", "PMR": (0, (5, 1))}
MODALITY_DASHES = ("-", "--", ":", "-.")


def _at_end(ax: Axes, curves: Mapping[str, Sequence[float]], shades: Mapping[str, str], x: Sequence[float]) -> None:
    """Each curve's name at its right end, moved apart where the ends would overlap."""
    low, high = ax.get_ylim()
    gap = 0.085 * (high - low)
    order = sorted(curves, key=lambda name: curves[name][-1])
    places = [float(curves[name][-1]) for name in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for name, y in zip(order, places, strict=True):
        ax.annotate(name, (x[-1], y), (5, 0), textcoords="offset points", color=shades[name], va="center", fontsize=10,
                    annotation_clip=False)  # fmt: skip


def _epochs(values: Sequence[Any]) -> list[int]:
    return list(range(1, len(values) + 1))


def cycle(table: pd.DataFrame, rates: Mapping[str, float]) -> Figure:
    """What an encoder receives and what it knows, of the table of `Problem.cycle`."""
    fig, axes = figures.figure("wide", columns=2, width_ratios=[1, 1.7])
    names = list(table.index)
    axes[0].bar(range(len(names)), table["gradient"], color=[figures.colour(m) for m in names])
    labels = [f"{m}\n{100 * rates[m]:.0f} %" for m in names]
    axes[0].set_xticks(range(len(names)), labels, fontsize=10)
    axes[0].set(title="What an encoder receives", ylabel="mean gradient norm", xlabel="missing in training")
    pair = {k: table[k].tolist() for k in ("in the joint network", "its own network")}
    shades = dict(zip(pair, (figures.GREY, figures.GREEN), strict=True))
    figures.bars(pair, names, ax=axes[1], title="What it knows", ylabel="accuracy alone (test)", colours=shades)
    axes[1].set_ylim(0, 1.02)
    return fig


def copies(values: Any) -> Figure:
    """The factor B [epochs, M] of copies of one modality, and where it settles."""
    count = values.shape[1]
    fig, ax = figures.figure("normal")
    for m in range(count):
        ax.plot(_epochs(values), values[:, m], color=figures.PALETTE[m], ls=MODALITY_DASHES[m % 4],
                label=f"copy {m + 1}")  # fmt: skip
    level = (count - 1) / count
    ax.axhline(level, color=figures.GREY, ls=":")
    ax.text(1, level - 0.02, "(M - 1)/M", va="top", fontsize=10, color="#555555")
    ax.set(title="Redundancy is not ignorance", xlabel="epoch", ylabel="factor B", ylim=(0, 1.02))
    ax.legend(loc="lower right", ncols=count, fontsize=10)
    ax.grid(axis="y")
    return fig


def losses(histories: Mapping[str, Any]) -> Figure:
    """The terms of MCE's objective over the epochs, and the accuracy on validation of the networks."""
    fig, axes = figures.figure("wide", columns=2)
    fig.set_figheight(3.4)
    epochs = histories["MCE"].epochs
    terms = {term: [e[f"train_{term}"] for e in epochs] for term in ("task", "single", "subset", "completion")}
    shades = dict(zip(terms, (figures.INK, figures.PURPLE, figures.BLUE, figures.PINK), strict=True))
    for (term, curve), dash in zip(terms.items(), MODALITY_DASHES, strict=True):
        axes[0].plot(_epochs(curve), curve, color=shades[term], ls=dash)
    axes[0].set_ylim(bottom=0)
    _at_end(axes[0], terms, shades, _epochs(epochs))
    axes[0].set(title="MCE's losses", xlabel="epoch", ylabel="weighted, mean over the epoch")
    scores = {name: [e["valid_accuracy"] for e in history.epochs] for name, history in histories.items()}
    for name, curve in scores.items():
        axes[1].plot(_epochs(curve), curve, color=SHADES[name], ls=DASHES.get(name, "-"))
    _at_end(axes[1], scores, SHADES, _epochs(epochs))
    axes[1].set(title="Validation", xlabel="epoch", ylabel="accuracy")
    for ax in axes:
        ax.grid(axis="y")
    return fig


def factors(rate: Any, state: Any, names: Sequence[str]) -> Figure:
    """A, B and their product [epochs, M] by epoch."""
    fig, axes = figures.figure("wide", columns=3, sharex=True)
    shades = {m: figures.colour(m) for m in names}
    for ax, title, values in zip(
        axes, ("A (rarity)", "B (gap per sample)", "A B (incentive)"), (rate, state, rate * state), strict=True
    ):
        for m, name in enumerate(names):
            ax.plot(_epochs(values), values[:, m], color=shades[name], ls=MODALITY_DASHES[m % 4])
        ax.set_ylim(bottom=0)
        ax.set(title=title, xlabel="epoch")
        ax.grid(axis="y")
    curves = {name: (rate * state)[:, m].tolist() for m, name in enumerate(names)}
    _at_end(axes[2], curves, shades, _epochs(rate))
    axes[0].set_ylabel("factor")
    return fig


def capability(probes: Mapping[str, Sequence[Any]], ceiling: Mapping[str, float], names: Sequence[str]) -> Figure:
    """Test accuracy of the probes of every epoch, a panel a modality."""
    fig, axes = figures.figure("wide", columns=len(names), sharey=True, squeeze=False)
    fig.set_figheight(3.4)
    for ax, m in zip(axes[0], names, strict=True):
        for name, found in probes.items():
            curve = [p[m]["test"] for p in found]
            ax.plot(_epochs(curve), curve, color=SHADES[name], ls=DASHES.get(name, "-"), label=name)
        ax.axhline(ceiling[m], color=figures.GREY, ls=(0, (1, 1)), label="alone, complete data")
        ax.set(title=m, xlabel="epoch")
        ax.grid(axis="y")
    axes[0, 0].set_ylabel("probe accuracy (test)")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
    return fig


def probes(table: pd.DataFrame) -> Figure:
    """Capability at the end: modalities are rows, networks are columns."""
    fig, ax = figures.figure("normal")
    scores = {k: table[k].tolist() for k in table}
    figures.bars(scores, list(table.index), ax=ax, title="What the encoders are capable of", ylabel="accuracy (test)",
                 colours={k: SHADES[k] for k in scores})  # fmt: skip
    ax.set_ylim(0, 1)
    return fig


def relative_losses(curves: Mapping[tuple[float, ...], Sequence[float]]) -> Figure:
    """Training loss over its first epoch, a curve a triple of weights."""
    fig, ax = figures.figure("normal")
    named = {"(" + ", ".join(f"{w:g}" for w in k) + ")": np.array(v) / v[0] for k, v in curves.items()}
    shades = dict(zip(named, figures.PALETTE, strict=False))
    for (name, curve), dash in zip(named.items(), MODALITY_DASHES, strict=False):
        ax.plot(_epochs(curve), curve, color=shades[name], ls=dash, label=name)
    ax.set(title="Training loss, by weights (single, subset, completion)", xlabel="epoch")
    ax.set_ylabel("relative to the first epoch")
    ax.set_ylim(bottom=0)
    ax.grid(axis="y")
    ax.legend(fontsize=10)
    return fig


def fractions(table: Any, methods: Sequence[str], rates: Sequence[int]) -> Figure:
    """Figure 7: MCE beside each other method, a row a condition, a column a method; bars are 95 % intervals."""
    fig, axes = figures.figure("page", rows=2, columns=len(methods), sharex=True, sharey="row")
    for line, condition in zip(axes, ("image", "image+audio"), strict=True):
        for ax, other in zip(line, methods, strict=True):
            for name, shift in ((other, -1.2), ("MCE", 1.2)):
                found = [table.mean((name, str(rate)), condition) for rate in rates]
                there = [(rate + shift, f) for rate, f in zip(rates, found, strict=True) if f.n]
                if not there:
                    ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", fontsize=10)
                    continue
                x, y = [r for r, _ in there], np.array([[f.mean, f.low, f.high] for _, f in there])
                whiskers = np.nan_to_num([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]])
                ax.errorbar(x, y[:, 0], whiskers, color=SHADES[name], ls=DASHES.get(name, "-"), marker="o", ms=4,
                            elinewidth=1.2)  # fmt: skip
            ax.grid(axis="y")
            if condition == "image":
                ax.set_title(other, color=SHADES[other], fontsize=10.5)
                only = table.mean(("image only", "0"), "image")
                if only.n:
                    ax.axhline(only.mean, color=figures.GREY, ls=(0, (1, 1)))
        line[0].set_ylabel(f"accuracy on\n{condition}")
    fig.supxlabel("sounds in training (%)", fontsize=10)
    fig.suptitle("MCE (blue, solid) beside ...", x=0.01, ha="left", weight="bold", fontsize=11)
    return fig


def seeds(table: Any, methods: Sequence[str], rate: str, condition: str) -> Figure:
    """A dot for the accuracy of every seed, a line a method."""
    fig, ax = figures.figure("normal")
    fig.set_figheight(0.42 * len(methods) + 0.9)
    for place, name in enumerate(methods):
        found = list(table.scores((name, rate), condition).values())
        ax.plot(found, [-place] * len(found), "o", color=SHADES[name], alpha=0.75, ms=7)
        if not found:
            ax.text(0.5, -place, "not run", transform=ax.get_yaxis_transform(), ha="center", va="center", fontsize=10)
    ax.set_yticks([-k for k in range(len(methods))], methods, fontsize=10)
    ax.set(title=f"Each seed, {rate} % of the sounds, {condition}", xlabel="accuracy")
    ax.grid(axis="x")
    return fig


def weights(table: Any, names: Mapping[str, str], grid: Sequence[float]) -> Figure:
    """Figure 4: accuracy over each weight with intervals, a panel a weight."""
    fig, axes = figures.figure("wide", columns=len(names), sharey=True)
    for ax, (option, label), shade in zip(
        axes, names.items(), (figures.PURPLE, figures.BLUE, figures.PINK), strict=True
    ):
        found = [table.mean((option, str(w))) for w in grid]
        there = [(w, f) for w, f in zip(grid, found, strict=True) if f.n]
        if there:
            y = np.array([[f.mean, f.low, f.high] for _, f in there])
            whiskers = np.nan_to_num([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]])
            ax.errorbar([w for w, _ in there], y[:, 0], whiskers, color=shade, marker="o", elinewidth=1.2, capsize=3)
        else:
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", fontsize=10)
        ax.set(xscale="log", xlim=(0.006, 17), title=label, xlabel="weight")
        ax.set_xticks(list(grid), [f"{w:g}" for w in grid], fontsize=10)
        ax.minorticks_off()
        ax.grid(axis="y")
    axes[0].set_ylabel("accuracy, mean of 7 subsets")
    return fig


def pairs(table: Any, names: Mapping[str, str], grid: Sequence[float]) -> tuple[Figure, np.ndarray]:
    """Figure 5: heat maps over pairs of weights, and all their values in per cent."""
    options = list(names)
    chosen = [(options[0], options[1]), (options[0], options[2]), (options[1], options[2])]
    values = [str(w) for w in grid]
    maps = [np.array([[table.mean((a, x, b, y)).mean for y in values] for x in values]) for a, b in chosen]
    every = 100 * np.concatenate([m.ravel() for m in maps])
    ends = {} if np.isnan(every).all() else {"low": float(np.nanmin(every)), "high": float(np.nanmax(every))}
    fig, axes = figures.figure("page", columns=3)
    fig.set_figheight(2.9)
    for ax, (one, two), found in zip(axes, chosen, maps, strict=True):
        figures.heat_map(100 * found, values, values, ax=ax, form=".0f", xlabel=names[two], ylabel=names[one], **ends)
    fig.suptitle("Accuracy in per cent", x=0.01, ha="left", weight="bold", fontsize=11)
    return fig, every


def growth(table: pd.DataFrame) -> Figure:
    """Cost of a step over the number of modalities."""
    fig, ax = figures.figure("normal")
    looks = {"all, free encoders": ("^:", figures.GREY), "all, LSTMs": ("o-", figures.BLUE)}
    looks["7 drawn, LSTMs"] = ("s--", figures.AMBER)
    for column, (style, shade) in looks.items():
        ax.semilogy(table["M"], table[column], style, color=shade, label=column)
    ax.set(title="Cost of a step", xlabel="modalities M", ylabel="operations / baseline", xticks=table["M"])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(axis="y")
    ax.legend(fontsize=10)
    return fig
