"""OGM-GE: the gradients of the modality that is ahead are made smaller, and noise is added to all.

Peng, Wei, Deng, Wang, Hu: "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022), a baseline of
BALM, for any number of modalities of which any may be missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones.base import BACKBONE, Backbone, OnBackbone
from ..batch import BATCH, MultimodalBatch, MultimodalDataset, Output
from ..checks import Array, Flag, Maybe, Number, OneOf, Several, Whole
from ..coalitions import coalition_logits
from ..gradients import EncoderGradients, Part, encoders_of, reduce_sums
from ..layers import scoring
from ..losses import task_loss

if TYPE_CHECKING:
    from ..training import State

__all__ = ["OGMGE", "ogm_coefficients"]


def ogm_coefficients(score: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The ratio of each modality's score to the mean of the others', and OGM Eq. 10: [M] -> [M], [M].

    k_m = 1 - tanh(alpha ratio_m) where the ratio is above 1, else 1. With two modalities these are the paper's; the
    mean of the others, for more, is our interpretation. A ratio of 0 / 0 is 1, and what is above 1 by rounding alone is
    not above: k jumps there, and equal scores are to be left alone.
    """
    if len(Array("float", "[M]")("score", score)) < 2:
        raise ValueError(f"score: expected [M] with M >= 2, got shape {tuple(score.shape)}")
    Number(0)("alpha", alpha)
    others = (score.sum() - score) / (len(score) - 1)
    ratio = torch.where(others > 0, score / others, torch.where(score > 0, torch.inf, 1.0))
    ahead = ratio > 1 + 8 * torch.finfo(ratio.dtype).eps
    return ratio, torch.where(ahead, 1 - torch.tanh(alpha * ratio), 1.0)


