"""What the tests of the book share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def no_window() -> Iterator[None]:
    """Figures are drawn into memory, and closed afterwards."""
    import matplotlib
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)
