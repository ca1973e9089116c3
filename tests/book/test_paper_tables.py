"""The transcribed tables of the papers: complete, faithful where the text is at hand, read with their digits."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from book.paper_tables import COLUMNS, FOLDER, SEVERITIES, audit, read
from book.paper_tables.transcribe import TABLES, TEXTS, cell, transcribe
from book.support import build

COUNTS = {
    "mce": {1: 28, 2: 91, 3: 30, 4: 90, 5: 30, 6: 56, 7: 8, 8: 12},
    "balm": {5: 10, 6: 14, 7: 50, 8: 147, 9: 147, 10: 64, 11: 80, 12: 80, 13: 48, 14: 54, 15: 54},
    "balm-main": {1: 156, 2: 144},
    "dream": {1: 192, 2: 30, 3: 9},
    "dear": dict(enumerate((176, 60, 98, 98, 18, 56, 42, 6, 10, 56, 16, 32, 32, 40, 88, 88, 66), 1)),
}


def value(frame: pd.DataFrame, row: str, column: str, group: str = "") -> pd.Series:
    found = frame[(frame["group"] == group) & (frame["row"] == row) & (frame["column"] == column)]
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize(("paper", "table"), [(paper, table) for paper in COUNTS for table in COUNTS[paper]])
def test_a_table_has_all_its_cells_once(paper: str, table: int) -> None:
    frame = read(f"{paper}-table{table}")
    assert len(frame) == COUNTS[paper][table] == TABLES[paper][table][1]
    assert set(TABLES[paper]) == set(COUNTS[paper])
    assert not frame.duplicated(["group", "row", "column"]).any()
    assert tuple(frame.columns) == (*COLUMNS, "digits")
    assert frame["value"].notna().all()


def test_cells_are_those_of_dream() -> None:
    scores = read("dream-table1")
    assert list(scores["group"].unique()) == ["MOSI", "MOSEI", "IEMOCAP"]
    assert list(scores["column"].unique()) == ["l", "a", "v", "l+a", "l+v", "a+v", "Avg", "l+a+v"]
    assert len(scores["row"].unique()) == 8
    assert value(scores, "DREAM", "a", "MOSI")["value"] == 59.61
    assert value(scores, "CubeMLP", "l+a+v", "MOSI")["value"] == 82.57, "underlined"
    assert value(scores, "MSPs", "Avg", "MOSEI")["value"] == 72.91
    assert value(scores, "DREAM", "l+a+v", "IEMOCAP")["value"] == 85.84
    times = read("dream-table2")
    assert value(times, "DREAM", "train", "MOSEI")["value"] == 793.41
    assert value(times, "pre-trained", "test", "IEMOCAP")["value"] == 1.21
    assert value(times, "GCNet", "test", "MOSI")["value"] == 0.95
    counts = read("dream-table3")
    assert value(counts, "Pre-trained model", "MOSI")["value"] == 77762
    assert value(counts, "Total", "IEMOCAP")["value"] == 3167795
    parts = counts.pivot(index="row", columns="column", values="value")
    assert (parts.loc["Pre-trained model"] + parts.loc["DREAM"] == parts.loc["Total"]).all()


def test_cells_are_those_of_dear() -> None:
    overall = read("dear-table1")
    assert list(overall["group"].unique()) == ["MOSI", "MOSEI"]
    assert len(overall["row"].unique()) == 11
    assert value(overall, "LNLN", "Acc-2 has0", "MOSI")["value"] == 72.58, "underlined, with a star at its name"
    assert value(overall, "LNLN", "Acc-2 non0", "MOSI")["value"] == 71.46
    assert value(overall, "DEAR", "F1 non0", "MOSI")["value"] == 72.76
    assert value(overall, "DAR", "Corr", "MOSEI")["value"] == 0.583
    assert value(read("dear-table2"), "DEAR", "Acc-5")["value"] == 34.64
    assert value(read("dear-table3"), "DEAR", "Acc-5", "SIMS")["value"] == 36.64, "as printed"
    assert value(read("dear-table3"), "w/o L_uni", "MAE", "MOSI")["value"] == 1.055
    subsets = read("dear-table4")
    assert list(subsets["column"].unique()) == ["L", "A", "V", "L+A", "L+V", "V+A", "Avg"]
    assert value(subsets, "GCNet", "Avg", "MOSEI, first")["value"] == 73.84
    assert value(subsets, "DEAR", "V", "MOSEI, second")["value"] == 69.71
    assert value(read("dear-table5"), "SIMS", "Language")["value"] == "Chinese"
    assert value(read("dear-table6"), "0.5, 0.5, 0.5, 0.4", "Acc-2", "SIMS")["value"] == 73.72
    assert value(read("dear-table7"), "6", "F1 has0", "MOSI")["value"] == 71.03
    assert value(read("dear-table8"), "P-RMF", "Parameters [M]")["value"] == 117
    assert value(read("dear-table9"), "WD", "Time/Epoch [s]")["value"] == 33
    assert value(read("dear-table10"), "w/o HDCR", "Corr", "MOSEI")["value"] == 0.5
    assert value(read("dear-table11"), "1.0", "w L")["value"] == 0.239
    assert value(read("dear-table12"), "w/o SURE+DS", "Acc-2 has0", "MOSI")["value"] == 71.11
    assert value(read("dear-table13"), "w/o language", "Corr")["value"] == 0.121
    assert value(read("dear-table14"), "Gated Fusion", "F1 non0")["value"] == 70.10
    for table, average in ((15, 33.80), (16, 45.46)):
        rates = read(f"dear-table{table}")
        assert list(rates["row"].unique()) == [*(f"{r / 10}" for r in range(10)), "Avg"]
        assert value(rates, "Avg", "Acc-7")["value"] == average
    assert value(read("dear-table17"), "0.0", "Acc-3")["digits"] == 1


def test_cells_are_those_of_balm() -> None:
    sizes = read("balm-table5")
    assert value(sizes, "IEMOCAP", "train and valid", "utterances")["value"] == 5810
    assert value(sizes, "IEMOCAP", "test", "dialogues")["value"] == 31
    assert value(sizes, "CMU-MOSEI", "test", "utterances")["value"] == 4659
    settings = read("balm-table6")
    assert value(settings, "d_{global}", "IEMOCAP")["value"] == "737"
    assert value(settings, "ρ", "both")["value"] == "(1.1, 1.6]"
    assert value(settings, "τ", "both")["value"] == "(0.2, 0.8]"
    grid = read("balm-table7")
    assert value(grid, "1.0", "1.6", "A")["value"] == grid.query("group == 'A'")["value"].max() == 66.30
    assert value(grid, "0.1", "1.4", "B")["value"] == grid.query("group == 'B'")["value"].max() == 62.41
    assert value(grid, "1.3", "1.6", "B")["value"] == grid.query("group == 'B'")["value"].min() == 58.39
    accuracy = read("balm-table8")
    assert value(accuracy, "MMGCN+BALM", "ALV", "(0.3, 0.5, 0.7)")["value"] == 62.78
    assert [value(accuracy, m, "V", "Average")["value"] for m in ("GCNet", "GCNet+BALM")] == [33.31, 32.05]
    assert [value(read("balm-table9"), m, "V", "Average")["value"] for m in ("GCNet", "GCNet+BALM")] == [31.21, 29.34]
    calibrated = read("balm-table10")
    assert value(calibrated, "A", "MMGCN Acc", "IEMOCAP")["value"] == 31.05
    assert value(calibrated, "Avg", "+FCM w-F1", "CMU-MOSEI")["value"] == 70.09
    shared = value(read("balm-table11"), "0.5", "w-F1", "MMGCN+BALM")
    assert (shared["value"], shared["plus_minus"]) == (61.82, 1.72)
    assert value(read("balm-table12"), "0.0", "Acc", "Mi-CGA")["plus_minus"] == 0.44
    assert value(read("balm-table13"), "(0.7, 0.5, 0.3)", "+BALM-S w-F1", "CMU-MOSEI")["value"] == 81.53


def test_the_main_papers_accuracy_follows_from_two_tables() -> None:
    """BALM is BALM-M minus the printed gap."""
    settings = [f"({a}, {b}, {c})" for a, b, c in (("0.3", "0.5", "0.7"), ("0.3", "0.7", "0.5"), ("0.5", "0.3", "0.7"),
                ("0.5", "0.7", "0.3"), ("0.7", "0.3", "0.5"), ("0.7", "0.5", "0.3"))]  # fmt: skip
    expected = {
        (14, "GCNet"): [61.31, 57.36, 61.31, 57.64, 59.33, 60.26],
        (14, "MMGCN"): [64.39, 60.07, 65.37, 62.29, 65.00, 61.74],
        (14, "MMDFN"): [67.34, 63.40, 68.76, 64.02, 67.22, 66.50],
        (15, "GCNet"): [81.54, 78.51, 83.27, 79.50, 83.63, 82.09],
        (15, "MMGCN"): [82.03, 78.73, 81.40, 79.83, 84.84, 82.50],
        (15, "MMDFN"): [82.06, 78.81, 84.34, 79.36, 84.78, 82.53],
    }
    for (table, net), accuracy in expected.items():
        frame, group = read(f"balm-table{table}"), f"{net}+BALM-M"
        for setting, number in zip(settings, accuracy, strict=True):
            found = value(frame, setting, "Acc", group)["value"] - value(frame, setting, "gap", group)["value"]
            assert found == pytest.approx(number, abs=0.005)


def test_cells_are_those_of_balms_main_tables() -> None:
    """Second-hand; +BALM's accuracy is that of Tables 14 and 15 in all but two cells."""
    first, second = read("balm-main-table1"), read("balm-main-table2")
    assert value(first, "(0.5, 0.7, 0.3)", "Acc", "GCNet")["value"] == 56.81
    assert value(first, "(0.3, 0.5, 0.7)", "w-F1", "GCNet")["value"] == 58.36
    differ = []
    for number, main in ((14, first), (15, second)):
        printed = read(f"balm-table{number}").set_index(["group", "row", "column"])["value"]
        for net, ours in (("GCNet", "GCNet"), ("MMGCN", "MMGCN"), ("MM-DFN", "MMDFN")):
            for where in printed.index.unique("row"):
                found = printed[f"{ours}+BALM-M", where, "Acc"] - printed[f"{ours}+BALM-M", where, "gap"]
                differ += [abs(value(main, where, "Acc", f"{net}+BALM")["value"] - found) > 0.011]
    assert (len(differ), sum(differ)) == (36, 2)


