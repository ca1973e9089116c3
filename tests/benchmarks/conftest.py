"""What the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def best() -> Callable[..., list[float]]:
    """``best(*runs, repeats=, warmups=)``: the best time of each run in seconds, taken in turns.

    In turns, so that what else the machine does meets all of them alike. One CPU thread is timed by what this process
    really ran; a GPU is waited for.
    """
    gpu = torch.cuda.is_available()
    clock = time.process_time if not gpu and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if gpu else lambda: None

    def times(*runs: Callable[[], object], repeats: int = 10, warmups: int = 2) -> list[float]:
        taken: list[list[float]] = [[] for _ in runs]
        for repeat in range(warmups + repeats):
            for one, run in zip(taken, runs, strict=True):
                wait()
                start = clock()
                run()
                wait()
                if repeat >= warmups:
                    one.append(clock() - start)
        return [min(one) for one in taken]

    return times
