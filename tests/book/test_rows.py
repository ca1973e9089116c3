"""Stored results can be had again: three runs of every table, others every day, give their rows within two samples.

A table is a file of ``book/results`` whose runs `experiments.train_and_score` can do, or that names a runner below.
New tables join by being there. The runs are drawn from a table's cheapest ones: about a fifth of a minute for each.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from book import balm_runs, build, dear_runs, dream_runs, imbalance_runs
from mmlib import data, experiments

RESULTS = build.ROOT / "book" / "results"
SECONDS = 12  # the drawn runs of a table took no longer than this when they were stored
LONGEST = 60  # unless its three cheapest did: up to this
EMBEDDED = ("digits", "synthetic", "confounded", "conversations")


def linear_probe(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The probes of the chapter *Data and metrics*: a logistic regression on the flattened features."""
    from sklearn.linear_model import LogisticRegression

    splits = data.load(config["data"], config["data_root"], **config["data_options"])
    flat = lambda split: np.hstack([split.data.features[m].flatten(1).numpy() for m in config["modalities"]])
    model = LogisticRegression(max_iter=2000).fit(flat(splits["train"]), splits["train"].target.numpy())
    right = model.predict(flat(splits["test"])) == splits["test"].target.numpy()
    common = {"test": "+".join(config["modalities"]), "metric": "accuracy", "n": len(right)}
    return [{**common, "value": float(right.mean()), "data_hash": splits["test"].info["fingerprint"][:12]}]


RUNNERS: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "linear probe": linear_probe,
    "detection": dream_runs.run_detection,
    "mask": dream_runs.run_mask,
    "reweighted": imbalance_runs.run,
    "mce+balm": balm_runs.run,
}


def runner(config: dict[str, Any]) -> Callable[[dict[str, Any]], list[dict[str, Any]]] | None:
    """What does the run of a stored config again; None where nothing here can."""
    if config.get("method") in RUNNERS:
        return RUNNERS[config["method"]]
    if config.get("protocol") == "lnln" and "text_encoder" not in config and config["test"] in dear_runs.SCORED:
        return dear_runs.score
    known = set(config) <= set(experiments.DEFAULTS) and config.get("method", "joint") in experiments.METHODS
    return experiments.train_and_score if known and config.get("backbone", "generic") in experiments.BACKBONES else None


def runs(path: Path) -> pd.DataFrame:
    """One row per run that can be done again on this machine: its hash, config and seconds."""
    stored = experiments.load_rows(path)
    stored = stored[stored["device"].str.startswith("cpu")]
    stored = stored.groupby("config_hash", as_index=False).agg({"config": "first", "seconds": "max"}).fillna(0.0)
    return stored[[runner(json.loads(text)) is not None for text in stored["config"]]]


def drawn(found: pd.DataFrame, day: str) -> pd.DataFrame:
    """Three of the cheapest runs, by a hash of the day: so many of them that no three take longer than `SECONDS`."""
    found = found.sort_values(["seconds", "config_hash"], ignore_index=True)
    longest_three = found["seconds"].rolling(3, min_periods=1).sum()
    cheap = found[longest_three <= SECONDS]
    if len(cheap) < 3:
        cheap = found[:3]
        cheap = cheap[cheap["seconds"].cumsum() <= LONGEST]
    order = [hashlib.sha256(f"{day} {key}".encode()).hexdigest() for key in cheap["config_hash"]]
    return cheap.iloc[np.argsort(order)[:3]]


def tolerance(metric: str, n: int) -> float:
    """What two test samples can change: an accuracy by 2 / n, a mean over classes by more."""
    if metric.startswith("acc"):
        return 2 / n + 1e-9
    return 4 / n + 1e-9 if "f1" in metric.lower() else max(0.02, 4 / n)


TABLES = [pytest.param(p, id=p.stem) for p in sorted(RESULTS.glob("*.csv"))]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("table", TABLES)
def test_three_stored_rows_come_out_again(table: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    chosen = drawn(runs(table), datetime.datetime.now(datetime.UTC).date().isoformat())
    if chosen.empty:
        pytest.skip(f"no run of {table.name} can be done again here in {LONGEST} s on a CPU")
    configs = [json.loads(text) for text in chosen["config"]]
    if any(config["data"] not in EMBEDDED for config in configs):
        root = str(request.getfixturevalue("real_data"))
        configs = [{**config, "data_root": root} for config in configs]
    stored = experiments.load_rows(table)
    for config in configs:
        again = runner(config)
        try:
            new = experiments.load_or_run(tmp_path / table.name, [config], again)
        except RuntimeError as error:
            if "FileNotFoundError" in str(error):
                pytest.skip(f"{config['data']}: its files are not in {config['data_root']}")
            raise
        old = stored[stored["config_hash"] == experiments.config_hash(config)]
        compare(old, new[new["metric"].isin(set(old["metric"]))])  # a table may keep some of the metrics


def compare(old: pd.DataFrame, new: pd.DataFrame) -> None:
    """The rows of one run: the same conditions, data and masks, and the same values within two samples."""
    keys = ["test", "metric", "n", "data_hash", "mask_hash"]
    if set(old["data_hash"]) != set(new["data_hash"]) and has_more_images(new):
        pytest.skip("MNIST's training images are at hand; the stored rows come from its test images alone")
    assert sorted(map(tuple, old[keys].values.tolist())) == sorted(map(tuple, new[keys].values.tolist()))
    both = old.merge(new, on=keys, suffixes=("_old", "_new"))
    for row in both.itertuples():
        if np.isnan(row.value_old) and np.isnan(row.value_new):
            continue
        change = abs(row.value_new - row.value_old)
        assert change <= tolerance(row.metric, row.n), (
            f"{row.config_hash_old}, {row.test}, {row.metric}: stored {row.value_old:.4f}, now {row.value_new:.4f}"
        )


def has_more_images(new: pd.DataFrame) -> bool:
    root = os.environ.get("MMLIB_DATA")
    return bool(root and set(new["data"]) == {"avmnist"} and list(Path(root).glob("mnist/train-images*")))


def test_every_day_draws_three_affordable_runs() -> None:
    found = pd.DataFrame({"config_hash": list("abcdefgh"), "config": "{}", "seconds": [9, 1, 2, 20, 12, 4, 100, 3.0]})
    days = [drawn(found, f"2026-01-{day:02}") for day in range(1, 31)]
    assert {len(day) for day in days} == {3}
    assert {key for day in days for key in day["config_hash"]} == set("bcfh")  # 2 + 3 + 4 <= 12 < 3 + 4 + 9
    assert drawn(found, "2026-01-01")["config_hash"].tolist() == days[0]["config_hash"].tolist()
    dear = found.assign(seconds=[35.0, 60, 70, 80, 90, 100, 110, 20])
    assert sorted(drawn(dear, "2026-01-01")["config_hash"]) == ["a", "h"]  # 20 + 35, and 60 more would be too long
    assert drawn(dear.assign(seconds=200.0), "2026-01-01").empty


def test_a_wrong_row_is_seen() -> None:
    row = {"config_hash": "a", "test": "image", "metric": "accuracy", "n": 450, "data_hash": "d", "mask_hash": "-/-"}
    old = pd.DataFrame([{**row, "value": 0.9}])
    compare(old, pd.DataFrame([{**row, "value": 0.9 + 2 / 450}]))
    for change in ({"value": 0.9 - 3 / 450}, {"n": 449, "value": 0.9}, {"data_hash": "e", "value": 0.9}):
        with pytest.raises(AssertionError):
            compare(old, pd.DataFrame([{**row, "data": "digits", **change}]))