class OGMGE(OnBackbone, nn.Module):
    """A backbone with the task loss, whose encoders' gradients are modulated on the fly.

    The score of a modality is the sum, over the mini-batch, of the probability that the backbone gives to the right
    class when it sees this modality alone: the others' encodings are 0, in eval mode. For a linear layer on
    concatenated encodings this is the release's slice of that layer, but for the bias, which we keep whole. Of bool
    labels it is the mean over labels of the probability given to the right answer, our interpretation.

    alpha : strength, at least 0; the release has 0.1 to 0.8 by data set
    noise : the generalisation enhancement (GE): Gaussian noise with the standard deviation of each encoder gradient
        before it is scaled; False is OGM
    samples : the score sums over "all" samples, or over those that have the modality ("present"), then as a mean
    kernels_only : only convolution kernels (four axes) are modulated, as in the release
    active_epochs : first and last epoch that is modulated; None: all
    encoders : as in `EncoderGradients`; default ``backbone.encoders``

    ``last`` holds score, ratio and coefficient [M] of the last training step. Raises ValueError for options out of
    range and targets that are neither classes nor labels. Outside of ``training.fit``, call
    ``rebalance`` between the backward pass and the optimizer step.
    """

    last_values: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        alpha: float = 0.1,
        noise: bool = True,
        samples: str = "all",
        kernels_only: bool = False,
        active_epochs: tuple[int, int] | None = None,
        encoders: Mapping[str, Part | Iterable[Part]] | None = None,
    ):
        super().__init__()
        self.backbone: Backbone = BACKBONE("backbone", backbone)
        self.alpha = Number(0)("alpha", alpha)
        self.noise = Flag()("noise", noise)
        self.samples = OneOf("all", "present")("samples", samples)
        self.active_epochs = Maybe(Several(Whole(0), 2, 2))("active_epochs", active_epochs)
        if active_epochs is not None and active_epochs[0] > active_epochs[1]:
            raise ValueError(f"active_epochs: expected None or a pair (first, last), got {active_epochs!r}")
        self.kernels_only = kernels_only
        self.encoders = EncoderGradients(backbone, encoders_of(backbone, encoders))
        if Flag()("kernels_only", kernels_only):
            kernels = {m: [part for part in parts if part[0].ndim == 4] for m, parts in self.encoders.parts.items()}
            self.encoders = EncoderGradients(backbone, kernels)
        self.scaled = self.encoders.names
        self.active = self.counts = True
        self._pending: Tensor | None = None
        self.register_buffer("alone", torch.eye(len(backbone.modalities), dtype=torch.bool), persistent=False)
        self.register_buffer("last_values", torch.zeros(3, len(backbone.modalities)))

    @classmethod
    def _from_data(cls, data: MultimodalDataset, backbone: Any) -> dict[str, Any]:
        if data.info.get("task") == "regression":
            raise ValueError("data: expected classes, whose probabilities OGM-GE compares, got scores")
        return {}

    @property
    def last(self) -> dict[str, Tensor]:
        return dict(zip(("score", "ratio", "coefficient"), self.last_values, strict=True))

    def forward(self, batch: MultimodalBatch) -> Output:
        BATCH("batch", batch)
        if not self.training or batch.target is None:
            return Output(self.backbone(batch), {})
        y, real = batch.target, batch.extras.get("utterance")
        if y.is_floating_point() or y.ndim != len(batch.shape) + (y.dtype == torch.bool):
            raise ValueError(
                f"target: OGM-GE expects integer classes {batch.shape}, one a sample, or bool labels, got {y.dtype} "
                f"{tuple(y.shape)}"
            )
        h = self.backbone.encode(batch)
        logits = self.backbone.decode(self.backbone.fuse(h, batch.present, batch))
        self._watch(batch, {name: x.detach() for name, x in h.items()}, y, real)
        return Output(logits, {"task": task_loss(logits, y, None if real is None else real.to(logits.dtype))})

    def _watch(self, batch: MultimodalBatch, h: dict[str, Tensor], y: Tensor, real: Tensor | None) -> None:
        with scoring(self.backbone):
            alone: Tensor = self.alone  # type: ignore[assignment]
            said = coalition_logits(self.backbone, batch, alone, use_present=False, encodings=h)  # [M, *N, K]
        if y.dtype == torch.bool:
            right = torch.where(y, said, -said).float().sigmoid().mean(-1).flatten(1)
        else:
            right = said.float().softmax(-1).gather(-1, y.expand(said.shape[:-1])[..., None])[..., 0].flatten(1)
        counted = torch.ones_like(right, dtype=torch.bool) if real is None else real.flatten().expand_as(right)
        if self.samples == "present":
            counted = counted & batch.present.flatten(0, -2).T
        new = torch.stack([torch.where(counted, right, 0).sum(-1), counted.sum(-1).to(right)])
        new = new if self.counts else torch.zeros_like(new)
        self._pending = new if self._pending is None else self._pending + new

    @torch.no_grad()
    def rebalance(self) -> None:
        """Scale the encoders' gradients and add the noise; gradients must be whole and unscaled."""
        if self._pending is None:
            raise RuntimeError("rebalance: expected a training step's forward and backward pass before it")
        (total, count), self._pending = reduce_sums(self._pending), None
        score = total if self.samples == "all" else total / count.clamp_min(1)
        ratio, coefficient = ogm_coefficients(score, self.alpha)
        if self.active:
            spreads = self.encoders.spreads() if self.noise else []
            self.encoders.scale(coefficient)
            if self.noise:
                self.encoders.disturb(spreads)
        self.last_values.copy_(torch.stack([score, ratio, coefficient]))

    # --- in the loop ---

    def on_epoch_start(self, state: State) -> None:
        if self.active_epochs is not None:
            self.active = self.active_epochs[0] <= state.epoch <= self.active_epochs[1]

    def on_batch(self, state: State) -> None:
        self.counts = state.weight > 0

    def on_backward(self, state: State) -> None:
        self.rebalance()

    def on_end(self, state: State) -> None:
        self.active = self.counts = True
