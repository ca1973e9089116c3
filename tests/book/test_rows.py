"""Stored results can be had again on any CPU: a run or two of every table, drawn once and for all.

A table is a file of ``book/results`` whose runs `experiments.train_and_score` can do, or that names a runner below.
New tables join by being there. ``ROWS_DAY=today`` draws three other runs of every table, longer ones too, each day;
any other value of ``ROWS_DAY`` is what the draw follows instead.

A run done again has the conditions, samples, data and masks of the stored one. Its values are within two samples where
the stored run names its kernels and they are the same here. A training follows the kernels: elsewhere a value is one of
many that the same code can give. What is assumed of it:

- *Other kernels change a value no more than another seed does*: a run's distance from the mean of its cell (the same
  config but for the seed, under one test and metric) has at most the variance of a new seed's, and favours no side. A
  new seed has other masks, weights and order; other kernels only round otherwise.
- Seeds' values are near normal but for *runs that go astray* (a training that collapses, a score that jumps where
  predictions are near constant). These fall on seeds independently.

So a value is wrong where **three seeds** of the cell leave its interval **on the same side**; the second and third are
run only where the first one left it. With k seeds stored and r = min(k, 3) run again, their mean then leaves it too,
and its distance from the stored mean has variance sigma^2 (1 / r + 1 / k). So the half-width is
t sigma sqrt(1 / r + 1 / k), at least two samples. sigma^2 is the larger of the cell's own variance and the one pooled
over the table's cells under the test and metric (under the metric alone where that leaves fewer than `ENOUGH` degrees
of freedom). t is Student's quantile at these degrees of freedom, two-sided at `ALARMS` / `COMPARISONS`: by Bonferroni,
a suite of as many comparisons raises a false alarm with a probability of at most `ALARMS`. Runs gone astray are
allowed for besides: of the runs that are left out in turn about one in a hundred is outside, so that three of three
are in one of a million (a test below counts them).

Where no cell of a table has two seeds, no spread is known, and values are compared on the same kernels alone.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from book.studies import balm, compare, dear, dream, imbalance
from book.support import build, experiments, results
from mmlib import backbones, baselines, data, methods
from mmlib.losses import task_loss

RESULTS = build.ROOT / "book" / "results"
DAY = os.environ.get("ROWS_DAY", "")
if DAY == "today":
    DAY = datetime.datetime.now(datetime.UTC).date().isoformat()
# Of a table: how many runs, how long they took together at most when they were stored, how long the cheapest may take
FIXED, DAILY = (2, 4, 9), (3, 24, 60)
ALARMS = 1e-3  # false alarms of the suite, at most
COMPARISONS = 1000  # values that the suite compares, at most: a test counts them
SEEDS = 3  # of a cell have to be outside
ENOUGH = 10  # degrees of freedom of a pooled variance
CELL = ["cell", "condition", "metric"]
SAID = ["condition", "metric", "n", "data_hash", "mask_hash"]
MADE = ["kernels", "torch", "device", "data_hash"]
COMPUTED = ("avmnist",)  # features that are computed here: their last bits, and the data's hash, follow NumPy's kernels
EMBEDDED = ("digits", "synthetic", "confounded", "conversations", "simulated")


def linear_probe(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The probes of the chapter *Data and metrics*: a logistic regression on the flattened features."""
    from sklearn.linear_model import LogisticRegression

    splits = data.load(config["data"], config["data_root"], **config["data_options"])
    flat = lambda split: np.hstack([split.data.features[m].flatten(1).numpy() for m in config["modalities"]])
    model = LogisticRegression(max_iter=2000).fit(flat(splits["train"]), splits["train"].target.numpy())
    right = model.predict(flat(splits["test"])) == splits["test"].target.numpy()
    common = {"condition": "+".join(config["modalities"]), "metric": "accuracy", "n": len(right)}
    return [{**common, "value": float(right.mean()), "data_hash": splits["test"].info["fingerprint"][:12]}]


RUNNERS: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "linear probe": linear_probe,
    "pooled probe": compare.run_floors,
    "constant": compare.run_floors,
    "paired_interval": compare.run_intervals,
    "detection": dream.run_detection,
    "mask": dream.run_mask,
    "Reweighted": imbalance.run,
    "mce+balm": balm.run,
}


