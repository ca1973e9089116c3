"""Figures on a page: SVG in the page's own ink, so that they are sharp, small, and read in the dark.

`inline` (called by `figures.use_style`) makes a notebook show matplotlib's figures so; `svg` does it for one.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LIMIT", "Picture", "inline", "markup", "svg"]

# What a figure draws in these becomes the page's own text colour, thinner where the number is smaller.
INKS = {"#000000": "1", "#2b2b2b": "1", "#444444": ".9", "#555555": ".8", "#aaaaaa": ".5", "#cccccc": ".3"}
INKS |= {"#dddddd": ".2", "#eeeeee": ".12"}
# The two of our colours that are too dark on a dark page; the style sheet lightens them there.
DARK = {"#7d1287": "var(--mm-purple, #7d1287)", "#634604": "var(--mm-brown, #634604)"}
LIMIT = 70_000  # characters; a figure that needs more is shown as a picture of twice the density
DOTS = 220  # of that picture, an inch


class Picture:
    """What a cell shows: ``markup`` (one <svg>) on a page, ``text`` elsewhere."""

    def __init__(self, markup: str, text: str):
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return f'<div class="mm-picture">{self.markup}</div>'

    def __repr__(self) -> str:
        return self.text


def svg(figure: Figure, alt: str, text: str = "") -> Picture:
    """``figure`` as SVG, and closed: the last expression of a cell.

    alt : what it shows, in words, for who does not see it; text : what a terminal and nbval get, default ``alt``
    """
    import matplotlib.pyplot as plt

    drawn = markup(figure, alt)
    plt.close(figure)
    return Picture(drawn, text or alt)


def inline(colours: int = 128) -> None:
    """From here on ``plt.show()`` in a notebook shows SVG as `markup` has it; outside a notebook this does nothing.

    A figure of more than `LIMIT` characters (clouds of points, pictures) is a PNG of twice the density instead, with so
    many colours.
    """
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from IPython.core.getipython import get_ipython
    from matplotlib.figure import Figure

    if (shell := get_ipython()) is None or shell.display_formatter is None:
        return
    plt.switch_backend(mpl.get_backend())  # the notebook's sets formatters of its own, once

    def as_html(figure: Any) -> str | None:
        drawn = markup(figure, "")
        return None if len(drawn) > LIMIT else f'<div class="mm-picture">{drawn}</div>'

    def as_png(figure: Any) -> bytes | None:
        return _png(figure, colours) if len(markup(figure, "")) > LIMIT else None

    formatters = shell.display_formatter.formatters
    formatters["text/html"].for_type(Figure, as_html)
    formatters["image/png"].for_type(Figure, as_png)


def _png(figure: Figure, colours: int) -> bytes:
    from PIL import Image

    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS, bbox_inches="tight")
    plain = Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    plain.save(out, "PNG", optimize=True, dpi=(DOTS, DOTS))
    return out.getvalue()


def markup(figure: Figure, alt: str) -> str:
    """``figure`` as one <svg>: the same for the same figure.

    The ground is transparent, black and grey are the page's text colour, letters stay letters. A figure with pictures
    or light fills in it keeps a white card and its own ink.
    """
    import matplotlib.pyplot as plt

    out = io.StringIO()
    options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.04, "metadata": {"Date": None}}
    card = _has_light_ground(figure)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmlib"}):
        figure.savefig(out, format="svg", transparent=not card, **options)
    body = _slim(out.getvalue())
    if not card:
        body = _inked(body)
    width, height = (float(x) for x in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)[0])
    label = f'aria-label="{html.escape(alt)}" ' if alt else ""
    ground = ";background:#fff;border-radius:6px" if card else ""
    head = (
        f'<svg role="img" {label}viewBox="0 0 {width:g} {height:g}" '
        f'style="width:{width * 110 / 72:.0f}px;max-width:100%;height:auto{ground}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + re.sub(r"\s*\n\s*", "\n", body[body.index(">") + 1 :]).strip()


def _has_light_ground(figure: Figure) -> bool:
    """Whether something light is filled, or a picture shown, on which letters may stand."""
    from matplotlib.colors import to_rgba

    for artist in _patches(figure):
        red, green, blue, alpha = to_rgba(artist.get_facecolor())
        if alpha > 0.5 and 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.7:
            return True
    return any(ax.images or ax.tables for ax in figure.axes)


def _patches(figure: Figure) -> Iterator[Any]:
    for ax in figure.axes:
        yield from ax.patches


def _slim(written: str) -> str:
    """Without metadata, comments, names of groups (they repeat on a page, nothing refers to them), and digits."""
    body = written[written.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    shorter = lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0])
    return re.sub(r"<[^>]*>", shorter, body)  # coordinates, not what is written


def _inked(body: str) -> str:
    for colour, strength in INKS.items():
        for what in ("fill", "stroke"):
            thinner = f"; {what}-opacity: {strength}" if strength != "1" else ""
            body = re.sub(rf"{what}: {colour}(?=[;\"])", f"{what}: currentColor{thinner}", body)
    for colour, variable in DARK.items():
        body = body.replace(f": {colour}", f": {variable}")
    return re.sub(r"(<text style=\"(?![^\"]*fill:))", r"\1fill: currentColor; ", body)
