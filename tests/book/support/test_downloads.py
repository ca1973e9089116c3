"""What a chapter is downloaded with: it runs from the zip alone, and holds the results that it reads."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from book.support import build, downloads

CHAPTERS = {build.ROOT / f"{page}.ipynb" for page in build.contents()} & set(build.chapters())


@pytest.mark.parametrize("chapter", sorted(CHAPTERS), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_chapter_comes_with_the_results_that_it_reads(chapter: Path) -> None:
    files = {file.relative_to(build.ROOT).as_posix() for file in downloads.files_for(chapter)}
    assert {"mmlib/__init__.py", "mmlib/py.typed", "book/support/chapter.py", "requirements.txt"} <= files
    assert not {file for file in files if "__pycache__" in file}
    results = {Path(file).stem.partition("-")[0] for file in files if file.startswith("book/results/")} - {"chapters"}
    if chapter.stem in ("mce", "dream", "dear", "balm", "imbalance"):
        assert chapter.stem in results
    assert all(Path(file).with_suffix(".csv").as_posix() in files for file in files if file.endswith(".npz"))


@pytest.mark.slow
def test_a_download_runs_by_itself(tmp_path: Path) -> None:
    place = "book/foundations/shapley-values.ipynb"
    zipped = downloads.pack(build.ROOT / place, place, tmp_path / "shapley-values.zip")
    again = downloads.pack(build.ROOT / place, place, tmp_path / "again.zip")
    assert zipped.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path)
    here = tmp_path / downloads.FOLDER
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MMLIB_HOME")}
    command = [sys.executable, "-m", "papermill", place, "mine.ipynb", "-p", "profile", "tiny", "--log-level", "ERROR"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (here / "mine.ipynb").exists()
