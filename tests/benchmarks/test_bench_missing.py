"""Drawing the frame masks of CMU-MOSEI's size: 16,326 samples x 3 modalities x 500 frames, at a rate per sample.

The reference builds the frames' validity from one Python list per sample and then compares a matrix of uniform numbers
with the repeated rates, as the public code of the field does (MMSA, LNLN). The plan draws the same distribution, keyed
by sample id; its time includes the check of the ids and what its report needs.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch

from mmlib.batch import MultimodalDataset
from mmlib.missing import MissingPlan

SAMPLES, FRAMES, NAMES = 16_326, 500, ("language", "audio", "vision")


def list_built(lengths: np.ndarray, rates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 [n, T] as in the releases: 1 where the frame exists and its uniform number exceeds the sample's rate."""
    valid = np.array([np.array([1] * length + [0] * (FRAMES - length)) for length in lengths])
    return (rng.uniform(size=valid.shape) > rates[:, None].repeat(FRAMES, 1)) * valid


@pytest.mark.benchmark(group="missing")
def test_frame_masks_against_lists(benchmark):
    rng = np.random.default_rng(0)
    lengths = {m: rng.integers(FRAMES // 2, FRAMES + 1, SAMPLES) for m in NAMES}
    data = MultimodalDataset.from_arrays({m: np.zeros((SAMPLES, FRAMES, 1), "float32") for m in NAMES}, lengths=lengths)
    plan = MissingPlan("frames", dict.fromkeys(NAMES, (0.0, 1.0)))

    reference, seconds = {}, []
    for _ in range(3):
        start = time.perf_counter()
        reference = {m: list_built(lengths[m], rng.uniform(size=SAMPLES), rng) for m in NAMES}
        seconds.append(time.perf_counter() - start)

    mask = benchmark.pedantic(plan.draw, args=(data,), rounds=7, warmup_rounds=1)

    # The same distribution: the mean and the spread over samples of the fraction that is kept.
    for m in NAMES:
        count = torch.as_tensor(lengths[m])
        ours = mask.observed[m].sum(-1) / count
        theirs = torch.as_tensor(reference[m]).sum(-1) / count
        assert abs(ours.mean() - theirs.mean()) < 0.015
        assert abs(ours.std() - theirs.std()) < 0.01
        assert not (mask.observed[m] & ~data.data.valid[m]).any()
    if benchmark.stats is not None:  # None with --benchmark-disable
        ratio = statistics.median(seconds) / benchmark.stats.stats.median
        benchmark.extra_info.update(
            ratio=round(ratio, 1),
            reference_seconds=round(statistics.median(seconds), 3),
            threads=torch.get_num_threads(),
        )
        print(f"\nmask drawing: {ratio:.1f} times as fast as list-built masks")
