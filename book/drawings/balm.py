"""What the pages on BALM look with: their drawings, and a callback that keeps the rebalancing's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from book.support import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PathLength",
    "Watch",
    "autocorrelation",
    "clouds",
    "coefficients",
    "cosine_curves",
    "curve_panel",
    "grids",
    "kl_curves",
    "label_ends",
    "losses",
    "overview",
    "problem",
    "shuffled_band",
    "smooth",
]


def overview() -> Figure:
    """How BALM is wired: a backbone in the middle row, gates before it, heads and coefficients behind it."""
    fig, ax = figures.figure("page")
    fig.set_figheight(3.9)
    nodes = {
        "squeeze": (0, 3.8, "squeeze $s^m$\nmeans of all"),
        "gates": (2.4, 3.8, "gates in (0, 2)\n$2\\,\\sigma(W_m z+b_m)$"),
        "input": (0, 2, "batch $x^m$\nzeros if missing"),
        "calibrated": (2.4, 2, "calibrated\n$\\hat x^m$"),
        "encoders": (4.8, 2, "encoders $\\phi^m$\n$z^m$"),
        "fusion": (7.2, 2, "fusion $F$\n$h$"),
        "predict": (9.6, 2, "prediction\n$\\hat y$, loss"),
        "heads": (4.8, 0.1, "heads on $z^m$\n(detached)"),
        "kl": (7.2, 0.1, "KL to $\\hat y$, its\nchange $\\Delta^m$"),
        "mu": (9.6, 0.1, "coefficients\n$\\mu^m$, cosines"),
    }
    colours = dict.fromkeys(("squeeze", "gates", "calibrated"), figures.GREEN)
    colours |= dict.fromkeys(("heads", "kl", "mu"), figures.BLUE)
    arrows = [
        ("input", "squeeze"), ("squeeze", "gates"), ("gates", "calibrated"), ("input", "calibrated"),
        ("calibrated", "encoders"), ("encoders", "fusion"), ("fusion", "predict"), ("encoders", "heads"),
        ("heads", "kl"), ("kl", "mu"),
    ]  # fmt: skip
    figures.boxes(nodes, arrows, ax=ax, colours=colours, width=1.95, height=0.95)
    dashed = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.3, "shrinkA": 2, "shrinkB": 2, "ls": "--"}
    for start, end in (((9.2, 0.6), (5.4, 1.52)), ((9.9, 0.6), (9.9, 1.52))):
        ax.annotate("", end, start, arrowprops={**dashed, "color": figures.BLUE})
    words = "FCM: how much a feature counts, given what is there"
    ax.text(-0.95, 4.75, words, color=figures.GREEN, weight="bold", fontsize=10)
    words = "GRM: scales the encoders' gradients by $\\mu^m$\nand adds $\\tau L_{mod}$ to the next step's loss"
    ax.text(0, -1.15, words, color=figures.BLUE, weight="bold", fontsize=10, va="center")
    ax.set(xlim=(-1.1, 10.8), ylim=(-1.6, 5.2), title="BALM around a backbone that encodes, fuses and predicts")
    return fig


class Watch:
    """A callback of `training.fit`: what the rebalancing said of every step, and the loss terms are in the history.

    ``table(what)`` is [steps, M], for "discrepancy", "change", "mu", "cosine", "rms_before", "rms_after".
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_backward(self, state: Any) -> None:
        self.steps.append({name: value.detach().cpu().clone() for name, value in state.method.last.items()})

    def table(self, what: str) -> np.ndarray:
        return torch.stack([step[what] for step in self.steps]).double().numpy()


class PathLength:
    """How far each encoder has gone: the sum over steps of the norm of its change, relative to the start [M].

    Call it once before the first step and after each.
    """

    def __init__(self, encoders: dict[str, nn.Module]):
        self.encoders, self.last, self.length = encoders, {}, dict.fromkeys(encoders, 0.0)

    def __call__(self) -> None:
        for name, net in self.encoders.items():
            now = torch.cat([p.detach().flatten() for p in net.parameters()])
            if name in self.last:
                self.length[name] += float((now - self.last[name]).norm())
            self.last[name] = now.clone()


