"""The words of the glossary are found where a page uses them first, and only there."""

from __future__ import annotations

import re

import pytest
from docutils import nodes

from book.support import glossary


def test_terms_and_how_they_are_written() -> None:
    found = glossary.terms(glossary.PAGE.read_text(encoding="utf-8"))
    assert len(found) == len(set(found)) > 50
    assert {"modality", "missing at random (MAR)", "Shapley value"} <= set(found)
    assert set(found) >= glossary.PLAIN


@pytest.mark.parametrize(
    ("term", "text", "match"),
    [
        ("encoder", "Two Encoders learn", "Encoders"),
        ("missing at random (MAR)", "This is MAR.", "MAR"),
        ("missing at random (MAR)", "data missing at random here", "missing at random"),
        ("encoder", "an encoder-free net", None),
        ("fusion", "confusion", None),
    ],
)
def test_a_term_is_found_as_a_word(term: str, text: str, match: str | None) -> None:
    found = glossary.PATTERNS[term].search(text)
    assert (found and found[0]) == match


def test_the_first_use_is_linked_and_no_later_one() -> None:
    paragraph = nodes.paragraph(
        "", "The encoder and the Shapley value; an encoder again, ", nodes.literal("", "fusion")
    )
    left = dict(glossary.PATTERNS)
    for text in list(glossary._plain(paragraph)):
        glossary._link(text, left)
    links = [
        (node["reftarget"], node.astext())
        for node in paragraph
        if isinstance(node, nodes.Element) and "reftarget" in node
    ]
    assert links == [("encoder", "encoder"), ("Shapley value", "Shapley value")]
    assert re.sub(r"\s+", " ", paragraph.astext()) == "The encoder and the Shapley value; an encoder again, fusion"
    assert {"encoder", "Shapley value"}.isdisjoint(left)
    assert "fusion" in left
