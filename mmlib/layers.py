"""The few blocks that several models share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .batch import frame_axis

__all__ = ["MLP", "as_frames", "frame_shapes", "masked_mean", "scoring"]


def as_frames(x: Tensor) -> Tensor:
    """Samples of sequences, images or volumes [n, ...] as sequences [n, T, D]: an image's rows are its frames."""
    return x.movedim(frame_axis(x, 1), 1).flatten(2)


def frame_shapes(feature_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """The (T, D) of each modality as sequences, from one sample's shape; ValueError for token ids, which have no D."""
    if tokens := [name for name, shape in feature_shapes.items() if len(shape) < 2]:
        raise ValueError(
            f"feature_shapes: expected sequences, images or volumes, got token ids in {tokens}; embed them"
        )
    views = {m: as_frames(torch.empty(1, *shape, device="meta")) for m, shape in feature_shapes.items()}
    return {m: (x.shape[1], x.shape[2]) for m, x in views.items()}


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
