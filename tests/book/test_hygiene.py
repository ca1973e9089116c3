"""What a committed chapter may not hold, and what importing the library may not do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from book.support import build

ROOT = build.ROOT
CHAPTERS = [pytest.param(p, id=p.stem) for p in build.chapters()]
COMMON = ["dataset", "data_root", "profile", "seeds", "device", "results_dir"]
MACHINE = re.compile(
    r"/(?:home|root|work|tmp|Users|mnt|opt|var)/[\w./-]+|[A-Z]:\\\\|\b\d{1,3}(?:\.\d{1,3}){3}\b|localhost"
)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def outputs_as_text(cell: Any) -> str:
    texts = []
    for output in cell.get("outputs", []):
        texts.append(output.get("text", ""))
        texts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join("".join(t) if isinstance(t, list) else t for t in texts)


def test_the_table_of_contents_and_the_chapters_agree() -> None:
    named = {ROOT / f"{page}.ipynb" for page in build.contents()}
    assert set(build.chapters()) <= named
    assert all(any((ROOT / f"{p}{end}").exists() for end in (".md", ".ipynb")) for p in build.contents())


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_outputs_are_those_of_one_clean_run(chapter: Path) -> None:
    notebook = read(chapter)
    nbformat.validate(notebook)
    assert build.problems(notebook) == []
    assert any(cell.get("outputs") for cell in notebook.cells), "nothing was executed"
    assert notebook.metadata.kernelspec.name == "python3"
    assert chapter.stat().st_size < 1_000_000


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_outputs_say_nothing_of_the_machine(chapter: Path) -> None:
    for i, cell in enumerate(read(chapter).cells):
        assert not (found := MACHINE.findall(outputs_as_text(cell))), f"cell {i}: {found}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_parameter_is_seen_by_papermill(chapter: Path) -> None:
    import papermill

    cells = [c for c in read(chapter).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    lines = [line for line in cells[0].source.splitlines() if line.strip()]
    assert all("#" in line for line in lines), "each parameter says after a # what it means"
    assigned = [t.id for node in ast.parse(cells[0].source).body for t in _targets(node)]
    assert assigned[:6] == COMMON
    seen = papermill.inspect_notebook(str(chapter))
    assert list(seen) == assigned
    assert all(seen[name]["help"] for name in assigned)
    typed = {name for name in assigned if seen[name]["inferred_type_name"] != "None"}
    assert typed == {name for name in assigned if seen[name]["default"] != "None"}  # None: the budget's type


def _targets(node: ast.stmt) -> list[ast.Name]:
    if isinstance(node, ast.Assign):
        return [t for t in node.targets if isinstance(t, ast.Name)]
    assert isinstance(node, ast.AnnAssign), f"only literals, got {ast.unparse(node)}"
    assert isinstance(node.target, ast.Name)
    return [node.target]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_pictures_have_an_alternative_text(chapter: Path) -> None:
    for i, cell in enumerate(read(chapter).cells):
        if any(shows_a_picture(o.get("data", {})) for o in cell.get("outputs", [])):
            notes = cell.metadata.get("mystnb", {})
            hidden = {"remove-output", "remove-cell"} & set(cell.metadata.get("tags", []))
            assert hidden or (notes.get("image", {}).get("alt") and notes.get("figure", {}).get("caption")), f"cell {i}"


PRINTED = re.compile(r"print\([^\n]*(to_string\(|DataFrame\()|\bdisplay\(|^\s*show\(", re.M)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_page_is_short_cells_rendered_tables_and_one_card(chapter: Path) -> None:
    name = chapter.relative_to(ROOT).with_suffix("").as_posix()
    faults = page_faults(read(chapter), name)
    assert not faults, "\n".join(faults)


def page_faults(notebook: Any, name: str) -> list[str]:
    """What on a page is longer, wider or plainer than the book has it."""
    faults, code = [], [(i, c) for i, c in enumerate(notebook.cells) if c.cell_type == "code"]
    for i, cell in code:
        lines = cell.source.splitlines()
        if len(lines) > 40:
            faults.append(f"cell {i}: {len(lines)} lines, at most 40")
        if wide := [line for line in lines if len(line) > 88]:
            faults.append(f"cell {i}: {len(wide)} lines wider than 88 columns, such as {wide[0].strip()[:60]!r}")
        if PRINTED.search(cell.source) or prints_a_frame(cell):
            faults.append(f"cell {i}: a printed frame; book.support.tables renders")
    if name.startswith("book/methods/") and len(notebook.cells) > 50:
        faults.append(f"{len(notebook.cells)} cells, at most 50")
    openings = [c for _, c in code if "opening" in c.metadata.get("tags", [])]
    shown = outputs_as_text(openings[0]) if len(openings) == 1 else ""
    if "Card:" not in shown:
        faults.append(f"{len(openings)} cells tagged `opening` that show a card, expected one")
    if not name.startswith("book/foundations/") and "Verdict:" not in shown:
        faults.append("no verdict at the top")
    return faults


def prints_a_frame(cell: Any) -> bool:
    """A data frame as Jupyter shows it, or printed: three lines and more of one width, in columns."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if 'class="dataframe"' in "".join(data.get("text/html", "")):
            return True
        plain = "".join(output.get("text", "") or ("" if "text/html" in data else data.get("text/plain", "")))
        lines = plain.splitlines()
        for three in zip(lines, lines[1:], lines[2:], strict=False):
            same = len({len(line) for line in three}) == 1 and len(three[0]) > 15
            if same and all(len(re.split(r"\s{2,}", line.strip())) > 2 for line in three[1:]):
                return True
    return False


