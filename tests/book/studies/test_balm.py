"""The helpers of the BALM chapter compute what they say; its runs are what its tables need."""

from __future__ import annotations

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from book.drawings import balm as drawings
from book.studies import balm as study
from book.studies import balm_claims as claims
from book.studies import balm_live as live
from book.support import results, verdicts
from mmlib import BALM, data
from mmlib.backbones import MMGCNBackbone
from mmlib.methods.released.balm import ReleasedBALMConfig

pytestmark = pytest.mark.usefixtures("no_window")


def watched(values: list[list[float]]) -> drawings.Watch:
    watch = drawings.Watch()
    for row in values:
        watch.on_backward(SimpleNamespace(method=SimpleNamespace(last={"mu": torch.tensor(row)})))
    return watch


def test_the_hook_keeps_every_step() -> None:
    kept = watched([[1.0, 2.0], [3.0, 4.0]]).table("mu")
    assert kept.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_the_length_of_a_path() -> None:
    net = torch.nn.Linear(2, 1, bias=False)
    path = drawings.PathLength({"a": net})
    for weight in ([0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [0.0, 0.0]):
        net.weight.data = torch.tensor([weight])
        path()
    assert path.length == {"a": pytest.approx(10.0)}


def test_smoothing_by_hand() -> None:
    assert drawings.smooth(np.array([2.0, 4.0, 6.0, 0.0]), 2).tolist() == [2.0, 3.0, 5.0, 3.0]


def test_differences_of_noise_are_anticorrelated() -> None:
    noise = np.random.default_rng(0).standard_normal(4000)
    assert drawings.autocorrelation(np.diff(noise)) == pytest.approx(-0.5, abs=0.04)
    assert drawings.autocorrelation(np.array([1.0, -1.0, 1.0, -1.0])) == pytest.approx(-0.75)
    assert math.isnan(drawings.autocorrelation(np.ones(5)))
    low, high = drawings.shuffled_band(noise[:200])
    assert -0.2 < low < 0 < high < 0.2


def test_the_figures_draw() -> None:
    assert drawings.overview().axes
    names = ["audio", "language", "vision"]
    figure = drawings.coefficients(np.random.default_rng(0).normal(size=(12, 3)), names, 1.3)
    place = plt.rcParams["axes.titlelocation"]  # of the book's style, where another test has set it
    assert [ax.get_title(place) for ax in figure.axes] == [*names, "all coefficients"]
    grid = np.array([[1.0, np.nan], [2.0, 3.0]])
    assert drawings.grids({"paper": (grid, ["0.1", "0.4"], ["1.0", "1.2"])}, columns=1).axes[0].get_xlabel() == "rho"


def test_names_at_the_ends_of_curves_stay_apart() -> None:
    figure, ax = plt.subplots()
    ax.set_ylim(0, 1)
    drawings.label_ends(ax, np.array([[0.0, 0.0, 0.0], [0.5, 0.501, 0.99]]), ["audio", "language", "vision"])
    places = sorted(text.xy[1] for text in ax.texts)
    assert [text.get_text() for text in ax.texts] == ["audio", "language", "vision"]
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) > 0.09
    plt.close(figure)


def test_a_mean_of_comparisons_keeps_seeds_and_samples() -> None:
    ones = [verdicts.compare(str(k), np.full((3, 4), k), np.zeros((3, 4))) for k in (1.0, 3.0)]
    mean = claims.mean_of(ones, "mean")
    assert mean.label == "mean"
    assert (mean.ours == 2.0).all()
    assert mean.theirs.shape == (3, 4)
    assert claims.mean_of([*ones, verdicts.compare("not run", None)], "mean").ours is None


def test_every_family_of_claims_is_stored() -> None:
    stored = claims.load(study.path("settings_digits").parent)
    for name, make in claims.FAMILIES.items():
        pairs = list(make(stored))
        assert pairs, name
        assert all(pair.ours is not None for pair in pairs), name
    assert 1 < claims.cost(stored) < 2
    assert set(claims.recovered().columns) == set(study.SETTINGS)


def test_the_papers_gains_are_those_of_its_main_tables() -> None:
    gains = claims.gains()
    assert gains.shape == (6, 6)
    assert int((gains < 0).sum().sum()) == 5
    means = gains.mean(axis=1)
    assert means["IEMOCAP", "MMGCN"] == pytest.approx(63.14 - 61.65, abs=0.011)
    assert means["CMU-MOSEI", "MM-DFN"] == pytest.approx(81.98 - 81.64, abs=0.011)


