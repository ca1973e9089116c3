"""The schematics of the chapter on MCE: how it is wired, and two examples with small numbers (its Figures 1 to 3).

Every number that is drawn is computed by `mmlib`, not typed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from book.support import figures
from mmlib import coalitions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EXAMPLE_COUNTS", "EXAMPLE_RIGHT", "EXAMPLE_UPPER", "example_presence", "example_sample", "one_sample"]
__all__ += ["overview", "updates"]

EXAMPLE_COUNTS = (10, 8, 5, 2)  # the paper's Figure 2: how many of ten samples have each modality
# One sample with four modalities of which the second is missing. Which coalitions of the others get it right:
EXAMPLE_RIGHT = ((0,), (0, 2), (0, 3), (2, 3), (0, 2, 3))
EXAMPLE_UPPER = (1.0, 0.0, 1.0, 0.0)  # and which of the frozen unimodal models


def overview() -> Figure:
    """How MCE is wired: the backbone in the middle row, its diagnosis above, its treatment below."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    fig, ax = figures.figure("page")
    fig.set_figheight(4.7)
    nodes = {
        "A": (0, 5.3, "rate factor\n$A_m$"),
        "U": (2.1, 5.3, "upper bound\n$U_m$"),
        "incentive": (0, 4, "incentive\n$A_m B_m$"),
        "B": (2.1, 4, "state factor\n$B_m$"),
        "phi": (5.25, 4, "Shapley value\n$\\phi_m$"),
        "v": (8.4, 4, "right from $S$?\n$v_n(S)$"),
        "batch": (2.1, 2, "batch\nfeatures $x_m$"),
        "encode": (4.2, 2, "encoders\n$h_m$"),
        "reconstruct": (6.3, 2, "reconstruction\n$h$′$_m$"),
        "decode": (8.4, 2, "fuse, decode\n$\\hat y$ from $S$"),
        "single": (3.15, 0, "$L_{single}$\n$h_m$ alone"),
        "aux": (5.25, 0, "$L_{aux}$\n$h$′$_m \\approx h_m$"),
        "sub": (7.35, 0, "$L_{sub}$\nevery $S$"),
        "task": (9.45, 0, "$L_{task}$\nall there is"),
    }
    diagnosis, treatment = figures.GREEN, figures.BLUE
    colours = dict.fromkeys(("A", "U", "incentive", "B", "phi", "v"), diagnosis)
    colours |= dict.fromkeys(("reconstruct", "single", "aux", "sub"), treatment)
    arrows = [
        ("batch", "encode"), ("encode", "reconstruct"), ("reconstruct", "decode"), ("decode", "task"),
        ("decode", "sub"), ("decode", "v"), ("v", "phi"), ("phi", "B"), ("U", "B"), ("A", "incentive"),
        ("B", "incentive"), ("encode", "single"), ("reconstruct", "aux"),
    ]  # fmt: skip
    figures.boxes(nodes, arrows, ax=ax, colours=colours, width=1.8, height=0.9)
    ax.add_patch(
        FancyBboxPatch((2.1, -0.57), 6.3, 1.14, boxstyle="round,pad=0.02,rounding_size=0.12", fill=False,
                       edgecolor=treatment, linestyle=(0, (4, 3)), linewidth=1.2)
    )  # fmt: skip
    ax.plot([0, 0], [3.56, 0], color=diagnosis, linewidth=1.6, linestyle="--")
    ax.add_patch(
        FancyArrowPatch((0, 0), (2.12, 0), arrowstyle="-|>", mutation_scale=12, color=diagnosis, lw=1.6,
                        linestyle="--", shrinkA=0, shrinkB=1)
    )  # fmt: skip
    ax.text(0.12, 0.12, "weighs $L_{single}$\nand $L_{aux}$", color=diagnosis, fontsize=10, va="bottom")
    title = {"weight": "bold", "fontsize": 10}
    ax.text(4.6, 5.3, "LCE diagnoses: who is rare, who is under-used?", color=diagnosis, va="center", **title)
    ax.text(2.1, -0.7, "RCE treats: every feature useful alone, in every subset, and recoverable",
            color=treatment, va="top", **title)  # fmt: skip
    ax.set(xlim=(-1.1, 10.55), ylim=(-1.2, 5.9), title="MCE around a model that encodes, fuses and decodes")
    return fig


