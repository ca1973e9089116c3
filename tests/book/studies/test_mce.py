"""What MCE's pages compare, audit and train."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from book import paper_tables
from book.studies import mce as study
from book.studies import mce_audit, mce_claims, mce_live
from book.support import build, verdicts

RESULTS = build.ROOT / "book" / "results"


def test_the_audit_is_what_the_papers_tables_give() -> None:
    stored = pd.read_csv(paper_tables.FOLDER / "audit.csv", dtype=str, keep_default_na=False)
    stored = stored[stored["paper"] == "MCE"].reset_index(drop=True)
    pd.testing.assert_frame_equal(stored, mce_audit.audit().astype(str).reset_index(drop=True))
    assert set(stored["severity"]) <= set(paper_tables.SEVERITIES)


def test_the_checks_of_table_6_and_of_the_intervals() -> None:
    table = mce_audit.table6()
    assert len(table) == 14
    assert table["agrees"].all()
    found = mce_audit.intervals().set_index("row")["runs"]
    assert set(found["a":"d"]) == {"9"}
    assert set(found["e":"m"]) == {"10"}
    assert found.astype(int).to_dict() == mce_claims.RUNS


def test_the_papers_own_differences_by_welch() -> None:
    from scipy import stats

    effect, low, high = mce_claims.welch("m", "a")
    assert effect == pytest.approx(60.93 - 53.90)
    assert high - effect == pytest.approx(effect - low)
    found = stats.ttest_ind_from_stats(60.93, 1.39, 10, 53.90, 0.86, 9, equal_var=False)
    assert (low > 0) == (found.pvalue < 0.05)


def test_the_mean_over_settings_is_a_comparison_of_means() -> None:
    one = verdicts.compare("x", np.ones((3, 4)), np.zeros((3, 4)), group="a")
    two = verdicts.compare("x", np.zeros((3, 4)), np.zeros((3, 4)), group="b")
    whole = mce_claims.over_all([one, two], "x", "a and b")
    assert whole.ours.mean() == 0.5
    assert whole.group == "a and b"
    nothing = verdicts.compare("x", None, None)
    assert mce_claims.over_all([one, nothing], "x", "").ours is None


def test_every_comparison_of_the_evidence_was_run() -> None:
    tables = mce_claims.stored(RESULTS)
    families = [mce_claims.figure7(tables["fig7"]), mce_claims.presets(tables["interpretations"])]
    families += [mce_claims.presets(tables["releases"]), mce_claims.figure7_power(tables["fig7_power"])]
    families += [mce_claims.table2(tables, name) for name in ("digits", "avmnist")]
    families += [mce_claims.table5(tables[f"table5_{name}"]) for name in ("digits", "mfeat")]
    assert [len(f) for f in families] == [40, 15, 3, 7, 13, 6, 24, 24]
    assert all(pair.ours is not None for family in families for pair in family)
    whole = mce_claims.claims_as_a_whole(tables)
    assert len(whole) == 16
    lines = mce_claims.opening(tables, {"IEMOCAP": (1.14, 1.29)})
    assert len(lines) <= 6
    assert "not run" not in "".join(lines.values())
    elsewhere = mce_claims.stored(RESULTS / "nowhere")
    assert set(mce_claims.claims_as_a_whole(elsewhere)["verdict"]) == {"not run"}


def test_samples_of_one_recording_are_one_cluster(tmp_path, monkeypatch) -> None:
    """Two classes of 91 and 47 images on 45 recordings each: sums by recording, whose mean is the accuracy."""
    target = np.repeat([0, 1], [91, 47])
    said = target.copy()
    said[[0, 45, 90, 91]] = 7  # image 0, 45 and 90 of class 0 share its first sound; image 0 of class 1
    table = SimpleNamespace(
        seeds={("MCE",): [3]},
        keys={("MCE",): ["k"]},
        path=tmp_path,
        right=lambda key, condition: (said == target) * 1.0,
    )
    monkeypatch.setattr(mce_claims.results, "predictions", lambda path, key: {"target": target})
    found = mce_claims._by_recording(table, "MCE", "image")[3]
    assert len(found) == 90
    assert found.mean() == pytest.approx(134 / 138)
    scale = 90 / 138
    assert found[0] == 0
    assert found[1] == pytest.approx(2 * scale)
    assert found[45] == pytest.approx(1 * scale)  # class 1: its first two sounds have two images, one wrong here
    assert found[46] == pytest.approx(2 * scale)


def test_an_evaluation_that_ignores_its_mask_scores_everything() -> None:
    problem = _problem()
    model = problem.mce(**mce_live.TASK_ALONE)
    table = mce_live.mask_ignored(problem, model)
    assert table["mask ignored"].nunique() == 1
    batch = problem.test.drop(present=["left"])
    honest = (model.evaluator.eval()(batch).argmax(-1) == batch.target).float().mean().item()
    assert table.loc["left", "the others dropped"] == pytest.approx(honest)


def test_the_rows_of_table_2_switch_parts_on() -> None:
    assert study.ablation("")["rate_factor"] is False
    assert study.ablation("A B single sub aux") == {
        "rate_factor": True,
        "state_factor": True,
        "lambda_single": 1.0,
        "lambda_sub": 1.0,
        "lambda_aux": 1.0,
    }


def _problem() -> mce_live.Problem:
    setup = SimpleNamespace(
        dataset="digits", data_root="", seeds=[0], rates=[0.2, 0.5, 0.8], epochs=1, lr=0.003, device="cpu", width=8,
        weights=[1.0, 2.0, 1.0],
    )  # fmt: skip
    return mce_live.Problem(setup)


@pytest.mark.slow
def test_three_networks_are_watched_on_the_same_problem() -> None:
    problem = _problem()
    assert problem.rare == "projection"
    found = problem.watched(capability=True)
    assert list(found) == ["baseline", "MCE without B", "MCE"]
    steps = len(found["MCE"].factors.steps)
    assert steps == -(-len(problem.train) // problem.config.batch_size)
    left, least = found["MCE"].factors.gap()
    assert (left >= least - 1e-3).all()
    table = problem.by_subset(found)
    assert table.shape == (8, 3)
    assert table.loc["mean"].to_numpy() == pytest.approx(table.iloc[:7].mean().to_numpy())
    for w in found.values():
        assert len(w.probes.probes) == len(w.probes.scores) == 1
        quality = mce_live.fused_quality(problem, w.model)
        assert quality["ratio"] == pytest.approx(quality["within"] / quality["between"])
    again = _problem().watched()
    assert all(torch.equal(a, b) for a, b in zip(*(w["MCE"].model.parameters() for w in (found, again)), strict=True))


def test_copies_are_one_modality_again_and_again() -> None:
    problem = _problem()
    copies = mce_live.copies_of(problem.splits["valid"], 2)
    first, second = (copies.data.features[m] for m in copies.modalities)
    assert torch.equal(first, second)
    assert first.flatten(1).shape[1] == 8 * 4 + 8 * 4 + 8


@pytest.mark.slow
def test_operations_of_a_step_grow_with_the_subsets() -> None:
    table = mce_live.growth(3, few=2)
    assert table["subsets"].tolist() == [3, 7]
    assert table["all, LSTMs"].is_monotonic_increasing
    ratios = mce_live.step_ratios(4)
    assert 1 < ratios["IEMOCAP"][0] < ratios["IEMOCAP"][1] < 1.5
    assert 1 < ratios["AV-MNIST"][0] < 2 < ratios["AV-MNIST"][1]
    assert set(mce_live.cost(4, 1)["step"]) == set(mce_live.STEPS)


@pytest.mark.slow
def test_the_runner_trains_mce_with_its_bounds():
    from book.support.experiments import subsets, train_and_score

    config = {
        "data": "digits",
        "method": "MCE",
        "method_options": {"hidden": 32},
        "backbone_options": {"width": 32},
        "train_plan": {"kind": "exact_count", "rates": [0.2, 0.5, 0.8]},
        "conditions": "subsets",
        "train": {"epochs": 8},
    }
    rows = {row["condition"]: row["value"] for row in train_and_score(config)}
    assert set(rows) == {"valid", *subsets(["left", "right", "projection"])}
    assert rows["left+right+projection"] > 0.5
    again = {row["condition"]: row["value"] for row in train_and_score(config)}  # with the bounds kept from before
    assert again == rows
    complete = {**config, "method_options": {"hidden": 32, "upper_bounds": "complete"}}
    other = {row["condition"]: row["value"] for row in train_and_score(complete)}
    assert other != rows
    steps = {**config, "method_options": {"hidden": 32, "upper_bounds": "steps"}}
    longer = {row["condition"]: row["value"] for row in train_and_score(steps)}
    assert longer not in (rows, other)
    with pytest.raises(ValueError, match="upper_bounds"):
        train_and_score({**config, "method_options": {"upper_bounds": "none"}})