def test_how_much_validation_still_rises_by_hand() -> None:
    curves = np.array([[9.0] + 5 * [0.1] + 5 * [0.2], [9.0] + 5 * [0.3] + 5 * [0.6]])
    stored = {"ladder_conversations": SimpleNamespace(curves=lambda label: {"curve of validation": curves})}
    assert claims.rise(stored, "any") == pytest.approx(0.2)  # .4 after .2


def test_changes_that_share_a_prediction_go_together() -> None:
    """By hand: heads that all say the same have one Delta, so correlations of 1 and coefficients of 2/3."""
    world = data.load("conversations", lengths=[3, 5], sizes=[24, 4, 4])["train"]
    torch.manual_seed(0)
    method = BALM.for_data(world, MMGCNBackbone.for_data(world, width=4, hidden=4, layers=1), preset="+GRM")
    found = live.together(method, world, [1, 8], 400, seed=0)
    assert list(found.index) == ["1", "8"]
    assert ((found["smallest"] <= found["mean correlation"]) & (found["mean correlation"] <= found["largest"])).all()
    assert found["largest"].max() < 0.999
    torch.nn.init.zeros_(method.rebalancing.heads.weight)
    torch.nn.init.zeros_(method.rebalancing.heads.bias)
    same = live.together(method, world, [8], 400, seed=0)
    assert same.loc["8"].tolist() == pytest.approx([1, 1, 1, 0, 0], abs=1e-4)


def test_predictions_hang_on_the_padding_of_padded_nets_alone() -> None:
    setup = {"dataset": "conversations", "data_root": "", "seeds": [0], "epochs": 2, "lr": 0.01, "device": "cpu"}
    more = {"rates": [0.5, 0.7, 0.3], "other_rates": [0.5, 0.3, 0.7], "backbone": "mmgcn"}
    found = live.Live(SimpleNamespace(**setup, **more)).padding()
    assert found.loc["packed", "predictions that change"] == 0
    assert 0 < found.loc["padded", "predictions that change"] < 1
    assert found["test"].between(0, 1).all()


def every_config() -> list[tuple[str, dict]]:
    return [(table, c) for table, make in study.TABLES.items() for runs in make().values() for c in runs]


@pytest.mark.parametrize("table", study.TABLES)
def test_a_tables_cells_are_different_runs(table: str) -> None:
    cells = study.TABLES[table]()
    hashes = [results.config_hash(c) for runs in cells.values() for c in runs]
    if table != "subsets_conversations":  # a single modality has the same nets in both settings
        assert len(set(hashes)) == len(hashes)
    seeds = {tuple(c["seed"] for c in runs) for runs in cells.values()}
    assert seeds in ({(0, 1, 2, 3, 4)}, {(0, 1, 2)})
    for runs in cells.values():
        assert len({results.config_hash({**c, "seed": 0}) for c in runs}) == 1, "one cell, one config"


def test_methods_of_a_table_differ_in_the_method_alone() -> None:
    for setting in study.SETTINGS:
        cells = study.settings_conversations()
        one, two = cells["backbone", setting][0], cells["+BALM", setting][0]
        changed = {k for k in one.keys() | two.keys() if one.get(k) != two.get(k)}
        assert changed == {"method", "method_options"}


def test_tables_that_share_a_file_share_runs() -> None:
    hashes = {t: {results.config_hash(c) for runs in study.TABLES[t]().values() for c in runs} for t in study.TABLES}
    for table, owner in study.FILES.items():
        assert study.path(table) == study.path(owner)
        assert hashes[table] & hashes[owner]


def test_presets_keep_what_makes_them() -> None:
    for _, config in every_config():
        options = config.get("method_options", {})
        known = {*ReleasedBALMConfig.__dataclass_fields__, "preset", "widths"}
        if config["method"] == "BALM":
            assert set(options) <= known
        if options.get("preset") == "BALM-D":
            assert options["tau"] == 0.0
    grid = study.fullgrid_conversations()
    assert len(grid) == 2 * 25
    assert set(study.grid_conversations()) < set(grid)


def test_mce_with_balm_trains_both() -> None:
    config = study.settings_digits()["MCE +BALM", study.CONFIG_B][0]
    rows = study.run({**config, "device": "cpu", "train": {**config["train"], "steps": 3}})
    assert {r["condition"] for r in rows if r["metric"] == "accuracy"} >= {"same", "left", "left+right+projection"}
    assert all(math.isfinite(r["value"]) for r in rows)