def runner(config: dict[str, Any]) -> Callable[[dict[str, Any]], list[dict[str, Any]]] | None:
    """What does the run of a stored config again; None where nothing here can."""
    if config.get("method") in RUNNERS:
        return RUNNERS[config["method"]]
    if config.get("protocol") == "lnln" and "text_encoder" not in config and config["conditions"] in dear.SCORED:
        return dear.score
    given = {**experiments.DEFAULTS, **config}
    known = any(hasattr(home, given["method"]) for home in (methods, baselines)) and hasattr(
        backbones, given["backbone"]
    )
    return experiments.train_and_score if known and given.keys() == experiments.DEFAULTS.keys() else None


def runs(path: Path) -> pd.DataFrame:
    """One row per run that can be done again on this machine: its hash, config and seconds."""
    stored = results.load_results(path)
    stored = stored[stored["device"].str.startswith("cpu")]
    stored = stored.groupby("config_hash", as_index=False).agg({"config": "first", "seconds": "max"}).fillna(0.0)
    return stored[[runner(json.loads(text)) is not None for text in stored["config"]]]


def drawn(found: pd.DataFrame, day: str, most: int, together: float, longest: float) -> pd.DataFrame:
    """``most`` runs, by a hash of the day, of the cheapest ones, no ``most`` of which take longer than ``together``.

    Where these are fewer: the cheapest run alone, if it takes at most ``longest``.
    """
    found = found.sort_values(["seconds", "config_hash"], ignore_index=True)
    cheap = found[found["seconds"].rolling(most, min_periods=1).sum() <= together]
    if len(cheap) < most:
        cheap = found[:1][found["seconds"][:1] <= longest]
    order = [hashlib.sha256(f"{day} {key}".encode()).hexdigest() for key in cheap["config_hash"]]
    return cheap.iloc[np.argsort(order)[:most]]


def tolerance(metric: str, n: int) -> float:
    """What two test samples can change: an accuracy by 2 / n, a mean over classes by more."""
    if metric.startswith("acc"):
        return 2 / n + 1e-9
    return 4 / n + 1e-9 if "f1" in metric.lower() else max(0.02, 4 / n)


