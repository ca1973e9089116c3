"""The few blocks that several models share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["MLP", "masked_mean", "scoring"]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [..., T, D] over the frames where mask [..., T] is True -> [..., D]; zeros where there is none."""
    kept = torch.where(mask[..., None], x, 0)
    return kept.sum(-2) / mask.sum(-1, keepdim=True).clamp_min(1)


@contextmanager
def scoring(*modules: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for passes that are only looked at; every submodule's own mode comes back after.

    Also after an exception, and also where some submodules were in another mode than their parent (a frozen part).
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


class MLP(nn.Sequential):
    """Linear, ReLU, Dropout, ..., Linear through the given widths, x [..., first] -> [..., last]."""

    def __init__(self, widths: list[int], dropout: float = 0.0):
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            if i:
                layers += [nn.ReLU(), nn.Dropout(dropout)]
            layers.append(nn.Linear(a, b))
        super().__init__(*layers)