def test_cells_are_those_of_mce() -> None:
    assert value(read("mce-table1"), "Learning rate", "AudiovisionMNIST")["value"] == "1e-3"
    ablation = read("mce-table2")
    cells = value(ablation, "a", "IEMOCAP (Accuracy)")
    assert (cells["value"], cells["plus_minus"], cells["low"], cells["high"]) == (53.90, 0.86, 53.24, 54.55)
    assert value(ablation, "m", "nuScenes (IoU)")["value"] == 39.80
    terms = ["A", "B", "single", "sub", "aux"]
    ticks = {row: [int(value(ablation, row, term)["value"]) for term in terms] for row in "abcdefghijklm"}
    assert ticks["a"] == [0, 0, 0, 0, 0]
    assert ticks["h"] == [0, 0, 1, 1, 1]
    assert ticks["i"] == [1, 0, 1, 1, 1]
    assert ticks["k"] == [1, 1, 1, 0, 0]
    assert ticks["j"] == ticks["m"] == [1, 1, 1, 1, 1], "as printed; the text says that j is B alone"
    assert value(read("mce-table3"), "RedCore", "d")["value"] == 31.04
    tumour = value(read("mce-table4"), "MBT-Sample", "f", "TC")
    assert (tumour["value"], tumour["plus_minus"]) == (68.80, 0.68)
    assert value(read("mce-table5"), "baseline", "b")["plus_minus"] == 9.46
    batch = read("mce-table6")
    assert value(batch, "phi", "A", "early, IEMOCAP")["value"] == 23.6667
    assert value(batch, "B", "V", "late, IEMOCAP")["value"] == -0.1067
    assert value(batch, "number", "T1", "early, BraTS2020")["value"] == 0
    assert value(read("mce-table7"), "MCE", "Intra-class Distance")["value"] == 11.96
    assert value(read("mce-table8"), "MCE (Exact SV)", "Time (ms)")["value"] == 1046.9