def example_presence() -> torch.Tensor:
    """bool [10, 4] with the counts of the paper's Figure 2, arranged so that every sample has something."""
    present = torch.zeros(10, len(EXAMPLE_COUNTS), dtype=torch.bool)
    for m, count in enumerate(EXAMPLE_COUNTS):
        present[torch.arange(count) * (10 // count) if count < 8 else torch.arange(count), m] = True
    return present


def updates() -> Figure:
    """Ten samples with four modalities: who has what, how often each encoder is updated, and the factor A."""
    present = example_presence()
    count = present.sum(0)
    fig, ax = figures.figure("wide")
    shades = (figures.BLUE, figures.AMBER, figures.GREEN, figures.PURPLE)
    for m in range(present.shape[1]):
        for n in range(len(present)):
            there = bool(present[n, m])
            ax.add_patch(_square(n, -m, shades[m] if there else "none"))
        ax.text(10.1, -m, f"{int(count[m])}", ha="center", va="center", fontsize=11)
        ax.text(11.5, -m, f"{len(present) / int(count[m]):.2f}", ha="center", va="center", fontsize=11)
        ax.text(-0.8, -m, f"modality {m + 1}", ha="right", va="center")
    for n in range(10):
        ax.text(n, 0.62, str(n + 1), ha="center", va="bottom", fontsize=10, color="#555555")
    ax.text(10.1, 0.62, "updates", ha="center", va="bottom", fontsize=10, weight="bold")
    ax.text(11.5, 0.62, "$A_m$", ha="center", va="bottom", fontsize=10)
    ax.text(4.5, 1.12, "sample", ha="center", va="bottom", fontsize=10)
    ax.set(xlim=(-3.0, 12.3), ylim=(-3.6, 1.7), title="An encoder learns only from the samples that have its modality")
    ax.axis("off")
    return fig


def _square(x: float, y: float, shade: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.42, y - 0.36), 0.84, 0.72, facecolor=shade, edgecolor="#999999", linewidth=0.8)


def example_sample() -> dict[str, torch.Tensor]:
    """The one sample of `one_sample` in numbers: ``present`` [4], ``value`` [16] of every coalition, ``upper`` [4].

    A coalition has the value of its part that is present; so the second modality is a dummy.
    """
    masks = coalitions.coalition_masks(4)
    present = torch.tensor([True, False, True, True])
    right = {frozenset(s) for s in EXAMPLE_RIGHT}
    value = torch.tensor([float(frozenset((row & present).nonzero()[:, 0].tolist()) in right) for row in masks])
    return {"present": present, "value": value, "upper": torch.tensor(EXAMPLE_UPPER)}


def one_sample(shapley: torch.Tensor, factor: torch.Tensor) -> Figure:
    """A batch of one sample that misses its second modality, from coalition values to B; [4] each, as computed."""
    from matplotlib.patches import Circle

    sample = example_sample()
    present, upper = sample["present"], sample["upper"]
    names = [f"{m + 1}" for m in range(4)]
    shades = (figures.BLUE, figures.AMBER, figures.GREEN, figures.PURPLE)
    fig, axes = figures.figure("page", columns=2, width_ratios=[1, 1.55])
    fig.set_figheight(3.6)
    ax: Axes = axes[0]
    masks = coalitions.coalition_masks(4)
    rows = [k for k in range(16) if not (masks[k] & ~present).any()]
    rows.sort(key=lambda k: (int(masks[k].sum()), k))
    for place, k in enumerate(rows):
        for m in range(4):
            on = bool(masks[k, m])
            ax.add_patch(
                Circle((m, -place), 0.27, facecolor=shades[m] if on else "none",
                       edgecolor=shades[m] if present[m] else "#bbbbbb", linestyle="-" if present[m] else ":")
            )  # fmt: skip
        ax.text(4.6, -place, f"{int(sample['value'][k])}", ha="center", va="center", fontsize=11)
    for m in range(4):
        ax.text(m, 0.62, names[m], ha="center", va="bottom", fontsize=10)
    ax.text(4.6, 0.62, "$v(S)$", ha="center", va="bottom", fontsize=10)
    ax.set(xlim=(-0.6, 5.3), ylim=(-7.6, 1.4), title="Which coalitions are right?")
    ax.set_aspect("equal")
    ax.axis("off")
    ax = axes[1]
    at = np.arange(4)
    here = present.numpy()
    tints = [shades[m] for m in at[here]]
    bounds, values = upper[present].numpy(), shapley[present].numpy()
    ax.bar(at[here] - 0.2, bounds, 0.36, color="none", edgecolor=tints, hatch="///", label="upper bound $U_m$")
    ax.bar(at[here] + 0.2, values, 0.36, color=tints, label="Shapley value $\\phi_m$")
    for m in range(4):
        text = f"$B_{m + 1}$ = {float(factor[m]):.3f}" if present[m] else "missing\n$B_2$ = 0"
        ax.text(m, 1.06 if present[m] else 0.06, text, ha="center", va="bottom", fontsize=10)
    ax.set(xticks=at, xlim=(-0.6, 3.6), ylim=(0, 1.28), xlabel="modality", ylabel="samples (the batch has one)")
    ax.set_xticklabels(names)
    ax.set_title("Who is under-used?", pad=24)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.1)
    return fig
