"""What DEAR's alignment adds to a training step, at the sizes of CMU-MOSI: B = 64, text 50, audio 375, vision 500.

The step has a text of stored vectors; with a text encoder inside it only becomes longer. Sequences are cut to a tenth
on a CPU, which makes the step shorter and so the share of the alignment larger.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmlib import DEAR, MultimodalBatch

B = 64
SHAPES = {"language": (50, 768), "audio": (375, 5), "vision": (500, 20)}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
PAPER = 33 / 7.6  # seconds an epoch with Sinkhorn over those with MMD, DEAR's Table 9


def step(alignment: str, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    shapes = {m: (T if device != "cpu" or m == "language" else T // 10, D) for m, (T, D) in SHAPES.items()}
    batch = MultimodalBatch(
        {m: torch.randn(B, *shape) for m, shape in shapes.items()},
        torch.ones(B, 3, dtype=torch.bool),
        target=torch.randn(B),
    )
    keep = {m: torch.rand(B, T) < 0.5 for m, (T, _) in shapes.items()}
    batch = batch.drop(observed=keep, keep_complete=True).to(device)
    model = DEAR(feature_shapes=shapes, alignment=alignment).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4)

    def run() -> None:
        optimiser.zero_grad()
        torch.stack(list(model(batch).losses.values())).sum().backward()
        optimiser.step()

    return run


@pytest.mark.benchmark(group="DEAR, MOSI shapes, B = 64")
@pytest.mark.parametrize("device", DEVICES)
def test_alignment_in_a_training_step(benchmark, best, device):
    runs = [step(alignment, device) for alignment in ("mse", "mmd", "sinkhorn")]
    benchmark.pedantic(runs[1], rounds=3, warmup_rounds=1)
    mse, kernel, transport = best(*runs)
    benchmark.extra_info["mmd_over_mse"] = round(kernel / mse, 3)
    benchmark.extra_info["sinkhorn_over_mmd"] = round(transport / kernel, 3)
    benchmark.extra_info["paper_sinkhorn_over_mmd"] = round(PAPER, 1)
    print(f"\non {device}: a step with MMD costs {kernel / mse:.3f} of one with MSE, with Sinkhorn "
          f"{transport / kernel:.3f} of one with MMD (paper: {PAPER:.1f})")  # fmt: skip
