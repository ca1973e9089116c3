"""What the download button gives: a chapter with all that it needs to run, as one zip.

Inside is the notebook in its place, the library, the machinery of the book, its studies and drawings, the tables
of the papers, and those stored results that the chapter reads.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FOLDER", "files_for", "pack"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "missing-modalities"  # what the zip unpacks to
PACKAGES = ("mmlib", "book/support", "book/studies", "book/drawings", "book/paper_tables")
SINGLE = ("book/__init__.py", "book/results/chapters.json", "requirements.txt", "LICENSE")
HOW = """{title}

1. Install the pinned packages with Python 3.11 to 3.13:  pip install -r requirements.txt
2. Open {notebook} in Jupyter, or run it with parameters of your own:
   papermill {notebook} mine.ipynb -p profile tiny

Nothing is downloaded. Real data stay where you keep them: -p data_root FOLDER.
"""


def files_for(notebook: Path) -> Iterator[Path]:
    """All but the notebook itself: sources, the papers' tables, and the results that the chapter reads."""
    for name in SINGLE:
        yield ROOT / name
    for package in PACKAGES:
        yield from (p for p in sorted((ROOT / package).rglob("*")) if p.suffix in (".py", ".csv", ".typed"))
    text = notebook.read_text(encoding="utf-8")
    studies = set(re.findall(r"from book\.studies import (\w+)", text)) | {notebook.stem}
    for file in sorted((ROOT / "book" / "results").iterdir()):
        if file.suffix in (".csv", ".npz") and (file.stem.partition("-")[0] in studies or f"{file.stem}.csv" in text):
            yield file


def pack(notebook: Path, place: str, target: Path) -> Path:
    """Write the zip of an executed ``notebook``, which belongs to ``place`` (such as "book/methods/mce.ipynb")."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        title = f"{notebook.stem}: a chapter of Learning with missing modalities"
        _put(archive, "README.txt", HOW.format(title=title, notebook=place).encode())
        _put(archive, place, notebook.read_bytes())
        for file in files_for(notebook):
            _put(archive, file.relative_to(ROOT).as_posix(), file.read_bytes())
    return target


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """The same zip from the same files: no dates."""
    entry = zipfile.ZipInfo(f"{FOLDER}/{name}")
    entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)
