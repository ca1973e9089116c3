"""Floors and simulated intervals: by hand, and as the page shows them."""

from __future__ import annotations

import numpy as np
import torch

from book.studies import compare
from book.support import build
from mmlib import MultimodalBatch, MultimodalDataset


def test_features_are_the_mean_of_what_was_seen() -> None:
    batch = MultimodalBatch(
        {"a": torch.tensor([[[1.0], [3.0], [50.0]], [[0.0], [0.0], [0.0]]])},
        torch.tensor([[True], [False]]),
        torch.tensor([0, 1]),
        valid={"a": torch.tensor([[True, True, False], [True, True, True]])},
        ids=torch.arange(2),
    )
    split = MultimodalDataset(batch)
    x, there = compare.pooled(split, "a")
    assert x.tolist() == [[2.0], [0.0]]
    assert there.tolist() == [True, False]


def test_a_constant_is_the_median_or_the_most_frequent_class() -> None:
    assert compare.constant(np.array([0.0, 1.0, 5.0]), 2).tolist() == [1.0, 1.0]
    assert compare.constant(np.array([2, 2, 0]), 2).tolist() == [2, 2]


def test_a_probe_chooses_its_penalty_on_validation() -> None:
    rng = np.random.default_rng(0)
    x = {key: rng.normal(size=(n, 3)) for key, n in (("train", 200), ("valid", 50), ("test", 50))}
    y = {key: values @ [1.0, -2.0, 0.0] for key, values in x.items()}
    assert np.abs(compare.probed(x, y) - y["test"]).mean() < 0.05, "without noise the smallest penalty wins"
    noise = {key: rng.normal(size=len(values)) for key, values in y.items()}
    assert np.abs(compare.probed(x, noise)).mean() < 0.2, "where there is nothing to learn the largest one does"


def test_floors_of_a_data_set() -> None:
    (config,) = compare.floors()["digits", "pooled probe"]
    rows = compare.run_floors(config)
    found = {(r["condition"], r["metric"]): r["value"] for r in rows}
    assert found["all", "accuracy"] > max(v for (c, m), v in found.items() if c != "all" and m == "accuracy")
    (config,) = compare.floors()["digits", "constant"]
    (accuracy, _) = compare.run_floors(config)
    assert 0.08 < accuracy["value"] < 0.12


def test_simulated_intervals(monkeypatch) -> None:
    monkeypatch.setattr(compare, "WORLDS", 200)
    (config,) = compare.intervals()["samples alone", "normal", "3"]
    found = {row["metric"]: row["value"] for row in compare.run_intervals(config)}
    assert found["coverage"] > 0.9
    assert found["students"] < 0.6, "seeds that agree say nothing of new samples"
    assert 0.9 < found["width"] < 1.2


def test_the_page_shows_what_is_stored() -> None:
    page = build.COMPARE.read_text(encoding="utf-8")
    for table in compare.tables().values():
        assert table in page, "run python -m book.support.build status"
