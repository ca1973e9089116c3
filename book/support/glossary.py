"""Sphinx extension: the words of the glossary are linked where a page uses them first.

Text in headings, captions, links, code and equations stays as it is. Words that are everyday English besides (`PLAIN`)
are never linked, since a link would often be to another meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

__all__ = ["PLAIN", "Glossary", "forms", "setup", "terms"]

PAGE = Path(__file__).resolve().parents[1] / "glossary.md"
FOLDERS = ("book/foundations/", "book/methods/", "book/evidence/", "book/which-method", "book/your-", "book/intro")
PLAIN = {"present", "valid", "observed", "value", "claim", "profile", "efficiency", "method", "sample", "frame", "seed"}
PLAIN |= {"condition", "interval", "subset", "imbalance", "mask"}
KEPT = (nodes.title, nodes.caption, nodes.reference, nodes.literal, nodes.math, addnodes.pending_xref, nodes.citation)


def terms(text: str) -> list[str]:
    """The terms of the glossary page, as they stand there."""
    found = []
    for block in re.findall(r"^:::\{glossary\}\n(.*?)^:::", text, re.M | re.S):
        found += [line.strip() for line in block.splitlines() if line and not line.startswith(" ")]
    return found


def forms(term: str) -> list[str]:
    """How a term is written in a text: "missing at random (MAR)" also as "MAR", with a plural s where it ends so."""
    name, _, short = term.partition(" (")
    written = [name, *([short.rstrip(")")] if short else [])]
    return [rf"{re.escape(one)}(?:s|es)?" if one[-1].islower() else re.escape(one) for one in written]


PATTERNS = {
    term: re.compile(rf"(?<![\w-])({'|'.join(forms(term))})(?![\w-])", 0 if term.isupper() else re.I)
    for term in sorted(terms(PAGE.read_text(encoding="utf-8")), key=len, reverse=True)
    if term not in PLAIN
}


class Glossary(SphinxTransform):
    """Link the first use of each term on the page."""

    default_priority = 300

    def apply(self, **_: Any) -> None:
        if not self.env.docname.startswith(FOLDERS):
            return
        left = dict(PATTERNS)
        for paragraph in list(self.document.findall(nodes.paragraph)):
            for text in list(_plain(paragraph)):
                _link(text, left)


def _plain(paragraph: nodes.paragraph) -> Iterator[nodes.Text]:
    for text in paragraph.findall(nodes.Text):
        parent: Any = text.parent
        while parent is not None and not isinstance(parent, KEPT):
            parent = parent.parent
        if parent is None:
            yield text


def _link(text: nodes.Text, left: dict[str, re.Pattern[str]]) -> None:
    """Replace the first use of each term that is still to link; what is linked leaves ``left``."""
    found: list[tuple[int, int, str]] = []
    for term, pattern in list(left.items()):
        match = pattern.search(text.astext())
        if match and all(match.end() <= start or match.start() >= end for start, end, _ in found):
            found.append((*match.span(), term))
            del left[term]
    if not found:
        return
    parts: list[nodes.Node] = []
    words, at = text.astext(), 0
    for start, end, term in sorted(found):
        parts += [nodes.Text(words[at:start]), _reference(term, words[start:end])]
        at = end
    text.parent.replace(text, [*parts, nodes.Text(words[at:])])


def _reference(term: str, words: str) -> addnodes.pending_xref:
    options = {"refdomain": "std", "reftype": "term", "reftarget": term, "refexplicit": True, "refwarn": True}
    inner = nodes.inline(words, words, classes=["xref", "std", "std-term"])
    return addnodes.pending_xref("", inner, **options)


def setup(app: Any) -> dict[str, bool]:
    app.add_transform(Glossary)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
