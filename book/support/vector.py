"""A matplotlib figure as SVG inside the page: sharp, small, and in the page's own ink, so that it reads in the dark."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "svg"]

# What a figure draws in these becomes the page's own text colour (lighter: thinner ink), see mmlib's `use_style`.
INKS = {"#000000": "1", "#2b2b2b": "1", "#444444": ".9", "#555555": ".8", "#dddddd": ".2", "#eeeeee": ".12"}


class Picture:
    """What a cell shows: ``markup`` (one <svg>) on a page, ``text`` elsewhere."""

    def __init__(self, markup: str, text: str):
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return f'<div class="mm-picture">{self.markup}</div>'

    def __repr__(self) -> str:
        return self.text


def svg(figure: Figure, alt: str, text: str = "") -> Picture:
    """``figure`` as SVG, and closed: the last expression of a cell, in place of ``plt.show()``.

    alt : what it shows, in words, for who does not see it; text : what a terminal and nbval get, default ``alt``

    The ground is transparent, black and grey are the page's text colour, letters stay letters. For lines, bars and
    intervals; pictures and clouds of thousands of points are smaller as ``plt.show()`` has them. The same figure gives
    the same markup.
    """
    import matplotlib.pyplot as plt

    out = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmlib"}):
        figure.savefig(
            out, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata={"Date": None}
        )
    plt.close(figure)
    return Picture(_inked(out.getvalue(), alt), text or alt)


def _inked(markup: str, alt: str) -> str:
    body = markup[markup.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)  # names of groups repeat on a page and nothing refers to them
    for colour, strength in INKS.items():
        for what in ("fill", "stroke"):
            body = re.sub(
                rf"{what}: {colour}(?=[;\"])",
                f"{what}: currentColor" + (f"; {what}-opacity: {strength}" if strength != "1" else ""),
                body,
            )
    body = re.sub(r"(<text style=\"(?![^\"]*fill:))", r"\1fill: currentColor; ", body)
    width, height = (float(x) for x in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)[0])
    head = (
        f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="width:{width * 110 / 72:.0f}px;max-width:100%;height:auto" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + re.sub(r"\s*\n\s*", "\n", body[body.index(">") + 1 :]).strip()
