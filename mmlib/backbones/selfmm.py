"""Self-MM's net, and its training with a label of each modality's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import DATASET, MultimodalBatch, MultimodalDataset, Output, find_ids
from ..checks import Array, Is, Maybe, Number, Text, Whole, check_known, option
from ..layers import MLP, processes
from ..losses import sample_losses, task_loss
from .sequences import Evaluator, EvaluatorConfig, Mean

__all__ = ["SelfMMConfig", "SelfMMEvaluator", "SelfMMTraining", "unimodal_labels"]


@dataclass(frozen=True)
class SelfMMConfig(EvaluatorConfig):
    """Self-MM's sizes for CMU-MOSI and CMU-MOSEI."""

    width: int = option(128, Whole(1))  # of the two fused layers
    # whose vector is the mean of its frames; default "language" or "text", or the first
    text: str | None = option(None, Maybe(Text))
    lstm: int = option(32, Whole(1))  # width of the LSTM of any other modality, and of its own layers ...
    audio: int = option(16, Whole(1))  # ... but for "audio"
    text_width: int = option(32, Whole(1))  # of the text's own layers

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("text", (self.text,) if self.text else (), self.feature_shapes)

    @property
    def text_modality(self) -> str:
        known = [m for m in ("language", "text") if m in self.feature_shapes]
        return self.text or (known or list(self.feature_shapes))[0]


