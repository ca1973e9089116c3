"""Tables as a reader meets them: rendered, captioned, with a badge that says where the numbers come from.

    tables.show(frame, "Accuracy by method", source="stored", best="max")

as the last expression of a cell. The page gets HTML (pandas' Styler, the same for the same frame), a terminal and
nbval get plain text. A cell of the frame may be text, a number, None or NaN (shown as a dash), or an `Interval`, which
is shown as its mean and half its width, or as "not run" where it rests on nothing.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from mmlib.metrics import Interval

__all__ = ["BADGES", "Table", "both", "paper_and_ours", "show"]

NOT_RUN = "not run"
BADGES = {"paper": "PAPER", "live": "OURS LIVE", "stored": "OURS STORED", "not run": "NOT RUN"}
Format = str | Callable[[Any], str]

# What Jupyter needs; book/_static/custom.css does the rest on the built page.
_STYLE = (
    "<style>.mm-table .mm-best{font-weight:700}.mm-scroll{overflow-x:auto}"
    ".mm-badge{border:1px solid;border-radius:3px;padding:0 .4em;font-size:.75em}</style>"
)


class Table:
    """What a cell shows: ``html`` on a page, ``text`` elsewhere. ``a + b`` shows both, one below the other."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return _STYLE + self.html

    def __repr__(self) -> str:
        return self.text

    def __add__(self, other: Table) -> Table:
        return Table(self.html + other.html, f"{self.text}\n\n{other.text}")


def show(
    frame: pd.DataFrame,
    caption: str = "",
    *,
    source: str = "",
    formats: Format | Mapping[str, Format] = ".3f",
    best: str | Mapping[str, str] = "",
    by: str = "column",
    fold: bool = False,
    note: str = "",
    index: bool = True,
    drop_not_run: bool = True,
) -> Table:
    """A rendered table.

    source : the badge, one of `BADGES`; "" shows none
    formats : of the numbers, such as ".3f" or "+.2f"; ".1%" shows per cent without the sign (say so in the caption).
        One for all, or one a column (others ".3f"); a function makes text of a value. Whole numbers stay whole
    best : "max" or "min" marks the best value of every column (``by="row"``: row); or one a column (row)
    fold : show the caption alone, to be opened with a click
    note : a sentence below
    index : whether the labels of the rows are shown
    drop_not_run : leave out rows and columns of results in which nothing was run, and name them in the note

    Raises ValueError for another source, ``by`` or best, and for labels that occur twice. The same
    frame gives the same HTML.
    """
    if source not in {"", *BADGES}:
        raise ValueError(f"source: expected one of {sorted(BADGES)}, got {source!r}")
    if not (frame.index.is_unique and frame.columns.is_unique):
        raise ValueError("frame: expected labels of rows and of columns that occur once each")
    if by not in ("column", "row"):
        raise ValueError(f"by: expected 'column' or 'row', got {by!r}")
    if drop_not_run:
        frame, left_out = _without_not_run(frame)
        note = " ".join(filter(None, [note, f"Not run: {', '.join(left_out)}." if left_out else ""]))
    marked = _best(frame, best, by)
    texts = pd.DataFrame(
        [
            [_text(value, _format(formats, name)) for name, value in zip(frame.columns, row, strict=True)]
            for row in frame.itertuples(index=False, name=None)
        ],
        index=frame.index,
        columns=frame.columns,
        dtype=object,
    )
    badge = BADGES.get(source, "")
    plain = "\n".join(filter(None, [" ".join(filter(None, [badge and f"[{badge}]", caption])), _plain(texts, index)]))
    return Table(_framed(_body(texts, marked, frame, index), caption, source, note, fold), _with_note(plain, note))


def paper_and_ours(
    paper: pd.DataFrame,
    ours: pd.DataFrame | None,
    caption: str,
    *,
    where: str = "",
    command: str = "",
    source: str = "stored",
    formats: Format | Mapping[str, Format] = ".3f",
    paper_formats: Format | Mapping[str, Format] | None = None,
    best: str | Mapping[str, str] = "",
    by: str = "column",
    note: str = "",
) -> Table:
    """A table of a paper and ours: ours is open, the paper's is folded below it. Two tables, never mixed.

    caption : what the paper calls it, such as "Table 2: AV-MNIST"
    where : the data of ours where it is an analogue, such as "digits"; "" means the paper's own data
    command : what fills in ours; said where ours is None (then the paper's table is folded as well)
    """
    printed = show(
        paper, f"{caption}, as printed", source="paper", formats=paper_formats or formats, best=best, by=by, fold=True
    )
    if ours is None:
        said = f"Not run on {where or 'the data of the paper'}" + (f"; `{command}` fills it in." if command else ".")
        badge = '<span class="mm-badge mm-not-run">NOT RUN</span>'
        return Table(f'<p class="mm-note">{badge} {_inline(caption)}. {_inline(said)}</p>', said) + printed
    title = f"Analogue of {caption}, on {where}" if where else f"{caption}, ours on the paper's data"
    return show(ours, title, source=source, formats=formats, best=best, by=by, note=note) + printed


def both(*tables: Table) -> Table:
    """Several tables as what one cell shows."""
    whole = tables[0]
    for table in tables[1:]:
        whole = whole + table
    return whole


# ------------------------------------------------------------------ values


def _format(formats: Format | Mapping[str, Format], column: Any) -> Format:
    if isinstance(formats, Mapping):
        return formats.get(column, ".3f")
    return formats


