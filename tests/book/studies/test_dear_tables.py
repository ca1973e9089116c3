"""The audit of DEAR's tables is what its printed numbers give; and the comparisons of its pages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from book import paper_tables
from book.drawings import dear as drawings
from book.studies import dear as study
from book.studies import dear_checks, dear_live, dear_main, dear_tables
from book.studies.dear_main import Main
from book.studies.dear_tables import paper_gap
from book.support import verdicts
from mmlib import DEAR

RESULTS = Path(dear_tables.__file__).resolve().parents[1] / "results"


def values(name: str, group: str = "") -> pd.DataFrame:
    cells = paper_tables.read(name)
    cells = cells[cells["group"] == group] if group else cells
    wide = cells.pivot(index="row", columns="column", values="value")
    return wide.loc[cells["row"].unique(), cells["column"].unique()].astype(float)


def decimals(name: str, column: str) -> int:
    cells = paper_tables.read(name)
    return int(cells[cells["column"] == column]["digits"].max())


def recomputed() -> dict[str, tuple[str, str, bool]]:
    """Item -> (as printed, as the other tables have it, whether they agree)."""
    found: dict[str, tuple[str, str, bool]] = {}

    def check(what: str, said: str, again: str, agrees: Any) -> None:
        found[what] = said, again, bool(agrees)

    # Averages over rates, and where they are quoted
    for number, quoted, group in (
        (15, "dear-table1", "MOSI"),
        (16, "dear-table1", "MOSEI"),
        (17, "dear-table2", ""),
    ):
        table = values(f"dear-table{number}")
        mean = table.drop(index="Avg").mean()
        off = [
            c
            for c in table
            if abs(mean[c] - table.loc["Avg", c]) > 0.5 * 10.0 ** -decimals(f"dear-table{number}", c) + 1e-6
        ]
        check(
            f"T{number}: averages of its ten rows",
            f"{len(table.columns)} columns",
            f"{len(table.columns) - len(off)} agree",
            not off,
        )
        same = values(quoted, group).loc["DEAR"]
        off = [c for c in table if abs(same[c] - table.loc["Avg", c]) > 1e-9]
        check(
            f"T{number}: its averages are those of {quoted.removeprefix('dear-t').replace('able', 'T')}",
            "equal",
            f"{len(off)} differ",
            not off,
        )
    four = {g: values("dear-table4", f"MOSEI, {g}") for g in ("first", "second")}
    off = sum(abs(t.drop(columns="Avg").mean(axis=1) - t["Avg"]).gt(0.0051).sum() for t in four.values())
    check("T4: averages of six subsets", "14 rows", f"{14 - off} agree", not off)

    # One number, several tables
    places = {
        "T3": values("dear-table3", "SIMS").loc["DEAR", "Acc-5"],
        "T2": values("dear-table2").loc["DEAR", "Acc-5"],
        "T6": values("dear-table6", "SIMS").iloc[0]["Acc-5"],
        "T17": values("dear-table17").loc["Avg", "Acc-5"],
    }
    check(
        "T3: DEAR's Acc-5 on SIMS",
        f"{places['T3']:.2f}",
        " / ".join(f"{k} {v:.2f}" for k, v in places.items() if k != "T3"),
        len(set(places.values())) == 1,
    )
    other = paper_tables.read("dream-table1")
    other = other[(other["group"] == "MOSI") & (other["row"] == "MLPMM")].set_index("column")["value"]
    mine = four["first"].loc["MPLMM"]
    match = [
        mine[k] == other[v]
        for k, v in (("L", "l"), ("A", "a"), ("V", "v"), ("L+A", "l+a"), ("L+V", "l+v"), ("V+A", "a+v"))
    ]
    check(
        "T4: the first half is MOSEI",
        "both halves MOSEI",
        f"MPLMM as DREAM's for MOSI, {sum(match)} of 6",
        sum(match) < 3,
    )
    eleven = values("dear-table11")
    sums = eleven[["w L", "w V", "w A"]].sum(axis=1)
    check(
        "T11: weights of a softmax sum to 1",
        "four rows",
        " / ".join(f"{s:.3f}" for s in sums),
        bool((abs(sums - 1) <= 0.0016).all()),
    )
    check(
        "T11: Acc-7 without noise is T15's at r = 0",
        f"{eleven['Acc-7'].iloc[0]:.2f}",
        f"{values('dear-table15')['Acc-7'].iloc[0]:.2f}",
        eleven["Acc-7"].iloc[0] == values("dear-table15")["Acc-7"].iloc[0],
    )
    check(
        "T11: w of vision and noise, Spearman",
        "-1.0",
        f"{dear_checks.rank(np.arange(4), eleven['w V'].to_numpy()):+.1f}",
        True,
    )
    sizes = paper_tables.read("dear-table5").pivot(index="row", columns="column", values="value")
    off = [
        r
        for r in sizes.index
        if sum(int(sizes.loc[r, c]) for c in ("Train", "Valid", "Test")) != int(sizes.loc[r, "Video clip"])
    ]
    check("T5: splits add up to the clips", "three data sets", f"{3 - len(off)} agree", not off)

    # Rows that repeat another data set's
    mosi, mosei = values("dear-table1", "MOSI"), values("dear-table1", "MOSEI")
    check(
        "T1: TETFN on MOSEI is a row of its own",
        "8 numbers",
        f"{(mosi.loc['TETFN'] == mosei.loc['TETFN']).sum()} are those for MOSI",
        (mosi.loc["TETFN"] == mosei.loc["TETFN"]).sum() < 2,
    )
    check(
        "T1: TFR-Net's Acc-5 on MOSEI",
        f"{mosei.loc['TFR-Net', 'Acc-5']:.2f}",
        f"{mosi.loc['TFR-Net', 'Acc-5']:.2f} on MOSI too",
        mosei.loc["TFR-Net", "Acc-5"] != mosi.loc["TFR-Net", "Acc-5"],
    )
    check(
        "T1: CENET's Acc-5 on MOSI",
        f"{mosi.loc['CENET', 'Acc-5']:.2f}",
        "33.62 in LNLN's corrigendum",
        mosi.loc["CENET", "Acc-5"] == 33.62,
    )

    # Words against numbers
    better_than = lambda table, column: (
        table.drop(index="DEAR")[column].min() if column == "MAE" else table.drop(index="DEAR")[column].max()
    )
    beats = lambda table, column: (
        table.loc["DEAR", column] < better_than(table, column)
        if column == "MAE"
        else table.loc["DEAR", column] > better_than(table, column)
    )
    place = int((mosi["Acc-2 has0"] > mosi.loc["DEAR", "Acc-2 has0"]).sum()) + 1
    check(
        "T1: DEAR's Acc-2 on MOSI, underlined",
        "second",
        f"number {place}, after {', '.join(mosi['Acc-2 has0'].drop('DEAR').nlargest(2).index)}",
        place == 2,
    )
    check(
        "4.1: best F1, MAE and Corr on MOSI",
        "best",
        f"{sum(beats(mosi, c) for c in ('F1 has0', 'F1 non0', 'MAE', 'Corr'))} of 4",
        all(beats(mosi, c) for c in ("F1 has0", "F1 non0", "MAE", "Corr")),
    )
    lead = ("Acc-2 has0", "Acc-2 non0", "F1 has0", "F1 non0", "MAE")
    check(
        "4.1: leads on MOSEI in Acc-2, F1, MAE",
        "yes",
        f"{sum(beats(mosei, c) for c in lead)} of 5",
        all(beats(mosei, c) for c in lead),
    )
    sims = values("dear-table2")
    check(
        "4.1: best in all metrics on SIMS",
        "all",
        f"{sum(beats(sims, c) for c in sims)} of {len(sims.columns)}",
        all(beats(sims, c) for c in sims),
    )
    ablated = {g: values("dear-table3", g).drop(index="DEAR") for g in ("MOSI", "SIMS")}
    worst = [
        (g, c) for g, t in ablated.items() for c in t if (t[c].idxmax() if c == "MAE" else t[c].idxmin()) == "w/o HDCR"
    ]
    total = sum(len(t.columns) for t in ablated.values())
    check(
        "4.2, T3: a squared error costs most",
        "the sharpest decline",
        f"in {len(worst)} of {total} columns",
        len(worst) == total,
    )
    ten = values("dear-table10", "MOSEI")
    better = sum((ten.drop(index="DEAR")[c] > ten.loc["DEAR", c]).sum() for c in ten if c != "MAE")
    check(
        "C.4, T10: removing a part degrades",
        "all",
        f"{int(better)} cells better without",
        not any((ten.drop(index="DEAR")[c] > ten.loc["DEAR", c]).any() for c in ten if c != "MAE"),
    )
    for group in ("MOSI", "SIMS"):
        six = values("dear-table6", group)
        best = sum((six[c].idxmin() if c == "MAE" else six[c].idxmax()) == six.index[0] for c in six)
        check(
            f"C.1, T6: the default weights are best, {group}",
            "optimal",
            f"in {best} of {len(six.columns)}; MAE number {int(six['MAE'].rank().iloc[0])} of 4",
            best == len(six.columns),
        )
    best = sum(t.drop(columns="Avg").idxmax().eq("DEAR").sum() for t in four.values())
    check("4.4, T4: best in most of twelve patterns", "most", f"{best} of 12", best > 6)
    up = {
        n: sum(
            int((values(f"dear-table{n}").drop(index="Avg")[c].diff().iloc[1:] * (-1 if c == "MAE" else 1) > 0).sum())
            for c in values(f"dear-table{n}")
        )
        for n in (15, 16, 17)
    }
    check(
        "C.9: scores decline as the rate increases",
        "naturally",
        ", ".join(f"T{n}: {k} rises" for n, k in up.items()),
        not any(up.values()),
    )
    return found


def test_the_audit_is_what_the_printed_numbers_give() -> None:
    stored = paper_tables.audit("DEAR").set_index("item")
    again = recomputed()
    assert set(again) == set(stored.index)
    for item, (printed, other, agrees) in again.items():
        row = stored.loc[item]
        assert (row["printed"], row["recomputed"]) == (printed, other), item
        assert (row["severity"] == "none") == agrees, item


def test_the_papers_differences() -> None:
    assert paper_gap("w/o HDCR", "MAE") == pytest.approx(1.049 - 1.134)
    assert paper_gap("w/o SURE+DS", "F1") == pytest.approx(72.76 - 71.00)
    assert paper_gap("6 layers", "MAE") == pytest.approx(1.049 - 1.089)
    assert paper_gap("Sinkhorn", "MAE") == pytest.approx(1.049 - 1.148)
    assert paper_gap("Sinkhorn", "F1") is None  # Table 9 does not print it
    assert paper_gap("joint training", "MAE") is None


FAMILIES = ("table1", "tuned", "ablations", "subsets", "variants", "sensitivity", "figure4", "table11", "ranking")
MAIN = ("headline", "parts", "choices", "reliability", "figure4")


@pytest.mark.slow
def test_families_of_the_stored_runs_are_judged() -> None:
    main = Main(RESULTS)
    told = main.told
    for words in FAMILIES:
        family = getattr(told, words)
        assert len(family), words
        assert (family["verdict"] != "not run").all(), words
        few = family["seeds"] < verdicts.FEW
        assert (family["exploratory"] == few).all(), words
    assert (main.headline["verdict"] != "not run").all()
    assert len(main.opening()) <= 6
    assert main.claims().index.is_unique
    assert set(main.cost()["updates"]) == {240}
    for name in ("rates", "gate", "calibration", "coverage"):
        figure = getattr(drawings, name)(told)
        assert all(ax.has_data() for ax in figure.axes), name
        plt.close(figure)


@pytest.mark.slow
def test_without_results_everything_is_not_run(tmp_path: Path) -> None:
    main = Main(tmp_path)
    told = main.told
    for tables, names in ((told, FAMILIES), (main, MAIN)):
        for words in names:
            family = getattr(tables, words)
            assert set(family["verdict"]) <= {"not run"}, words
    assert "not run" in main.opening()["DEAR over joint training"]
    assert set(main.claims()["ours"]) == {"not run"}
    assert main.agreement().empty
    assert told.leak().empty
    assert told.selection().empty
    for name in ("rates", "gate", "calibration", "coverage"):
        plt.close(getattr(drawings, name)(told))


def test_ranks_over_all_rates_and_within_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rates whose difficulties and errors both grow, in reversed order within each: pooled up, within down."""
    d = np.array([[1.0, 2.0], [3.0, 4.0]])[None, ..., None].repeat(3, -1)  # [seeds, rates, n, M]
    e = np.array([[2.0, 1.0], [4.0, 3.0]])[None, ..., None].repeat(3, -1)
    main = Main(RESULTS)
    monkeypatch.setattr(main, "stories", {"one": Tale({"d": d, "e": e}.__getitem__)}, raising=False)
    np.testing.assert_allclose(main.ranks("one", within=False), [[0.6] * 3])
    np.testing.assert_allclose(main.ranks("one", within=True), [[-1.0] * 3])


