"""Two small nets that take the mean of each modality's frames: one of the size that DREAM prints, and a plain one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import MLP, masked_mean
from .sequences import Evaluator, Mean

__all__ = ["MLPEvaluator", "Table3Evaluator"]


class _ConvMean(nn.Module):
    """A convolution over three frames, layer normalisation, ReLU, the mean over valid frames."""

    def __init__(self, input_width: int, width: int):
        super().__init__()
        self.conv = nn.Conv1d(input_width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)

    def frames(self, x: Tensor) -> Tensor:
        """The frames of which the mean is taken: x [n, T, D] -> [n, T, d]."""
        return torch.relu(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return masked_mean(self.frames(x), valid)


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
    """A net with the parameters that DREAM's Table 3 prints for its pre-trained model, exactly: our interpretation.

    77,762 / 93,890 / 95,472 for CMU-MOSI, CMU-MOSEI and IEMOCAP (text 300, audio 5 / 74 / 74, vision 20 / 35 / 35; 1, 1
    and 8 outputs). The counts force 192 parameters for each further input value and 226 for each further output: a
    convolution over three frames to 64 channels, and heads on 192 + 32 values. The rest is one of several nets that
    meet the count. CorrKD's own net, which the paper names, has 120 for each input value (see `CorrKDEvaluator`).
    """

    def make_encoder(self, name: str, width: int) -> tuple[nn.Module, int]:
        return _ConvMean(width, self.config.width), self.config.width

    def make_decoder(self, width: int) -> nn.Module:
        return _SkipHead(width, self.config.width, self.config.outputs)

    def encode_frames(self, name: str, x: Tensor) -> Tensor:
        """A modality's frames [n, T, D] as they are before their mean is taken, [n, T, width]."""
        encoder = self.encoders[name]
        assert isinstance(encoder, _ConvMean)
        return encoder.frames(x)


class MLPEvaluator(Evaluator):
    """The mean of each modality's frames, concatenation, a two-layer net. DREAM's Figure 5, in our interpretation."""

    def make_encoder(self, name: str, width: int) -> tuple[nn.Module, int]:
        return Mean(), width

    def make_decoder(self, width: int) -> nn.Module:
        return MLP([width, self.config.width, self.config.outputs], self.config.dropout)
