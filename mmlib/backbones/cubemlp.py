"""CubeMLP: a cube of time, modalities and features, mixed along one axis after another.

Sun, Wang, Liu, Chen, Lin (ACM MM 2022). A net for complete data: what is missing is zeros to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import MultimodalBatch, MultimodalDataset
from ..checks import RATE, SHAPES, Is, Maybe, OneOf, Several, Whole, check_options, option
from ..layers import as_frames, frame_shapes
from .base import Backbone
from .sequences import output_shape, split_labels

__all__ = ["CubeMLPBackbone", "CubeMLPConfig"]


@dataclass(frozen=True)
class CubeMLPConfig:
    """Shapes of the data and sizes of the cube."""

    # one sample of each modality: (T, D), (C, H, W) or (C, X, Y, Z)
    feature_shapes: Mapping[str, tuple[int, ...]] = option(MISSING, SHAPES)
    outputs: int = option(MISSING, Whole(1))  # K
    labels: int = option(0, Whole(0))  # yes-or-no labels a sample, each with two of the outputs; 0: classes or a score
    # L: frames of the cube; default the longest modality's. Shorter ones are padded
    length: int | None = option(None, Maybe(Whole(1)))
    width: int = option(128, Whole(1))  # D of the first cube
    # (frames, modalities, features) after each block; default the first cube's size, then (10, M, 32)
    blocks: tuple[tuple[int, int, int], ...] | None = option(None, Maybe(Several(Several(Whole(1), 3, 3))))
    norm: str = option("before", OneOf("before", "after"))  # layer normalisation "before" or "after" each mixing
    pool: str = option("mean", OneOf("mean", "concat"))  # over frames and modalities of the last cube
    # of each modality: over three frames, or in both directions
    encoder: str = option("conv", OneOf("conv", "gru"))
    dropout: float = option(0.1, RATE)

    def __post_init__(self) -> None:
        check_options(self)
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(tuple(size) for size in self.blocks))
        if self.encoder == "gru" and self.width % 2:
            raise ValueError(f"width: expected an even number for two directions, got {self.width}")
        longest = max(frames for frames, _ in frame_shapes(self.feature_shapes).values())
        if self.length is not None and self.length < longest:
            raise ValueError(f"length: expected at least the longest modality's {longest} frames, got {self.length}")

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """The cube at first and after each block."""
        longest = max(frames for frames, _ in frame_shapes(self.feature_shapes).values())
        first = (self.length or longest, len(self.feature_shapes), self.width)
        blocks = self.blocks if self.blocks is not None else (first, (10, first[1], 32))
        return (first, *blocks)


class _Mixing(nn.Module):
    """Along one axis of the cube: a two-layer net with GELU, dropout and a residual, projected where sizes differ."""

    def __init__(self, axis: int, size: int, new: int, norm: str, dropout: float):
        super().__init__()
        self.axis, self.before = axis, norm == "before"
        self.norm = nn.LayerNorm(size if self.before else new)
        self.net = nn.Sequential(
            nn.Linear(size, new), nn.GELU(), nn.Dropout(dropout), nn.Linear(new, new), nn.Dropout(dropout)
        )
        self.past: nn.Module = nn.Identity() if new == size else nn.Linear(size, new, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(self.axis, -1)
        y = self.net(self.norm(x) if self.before else x) + self.past(x)
        return (y if self.before else self.norm(y)).transpose(self.axis, -1)


class _Frames(nn.Module):
    """Sequences [n, T, D] -> [n, L, d], zero beyond the valid frames."""

    def __init__(self, input_width: int, config: CubeMLPConfig):
        super().__init__()
        self.length = config.sizes[0][0]
        self.conv = nn.Conv1d(input_width, config.width, 3, padding=1) if config.encoder == "conv" else None
        self.gru = (
            nn.GRU(input_width, config.width // 2, batch_first=True, bidirectional=True)
            if config.encoder == "gru"
            else None
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = torch.where(valid[..., None], x, 0)
        h = self.conv(x.transpose(1, 2)).transpose(1, 2) if self.conv is not None else self.gru(x)[0]  # type: ignore
        h = torch.where(valid[..., None], torch.relu(self.norm(h)), 0)
        return nn.functional.pad(h, (0, 0, 0, self.length - h.shape[1]))


class CubeMLPBackbone(Backbone):
    """Encode each modality to [L, d], stack them to a cube [L, M, d], mix along time, modalities and features; linear.

    The baseline for complete modalities in DREAM's tables. Reads features and ``valid`` alone. Raises ValueError for
    features of another width or more than L frames.
    """

    def __init__(self, config: CubeMLPConfig):
        super().__init__(encode_absent=True)
        self.config = Is("a CubeMLPConfig", CubeMLPConfig)("config", config)
        for name, (_, width) in frame_shapes(config.feature_shapes).items():
            self.encoders[name] = _Frames(width, config)
        sizes = config.sizes
        self.mixing = nn.Sequential(
            *(
                _Mixing(axis + 1, old[axis], new[axis], config.norm, config.dropout)
                for old, new in zip(sizes[:-1], sizes[1:], strict=True)
                for axis in range(3)
            )
        )
        last = sizes[-1]
        self.decoder = nn.Linear(last[2] if config.pool == "mean" else last[0] * last[1] * last[2], config.outputs)

    @classmethod
    def for_data(cls, data: MultimodalDataset, **options: Any) -> CubeMLPBackbone:
        """The net that fits a data set's shapes and targets."""
        outputs, labels = output_shape(data)
        return cls(CubeMLPConfig(data.feature_shapes, outputs, labels, **options))

    def encode_modality(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        frames, width = frame_shapes({name: self.config.feature_shapes[name]})[name]
        x = as_frames(x)
        if x.shape[2] != width or x.shape[1] > self.config.sizes[0][0]:
            raise ValueError(
                f"features[{name!r}]: expected at most {self.config.sizes[0][0]} frames of {width} values, "
                f"got {tuple(x.shape[1:])}"
            )
        return self.encoders[name](x, valid)

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        lead = present.ndim - 1
        cube = self.mixing(torch.stack(list(h.values()), lead + 1).flatten(0, lead - 1))
        z = cube.mean((1, 2)) if self.config.pool == "mean" else cube.flatten(1)
        return z.unflatten(0, present.shape[:-1])

    def decode(self, z: Tensor) -> Tensor:
        return split_labels(self.decoder(z), self.config.labels)