def shows_a_picture(data: Any) -> bool:
    """A PNG, or an SVG that does not say itself what it shows."""
    return "image/png" in data or '<svg role="img" viewBox' in "".join(data.get("text/html", ""))


def _names_used(chapter: Path) -> list[str]:
    """``from mmlib.x import y`` and ``import mmlib.x`` of a chapter, as dotted names."""
    names = []
    for cell in read(chapter).cells:
        if cell.cell_type != "code":
            continue
        source = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmlib":
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names += [alias.name for alias in node.names if alias.name.split(".")[0] == "mmlib"]
    return sorted(set(names))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_name_of_the_library_that_a_chapter_uses_exists(chapter: Path) -> None:
    import pkgutil

    names = _names_used(chapter)
    assert names, "a chapter shows the library at work"
    for name in names:
        assert pkgutil.resolve_name(name) is not None


SILENT = """
import importlib, json, random, sys
import matplotlib, numpy, torch

def state():
    drawn = [torch.get_rng_state().tolist(), str(numpy.random.get_state()), str(random.getstate())]
    return [*drawn, dict(matplotlib.rcParams)]

def listen(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].endswith((".py", ".pyc")):
        if "__pycache__" not in arguments[0]:
            opened.append([arguments[0], arguments[1] or "r"])

before, opened = state(), []
sys.addaudithook(listen)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps({"same": [a == b for a, b in zip(before, state())], "opened": opened}))
"""


def test_importing_the_library_draws_no_number_opens_no_file_and_sets_no_style() -> None:
    modules = ["mmlib"]
    for file in sorted((ROOT / "mmlib").rglob("*.py")):
        inside = file.relative_to(ROOT).with_suffix("")
        modules.append(".".join(inside.parts).removesuffix(".__init__"))
    done = subprocess.run(
        [sys.executable, "-c", SILENT, *modules], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["same"] == [True] * 4
    assert done.stdout.count("\n") == 1, "importing prints nothing"
    # libraries may look at their own files; ours opens none for itself, and nobody writes
    ours = [path for path, mode in said["opened"] if str(ROOT) in path and ".venv" not in path]
    assert not ours
    assert not [p for p, mode in said["opened"] if set(mode) & set("wax+") and not p.startswith(("/dev/", "/proc/"))]
