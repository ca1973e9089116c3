"""Tables of stored runs: what is there is averaged and compared, what is not says so, nothing is run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from book.stored import Stored
from mmlib import experiments, metrics

TARGET = np.arange(20) % 4


def config(method: str, seed: int) -> dict[str, object]:
    return {"method": method, "seed": seed, "data": "digits"}


def right(method: str, seed: int, test: str) -> np.ndarray:
    """Good is right where bad is, and on ten samples more."""
    hits = np.zeros(20, bool)
    hits[: {"good": 15, "bad": 5}[method] - seed] = True
    return hits if test == "both" else ~hits


def run(given: dict[str, object]) -> experiments.Rows:
    rows, kept = experiments.Rows(), {"target": TARGET.astype(np.int16), "ids": np.arange(20)}
    for test in ("one", "both"):
        hits = right(str(given["method"]), int(given["seed"]), test)  # type: ignore[call-overload]
        kept[test] = np.where(hits, TARGET, (TARGET + 1) % 4).astype(np.int16)
        rows.append({"test": test, "metric": "accuracy", "value": float(hits.mean()), "n": 20})
    rows.append({"test": "valid", "metric": "accuracy", "value": 0.0, "n": 9})
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
    assert table.mean(("good",), "both") == metrics.t_interval([0.75, 0.7, 0.65])
    assert table.text(("good",), "both").startswith("70.0 ± ")
    assert table.scores(("good",), "no such test") == {}


def test_what_is_not_stored_is_not_run(table: Stored) -> None:
    assert table.note() == "2 of 7 runs not run; `fill it` fills them in"
    assert table.text(("never",)) == "not run"
    assert table.mean(("never",)).n == 0
    assert table.verdict(("good",), ("never",)) == "not run"
    assert table.claim("x", ("never",), ("good",)) == {
        "claim": "x", "difference": "", "95 % interval": "", "seeds": 0, "verdict": "not run",
    }  # fmt: skip
    assert Stored(table.path.with_name("none.csv"), CELLS, "fill it").note().startswith("7 of 7 runs not run")


def test_a_difference_is_paired_by_seed_and_sample(table: Stored) -> None:
    found = table.compare(("good",), ("bad",), "both")
    assert (found.n, found.samples) == (2, 20), "the seed that only one of them has does not count"
    assert math.isclose(found.mean, 0.5)
    by_hand = metrics.paired_bootstrap(
        np.stack([right("good", s, "both") for s in (0, 1)]) * 1.0,
        np.stack([right("bad", s, "both") for s in (0, 1)]) * 1.0,
        resamples=2000,
    )
    assert found == by_hand
    assert table.verdict(("good",), ("bad",), "both") == "holds"
    assert table.verdict(("bad",), ("good",), ["both"]) == "contradicted"
    assert table.claim("good is better", ("good",), ("bad",), "both")["difference"] == "+50.0"


def test_without_predictions_the_seeds_alone_are_compared(table: Stored) -> None:
    for file in table.path.with_name("some.predictions").iterdir():
        file.unlink()
    found = table.compare(("good",), ("bad",), "both")
    assert (found.n, found.samples) == (2, 1)
    assert math.isclose(found.mean, 0.5)
