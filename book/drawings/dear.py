"""What DEAR's pages draw: the schematic (the paper's Figure 2), the toy, a training, and what stored runs say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from book.studies import dear as study
from book.studies import dear_checks
from book.studies.dear_tables import AT, MODALITIES, Tables
from book.support import figures
from mmlib import data, metrics, missing
from mmlib.layers import MLP
from mmlib.losses import mmd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Repair",
    "along_training",
    "bound",
    "calibration",
    "clouds",
    "coverage",
    "distances",
    "embedded",
    "gate",
    "ideal",
    "overview",
    "rates",
    "repaired",
    "toy",
    "training",
]

GREY = "#555555"  # the page's own ink, thinner
METHODS = {
    "joint training": (figures.INK, ":"),
    "modality dropout": (figures.PURPLE, "-."),
    "DEAR's net, task loss": (figures.AMBER, "--"),
    "DEAR": (figures.GREEN, "-"),
}


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


def toy(original: Tensor, noisy: Tensor, repairs: Mapping[str, Repair]) -> Figure:
    """The originals, what arrives, and both repairs; colours are the original's cluster."""
    fig, axes = figures.figure("wide", columns=4, sharex=True, sharey=True)
    title = lambda how, r: f"{how}\nerror {r.mse:.2f}\nMMD² {r.mmd:.2f}"
    shown = {"original": original, "arrives": noisy}
    for how, loss in (("by squared error", "mse"), ("by MMD", "mmd")):
        shown[title(how, repairs[loss])] = repairs[loss].x
    side = original[:, 0] > 0
    for ax, (name, cloud) in zip(axes, shown.items(), strict=True):
        for on, shade in ((side, figures.BLUE), (~side, figures.AMBER)):
            ax.scatter(*cloud[on].T, s=5, color=shade, alpha=0.6)
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="feature 1")
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("feature 2")
    return fig


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]], gap: float = 0.075) -> None:
    """A name at the end (x, y, colour) of each line, moved apart to at least ``gap`` of the axes' height."""
    low, high = ax.get_ylim()
    log = ax.get_yscale() == "log"
    place = lambda y: (np.log(y / low) / np.log(high / low)) if log else (y - low) / (high - low)
    last = -1.0
    for name, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
        last = max(float(place(y)), last + gap)
        up = (last - float(place(y))) * ax.bbox.height * 72 / ax.figure.dpi
        ax.annotate(name, (x, y), (5, up), textcoords="offset points", va="center", fontsize=10, color=colour)


def _lines(ax: Axes, x: Sequence[float], lines: Mapping[str, tuple[Any, str, Any]]) -> None:
    """Lines with their names at the end: name -> (y, colour, dashes)."""
    for y, colour, dash in lines.values():
        ax.plot(x, y, color=colour, ls=dash, lw=1.8)
    label_ends(ax, {name: (x[-1], float(y[-1]), colour) for name, (y, colour, _) in lines.items()})
    ax.grid(True)


def training(histories: Mapping[str, Any]) -> Figure:
    """The loss terms of the training with MMD, and the validation error with both alignments."""
    fig, axes = figures.figure("wide", columns=2)
    rows = histories["MMD"].epochs
    epochs = [row["epoch"] for row in rows]
    terms = [k for k in rows[-1] if k.startswith("train_") and k != "train_loss"]
    axes[0].set_yscale("log")
    axes[0].plot(epochs, np.array([[row[k] for k in terms] for row in rows]), alpha=0)  # for the limits
    shades = zip(terms, (figures.INK, figures.PURPLE, figures.BLUE, figures.AMBER, figures.GREEN), strict=False)
    _lines(axes[0], epochs, {k.removeprefix("train_"): ([r[k] for r in rows], shade, "-") for k, shade in shades})
    axes[0].set(title="loss terms, each with its weight", xlabel="epoch")
    found = {k: [row["valid_mae"] for row in h.epochs] for k, h in histories.items()}
    axes[1].plot(epochs, np.array(list(found.values())).T, alpha=0)
    _lines(axes[1], epochs, {
        "MMD": (found["MMD"], figures.BLUE, "-"),
        "squared error": (found["squared error"], figures.AMBER, "--"),
    })  # fmt: skip
    axes[1].set(title="validation at a missing rate of .5", xlabel="epoch", ylabel="mean absolute error")
    return fig


