"""An epoch over 2 GB in a file, more than a training needs in memory: streamed, against a DataLoader of single samples.

Both read the same memory-mapped array with the same model and batch size, each in a process of its own. ``ratio`` is of
the seconds; ``peak_mb`` is what the process needed above the libraries and a training on eight samples, for
``data_mb`` of data and ``batch_mb`` a batch. The file is sparse: reading it costs no disk, and it is removed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (12_500, 40, 1000)  # float32: 2 GB, 160 kB a sample
BATCH = 64

SCRIPT = rf"""
import json, re, sys, time
from pathlib import Path
import numpy as np
import torch
from mmlib import MultimodalBatch, MultimodalDataset
from mmlib.backbones import GenericBackbone
from mmlib.baselines import JointTraining
from mmlib.training import TrainConfig, fit

n, T, D = {SHAPE}
y = np.arange(n) % 2
x = np.memmap(sys.argv[1], np.float32, "r", shape=(n, T, D))
tiny = MultimodalDataset.from_arrays({{"big": np.ones((8, T, D), "float32")}}, y[:8])
method = JointTraining(GenericBackbone.for_data(tiny, width=4))
config = TrainConfig(epochs=1, batch_size={BATCH}, device="cpu", loader="stream", select="last")
fit(method, tiny, config=config)

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return n
    def __getitem__(self, i):
        return torch.from_numpy(np.array(x[i])), int(y[i])

def plain():
    optimizer = torch.optim.Adam(method.parameters(), 1e-3)
    for features, target in torch.utils.data.DataLoader(Samples(), {BATCH}, shuffle=True):
        batch = MultimodalBatch({{"big": features}}, torch.ones(len(target), 1, dtype=torch.bool), target)
        optimizer.zero_grad()
        sum(method.train()(batch).losses.values()).backward()
        optimizer.step()

# not ru_maxrss, which a process has from the one that started it
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, started = peak(), time.perf_counter()
if sys.argv[2] == "plain":
    plain()
    looked = started
else:
    data = MultimodalDataset.from_arrays({{"big": x}}, y)
    looked = time.perf_counter()
    fit(method, data, config=config)
print(json.dumps([time.perf_counter() - looked, looked - started, peak() - before]))
"""


@pytest.mark.benchmark(group="2 GB in a file")
def test_an_epoch_streamed(benchmark: Any, tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    size = 4 * SHAPE[0] * SHAPE[1] * SHAPE[2]
    with path.open("wb") as file:
        file.truncate(size)

    def run(how: str) -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), how], capture_output=True, text=True, cwd=ROOT, check=True
        )
        return json.loads(done.stdout)

    try:
        seconds, looking, peak = benchmark.pedantic(lambda: run("streamed"), rounds=1)
        theirs, _, their_peak = run("plain")
    finally:
        path.unlink()
    benchmark.extra_info["ratio"] = theirs / seconds
    benchmark.extra_info["seconds_an_epoch"] = seconds
    benchmark.extra_info["seconds_to_look_through"] = looking
    benchmark.extra_info["peak_mb"] = peak
    benchmark.extra_info["plain_peak_mb"] = their_peak
    benchmark.extra_info["data_mb"] = size / 2**20
    benchmark.extra_info["batch_mb"] = size * BATCH / SHAPE[0] / 2**20
    assert peak < 0.15 * size / 2**20
