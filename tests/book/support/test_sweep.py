"""The command line behind the stored tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from book.support import results
from book.support.sweep import Sweep


def cells() -> dict[tuple[str, ...], list[dict[str, object]]]:
    return {
        (name,): [{"x": name, "train_plan": plan, "seed": s} for s in range(3)] for name, plan in ("a1", "b0", "c1")
    }


def run(config: dict[str, object]) -> results.Results:
    return results.Results([{"metric": "score", "value": ord(str(config["x"])) + int(str(config["seed"]))}])


def fails(config: dict[str, object]) -> results.Results:
    raise RuntimeError(f"no {config['x']} here")


SWEEP = Sweep("toy", {"one": cells, "same_runs": cells, "broken": cells}, run, {"broken": fails}, {"same_runs": "one"})


def test_runs_come_seed_by_seed_and_plan_by_plan() -> None:
    order = [(c["seed"], c["x"]) for c in SWEEP.configs("one")]
    assert order == [(s, x) for s in range(3) for x in "bac"]
    assert SWEEP.configs("one", seeds=2) == SWEEP.configs("one")[:6]
    assert SWEEP.configs("one", seeds=9) == SWEEP.configs("one")


def test_the_command_fills_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SWEEP.main(["one", "--seeds", "1", "--results", str(tmp_path)])
    stored = results.load_results(tmp_path / "toy-one.csv", SWEEP.configs("one", 1))
    assert list(stored["value"]) == [98, 97, 99]
    assert set(stored["command"]) == {"python -m book.studies.toy one --data-root FOLDER"}
    assert len(results.missing_runs(tmp_path / "toy-one.csv", SWEEP.configs("one"))) == 6
    SWEEP.main(["same_runs", "--results", str(tmp_path)])  # shares the file
    after = results.load_results(tmp_path / "toy-one.csv", SWEEP.configs("one"))
    assert len(after) == 9
    assert set(after["date"][:3]) == set(stored["date"]), "the first three ran again"
    assert "one: 3 runs" in capsys.readouterr().err


def test_a_table_has_its_own_runner_and_an_unknown_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="no b here"):
        SWEEP.main(["broken", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        SWEEP.main(["table9", "--results", str(tmp_path)])
    assert "invalid choice: 'table9'" in capsys.readouterr().err