def with_spread(stored: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table with their cell and, per cell, test and metric: its mean, and how far three runs may be off.

    Columns ``cell`` (the config without its seed), ``centre`` and ``half``, which is infinite where no spread is known.
    """
    configs = {text: json.loads(text) for text in stored["config"].unique()}
    cells = {text: json.dumps({**config, "seed": None}, sort_keys=True) for text, config in configs.items()}
    stored = stored.assign(cell=stored["config"].map(cells))
    found = stored.groupby(CELL, as_index=False)["value"].agg(["mean", "var", "count"])
    found["df"] = found["count"] - 1
    found["squares"] = found["var"].fillna(0.0) * found["df"]
    by_test = found.groupby(["condition", "metric"])[["df", "squares"]].transform("sum")
    by_metric = found.groupby("metric")[["df", "squares"]].transform("sum")
    pooled = by_test.where(by_test["df"] >= ENOUGH, by_metric)
    with np.errstate(invalid="ignore"):
        spread = np.sqrt(np.fmax(found["var"], pooled["squares"] / pooled["df"]))
        again = np.minimum(found["count"], SEEDS)
        quantile = stats.t.isf(ALARMS / COMPARISONS / 2, pooled["df"])
        half = quantile * spread * np.sqrt(1 / again + 1 / found["count"])
    found = found.assign(centre=found["mean"], half=np.where(pooled["df"] > 0, half, np.inf))
    return stored.merge(found[[*CELL, "centre", "half"]], on=CELL)


def outside(old: pd.DataFrame, new: pd.DataFrame) -> dict[tuple[str, str], float]:
    """A run's stored rows (`with_spread`) and the new ones: (test, metric) -> -1 or 1, the side on which it is off.

    Raises AssertionError where conditions, samples, data or masks are others.
    """
    if set(old["data_hash"]) != set(new["data_hash"]) and has_more_images(new):
        pytest.skip("MNIST's training images are at hand; the stored rows come from its test images alone")
    said = [name for name in SAID if name != "data_hash" or not set(old["data"]) <= set(COMPUTED)]
    was, now = (sorted(map(tuple, rows[said].values.tolist())) for rows in (old, new))
    assert was == now, "other conditions, samples, data or masks"
    off = {}
    for row in old.merge(new[[*said, "value"]], on=said, suffixes=("", "_new")).itertuples():
        two = tolerance(row.metric, row.n)
        centre, half = (row.value, two) if same_kernels(old, new) else (row.centre, max(row.half, two))
        both_nan = np.isnan(row.value) and np.isnan(row.value_new)
        if not both_nan and not abs(row.value_new - centre) <= half:
            off[row.condition, row.metric] = 1.0 if row.value_new > centre else -1.0
    return off


def same_kernels(old: pd.DataFrame, new: pd.DataFrame) -> bool:
    """Whether the stored run says which kernels made it, and they made the new one, of the very same data."""
    here, there = (set(map(tuple, rows[MADE].values.tolist())) for rows in (old, new))
    return here == there and "" not in set(old["kernels"])


def check(stored: pd.DataFrame, config: dict[str, Any], again: Callable[[dict[str, Any]], pd.DataFrame]) -> None:
    """Do a run again by ``again`` and, while the same values are off, other seeds of its cell. Some seed must be right.

    stored : the rows of its table, `with_spread`
    """
    key = results.config_hash(config)
    mine = stored[stored["config_hash"] == key]
    others = stored[stored["cell"].isin(mine["cell"]) & (stored["config_hash"] != key)]["config"].unique()
    root = {"data_root": config["data_root"]} if "data_root" in config else {}
    tried: list[pd.DataFrame] = []
    off: dict[tuple[str, str], float] = {}
    for one in [config, *({**json.loads(text), **root} for text in others)][:SEEDS]:
        old, new = stored[stored["config_hash"] == results.config_hash(one)], again(one)
        new = new[new["metric"].isin(set(old["metric"]))]  # a table may keep some of the metrics
        found = outside(old, new)
        off = {place: side for place, side in found.items() if not tried or off.get(place) == side}
        tried.append(new.set_index(["condition", "metric"])["value"])
        if not off or same_kernels(old, new):
            break
    said = mine.set_index(["condition", "metric"])
    lines = [
        f"{test}, {metric}: stored {said.loc[(test, metric), 'value']:.4f}, seeds' mean "
        f"{said.loc[(test, metric), 'centre']:.4f} ± {said.loc[(test, metric), 'half']:.4f}, now "
        + ", ".join(f"{new.loc[(test, metric)]:.4f}" for new in tried)
        for test, metric in off
    ]
    if lines:
        raise AssertionError("\n".join([f"{key}, {len(tried)} of its seeds:", *lines]))


TABLES = [pytest.param(p, id=p.stem) for p in sorted(RESULTS.glob("*.csv"))]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("table", TABLES)
def test_stored_rows_come_out_again(table: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    budget = DAILY if DAY else FIXED
    found = runs(table)
    chosen = drawn(found, DAY, *budget)
    if found.empty:
        pytest.skip(f"no run of {table.name} can be done again on a CPU")
    if chosen.empty:
        more = "" if DAY else "; ROWS_DAY=today draws longer ones"
        pytest.skip(f"a run of {table.name} takes at least {found['seconds'].min():.0f} s{more}")
    configs = [json.loads(text) for text in chosen["config"]]
    if any(config["data"] not in EMBEDDED for config in configs):
        root = str(request.getfixturevalue("real_data"))
        configs = [{**config, "data_root": root} for config in configs]
    stored = with_spread(results.load_results(table))

    def again(config: dict[str, Any]) -> pd.DataFrame:
        try:
            return experiments.load_or_run(tmp_path / table.name, [config], runner(config))
        except RuntimeError as error:
            if "FileNotFoundError" in str(error):
                pytest.skip(f"{config['data']}: its files are not in {config['data_root']}")
            raise

    for config in configs:
        check(stored, config, again)


def has_more_images(new: pd.DataFrame) -> bool:
    root = os.environ.get("MMLIB_DATA")
    return bool(root and set(new["data"]) == {"avmnist"} and list(Path(root).glob("mnist/train-images*")))


def test_the_draw_is_affordable_and_follows_the_day_alone() -> None:
    found = pd.DataFrame({"config_hash": list("abcdefgh"), "config": "{}", "seconds": [9, 1, 2, 20, 12, 4, 100, 3.0]})
    days = [drawn(found, f"2026-01-{day:02}", 3, 12, 60) for day in range(1, 31)]
    assert {len(day) for day in days} == {3}
    assert {key for day in days for key in day["config_hash"]} == set("bcfh")  # 2 + 3 + 4 <= 12 < 3 + 4 + 9
    assert drawn(found, "2026-01-01", 3, 12, 60)["config_hash"].tolist() == days[0]["config_hash"].tolist()
    dear = found.assign(seconds=[35.0, 60, 70, 80, 90, 100, 110, 20])
    assert drawn(dear, "2026-01-01", 3, 12, 60)["config_hash"].tolist() == ["h"]
    assert drawn(dear.assign(seconds=200.0), "2026-01-01", 3, 12, 60).empty


def test_false_alarms_are_rarer_than_one_in_a_thousand_suites() -> None:
    """The suite compares no more values than the level is made for; and a seed left out is inside, but for few runs."""
    count = drawn_runs = held = out = 0
    for table in sorted(RESULTS.glob("*.csv")):
        stored, chosen = with_spread(results.load_results(table)), drawn(runs(table), "", *FIXED)
        count += int(stored["config_hash"].isin(chosen["config_hash"]).sum())
        drawn_runs += len(chosen)
        seed = stored.groupby(CELL).cumcount()
        several = stored.groupby(CELL)["value"].transform("count") > 1
        stored = stored.drop(columns=["centre", "half"])
        for k in range(seed[several].max() + 1 if several.any() else 0):  # the k-th seed of every cell at once
            limits = with_spread(stored[seed != k]).drop_duplicates(CELL)[[*CELL, "centre", "half"]]
            left = stored[(seed == k) & several].merge(limits, on=CELL)
            least = [tolerance(metric, n) for metric, n in zip(left["metric"], left["n"], strict=True)]
            off = (left["value"] - left["centre"]).abs() > np.fmax(left["half"], least)
            held, out = held + left["config_hash"].nunique(), out + left[off]["config_hash"].nunique()
    three = drawn_runs * (out / held) ** SEEDS
    print(f"{count} values of {drawn_runs} runs are compared, each at a level of {ALARMS} / {COMPARISONS}")
    print(f"{out} of {held} runs left out are outside; three of three in {three:.1g} suites")
    assert count <= COMPARISONS
    assert held > 2000
    assert three < ALARMS


def trained(config: dict[str, Any]) -> pd.DataFrame:
    """A run's rows; no stored run has these kernels."""
    rows = pd.DataFrame(experiments.train_and_score(config))
    return rows.assign(config_hash=results.config_hash(config), kernels="of another machine", torch="", device="")


@pytest.mark.slow
def test_a_wrong_loss_a_wrong_mask_and_swapped_modalities_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By runs that are trained with the fault, against the interval: nothing is known of the kernels."""
    table = RESULTS / "dream-table1-synthetic.csv"
    stored = with_spread(results.load_results(table)).assign(kernels="")
    cheap = runs(table).sort_values(["seconds", "config_hash"])
    (config,) = (json.loads(text) for text in cheap["config"][:1])
    check(stored, config, trained)

    def neighbours(logits: torch.Tensor, target: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        return task_loss(logits, target.roll(1, 0), *rest, **more)

    def swapped(modalities: Sequence[str]) -> dict[str, list[str]]:
        other = {"language": "audio", "audio": "language"}
        return {name: [other.get(m, m) for m in names] for name, names in subsets(modalities).items()}

    def shifted(given: Any, seed: int) -> Any:
        return plan(given, seed + 1)

    subsets, plan = experiments.subsets, experiments._plan
    with monkeypatch.context() as wrong:
        wrong.setattr("mmlib.baselines.joint.task_loss", neighbours)
        with pytest.raises(AssertionError, match=r"language\+audio\+vision, mae: stored"):
            check(stored, config, trained)
    with monkeypatch.context() as wrong:
        wrong.setattr(experiments, "subsets", swapped)
        with pytest.raises(AssertionError, match="language, mae: stored"):
            check(stored, config, trained)
    with monkeypatch.context() as wrong:
        wrong.setattr(experiments, "_plan", shifted)
        with pytest.raises(AssertionError, match="other conditions, samples, data or masks"):
            check(stored, config, trained)


def invented(values: dict[int, list[float]], kernels: str = "") -> pd.DataFrame:
    """Rows of a table: cells of seeds, one condition each."""
    row = {"condition": "image", "metric": "accuracy", "n": 500, "data_hash": "d", "mask_hash": "-/-", "data": "digits"}
    row |= {"kernels": kernels, "torch": "2", "device": "cpu, 1 thread"}
    configs = [({"cell": c, "seed": s}, v) for c, seeds in values.items() for s, v in enumerate(seeds)]
    return pd.DataFrame(
        [{**row, "config": json.dumps(c), "config_hash": results.config_hash(c), "value": v} for c, v in configs]
    )


def again_as(shift: dict[int, float], kernels: str = "B", **change: Any) -> Callable[[dict[str, Any]], pd.DataFrame]:
    """Runs that give .8 and a shift, by seed."""
    return lambda config: invented({0: [0.8 + shift.get(config["seed"], 0.0)]}, kernels).assign(**change)


def test_the_same_kernels_are_held_to_two_samples() -> None:
    table = {c: [0.79, 0.8, 0.81] for c in range(8)}
    known, unknown = (with_spread(invented(table, kernels)) for kernels in ("B", ""))
    config = {"cell": 0, "seed": 1}
    check(known, config, again_as({1: 2 / 500}))
    for change in ({}, {"torch": "3"}, {"device": "cpu, 2 threads"}, {"kernels": "C"}):
        stored = known.assign(**change)
        if change:
            check(stored, config, again_as({1: 3 / 500}))
        else:
            with pytest.raises(AssertionError, match=r"1 of its seeds:\nimage, accuracy: stored 0.8000, .* now 0.8060"):
                check(stored, config, again_as({1: 3 / 500}))
    check(unknown, config, again_as({1: 3 / 500}, kernels=""))  # unknown is never the same


def test_elsewhere_three_seeds_have_to_leave_the_interval_on_one_side() -> None:
    stored = with_spread(invented({c: [0.79, 0.8, 0.81] for c in range(8)}))
    t = stats.t.isf(ALARMS / COMPARISONS / 2, 16)
    half = t * 0.01 * np.sqrt(2 / 3)
    assert np.allclose(stored["half"], half)
    assert 0.04 < half < 0.08
    config = {"cell": 0, "seed": 0}
    calls: list[int] = []

    def counted(shift: dict[int, float]) -> Callable[[dict[str, Any]], pd.DataFrame]:
        calls.clear()
        return lambda config: (calls.append(config["seed"]), again_as(shift)(config))[1]

    check(stored, config, counted({0: half - 1e-9}))
    assert calls == [0]
    check(stored, config, counted({0: 0.1, 1: 0.0, 2: 0.1}))
    assert calls == [0, 1]
    check(stored, config, counted({0: 0.1, 1: -0.1, 2: 0.1}))
    with pytest.raises(AssertionError, match=r"3 of its seeds:\nimage, accuracy: stored 0.7900, seeds' mean 0.8000 ± "):
        check(stored, config, counted({0: 0.1, 1: half + 1e-9, 2: 0.1}))
    with pytest.raises(AssertionError, match="accuracy"):
        check(stored, config, again_as(dict.fromkeys(range(3), np.nan)))
    for change in ({"n": 499}, {"data_hash": "e"}, {"mask_hash": "-/e"}, {"condition": "audio"}):
        with pytest.raises(AssertionError, match="other conditions, samples, data or masks"):
            check(stored, config, again_as({}, **change))


def test_a_wider_cell_has_a_wider_interval_and_one_seed_its_neighbours() -> None:
    stored = with_spread(invented({**{c: [0.79, 0.8, 0.81] for c in range(8)}, 8: [0.7, 0.8, 0.9], 9: [0.8]}))
    half = stored.groupby("cell")["half"].first()
    pooled = np.sqrt((8 * 2 * 0.01**2 + 2 * 0.1**2) / 18)
    t = stats.t.isf(ALARMS / COMPARISONS / 2, 18)
    expected = [*[t * pooled * np.sqrt(2 / 3)] * 8, t * 0.1 * np.sqrt(2 / 3), t * pooled * np.sqrt(2)]
    assert np.allclose(half, expected)
    alone = with_spread(invented({c: [0.8] for c in range(8)}))
    assert np.isinf(alone["half"]).all()
    check(alone, {"cell": 0, "seed": 0}, again_as({0: 0.2}))
    with pytest.raises(AssertionError, match="masks"):
        check(alone, {"cell": 0, "seed": 0}, again_as({}, mask_hash="-/e"))