def along_training(ax: Axes, rows: Sequence[Mapping[str, float]], lines: Mapping[str, tuple[str, str]]) -> None:
    """Columns of a watch over epochs, name -> (colour, dashes)."""
    epochs = list(range(1, len(rows) + 1))
    ax.plot(epochs, np.array([[row[name] for name in lines] for row in rows]), alpha=0)
    _lines(ax, epochs, {name: ([row[name] for row in rows], *look) for name, look in lines.items()})
    ax.set_xlabel("epoch")


def distances(watches: Mapping[str, Any]) -> Figure:
    """The paper's Figure 1: distances to the complete features along training, a panel an alignment."""
    fig, axes = figures.figure("wide", columns=2, sharey=True)
    for ax, (name, watch) in zip(axes, watches.items(), strict=True):
        ax.set_yscale("log")
        along_training(ax, watch.rows, {"incomplete": (GREY, "--"), "repaired": (figures.BLUE, "-")})
        ax.set_title(f"HDCR by {name}")
    axes[0].set_ylabel("divergence / variance")
    return fig


def bound(rows: Sequence[Mapping[str, float]]) -> Figure:
    """The bound's terms along a training: both risks and their gap above, the distance below."""
    fig, axes = figures.figure("wide", columns=2)
    along_training(axes[0], rows, {"source risk": (figures.GREEN, "-"), "target risk": (figures.BLUE, "--")})
    axes[0].set(title="risks", ylabel="mean absolute error")
    gap = [row["target risk"] - row["source risk"] for row in rows]
    square = [row["MMD²"] for row in rows]
    with_target = dear_checks.rank(np.array(square), np.array([row["target risk"] for row in rows]))
    ranks = dear_checks.rank(np.array(square), np.array(gap))
    axes[1].scatter(square, gap, s=12, color=figures.PURPLE)
    axes[1].annotate("first epoch", (square[0], gap[0]), (-4, 8), textcoords="offset points", ha="right", fontsize=10)
    axes[1].annotate("last", (square[-1], gap[-1]), (6, 0), textcoords="offset points", va="center", fontsize=10)
    axes[1].set(xlabel="MMD²", ylabel="target - source risk", title="an epoch each")
    axes[1].text(
        0.98, 0.8, f"rank correlation {ranks:+.2f}\n(with the target risk {with_target:+.2f})",
        transform=axes[1].transAxes, ha="right", va="top", fontsize=10,
    )  # fmt: skip
    axes[1].grid(True)
    return fig


def embedded(clouds: Mapping[int, tuple[Tensor, Tensor]], points: int, mixing: Any) -> Figure:
    """The paper's Figure 3: t-SNE of complete and repaired features, a panel an epoch, with how well they mix."""
    from sklearn.manifold import TSNE

    fig, axes = figures.figure("wide", columns=3)
    for ax in axes[len(clouds) :]:
        ax.axis("off")
    for ax, (epoch, cloud) in zip(axes, clouds.items(), strict=False):
        X, R = (z[:points] for z in cloud)
        tsne = TSNE(perplexity=min(30, len(X) - 1), init="pca", random_state=0, max_iter=400)
        place = tsne.fit_transform(torch.cat([X, R]).numpy())
        ax.scatter(*place[: len(X)].T, s=6, color=figures.BLUE, label="complete")
        ax.scatter(*place[len(X) :].T, s=6, color=figures.AMBER, marker="^", label="repaired")
        ax.set(title=f"epoch {epoch}: mixing {mixing(*cloud):.2f}", xticks=[], yticks=[])
    axes[0].legend(fontsize=10, loc="lower left")
    return fig


def ideal() -> list[float]:
    """The mean absolute error of the best possible predictor on synthetic, at each missing rate."""
    from mmlib.data.synthetic import bayes

    world = data.load("synthetic", **study.DATA["synthetic"]["data_options"])["test"]
    plans = missing.lnln_protocol()[1]
    seen = [plans[rate].draw(world).apply(world) for rate in study.RATES]
    return [(bayes(s, "mae")[:, 0] - s.target).abs().mean().item() for s in seen]


