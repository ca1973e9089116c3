"""Transcribe the tables of a paper from its text: ``python -m book.paper_tables.transcribe mce PAPER.txt [FOLDER]``.

The text is the paper as a text file, ``PAPER.txt`` (BALM's is that of its supplement), whose tables are lines with tabs
or between bars, each below its caption "Table n: ..." or "Table n. ...", or above it (`CAPTION_BELOW`). It is not in
this repository; the CSVs that this script makes of it are. "balm-main" are the two tables of BALM's main paper, which
was not at hand: second-hand, from the CSV of a follow-up's results that restates them.
Every cell becomes one line, exactly as printed (no digit is dropped; ``**bold**``, underlines and reference numbers
are), and the number of cells of every table is asserted.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from book.paper_tables import COLUMNS, FOLDER

Cell = dict[str, str]


def cell(row: str, column: str, text: str, group: str = "") -> Cell:
    """One cell: a number, "mean±spread", "[low, high]", or words."""
    found: Cell = {"group": _name(group), "row": _name(row), "column": _name(column)}
    text = re.sub(r"</?u>", "", text.replace("**", "").replace("$", ""))
    text = re.sub(r"\s*\\pm\s*", "±", text).strip()
    if interval := re.fullmatch(r"\[(-?[\d.]+), (-?[\d.]+)\]", text):
        found["low"], found["high"] = interval.groups()
    elif spread := re.fullmatch(r"(-?[\d.]+)±([\d.]+)", text):
        found["value"], found["plus_minus"] = spread.groups()
    else:
        found["value"] = _name(text)
    return found


def _name(text: str) -> str:
    """A label without markup: numbers as 3e-4, no bold, no dollars, no reference numbers, no trailing full stop."""
    text = re.sub(r"\*\*|\$|\s*\\?\[[\d–, ]+\]", "", text)
    text = re.sub(r"\s*\(\\(down|up)arrow\)", "", text)
    text = re.sub(r"\\mathcal\{(\w+)\}", r"\1", text)
    text = re.sub(r"\s*×\s*10\^\{(-\d+)\}", r"e\1", text)
    return text.strip().rstrip(".")


def lines_of(text: str, table: int, above: bool = False) -> list[list[str]]:
    """The lines below the caption of a table, or ``above`` it, split at their tabs."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith((f"Table {table}:", f"Table {table}.")))
    found: list[list[str]] = []
    for line in reversed(lines[:start]) if above else lines[start + 1 :]:
        if "\t" in line:
            found.append(line.split("\t"))
        elif line.startswith("|"):
            if not re.fullmatch(r"[|\s:-]+", line):
                found.append([part.strip() for part in line.strip().strip("|").split("|")])
        elif found:
            break
    return found[::-1] if above else found


def grid(lines: list[list[str]], group: str = "") -> Iterator[Cell]:
    """A plain table: the first line names the columns, the first cell of each other line its row."""
    head, *body = lines
    for line in body:
        assert len(line) == len(head), line
        for column, value in zip(head[1:], line[1:], strict=True):
            yield cell(line[0], column, value, group)


# MCE


