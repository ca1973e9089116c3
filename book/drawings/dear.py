"""The schematic of the chapter on DEAR (the paper's Figure 2), and the toy that the chapter opens with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from book.support import figures
from mmlib.layers import MLP
from mmlib.losses import mmd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Repair", "clouds", "overview", "repaired"]


def overview() -> Figure:
    """How DEAR is wired: repair below, estimate in the middle, arbitration at the right, losses on top."""
    fig, ax = figures.figure("page")
    fig.set_figheight(4.4)
    nodes = {
        "F": (0, 2.4, "incomplete $F_m$\nzeros, [UNK]"),
        "H": (2.2, 2.4, "encoders\n$H_m$ (Eq. 5)"),
        "hdcr": (4.4, 2.4, "HDCR\n$\\hat X_m$"),
        "syn": (6.6, 3.2, "synergistic\n$y_{syn}$ (Eq. 9)"),
        "rob": (6.6, 1.6, "robust\n$y_{rob}$ (Eq. 10)"),
        "out": (8.8, 2.4, "$\\hat y=g\\,y_{syn}$\n$+(1-g)\\,y_{rob}$"),
        "sure": (2.2, 0.4, "SURE: difficulty\n$d_m$ (Eqs. 6-7)"),
        "w": (4.4, 0.4, "weights $w_m$\n(Eq. 8)"),
        "gate": (8.8, 0.4, "gate $g$\n(Eq. 11)"),
        "X": (0, 4.4, "complete\n(training only)"),
        "target": (2.2, 4.4, "same encoders\n$X_m$"),
        "mmd": (4.4, 4.4, "$L_{uni}$, $L_{joint}$\n(Eqs. 2-4)"),
        "cal": (6.6, 4.4, "$L_{cal}$: $e_m$\nand $d_m$ (Eq. 12)"),
    }
    repair, estimate, decide = figures.BLUE, figures.GREEN, figures.PURPLE
    colours = {**dict.fromkeys(("hdcr", "mmd", "target", "X"), repair), **dict.fromkeys(("sure", "w", "cal"), estimate)}
    colours |= dict.fromkeys(("syn", "rob", "out", "gate"), decide)
    arrows = [
        ("F", "H"), ("H", "hdcr"), ("H", "sure"), ("sure", "w"), ("hdcr", "syn"), ("hdcr", "rob"), ("syn", "out"),
        ("rob", "out"), ("w", "rob"), ("w", "gate"), ("gate", "out"), ("X", "target"), ("target", "mmd"),
        ("hdcr", "mmd"), ("mmd", "cal"),
    ]  # fmt: skip
    figures.boxes(nodes, arrows, ax=ax, colours=colours, width=1.86, height=0.84)
    ax.text(0, 1.82, "seen at\ntest time", ha="center", va="top", fontsize=8.5, color="#555555")
    ax.text(-0.9, 5.1, "repair", color=repair, weight="bold", fontsize=9)
    ax.text(1.3, -0.35, "estimate", color=estimate, weight="bold", fontsize=9)
    ax.text(7.9, -0.35, "arbitrate", color=decide, weight="bold", fontsize=9)
    ax.set(xlim=(-1.15, 9.95), ylim=(-0.6, 5.4), title="DEAR: repair, estimate, arbitrate")
    return fig


def clouds(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(X, F) [n, 2] each: two clusters, and what is left of them under much noise."""
    g = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 2, (n, 1), generator=g) * 2.0 - 1
    x = side * torch.tensor([1.0, 0.6]) + 0.15 * torch.randn(n, 2, generator=g)
    return x, x + 1.2 * torch.randn(n, 2, generator=g)


class Repair(NamedTuple):
    """What a small net made of F, [n, 2], and how far that is from X."""

    x: Tensor
    mse: float
    mmd: float
    variance: float  # of x, over that of X


def repaired(loss: str, steps: int = 300, seed: int = 0) -> Repair:
    """A net with one hidden layer that makes X of F, trained with "mse" or "mmd" on batches of fresh samples."""
    if loss not in ("mse", "mmd"):
        raise ValueError(f"loss: expected 'mse' or 'mmd', got {loss!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP([2, 32, 32, 2])
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(steps):
        x, f = clouds(128, 1000 * (seed + 1) + step)
        optimizer.zero_grad()
        (nn.functional.mse_loss(net(f), x) if loss == "mse" else mmd(net(f), x)).backward()
        optimizer.step()
    x, f = clouds(400, 10_000_000 + seed)
    with torch.no_grad():
        y = net(f)
        spread = lambda z: float(z.var(0).sum())
        return Repair(y, float((y - x).square().sum(1).mean()), float(mmd(y, x)), spread(y) / spread(x))