def test_the_digits_of_a_value_are_those_printed() -> None:
    assert value(read("mce-table6"), "phi", "T1", "early, BraTS2020")["digits"] == 4
    assert value(read("mce-table5"), "MCE", "a")["digits"] == 2
    assert value(read("mce-table8"), "Baseline", "GPU Memory (MB)")["digits"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**60.93±1.39**", {"value": "60.93", "plus_minus": "1.39"}),
        ("49.72 \\pm 4.52", {"value": "49.72", "plus_minus": "4.52"}),
        ("[53.24, 54.55]", {"low": "53.24", "high": "54.55"}),
        ("-0.0717", {"value": "-0.0717"}),
        ("0.5000", {"value": "0.5000"}),
        ("3×10^{-4}", {"value": "3e-4"}),
        ("OneCycle [43]", {"value": "OneCycle"}),
        ("<u>82.57</u>", {"value": "82.57"}),
    ],
)
def test_a_cell_is_split_into_its_numbers(text: str, expected: dict[str, str]) -> None:
    assert cell("RedCore [14]", "a", text) == {"group": "", "row": "RedCore", "column": "a", **expected}


def papers() -> Path | None:
    given = os.environ.get("MMLIB_PAPERS")
    folder = Path(given) if given else build.ROOT.parent / "shared" / "papers"
    return folder if folder.is_dir() else None


