"""What small nets for sequences of any number of modalities share, which know nothing of what is missing.

DREAM asks such a net, trained and frozen, what it predicts from every subset of the modalities. A missing modality is
zeros to them, in training and after it: their encoders run on the zeros and their fusion does not look at ``present``.
Images and volumes are read as sequences (an image's rows are its frames).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import DATASET, MultimodalBatch, MultimodalDataset
from ..checks import RATE, SHAPES, Is, Whole, check_options, option
from ..layers import as_frames, frame_shapes, masked_mean
from .base import Backbone, outputs_of

__all__ = ["Evaluator", "EvaluatorConfig"]


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


class Mean(nn.Module):
    """The mean over valid frames: x [n, T, D], valid [n, T] -> [n, D]."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return masked_mean(x, valid)
