"""The library's layers: imports go down only, never sideways between files of a kind, never to a private name.

The arrows are parsed, not imported: those inside functions count, those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mmlib

ROOT = Path(mmlib.__file__).parent

LAYERS: list[tuple[str, ...]] = [  # from the top; a module belongs to the longest of these names that it begins with
    ("sklearn",),
    ("training", "checkpoint", "statistics"),
    ("_prediction",),
    ("data", "metrics"),
    ("baselines", "methods.released"),
    ("methods",),
    ("backbones",),
    ("coalitions", "gradients"),
    ("missing",),
    ("losses", "layers"),
    ("batch",),
    ("_streams",),
    ("_arrays",),
    ("checks", "files"),
]
KINDS = ("methods", "methods.released", "baselines", "data", "backbones")  # whose files do not import each other
# What the files of a kind stand on: base classes, helpers that several use. Private modules (`_x.py`) are such helpers.
FLOORS = {"backbones.base", "backbones.dialogue", "backbones.sequences", "data.pickles"}
TOGETHER = {
    ("backbones.mmdfn", "backbones.mmgcn"),  # MM-DFN is MMGCN with more layers and a net per speaker
    ("training", "checkpoint"),  # the loop, and what it saves
}
OUTSIDE = {
    "pandas",
    "joblib",
    "filelock",
    "matplotlib",
    "papermill",
    "IPython",
    "book",
}  # the book's, not the library's

LINES = {"methods": 450, "methods.released": 450, "baselines": 200}  # at most, in a file of the kind


class Arrow(NamedTuple):
    source: str
    target: str
    name: str
    line: int


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements anywhere, but not under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from imports(node)


def arrows() -> Iterator[Arrow]:
    for source, path in MODULES.items():
        package = path.relative_to(ROOT).parts[:-1]
        for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                target = inner if inner in MODULES else ".".join(base)
                yield Arrow(source, target, "" if inner in MODULES else alias.name, node.lineno)


ARROWS = list(arrows())


def layer(module: str) -> tuple[int, str]:
    """(place from the top, name) of the layer that a module belongs to."""
    known = [
        (len(name), place, name)
        for place, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert known, f"mmlib/{module.replace('.', '/')}.py belongs to no layer; give it one here and in the design"
    return max(known)[1:]


def floor(module: str) -> bool:
    """Whether the files of a kind may stand on it."""
    return module in FLOORS or module.rpartition(".")[2].startswith("_")


def collects(module: str) -> bool:
    """Whether it is a package's ``__init__``, which names what is inside."""
    return MODULES[module].name == "__init__.py"


def inside(arrow: Arrow) -> bool:
    """From a package's ``__init__`` to what is in the package; of the whole library, to everything."""
    return collects(arrow.source) and (not arrow.source or arrow.target.startswith(f"{arrow.source}."))


def shown(wrong: list[Arrow]) -> str:
    return "\n".join(f"mmlib.{a.source}, line {a.line}: imports {a.name} of mmlib.{a.target}" for a in wrong)


def test_there_are_arrows() -> None:
    assert len({(a.source, a.target) for a in ARROWS}) > 60
    assert {a.target for a in ARROWS} >= {"batch", "backbones.base", "layers"}


def test_imports_go_down_only() -> None:
    wrong = [a for a in ARROWS if not inside(a) and layer(a.target)[0] < layer(a.source)[0]]
    assert not wrong, shown(wrong)


def test_nothing_is_imported_sideways() -> None:
    wrong = []
    for a in ARROWS:
        if inside(a) or a.source == a.target or (a.source, a.target) in TOGETHER:
            continue
        here, there = layer(a.source), layer(a.target)
        if here[0] != there[0]:
            continue
        if here[1] != there[1] or (here[1] in KINDS and not floor(a.target)):
            wrong.append(a)
    assert not wrong, shown(wrong)


def test_floors_stand_on_floors() -> None:
    wrong = [a for a in ARROWS if floor(a.source) and layer(a.target) == layer(a.source) and not floor(a.target)]
    assert not wrong, shown(wrong)


def test_no_private_name_is_imported() -> None:
    wrong = [a for a in ARROWS if a.name.startswith("_") and a.source != a.target]
    assert not wrong, shown(wrong)


def test_private_modules_stay_in_their_package() -> None:
    private = [a for a in ARROWS if a.target.rpartition(".")[2].startswith("_")]
    wrong = [a for a in private if not a.source.startswith(a.target.rpartition(".")[0])]
    assert not wrong, shown(wrong)


def test_files_are_short() -> None:
    found = {}
    for module, path in MODULES.items():
        kind = layer(module)[1] if module else ""
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > LINES.get(kind, count):
            found[module] = count
    assert not found


@pytest.mark.slow
def test_the_library_needs_none_of_the_books_packages() -> None:
    """Every module is imported where these packages are not there."""
    script = f"import sys\nfor name in {sorted(OUTSIDE)}: sys.modules[name] = None\n"
    script += "".join(f"import mmlib.{m}\n" for m in MODULES if m and m != "sklearn")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_module_imports_the_books_packages_at_its_top() -> None:
    wrong = []
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{module}: {name}" for name in names if name.partition(".")[0] in OUTSIDE]
    assert not wrong, wrong
