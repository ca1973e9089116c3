"""The book's matplotlib style and the few plots that recur.

Nothing happens on import: call `use_style` once in a script or chapter. A modality and a method keep their colour
everywhere (`colour`); colours that meet in one figure stay apart under the common colour-vision deficiencies, differ
in lightness, and have a contrast of at least 3 to 1 on the white that every figure brings with it, so a picture reads
the same on a light page, on a dark one and in print.

Every plot takes an optional ``ax``, returns the Axes that it drew on, and changes nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from book.support import vector
from mmlib.checks import Is, Maybe, Named, OneOf, Several, Text, Whole, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "METHOD_COLOURS",
    "MODALITY_COLOURS",
    "PALETTE",
    "SIZES",
    "band",
    "bars",
    "boxes",
    "colour",
    "figure",
    "heat_map",
    "loss_curve",
    "marker",
    "picture",
    "presence_grid",
    "reliability",
    "training_curves",
    "use_style",
]

# Found by a random search around the Okabe-Ito hues for the largest smallest distance between any two, with normal
# vision and three simulated deficiencies; tests/book/support/test_figures.py recomputes it.
BLUE, AMBER, GREEN, PURPLE = "#0b63d9", "#c07f12", "#2fa56c", "#7d1287"
BROWN, PINK, INK, GREY = "#634604", "#e25cb0", "#2b2b2b", "#8a8a8a"
PALETTE = (BLUE, AMBER, GREEN, PURPLE, BROWN, PINK, INK)

# Modalities that meet in one data set never share a colour; across data sets the kind keeps it (pictures are blue,
# sounds amber, words green).
MODALITY_COLOURS: dict[str, str] = {
    "image": BLUE,
    "vision": BLUE,
    "visual": BLUE,
    "audio": AMBER,
    "language": GREEN,
    "text": GREEN,
    "left": BLUE,
    "right": AMBER,
    "projection": GREEN,
    "fou": BLUE,
    "fac": AMBER,
    "kar": GREEN,
    "pix": PURPLE,
    "zer": BROWN,
    "mor": PINK,
}
METHOD_COLOURS: dict[str, str] = {
    "image only": BLUE,
    "audio only": AMBER,
    "image + audio": PURPLE,
    "modality dropout": GREEN,
    "joint": INK,
    "joint training": INK,
    "bayes": GREY,
    "chance": GREY,
    "mce": BLUE,
    "dream": AMBER,
    "dear": GREEN,
    "balm": PURPLE,
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))

# Inches at 110 dots: "normal" fills the text column of the book on a desktop screen, none is wider than 840 pixels.
SIZES: dict[str, tuple[float, float]] = {
    "small": (3.6, 2.7),
    "normal": (6.4, 3.6),
    "wide": (7.6, 2.9),
    "tall": (6.4, 5.2),
    "square": (4.6, 4.2),
    "page": (7.6, 5.8),
}


NAMES = Several(Text)


def use_style() -> None:
    """Set matplotlib's defaults for the book: quiet axes, letters of 10 points, our colours; in a notebook, SVG."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(
        {
            "figure.figsize": SIZES["normal"],
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.facecolor": "white",
            "axes.edgecolor": "#555555",
            "axes.labelcolor": INK,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.labelsize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=PALETTE),
            "grid.color": "#dddddd",
            "grid.linewidth": 0.8,
            "text.color": INK,
            "xtick.color": "#444444",
            "ytick.color": "#444444",
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "font.size": 10,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "image.cmap": "cividis",
            "image.interpolation": "nearest",
            "svg.hashsalt": "mmlib",
        }
    )
    vector.inline()


