"""The runs of the DREAM chapter: every cell can be run, scores are counted right, the known world is as described."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from book.drawings import dream as drawings
from book.studies import dream as study
from book.support import experiments, results
from mmlib import MultimodalDataset, coalitions
from mmlib.backbones import MLPEvaluator
from mmlib.methods import DREAM
from mmlib.missing import MissingPlan

TRAINED = [name for name in study.TABLES if name not in study.RUNNERS]
FAIR = ("grid_digits", "tuned_digits", "readings_digits")


@pytest.mark.parametrize("table", study.TABLES)
def test_every_cell_has_runs_of_its_own_with_equal_seeds(table: str) -> None:
    if not (cells := study.TABLES[table]()):
        pytest.skip("the grid is not run")
    if table.startswith("grid"):
        cells = {label: [{**c, "seed": c["seed"] - 100} for c in configs[:1]] for label, configs in cells.items()}
    hashes = [results.config_hash(c) for configs in cells.values() for c in configs]
    assert len(set(hashes)) == len(hashes)
    assert len({len(configs) for configs in cells.values()}) == 1
    for configs in cells.values():
        assert [c["seed"] for c in configs] == list(range(len(configs)))
    assert len(next(iter(cells.values()))) >= {
        "detection": 5,
        "table1_synthetic": 5,
        "table1_mosi": 5,
        "cost": 1,
        "grid_digits": 1,
    }.get(table, 3)


@pytest.mark.parametrize("table", FAIR)
def test_a_fair_trial_has_as_many_epochs_with_the_evaluator_as_the_evaluator_alone(table: str) -> None:
    cells = study.TABLES[table]()
    configs = [c for (name, *_), runs in cells.items() for c in runs if name != "evaluator, twice as long"]
    assert len({c["train"]["epochs"] * (2 if c["method"] == "DREAM" else 1) for c in configs}) <= 1
    assert len({c["train"]["batch_size"] for c in configs}) <= 1
    for c in configs:
        options = c.get("method_options", {})
        if c["method"] == "DREAM":
            assert options.get("evaluator_dropout", 0) == options.get("modality_dropout", 0)
            assert not isinstance(options.get("masked_fusion"), int) or options["enhance"] == "none"


def test_every_method_of_the_grid_has_the_same_dropouts_and_a_finalist_wins(tmp_path: Path) -> None:
    cells = study.grid("digits")
    for name in ("evaluator alone", "DREAM's net alone", "DREAM"):
        options = [make(0).get("method_options", {}) for (who, _), make in cells.items() if who == name]
        assert {o.get("modality_dropout", 0.0) for o in options} == set(study.DROPOUTS)
    assert study.chosen("digits", tmp_path) == {}

    def run(config: dict) -> list[dict]:
        mine = {k: v for k, v in config.items() if k != "valid_plan"}
        assert (mine == config) == (config["seed"] == 100), "the second seed is judged on every subset"
        place = [make(config["seed"]) for make in cells.values()].index(mine)
        value = 0.5 + 0.01 * place if config["seed"] == 100 else 0.9 - 0.02 * place  # the second seed turns them round
        return [{"condition": "valid", "metric": "accuracy", "value": value, "n": 10}]

    for _ in range(2):
        runs = [config for configs in study._grid("digits", tmp_path).values() for config in configs]
        experiments.load_or_run(study.path("grid_digits", tmp_path), runs, run)
    assert len(runs) == len(cells) + 3 * study.FINALISTS
    names = [label for label in cells if label[0] == "DREAM"]
    assert study.chosen("digits", tmp_path)["DREAM"] == names[-2]  # which the second seed prefers


@pytest.mark.parametrize("table", [name for name in TRAINED if name not in FAIR])
def test_a_table_gives_every_method_the_same_budget(table: str) -> None:
    cells = study.TABLES[table]()
    if table.startswith("longer"):
        cells = {label: configs for label, configs in cells.items() if label[1] == "36"}
    configs = [c for runs in cells.values() for c in runs]
    assert len({str(c["train"]) for c in configs}) == 1
    assert {c["backbone"] for c in configs} <= {"Table3Evaluator", "CubeMLPBackbone"}
    for c in configs:
        assert set(c) <= set(experiments.DEFAULTS)
        assert experiments.method_class(c["method"])
        if c["train_plan"]:
            MissingPlan.from_dict(c["train_plan"])


@pytest.mark.parametrize("table", ["mixed_digits", "fig3_synthetic"])
def test_what_is_missing_in_training_is_missing_in_testing(table: str) -> None:
    for configs in study.TABLES[table]().values():
        for config in configs:
            assert list(config["conditions"].values()) == [config["train_plan"]]


def test_the_known_world_is_as_described() -> None:
    splits = study.confounded(sizes=(400, 50, 50))
    train = splits["train"]
    assert train.modalities == ("language", "audio", "echo", "useless")
    x = {m: train.data.features[m].flatten(1) for m in train.modalities}
    noise = x["echo"] - x["language"]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05, "echo is language and noise of its own"
    correlation = lambda a, b: abs(np.corrcoef(a.flatten(), b.flatten())[0, 1])
    assert correlation(noise, x["language"]) < 0.05
    assert max(correlation(x["useless"], x[m]) for m in ("language", "audio", "echo")) < 0.05
    again = study.confounded(sizes=(400, 50, 50))["train"]
    assert all(torch.equal(train.data.features[m], again.data.features[m]) for m in train.modalities)


def test_scores_are_counted_by_presence_and_value() -> None:
    g = torch.Generator().manual_seed(0)
    features = {m: torch.randn(60, 3, generator=g) for m in "abc"}
    split = MultimodalDataset.from_arrays(features, torch.randint(3, (60,), generator=g))
    split = MissingPlan("bernoulli", rates=0.4, seed=1).draw(split).apply(split)
    torch.manual_seed(0)
    dream = DREAM.for_data(split, MLPEvaluator.for_data(split).eval(), width=8, heads=1)
    values, counts = study.pss_counts(dream, split)
    pss = dream.contributions(split[:]).pss.numpy()
    for m in range(3):
        for k, v in enumerate(values):
            for gone in (0, 1):
                hits = [n for n in range(60) if abs(pss[n, m] - v) < 1e-5 and bool(split.present[n, m]) != bool(gone)]
                assert counts[m, gone, k] == len(hits)
    assert counts.sum() == 180
    assert counts[:, 1, values > 0].sum() == 0, "what is missing never shifts the prediction"


def test_what_the_mask_does_by_hand() -> None:
    w = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, 0.0]])
    pss = torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.0, 0.0]])
    found = study.mask_facts(w, pss)
    assert found["negative w"] == pytest.approx(2 / 6)
    assert found["negative w, PSS above 0"] == pytest.approx(1 / 2)
    assert found["mixed samples"] == pytest.approx(2 / 3)
    # in sample 0 the logit of the modality that shifts falls from -1 to -1.5, so the enhanced one gains weight
    assert found["enhanced gain weight"] == pytest.approx(1 / 2)
    assert found["enhanced gain weight, add_log"] == 0
    share = lambda a, b: 1 / (1 + np.exp(b - a))
    assert found["weight of the enhanced"] == pytest.approx((share(1, -1.5) + share(1, 2)) / 2, abs=1e-6)
    assert found["weight of the enhanced, softmax(w)"] == pytest.approx((share(1, -1) + share(1, 1)) / 2, abs=1e-6)


def test_raw_weights_are_those_of_the_model() -> None:
    g = torch.Generator().manual_seed(0)
    split = MultimodalDataset.from_arrays({m: torch.randn(20, 4, 3, generator=g) for m in "ab"}, torch.arange(20) % 2)
    torch.manual_seed(0)
    dream = DREAM.for_data(split, MLPEvaluator.for_data(split).eval(), width=8, heads=1)
    w, pss = study.raw_weights(dream, split)
    assert torch.allclose(torch.softmax(w * (pss + 1), -1), dream.eval().weights(split[:]), atol=1e-6)
    assert not dream.weigh._forward_hooks


def _short(table: str, label: tuple[str, ...]) -> dict[str, object]:
    config = study.TABLES[table]()[label][0]
    return {**config, "train": {**config["train"], "epochs": 1}, "device": "cpu"}


def test_a_run_of_detection_finds_all_that_is_missing() -> None:
    rows = study.run_detection({**_short("detection", ("digits", "table3")), "rates": [0.3]})
    found = {row["metric"]: row["value"] for row in rows}
    assert found["recall"] == 1
    assert found["missing"] <= found["precision"] <= 1
    assert rows.predictions is not None
    assert rows.predictions["counts 0.3"].sum() == 3 * 450


def test_a_run_of_the_mask_and_of_the_cost() -> None:
    rows = study.run_mask(_short("mask", ("digits",)))
    assert {row["metric"] for row in rows} == set(study.mask_facts(torch.ones(2, 2), torch.eye(2)))
    assert all(0 <= row["value"] <= 1 for row in rows)
    cost = study.run_cost({**study.TABLES["cost"]()["small",][0], "steps": 1, "batch": 4})
    assert len(cost) == 9
    assert all(row["value"] > 0 for row in cost)


def test_scores_keep_three_metrics(tmp_path: Path) -> None:
    rows = study.score(_short("table1_synthetic", ("evaluator alone",)))
    assert {row["metric"] for row in rows} == {"mae", "f1_non0"}
    assert rows.predictions is not None


@pytest.mark.usefixtures("no_window")
def test_the_schematics_show_computed_numbers() -> None:
    names, table = ["a", "b", "c"], torch.tensor(drawings.EXAMPLES["so does the third, alone"])
    pss = coalitions.prediction_shift_score(table).tolist()
    pas = coalitions.prediction_accuracy_score(table, torch.tensor(1)).tolist()
    card = drawings.coalition_card(names, [str(int(k)) for k in table], pss, pas, "1")
    said = [t.get_text() for ax in card.axes for t in ax.texts]
    assert {"PSS\n0.83", "PSS\n0.17", "PSS\n0.33", "PAS\n1.83"} <= set(said)
    assert said.count("1") == 5
    curves = drawings.mask_curves()
    falls = [bool((np.diff(line.get_ydata()) < 0).all()) for ax in curves.axes for line in ax.lines]
    assert falls == [False, True, False, False], "Eq. 10 with w = -1 alone falls"
    words = " ".join(t.get_text() for t in drawings.overview().axes[0].texts)
    assert "PSS" in words and "enhancement" in words  # noqa: PT018


@pytest.mark.slow
def test_the_runner_trains_the_evaluator_first(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    fitted = experiments.fit
    monkeypatch.setattr(
        experiments, "fit", lambda m, *a, **k: trained.append((type(m).__name__, a[2].epochs)) or fitted(m, *a, **k)
    )
    options = {"width": 8, "heads": 2, "weight_hidden": 8, "repeats": 1}
    config = {
        "data": "synthetic",
        "method": "DREAM",
        "method_options": {**options, "evaluator": "MLPEvaluator", "evaluator_epochs": 4},
        "train_plan": {"kind": "exact_count", "rates": [0.2, 0.3, 0.4]},
        "conditions": "subsets",
        "train": {"epochs": 1},
    }
    found = {row["condition"]: row["value"] for row in experiments.train_and_score(config)}
    assert len(found) == 1 + 7
    assert {row["condition"]: row["value"] for row in experiments.train_and_score(config)} == found
    assert trained == [("JointTraining", 4), ("DREAM", 1), ("DREAM", 1)]  # runs of DREAM share their evaluator
    own = {**config, "backbone": "Table3Evaluator", "backbone_options": {"width": 8}, "method_options": options}
    assert len(experiments.train_and_score({**own, "conditions": "complete"})) == 2
    assert trained[3:] == [("JointTraining", 1), ("DREAM", 1)]
    with pytest.raises(ValueError, match="bert"):
        experiments.train_and_score({**config, "method_options": {"evaluator": "bert"}})


@pytest.mark.slow
def test_the_runner_with_a_resampling_plan_on_scores() -> None:
    config = {
        "data": "synthetic",
        "data_options": {"task": "regression"},
        "method": "DREAM",
        "method_options": {
            "width": 8,
            "heads": 2,
            "weight_hidden": 8,
            "evaluator": "SelfMMEvaluator",
            "evaluator_epochs": 2,
        },
        "train_plan": {"kind": "bernoulli", "rates": [0.3, 0.3, 0.3], "resample": True},
        "train": {"epochs": 1},
    }
    assert {"mae", "corr"} <= {row["metric"] for row in experiments.train_and_score(config)}
