"""What the chapter on BALM looks with: its schematic, a hook that keeps the rebalancing's numbers, and their curves."""

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

__all__ = ["PathLength", "Watch", "autocorrelation", "curves", "overview", "shuffled_band", "smooth"]


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
    ax.text(
        -0.95, 4.75, "FCM: what a feature is worth, given what is there", color=figures.GREEN, weight="bold", fontsize=9
    )
    words = "GRM: scales the encoders' gradients by $\\mu^m$\nand adds $\\tau L_{mod}$ to the next step's loss"
    ax.text(0, -1.15, words, color=figures.BLUE, weight="bold", fontsize=9, va="center")
    ax.set(xlim=(-1.1, 10.8), ylim=(-1.6, 5.2), title="BALM around a backbone that encodes, fuses and predicts")
    return fig


class Watch:
    """A hook of `training.fit`: what the rebalancing said of every step, and the loss terms are in the history.

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


def curves(
    columns: dict[str, Watch], names: Sequence[str], rows: dict[str, str], width: int = 8, title: str = ""
) -> Figure:
    """Curves over the training steps: a column for each watched training, a row for each quantity, smoothed a little.

    rows : what of `Watch.table` -> the label of its axis
    """
    fig, axes = figures.figure("page", rows=len(rows), columns=len(columns), sharex=True, sharey="row", squeeze=False)
    fig.set_figheight(1.2 + 1.9 * len(rows))
    for j, (head, watch) in enumerate(columns.items()):
        for i, (what, label) in enumerate(rows.items()):
            ax, series = axes[i][j], watch.table(what)
            for m, name in enumerate(names):
                ax.plot(series[:, m], color=figures.colour(name), alpha=0.16, lw=0.7)
                ax.plot(smooth(series[:, m], width), color=figures.colour(name), lw=1.8, label=name,
                        ls=("-", "--", "-.", ":")[m % 4])  # fmt: skip
            ax.grid(True)
            if i == 0:
                ax.set_title(head)
            if j == 0:
                ax.set_ylabel(label)
            if i == len(rows) - 1:
                ax.set_xlabel("training step")
    axes[0][-1].legend(fontsize=8)
    if title:
        fig.suptitle(title)
    return fig
