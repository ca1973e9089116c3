"""What of a cell's code the built page shows at first."""

from __future__ import annotations

import pytest

from book.support.story import MARKS, hidden_lines, imported, shown_things


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


def test_a_shown_source_is_known_by_its_full_name_unless_it_is_private() -> None:
    names = imported(["from mmlib import losses, missing as m\nfrom mmlib.baselines import JointTraining"])
    cell = "chapter.source({}, start='x')"
    assert shown_things(cell.format("losses.mmd"), names) == ["mmlib.losses.mmd"]
    assert shown_things(cell.format("m.imbalanced_mask"), names) == ["mmlib.missing.operators.imbalanced_mask"]
    assert shown_things(cell.format("losses._soft_min"), names) == []
    assert shown_things(cell.format("JointTraining.forward"), names) == ["mmlib.baselines.joint.JointTraining"]
    assert shown_things(cell.format("nowhere.at_all"), names) == []
    assert shown_things("print(1)", names) == []
