"""What the foundations draw shows the numbers that it was given."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text

from book.drawings import foundations as drawings
from mmlib.metrics import Interval


def words(figure: Figure) -> set[str]:
    return {t.get_text() for t in figure.findobj(Text)}


def test_the_lattice_has_every_value_and_gain() -> None:
    v = [0, 5, 3, 6, 1, 5, 4, 8]
    drawn = words(drawings.lattice(v).figure)
    assert {"{}\nv = 0", "{0, 1}\nv = 6", "{0, 1, 2}\nv = 8"} <= drawn
    assert {"+5", "+3", "+1", "+0", "+4", "+2"} <= drawn


def test_repairs_are_sorted_by_the_first_column() -> None:
    table = pd.DataFrame({"damage": [0.5, 0.1, 0.3], "error": [1.0, 2.0, 30.0]}, index=["c", "a", "b"])
    figure = drawings.repairs(table, {"damage": "lost accuracy", "error": "squared error"})
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert {"0.10", "30", "lost\naccuracy"} <= words(figure)


def test_settings_have_a_panel_a_condition() -> None:
    class Table:
        cells = {(".5 .5 .5",): [], (".3 .5 .7",): []}

        def mean(self, cell: object, conditions: object) -> Interval:
            return Interval(0.8, 0.7, 0.9, 5)

    conditions = {"digits": {"a alone": 1, "b alone": 1, "c alone": 1, "own rates": 1}}
    figure = drawings.settings(
        {"digits": Table(), "mfeat": Table()},
        dict.fromkeys(("digits", "mfeat"), "abc"),
        conditions | {"mfeat": conditions["digits"]},
    )
    assert len(figure.axes) == 8
    assert {"a alone", "own rates", ".3 .5 .7"} <= words(figure)


def test_samples_have_their_scores() -> None:
    figure = drawings.credited(
        [np.eye(8)] * 2, ["one", "two"], np.ones((2, 3)), np.full((2, 3), 2.0), ["left", "right", "x"]
    )
    assert {"one", "two", "PSS", "PAS"} <= words(figure)
    assert len(drawings.credited([], ["one"], np.ones((1, 2)), np.ones((1, 2)), ["a", "b"]).axes) == 1
