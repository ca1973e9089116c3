"""Every chapter runs under papermill with another parameter than its own, and refuses what it does not know."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from book.support import build

CHAPTERS = [pytest.param(p, id=p.stem) for p in build.chapters()]


def fingerprints(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*.csv") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_runs_with_another_seed_in_the_tiny_profile(chapter: Path, tmp_path: Path) -> None:
    before = fingerprints(build.ROOT / "book")
    target = tmp_path / chapter.name
    build.run(chapter, target, cwd=chapter.parent, timeout=240, profile="tiny", seeds=[1])
    notebook = nbformat.read(target, as_version=4)
    injected = [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert len(injected) == 1
    assert "[1]" in injected[0].source
    assert not [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert fingerprints(build.ROOT / "book") == before, "a tiny run may not touch stored results"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_an_unknown_parameter_is_refused(chapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(chapter.parent)
    cells = [c for c in nbformat.read(chapter, as_version=4).cells if c.cell_type == "code"]
    (parameters,) = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    begins = next(c.source for c in cells if "chapter.begin(" in c.source)
    namespace: dict[str, object] = {}
    exec(parameters, namespace)
    with pytest.raises(ValueError, match=r"no_such_parameter.*this chapter knows"):
        exec(begins, {**namespace, "no_such_parameter": 1})


@pytest.mark.parametrize(("name", "value"), [("profile", "huge"), ("seeds", "0"), ("no_such_parameter", 1)])
def test_a_parameter_out_of_range_is_refused_under_papermill(name: str, value: object, tmp_path: Path) -> None:
    chapter = build.chapters()[0]
    with pytest.raises(PapermillExecutionError, match=name):
        build.run(chapter, tmp_path / chapter.name, cwd=chapter.parent, **{name: value})


def bootstraps() -> dict[str, str]:
    """The lines of each chapter that find the repository."""
    found = {}
    for path in build.chapters():
        cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        found[path.stem] = next(s for s in cells if "import chapter\n" in s).partition("\n\nsetup")[0]
    return found


def test_every_chapter_finds_the_repository_by_the_same_lines() -> None:
    assert len({ast.dump(ast.parse(lines)) for lines in bootstraps().values()}) == 1


def clone(folder: Path) -> Path:
    """What a clone is known by."""
    (folder / "mmlib").mkdir(parents=True)
    (folder / "book" / "methods").mkdir(parents=True)
    (folder / "book" / "support").mkdir()
    (folder / "book" / "support" / "chapter.py").touch()
    return folder


@pytest.mark.parametrize("way", ["variable", "notebook", "working folder", "environment", "variable first", "nowhere"])
def test_the_repository_is_found_from_outside(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, other = clone(tmp_path / "here"), clone(tmp_path / "other")
    (tmp_path / "mmlib").mkdir()  # a folder of this name is not enough
    monkeypatch.delenv("MMLIB_HOME", raising=False)
    monkeypatch.setattr(sys, "prefix", str(here / ".venv" if way == "environment" else tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(here / "book" / "methods" if way == "working folder" else tmp_path)
    if way.startswith("variable"):
        monkeypatch.setenv("MMLIB_HOME", str(here / "book") if way == "variable" else str(here))
    namespace: dict[str, object] = {}
    if way in ("notebook", "variable first"):
        namespace["PAPERMILL_INPUT_PATH"] = f"{'here' if way == 'notebook' else 'other'}/book/methods/mce.ipynb"
    lines = bootstraps()["mce"]
    if way == "nowhere":
        with pytest.raises(SystemExit, match=r"^The book's clone was not found: .*--cwd.*MMLIB_HOME.*\.$"):
            exec(lines, namespace)
    else:
        exec(lines, namespace)
        assert sys.path[0] == str(here)
    assert str(other) not in sys.path


@pytest.mark.parametrize("home", [True, False])
def test_papermill_from_a_folder_outside(home: bool, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.prefix = sys.base_prefix")  # no clone above it
    environment = {k: v for k, v in os.environ.items() if k != "MMLIB_HOME"} | {"PYTHONPATH": str(tmp_path)}
    if home:
        environment["MMLIB_HOME"] = str(build.ROOT)
    command = [sys.executable, "-m", "papermill", str(build.chapters()[0]), "out.ipynb", "-p", "seeds", "one"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    if home:
        assert (
            said == "TypeError: seeds: expected a list or tuple of at least 1, each an integer of at least 0, got 'one'"
        )
    else:
        assert said.startswith("SystemExit: The book's clone was not found: set papermill's --cwd or MMLIB_HOME to it.")
