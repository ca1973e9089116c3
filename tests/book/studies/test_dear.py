"""What the chapter on DEAR computes beside the library: its runs, small statistics, the toy and the schematic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from book.drawings import dear as drawings
from book.studies import dear as study
from book.studies import dear_checks
from book.support import experiments, results
from mmlib import data, losses, missing
from mmlib.methods.released.dear import OtherDEARConfig
from mmlib.missing import MissingPlan

SMALL = {"epochs": 1, "batch_size": 64, "lr": 1e-2}
FEW = {**study.DATA["synthetic"]["data_options"], "sizes": [60, 30, 40]}


pytestmark = pytest.mark.usefixtures("no_window")


def small(table: str, place: int = -1) -> dict:
    """A run of a table on a small data set for one epoch."""
    configs = list(study.TABLES[table]().values())[place]
    return {**configs[0], "train": SMALL, "data_options": FEW, "device": "cpu"}


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", study.TABLES)
def test_a_table_has_seeds_enough_and_options_that_exist(table: str) -> None:
    cells = study.TABLES[table]()
    keys = [results.config_hash(c) for configs in cells.values() for c in configs]
    assert len(set(keys)) == len(keys), "a run is in one cell of a table"
    for label, configs in cells.items():
        seeds = [c["seed"] for c in configs]
        assert len(set(seeds)) == len(seeds)
        assert len(seeds) >= {"tuning": 1, "leak": 1}.get(table, 3), label
        json.dumps(configs)
        for config in configs:
            if config["method"] == "DEAR":
                known = {*OtherDEARConfig.__dataclass_fields__, "preset", "text_encoder"}
                assert set(study.options(config)) <= known
    assert study.path(table).name.startswith("dear-")
    assert table in study.command(table)


def test_headline_tables_have_five_seeds() -> None:
    for table in ("table1_synthetic", "table1_mosi"):
        assert all(len(configs) == 5 for configs in study.TABLES[table]().values())


def test_tables_that_share_a_file_share_their_runs() -> None:
    first = study.table1_synthetic()["DEAR",]
    for table in ("ablations_synthetic", "alternatives_synthetic", "sensitivity_synthetic", "interpretations"):
        assert study.path(table) == study.path("table1_synthetic")
        assert study.TABLES[table]()["DEAR",] == first[:3]


def test_the_protocol_is_that_of_the_library() -> None:
    asked = study.protocol({"keep_ends": ["language"]})
    train, tests = missing.lnln_protocol(seed=3, keep_ends=["language"])
    assert MissingPlan.from_dict({"seed": 3, **asked["train_plan"]}) == train
    assert {name: MissingPlan.from_dict(plan) for name, plan in asked["conditions"].items()} == tests
    assert MissingPlan.from_dict(asked["valid_plan"]) == tests["r=0.5"]
    assert tuple(tests) == study.RATES


def test_a_scored_run_has_its_rows_and_small_predictions() -> None:
    rows = study.score(small("table1_synthetic"))
    tests = {row["condition"] for row in rows}
    assert tests == {"valid", *study.RATES, *experiments.subsets(["language", "audio", "vision"])}
    assert len({row["metric"] for row in rows}) == 8
    assert rows.predictions["r=0.9"].dtype == np.float16
    few = study.score(small("ablations_synthetic"))
    assert {row["metric"] for row in few} == set(study.KEPT)
    assert {row["condition"] for row in study.score(small("tuning", 0))} == {"valid", "r=0.5"}


def test_a_run_on_reliability_tells_of_every_sample() -> None:
    rows = study.run_reliability(small("reliability", 0))
    kept = rows.predictions
    assert kept["d"].shape == kept["e"].shape == (10, 40, 3)
    assert kept["said"].shape == (10, 40)
    assert kept["summary"].shape == (14, len(kept["columns"]))
    at = {name: i for i, name in enumerate(kept["columns"])}
    weights = kept["summary"][:, [at[f"w {m}"] for m in ("language", "audio", "vision")]]
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    same = [list(kept["conditions"]).index(c) for c in ("r=0.0", "sigma=0.0")]
    np.testing.assert_allclose(*kept["summary"][same], atol=1e-6, err_msg="no noise changes nothing")
    config = small("reliability", 0)
    config["method_options"] = {**config["method_options"], "dropout": 0.2}
    told = study.run_reliability(config).predictions
    assert told["deviation"].shape == (10, 40)
    assert (told["deviation"] > 0).all()
    assert "d" not in told


def test_selection_on_test_data_only_flatters() -> None:
    config = {**small("selection"), "train": {**SMALL, "epochs": 3}}
    rows = study.run_selection(config)
    value = {(row["condition"], row["metric"]): row["value"] for row in rows}
    for metric in ("acc7", "f1_non0", "corr"):
        assert value["best on test", metric] >= value["chosen on validation", metric]
    assert value["best on test", "mae"] <= value["chosen on validation", "mae"]


def test_noise_is_in_units_of_each_feature_and_only_there() -> None:
    split = data.load("synthetic", **{**FEW, "sizes": [10, 10, 2000]})["test"]
    lost = MissingPlan("frames", 0.5).draw(split).apply(split)
    loud = study.noisy(lost, "vision", 2.0)
    assert torch.equal(loud.data.features["audio"], lost.data.features["audio"])
    seen = lost.data.observed["vision"]
    assert torch.equal(loud.data.features["vision"][~seen], lost.data.features["vision"][~seen])
    change = (loud.data.features["vision"] - lost.data.features["vision"])[seen]
    torch.testing.assert_close(change.std(0), 2 * lost.data.features["vision"][seen].std(0), rtol=0.05, atol=0)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_bins_are_equally_full() -> None:
    d = np.arange(20.0)
    found = dear_checks.binned(d, 2 * d, 4)
    np.testing.assert_allclose(found.difficulty, [2, 7, 12, 17])
    np.testing.assert_allclose(found.error, [4, 14, 24, 34])
    with_holes = dear_checks.binned(np.append(d, 99), np.append(2 * d, np.nan), 4)
    np.testing.assert_allclose(with_holes.error, found.error)
    with pytest.raises(ValueError, match="at least 10"):
        dear_checks.binned(d[:3], d[:3])


def test_rank_correlation() -> None:
    assert dear_checks.rank(np.array([1, 2, 3]), np.array([10, 20, 15])) == pytest.approx(0.5)
    assert dear_checks.rank(np.array([[1, 2], [3, np.nan]]), np.array([[3, 2], [1, 0]])) == pytest.approx(-1)
    assert np.isnan(dear_checks.rank(np.ones(3), np.arange(3)))


def test_selective_risk_by_hand() -> None:
    found = dear_checks.selective_risk(np.array([3, 1, 2, 4]), np.array([4.0, 0, 2, 6]), points=4)
    np.testing.assert_allclose(found.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.risk, [0, 1, 2, 3])
    assert found.area == pytest.approx(1.5)
    flat = dear_checks.selective_risk(np.ones(4), np.array([4.0, 0, 2, 6]), points=4)
    np.testing.assert_allclose(flat.risk, 3, err_msg="equal scores share their error")
    with pytest.raises(ValueError, match="score, error"):
        dear_checks.selective_risk(np.ones(3), np.ones(4))


def test_stories_are_read_as_far_as_they_are_stored(tmp_path: Path) -> None:
    config = small("reliability", 0)
    path = tmp_path / "dear-reliability.csv"
    experiments.load_or_run(path, [config], study.run_reliability)
    tale = dear_checks.Stories(path, [config, {**config, "seed": 7}])
    assert len(tale) == 1
    assert tale.summary("gate", study.RATES).shape == (1, 10)
    assert tale.arrays("d").shape == (1, 10, 40, 3)
    assert tale.target.shape == (40,)
    assert dear_checks.Stories(tmp_path / "none.csv", [config]).summary("gate", ["r=0.0"]).shape == (0, 1)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_overview_names_every_part() -> None:
    words = " ".join(text.get_text() for ax in drawings.overview().axes for text in ax.texts)
    for part in ("HDCR", "SURE", "synergistic", "robust", "gate", "L_{cal}", "L_{joint}"):
        assert part in words


def test_the_toy_repairs_a_cloud_or_a_sample() -> None:
    by_point, by_cloud = drawings.repaired("mse", 60), drawings.repaired("mmd", 60)
    assert by_point.mse < by_cloud.mse
    assert by_cloud.mmd < by_point.mmd
    assert by_point.variance < by_cloud.variance
    x, f = drawings.clouds(400, 10_000_000)
    assert by_cloud.mmd == pytest.approx(losses.mmd(by_cloud.x, x).item(), abs=1e-6)
    assert (f - x).std() > 1
    with pytest.raises(ValueError, match="loss"):
        drawings.repaired("l1")
