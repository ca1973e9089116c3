"""Sweeps: nothing finished is lost or run twice, whatever stops them; the general runner's rows are right."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from book.support.experiments import CURVES, load_or_run, subsets, train_and_score
from book.support.results import COLUMNS, Results, config_hash, grid, load_results, missing_runs, not_run, predictions
from mmlib import data as sources
from mmlib.baselines import JointTraining
from mmlib.missing import MissingPlan

ROOT = Path(__file__).resolve().parents[3]
VOLATILE = ["seconds", "peak_memory_mb", "date", "digest"]
KERNELS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
CALLS: list[dict] = []


def square(config: dict) -> Results:
    """A cheap run: two rows and predictions, all from the config."""
    CALLS.append(config)
    if config.get("fails"):
        raise ZeroDivisionError("on purpose")
    x = config["x"]
    rows = [{"condition": t, "metric": "accuracy", "value": x**2 / 7 + i, "n": 3} for i, t in enumerate(("a", "b"))]
    return Results(rows, {"a": np.full(3, x, dtype=np.int16)})


def stable(frame):
    return frame.drop(columns=VOLATILE)


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


# Configs


def test_grid_is_every_combination_in_order() -> None:
    assert grid(a=[1, 2], b=("x", "y"), c="z") == [
        {"a": 1, "b": "x", "c": "z"},
        {"a": 1, "b": "y", "c": "z"},
        {"a": 2, "b": "x", "c": "z"},
        {"a": 2, "b": "y", "c": "z"},
    ]
    assert grid() == [{}]
    assert grid(plan=[None, {"kind": "none"}], names=[["a", "b"]]) == [
        {"plan": None, "names": ["a", "b"]},
        {"plan": {"kind": "none"}, "names": ["a", "b"]},
    ]


def test_the_hash_names_what_is_computed_not_where() -> None:
    base = {"x": 1, "y": [0.5, None]}
    assert config_hash({"y": (0.5, None), "x": np.int64(1)}) == config_hash(base)
    assert config_hash({**base, "data_root": "/data", "device": "cuda", "progress": True}) == config_hash(base)
    assert len({config_hash(c) for c in (base, {**base, "x": 2}, {**base, "z": None})}) == 3
    with pytest.raises(TypeError, match="configs: expected values that JSON can hold"):
        config_hash({"x": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="configs: expected finite numbers"):
        config_hash({"x": math.nan})
    with pytest.raises(TypeError, match="config, configs: expected a dict by names"):
        config_hash({1: 2})
    for folder in ("/home/me/data", "C:\\data"):
        with pytest.raises(ValueError, match="configs: expected no absolute path but in data_root"):
            config_hash({"data_options": {"cache": [folder]}})


# The results file


def test_finished_runs_are_loaded_and_new_ones_added(tmp_path: Path) -> None:
    path = tmp_path / "results" / "squares.csv"
    first = load_or_run(path, grid(x=[1, 2], seed=[0]), square, command="make squares")
    assert len(CALLS) == 2
    frame = load_or_run(path, grid(x=[2, 3, 1], seed=[0]), square, command="make squares")
    assert [c["x"] for c in CALLS] == [1, 2, 3]
    assert [json.loads(c)["x"] for c in frame["config"]] == [2, 2, 3, 3, 1, 1]
    assert list(frame["value"]) == [x**2 / 7 + i for x in (2, 3, 1) for i in (0, 1)]  # full precision
    assert tuple(frame.columns) == COLUMNS
    assert stable(load_results(path, grid(x=[1, 2], seed=[0]))).equals(stable(first))
    row = frame.iloc[0]
    assert row["experiment"] == "squares"
    assert row["command"] == "make squares"
    assert row["torch"] == torch.__version__
    assert row["device"] == "cpu, 1 thread"
    assert row["seed"] == 0
    assert row["n"] == 3
    assert row["config_hash"] == config_hash({"x": 2, "seed": 0})
    assert math.isnan(row["seconds"])
    assert str(tmp_path) not in path.read_text()
    assert os.uname().nodename not in path.read_text()


def test_a_run_says_once_what_it_was(tmp_path: Path) -> None:
    """Files in which every row repeats it are read too, and are shorter after the next run."""
    path = tmp_path / "squares.csv"
    frame = load_or_run(path, grid(x=[1], seed=[0]), square, command="make squares")
    once = ["experiment", "kernels", "torch", "mmlib", "commit", "date", "command", "results", "digest", "config"]
    assert (frame[once].astype(str) != "").all(axis=None)
    assert set(frame["results"]) == {2}
    assert frame[once].nunique().eq(1).all()
    first, second = csv.DictReader(path.read_text().splitlines())
    assert [first[name] for name in once] == list(frame.loc[0, once].astype(str))
    assert [second[name] for name in once] == [""] * len(once)

    with path.open("w", newline="") as file:  # as older versions wrote it
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([first, {**second, **{name: first[name] for name in once}}])
    long = path.stat().st_size
    assert load_results(path).equals(frame)
    both = load_or_run(path, grid(x=[1, 2], seed=[0]), square, command="make squares")
    assert both[:2].equals(frame)
    assert path.stat().st_size < 2 * long - 2 * len(first["config"])


def test_what_is_not_run_is_said(tmp_path: Path) -> None:
    path = tmp_path / "squares.csv"
    configs = grid(x=[1, 2, 3])
    assert missing_runs(path, configs) == configs
    assert len(load_results(path)) == 0
    assert tuple(load_results(path).columns) == COLUMNS
    load_or_run(path, configs[:1], square)
    assert missing_runs(path, configs) == configs[1:]
    assert not_run(path, configs, "make squares") == "2 of 3 runs not run; `make squares` fills them in"
    load_or_run(path, configs, square)
    assert not_run(path, configs, "make squares") == ""


def test_predictions_are_kept_beside_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "squares.csv"
    load_or_run(path, grid(x=[4]), square)
    found = predictions(path, {"x": 4})
    assert found["a"].tolist() == [4, 4, 4]
    assert found["a"].dtype == np.int16
    assert predictions(path, config_hash({"x": 4})).keys() == found.keys()
    with pytest.raises(FileNotFoundError, match=r"no predictions of .* beside squares\.csv"):
        predictions(path, {"x": 5})
    load_or_run(path, grid(x=[4, 6]), square)
    assert predictions(path, {"x": 4})["a"].tolist() == [4, 4, 4]
    assert predictions(path, {"x": 6})["a"].tolist() == [6, 6, 6]
    key, file = config_hash({"x": 4}), tmp_path / "squares.npz"
    whole = file.read_bytes()
    assert sorted(np.load(file).files) == sorted(f"{config_hash({'x': x})}/a" for x in (4, 6))
    for wrong in ("../squares", f"squares/{key}", f"{key}/a", key.upper(), key[:-1], ""):
        with pytest.raises(
            ValueError, match="config: expected a config, or the 16 hexadecimal digits of its hash, got"
        ):
            predictions(path, wrong)
    for damaged in (whole[:40], whole[:-1], whole.replace(b"\x04\x00", b"\x05\x00"), whole[:90] + b"?" + whole[91:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file.name}: not a readable predictions file"):
            predictions(path, {"x": 4})
    file.write_bytes(whole[:40])
    with pytest.raises(RuntimeError, match=rf"{file.name}: not a readable predictions file"):
        load_or_run(path, grid(x=[7]), square)
    assert file.read_bytes() == whole[:40]
    assert missing_runs(path, grid(x=[4, 6, 7])) == [{"x": 7}]


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    path = tmp_path / "squares.csv"
    configs = [{"x": 1}, {"x": 2, "fails": True}, {"x": 3}]
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed, .*squares\.csv.*\"fails\": true[\s\S]*ZeroDivision"):
        load_or_run(path, configs, square)
    assert missing_runs(path, configs) == [configs[1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"metric": "accuracy"}, "lacks .'value'."),
        ({"metric": "accuracy", "value": 1.0, "accuracy": 1.0}, "got .'accuracy'."),
        ({"metric": "a\nb", "value": 1.0}, "line break in .'metric'."),
        (None, "expected at least one row, got none"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path: Path, row: dict | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        load_or_run(tmp_path / "x.csv", [{"x": 1}], lambda config: [row] if row else [])
    assert len(load_results(tmp_path / "x.csv")) == 0


def test_another_schema_experiment_or_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "squares.csv"
    path.write_text("method,accuracy\njoint,0.9\n")
    with pytest.raises(ValueError, match=r"squares\.csv: expected a results file with the columns .*'accuracy'"):
        load_or_run(path, grid(x=[1]), square)
    assert path.read_text() == "method,accuracy\njoint,0.9\n"
    for content in ("", "a note without a line end"):
        path.write_text(content)
        with pytest.raises(ValueError, match="expected a results file"):
            load_or_run(path, grid(x=[1]), square)
        assert path.read_text() == content

    path.unlink()
    load_or_run(path, grid(x=[1]), square)
    with pytest.raises(ValueError, match=r"expected rows of the experiment 'cubes', got rows of \['squares'\]"):
        load_or_run(path, grid(x=[2]), square, experiment="cubes")
    path.write_text(path.read_text().replace('""x"": 1', '""x"": 2'))
    with pytest.raises(ValueError, match=r"squares\.csv, line 2: the run \w{16} holds another configuration than its"):
        load_or_run(path, grid(x=[1]), square)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: [*lines[:4], *lines[5:]],
            "line 4: the run KEY says that it has 2 rows, and has 1: one was lost",
        ),
        (
            lambda lines: [*lines[:3], *lines[4:]],
            "line 4: the run KEY holds another .* its first row was lost or edited",
        ),
        (lambda lines: [*lines, lines[4]], "line 4: the run KEY says that it has 2 rows, and has 3: .* or doubled"),
        (lambda lines: [*lines, *lines[3:5]], "line 4: the run KEY says that it has 2 rows, and has 4"),
        (
            lambda lines: [*lines[:4], lines[4].replace(",3,", ",4,"), *lines[5:]],
            "line 4: the run KEY has .* was edited",
        ),
        (lambda lines: [*lines[:4], lines[4].replace(",1.57", ",abc"), *lines[5:]], "line 5, value: .* got 'abc14"),
        (
            lambda lines: [*lines[:4], lines[4].replace(",3,", ",3.5,"), *lines[5:]],
            "line 5, n: expected a whole number",
        ),
        (lambda lines: [*lines, "1,2,3"], f"line 8: expected {len(COLUMNS)} values, got 3"),
        (lambda lines: [*lines, "x" * 200_000], r"line 8: expected comma-separated values \(field larger"),
    ],
)
def test_a_run_that_lost_a_row_or_was_edited_is_refused(tmp_path: Path, change: Callable, message: str) -> None:
    path = tmp_path / "squares.csv"
    load_or_run(path, [{"x": 1}, {"x": 2}, {"x": 3}], square)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    message = message.replace("KEY", config_hash({"x": 2}))
    for read in (load_results, lambda path: load_or_run(path, [{"x": 2}], square)):
        with pytest.raises(ValueError, match=rf"squares\.csv, {message}"):
            read(path)


@pytest.mark.slow
def test_a_run_says_which_kernels_computed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNELS:
        monkeypatch.delenv(name, raising=False)
    (here,) = load_or_run(tmp_path / "squares.csv", [{"x": 1}], square)["kernels"].unique()
    assert re.fullmatch(r"[A-Z0-9]+( \S+)*", here)
    assert "=" not in here
    other = subprocess.run(  # in a process of its own, since PyTorch chooses its kernels once
        [sys.executable, "-c", "from book.support import experiments; print(experiments._kernels())"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert other == " ".join(["DEFAULT", *here.split()[1:], "ATEN_CPU_CAPABILITY=default", "MKL_CBWR=COMPATIBLE"])


@pytest.mark.slow
def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "squares.csv"
    configs = grid(x=[1, 2, 3])
    whole = stable(load_or_run(path, configs, square))
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    last = len(lines[-1])
    for cut in (len(text) - 1, len(text) - 30, len(text) - last + 12, len(text) - last - 5):
        path.write_bytes(text[:cut])
        CALLS.clear()
        with pytest.warns(UserWarning, match=r"squares\.csv ends in the middle of a line"):
            repaired = load_or_run(path, configs, square)
        assert [c["x"] for c in CALLS] == [3]
        assert stable(repaired).equals(whole)
        assert stable(load_results(path)).equals(whole)
    path.write_bytes(lines[0][:-20])  # within the header: nothing was stored yet
    assert stable(load_or_run(path, configs, square)).equals(whole)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "squares.csv"
    load_or_run(path, grid(x=[1]), square)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\); what was stored before"):
        load_or_run(path, grid(x=[1, 2]), square)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(load_or_run(path, grid(x=[1, 2]), square)) == 4


SWEEP = """
import sys, time
from book.support.results import grid
from book.support.experiments import load_or_run
from test_experiments import logged

