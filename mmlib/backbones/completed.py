"""A backbone with features completed between its encoders and its fusion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import MultimodalBatch
from ..checks import Is
from .base import BACKBONE, Backbone

__all__ = ["CompletedBackbone", "ShowsCompleted"]


class CompletedBackbone(nn.Module):
    """A backbone with the reconstruction module between its encoders and its fusion; itself used like a backbone.

    Encodings [*N, d], or [*N, d, ...] with places, where every place is a sample to the module. The fusion sees
    completed features, so it is told that every modality is there.
    """

    independent_encoders = True

    def __init__(self, backbone: Backbone, reconstruction: nn.Module):
        super().__init__()
        self.plain: Backbone = BACKBONE("backbone", backbone)
        self.reconstruction: nn.Module = Is("an nn.Module", nn.Module)("reconstruction", reconstruction)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.plain.modalities

    @property
    def encoders(self) -> nn.ModuleDict:
        return self.plain.encoders

    def encode(self, batch: MultimodalBatch) -> dict[str, Tensor]:
        return self.plain.encode(batch)

    def complete(self, h: dict[str, Tensor], present: Tensor) -> dict[str, Tensor]:
        """h[m] [*N, d, ...], zeroed where ``present`` [*N, M] is False, through f_rec (Eqs. 12 and 15)."""
        lead = present.ndim - 1
        shapes = {tuple(x.shape) for x in h.values()}
        if len(shapes) > 1:
            raise ValueError(f"encodings: expected one shape for all modalities, got {sorted(shapes)}")
        stacked = torch.stack(list(h.values()), lead)  # [*N, M, d, ...]
        keep = present.reshape(*present.shape, *[1] * (stacked.ndim - present.ndim))
        stacked = torch.where(keep, stacked, 0)
        if stacked.ndim > lead + 2:  # places go in front
            places = stacked.shape[lead + 2 :]
            flat = stacked.flatten(lead + 2).movedim(-1, lead)
            completed = self.reconstruction(flat).movedim(lead, -1).unflatten(-1, places)
        else:
            completed = self.reconstruction(stacked)
        return dict(zip(h, completed.unbind(lead), strict=True))

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        return self.fuse_completed(self.complete(h, present), batch)

    def fuse_completed(self, completed: dict[str, Tensor], batch: MultimodalBatch) -> Tensor:
        return self.plain.fuse(completed, torch.ones_like(batch.present), batch)

    def decode(self, z: Tensor) -> Tensor:
        return self.plain.decode(z)

    def forward(self, batch: MultimodalBatch) -> Tensor:
        return self.decode(self.fuse(self.encode(batch), batch.present, batch))


class ShowsCompleted(nn.Module):
    """A `CompletedBackbone` whose prediction is the logits *and* the completed features, for the coalition engine."""

    independent_encoders = True

    def __init__(self, backbone: CompletedBackbone):
        super().__init__()
        self.backbone = backbone

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        completed = self.backbone.complete(h, present)
        return self.backbone.fuse_completed(completed, batch), completed

    def decode(self, z: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.backbone.decode(z[0]), z[1]