def figure(size: str = "normal", rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of one of the fixed `SIZES`, with its Axes as `matplotlib.pyplot.subplots` returns them.

    Raises ValueError for a size that is not one of `SIZES`.
    """
    import matplotlib.pyplot as plt

    OneOf(*SIZES)("size", size)
    Whole(1)("rows", rows)
    Whole(1)("columns", columns)
    return plt.subplots(rows, columns, figsize=SIZES[size], **options)


def _place(name: str) -> int:
    """A place in a cycle that depends on the name alone, in every process."""
    return hashlib.blake2b(name.encode(), digest_size=2).digest()[0]


def colour(name: str) -> str:
    """The colour (hex) of a modality or method, in any case; any other name gets one of `PALETTE` by its hash."""
    key = Text("name", name).strip().lower().replace("_", " ")
    if key in METHOD_COLOURS:
        return METHOD_COLOURS[key]
    return MODALITY_COLOURS.get(key, PALETTE[_place(key) % len(PALETTE)])


def marker(name: str) -> str:
    """The plot marker of a modality or method, so that a line can be told without its colour."""
    return _MARKERS[_order(name) % len(_MARKERS)]


def _order(name: str) -> int:
    shade = colour(name)
    return PALETTE.index(shade) if shade in PALETTE else len(PALETTE) - 1


def _axes(ax: Axes | None, size: str = "normal") -> Axes:
    return cast("Axes", figure(size)[1]) if ax is None else ax


def _array(name: str, values: Any) -> np.ndarray:
    """An array of numbers; None among them is NaN."""
    try:
        x = np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
        numbers = x.astype(float) if x.dtype.kind == "O" else x
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {shown(values)}") from error
    if numbers.dtype.kind not in "fiub" or values is None:
        raise TypeError(f"{name}: expected an array of numbers, got {shown(values)}")
    return numbers


def _mix(shade: str, weight: float) -> tuple[float, float, float]:
    """``shade`` thinned with white: weight 1 is the colour itself, 0 is white."""
    rgb = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (1 - weight * (1 - x) for x in rgb)
    return r, g, b


def presence_grid(
    present: Any,
    modalities: Sequence[str] | None = None,
    ax: Axes | None = None,
    *,
    valid: Any = None,
    shade: str | None = None,
    title: str = "",
    xlabel: str | None = None,
    ylabel: str = "sample",
) -> Axes:
    """Who has what: one row a sample, one column a modality (or a frame); filled is there, white is missing.

    present : bool [n, M] with M ``modalities``, or [n, T] frames of one modality without
    valid : bool [n, T]; frames that do not exist (padding) are hatched in grey
    shade : the colour of frames; modalities have their own
    """
    from matplotlib.ticker import MaxNLocator

    mask = _array("present", present).astype(bool)
    Maybe(NAMES)("modalities", modalities)
    if mask.ndim != 2:
        raise ValueError(f"present: expected two axes, samples and modalities or frames, got shape {mask.shape}")
    n, columns = mask.shape
    if modalities is not None and len(modalities) != columns:
        raise ValueError(f"modalities: expected {columns} names, got {list(modalities)}")
    shades = [colour(m) for m in modalities] if modalities is not None else [shade or BLUE] * columns
    picture_ = np.ones((n, columns, 3))
    for column, tint in enumerate(shades):
        picture_[mask[:, column], column] = _mix(tint, 0.92)
    ax = _axes(ax)
    ax.imshow(picture_, aspect="auto", interpolation="nearest")
    if valid is not None:
        import matplotlib.pyplot as plt

        padding = ~_array("valid", valid).astype(bool)
        if padding.shape != mask.shape:
            raise ValueError(f"valid: expected shape {mask.shape}, got {padding.shape}")
        with plt.rc_context({"hatch.linewidth": 0.5, "hatch.color": GREY}):
            for i, j in np.argwhere(padding):
                ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="#eeeeee", hatch="////", lw=0))
    ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    if columns <= 60 and n <= 60:
        ax.grid(which="minor", color="#cccccc", linewidth=0.6)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color("#aaaaaa")
    if modalities is not None:
        ax.set_xticks(range(columns), list(modalities), rotation=0 if columns <= 4 else 45)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(xlabel if xlabel is not None else ("modality" if modalities is not None else "frame"))
    ax.set_ylabel(ylabel)
    ax.set_title(title)
    return ax


def bars(
    scores: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    ax: Axes | None = None,
    *,
    ylabel: str = "accuracy",
    title: str = "",
    chance: float | None = None,
    colours: Mapping[str, str] | None = None,
    labels: bool = True,
    hole: str = "not run",
) -> Axes:
    """Bars of scores, grouped: ``scores[series][g]`` is the height in group g, ``intervals[series][g]`` its whiskers.

    NaN draws no bar but the words ``hole``. ``chance`` draws a dotted line; ``labels`` prints the heights. Raises
    ValueError where a series has not one score a group.
    """
    Named(Is("numbers", object), 0)("scores", scores)
    NAMES("groups", groups)
    Maybe(Named(Is("pairs", object), 0))("intervals", intervals)
    ax = _axes(ax)
    width = 0.82 / max(len(scores), 1)
    for i, (series, heights) in enumerate(scores.items()):
        y = _array(f"scores[{series!r}]", heights).astype(float)
        if y.shape != (len(groups),):
            raise ValueError(f"scores[{series!r}]: expected {len(groups)} values, one a group, got shape {y.shape}")
        x = np.arange(len(groups)) + (i - (len(scores) - 1) / 2) * width
        tint = (colours or {}).get(series) or colour(series)
        ax.bar(x, np.nan_to_num(y), width * 0.9, color=tint, label=series)
        top = y
        if intervals is not None and series in intervals:
            ends = _array(f"intervals[{series!r}]", intervals[series]).astype(float)
            if ends.shape != (len(groups), 2):
                raise ValueError(f"intervals[{series!r}]: expected {len(groups)} pairs, got shape {ends.shape}")
            whiskers = np.abs(np.nan_to_num(np.stack([y - ends[:, 0], ends[:, 1] - y])))
            ax.errorbar(x, np.nan_to_num(y), whiskers, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5)
            top = np.fmax(y, ends[:, 1])
        for place, height, above in zip(x, y, top, strict=True):
            if np.isnan(height):
                ax.text(place, 0, f" {hole}", rotation=90, ha="center", va="bottom", fontsize=10, color="#555555")
            elif labels:
                ax.annotate(
                    f"{height:.2f}",
                    (place, above),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=10,
                )
    if chance is not None:
        ax.axhline(chance, color=GREY, linestyle=":", linewidth=1.3, label="chance")
    ax.set_xticks(range(len(groups)), list(groups))
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    ax.set_ylabel(ylabel)
    ax.set_title(title)
    if len(scores) > 1 or chance is not None:
        _legend_above(ax)
    return ax


def _legend_above(ax: Axes) -> None:
    """A legend between title and plot, where it hides nothing, in as many rows as its words need."""
    labels = ax.get_legend_handles_labels()[1]
    inches = ax.figure.get_figwidth() * ax.get_position().width  # type: ignore[union-attr]
    rows = math.ceil(sum(0.62 + 0.08 * len(label) for label in labels) / inches)
    columns = math.ceil(len(labels) / rows)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.1, columnspacing=1.2)
    if title := ax.get_title(loc="left") or ax.get_title():
        ax.set_title(title, pad=8 + 14 * math.ceil(len(labels) / columns))


def band(
    x: Sequence[float],
    mean: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    name: str = "",
    ax: Axes | None = None,
    *,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    shade: str | None = None,
) -> Axes:
    """A line with markers and, where ``low`` and ``high`` are given, the band between them.

    Call it once a series with the same ``ax``; add ``ax.legend()`` at the end.
    """
    places, line = _array("x", x).astype(float), _array("mean", mean)
    ends = [_array(what, given).astype(float) for what, given in (("low", low), ("high", high)) if given is not None]
    if places.ndim != 1 or any(y.shape != places.shape for y in (line, *ends)):
        raise ValueError(f"x, mean, low, high: expected as many numbers each, got shapes {places.shape}, {line.shape}")
    ax = _axes(ax)
    tint = shade or colour(name)
    order = PALETTE.index(tint) if tint in PALETTE else _order(name)
    style = cast("Any", _DASHES[order % len(_DASHES)])
    ax.plot(places, line, color=tint, marker=_MARKERS[order % len(_MARKERS)], ls=style, label=name or None)
    if (low is None) != (high is None):
        raise ValueError("low, high: expected both ends of the band or neither")
    if low is not None and high is not None:
        ax.fill_between(places, ends[0], ends[1], color=tint, alpha=0.18, lw=0)
    ax.grid(True)
    if xlabel:
        ax.set_xlabel(xlabel)
    if ylabel:
        ax.set_ylabel(ylabel)
    if title:
        ax.set_title(title)
    return ax


def loss_curve(
    history: Any,
    keys: Sequence[str] | None = None,
    ax: Axes | None = None,
    *,
    ylabel: str = "loss",
    title: str = "",
    best: int | None = None,
) -> Axes:
    """Numbers over epochs: ``history`` is a training History, or its list of one dict an epoch.

    keys : the entries to draw; default every number whose name contains "loss", else every number
    best : the epoch to mark; default the history's ``best_epoch``

    Raises ValueError for an empty history or an unknown key.
    """
    epochs = getattr(history, "epochs", history)
    if not isinstance(epochs, (list, tuple)) or not all(isinstance(epoch, Mapping) for epoch in epochs):
        raise TypeError(f"history: expected a History or a list of dicts, got {shown(history)}")
    Maybe(NAMES)("keys", keys)
    if not epochs:
        raise ValueError("history: expected at least one epoch")
    numbers = [k for k, v in epochs[-1].items() if isinstance(v, (int, float)) and k not in ("epoch", "seconds")]
    chosen = list(keys) if keys is not None else [k for k in numbers if "loss" in k] or numbers
    if unknown := [k for k in chosen if all(k not in e for e in epochs)]:
        raise ValueError(f"keys: {unknown} are not in the history, which has {numbers}")
    ax = _axes(ax)
    for i, key in enumerate(chosen):
        y = [float(e.get(key, np.nan)) for e in epochs]
        ax.plot(range(1, len(y) + 1), y, color=PALETTE[i % len(PALETTE)], ls=cast("Any", _DASHES[i % 8]), label=key)
    best = best if best is not None else getattr(history, "best_epoch", None)
    if best is not None and len(epochs) > 1:
        ax.axvline(best, color=GREY, linestyle=":", linewidth=1.3, label="kept epoch")
    ax.grid(True)
    ax.set_xlabel("epoch")
    ax.set_ylabel(ylabel)
    ax.set_title(title)
    ax.legend()
    return ax


def training_curves(curves: Mapping[str, Mapping[str, Any]], *, metric: str = "validation") -> Figure:
    """The training and validation curves of several methods, side by side: the mean over seeds, and their range.

    curves : method -> what `stored.Stored.curves` gives: "curve of training", "curve of validation" [seeds, epochs]
    metric : what the validation curve shows

    Raises ValueError where no method has curves.
    """
    drawn = {name: lines for name, lines in curves.items() if lines}
    if not drawn:
        raise ValueError(f"curves: expected curves of a method, got none of {list(curves)}")
    fig, axes = figure("wide", 1, 2)
    for ax, kind, ylabel in zip(axes, ("training", "validation"), ("training loss", metric), strict=True):
        for name, lines in drawn.items():
            if (found := lines.get(f"curve of {kind}")) is None:
                continue
            found = _array(f"curves[{name!r}]", found).astype(float)
            epochs = np.arange(1, found.shape[1] + 1)
            there = ~np.isnan(found).all(0)
            ax.plot(epochs[there], np.nanmean(found[:, there], 0), color=colour(name), label=name)
            low, high = (np.nanquantile(found[:, there], q, axis=0) for q in (0, 1))
            ax.fill_between(epochs[there], low, high, color=colour(name), alpha=0.15, lw=0)
        ax.grid(True)
        ax.set_xlabel("epoch")
        ax.set_ylabel(ylabel)
    _legend_above(axes[0])
    return fig


def heat_map(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    ax: Axes | None = None,
    *,
    form: str = ".2f",
    low: float | None = None,
    high: float | None = None,
    cmap: str = "cividis",
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    label: str = "",
    annotate: bool = True,
) -> Axes:
    """A matrix [len(rows), len(columns)] with its numbers printed in it; NaN cells are white and say "not run"."""
    matrix = _array("values", values).astype(float)
    NAMES("rows", rows)
    NAMES("columns", columns)
    if matrix.shape != (len(rows), len(columns)):
        raise ValueError(f"values: expected shape {(len(rows), len(columns))}, got {matrix.shape}")
    ax = _axes(ax)
    image = ax.imshow(np.ma.masked_invalid(matrix), cmap=cmap, vmin=low, vmax=high, aspect="auto")
    if annotate:
        for i, j in itertools.product(range(len(rows)), range(len(columns))):
            value = matrix[i, j]
            if np.isnan(value):
                ax.text(j, i, "not run", ha="center", va="center", fontsize=10, color="#555555")
                continue
            r, g, b, _ = image.cmap(image.norm(value))
            ink = "white" if 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.5 else INK
            ax.text(j, i, format(value, form), ha="center", va="center", fontsize=10, color=ink)
    ax.set_xticks(range(len(columns)), list(columns))
    ax.set_yticks(range(len(rows)), list(rows))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_title(title)
    if label:
        ax.figure.colorbar(image, ax=ax, label=label, shrink=0.9)
    return ax


def picture(
    values: Any, ax: Axes | None = None, *, title: str = "", cmap: str = "cividis", frames: bool = False
) -> Axes:
    """One sample of one modality as a picture: [D], [T, D], [H, W] or [C, H, W] with C = 1 or 3.

    A sequence [T, D] is drawn with time to the right when ``frames`` is set. Raises ValueError for other shapes.
    """
    x = _array("values", values)
    if x.ndim == 1:
        x = x[None]
    if x.ndim == 3:
        if x.shape[0] not in (1, 3):
            raise ValueError(f"values: expected [C, H, W] with C = 1 or 3, got shape {x.shape}")
        x = x[0] if x.shape[0] == 1 else np.moveaxis(x, 0, -1)
    if x.ndim not in (2, 3):
        raise ValueError(f"values: expected [D], [T, D], [H, W] or [C, H, W], got shape {x.shape}")
    ax = _axes(ax, "small")
    ax.imshow(x.T if frames else x, cmap=cmap, aspect="auto" if frames else "equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color("#aaaaaa")
    ax.set_title(title, fontsize=10)
    return ax


def boxes(
    nodes: Mapping[str, tuple[float, float, str]],
    arrows: Iterable[tuple[str, str] | tuple[str, str, str]] = (),
    ax: Axes | None = None,
    *,
    colours: Mapping[str, str] | None = None,
    width: float = 1.5,
    height: float = 0.62,
    title: str = "",
) -> Axes:
    """A schematic: ``nodes[name] = (x, y, text)`` are boxes of one size, ``arrows`` join them by name.

    An arrow may carry a third entry, its label. ``colours[name]`` tints a box; a box named like a modality is tinted
    by it. Raises ValueError for an arrow to a box that is not there.
    """
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    Named(Several(Is("a number or a text", int, float, str), 3, 3))("nodes", nodes)
    arrows = list(Several(Several(Text, 2, 3))("arrows", list(arrows) if isinstance(arrows, Iterable) else arrows))
    ax = _axes(ax, "wide")
    for name, (x, y, text) in nodes.items():
        known = name.lower() in MODALITY_COLOURS
        tint = (colours or {}).get(name) or (colour(name) if known else GREY)
        ax.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0.02,rounding_size=0.09",
                facecolor=to_rgba(tint, 0.16),  # the page's ground shows through
                edgecolor=tint,
                linewidth=1.4,
            )
        )
        ax.text(x, y, text, ha="center", va="center", fontsize=10)
    for start, end, *label in arrows:
        if missing := [n for n in (start, end) if n not in nodes]:
            raise ValueError(f"arrows: no box named {missing}; there are {list(nodes)}")
        (x0, y0, _), (x1, y1, _) = nodes[start], nodes[end]
        # From edge to edge: sideways where the boxes stand beside each other, else up or down.
        if abs(x1 - x0) > width:
            a, b = (x0 + np.sign(x1 - x0) * width / 2, y0), (x1 - np.sign(x1 - x0) * width / 2, y1)
        else:
            a, b = (x0, y0 + np.sign(y1 - y0) * height / 2), (x1, y1 - np.sign(y1 - y0) * height / 2)
        ax.add_patch(
            FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=11, color="#555555", lw=1.2, shrinkA=3, shrinkB=3)
        )
        if label:
            ax.text((a[0] + b[0]) / 2, (a[1] + b[1]) / 2 + 0.08, label[0], ha="center", va="bottom", fontsize=10)
    xs, ys = [p[0] for p in nodes.values()], [p[1] for p in nodes.values()]
    ax.set_xlim(min(xs) - width * 0.6, max(xs) + width * 0.6)
    ax.set_ylim(min(ys) - height, max(ys) + height)
    ax.set_aspect("equal")
    ax.axis("off")
    ax.set_title(title)
    return ax


def reliability(
    confidence: Sequence[float],
    accuracy: Sequence[float],
    count: Sequence[int] | None = None,
    name: str = "",
    ax: Axes | None = None,
    *,
    title: str = "",
    least: int = 1,
) -> Axes:
    """A reliability diagram: accuracy over confidence by bin, against the diagonal of perfect calibration.

    The arguments are what `mmlib.metrics.reliability_bins` returns; bins with fewer than ``least`` samples are left
    out, and discs show the others' shares of all samples.
    """
    Whole(0)("least", least)
    x, y = _array("confidence", confidence).astype(float), _array("accuracy", accuracy).astype(float)
    size = None if count is None else _array("count", count).astype(float)
    if x.ndim != 1 or x.shape != y.shape or (size is not None and size.shape != x.shape):
        raise ValueError(f"confidence, accuracy, count: expected as many numbers each, got {x.shape} and {y.shape}")
    ax = _axes(ax, "square")
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.3, label="calibrated")
    keep = np.isfinite(x) & np.isfinite(y)
    if size is not None:
        keep &= size >= least
    tint = colour(name)
    ax.plot(x[keep], y[keep], color=tint, marker=marker(name), label=name or None)
    if size is not None:
        share = size[keep] / max(size.sum(), 1)
        ax.scatter(x[keep], y[keep], s=20 + 500 * share, color=tint, alpha=0.3, lw=0)
    ax.set_xlim(0, 1.03)
    ax.set_ylim(0, 1.03)
    ax.grid(True)
    ax.set_xlabel("confidence (mean predicted probability)")
    ax.set_ylabel("accuracy")
    ax.set_title(title)
    ax.legend(loc="upper left")
    return ax
