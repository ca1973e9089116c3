"""One backbone for vectors, sequences, images, volumes and token ids of any number of modalities."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import MultimodalBatch, MultimodalDataset
from ..checks import RATE, SHAPES, Flag, Is, Whole, check_options, option
from ..layers import MLP, masked_mean
from .base import Backbone, outputs_of

__all__ = ["GenericBackbone", "GenericConfig"]


@dataclass(frozen=True)
class GenericConfig:
    """Shapes of the data and widths of the net."""

    # one sample of each modality: (T, D), (C, H, W), (C, X, Y, Z) or (T,)
    feature_shapes: dict[str, tuple[int, ...]] = option(MISSING, SHAPES)
    outputs: int = option(MISSING, Whole(1))  # K: classes, or 1 for regression
    width: int = option(64, Whole(1))  # d: width of every encoding
    dropout: float = option(0.1, RATE)
    vocabulary: int = option(30522, Whole(1))  # token ids lie below this (only for token modalities)
    encode_absent: bool = option(False, Flag())  # run encoders on placeholders, as several releases do

    def __post_init__(self) -> None:
        check_options(self)


class _Frames(nn.Module):
    """Sequences [n, T, D] or tokens [n, T] -> [n, d]: two convolutions over time, then the mean over valid frames."""

    def __init__(self, shape: tuple[int, ...], config: GenericConfig):
        super().__init__()
        width = config.width
        embed = nn.Embedding(config.vocabulary, width) if len(shape) == 1 else nn.Linear(shape[-1], width)
        self.embed: nn.Module = embed
        self.first = nn.Conv1d(width, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, padding=1)
        self.out = MLP([2 * width, width], config.dropout)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        keep = valid[:, None, :]
        if x.is_floating_point():
            x = torch.where(valid[..., None], x, 0)  # whatever stands in the padding, it reaches no gradient
        h = self.embed(x).transpose(1, 2)  # [n, d, T]
        # Padding is zeroed before each convolution, so a sequence means the same however long its batch is.
        h = h + torch.relu(self.first(torch.where(keep, h, 0)))
        h = h + torch.relu(self.second(torch.where(keep, h, 0)))
        top = torch.where(keep, h, -torch.inf).amax(-1)
        pooled = torch.cat([masked_mean(h.transpose(1, 2), valid), torch.where(valid.any(-1)[:, None], top, 0)], -1)
        return torch.relu(self.out(self.drop(pooled)))


class _Grid(nn.Module):
    """Images [n, C, H, W] or volumes [n, C, X, Y, Z] -> [n, d]: two convolutions with pooling, then a linear map."""

    def __init__(self, shape: tuple[int, ...], config: GenericConfig):
        super().__init__()
        conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if len(shape) == 3 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
        half = max(config.width // 2, 1)
        self.net = nn.Sequential(
            conv(shape[0], half, 3, padding=1),
            nn.ReLU(),
            conv(half, config.width, 3, stride=2, padding=1),
            nn.ReLU(),
            pool(4),
            nn.Flatten(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width * 4 ** (len(shape) - 1), config.width),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.net(x)


class _Vector(nn.Module):
    """Vectors [n, 1, D] -> [n, d]."""

    def __init__(self, shape: tuple[int, ...], config: GenericConfig):
        super().__init__()
        self.net = MLP([shape[-1], config.width, config.width], config.dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return torch.relu(self.net(x[:, 0]))


class GenericBackbone(Backbone):
    """An encoder for each modality by its shape, concatenation of the present encodings, and a two-layer decoder.

    A modality that is not there contributes zeros to the concatenation, as in MCE and BALM. Frames are pooled over
    ``valid``. Raises ValueError for features whose shape is not the configuration's.
    """

    def __init__(self, config: GenericConfig):
        super().__init__(Is("a GenericConfig", GenericConfig)("config", config).encode_absent)
        self.config = config
        for name, shape in config.feature_shapes.items():
            kind: type[nn.Module]
            if len(shape) == 1 or (len(shape) == 2 and shape[0] > 1):
                kind = _Frames
            elif len(shape) == 2:
                kind = _Vector
            else:
                kind = _Grid
            self.encoders[name] = kind(tuple(shape), config)
        self.width = config.width
        self.decoder = self.make_decoder(config.width * len(self.encoders))

    def make_decoder(self, width: int) -> nn.Module:
        return MLP([width, self.config.width, self.config.outputs], self.config.dropout)

    @classmethod
    def for_data(cls, data: MultimodalDataset, **options: Any) -> GenericBackbone:
        """The backbone that fits a data set's shapes, outputs and vocabulary; ValueError for ids outside that."""
        outputs = outputs_of(data)
        if sizes := data.info.get("vocabulary"):
            options.setdefault("vocabulary", max(sizes.values()))
        model = cls(GenericConfig(data.feature_shapes, outputs, **options))
        for name, x in data.data.features.items():
            model._check_ids(name, x)
        return model

    def _check_ids(self, name: str, x: Tensor) -> None:
        """An id outside the embedding ends a GPU's process without a word about which."""
        if x.is_floating_point() or x.is_meta or not x.numel():
            return
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= self.config.vocabulary:
            raise ValueError(
                f"features[{name!r}]: expected token ids in [0, {self.config.vocabulary}), the vocabulary of the "
                f"backbone, got values from {low} to {high}"
            )

    def encode_modality(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        expected = self.config.feature_shapes[name]
        if len(x.shape[1:]) != len(expected) or (len(expected) > 1 and x.shape[-1] != expected[-1]):
            raise ValueError(f"features[{name!r}]: expected samples of shape {expected}, got {tuple(x.shape[1:])}")
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            self._check_ids(name, x)
        h = self.encoders[name](x, valid)
        return torch.where(valid.any(-1)[:, None], h, 0)

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        return torch.cat([torch.where(present[..., m, None], h[name], 0) for m, name in enumerate(self.modalities)], -1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)
