"""The nets of MMIN for utterances: LSTMs for sound and face, a TextCNN for words, and a two-layer classifier.

Zhao, Li, Jin (ACL 2021); RedCore and MCE use them too. MCE's parameter counts follow from the default configuration:
LSTM of the audio 133,120, of the vision 241,664, TextCNN 1,622,528; without batch normalisation the fused classifier
has 66,308 and one of a single modality 33,540.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import MultimodalBatch, MultimodalDataset
from ..checks import RATE, Flag, Is, Maybe, Named, OneOf, Whole, check_known, check_options, option
from .base import Backbone, outputs_of

__all__ = ["MMINBackbone", "MMINConfig"]

HEIGHTS = (3, 4, 5)  # frames that a filter of the TextCNN sees


@dataclass(frozen=True)
class MMINConfig:
    """Modalities, widths and nets. The defaults are those of IEMOCAP, in the release's order."""

    input_widths: Mapping[str, int] = option({"audio": 130, "vision": 342, "language": 1024}, Named(Whole(1)))
    # of a modality; None: "textcnn" for "language" alone
    nets: Mapping[str, str] | None = option(None, Maybe(Named(OneOf("lstm", "textcnn"), 0)))
    outputs: int = option(4, Whole(1))  # K
    width: int = option(128, Whole(1))  # d: of every encoding, and of the classifier's two layers
    dropout: float = option(0.5, RATE)  # in the TextCNN and in the classifier
    batch_norm: bool = option(True, Flag())  # in the classifier: MCE's paper says so, its released script runs without
    encode_absent: bool = option(False, Flag())  # run the encoders on absent rows' zeros, as the release does

    def __post_init__(self) -> None:
        check_options(self)
        check_known("nets", self.nets or (), self.input_widths)

    def net(self, modality: str) -> str:
        """The kind of net of one modality; what ``nets`` leaves out is "lstm", or "textcnn" for "language"."""
        return (self.nets or {}).get(modality, "textcnn" if modality == "language" else "lstm")


class MaxLSTM(nn.Module):
    """Sequences [n, T, D] -> [n, d]: an LSTM in one direction, then the maximum over the valid frames."""

    def __init__(self, input_width: int, width: int, dropout: float):
        super().__init__()
        self.lstm = nn.LSTM(input_width, width, batch_first=True)  # no dropout, as in the release

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        # Packed sequences give the same; on a CPU they cost 1.3 to 1.6 times as much where lengths differ.
        h, _ = self.lstm(x)
        return h.masked_fill(~valid[..., None], -torch.inf).amax(1)


class TextCNN(nn.Module):
    """Sequences [n, T, D] -> [n, d]: filters over 3, 4 and 5 frames, ReLU, maximum over time, a linear map, ReLU.

    A sequence of fewer than 5 frames is lengthened to 5 with zeros. A window that reaches beyond the sequence's own
    end does not count. Kim (EMNLP 2014).
    """

    def __init__(self, input_width: int, width: int, dropout: float):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(input_width, width, height) for height in HEIGHTS)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(len(HEIGHTS) * width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 0, max(HEIGHTS[-1] - x.shape[1], 0))).transpose(1, 2)
        length = valid.sum(1, keepdim=True).clamp_min(HEIGHTS[-1])
        tops = []
        for height, conv in zip(HEIGHTS, self.convs, strict=True):
            h = conv(x)  # [n, d, windows]
            inside = torch.arange(height, x.shape[-1] + 1, device=x.device) <= length  # where each window ends
            tops.append(torch.relu(h.masked_fill(~inside[:, None], 0)).amax(-1))
        return torch.relu(self.out(self.drop(torch.cat(tops, -1))))


_NETS: dict[str, type[MaxLSTM] | type[TextCNN]] = {"lstm": MaxLSTM, "textcnn": TextCNN}


class RowNorm(nn.BatchNorm1d):
    """Batch normalisation of [*N, d] over all N rows. Fewer than two rows have no variance: they are normalised by the
    running statistics, also in training."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) > 1:
            y = super().forward(rows)
        else:
            mean, var = self.running_mean, self.running_var
            y = nn.functional.batch_norm(rows, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        return y.reshape(x.shape)


def _compact(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The valid frames of x [n, T, D] first, in their order, zeros after them; T cut to the longest row's."""
    order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    valid = valid.gather(1, order)
    if not torch.compiler.is_compiling():  # a compiled graph's shapes cannot depend on values
        frames = max(int(valid.any(0).sum()), 1)
        order, valid = order[:, :frames], valid[:, :frames]
    x = x[torch.arange(len(x), device=x.device)[:, None], order]
    return torch.where(valid[..., None], x, 0), valid  # whatever stands in the padding, it reaches no gradient


class MMINBackbone(Backbone):
    """One LSTM or TextCNN a modality, concatenation with zeros for what is absent, and MMIN's classifier.

    features[m] [*N, T_m, D_m] floats; logits [*N, K]. Padding never matters: a row is encoded from its valid frames
    alone, as if they stood in a batch of their own, wherever the padding is and however long it is. (The released code
    runs the nets over the padding of each batch.) Frames that were dropped are valid frames of zeros.

    Raises ValueError for features whose width is not the configuration's.
    """

    def __init__(self, config: MMINConfig | None = None):
        config = Maybe(Is("an MMINConfig", MMINConfig))("config", config) or MMINConfig()
        super().__init__(config.encode_absent)
        self.config = config
        for name, input_width in config.input_widths.items():
            self.encoders[name] = _NETS[config.net(name)](input_width, config.width, config.dropout)
        self.width = config.width
        self.decoder = self.make_decoder(config.width * len(self.encoders))

    @classmethod
    def for_data(cls, data: MultimodalDataset, **options: Any) -> MMINBackbone:
        """The backbone that fits a data set's modalities, widths and outputs; options as in MMINConfig.

        Raises ValueError for a modality that is not a sequence [T, D].
        """
        outputs, shapes = outputs_of(data), data.feature_shapes
        if wrong := {name: shape for name, shape in shapes.items() if len(shape) != 2}:
            raise ValueError(f"data: expected sequences (T, D) in every modality, got {wrong}")
        return cls(MMINConfig({name: shape[-1] for name, shape in shapes.items()}, outputs=outputs, **options))

    def make_decoder(self, width: int) -> nn.Module:
        """MMIN's FcClassifier, [*N, width] -> [*N, K]: linear, ReLU, batch normalisation, dropout, twice; linear."""
        layers: list[nn.Module] = []
        for a, b in ((width, self.config.width), (self.config.width, self.config.width)):
            layers += [nn.Linear(a, b), nn.ReLU()]
            if self.config.batch_norm:
                layers.append(RowNorm(b))
            layers.append(nn.Dropout(self.config.dropout))
        return nn.Sequential(*layers, nn.Linear(self.config.width, self.config.outputs))

    def encode_modality(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        expected = self.config.input_widths[name]
        if x.ndim != 3 or x.shape[-1] != expected:
            raise ValueError(f"features[{name!r}]: expected samples of shape (T, {expected}), got {tuple(x.shape[1:])}")
        there = valid.any(-1)[:, None]
        return torch.where(there, self.encoders[name](*_compact(x, valid)), 0)

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        return torch.cat([torch.where(present[..., m, None], h[name], 0) for m, name in enumerate(self.modalities)], -1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)
