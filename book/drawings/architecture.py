"""The pictures of the page on the architecture: the layers, drawn from the imports, and the path of a batch."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmlib
from book.support import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PLACES", "chapters", "imports", "layers", "needed", "path"]

LIBRARY = Path(mmlib.__file__).parent
PLACES: dict[str, tuple[float, float]] = {  # an import goes to a lower box, or along a line of them
    "sklearn": (5.0, 9.2),
    "baselines": (1.5, 7.8),
    "released": (4.0, 7.8),
    "methods": (2.75, 6.6),
    "backbones": (1.9, 5.4),
    "coalitions": (1.5, 4.1),
    "gradients": (4.1, 4.1),
    "losses": (6.9, 5.4),
    "layers": (3.0, 2.7),
    "batch": (3.0, 1.4),
    "missing": (8.9, 3.4),
    "training": (8.9, 7.8),
    "statistics": (6.4, 7.8),
    "metrics": (6.4, 6.6),
    "checkpoint": (11.6, 7.8),
    "data": (11.6, 6.6),
}
WIDTH, HEIGHT = 2.2, 0.62  # of a box
CORE = {
    "methods",
    "released",
    "baselines",
    "backbones",
    "coalitions",
    "gradients",
    "missing",
    "losses",
    "layers",
    "batch",
}
FLOOR = {"checks", "files"}  # what everything stands on; not drawn
INSIDE = {"_arrays": "batch", "_streams": "batch", "_prediction": "training"}  # drawn in the box that names them
STEPS = (
    ("a file", "data.load"),
    ("a data set", "MultimodalDataset"),
    ("a mask", "MissingPlan"),
    ("mini-batches", "training.fit"),
    ("losses", "method(batch)"),
    ("predictions", "training.predict"),
    ("scores", "metrics"),
    ("results", "results.append"),
    ("comparisons", "verdicts.judge"),
    ("a table", "tables.show"),
)


# What to read before what: a chapter by the name of its file, its place, its box
CHAPTERS: dict[str, tuple[float, float, str]] = {
    "missing-modalities": (0.0, 4.7, "1 Missing\nmodalities"),
    "imbalance": (3.2, 6.2, "2 Imbalance"),
    "shapley-values": (3.2, 4.7, "3 Shapley\nvalues"),
    "distances": (3.2, 3.3, "4 Distances"),
    "data-and-metrics": (3.2, 1.7, "5 Data and\nmetrics"),
    "balm": (6.4, 6.2, "9 BALM"),
    "mce": (6.4, 5.2, "6 MCE"),
    "dream": (6.4, 4.2, "7 DREAM"),
    "dear": (6.4, 3.3, "8 DEAR"),
    "evidence": (9.8, 3.0, "evidence,\na page a paper"),
}
BEFORE = {
    **dict.fromkeys(("imbalance", "shapley-values", "distances", "data-and-metrics"), ("missing-modalities",)),
    "balm": ("imbalance",),
    "mce": ("shapley-values",),
    "dream": ("shapley-values",),
    "dear": ("distances",),
    "evidence": ("balm", "mce", "dream", "dear", "data-and-metrics"),
}


def unit(module: tuple[str, ...]) -> str:
    """The box that a module stands in: ("methods", "released", "mce") is in "released", ("data", "text") in "data"."""
    return "released" if module[:2] == ("methods", "released") else INSIDE.get(module[0], module[0])


def imports() -> set[tuple[str, str]]:
    """Who imports whom, box by box, as the files of `mmlib` say; imports for type checkers do not count."""
    found = set()
    for file in LIBRARY.rglob("*.py"):
        parts = file.relative_to(LIBRARY).with_suffix("").parts
        if parts == ("__init__",) or file.name == "__init__.py":  # they only name what is inside
            continue
        for node in _statements(ast.parse(file.read_text(encoding="utf-8"))):
            base = (*parts[: len(parts) - node.level], *(node.module.split(".") if node.module else ()))
            targets = [base] if base else [(alias.name,) for alias in node.names]
            if base and not (LIBRARY.joinpath(*base).with_suffix(".py").exists()):
                targets = [(*base, alias.name) for alias in node.names]
            found |= {(unit(parts), unit(target)) for target in targets}
    return {(a, b) for a, b in found if a != b and not {a, b} & FLOOR and {a, b} <= set(PLACES)}


def _statements(tree: ast.AST) -> list[ast.ImportFrom]:
    """Relative imports, inside functions too, but not under ``if TYPE_CHECKING``."""
    found: list[ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(node)
        found += _statements(node)
    return found


def needed(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no chain of others says already."""
    below: dict[str, set[str]] = {}
    for a, b in arrows:
        below.setdefault(a, set()).add(b)

    def reach(start: str, seen: set[str]) -> set[str]:
        for one in below.get(start, ()):
            if one not in seen:
                seen.add(one)
                reach(one, seen)
        return seen

    return {(a, b) for a, b in arrows if not any(b in reach(c, set()) for c in below[a] if c != b)}