def rates(told: Tables) -> Figure:
    """The error against the missing rate, of all methods on two data sets; means over seeds."""
    fig, axes = figures.figure("page", rows=2)
    for ax, (table, title) in zip(
        axes, (("table1_synthetic", "synthetic"), ("table1_mosi", "MOSI (public features)")), strict=True
    ):
        found = {m: [told.stored(table).mean((m,), r).mean for r in study.RATES] for m in study.METHODS}
        lines = {m: (found[m], *METHODS[m]) for m in study.METHODS if np.isfinite(found[m]).all()}
        if table == "table1_synthetic":
            lines["best possible"] = (ideal(), figures.GREY, (0, (1, 1)))
        if lines:
            ax.plot(AT, np.array([y for y, _, _ in lines.values()]).T, alpha=0)
            _lines(ax, AT, lines)
        ax.set(title=title, xlabel="missing rate", ylabel="mean absolute error")
    return fig


def gate(told: Tables) -> Figure:
    """The paper's Figure 4: gate, entropy, and the weights' distance from one third, against the missing rate."""
    fig, axes = figures.figure("wide", columns=2)
    left = {
        "gate $g$": ("gate", 1.0, figures.PURPLE, "-"),
        "$H(w)$ / log 3": ("entropy", np.log(3), figures.GREEN, "--"),
    }
    for ax, entries in (
        (axes[0], left),
        (axes[1], {m: (f"w {m}", 1.0, figures.colour(m), "-") for m in MODALITIES}),
    ):
        ends = {}
        for name, (column, scale, colour, dash) in entries.items():
            runs = told.story(column)
            if runs is None:
                continue
            found = [metrics.t_interval(x / scale) for x in runs.T]
            mean = np.array([f.mean for f in found])
            ax.errorbar(
                AT, mean, yerr=[f.high - f.mean for f in found], color=colour, ls=dash, lw=1.8, capsize=2, elinewidth=1
            )
            ends[name] = (AT[-1], float(mean[-1]), colour)
        if ax is axes[0]:
            ax.set_ylim(0, 1.05)
        label_ends(ax, ends)
        ax.grid(True)
        ax.set_xlabel("missing rate")
    axes[0].set_title("gate and entropy")
    axes[1].axhline(1 / 3, color=GREY, lw=0.8, ls=":")
    axes[1].set_title("mean weights (dotted: one third)")
    return fig


def calibration(told: Tables) -> Figure:
    """The repair's mean error in ten equally full bins of difficulty, a panel a modality, both calibration losses."""
    fig, axes = figures.figure("wide", columns=3, sharey=True)
    looks = {"DEAR": ("-", 1.0, "β = .3"), "beta = 30": ("--", 0.6, "β = 30")}
    for i, (ax, m) in enumerate(zip(axes, MODALITIES, strict=True)):
        top = 0.0
        for name, (dash, alpha, words) in looks.items():
            if not len(told.stories[name]):
                continue
            d, e = (told.stories[name].arrays(k)[..., i] for k in "de")
            bins = [dear_checks.binned(one.ravel(), other.ravel()) for one, other in zip(d, e, strict=True)]
            x, y = np.mean([b.difficulty for b in bins], 0), np.mean([b.error for b in bins], 0)
            ax.plot(x, y, color=figures.colour(m), ls=dash, alpha=alpha, marker="o", ms=3)
            end = -1 if name == "DEAR" else 0
            ax.annotate(words, (x[end], y[end]), (0, 8), textcoords="offset points", ha="center", fontsize=10)
            top = max(top, x.max(), y.max())
        ax.plot([0, top], [0, top], color=GREY, ls=":", lw=1)
        ax.margins(0.12)
        ax.set(title=m, xlabel="difficulty $d$")
        ax.grid(True)
    axes[0].set_ylabel("error $e$ of the repair")
    return fig


def coverage(told: Tables) -> Figure:
    """Risk against coverage for several scores by which samples are refused."""
    fig, ax = figures.figure("normal")
    looks = {
        "mean difficulty": (figures.BLUE, "-"),
        "entropy of w": (figures.GREEN, "--"),
        "disagreement of five seeds": (figures.AMBER, "-."),
        "the missing rate (not known)": (figures.INK, ":"),
        "dropout deviation (own nets)": (figures.PURPLE, (0, (5, 1))),
    }
    lines = {}
    for name, look in looks.items():
        if name in told.curves:
            lines[name] = (np.mean([c.risk for c in told.curves[name]], 0)[::-1], *look)
    if lines:
        x = told.curves["mean difficulty"][0].coverage[::-1]
        ax.plot(x, np.array([y for y, _, _ in lines.values()]).T, alpha=0)
        ax.invert_xaxis()
        _lines(ax, list(x), lines)
    ax.set(xlabel="fraction answered", ylabel="mean absolute error of those")
    return fig
