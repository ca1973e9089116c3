"""What a distance between distributions costs at DEAR's shapes: B = 64 samples, each 128 wide, and 384 jointly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmlib.losses import mmd, sinkhorn

B = 64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
PAPER = 33 / 7.6  # seconds an epoch with Sinkhorn over those with MMD, DEAR's Table 9


def step(distance: Callable, width: int, device: str) -> Callable[[], None]:
    """The distance and its gradient."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(B, width, generator=generator).to(device) for _ in range(2))
    y.requires_grad_()

    def run() -> None:
        y.grad = None
        distance(x, y).backward()

    return run


def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Five kernels, each with distances of its own."""
    with torch.no_grad():
        base = float(torch.pdist(torch.cat([x, y])).square().mean())
    return torch.stack([mmd(x, y, [base * factor]) for factor in (0.25, 0.5, 1, 2, 4)]).sum()


@pytest.mark.benchmark(group="distances between distributions, B = 64")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [128, 384])
def test_one_distance_matrix_for_five_bandwidths(benchmark, best, width, device):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(B, width, generator=generator).to(device) for _ in range(2))
    torch.testing.assert_close(mmd(x, y), apart(x, y), rtol=1e-4, atol=1e-6)
    ours, theirs = step(mmd, width, device), step(apart, width, device)
    benchmark(ours)
    fast, slow = best(ours, theirs, repeats=30)
    benchmark.extra_info["ratio"] = round(slow / fast, 2)
    print(f"\nwidth {width} on {device}: one matrix is {slow / fast:.1f} times faster than five")


@pytest.mark.benchmark(group="distances between distributions, B = 64")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [128, 384])
def test_sinkhorn_over_mmd(benchmark, best, width, device):
    """The distances alone; the paper's ratio is of whole epochs."""
    ours, theirs = step(mmd, width, device), step(sinkhorn, width, device)
    benchmark(theirs)
    kernel, transport = best(ours, theirs, repeats=30)
    benchmark.extra_info["over_mmd"] = round(transport / kernel, 1)
    benchmark.extra_info["paper_epoch_over_epoch"] = round(PAPER, 1)
    print(f"\nwidth {width} on {device}: Sinkhorn costs {transport / kernel:.1f} times MMD alone (paper: {PAPER:.1f} "
          f"times an epoch)")  # fmt: skip
