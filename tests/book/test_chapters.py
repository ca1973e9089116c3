"""Every chapter runs under papermill with another parameter than its own, and refuses what it does not know."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from book import build

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
def test_an_unknown_parameter_is_refused(chapter: Path, tmp_path: Path) -> None:
    with pytest.raises(PapermillExecutionError, match="no_such_parameter") as refused:
        build.run(chapter, tmp_path / chapter.name, cwd=chapter.parent, profile="tiny", no_such_parameter=1)
    assert refused.value.ename == "ValueError"
    assert "this chapter knows" in refused.value.evalue


@pytest.mark.parametrize(("name", "value"), [("profile", "huge"), ("device", "tpu"), ("seeds", "0")])
def test_a_parameter_out_of_range_is_refused(name: str, value: object, tmp_path: Path) -> None:
    if not CHAPTERS:
        pytest.skip("no chapter yet")
    chapter = build.chapters()[0]
    with pytest.raises(PapermillExecutionError, match=name):
        build.run(chapter, tmp_path / chapter.name, cwd=chapter.parent, **{name: value})
