"""Losses that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["task_loss"]


def task_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of logits [*N, K] for integer classes [*N]; mean absolute error, with K = 1, for float scores.

    ``weight`` [*N] weights the samples: a weighted mean, zero when all weights are. Raises ValueError where shapes do
    not fit.
    """
    if target.is_floating_point():
        if logits.shape != (*target.shape, 1):
            raise ValueError(f"logits: expected {(*target.shape, 1)} for scores, got {tuple(logits.shape)}")
        each = (logits[..., 0] - target).abs()
    else:
        if logits.shape[:-1] != target.shape:
            raise ValueError(f"logits: expected {(*target.shape, 'K')} for classes, got {tuple(logits.shape)}")
        each = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").reshape(target.shape)
    if weight is None:
        return each.mean()
    return (each * weight).sum() / weight.sum().clamp_min(torch.finfo(each.dtype).tiny)