def _text(value: Any, form: Format) -> str:
    if callable(form):
        return form(value)
    if isinstance(value, Interval):
        if not value.n:
            return NOT_RUN
        half = (value.high - value.low) / 2
        return _number(value.mean, form) + ("" if math.isnan(half) else f" ± {_number(half, form.lstrip('+'))}")
    if value is None or value is pd.NA or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,d}".replace(",", "\u202f") if abs(int(value)) >= 10_000 else str(value)
    if isinstance(value, (float, np.floating)):
        return _number(float(value), form)
    return str(value)


def _number(value: float, form: str) -> str:
    return format(value, form).rstrip("%").replace("-", "−")


def _value(cell: Any) -> float:
    """The number that a cell holds; NaN where it holds none."""
    if isinstance(cell, Interval):
        return cell.mean
    if isinstance(cell, (int, float, np.integer, np.floating)) and not isinstance(cell, bool):
        return float(cell)
    if isinstance(cell, str) and (found := re.match(r"\s*[-−+]?\d+(\.\d+)?", cell)):
        return float(found[0].replace("−", "-"))
    return math.nan


def _best(frame: pd.DataFrame, best: str | Mapping[str, str], by: str) -> np.ndarray:
    """Which cells to mark [rows, columns]; a line with fewer than two numbers has none, equals are marked together."""
    marked = np.zeros(frame.shape, bool)
    names = list(frame.columns if by == "column" else frame.index)
    wanted = dict(best) if isinstance(best, Mapping) else {name: best for name in names if best}
    for place, name in enumerate(names):
        if name not in wanted:
            continue
        if wanted[name] not in ("max", "min"):
            raise ValueError(f"best: expected 'max' or 'min', got {wanted[name]!r}")
        cells = frame.iloc[:, place] if by == "column" else frame.iloc[place]
        values = np.array([_value(cell) for cell in cells])
        if np.isfinite(values).sum() > 1:
            top = np.nanmax(values) if wanted[name] == "max" else np.nanmin(values)
            marked[(slice(None), place) if by == "column" else place] = values == top
    return marked


def _is_not_run(cell: Any) -> bool:
    return cell == NOT_RUN if isinstance(cell, str) else isinstance(cell, Interval) and not cell.n


def _without_not_run(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Without the rows and columns whose results were all not run, and their names."""
    missing = frame.map(_is_not_run).to_numpy()
    if not missing.size or not missing.any() or missing.all():
        return frame, []
    results = missing.any(axis=0) | frame.map(lambda cell: isinstance(cell, Interval)).any(axis=0).to_numpy()
    rows, columns = missing[:, results].all(axis=1), missing.all(axis=0)
    left_out = [*np.flatnonzero(rows)], [*np.flatnonzero(columns)]
    names = [
        _label(axis[i]) for axis, places in zip((frame.index, frame.columns), left_out, strict=True) for i in places
    ]
    return frame.iloc[np.flatnonzero(~rows), np.flatnonzero(~columns)], names


def _label(name: Any) -> str:
    return ", ".join(map(str, name)) if isinstance(name, tuple) else str(name)


# ------------------------------------------------------------------ HTML and text


def _plain(texts: pd.DataFrame, index: bool) -> str:
    return texts.to_string(index=index, max_colwidth=None) if texts.size else "(empty)"


def _with_note(text: str, note: str) -> str:
    return f"{text}\n{note}" if note else text


def _body(texts: pd.DataFrame, marked: np.ndarray, frame: pd.DataFrame, index: bool) -> str:
    """The ``<table>``: numbers to the right, words to the left."""
    kinds = np.full(texts.shape, "", object)
    for j in range(texts.shape[1]):
        words = all(isinstance(x, str) and math.isnan(_value(x)) for x in frame.iloc[:, j])
        kinds[:, j] = "mm-words" if words else ""
    kinds[marked] = "mm-best"
    kinds[texts.map(lambda x: x == NOT_RUN).to_numpy(bool)] = "mm-missing"
    classes = pd.DataFrame(kinds, index=texts.index, columns=texts.columns)
    name = hashlib.blake2b(texts.to_csv().encode(), digest_size=6).hexdigest()  # Styler's own is random
    styler = texts.style.set_uuid(name).set_table_attributes('class="mm-table"').set_td_classes(classes)
    styler = styler.format(lambda text: _inline(str(text)))
    for axis in (0, 1):
        styler = styler.format_index(lambda label: _inline(str(label)), axis=axis)
    if not index:
        styler = styler.hide(axis="index")
    written = re.sub(r"<style.*?</style>\s*", "", styler.to_html(), flags=re.S)
    return re.sub(r' id="T_[^"]*"', "", written)


def _framed(body: str, caption: str, source: str, note: str, fold: bool) -> str:
    badge = f'<span class="mm-badge mm-{source.replace(" ", "-")}">{BADGES[source]}</span> ' if source else ""
    head = f"{badge}{_inline(caption)}"
    below = f'<p class="mm-note">{_inline(note)}</p>' if note else ""
    inner = f'<div class="mm-scroll" tabindex="0">{body}</div>{below}'
    if fold:
        return f'<details class="mm-fold"><summary>{head}</summary>{inner}</details>'
    return f'<div class="mm-framed"><p class="mm-caption">{head}</p>{inner}</div>' if head else inner


def _inline(text: str) -> str:
    """Text for HTML, where `code` and **bold** mean what they mean in Markdown."""
    safe = html.escape(text, quote=False)
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)