def ablation(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 2: ticks become 1 and 0; mean, spread and interval on IEMOCAP are one cell."""
    head, *body = lines
    terms = [_name(h).removeprefix("L_").strip("{}") for h in head[1:6]]
    for line in body:
        row = line[0]
        for term, tick in zip(terms, line[1:6], strict=True):
            yield cell(row, term, "1" if tick == "✓" else "0")
        yield cell(row, head[6], line[6])
        assert head[7:9] == ["IEMOCAP (Accuracy)", "IEMOCAP (95% CI)"], head
        yield cell(row, head[7], line[7]) | {k: v for k, v in cell(row, "", line[8]).items() if k in ("low", "high")}


def regions(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 4: three tables below each other, each named by the first cell of its head."""
    starts = [i for i, line in enumerate(lines) if line[1:] == list("abcdef")]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield from grid(lines[start:stop], lines[start][0])


def batches(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 6: two stages of four modalities of BraTS2020 and three of IEMOCAP; the group is "stage, data set"."""
    stage = ""
    for line in lines[2:]:
        stage = line[0] or stage
        if line[1] == "Modality":
            names = line[2:]
            continue
        what = {"\\mathcal{U}_m": "U", "ϕ_m": "phi", "\\mathcal{B}_m": "B", "Number": "number"}[
            line[1].replace("φ", "ϕ")
        ]
        for i, (name, value) in enumerate(zip(names, line[2:], strict=True)):
            yield cell(what, name, value, f"{stage.split()[0].lower()}, {'BraTS2020' if i < 4 else 'IEMOCAP'}")


# DREAM


def by_dataset(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 1: the data set is the first cell of the first of its rows; {l, a} becomes l+a."""
    head, *body = lines
    assert head[:2] == ["Dataset", "Models"], head
    columns = [re.sub(r"[{}]", "", name).replace(", ", "+") for name in head[2:]]
    dataset = ""
    for line in body:
        dataset = line[0] or dataset
        assert len(line) == len(head), line
        for column, value in zip(columns, line[2:], strict=True):
            yield cell(line[1].removesuffix(" (Ours)"), column, value, dataset)


def seconds(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 2: two columns, train and test, below each data set's name; the group is the data set."""
    datasets, whats, *body = lines
    names = [name for name in datasets[1:] if name]
    assert whats[1:] == ["train", "test"] * len(names), whats
    for line in body:
        for i, value in enumerate(line[1:]):
            yield cell(line[0].removesuffix("(ours)"), whats[1 + i], value, names[i // 2])


def counts(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 3: whole numbers, printed with a comma at the thousands."""
    return grid([lines[0], *([row, *(value.replace(",", "") for value in rest)] for row, *rest in lines[1:])])


# DEAR


def scores(lines: list[list[str]]) -> Iterator[Cell]:
    """Most of its tables: the group is the data set, in a line above the head or before each block.

    A cell "a / b" is two: negative against non-negative ("has0") and negative against positive ("non0").
    """
    head: list[str] = []
    groups: list[str] = []
    for line in lines:
        if (line[0] and not any(line[1:])) or line[1] in ("MOSI", "MOSEI"):  # the names of data sets
            groups, head = [], []
            names = line if line[0] and not any(line[1:]) else ["", *line[1:]]
            for name in names[1:] if names[0] == "" else [names[0]] * (len(names) - 1):
                groups.append(name or groups[-1])
        elif not head or line[1] == "Acc-7":
            head = [name.rstrip("↓") for name in line]
            groups = groups or [""] * (len(line) - 1)
        else:
            row = re.sub(r"[{}*]|\\mathcal", "", line[0])
            for group, column, value in zip(groups, head[1:], line[1:], strict=True):
                value = re.sub(r"</?u>", "", value)
                parts = re.split(r"\s*/\s*", value)
                for kind, part in zip((" has0", " non0") if len(parts) == 2 else ("",), parts, strict=True):
                    yield cell(row, column + kind, part, group)


def halves(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 4: two halves, both printed as MOSEI; the group counts them."""
    head, *body = lines
    columns = [re.sub(r"[{}$\\]", "", name).replace(", ", "+") for name in head[2:]]
    half = 0
    for line in body:
        half += bool(line[0])
        row = re.sub(r" (\[‡\] )?\(.*\)", "", line[1])
        for column, value in zip(columns, line[2:], strict=True):
            yield cell(row, column, value, f"MOSEI, {('first', 'second')[half - 1]}")


def units(lines: list[list[str]]) -> Iterator[Cell]:
    """Tables 8 and 9: a number's unit goes to its column's name."""
    head, *body = lines
    for line in body:
        for column, value in zip(head[1:], line[1:], strict=True):
            number, _, unit = value.partition(" ")
            yield cell(line[0], f"{column} [{unit}]" if unit else column, number)


def noise(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 11: a plain table whose rows are numbers, w_L becomes w L."""
    return grid([[name.replace("_", " ") for name in lines[0]], *lines[1:]])


# BALM's supplement


def _plug_in(text: str) -> str:
    """GCNet _{+BALM} and GCNet_{+BALM-M} without markup."""
    return re.sub(r"\s*_\{(\+[\w-]+)\}", r"\1", text.replace("$", ""))


def sizes(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 5: dialogues and utterances; where two splits are printed as one, it is train and valid together."""
    for row, *values in lines[2:]:
        for group, three in (("dialogues", values[:3]), ("utterances", values[3:])):
            names = ["train", "valid", "test"] if three[2] else ["train and valid", "test"]
            for name, value in zip(names, [v for v in three if v], strict=True):
                yield cell(row, name, value, group)


def settings(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 6: a value a data set, or one for both."""
    head, *body = lines
    for row, *values in body:
        for column, value in zip(head[1:], values, strict=True) if values[1] else [("both", values[0])]:
            yield {"group": "", "row": row.replace("$", ""), "column": column, "value": value.replace("$", "")}


def two_grids(lines: list[list[str]]) -> Iterator[Cell]:
    """Table 7: two grids side by side, tau down and rho across; the heads of the columns are those of Config A."""
    rhos = ["1.0", "1.2", "1.4", "1.6", "1.8"]
    assert all(rho in lines[1] for rho in rhos), lines[1]
    for line in lines[2:]:
        assert len(line) == 14, line
        assert line[1] == line[8], line
        for group, values in (("A", line[2:7]), ("B", line[9:])):
            for rho, value in zip(rhos, values, strict=True):
                yield cell(line[1], rho, value, group)


def by_setting(lines: list[list[str]]) -> Iterator[Cell]:
    """Tables 8 and 9: the setting is the first cell of the first of its rows."""
    head, *body = lines
    group = ""
    for line in body:
        group = line[0] or group
        for column, value in zip(head[2:], line[2:], strict=True):
            yield cell(_plug_in(line[1]), column, value, group)


def under_two_heads(lines: list[list[str]]) -> Iterator[Cell]:
    """Tables 10 and 13: a data set, below it two models, below each Acc and w-F1."""
    datasets, models, scores, *body = lines
    names, models = [d for d in datasets[1:] if d], [m for m in models[1:] if m]
    assert len(models) == 4, models
    assert scores[1:] == ["Acc", "w-F1"] * 4, scores
    for row, *values in body:
        for i, value in enumerate(values):
            yield cell(row, f"{_plug_in(models[i // 2])} {scores[1 + i]}", value, names[i // 4])


def by_model(lines: list[list[str]]) -> Iterator[Cell]:
    """Tables 11, 12, 14 and 15: below each model Acc, where an arrow is printed the gap to BALM, and w-F1."""
    models, scores, *body = lines
    names = [_plug_in(m) for m in models[1:] if m]
    assert scores[1:] == ["Acc", "w-F1"] * len(names), scores
    for row, *values in body:
        for i, value in enumerate(values):
            number, arrow, gap = re.fullmatch(
                r"(.*?)(?:\s*\\(down|up)arrow ([\d.]+))?", value.replace("$", "")
            ).groups()  # type: ignore[union-attr]
            yield cell(row, scores[1 + i], number, names[i // 2])
            if arrow:
                yield cell(row, "gap", f"{'-' if arrow == 'down' else ''}{gap}", names[i // 2])


CORPORA = ("IEMOCAP", "CMU-MOSEI")  # of BALM's main Tables 1 and 2


def restated(lines: list[list[str]]) -> Iterator[Cell]:
    """BALM's main Tables 1 and 2: lines of corpus, method, rates (audio, language, vision), score, value, spread."""
    for _, method, rates, score, value, spread in lines:
        text = f"{value}±{spread}" if spread else value
        yield cell(f"({', '.join(rates.split(','))})", score, text, _plug_in(method))


def restated_lines(text: str, table: int) -> list[list[str]]:
    rows = csv.reader(line for line in text.splitlines() if not line.startswith("#"))
    return [row for row in rows if row[0] == CORPORA[table - 1]]


CAPTION_BELOW = ("dream", "dear")  # the papers whose captions stand below their tables
TEXTS = {"balm": "balm_supplement.txt", "balm-main": "balm_main_tables.csv"}  # where a text is not named PAPER.txt
Reader = Callable[[list[list[str]]], Iterator[Cell]]
TABLES: dict[str, dict[int, tuple[Reader, int]]] = {  # per paper and table: how it is read, how many cells it has
    "mce": {
        1: (grid, 7 * 4),
        2: (ablation, 13 * (5 + 2)),
        3: (grid, 5 * 6),
        4: (regions, 3 * 5 * 6),
        5: (grid, 5 * 6),
        6: (batches, 2 * 4 * 7),
        7: (grid, 2 * 4),
        8: (grid, 3 * 4),
    },
    "dear": {
        1: (scores, 11 * 16),
        2: (scores, 10 * 6),
        3: (scores, 7 * (8 + 6)),
        4: (halves, 2 * 7 * 7),
        5: (grid, 3 * 6),
        6: (scores, 4 * (8 + 6)),
        7: (scores, 3 * (8 + 6)),
        8: (units, 3 * 2),
        9: (units, 2 * 5),
        10: (scores, 7 * 8),
        11: (noise, 4 * 4),
        12: (scores, 4 * 8),
        13: (scores, 4 * 8),
        14: (scores, 5 * 8),
        15: (scores, 11 * 8),
        16: (scores, 11 * 8),
        17: (scores, 11 * 6),
    },
    "balm": {
        5: (sizes, 2 * 2 + 2 * 3),
        6: (settings, 6 * 2 + 2),
        7: (two_grids, 2 * 25),
        8: (by_setting, 7 * 3 * 7),
        9: (by_setting, 7 * 3 * 7),
        10: (under_two_heads, 8 * 8),
        11: (by_model, 8 * 10),
        12: (by_model, 8 * 10),
        13: (under_two_heads, 6 * 8),
        14: (by_model, 6 * 9),
        15: (by_model, 6 * 9),
    },
    "balm-main": {1: (restated, 13 * 6 * 2), 2: (restated, 12 * 6 * 2)},
    "dream": {1: (by_dataset, 3 * 8 * 8), 2: (seconds, 5 * 6), 3: (counts, 3 * 3)},
}


def transcribe(paper: str, text: str) -> dict[str, str]:
    """The CSV text of every table of a paper by its name, such as ``mce-table2``."""
    made = {}
    for table, (read, count) in TABLES[paper].items():
        found = restated_lines(text, table) if read is restated else lines_of(text, table, paper in CAPTION_BELOW)
        cells = list(read(found))
        assert len(cells) == count, f"Table {table}: expected {count} cells, got {len(cells)}"
        places = {(c["group"], c["row"], c["column"]) for c in cells}
        assert len(places) == count, f"Table {table}: a cell occurs twice"
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)
        made[f"{paper}-table{table}"] = out.getvalue()
    return made


def main(paper: str, source: str, folder: str = str(FOLDER)) -> None:
    for name, text in transcribe(paper, Path(source).read_text(encoding="utf-8")).items():
        (Path(folder) / f"{name}.csv").write_text(text, encoding="utf-8")
        print(f"{name}.csv: {text.count(chr(10)) - 1} cells")


if __name__ == "__main__":
    main(*sys.argv[1:])
