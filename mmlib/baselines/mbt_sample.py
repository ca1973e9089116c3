"""MBT-Sample: what a modality adds to a sample decides how often the sample comes back with that modality alone.

The sample-level resampling of Wei et al., "Enhancing Multimodal Cooperation via Sample-level Modality Valuation"
(CVPR 2024), a baseline of MCE's tables. The value of a coalition is v(S) = |S| where the prediction from S is right and
0 where it is wrong, so a modality's fair share of a right prediction is a Shapley value of 1. What has less is trained
more often, alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..backbones.base import Backbone, OnBackbone
from ..batch import DATASET, MultimodalBatch, MultimodalDataset, Output
from ..checks import Array, Is, Number, OneOf, Whole
from ..coalitions import coalition_masks, shapley_values, subset_values
from ..losses import task_loss

if TYPE_CHECKING:
    from ..training import State

__all__ = ["MBTSample", "resampling_copies"]

BOUNDS = (1.0, 0.4, -0.1)  # a copy for each of them that the Shapley value lies below
WEAK = OneOf("auto", "each", "lowest")
ROUNDING = 1e-4  # values are multiples of 1 / M!; closer than this they are equal


def resampling_copies(shapley: Tensor, present: Tensor, weak: str = "auto") -> Tensor:
    """How many copies of each sample keep only modality m: float [n, M], bool [n, M] -> int64 [n, M] in 0 to 3.

    None where phi >= 1, 1 where 0.4 <= phi < 1, 2 where -0.1 <= phi < 0.4, 3 where phi < -0.1. The release leaves the
    bounds open, which is the same for two modalities, where phi is one of -0.5, 0, 0.5, 1, 1.5.

    weak : which modalities count as weak. "each": every present one, by its own value, as in the release. "lowest": of
        each sample the one with the lowest value, or all that tie for it. "auto": "each" for two modalities, "lowest"
        for more, which the release does not treat (our interpretation)

    An absent modality is never chosen. A sample with one modality has phi = 1 or 0 like a coalition of its own; where
    it is wrong it is repeated twice, as the rule says, though there is nothing to leave out.
    Raises ValueError for shapes that differ and an unknown ``weak``.
    """
    Array("float", "[n, M]")("shapley", shapley)
    if Array("bool", "[n, M]")("present", present).shape != shapley.shape:
        raise ValueError(
            f"present: expected bool [n, M] like shapley {tuple(shapley.shape)}, "
            f"got {present.dtype} {tuple(present.shape)}"
        )
    WEAK("weak", weak)
    copies = torch.stack([shapley < bound - ROUNDING for bound in BOUNDS]).sum(0)
    chosen = present
    if weak == "lowest" or (weak == "auto" and shapley.shape[-1] > 2):
        among = torch.where(present, shapley, torch.inf)
        chosen = present & (among <= among.amin(-1, keepdim=True) + ROUNDING)
    return torch.where(chosen, copies, 0)


class MBTSample(OnBackbone, nn.Module):
    """Joint training, and after ``warmup`` epochs each epoch also holds samples with their weak modality alone.

    At the start of such an epoch every training sample's Shapley values are computed with the current weights, in eval
    mode without gradients, from all subsets of what the sample has, and `resampling_copies` says how many copies of it
    are appended in which only the weak modality is kept. Copies have their sample's id. `fit` counts optimizer steps,
    so longer epochs are fewer epochs.

    weak : see `resampling_copies`
    tolerance : for float targets, the largest error that counts as right
    batch_size : samples that are valued at once

    ``last`` holds, of the last valuation, ``shapley`` [M] (means over the samples that have the modality) and
    ``copies`` [M] (totals).
    """

    def __init__(
        self, backbone: Backbone, *, warmup: int = 5, weak: str = "auto", tolerance: float = 0.5, batch_size: int = 512
    ):
        super().__init__()
        self.backbone: nn.Module = Is("an nn.Module", nn.Module)("backbone", backbone)
        self.warmup = Whole(0)("warmup", warmup)
        self.weak = WEAK("weak", weak)
        self.tolerance = Number(0)("tolerance", tolerance)
        self.batch_size = Whole(1)("batch_size", batch_size)
        self.last: dict[str, Tensor] = {}

    def forward(self, batch: MultimodalBatch) -> Output:
        logits = self.backbone(batch)
        if not self.training or batch.target is None:
            return Output(logits, {})
        return Output(logits, {"task": task_loss(logits, batch.target)})

    def valuate(self, data: MultimodalDataset) -> Tensor:
        """phi [n, M], the Shapley values of v(S) = |S| 1[right] over the subsets S of what each sample has.

        They sum to the number of the sample's modalities where the full prediction is right, else to 0; an absent
        modality gets 0. With bool labels, the fraction of right ones stands for 1[right]. Raises ValueError for
        dialogues and for a split without a target.
        """
        if DATASET("data", data).present.ndim != 2:
            raise ValueError(
                f"data: expected samples [n], got the leading shape {data.data.shape}; copies are of whole samples"
            )
        device = next(self.backbone.parameters()).device
        masks = coalition_masks(len(data.modalities), device)
        parts = []
        for samples in torch.arange(len(data), device=data.device).split(self.batch_size):
            batch = data[samples].replace(complete=None).to(device)
            size = (masks & batch.present[:, None]).sum(-1)
            parts.append(shapley_values(size * subset_values(self.backbone, batch, tolerance=self.tolerance)))
        return torch.cat(parts)

    def resample(self, data: MultimodalDataset) -> MultimodalDataset:
        """``data``, followed by the copies: first all that keep the first modality, and so on."""
        shapley = self.valuate(data)
        present = data.present.to(shapley.device)
        copies = resampling_copies(shapley, present, self.weak)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(copies, 0)  # one differently rounded logit would make epochs of two lengths
        mean = torch.where(present, shapley, 0).sum(0) / present.sum(0).clamp_min(1)
        self.last = {"shapley": mean, "copies": copies.sum(0)}

        copies = copies.to(data.device)
        n, modalities = present.shape
        kept, source = copies.T.nonzero(as_tuple=True)
        times = copies[source, kept]
        kept, source = kept.repeat_interleave(times), source.repeat_interleave(times)
        alone = kept[:, None] == torch.arange(modalities, device=data.device)
        everything = torch.ones(n, modalities, dtype=torch.bool, device=data.device)
        samples = torch.cat([torch.arange(n, device=data.device), source])
        extended = data[samples].drop(present=torch.cat([everything, alone]))
        return MultimodalDataset(extended, data.info)

    def on_epoch_start(self, state: State) -> None:
        if state.epoch > self.warmup:
            state.train = self.resample(state.train)
