"""The pages around the chapters: their code runs, their tables are complete and up to date."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest

from book.support import build
from mmlib import data

ROOT = build.ROOT
PAGE = re.compile(r"[\w/-]+(#[\w-]+)?")


def blocks(page: Path, language: str = "python") -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))


def changed(code: str, diff: str) -> str:
    """The code with the lines of a diff: each + in place of the - before it."""
    lines = diff.splitlines()
    for old, new in zip(lines[::2], lines[1::2], strict=True):
        assert (old[0], new[0]) == ("-", "+")
        assert code.count(old[1:] + "\n") == 1, old
        code = code.replace(old[1:], new[1:])
    return code


def test_the_diff_of_the_readme_runs() -> None:
    code = changed(blocks(ROOT / "README.md"), blocks(ROOT / "README.md", "diff"))
    namespace: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert type(namespace["model"]).__name__ == "MCE"
    assert tuple(namespace["logits"].shape) == (56, 5)


@pytest.mark.parametrize("page", ["book/your-data.md", "book/your-encoder.md", "book/architecture.md", "README.md"])
def test_the_code_on_the_page_runs(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a page saves its model
    namespace: dict[str, object] = {}
    exec(compile(blocks(ROOT / page), page, "exec"), namespace)
    said = capsys.readouterr().out
    if page == "book/your-data.md":
        assert "sample 150 has NaN values" in said
        assert "face only" in said
        assert "{'classes': ['calm', 'cross', 'glad']}\n" in said
        assert said.endswith("torch.Size([80, 3])\n")
    elif page == "book/your-encoder.md":
        for method in ("MCE", "BALM", "DREAM", "DEAR"):
            assert f"{method} [60, 3]\n" in said
        assert said.endswith("True\n{'words': True, 'voice': True, 'face': False}\n")
    elif page == "book/architecture.md":
        assert said.endswith("language+audio+vision accuracy 200\n")
        train = data.load("synthetic", sizes=(20, 5, 5))["train"]
        net = namespace["MeanBackbone"].for_data(train)  # type: ignore[attr-defined]
        assert net(train[:]).shape == (20, train.info["outputs"])
    else:
        assert tuple(namespace["logits"].shape) == (56, 5)  # type: ignore[attr-defined]


ALONE = """
import io, runpy, sys, traceback
from contextlib import redirect_stdout
from pathlib import Path

for script in sorted(Path(".").glob("*.py")):
    with redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_path(str(script), run_name="__main__")  # each in an empty namespace
        except BaseException:
            said.write(traceback.format_exc())
    script.with_suffix(".txt").write_text(said.getvalue())
"""
USE_IT = [
    (f"{path.stem}-{i}", cell)
    for path in build.chapters()
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells)
    if "use-it" in cell.metadata.get("tags", [])
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cells "Use it in your project" print when each is all that there is in a script."""
    folder = tmp_path_factory.mktemp("alone")
    for name, cell in USE_IT:
        (folder / f"{name}.py").write_text(cell.source, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("name", "cell"), USE_IT, ids=[name for name, _ in USE_IT])
def test_a_cell_for_your_project_runs_alone_and_prints_what_the_page_shows(name: str, cell: Any, alone: Path) -> None:
    shown = "".join(o.text for o in cell.outputs if o.output_type == "stream")
    assert (alone / f"{name}.txt").read_text() == shown


def test_every_chapter_has_such_a_cell() -> None:
    chapters = [path for path in build.chapters() if path.parent.name != "evidence"]
    assert {name.rpartition("-")[0] for name, _ in USE_IT} == {path.stem for path in chapters}
    for path in chapters:
        after = [c.source for c in nbformat.read(path, as_version=4).cells if "## Use it in your project" in c.source]
        assert len(after) == 1
        assert "```python" not in after[0], "code to copy is a cell, which is run"


COVERED = {"partly", "done", "redrawn", "on the paper's data", "analogue", "audited"}


def rows() -> list[dict[str, str]]:
    with (ROOT / "book" / "coverage.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labels(page: str) -> set[str]:
    """Every label that a page defines: sections, equations, figures, directives' names."""
    source = ROOT / "book" / page
    if source.with_suffix(".ipynb").exists():
        notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
        names = {c.metadata.get("mystnb", {}).get("figure", {}).get("name") for c in notebook.cells}
    else:
        text, names = source.with_suffix(".md").read_text(encoding="utf-8"), set()
    found = re.findall(r"^\(([\w-]+)\)=", text, re.M) + re.findall(r"\$\$ ?\(([\w-]+)\)", text)
    found += re.findall(r"^:(?:name|label): *([\w-]+)", text, re.M)
    return {*found, *filter(None, names)}


def test_every_item_of_the_papers_has_its_row() -> None:
    found = rows()
    assert Counter(row["paper"] for row in found) == {"DREAM": 8, "DEAR": 15, "BALM": 10, "MCE": 14}
    assert len({(row["paper"], row["item"]) for row in found}) == len(found)
    numbers = {paper: " ".join(r["item"] for r in found if r["paper"] == paper) for paper in ("DREAM", "DEAR", "MCE")}
    for paper, tables in (("DREAM", [1, 2, 3]), ("DEAR", [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]), ("MCE", range(1, 9))):
        for n in tables:
            assert re.search(rf"\b(?:Tables? |and ){n}\b", numbers[paper]), f"{paper}, Table {n}"


def test_every_row_says_where_it_is_covered() -> None:
    for row in rows():
        words = set(row["status"].split(", "))
        assert words <= COVERED | {"planned", "not planned", "not run"}, row
        assert bool(row["page"]) == bool(words & COVERED), row
        if row["page"]:
            assert PAGE.fullmatch(row["page"]), row
            page, _, label = row["page"].partition("#")
            assert f"book/{page}" in build.contents(), row
            assert not label or label in labels(page), f"{row}: the page has {sorted(labels(page))}"


def test_the_status_page_is_up_to_date() -> None:
    page = build.SPEED.read_text(encoding="utf-8")
    assert build.status_table() in page, "run python -m book.support.build status"
    assert build.speed_table() in page, "run python -m book.support.build status"
    assert build.coverage_table() in build.STATUS.read_text(encoding="utf-8"), "run python -m book.support.build status"
    chapters = [p for p in build.chapters() if p.relative_to(ROOT).with_suffix("").as_posix() in build.contents()]
    assert all(f"`{p.relative_to(ROOT / 'book').with_suffix('').as_posix()}`" in page for p in chapters)


def test_the_license_covers_code_and_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert "CC BY 4.0" in text


def test_the_readme_shows_a_picture_that_is_there() -> None:
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).stat().st_size < 300_000


def test_the_names_beside_the_papers_symbols_exist() -> None:
    page = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    part = page[page.index("## Missing modalities and distances") : page.index("(sec-notation-collisions)=")]
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "mmlib").rglob("*.py"))
    for name in re.findall(r"`([^`]+)`", part):
        for word in re.findall(r"[A-Za-z_]\w+", name):
            assert re.search(rf"\b{word}\b", code), f"notation.md: {name}"
