"""Rendered tables: what is shown, marked, folded and left out; the same frame is the same HTML."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from book.support import page, tables
from mmlib.metrics import Interval

NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def frame() -> pd.DataFrame:
    cells = {
        "accuracy": [Interval(0.764, 0.75, 0.778, 5), Interval(0.6, math.nan, math.nan, 1), NOTHING],
        "mae": [1.0, 0.9, None],
        "what": ["a <b>", "`code`", "**bold**"],
        "steps": [3, 120_000, 1],
        "never": ["not run"] * 3,
    }
    return pd.DataFrame(cells, index=["A", "B", "C"])


def test_cells_are_numbers_intervals_or_words() -> None:
    text = str(tables.show(frame(), "Scores", source="stored", formats={"accuracy": ".1%"}))
    assert text.splitlines()[0] == "[OURS STORED] Scores"
    assert "76.4 ± 1.4" in text
    assert "120\u202f000" in text
    assert "C" not in text.split("Not run")[0].replace("OURS STORED", "").replace("Scores", "")
    assert "Not run: C, never." in text


def test_html_is_escaped_the_same_every_time_and_has_no_ids() -> None:
    one, two = (tables.show(frame(), "x < y", source="paper", fold=True)._repr_html_() for _ in range(2))
    assert one == two
    assert "a &lt;b&gt;" in one
    assert "<code>code</code>" in one
    assert "x &lt; y" in one
    assert " id=" not in one
    assert one.count("<details") == 1
    assert "PAPER" in one


def test_the_best_of_a_column_or_row_is_marked_and_equals_are_marked_together() -> None:
    marked = tables.show(frame(), best={"accuracy": "max", "mae": "min"}).html
    assert marked.count("mm-best") == 2
    assert 'mm-best" >0.764' in marked
    assert 'mm-best" >0.900' in marked
    rows = tables.show(pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, 3.0]}), best="max", by="row").html
    assert rows.count("mm-best") == 3


def test_two_tables_are_never_mixed() -> None:
    paper = pd.DataFrame({"acc": [70.0]}, index=["MCE"])
    both = tables.paper_and_ours(paper, paper + 1, "Table 2", where="digits", formats=".1f")
    assert both.html.index("Analogue of Table 2, on digits") < both.html.index("Table 2, as printed")
    missing = tables.paper_and_ours(paper, None, "Table 2", command="python -m x")
    assert "NOT RUN" in missing.html
    assert "python -m x" in missing.html
    assert "PAPER" in missing.html


@pytest.mark.parametrize("wrong", [{"source": "mine"}, {"by": "cell"}, {"best": "most"}])
def test_other_words_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tables.show(frame(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="once"):
        tables.show(pd.DataFrame([[1], [2]], index=["a", "a"]))


def test_the_opening_has_a_verdict_and_one_card_in_one_order() -> None:
    shown = page.opening({"supported": "yes"}, minutes="one", claim="c", needs="labels")
    assert str(shown).splitlines() == [
        "Verdict:",
        "  supported: yes",
        "Card:",
        "  Claim: c",
        "  You need: labels",
        "  This page: one",
    ]
    with pytest.raises(ValueError, match="minutes"):
        page.opening(needs="labels")
    with pytest.raises(ValueError, match="unknown"):
        page.opening(needs="a", minutes="b", colour="red")


def test_a_frame_of_nothing_is_shown() -> None:
    assert "(empty)" in repr(tables.show(pd.DataFrame(), "Nothing", source="not run"))
    assert "Nothing" in tables.show(pd.DataFrame(columns=["a", "b"]), "Nothing").html
