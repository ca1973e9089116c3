"""What of a cell's code the built page shows at first."""

from __future__ import annotations

import pytest

from book.support.story import MARKS, hidden_lines


@pytest.mark.parametrize(
    ("source", "hidden"),
    [
        ("x = 1\nassert x", {2}),
        ("chapter.source(f)", {1}),
        ("x = 1\ntables.show(\n    x\n)", {2, 3, 4}),
        ("if expected:\n    assert a\n    assert (\n        b\n    )", {1, 2, 3, 4, 5}),
        ("for x in y:\n    print(x)\n    assert x", {3}),
        ("if a:\n    assert b\nelse:\n    print(b)", {2}),
        ("%matplotlib inline", set()),
        ("print(chapter.source)", set()),
    ],
)
def test_asserts_and_sources_are_left_out(source: str, hidden: set[int]) -> None:
    assert hidden_lines(source) == hidden


def test_marks_for_tools_are_taken_off() -> None:
    assert (
        MARKS.sub("", "x = f(  # noqa: B023\n    1)  # fmt: skip\ny = 1  # metres") == "x = f(\n    1)\ny = 1  # metres"
    )