def layers() -> Figure:
    """The library's parts from top to bottom, and the imports between them. Raises ValueError for one that goes up."""
    fig, ax = figures.figure("page")
    fig.set_figheight(5.6)
    for a, b in sorted(needed(imports())):
        if PLACES[a][1] < PLACES[b][1]:
            raise ValueError(f"mmlib: {a} imports {b}, which stands above it")
        _arrow(ax, PLACES[a], PLACES[b])
    for name, (x, y) in PLACES.items():
        files = sum(_inside(file) == name for file in LIBRARY.rglob("*.py") if file.name != "__init__.py")
        text = name if files == 1 else f"{name} ({files})"
        _box(ax, x, y, text, figures.BLUE if name in CORE else figures.AMBER)
    ax.text(6.0, 1.4, "blue: the core, PyTorch alone; (n): files", color=figures.BLUE, va="center", fontsize=10)
    ax.text(6.0, 0.9, "amber: around it, scientific Python", color=figures.AMBER, va="center", fontsize=10)
    return _framed(fig, ax, (0.3, 12.8), (0.6, 9.6))


def _inside(file: Path) -> str:
    return unit(file.relative_to(LIBRARY).with_suffix("").parts)


def path() -> Figure:
    """From a file to a table: what each step is called, and what does it."""
    fig, ax = figures.figure("page")
    fig.set_figheight(2.5)
    half = len(STEPS) // 2
    place = [(1.3 + 2.75 * (k if k < half else 2 * half - 1 - k), 2.0 if k < half else 0.0) for k in range(len(STEPS))]
    for start, end in zip(place, place[1:], strict=False):
        _arrow(ax, start, end)
    for (x, y), (what, how), above in zip(place, STEPS, [True] * half + [False] * half, strict=True):
        _box(ax, x, y, what, figures.GREEN)
        ax.text(x, y + (0.55 if above else -0.55), how, ha="center", va="center", fontsize=10, family="monospace")
    return _framed(fig, ax, (-0.1, 13.8), (-0.9, 2.9))


def chapters() -> Figure:
    """What to read before what."""
    fig, ax = figures.figure("page")
    fig.set_figheight(3.6)
    for name, earlier in BEFORE.items():
        for one in earlier:
            (x, y), (to, level) = CHAPTERS[one][:2], CHAPTERS[name][:2]  # from the right side to the left one
            _draw_arrow(ax, (x + WIDTH / 2, y), (to - WIDTH / 2, level))
    for x, y, text in CHAPTERS.values():
        edge = {0.0: figures.AMBER, 3.2: figures.AMBER, 6.4: figures.BLUE}.get(x, figures.GREEN)
        _box(ax, x, y, text, edge)
    return _framed(fig, ax, (-1.4, 11.2), (1.3, 6.6))


def _box(ax: Axes, x: float, y: float, text: str, edge: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape, corner = "round,pad=0,rounding_size=0.1", (x - WIDTH / 2, y - HEIGHT / 2)
    ax.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=shape, facecolor="none", edgecolor=edge, linewidth=1.6))
    ax.text(x, y, text, ha="center", va="center", fontsize=10)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From border to border, on the line between the middles."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    cut = min(WIDTH / 2 / abs(dx) if dx else 9.0, HEIGHT / 2 / abs(dy) if dy else 9.0)
    _draw_arrow(ax, (start[0] + cut * dx, start[1] + cut * dy), (end[0] - cut * dx, end[1] - cut * dy))


def _draw_arrow(ax: Axes, a: tuple[float, float], b: tuple[float, float]) -> None:
    from matplotlib.patches import FancyArrowPatch

    arrow: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 10,
        "color": "#555555",
        "lw": 1,
        "shrinkA": 1,
        "shrinkB": 1,
    }
    ax.add_patch(FancyArrowPatch(a, b, **arrow))


def _framed(fig: Figure, ax: Axes, x: tuple[float, float], y: tuple[float, float]) -> Figure:
    ax.set_xlim(*x)
    ax.set_ylim(*y)
    ax.axis("off")
    return fig
