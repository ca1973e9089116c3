"""Small nets for sequences of any number of modalities, which know nothing of what is missing.

DREAM asks such a net, trained and frozen, what it predicts from every subset of the modalities. A missing modality is
zeros to them, in training and after it: their encoders run on the zeros and their fusion does not look at ``present``.
Images and volumes are read as sequences (an image's rows are its frames).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import DATASET, MultimodalBatch, MultimodalDataset, Output
from ..checks import RATE, SHAPES, Array, Is, Maybe, Number, Text, Whole, check_known, check_options, option
from ..layers import MLP, as_frames, frame_shapes, masked_mean, processes
from ..losses import sample_losses, task_loss
from .base import Backbone, outputs_of

__all__ = [
    "CorrKDConfig",
    "CorrKDEvaluator",
    "Evaluator",
    "EvaluatorConfig",
    "MLPEvaluator",
    "SelfMMConfig",
    "SelfMMEvaluator",
    "SelfMMTraining",
    "Table3Evaluator",
    "unimodal_labels",
]


@dataclass(frozen=True)
class EvaluatorConfig:
    """Shapes of the data, widths of the net."""

    # one sample of each modality: (T, D), (C, H, W) or (C, X, Y, Z)
    feature_shapes: Mapping[str, tuple[int, ...]] = option(MISSING, SHAPES)
    outputs: int = option(MISSING, Whole(1))  # K: classes, 1 for regression, 2 L for L labels
    # L: yes-or-no labels a sample, each with two logits (IEMOCAP: 4 emotions); 0: classes or a score
    labels: int = option(0, Whole(0))
    width: int = option(64, Whole(1))  # d
    dropout: float = option(0.1, RATE)

    def __post_init__(self) -> None:
        check_options(self)
        frame_shapes(self.feature_shapes)
        if self.labels and self.outputs != 2 * self.labels:
            raise ValueError(
                f"outputs: expected {2 * self.labels}, two for each of {self.labels} labels, got {self.outputs}"
            )


def split_labels(logits: Tensor, labels: int) -> Tensor:
    """Logits [*N, K] as they are, or with L labels [*N, 2 L] -> [*N, 2, L]: the two classes of each label."""
    return logits.unflatten(-1, (labels, 2)).transpose(-1, -2) if labels else logits


class Evaluator(Backbone):
    """One encoder a modality to a vector, concatenation, a head. A subclass defines `make_encoder` and `make_decoder`.

    features[m] [*N, T, D] (or images, volumes) -> logits [*N, K], or [*N, 2, L] where the samples have L labels. Reads
    features and ``valid``; a sample's modality without a valid frame encodes to zeros.
    """

    Config: type[EvaluatorConfig] = EvaluatorConfig

    def __init__(self, config: EvaluatorConfig):
        super().__init__(encode_absent=True)
        self.config = Is(f"a {self.Config.__name__}", self.Config)("config", config)
        self.widths = {}
        for name, (_, width) in frame_shapes(config.feature_shapes).items():
            self.encoders[name], self.widths[name] = self.make_encoder(name, width)
        self.decoder = self.make_decoder(sum(self.widths.values()))
        if len(set(self.widths.values())) == 1:
            self.width = next(iter(self.widths.values()))

    @classmethod
    def for_data(cls, data: MultimodalDataset, **options: Any) -> Any:
        """The net that fits a data set's shapes and targets: integer targets [n, L] are L yes-or-no labels."""
        outputs, labels = output_shape(data)
        return cls(cls.Config(data.feature_shapes, outputs, labels, **options))

    def make_encoder(self, name: str, width: int) -> tuple[nn.Module, int]:
        """A net x [n, T, width], valid [n, T] -> h [n, d], and d."""
        raise NotImplementedError

    def encode_modality(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        expected = self.config.feature_shapes[name]
        if len(x.shape[1:]) != len(expected) or as_frames(x[:1]).shape[2] != frame_shapes({name: expected})[name][1]:
            raise ValueError(f"features[{name!r}]: expected samples of shape {expected}, got {tuple(x.shape[1:])}")
        x = torch.where(valid[..., None], as_frames(x), 0)  # whatever stands in the padding, it reaches no gradient
        return torch.where(valid.any(-1)[:, None], self.encoders[name](x, valid), 0)

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        return torch.cat(list(h.values()), -1)

    def decode(self, z: Tensor) -> Tensor:
        return split_labels(self.decoder(z), self.config.labels)


def output_shape(data: MultimodalDataset) -> tuple[int, int]:
    """(outputs K, labels L) of a data set's targets: bool ones [n, K] have a logit a label, so L is 0."""
    y, lead = DATASET("data", data).target, len(data.data.shape)
    if y is not None and y.ndim > lead and y.dtype == torch.int64:
        return 2 * y.shape[-1], y.shape[-1]
    return outputs_of(data), 0


# --- the net whose size is the printed one ----------------------------------------------------------------------------


class _ConvMean(nn.Module):
    """A convolution over three frames, layer normalisation, ReLU, the mean over valid frames."""

    def __init__(self, input_width: int, width: int):
        super().__init__()
        self.conv = nn.Conv1d(input_width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return masked_mean(torch.relu(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))), valid)