def run(config):
    if config["x"] == 4:
        print("reached", flush=True)
        time.sleep(float(sys.argv[2]))
    return logged(config)

load_or_run(sys.argv[1], grid(x=[1, 2, 3, 4, 5], log=sys.argv[3]), run, workers=int(sys.argv[4]))
"""


def logged(config: dict) -> Results:
    """A run that writes down that it was done, not too fast."""
    with Path(config["log"]).open("a") as file:
        file.write(f"{config['x']}\n")
    time.sleep(0.05)
    return square(config)


def start(folder: Path, pause: float, workers: int = 1) -> subprocess.Popen:
    (folder / "sweep.py").write_text(SWEEP)
    return subprocess.Popen(
        [sys.executable, "sweep.py", "squares.csv", str(pause), "log", str(workers)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_what_a_killed_process_had_claimed_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("squares.csv")
    configs = grid(x=[1, 2, 3, 4, 5], log="log")
    process = start(tmp_path, pause=600)
    try:
        assert process.stdout.readline() == "reached\n"
        assert missing_runs(path, configs) == configs[3:]
        left = Path(".squares.csv.abcdefgh.tmp")
        left.write_text("what a write that was killed left")
        kill = threading.Timer(1.0, os.kill, (process.pid, signal.SIGKILL))
        kill.start()
        shared = load_or_run(path, configs, logged)
        assert not kill.is_alive(), "it waited for the run that the other process had"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [c["x"] for c in CALLS] == [5, 4]
    assert Path("log").read_text().split() == ["1", "2", "3", "5", "4"]
    assert {f.name for f in Path().glob(".*")} == {".squares.csv.lock"}, "no claim and no temporary file is left"
    alone = load_or_run("again.csv", configs, square, experiment="squares")
    assert stable(shared.sort_values(["config_hash", "condition"])).equals(
        stable(alone.sort_values(["config_hash", "condition"]))
    )


@pytest.mark.slow
def test_processes_share_the_runs_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = grid(x=[1, 2, 3, 4, 5], log="log")
    process = start(tmp_path, pause=1, workers=2)
    assert process.stdout.readline() == "reached\n"
    shared = load_or_run("squares.csv", [*configs[::-1], *grid(x=[6, 7], log="log")], logged)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert sorted(Path("log").read_text().split()) == list("1234567")
    assert {6, 7} <= {c["x"] for c in CALLS}
    assert 4 not in {c["x"] for c in CALLS}, "the other process does it"
    assert len(shared) == len(load_results("squares.csv")) == 14
    assert {f.name for f in Path().glob(".*")} == {".squares.csv.lock"}


def test_a_file_that_is_damaged_meanwhile_ends_the_sweep(tmp_path: Path) -> None:
    path = tmp_path / "squares.csv"

    def run(config: dict) -> Results:
        if config["x"] == 2:
            path.write_text("no results\n")
        return square(config)

    with pytest.raises(ValueError, match=r"squares\.csv: expected a results file"):
        load_or_run(path, grid(x=list(range(8))), run, workers=2, backend="threading")
    assert len(CALLS) < 8


def slowly(config: dict) -> Results:
    time.sleep(0.02)
    return square(config)


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    configs = grid(x=list(range(12)))
    here = load_or_run(tmp_path / "one" / "squares.csv", configs, slowly)
    there = load_or_run(tmp_path / "two" / "squares.csv", configs, slowly, workers=2)
    assert stable(there).equals(stable(here))
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        load_or_run(tmp_path / "two" / "squares.csv", [{"x": 20}, {"x": 21, "fails": True}], square, workers=2)
    assert len(load_results(tmp_path / "two" / "squares.csv", [{"x": 20}])) == 2


@pytest.mark.slow
def test_a_dask_cluster_of_two_processes_gives_the_same_rows(tmp_path: Path) -> None:
    configs = [{**SMALL, "seed": seed} for seed in (0, 1)]
    here = load_or_run(tmp_path / "one" / "runs.csv", configs)
    there = load_or_run(tmp_path / "two" / "runs.csv", configs, workers=2, backend="dask")
    assert stable(there).equals(stable(here))
    for config in configs:
        one, two = (predictions(tmp_path / folder / "runs.csv", config) for folder in ("one", "two"))
        assert all(np.array_equal(one[k], two[k]) for k in one)


def test_workers_must_be_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers: expected an integer of at least 1, got 0"):
        load_or_run(tmp_path / "x.csv", [], workers=0)


# The general runner

SMALL = {
    "data": "digits",
    "backbone_options": {"width": 16},
    "train": {"epochs": 2, "lr": 1e-2},
    "conditions": "subsets",
    "profile": "tiny",
}


def test_subsets_are_named_by_their_modalities() -> None:
    assert subsets(("a", "b", "c")) == {
        **{"a": ["a"], "b": ["b"], "c": ["c"], "a+b": ["a", "b"], "a+c": ["a", "c"], "b+c": ["b", "c"]},
        "a+b+c": ["a", "b", "c"],
    }


@pytest.mark.slow
def test_train_and_score_on_every_subset() -> None:
    rows = train_and_score({**SMALL, "train_plan": {"kind": "bernoulli", "rates": [0.3, 0.3, 0.3]}, "seed": 3})
    test = sources.load("digits")["test"]
    assert [r["condition"] for r in rows] == ["valid", *subsets(test.modalities)]
    assert {r["metric"] for r in rows} == {"accuracy"}
    assert all(r["n"] == len(test) for r in rows[1:])
    target = test.target.numpy()
    assert rows.predictions["target"].tolist() == target.tolist()
    assert rows.predictions["ids"].tolist() == test.ids.tolist()
    for row in rows[1:]:
        found = rows.predictions[row["condition"]]
        assert found.dtype == np.int16
        assert row["value"] == pytest.approx(float(np.mean(found == target)))
    assert rows[-1]["value"] > 0.5
    assert rows[-1]["peak_memory_mb"] > 10
    training, validation = (rows.predictions[name] for name in CURVES)
    assert len(training) == len(validation) == 2
    assert training[1] < training[0]
    assert validation.max() == pytest.approx(rows[0]["value"])
    plan = MissingPlan("bernoulli", rates=[0.3, 0.3, 0.3], seed=3)
    assert rows[0]["mask_hash"].split("/")[0] == plan.draw(sources.load("digits")["train"]).fingerprint[:12]
    again = train_and_score({**SMALL, "train_plan": {"kind": "bernoulli", "rates": [0.3, 0.3, 0.3]}, "seed": 3})
    assert [r["value"] for r in again] == [r["value"] for r in rows]


@pytest.mark.slow
def test_train_and_score_under_named_plans_and_on_some_modalities() -> None:
    asked = [
        "complete",
        {"left only": ["left"], "half": {"kind": "bernoulli", "rates": 0.5, "seed": 7}},
    ]
    rows = train_and_score({**SMALL, "modalities": ["left", "right"], "conditions": asked, "valid_plan": None})
    assert [r["condition"] for r in rows] == ["valid", "complete", "left only", "half"]
    test = sources.load("digits")["test"].select(["left", "right"])
    mask = MissingPlan("bernoulli", rates=0.5, seed=7).draw(test)
    assert rows[-1]["mask_hash"] == f"-/{mask.fingerprint[:12]}"
    assert rows[1]["value"] > rows[3]["value"] > 0.1


def test_the_last_epoch_is_scored_beside_the_best_one() -> None:
    config = {**SMALL, "train": {"epochs": 5, "lr": 0.02}, "conditions": "complete"}
    best, both = train_and_score(config), train_and_score({**config, "last_epoch": True})
    assert [r["condition"] for r in both] == ["valid", "complete", "complete, last epoch"]
    assert [r["value"] for r in both[:2]] == [r["value"] for r in best]
    assert both.predictions[CURVES[1]].argmax() < 4, "the two are to differ"
    last = train_and_score({**config, "train": {**config["train"], "select": "last"}})
    assert (both.predictions["complete, last epoch"] == last.predictions["complete"]).all()
    assert both[2]["value"] == last[-1]["value"] != both[1]["value"]
    assert both[2]["mask_hash"] == both[1]["mask_hash"]


def test_samples_that_a_condition_leaves_empty_are_not_scored() -> None:
    asked = {"gaps": {"kind": "bernoulli", "rates": 0.5, "seed": 1, "allow_empty": True}}
    rows = train_and_score({**SMALL, "modalities": ["left"], "conditions": asked})
    found, target = rows.predictions["gaps"], rows.predictions["target"]
    assert rows[-1]["n"] == (found >= 0).sum() < len(target)
    assert rows[-1]["value"] == pytest.approx(float(np.mean((found == target)[found >= 0])))


@pytest.mark.slow
def test_train_and_score_on_scores() -> None:
    pytest.importorskip("mmlib.data.synthetic")
    options = {"task": "regression"} if "task" in sources.options("synthetic") else None
    if options is None:
        pytest.skip("synthetic has no option task")
    rows = train_and_score({**SMALL, "data": "synthetic", "data_options": options, "conditions": "complete"})
    assert {"mae", "corr", "acc2_non0"} <= {r["metric"] for r in rows}
    assert rows.predictions["complete"].dtype == np.float32


TALK = {
    "data": "conversations",
    "data_options": {"sizes": [24, 8, 12], "lengths": [1, 7]},
    "train": {"epochs": 2, "lr": 3e-3, "batch_size": 8, "monitor": "weighted_f1"},
    "profile": "tiny",
}
NETS = {
    "MMGCNBackbone": {"width": 16, "hidden": 8},
    "MMDFNBackbone": {"width": 16, "hidden": 8, "layers": 2},
    "GCNetBackbone": {"width": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("assign", ["shuffled", "blocked"])
def test_train_and_score_on_dialogues(net: str, assign: str) -> None:
    from sklearn.metrics import f1_score

    plan = {"kind": "imbalanced", "rates": {"audio": 0.5, "language": 0.3, "vision": 0.7}, "assign": assign}
    gaps = {"kind": "bernoulli", "rates": 0.6, "allow_empty": True, "seed": 5}
    asked = ["complete", "subsets", {"same": plan, "gaps": gaps}]
    config = {
        **TALK,
        "backbone": net,
        "backbone_options": NETS[net],
        "train_plan": plan,
        "conditions": asked,
        "seed": 1,
    }
    rows = train_and_score(config)
    test = sources.load("conversations", **TALK["data_options"])["test"]
    real = test.data.extras["utterance"]
    target = rows.predictions["target"]
    assert target.tolist() == test.target[real].tolist()
    assert rows.predictions["ids"].tolist() == test.ids.repeat_interleave(real.sum(-1)).tolist()
    assert {r["metric"] for r in rows} == {"accuracy", "weighted_f1"}
    n = {"valid": sources.load("conversations", **TALK["data_options"])["valid"].info["utterances"]}
    for row in rows:
        if row["condition"] == "valid":
            assert row["n"] == n["valid"]
            continue
        found = rows.predictions[row["condition"]]
        some = found >= 0
        assert found.shape == target.shape
        assert row["n"] == some.sum()
        assert some.all() == (row["condition"] != "gaps")
        truth, said = target[some], found[some]
        right = np.mean(truth == said)
        expected = right if row["metric"] == "accuracy" else f1_score(truth, said, average="weighted")
        assert row["value"] == pytest.approx(float(expected))
    train = sources.load("conversations", **TALK["data_options"])["train"]
    drawn = MissingPlan.from_dict({"seed": 1, **plan}).draw(train)
    assert rows[0]["mask_hash"].split("/")[0] == drawn.fingerprint[:12]
    assert drawn.realised()["samples"] == train.info["utterances"]
    assert [r["value"] for r in train_and_score(config)] == [r["value"] for r in rows]


@pytest.mark.slow
@pytest.mark.real
def test_train_and_score_on_real_dialogues(real_data: Path) -> None:
    path = real_data / "mosi" / "mosi_conversation.pkl"
    if not path.is_file():
        pytest.skip(f"no real data: {path} is not there")
    config = {
        "data": "dialogue",
        "data_root": str(path),
        "backbone": "MMGCNBackbone",
        "backbone_options": NETS["MMGCNBackbone"],
    }
    config |= {"train": {"epochs": 1, "batch_size": 16}, "conditions": "subsets", "profile": "tiny"}
    rows = train_and_score(config)
    counts = {r["condition"]: r["n"] for r in rows}
    assert counts["audio+language+vision"] == counts["audio"] == counts["language"] == 686
    assert counts["vision"] == 686 - 558  # where there is a face
    assert counts["valid"] == 229
    assert {"mae", "acc2_non0", "f1_non0"} <= {r["metric"] for r in rows}
    assert np.isnan(rows.predictions["vision"]).sum() == 558


@pytest.mark.slow
def test_dear_is_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"width": 8, "heads": 2, "head_width": 4, "hidden": 8}
    config = {
        **SMALL,
        "method": "DEAR",
        "method_options": sizes,
        "train_plan": {"kind": "lnln"},
        "conditions": "complete",
    }
    rows = train_and_score(config)
    assert rows[-1]["method"] == "DEAR"
    assert 0 <= rows[-1]["value"] <= 1
    monkeypatch.setattr("book.support.experiments._text_encoder", lambda place: torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="text_encoder: none of"):
        train_and_score({**config, "method_options": {**sizes, "text_encoder": "some-name"}})


@pytest.mark.slow
def test_other_methods_join_by_name() -> None:
    made = []

    class Mine(JointTraining):
        @classmethod
        def for_data(cls, data, backbone=None, valid=None, config=None, **options):
            made.append((data.modalities, valid.modalities, config.epochs, options))
            return cls(backbone, options["p"])

    config = {**SMALL, "method": "mine", "method_options": {"p": 0.2}, "conditions": "complete"}
    rows = train_and_score(config, {"mine": Mine})
    three = ("left", "right", "projection")
    assert made == [(three, three, SMALL["train"]["epochs"], {"p": 0.2})]
    assert rows[0]["method"] == "mine"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modality": ["left"]}, r"config: unknown entries \['modality'\]; known are .*'modalities'"),
        ({"method": "mce2"}, r"method: expected one of .*JointTraining.*got 'mce2'"),
        ({"backbone": "vit"}, r"backbone: expected one of .*GenericBackbone.*got 'vit'"),
        ({"train": {"epoch": 3}}, r"train: unknown settings \['epoch'\]"),
        ({"conditions": "all"}, "conditions: expected 'complete', 'subsets'"),
        ({"conditions": {"x": 3}}, r"conditions\['x'\]: expected a plan or a list of modalities"),
        ({"conditions": {"valid": ["left"]}}, "conditions: expected another name than 'valid'"),
        ({"conditions": {"x": ["top"]}}, "modality: expected one of .* got 'top'"),
        ({"train_plan": "bernoulli"}, "plan: expected None or a dict"),
    ],
)
def test_what_the_runner_does_not_know_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_and_score({**SMALL, "train": {"epochs": 1}, **config})