class _LastLSTM(nn.Module):
    """The state of an LSTM after the last valid frame, through a linear map."""

    def __init__(self, input_width: int, width: int, dropout: float):
        super().__init__()
        self.lstm = nn.LSTM(input_width, width, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        last = (valid * torch.arange(1, valid.shape[1] + 1, device=x.device)).argmax(-1)
        return self.out(self.drop(states[torch.arange(len(x), device=x.device), last]))


class SelfMMEvaluator(Evaluator):
    """Self-MM's net: the mean of the text, an LSTM for every other modality, three fused layers; a head a modality.

    Yu et al. (AAAI 2021); sizes from the configuration in MMSA. The text has word vectors here, not a BERT.
    ``forward`` uses the fused head alone; the unimodal heads serve `SelfMMTraining`.
    """

    Config = SelfMMConfig
    config: SelfMMConfig

    def __init__(self, config: SelfMMConfig):
        super().__init__(config)
        self.drop = nn.Dropout(config.dropout)
        self.first, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, width in self.widths.items():
            own = config.text_width if name == config.text_modality else width
            self.first[name] = nn.Linear(width, own)
            self.heads[name] = MLP([own, own, config.outputs])

    def make_encoder(self, name: str, width: int) -> tuple[nn.Module, int]:
        if name == self.config.text_modality:
            return Mean(), width
        own = self.config.audio if name == "audio" else self.config.lstm
        return _LastLSTM(width, own, self.config.dropout), own

    def make_decoder(self, width: int) -> nn.Module:
        return MLP([width, self.config.width, self.config.width, self.config.outputs])

    def views(self, h: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The representations that the pseudo-labels compare, and the predictions [*N, K] from each.

        Of the fusion under the key "" and of each modality under its name.
        """
        first, *rest = self.decoder.children()
        features = {"": torch.relu(first(torch.cat(list(h.values()), -1)))}
        said = {"": nn.Sequential(*rest)(features[""])}
        for name, x in h.items():
            features[name] = torch.relu(self.first[name](self.drop(x)))
            said[name] = self.heads[name](features[name])
        return features, said


def unimodal_labels(
    target: Tensor, fused: Tensor, single: Tensor, fused_centres: Tensor, single_centres: Tensor, scale: float = 3.0
) -> Tensor:
    """Self-MM's label of one modality alone: the fused label, moved by how much nearer this view is to its own side.

    With delta = (D_negative - D_positive) / (D_positive + 1e-8), D the distance of a representation to the centre of
    the negative or positive samples over the root of its width, the label is
    (y delta_s / delta_f + y + delta_s - delta_f) / 2, cut to [-scale, scale].

    target [B]; fused [B, D_f], single [B, D_s] representations; centres [2, D]: negative, positive -> [B]
    """

    B = len(Array("float", "[B]")("target", target))
    Number(above=0)("scale", scale)
    for name, x, centres in (("fused", fused, fused_centres), ("single", single, single_centres)):
        Array("float", "[2, D]")(f"{name}_centres", centres)
        if Array("float", "[B, D]")(name, x).shape != (B, centres.shape[1]) or len(centres) != 2:
            raise ValueError(
                f"target, {name}, {name}_centres: expected [B], [B, D] and [2, D], got {[B]}, {[*x.shape]} and "
                f"{[*centres.shape]}"
            )

    def delta(x: Tensor, centres: Tensor) -> Tensor:
        negative, positive = torch.linalg.vector_norm(x[:, None] - centres, dim=-1).unbind(-1)
        root = math.sqrt(x.shape[-1])
        return (negative - positive) / root / (positive / root + 1e-8)

    of_fused, of_single = delta(fused, fused_centres), delta(single, single_centres)
    # The release's 1e-8 may itself make this denominator 0; nothing else keeps it from being tiny, hence the cut.
    ratio = of_single / (of_fused + 1e-8)
    return (0.5 * ratio * target + 0.5 * (target + of_single - of_fused)).nan_to_num().clamp(-scale, scale)


class SelfMMTraining(nn.Module):
    """A `SelfMMEvaluator` with Self-MM's losses: L1 of the fused score, and of each modality's to its pseudo-label.

    The labels of the modalities start as the fused one. From epoch 2 each step replaces those of its samples by
    (n - 1) / (n + 1) of the old and 2 / (n + 1) of `unimodal_labels`, n the epoch; the centres are those of the epoch
    before, over samples whose label (the modality's own) is positive or negative. A modality's loss is weighted by
    tanh|own label - fused label|, so it counts for nothing in epoch 1. Our interpretation: no gradient accumulation,
    one learning rate.

    train : the training split, whose samples get labels; ValueError unless it has scores
    """

    labels: Tensor
    ids: Tensor
    sums: Tensor
    counts: Tensor
    centres: Tensor
    epoch: Tensor

    def __init__(self, backbone: SelfMMEvaluator, train: MultimodalDataset, scale: float = 3.0):
        super().__init__()
        Is("a SelfMMEvaluator", SelfMMEvaluator)("backbone", backbone)
        Number(above=0)("scale", scale)
        DATASET("train", train)
        if train.target is None or not train.target.is_floating_point():
            raise ValueError("train: expected scores, from which the labels of each modality are made")
        self.backbone, self.scale = backbone, scale
        ids, order = train.ids.sort()
        self.register_buffer("ids", ids.clone())
        self.register_buffer("labels", train.target[order, None].repeat(1, len(backbone.modalities)))
        config = backbone.config
        own = [config.text_width if m == config.text_modality else backbone.widths[m] for m in backbone.modalities]
        self.views = {"": config.width, **dict(zip(backbone.modalities, own, strict=True))}
        total, views = sum(self.views.values()), len(self.views)
        self.register_buffer("sums", torch.zeros(2, total))  # of the representations, side by side: negative, positive
        self.register_buffer("counts", torch.zeros(2, views))
        self.register_buffer("centres", torch.zeros(2, total))
        self.register_buffer("epoch", torch.tensor(1))

    def on_epoch_start(self, state: Any) -> None:
        """The loop's event: the representations of the epoch that ended give the centres of this one."""
        if processes() > 1:
            raise ValueError(
                "method: SelfMMTraining supports one process: its labels and centres are kept where a sample was last; "
                "run with one"
            )
        self.epoch.fill_(state.epoch)
        if state.epoch > 1:
            counts = self.counts.repeat_interleave(torch.tensor([*self.views.values()], device=self.counts.device), 1)
            self.centres.copy_(self.sums / counts.clamp_min(1))
        self.sums.zero_()
        self.counts.zero_()

    def forward(self, batch: MultimodalBatch) -> Output:
        if not self.training or batch.target is None:
            return Output(self.backbone(batch), {})
        y = batch.target
        features, said = self.backbone.views(self.backbone.encode(batch))
        own = self._labels(batch, features)
        losses = {"task": task_loss(said[""], y)}
        for m, name in enumerate(self.backbone.modalities):
            weight = torch.tanh((own[:, m] - y).abs())
            losses[f"task_{name}"] = (weight * sample_losses(said[name], own[:, m])).mean()
        return Output(said[""], losses)

    @torch.no_grad()
    def _labels(self, batch: MultimodalBatch, features: dict[str, Tensor]) -> Tensor:
        """The modalities' labels [B, M] of this step, and the sums for the next epoch's centres."""
        assert batch.target is not None
        if batch.ids is None:
            raise ValueError("batch: expected ids, by which the labels of each modality are kept")
        y = batch.target
        place, found = find_ids(self.ids, batch.ids)
        if not found.all():
            raise ValueError("batch: expected samples of the training split that SelfMMTraining was given")
        own = self.labels[place]
        n = int(self.epoch)
        if n > 1:
            centres = dict(zip(self.views, self.centres.split([*self.views.values()], 1), strict=True))
            for m, name in enumerate(self.backbone.modalities):
                new = unimodal_labels(y, features[""], features[name], centres[""], centres[name], self.scale)
                own[:, m] = (n - 1) / (n + 1) * own[:, m] + 2 / (n + 1) * new
            self.labels[place] = own
        sides = torch.cat([y[:, None], own], 1)
        sides = torch.stack([sides < 0, sides > 0]).to(self.sums)  # [2, B, 1 + M]
        self.counts += sides.sum(1)
        sums = [sides[:, :, k] @ features[name].to(sides) for k, name in enumerate(self.views)]
        self.sums += torch.cat(sums, 1)
        return own
