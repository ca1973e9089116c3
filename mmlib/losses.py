"""Losses that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["sample_losses", "task_loss"]


def sample_losses(logits: Tensor, target: Tensor, lead: int | None = None) -> Tensor:
    """Each sample's cross-entropy for integer classes, absolute error for float scores -> [*N].

    lead : how many axes N has; default all of the target's. A target [*N, ...] with further axes is a segmentation:
        logits [*N, K, ...] with the classes after N, and the mean over all places (for K = 1, binary cross-entropy)

    Logits are [*N, K] otherwise, K = 1 for scores. Raises ValueError where shapes do not fit.
    """
    lead = target.ndim if lead is None else lead
    if target.ndim > lead:
        if logits.ndim != target.ndim + 1 or (*logits.shape[:lead], *logits.shape[lead + 1 :]) != target.shape:
            expected = (*target.shape[:lead], "K", *target.shape[lead:])
            raise ValueError(f"logits: expected {expected} for a segmentation, got {tuple(logits.shape)}")
        if logits.shape[lead] == 1:
            each = F.binary_cross_entropy_with_logits(logits.select(lead, 0), target.to(logits), reduction="none")
        else:
            each = F.cross_entropy(logits.flatten(0, lead - 1), target.flatten(0, lead - 1), reduction="none")
        return each.reshape(*target.shape[:lead], -1).mean(-1)
    if target.is_floating_point():
        if logits.shape != (*target.shape, 1):
            raise ValueError(f"logits: expected {(*target.shape, 1)} for scores, got {tuple(logits.shape)}")
        return (logits[..., 0] - target).abs()
    if logits.shape[:-1] != target.shape:
        raise ValueError(f"logits: expected {(*target.shape, 'K')} for classes, got {tuple(logits.shape)}")
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").reshape(target.shape)


def task_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None, lead: int | None = None) -> Tensor:
    """The mean of `sample_losses`. ``weight`` [*N] weights the samples: a weighted mean, zero when all weights are."""
    each = sample_losses(logits, target, lead)
    if weight is None:
        return each.mean()
    return (each * weight).sum() / weight.sum().clamp_min(torch.finfo(each.dtype).tiny)
