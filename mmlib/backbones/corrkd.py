"""The student net of CorrKD: convolution, positions, Transformer, mean over frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import Whole, option
from ..layers import masked_mean
from .sequences import Evaluator, EvaluatorConfig

__all__ = ["CorrKDConfig", "CorrKDEvaluator"]


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
    """The student net of CorrKD, interpreted: convolution, positions, Transformer, mean, concatenation, linear.

    Li et al. (CVPR 2024) have no public code that we found.
    """

    Config = CorrKDConfig

    def make_encoder(self, name: str, width: int) -> tuple[nn.Module, int]:
        assert isinstance(self.config, CorrKDConfig)
        return _ConvTransformer(width, self.config), self.config.width

    def make_decoder(self, width: int) -> nn.Module:
        return nn.Linear(width, self.config.outputs)