@pytest.mark.parametrize("paper", TABLES)
def test_the_script_makes_the_stored_tables(paper: str) -> None:
    folder = papers()
    source = TEXTS.get(paper, f"{paper}.txt")
    if folder is None or not (folder / source).exists():
        pytest.skip("the paper's text is not at hand; name its folder in MMLIB_PAPERS")
    made = transcribe(paper, (folder / source).read_text(encoding="utf-8"))
    for name, text in made.items():
        assert (FOLDER / f"{name}.csv").read_text(encoding="utf-8") == text, name


def test_a_lost_cell_is_noticed() -> None:
    folder = papers()
    if folder is None:
        pytest.skip("the paper's text is not at hand; name its folder in MMLIB_PAPERS")
    text = (folder / "mce.txt").read_text(encoding="utf-8").replace("MBT-Sample [16]\t8.37", "MBT-Sample [16]")
    with pytest.raises(AssertionError):
        transcribe("mce", text)


def test_the_audit_of_dream_is_what_its_table_gives() -> None:
    from book.studies import dream_tables

    stored = audit("DREAM")
    assert set(stored["severity"]) <= set(SEVERITIES)
    computed = dream_tables.audit().drop(columns="paper")
    for row in computed.itertuples(index=False):
        assert (stored == pd.Series(row._asdict())).all(axis=1).sum() == 1, row.item
    words = set(stored["item"]) - set(computed["item"])
    assert len(words) == 4, "what the text says of an architecture or a clock"


def test_the_audit_of_balm_is_what_its_tables_give() -> None:
    from book.studies import balm_audit

    columns = ["item", "printed", "recomputed", "severity", "note"]
    stored = audit("BALM")[columns].sort_values("item").reset_index(drop=True)
    computed = balm_audit.audit()[columns].sort_values("item").reset_index(drop=True)
    pd.testing.assert_frame_equal(stored, computed)
