"""Training steps on AV-MNIST: batches selected from resident tensors, against a DataLoader of per-sample dicts.

Same model, same samples, same optimizer. ``ratio`` of the whole step is what a user gains; ``ratio`` of the data path
alone says what the selection gains, and ``data_share`` how much of the reference's step the data path is. Where the
model's own arithmetic fills the step, as on a CPU, no data path can make the whole step much faster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlib import MultimodalBatch, MultimodalDataset
from mmlib import data as sources
from mmlib.backbones import AVMNISTBackbone, GenericBackbone
from mmlib.baselines import JointTraining
from mmlib.training import TrainConfig, _batches, _permutation, _steps, fit

BATCH = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def avmnist() -> MultimodalDataset:
    """The real training pairs where their files are, else noise of the same shapes; ``info["name"]`` says which."""
    root = Path(os.environ.get("MMLIB_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
    try:
        return sources.load("avmnist", root, progress=False)["train"]
    except FileNotFoundError:
        g = torch.Generator().manual_seed(0)
        features = {
            "image": torch.randn(900, 1, 28, 28, generator=g),
            "audio": torch.randn(900, 1, 20, 20, generator=g),
        }
        target = torch.randint(0, 10, (900,), generator=g)
        return MultimodalDataset.from_arrays(features, target, classes=10, info={"name": "noise shaped as avmnist"})


class Samples(torch.utils.data.Dataset):
    """The usual way: one dict a sample."""

    def __init__(self, data: MultimodalDataset):
        self.data = data.data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        data = self.data
        return {
            **{name: x[i] for name, x in data.features.items()},
            "present": data.present[i],
            "target": data.target[i],
            "id": data.ids[i],
        }


def reference_batches(data: MultimodalDataset) -> Iterator[MultimodalBatch]:
    for rows in torch.utils.data.DataLoader(Samples(data), batch_size=BATCH, shuffle=True):
        rows = {name: x.to(DEVICE) for name, x in rows.items()}
        features = {name: rows[name] for name in data.modalities}
        yield MultimodalBatch(features, rows["present"], rows["target"], ids=rows["id"])


def resident_batches(data: MultimodalDataset) -> Iterator[MultimodalBatch]:
    config = TrainConfig(batch_size=BATCH)
    steps = _steps(_permutation(len(data), 0, 1).to(DEVICE), config, 0, 1)
    return _batches(data, [rows for step in steps for rows, _ in step], config, DEVICE, resident=True)


def run(batches: Iterator[MultimodalBatch]) -> None:
    for _ in batches:
        pass
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def fastest(*actions: Callable[[], Any], rounds: int = 4) -> list[float]:
    """Seconds of the fastest run of each, in turns, so that what else the machine does meets all; one warms up."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds + 1):
        for action, found in zip(actions, times, strict=True):
            started = time.perf_counter()
            action()
            found.append(time.perf_counter() - started)
    return [min(found[1:]) for found in times]


def build(data: MultimodalDataset, backbone: str) -> JointTraining:
    torch.manual_seed(0)
    model = AVMNISTBackbone() if backbone == "avmnist" else GenericBackbone.for_data(data, width=8)
    return JointTraining(model).to(DEVICE)


def reference_training(data: MultimodalDataset, method: JointTraining, epochs: int) -> None:
    """The plain loop that everybody writes."""
    optimizer = torch.optim.Adam(method.parameters(), 1e-3)
    method.train()
    for _ in range(epochs):
        for batch in reference_batches(data):
            optimizer.zero_grad()
            loss = sum(method(batch).losses.values())
            loss.backward()
            optimizer.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def test_data_path(benchmark: Any, avmnist: MultimodalDataset) -> None:
    resident = avmnist.to(DEVICE)
    ours, theirs = (lambda: run(resident_batches(resident))), (lambda: run(reference_batches(avmnist)))
    benchmark.pedantic(ours, rounds=10, warmup_rounds=2)
    mine, other = fastest(ours, theirs, rounds=10)
    benchmark.extra_info["data"] = avmnist.info["name"]
    benchmark.extra_info["ratio"] = other / mine


@pytest.mark.parametrize("backbone", ["avmnist", "generic"])
def test_whole_step(benchmark: Any, avmnist: MultimodalDataset, backbone: str) -> None:
    epochs = 3
    steps = epochs * -(-len(avmnist) // BATCH)
    config = TrainConfig(epochs=epochs, batch_size=BATCH, select="last")
    method = build(avmnist, backbone)
    ours, theirs = (
        lambda: fit(method, avmnist, config=config),
        lambda: reference_training(avmnist, method, epochs),
    )
    benchmark.pedantic(ours, rounds=1, warmup_rounds=1)
    mine, other, path = fastest(ours, theirs, lambda: run(reference_batches(avmnist)))
    benchmark.extra_info["data"] = avmnist.info["name"]
    benchmark.extra_info["steps_per_minute"] = round(60 * steps / mine)
    benchmark.extra_info["reference_steps_per_minute"] = round(60 * steps / other)
    benchmark.extra_info["data_share"] = epochs * path / other
    benchmark.extra_info["ratio"] = other / mine
