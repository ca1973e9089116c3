"""Tables of stored runs: what is there is averaged and compared, what is not says so, nothing is run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from book.support import experiments, results, verdicts
from book.support.stored import SCORES, Stored
from mmlib import metrics

TARGET = np.arange(20) % 4


def config(method: str, seed: int) -> dict[str, object]:
    return {"method": method, "seed": seed, "data": "digits"}


def right(method: str, seed: int, test: str) -> np.ndarray:
    """Good is right where bad is, and on ten samples more."""
    hits = np.zeros(20, bool)
    hits[: {"good": 15, "bad": 5}[method] - seed] = True
    return hits if test == "both" else ~hits


def run(given: dict[str, object]) -> results.Results:
    rows, kept = results.Results(), {"target": TARGET.astype(np.int16), "ids": np.arange(20)}
    for test in ("one", "both"):
        hits = right(str(given["method"]), int(given["seed"]), test)  # type: ignore[call-overload]
        kept[test] = np.where(hits, TARGET, (TARGET + 1) % 4).astype(np.int16)
        rows.append({"condition": test, "metric": "accuracy", "value": float(hits.mean()), "n": 20})
    rows.append({"condition": "valid", "metric": "accuracy", "value": 0.0, "n": 9})
    if given["seed"]:  # the first seed is a run from before curves were kept
        kept["curve of validation"] = np.linspace(0, 1, 2 + int(given["seed"]), dtype=np.float32)  # type: ignore[call-overload]
    rows.predictions = kept
    return rows


CELLS = {(m,): [config(m, seed) for seed in (0, 1, 2)] for m in ("good", "bad")} | {("never",): [config("never", 0)]}


@pytest.fixture
def table(tmp_path: Path) -> Stored:
    path = tmp_path / "some.csv"
    done = [c for label, configs in CELLS.items() if label != ("never",) for c in configs]
    experiments.load_or_run(path, [c for c in done if c != config("bad", 2)], run)
    return Stored(path, CELLS, "fill it")


def test_a_mean_is_over_seeds_and_the_conditions_asked_for(table: Stored) -> None:
    assert table.scores(("good",), "both") == {0: 0.75, 1: 0.7, 2: 0.65}
    assert table.scores(("good",)) == {0: 0.5, 1: 0.5, 2: 0.5}, "both conditions, not the validation"
    assert table.scores(("good",), "valid") == {0: 0.0, 1: 0.0, 2: 0.0}
    assert table.mean(("good",), "both") == metrics.t_interval([0.75, 0.7, 0.65])
    assert table.scores(("good",), "no such test") == {}


def test_the_best_cell_is_the_one_that_validation_prefers(table: Stored) -> None:
    assert table.best([("bad",), ("good",), ("never",)]) == ("bad",), "the first of equals"
    with pytest.raises(ValueError, match=r"labels: expected cells with runs, got \[\('never',\)\]"):
        table.best([("never",)])


def test_curves_are_a_line_a_seed_as_far_as_they_go(table: Stored) -> None:
    assert table.curves(("never",)) == {}
    found = table.curves(("good",))
    assert list(found) == ["curve of validation"]
    lines = [[0, 0.5, 1, np.nan], [0, 1 / 3, 2 / 3, 1]]
    np.testing.assert_allclose(found["curve of validation"], lines, rtol=1e-6)


def test_what_is_not_stored_is_not_run(table: Stored) -> None:
    assert table.note() == "2 of 7 runs not run; `fill it` fills them in"
    assert table.mean(("never",)).n == 0
    assert table.pair("x", ("good",), ("never",)).ours is None
    assert Stored(table.path.with_name("none.csv"), CELLS, "fill it").note().startswith("7 of 7 runs not run")


def test_a_difference_is_paired_by_seed_and_sample(table: Stored) -> None:
    pair = table.pair("good", ("good",), ("bad",), "both", group="here")
    for side, method in ((pair.ours, "good"), (pair.theirs, "bad")):
        assert side is not None
        np.testing.assert_allclose(side, np.stack([right(method, s, "both") for s in (0, 1)]) * 1.0)
    assert (pair.metric, pair.percent, pair.lower, pair.group) == ("accuracy", True, False, "here")


def test_conditions_may_differ_on_the_same_samples(table: Stored) -> None:
    pair = table.pair("x", ("good",), ("good",), "both", "one")
    assert pair.theirs is not None
    np.testing.assert_allclose(pair.theirs[0], right("good", 0, "one") * 1.0)


def test_without_predictions_the_seeds_alone_are_compared(table: Stored) -> None:
    table.path.with_suffix(".npz").unlink()
    pair = table.pair("x", ("good",), ("bad",), "both")
    assert pair.ours is not None
    np.testing.assert_allclose(pair.ours, [[0.75], [0.7]])


def scored(given: dict[str, object]) -> results.Results:
    """A regression: predictions that are the target with more or less noise; "half" leaves nothing of every third."""
    rng = np.random.default_rng([int(given["seed"]), {"good": 1, "bad": 2}[str(given["method"])]])  # type: ignore[call-overload]
    target = np.linspace(-3, 3, 31).astype(np.float32)
    noise = {"good": 0.5, "bad": 2.5}[str(given["method"])]
    rows, kept = results.Results(), {"target": target, "ids": np.arange(31)}
    for test in ("all", "half"):
        said = (target + noise * rng.standard_normal(31)).astype(np.float32)
        if test == "half":
            said[::3] = np.nan
        there = ~np.isnan(said)
        kept[test] = said
        scores = metrics.msa_scores(said[there], target[there])
        rows += [
            {"condition": test, "metric": m, "value": float(scores[m]), "n": int(there.sum())}
            for m in ("f1_non0", "mae")
        ]
    rows.predictions = kept
    return rows


SCORED = {(m,): [config(m, seed) for seed in (0, 1, 2)] for m in ("good", "bad")}


@pytest.fixture
def scores_path(tmp_path: Path) -> Path:
    path = tmp_path / "scores.csv"
    experiments.load_or_run(path, [c for configs in SCORED.values() for c in configs], scored)
    return path


@pytest.mark.parametrize("metric", ["f1_non0", "mae"])
@pytest.mark.parametrize("conditions", ["all", "half", None])
def test_a_difference_of_scores_is_that_of_the_stored_values(
    scores_path: Path, metric: str, conditions: str | None
) -> None:
    table = Stored(scores_path, SCORED, metric=metric)
    pair = table.pair("x", ("good",), ("bad",), conditions)
    for side, label in ((pair.ours, ("good",)), (pair.theirs, ("bad",))):
        assert side is not None
        assert side.shape == (3, 31)
        np.testing.assert_allclose(side.mean(1), list(table.scores(label, conditions).values()), atol=1e-6)
    judged = verdicts.judge([pair, table.pair("y", ("bad",), ("good",), conditions)])
    assert judged["verdict"][0] in ("supported", "undecided"), "less is better of an error"
    assert judged["verdict"][1] in ("opposite", "undecided")
    assert (judged["effect"][0] > 0) == (metric == "f1_non0")


def test_how_many_samples_a_condition_has(scores_path: Path) -> None:
    table = Stored(scores_path, SCORED, metric="mae")
    assert table.samples(("good",), "all") == 31
    assert table.samples(("good",), "half") == 20
    assert table.samples(("good",), "none of these") is None


def test_accuracy_where_a_condition_leaves_nothing_counts_the_rest(tmp_path: Path) -> None:
    def partial(given: dict[str, object]) -> results.Results:
        rows = run(given)
        assert rows.predictions is not None
        rows.predictions["one"] = np.where(np.arange(20) < 5, -1, rows.predictions["one"]).astype(np.int16)
        return rows

    path = tmp_path / "part.csv"
    experiments.load_or_run(path, [c for m in ("good", "bad") for c in CELLS[m,]], partial)
    pair = Stored(path, CELLS).pair("x", ("good",), ("bad",), "one")
    hits = [right("good", s, "one")[5:].mean() for s in (0, 1, 2)]
    assert pair.ours is not None
    np.testing.assert_allclose(pair.ours.mean(1), hits)


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metric: expected one of \['acc2_has0', .*'weighted_f1'\], got 'f2'"):
        Stored(tmp_path / "x.csv", {}, metric="f2")


def test_the_weighted_f1_of_classes_is_that_of_the_library() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 5, 300).astype(float)
    said = np.where(rng.random(300) < 0.5, target, rng.integers(0, 6, 300))  # a class that never occurs
    kind = SCORES["weighted_f1"]
    parts = kind.parts(said, target)
    assert kind.score(parts.sum(0)) == pytest.approx(metrics.weighted_f1(said.astype(int), target.astype(int)))
    without = kind.score(parts.sum(0) - parts)  # one sample left out
    keep = np.arange(300) != 7
    assert without[7] == pytest.approx(metrics.weighted_f1(said[keep].astype(int), target[keep].astype(int)))


@pytest.mark.parametrize("metric", ["acc7", "acc5", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "corr"])
def test_every_score_of_a_regression_is_that_of_the_library(metric: str) -> None:
    rng = np.random.default_rng(0)
    target = rng.choice([-3.0, -1.4, -0.2, 0.0, 0.6, 2.4], 200)
    said = target + rng.normal(0, 1.2, 200)
    kind = SCORES[metric]
    sums = kind.parts(said, target).sum(0)
    assert kind.score(sums) == pytest.approx(metrics.msa_scores(said, target)[metric])
    assert kind.lower == (metric == "mae")