class Tale:
    """One seed of what a network said."""

    def __init__(self, arrays: Any):
        self.arrays = arrays

    def __len__(self) -> int:
        return 1


def test_the_best_setting_is_chosen_on_seeds_that_all_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = Main(tmp_path)
    assert main.best("DEAR") == study.FIXED  # nothing is run
    first, second, third = study.GRID
    found = {first: {0: 0.9, 1: 0.1}, second: {0: 0.8}, third: {0: 0.85, 1: 0.2}}
    monkeypatch.setattr(main, "stored", lambda table: SimpleNamespace(scores=lambda label, condition: found[label[1]]))
    assert main.best("DEAR") == second


def test_noise_for_text_changes_nothing_where_there_is_one_key() -> None:
    found = dear_main.noise_for_text([1, 3])["largest change"]
    assert found["1"] == 0
    assert found["3"] > 0.01


def test_slopes_over_seeds() -> None:
    x = np.array([0.0, 1, 2])
    np.testing.assert_allclose(dear_checks.slopes(x, np.stack([1 + 2 * x, 3 + 4 * x])), [2, 4])


def test_mixing_of_two_clouds() -> None:
    g = torch.Generator().manual_seed(0)
    X, R = torch.randn(200, 3, generator=g), torch.randn(200, 3, generator=g)
    assert dear_live.mixing(X, R) == pytest.approx(0.5, abs=0.1)
    assert dear_live.mixing(X, R + 50) == 0


def test_bert_in_numbers() -> None:
    bert = dear_tables.BERT()
    assert bert.count == 109_482_240
    shapes = {"language": (50,), "audio": (375, 5), "vision": (500, 20)}
    with torch.device("meta"):
        net = DEAR(bert, preset="table8", feature_shapes=shapes)
    assert bert.count + sum(p.numel() for p in net.parameters()) == 114_043_784
