"""The schematics of the MCE chapter show numbers that the library computes."""

from __future__ import annotations

import matplotlib
import pytest
import torch

from book.drawings import mce as drawings
from mmlib import coalitions
from mmlib.methods.mce import learning_state_factor

pytestmark = pytest.mark.usefixtures("no_window")


def words(figure: matplotlib.figure.Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_ten_samples_have_the_counts_of_the_paper() -> None:
    present = drawings.example_presence()
    assert present.sum(0).tolist() == [10, 8, 5, 2]
    assert present.any(1).all()
    drawn = words(drawings.updates())
    assert [w for w in drawn if "." in w] == ["1.00", "1.25", "2.00", "5.00"]


def test_one_sample_is_the_example_of_the_page() -> None:
    sample = drawings.example_sample()
    phi = coalitions.shapley_values(sample["value"])
    torch.testing.assert_close(phi, torch.tensor([4 / 6, 0, 1 / 6, 1 / 6]))
    factor = learning_state_factor(sample["upper"], phi, sample["present"][None])
    torch.testing.assert_close(factor, torch.tensor([1 / 3, 0, 5 / 6, 0]))
    drawn = words(drawings.one_sample(phi, factor))
    assert {"$B_1$ = 0.333", "$B_3$ = 0.833", "$B_4$ = 0.000"} <= set(drawn)
    assert drawn.count("1") == 6  # the modality's name and the five right coalitions


def test_the_overview_names_every_part() -> None:
    drawn = " ".join(words(drawings.overview()))
    for part in ("$A_m$", "$B_m$", "$U_m$", "phi_m", "single", "aux", "sub", "task", "reconstruction"):
        assert part in drawn
