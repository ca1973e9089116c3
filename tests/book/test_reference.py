"""The library reference has every public module once, and its first page names the page of each."""

from __future__ import annotations

import re
from collections import Counter

from book.support import build

ROOT = build.ROOT
LEFT_OUT = {"mmlib.checks", "mmlib.data.pickles"}  # checks of arguments; what reads pickles without running them


def test_every_public_module_is_documented_once() -> None:
    files = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "mmlib").rglob("*.py")]
    modules = {".".join(p.parts) for p in files if not any(part.startswith("_") for part in p.parts)}
    pages = {p.stem: p.read_text(encoding="utf-8") for p in (ROOT / "book" / "reference").glob("*.md")}
    found = Counter(name for text in pages.values() for name in re.findall(r"^\.\. automodule:: (.+)$", text, re.M))
    assert max(found.values()) == 1
    whole = {"mmlib.missing"}  # a package whose names are documented together
    documented = {m for m in modules if m in found or m.rpartition(".")[0] in whole}
    assert modules - documented == LEFT_OUT
    index = (ROOT / "book" / "reference.md").read_text(encoding="utf-8")
    for stem, text in pages.items():
        (row,) = re.findall(rf"^\| {{doc}}`reference/{stem}` \| (.+) \|$", index, re.M)
        assert re.findall(r"`(.+?)`", row) == re.findall(r"^\.\. automodule:: (.+)$", text, re.M)
