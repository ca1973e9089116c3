"""The AudiovisionMNIST nets of MCE and SMIL: a LeNet for the image, three small convolutions for the sound.

Reconstructed from the layer sizes that the MCE release's parameter counts imply. The sound is a 20 x 20 MFCC image
[1, T, coefficients], time first, so that its rows are its frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import DATASET, MultimodalBatch, MultimodalDataset
from ..checks import Flag, Is, Maybe, OneOf, Several, Whole, check_options, option
from ..layers import MLP
from .base import Backbone, outputs_of

__all__ = ["AVMNISTBackbone", "AVMNISTConfig"]


@dataclass(frozen=True)
class AVMNISTConfig:
    """Widths are the release's; only these vary."""

    # one of them alone gives the unimodal nets
    modalities: tuple[str, ...] = option(("image", "audio"), Several(OneOf("image", "audio"), 1, 2))
    outputs: int = option(10, Whole(1))
    encode_absent: bool = option(False, Flag())  # run the encoders on absent rows' zeros, as the release does
    # carry the encoders' own unused classifiers, which the printed counts include
    released_heads: bool = option(False, Flag())

    def __post_init__(self) -> None:
        check_options(self)
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities: expected 'image', 'audio' or both, got {self.modalities}")


class LeNet(nn.Module):
    """Images [n, 1, 28, 28] -> [n, 320]: 10 maps of 4 x 4, aligned to the sound's width."""

    def __init__(self, released_heads: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 5, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(5, 10, 5),
            nn.Dropout(0.5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = MLP([160, 32, 10]) if released_heads else None
        self.align = nn.Linear(160, 320)

    def forward(self, x: Tensor) -> Tensor:
        return self.align(self.conv(x))


class SNetPlus(nn.Module):
    """MFCC images [n, 1, 20, 20] -> [n, 320]: 20 maps of 4 x 4."""

    def __init__(self, released_heads: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((1, 32), (32, 48), (48, 20)):
            layers += [nn.Conv2d(a, b, 2), nn.BatchNorm2d(b), nn.ReLU()]
        self.conv = nn.Sequential(*layers, nn.MaxPool2d(2, 4), nn.Dropout(0.25), nn.Flatten())
        self.head = MLP([320, 160, 32, 10]) if released_heads else None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class AVMNISTBackbone(Backbone):
    """LeNet and SNetPlus, concatenation with zeros for what is absent, and a 64-wide decoder with dropout one half.

    features: "image" [*N, 1, 28, 28], "audio" [*N, 1, 20, 20]; logits [*N, 10].
    """

    def __init__(self, config: AVMNISTConfig | None = None):
        config = Maybe(Is("an AVMNISTConfig", AVMNISTConfig))("config", config) or AVMNISTConfig()
        super().__init__(config.encode_absent)
        self.config = config
        for name in config.modalities:
            net = LeNet if name == "image" else SNetPlus
            self.encoders[name] = net(config.released_heads)
        self.width = 320
        self.decoder = self.make_decoder(self.width * len(config.modalities))

    @classmethod
    def for_data(cls, data: MultimodalDataset, **options: Any) -> AVMNISTBackbone:
        """The net for what a data set has of the two modalities, with its number of classes."""
        return cls(AVMNISTConfig(modalities=DATASET("data", data).modalities, outputs=outputs_of(data), **options))

    def make_decoder(self, width: int) -> nn.Module:
        return MLP([width, 64, self.config.outputs], dropout=0.5)

    def encode_modality(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        expected = (1, 28, 28) if name == "image" else (1, 20, 20)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"features[{name!r}]: expected samples of shape {expected}, got {tuple(x.shape[1:])}")
        return torch.where(valid.any(-1)[:, None], self.encoders[name](x), 0)

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        return torch.cat([torch.where(present[..., m, None], h[name], 0) for m, name in enumerate(self.modalities)], -1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)