class _SkipHead(nn.Module):
    """Two hidden layers to the outputs, and a linear map past them."""

    def __init__(self, input_width: int, width: int, outputs: int):
        super().__init__()
        half = max(width // 2, 1)
        self.trunk = nn.Sequential(
            nn.Linear(input_width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, half), nn.ReLU()
        )
        self.out = nn.Linear(half, outputs)
        self.skip = nn.Linear(input_width, outputs)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.trunk(z)) + self.skip(z)


class Table3Evaluator(Evaluator):
    """A net with the parameters that DREAM's Table 3 prints for its pre-trained model, exactly: our reading.

    77,762 / 93,890 / 95,472 for CMU-MOSI, CMU-MOSEI and IEMOCAP (text 300, audio 5 / 74 / 74, vision 20 / 35 / 35; 1, 1
    and 8 outputs). The counts force 192 parameters for each further input value and 226 for each further output: a
    convolution over three frames to 64 channels, and heads on 192 + 32 values. The rest is one of several nets that
    meet the count. CorrKD's own net, which the paper names, has 120 for each input value (see `CorrKDEvaluator`).
    """

    def make_encoder(self, name: str, width: int) -> tuple[nn.Module, int]:
        return _ConvMean(width, self.config.width), self.config.width

    def make_decoder(self, width: int) -> nn.Module:
        return _SkipHead(width, self.config.width, self.config.outputs)


# --- CorrKD's net -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorrKDConfig(EvaluatorConfig):
    """Width and heads as CorrKD's paper has them; the depth is ours."""

    width: int = option(40, Whole(1))
    heads: int = option(10, Whole(1))  # 10, 8 and 10 for CMU-MOSI, CMU-MOSEI and IEMOCAP
    layers: int = option(1, Whole(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"heads: expected a divisor of the even width {self.width}, got {self.heads}")


class _ConvTransformer(nn.Module):
    """A convolution over three frames, sinusoidal positions, a Transformer encoder, the mean over valid frames."""

    def __init__(self, input_width: int, config: CorrKDConfig):
        super().__init__()
        self.conv = nn.Conv1d(input_width, config.width, 3, padding=1, bias=False)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, config.dropout, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        h = self.conv(x.transpose(1, 2)).transpose(1, 2)
        h = h + sinusoids(h.shape[1], h.shape[2]).to(h)
        seen = valid | ~valid.any(-1, keepdim=True)  # a row without a frame needs some key; its result is not used
        return masked_mean(self.layers(h, src_key_padding_mask=~seen), valid)


def sinusoids(frames: int, width: int) -> Tensor:
    """Sinusoidal positions [T, d]: sines in the even columns, cosines in the odd ones. Vaswani et al. (2017)."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    angle = torch.arange(frames)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class CorrKDEvaluator(Evaluator):
    """The student net of CorrKD, in our reading: convolution, positions, Transformer, mean, concatenation, linear.

    Li et al. (CVPR 2024) have no public code that we found.
    """

    Config = CorrKDConfig

    def make_encoder(self, name: str, width: int) -> tuple[nn.Module, int]:
        assert isinstance(self.config, CorrKDConfig)
        return _ConvTransformer(width, self.config), self.config.width

    def make_decoder(self, width: int) -> nn.Module:
        return nn.Linear(width, self.config.outputs)


# --- Self-MM ----------------------------------------------------------------------------------------------------------


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


class _Mean(nn.Module):
    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return masked_mean(x, valid)


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
            return _Mean(), width
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
    tanh|own label - fused label|, so it counts for nothing in epoch 1. Our reading: no gradient accumulation, one
    learning rate.

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
        place = torch.searchsorted(self.ids, batch.ids).clamp_max(len(self.ids) - 1)
        if not torch.equal(self.ids[place], batch.ids):
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


# --- an MLP -----------------------------------------------------------------------------------------------------------


class MLPEvaluator(Evaluator):
    """The mean of each modality's frames, concatenation, a two-layer net. DREAM's Figure 5, in our reading."""

    def make_encoder(self, name: str, width: int) -> tuple[nn.Module, int]:
        return _Mean(), width

    def make_decoder(self, width: int) -> nn.Module:
        return MLP([width, self.config.width, self.config.outputs], self.config.dropout)