def smooth(x: np.ndarray, width: int) -> np.ndarray:
    """The mean over the last ``width`` steps, fewer at the beginning; [steps, ...]."""
    total = np.cumsum(x, axis=0)
    total[width:] = total[width:] - total[:-width]
    count = np.minimum(np.arange(1, len(x) + 1), width)
    return total / count.reshape(-1, *[1] * (x.ndim - 1))


def autocorrelation(x: np.ndarray, lag: int = 1) -> float:
    """The correlation of a series with itself ``lag`` steps later; NaN for a constant one."""
    x = np.asarray(x, float) - np.mean(x)
    total = float((x * x).sum())
    return float((x[lag:] * x[:-lag]).sum()) / total if total > 0 else math.nan


def shuffled_band(x: np.ndarray, lag: int = 1, draws: int = 500, seed: int = 0) -> tuple[float, float]:
    """Where 95 % of the autocorrelations of the same values in random order lie."""
    rng = np.random.default_rng(seed)
    values = [autocorrelation(rng.permutation(x), lag) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def label_ends(ax: Any, series: np.ndarray, names: Sequence[str]) -> None:
    """Each curve's name at its right end, moved apart where the ends are close; series [steps, M] as they are drawn."""
    low, high = ax.get_ylim()
    room, ends = 0.095 * (high - low), series[-1]
    places = np.empty(len(names))
    last = -math.inf
    for m in np.argsort(ends):
        places[m] = last = max(float(ends[m]), last + room)
    places -= max(0.0, places.max() - high)
    for m, name in enumerate(names):
        ax.annotate(
            name, (len(series) - 1, places[m]), (6, 0), textcoords="offset points", va="center", fontsize=10,
            color=figures.colour(name), annotation_clip=False,
        )  # fmt: skip


def curve_panel(ax: Any, series: np.ndarray, names: Sequence[str], width: int, title: str = "") -> None:
    """Running means over the training steps, a curve a modality, named at its end."""
    means = np.stack([smooth(series[:, m], width) for m in range(len(names))], 1)
    for m, name in enumerate(names):
        ax.plot(means[:, m], color=figures.colour(name), lw=2)
    ax.set_title(title)
    ax.grid(True)
    ax.margins(x=0.01)


def problem(watch: Watch, names: Sequence[str], width: int = 20) -> Figure:
    """What the heads watch of a plain training: how far each is from the whole, and the size of its gradients."""
    fig, axes = figures.figure("wide", columns=2)
    for ax, what, title in (
        (axes[0], "discrepancy", "KL to the fused prediction"),
        (axes[1], "rms_before", "gradient of the encoder, 1000 RMS"),
    ):
        series = watch.table(what) * (1000 if what == "rms_before" else 1)
        curve_panel(ax, series, names, width, title)
        label_ends(ax, np.stack([smooth(series[:, m], width) for m in range(len(names))], 1), names)
        ax.set_xlabel("training step")
    return fig


def losses(histories: dict[str, Any], metric: str) -> Figure:
    """The task's loss and the validation metric over the epochs; a label -> `History`."""
    fig, axes = figures.figure("wide", columns=2)
    looks = (("--", "#555555"), ("-", figures.colour("balm")))
    for (name, history), (dashes, colour) in zip(histories.items(), looks, strict=True):
        for ax, key in zip(axes, ("train_task", metric), strict=True):
            values = [row[key] for row in history.epochs]
            ax.plot([row["epoch"] for row in history.epochs], values, ls=dashes, color=colour, label=name)
    for ax, title in zip(axes, ("loss of the task, training", metric.replace("_", ", ")), strict=True):
        ax.set(xlabel="epoch", title=title)
        ax.grid(True)
    axes[1].legend(fontsize=10)
    return fig


def kl_curves(watches: dict[str, Watch], names: Sequence[str], width: int = 20) -> Figure:
    """The KL of each head over the training steps, a panel a training; all panels share their axes."""
    rows = math.ceil(len(watches) / 2)
    fig, axes = figures.figure("page", rows=rows, columns=2, sharex=True, sharey=True, squeeze=False)
    fig.set_figheight(2.5 * rows)
    for ax, (name, watch) in zip(axes.flat, watches.items(), strict=True):
        curve_panel(ax, watch.table("discrepancy"), names, width, name)
    for ax, watch in zip(axes.flat, watches.values(), strict=True):
        series = watch.table("discrepancy")
        label_ends(ax, np.stack([smooth(series[:, m], width) for m in range(len(names))], 1), names)
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    for row in axes:
        row[0].set_ylabel("KL to fused")
    return fig


def cosine_curves(watches: dict[str, Watch], names: Sequence[str], width: int = 20) -> Figure:
    """The cosine of each head's output layer with the fused one, a panel a modality and in it a line a training."""
    fig, axes = figures.figure("wide", columns=len(names), sharey=True)
    looks = (("--", "#555555"), ("-", figures.colour("balm")))
    for m, (ax, name) in enumerate(zip(axes, names, strict=True)):
        for (label, watch), (dashes, colour) in zip(watches.items(), looks, strict=True):
            ax.plot(smooth(watch.table("cosine")[:, m], width), ls=dashes, color=colour, label=label)
        ax.set(title=name, xlabel="training step")
        ax.grid(True)
    axes[0].set_ylabel("cosine of weights")
    axes[-1].legend(fontsize=10)
    return fig


def coefficients(mu: np.ndarray, names: Sequence[str], rho: float) -> Figure:
    """mu [steps, M]: a strip a modality over the steps, and all of them beside what pure noise would give."""
    M = len(names)
    fig = figures.figure("page", rows=1, columns=1)[0]
    fig.clf()
    fig.set_figheight(1.25 * M + 0.7)
    grid = fig.add_gridspec(M, 2, width_ratios=[1.9, 1])
    first = None
    for m, name in enumerate(names):
        ax = first = fig.add_subplot(grid[m, 0], sharex=first, sharey=first)
        ax.axhspan(-4 * rho, 0, color="#d0483e", alpha=0.1, lw=0)
        ax.plot(mu[:, m], color=figures.colour(name), lw=1)
        ax.set(ylim=(-4 * rho, 6 * rho), title=name)
        ax.tick_params(labelbottom=m == M - 1)
    ax.set_xlabel("training step")
    ax = fig.add_subplot(grid[:, 1])
    x, spread = np.linspace(-4, 6, 300), math.sqrt(2) / 3
    ax.hist(np.clip(mu.ravel() / rho, -4, 6), bins=40, range=(-4, 6), density=True, color=figures.GREY, alpha=0.6)
    if M == 3:
        density = 1 / (math.pi * spread * (1 + ((x - 2 / 3) / spread) ** 2))
        ax.plot(x, density, color=figures.colour("balm"))
        ax.annotate("pure noise", (1.1, 0.45), (1.8, 0.55), color=figures.colour("balm"), fontsize=10)
    ax.set(title="all coefficients", xlabel="coefficient / $\\rho$", ylabel="density")
    return fig


def clouds(embedded: dict[tuple[str, str], tuple[np.ndarray, np.ndarray, float]]) -> Figure:
    """t-SNE pictures: (training, stage) -> points [n, 2], classes [n] and the silhouette in the full space."""
    rows, columns = (list(dict.fromkeys(key[i] for key in embedded)) for i in (0, 1))
    fig, axes = figures.figure("page", rows=len(rows), columns=len(columns), squeeze=False)
    fig.set_figheight(2.3 * len(rows))
    for (training, stage), (points, y, value) in embedded.items():
        ax = axes[rows.index(training)][columns.index(stage)]
        ax.scatter(*points.T, c=[figures.PALETTE[k % len(figures.PALETTE)] for k in y], s=9)
        ax.set(xticks=[], yticks=[], title=f"{training}, {stage}\nsilhouette {value:+.3f}")
    return fig


def grids(panels: dict[str, tuple[np.ndarray, list[str], list[str]]], columns: int = 2) -> Figure:
    """Heat maps over tau (rows) and rho (columns): title -> scores, the taus, the rhos."""
    rows = math.ceil(len(panels) / columns)
    fig, axes = figures.figure("page", rows=rows, columns=columns, squeeze=False)
    fig.set_figheight(3.1 * rows)
    for ax, (title, (values, taus, rhos)) in zip(axes.flat, panels.items(), strict=True):
        figures.heat_map(values, taus, rhos, ax=ax, title=title, form=".1f")
        ax.set(xlabel="rho", ylabel="tau")
    return fig
