"""Runs that the tests of several baselines share: a toy data set, an interruption, digits with parts missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmlib import MultimodalDataset
from mmlib import data as sources
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, predict, random_state


def toy(n: int = 60, seed: int = 0, M: int = 2) -> MultimodalDataset:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    features = {f"m{m}": (rng.normal(size=(n, 6)) + (2 - m) * np.eye(6)[y]).astype("float32") for m in range(M)}
    return MultimodalDataset.from_arrays(features, y)


def weights(method: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in method.parameters()])


class Interrupt:
    def __init__(self, at: int):
        self._at = at

    def on_step(self, state):
        if state.step == self._at:
            raise KeyboardInterrupt


def check_resumed(
    make: Callable[[int], nn.Module], M: int, config: TrainConfig, plan: MissingPlan, at: int, path: Path
) -> list[dict]:
    """A run that is interrupted at step ``at`` and resumed by a method of another seed ends as one that was not.

    Returns the epochs of the run that was not interrupted.
    """
    data, valid = toy(M=M), toy(30, 1, M=M)
    whole = make(0)
    expected = fit(whole, data, valid, config, train_plan=plan, callbacks=[Interrupt(-1)])
    with pytest.raises(KeyboardInterrupt):
        fit(make(0), data, valid, config, train_plan=plan, callbacks=[Interrupt(at)], checkpoint=path)
    assert torch.load(path, weights_only=True)["epoch"] >= 2
    again = make(9)
    with pytest.raises(ValueError, match="callbacks"):  # the callback was part of the interrupted run
        fit(again, data, valid, config, train_plan=plan, checkpoint=path)
    found = fit(again, data, valid, config, train_plan=plan, callbacks=[Interrupt(-1)], checkpoint=path)
    for (name, x), y in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    forget = lambda epochs: [{k: v for k, v in row.items() if k != "seconds"} for row in epochs]
    assert forget(found.epochs) == forget(expected.epochs)
    return expected.epochs


def learned_digits(
    make: Callable[[MultimodalDataset], nn.Module],
    config: TrainConfig,
    rates: Sequence[float] = (0.2, 0.5, 0.8),
    least: Sequence[tuple[Sequence[bool] | None, float]] = (
        (None, 0.85),
        ([True, False, False], 0.6),
        ([False, True, False], 0.5),
    ),
) -> nn.Module:
    """The method, trained on digits with parts missing; the accuracies with what is present are at least ``least``."""
    splits = sources.load("digits")  # chance is 0.1
    plan = MissingPlan("imbalanced", rates=list(rates), seed=0)
    with random_state(0):
        method = make(splits["train"])
    fit(method, splits["train"], splits["valid"], config, train_plan=plan)
    test = splits["test"]
    for present, bound in least:
        accuracy = (predict(method, test, present=present).argmax(-1) == test.target).double().mean()
        assert accuracy > bound
    return method
