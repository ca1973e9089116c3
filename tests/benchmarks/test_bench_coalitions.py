"""Speed of the coalition engine. Ratios go to extra_info; nothing is asserted about time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

from mmlib import MultimodalBatch
from mmlib.backbones import GenericBackbone, GenericConfig
from mmlib.coalitions import _cached_pairs, coalition_logits, coalition_masks, monte_carlo_shapley, shapley_values

SHAPES = {"a": (50, 20), "b": (20, 74), "c": (1, 300), "d": (1, 16, 16), "e": (8, 4), "f": (30, 12)}


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """The best of a few runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def shapley_of_one(v: list[float], M: int, subsets: range) -> list[float]:
    """The definition for one sample, over some of its coalitions."""
    weights = [math.factorial(s) * math.factorial(M - s - 1) / math.factorial(M) for s in range(M)]
    phi = [0.0] * M
    for code in subsets:
        size = bin(code).count("1")
        for m in range(M):
            if not code >> m & 1:
                phi[m] += weights[size] * (v[code | 1 << m] - v[code])
    return phi


def shapley_by_marginals(v: torch.Tensor, M: int) -> torch.Tensor:
    """The vectorised definition: all marginal contributions, then their weights."""
    without, joined, weights = _cached_pairs(M)
    return ((v[..., joined] - v[..., without]) * weights.to(v)).sum(-1)


@pytest.mark.benchmark(group="shapley values, M = 14, B = 64")
def test_shapley_values(benchmark):
    M, B = 14, 64
    v = torch.rand(B, 2**M)
    ours = benchmark(shapley_values, v)
    torch.testing.assert_close(ours, shapley_by_marginals(v, M), atol=1e-4, rtol=0)
    time_ours = seconds(lambda: shapley_values(v), 5)
    row, part = v[0].tolist(), 2**M // 16
    # The loop takes minutes: one sample and every sixteenth of its coalitions, scaled by 64 x 16.
    time_loop = seconds(lambda: shapley_of_one(row, M, range(0, 2**M, 16)), 1) * B * 2**M / part
    time_direct = seconds(lambda: shapley_by_marginals(v, M))
    benchmark.extra_info["ratio"] = round(time_loop / time_ours, 1)
    benchmark.extra_info["ratio_vectorised"] = round(time_direct / time_ours, 1)
    print(f"\nshapley_values: {time_loop / time_ours:.0f} times the loop (1/1024 of it timed, scaled), "
          f"{time_direct / time_ours:.1f} times the vectorised marginals")  # fmt: skip


def case(B: int, missing: bool = False) -> tuple[GenericBackbone, MultimodalBatch]:
    torch.manual_seed(0)
    present = torch.ones(B, len(SHAPES), dtype=torch.bool)
    batch = MultimodalBatch({name: torch.randn(B, *shape) for name, shape in SHAPES.items()}, present)
    if missing:
        keep = torch.rand(B, len(SHAPES)) < 0.5
        keep[:, 0] |= ~keep.any(-1)
        batch = batch.drop(present=keep)
    return GenericBackbone(GenericConfig(SHAPES, 4, width=32)).eval(), batch


@pytest.mark.benchmark(group="logits of all coalitions, M = 6, B = 32")
@pytest.mark.parametrize("absent", ["zero_feature", "zero_input"])
@pytest.mark.parametrize("missing", [False, True], ids=["complete", "half missing"])
def test_coalition_logits(benchmark, absent, missing):
    B = 32
    model, batch = case(B, missing)
    masks = coalition_masks(6)

    def told(rows: MultimodalBatch, mask: torch.Tensor) -> MultimodalBatch:
        dropped = rows.drop(present=mask.expand(len(rows), 6))
        if absent == "zero_feature":
            return dropped
        return dropped.replace(present=torch.ones_like(dropped.present), observed=dropped.valid)

    def one_by_one() -> torch.Tensor:
        return torch.stack([torch.cat([model(told(batch[b : b + 1], mask)) for b in range(B)]) for mask in masks])

    def by_coalition() -> torch.Tensor:
        return torch.stack([model(told(batch, mask)) for mask in masks])

    with torch.no_grad():
        ours = benchmark(coalition_logits, model, batch, masks, absent)
        torch.testing.assert_close(ours, by_coalition(), atol=1e-4, rtol=0)
        time_ours = seconds(lambda: coalition_logits(model, batch, masks, absent), 5)
        time_one, time_batched = seconds(one_by_one, 1), seconds(by_coalition)
    benchmark.extra_info["ratio"] = round(time_one / time_ours, 1)
    benchmark.extra_info["ratio_batched"] = round(time_batched / time_ours, 1)
    print(f"\ncoalition_logits ({absent}): {time_one / time_ours:.0f} times one sample and coalition at a time, "
          f"{time_batched / time_ours:.1f} times one batched forward a coalition")  # fmt: skip


@pytest.mark.benchmark(group="Monte Carlo, M = 12, B = 64, 50 permutations")
def test_monte_carlo(benchmark):
    M, B, R = 12, 64, 50
    table, present = torch.rand(B, 2**M), torch.ones(B, M, dtype=torch.bool)
    rows = [0]

    def value(masks: torch.Tensor) -> torch.Tensor:
        rows[0] = masks.shape[0]
        return table.gather(1, (masks.long() << torch.arange(M)).sum(-1).t()).t()

    benchmark(monte_carlo_shapley, value, present, R, torch.Generator().manual_seed(0))
    benchmark.extra_info["coalitions"] = rows[0]
    benchmark.extra_info["ratio"] = round(2**M / rows[0], 1)
    print(f"\nmonte_carlo_shapley: {rows[0]} coalitions a sample instead of {2**M}")
