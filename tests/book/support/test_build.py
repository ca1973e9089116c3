"""book/support/build.py: executing copies, cleaning notebooks, refreshing them whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.exceptions import PapermillExecutionError

from book.support import api, build


def chapter(path: Path, *sources: str) -> Path:
    cells = [new_markdown_cell("# A chapter"), *[new_code_cell(s) for s in sources]]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": build.KERNEL}), path)
    return path


def printed(notebook: Any) -> list[str]:
    return [o.text for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "stream"]


def test_execute_fills_the_copies(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copies = [chapter(tmp_path / f"{n}.ipynb", f"import mmlib\nprint({n})") for n in (1, 2)]
    build.execute(copies)
    assert [printed(nbformat.read(c, as_version=4)) for c in copies] == [["1\n"], ["2\n"]]
    assert "[2/2]" in capfd.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.ipynb", "2.ipynb"]


def test_execute_stops_at_a_failing_cell_and_keeps_the_partial_notebook(tmp_path: Path) -> None:
    copy = chapter(tmp_path / "broken.ipynb", "print('so far')", "1 / 0", "print('never')")
    with pytest.raises(
        SystemExit, match=r"(?s)broken failed: cell \[2\] raised ZeroDivisionError.*1 / 0.*running"
    ) as it:
        build.execute([copy])
    partial = next(Path(tmp_path).glob("*.running.ipynb"))
    assert str(partial) in str(it.value)
    assert "so far\n" in printed(nbformat.read(partial, as_version=4))


def test_refresh_rewrites_a_chapter_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "STATUS", tmp_path / "none.md")
    monkeypatch.setattr(build, "SPEED", tmp_path / "none.md")
    file = chapter(tmp_path / "a.ipynb", "x = 1\nprint( x )", "")
    build.refresh([file])
    notebook = nbformat.read(file, as_version=4)
    assert build.problems(notebook) == []
    assert printed(notebook) == ["1\n"]
    assert notebook.cells[1].source == "x = 1\nprint(x)", "formatted"
    assert len(notebook.cells) == 2, "empty cells are gone"
    text = file.read_text()
    assert "papermill" not in text
    assert notebook.metadata.language_info == {"name": "python"}
    assert list(tmp_path.iterdir()) == [file]
    build.refresh([file])
    assert file.read_text() == text, "refreshing again changes nothing"


@pytest.mark.parametrize("source", ["import sys\nprint('oh', file=sys.stderr)", "raise SystemError('no')"])
def test_refresh_leaves_the_file_alone_when_something_is_wrong(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "STATUS", tmp_path / "none.md")
    monkeypatch.setattr(build, "SPEED", tmp_path / "none.md")
    file = chapter(tmp_path / "b.ipynb", source)
    before = file.read_bytes()
    with pytest.raises(SystemExit if "stderr" in source else PapermillExecutionError, match=r"stderr|SystemError"):
        build.refresh([file])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_problems_names_what_is_wrong() -> None:
    error = new_output("error", ename="ValueError", evalue="no", traceback=[])
    late = new_code_cell("1", execution_count=7, outputs=[error])
    injected = new_code_cell("x = 1", execution_count=1, metadata={"tags": ["injected-parameters"]})
    notebook = new_notebook(cells=[injected, late], metadata={"papermill": {}})
    found = "\n".join(build.problems(notebook))
    for said in ("papermill added it", "ValueError: no", "[1, 7], expected 1 to 2", "metadata.papermill"):
        assert said in found
    allowed = new_code_cell("1 / 0", execution_count=1, outputs=[error], metadata={"tags": ["raises-exception"]})
    assert build.problems(new_notebook(cells=[allowed])) == []


def test_prepare_copies_the_book_and_nothing_else(tmp_path: Path) -> None:
    copies = build.prepare(tmp_path / "src")
    assert [c.name for c in copies] == [c.name for c in build.chapters()]
    names = {p.relative_to(tmp_path / "src").parts[0] for p in (tmp_path / "src").rglob("*")}
    assert names == {"_config.yml", "_toc.yml", "book", build.STAMP}


def test_copies_are_stale_when_the_book_or_the_library_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.stale(tmp_path) == "No executed copies"
    build.prepare(tmp_path / "src")
    assert build.stale(tmp_path / "src") == ""
    before, library = build.fingerprint(), tmp_path / "mmlib"
    library.mkdir()
    (library / "added.py").write_text("x = 1\n")
    for top in ("book", "_config.yml", "_toc.yml"):
        (tmp_path / top).symlink_to(build.ROOT / top)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.fingerprint() != before
    assert build.stale(tmp_path / "src") == "Book or library changed since the chapters were executed"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x [*N, T, D] and `y`", r"x [\*N, T, D] and ``y``"),
        ("``a`` b ``c_``", "``a`` b ``c_``"),
        ("zero *and* masked", "zero *and* masked"),
        ("a name_ of |x|", r"a name\_ of \|x\|"),
        ("``M``s", r"``M``\ s"),
    ],
)
def test_docstrings_become_text_without_markup(line: str, expected: str) -> None:
    assert api.inline(line) == expected


def test_parameter_lists_become_bullets() -> None:
    lines = ["Summary.", "", "x, y : float [N]", "    of both", "z : more", "", "Raises ValueError."]
    bullets = ["* **x**, **y**: float [N];", "  of both", "", "* **z**: more"]
    assert api.restructured(lines) == ["Summary.", "", *bullets, "", "Raises ValueError."]
