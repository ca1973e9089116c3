"""Joint training: one task loss on whatever is present, optionally with modality dropout. Every method's baseline."""

from __future__ import annotations

from torch import nn

from ..backbones.base import Backbone, OnBackbone
from ..batch import MultimodalBatch, Output
from ..checks import RATE, Is
from ..layers import kept_modalities
from ..losses import task_loss

__all__ = ["JointTraining"]


class JointTraining(OnBackbone, nn.Module):
    """A backbone with the task loss.

    modality_dropout : in training each present modality of each sample is switched off with this probability; a
        sample that would lose all of them keeps them all. In [0, 1).
    """

    def __init__(self, backbone: Backbone, modality_dropout: float = 0.0):
        super().__init__()
        self.backbone: nn.Module = Is("an nn.Module", nn.Module)("backbone", backbone)
        self.modality_dropout = RATE("modality_dropout", modality_dropout)

    def forward(self, batch: MultimodalBatch) -> Output:
        if self.training and self.modality_dropout:
            batch = batch.drop(present=kept_modalities(batch.present, self.modality_dropout))
        logits = self.backbone(batch)
        if not self.training or batch.target is None:
            return Output(logits, {})
        real = batch.extras.get("utterance")  # of dialogues, the padding does not count
        weight = None if real is None else real.to(logits.dtype)
        return Output(logits, {"task": task_loss(logits, batch.target, weight, lead=len(batch.shape))})
