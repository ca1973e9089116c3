"""What DREAM's pages compare: each claim with the cells that it names, in the paper's order."""

from __future__ import annotations

import numpy as np
import pytest

from book.drawings import dream as drawings
from book.studies import dream as study
from book.studies import dream_tables
from book.support import verdicts

FOLDER = study.path("cost").parent


@pytest.fixture(scope="module")
def stored() -> dict[str, object]:
    return dream_tables.stored(FOLDER)


def test_the_columns_are_those_of_the_paper() -> None:
    found = dream_tables.conditions()
    assert list(found) == dream_tables.PAPER_COLUMNS
    assert found["l+v"] == "language+vision"
    assert len(found["Avg"]) == 6
    assert found["l+a+v"] not in found["Avg"]


def test_the_papers_differences_stand_beside_ours(stored) -> None:
    assert len(dream_tables.table1(stored["table1_synthetic"])) == 24
    pairs = dream_tables.table1(stored["table1_mosi"], "MOSI", with_language=True)
    assert len(pairs) == 12, "three methods in four columns: without language a constant does as well"
    beside = {(p.group, p.label): p.paper for p in pairs}
    assert beside["above CubeMLP", "l"] == pytest.approx(80.22 - 70.87)
    assert beside["above evaluator alone", "l"] == pytest.approx(80.22 - 78.45), "its part is CorrKD's"
    assert beside["above modality dropout", "l"] is None


def test_every_family_is_judged_whole(stored) -> None:
    families = {
        "frames": (dream_tables.frames(stored), 8),
        "slower": (dream_tables.slower(stored), 4),
        "parts": (dream_tables.mixed(stored, 4), 15),
        "evaluators": (dream_tables.mixed(stored, 5), 15),
        "headlines": (None, 15),
        "fair": (dream_tables.fair(stored), 8),
    }
    judged = {k: dream_tables.headlines(stored) if p is None else verdicts.judge(p) for k, (p, _) in families.items()}
    assert {k: len(f) for k, f in judged.items()} == {k: n for k, (_, n) in families.items()}
    assert all((f["verdict"] != "not run").all() for f in judged.values())
    board = dream_tables.board(judged)
    assert (board.drop(columns="fewest seeds").sum(axis=1) == [len(f) for f in judged.values()]).all()
    assert set(dream_tables.opening(stored, FOLDER)) >= {"supported", "cost", "use it when"}


def test_what_falls_faster_loses_more(stored) -> None:
    table, first = stored["fig3_synthetic"], dream_tables.slower(stored)[2]
    scores = [[table.scores((m, r)) for r in ("0.0", "0.9")] for m in ("DREAM", "CubeMLP")]
    (a, b), (c, d) = scores
    assert first.lower
    np.testing.assert_allclose(first.ours - first.theirs, [(a[s] - b[s]) - (c[s] - d[s]) for s in sorted(a)])


def test_the_counts_of_table_3_are_the_papers() -> None:
    counts = dream_tables.parameters()
    for name in ("MOSI", "MOSEI", "IEMOCAP"):
        assert (counts[f"{name}, paper"] == counts[f"{name}, ours"]).all()


def test_detection_by_hand(monkeypatch) -> None:
    counts = np.zeros((3, 2, 2), int)  # of values 0 and 0.5
    counts[0] = [[2, 6], [4, 0]]
    kept = {"values 0.3": np.array([0.0, 0.5]), "counts 0.3": counts}
    monkeypatch.setattr(dream_tables.results, "predictions", lambda path, config: kept)
    found = dream_tables.Detection(FOLDER).facts(("digits", "table3"), 0.3)
    assert found == {"recall": 1, "precision": 4 / 6, "q": 2 / 8, "missing": 4 / 12}
    monkeypatch.setattr(dream_tables.results, "predictions", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    assert dream_tables.Detection(FOLDER).facts(("digits", "table3"), 0.3) is None


@pytest.mark.usefixtures("no_window")
def test_the_plots_name_their_lines(stored) -> None:
    detection = dream_tables.Detection(FOLDER)
    figure = drawings.detection(detection.frame("precision").astype(float), {"a": 0.2, "b": float("nan")})
    words = [t.get_text() for ax in figure.axes for t in ax.texts]
    assert {"digits", "AV-MNIST", "not run", "0.20"} <= set(words)
    means = dream_tables.mean_frame(stored["fig3_avmnist"], ["CubeMLP", "DREAM"], map(str, study.FRAME_RATES))
    figure = drawings.frames(
        {"one": means.map(lambda c: c.mean), "two": means.map(lambda c: float("nan"))}, study.FRAME_RATES
    )
    assert {"CubeMLP", "DREAM", "not run"} == {t.get_text() for ax in figure.axes for t in ax.texts}


def test_a_constant_has_the_better_sign_of_each_column(stored, monkeypatch) -> None:
    target = np.array([1.0, 2, -1, -2, -3, 0])
    kept = {
        name: np.zeros(6) for tests in dream_tables.conditions().values() for name in [tests] if isinstance(name, str)
    }
    kept["vision"] = np.array([0.0, 0, np.nan, np.nan, np.nan, 0])  # without the negative ones: all positive
    monkeypatch.setattr(dream_tables.results, "predictions", lambda path, key: {**kept, "target": target})
    found = dream_tables.constant(stored["table1_mosi"])
    three_of_five = 3 / 5 * 2 * 3 / (2 * 3 + 2)  # recall 1, precision 3/5, and no F1 for the other class
    assert found["l"] == pytest.approx(three_of_five)
    assert found["v"] == pytest.approx(1)
    assert found["Avg"] == pytest.approx((5 * three_of_five + 1) / 6)


def test_floors_and_both_recipes_stand_in_one_table(stored) -> None:
    frame = dream_tables.fair_frame(stored)
    assert list(frame.index[:2]) == ["a constant (floor)", "a linear probe (floor)"]
    assert len(frame) == 2 + 2 * len(dream_tables.TRIED) + 1
    assert frame.at["DREAM, fixed", "mean of six"].n >= 3
    assert frame.at["a constant (floor)", "left"].mean < frame.at["a linear probe (floor)", "left"].mean
    grid = dream_tables.grid_frame(stored)
    assert set(grid["method"]) == set(dream_tables.TRIED)
