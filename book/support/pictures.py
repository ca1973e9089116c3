"""Small pictures in a notebook: a plot has few colours, and so a chapter with twenty figures stays below a megabyte."""

from __future__ import annotations

import io
from typing import Any


def compact(colours: int = 128) -> None:
    """From the next cell on, show matplotlib's figures as PNGs with so many colours; outside a notebook, do nothing.

    It takes about two thirds off the size of a plot and cannot be seen on one.
    """
    from IPython.core.getipython import get_ipython
    from IPython.core.pylabtools import print_figure
    from matplotlib.figure import Figure
    from PIL import Image

    shell = get_ipython()
    if shell is None:
        return

    def png(figure: Any) -> bytes:
        plain = Image.open(io.BytesIO(print_figure(figure, fmt="png", bbox_inches="tight"))).convert("RGB")
        out = io.BytesIO()
        plain.quantize(colours, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        return out.getvalue()

    def register(*_: Any) -> None:
        assert shell.display_formatter is not None
        shell.display_formatter.formatters["image/png"].for_type(Figure, png)

    shell.events.register("pre_run_cell", register)  # the inline backend sets its own after the cell that imports it
