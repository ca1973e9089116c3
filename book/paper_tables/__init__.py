"""The papers' tables as CSV, transcribed from their text by `transcribe`, and how chapters read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SEVERITIES = ("major", "minor", "rounding", "none")  # of what an audit found: "none" agrees
COLUMNS = ("group", "row", "column", "value", "plus_minus", "low", "high")


def read(name: str) -> Any:
    """A transcribed table such as ``mce-table2`` as a tidy DataFrame, one row a cell.

    `COLUMNS` as printed, numbers as floats (words stay words), and ``digits``: how many decimals a value is printed
    with, so that a check can allow for its rounding.
    """
    import pandas as pd

    frame = pd.read_csv(FOLDER / f"{name}.csv", dtype=str, keep_default_na=False)
    if tuple(frame.columns) != COLUMNS:
        raise ValueError(f"{name}: expected the columns {COLUMNS}, got {tuple(frame.columns)}")
    frame["digits"] = [len(v.partition(".")[2]) for v in frame["value"]]
    for column in ("value", "plus_minus", "low", "high"):
        numbers = pd.to_numeric(frame[column], errors="coerce")
        if column != "value" or numbers.notna().all():
            frame[column] = numbers
    return frame


def audit(paper: str) -> Any:
    """What was checked in a paper's tables: item, printed, recomputed, severity and note; the gravest first."""
    import pandas as pd

    frame = pd.read_csv(FOLDER / "audit.csv", dtype=str, keep_default_na=False)
    order = {severity: place for place, severity in enumerate(SEVERITIES)}
    frame = frame[frame["paper"] == paper].drop(columns="paper")
    return frame.sort_values("severity", key=lambda column: column.map(order), kind="stable").reset_index(drop=True)
