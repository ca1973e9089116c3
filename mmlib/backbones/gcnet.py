"""GCNet: a recurrent net over the concatenated modalities, then one graph of times and one of speakers.

Lian, Chen, Sun, Liu, Tao (TPAMI 2023), without its reconstruction of what is missing, as BALM uses it, since that needs
complete data. An utterance is joined to those within a window; in the one graph an edge's kind is past, now or future,
in the other the pair of speakers. The edges of a dialogue are masks [B, U, U], so no list of edges is ever made.

There is no encoder of one modality: what the first layer does with modality m are columns of its weights
(`GCNetBackbone.input_columns`), and m's encoding by itself is the net's output with the others zeroed
(`GCNetBackbone.unimodal_states`). With ``front``, each modality gets a linear map of its own before the net.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import MultimodalBatch, MultimodalDataset
from ..checks import RATE, Flag, Is, Maybe, Whole, check_options, option
from .dialogue import (
    WIDTHS,
    DialogueBackbone,
    dialogue_options,
    real_utterances,
    run_packed,
    speaker_numbers,
    used_steps,
)

__all__ = ["GCNetBackbone", "GCNetConfig"]


@dataclass(frozen=True)
class GCNetConfig:
    """Modalities and sizes. The defaults are the release's for IEMOCAP's six classes, in BALM's order."""

    input_widths: Mapping[str, int] = option({"audio": 512, "language": 1024, "vision": 1024}, WIDTHS)
    outputs: int = option(6, Whole(1))  # K
    speakers: int = option(2, Whole(1))
    width: int = option(200, Whole(1))  # of the first net, in each of two directions
    hidden: int = option(100, Whole(1))  # of the graph nets
    past: int = option(2, Whole(-1))  # utterances before that an utterance is joined to; -1: all
    future: int = option(2, Whole(-1))  # and after
    attention: bool = option(False, Flag())  # each utterance looks at all of its dialogue after the graph
    dropout: float = option(0.5, RATE)  # between the layers of the recurrent nets
    front: int | None = option(None, Maybe(Whole(1)))  # width of a linear map a modality before the first net
    encode_absent: bool = option(True, Flag())  # with ``front`` alone: see DialogueBackbone

    def __post_init__(self) -> None:
        check_options(self)


class Relations(nn.Module):
    """h_i = root x_i + b + sum_r mean over the neighbours j of kind r of W_r x_j: x [B, U, d] -> [B, U, hidden].

    Schlichtkrull et al. (2018). edges : bool [B, R, U, U], True where j (last) is a neighbour of i by relation r
    """

    def __init__(self, width: int, hidden: int, relations: int):
        super().__init__()
        self.root = nn.Linear(width, hidden)
        self.weight = nn.Parameter(torch.empty(relations, width, hidden))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        share = edges.to(x.dtype) / edges.sum(-1, keepdim=True).clamp_min(1)
        return self.root(x) + torch.einsum("brud,rdh->buh", share @ x[:, None], self.weight)


class Branch(nn.Module):
    """One graph of the two: relations, a plain graph layer, a recurrent net and, where asked, attention.

    x [B, U, d] -> [B, U, d + hidden]
    """

    def __init__(self, width: int, hidden: int, relations: int, attention: bool, dropout: float):
        super().__init__()
        self.relations = Relations(width, hidden, relations)
        self.neighbours, self.own = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        both = width + hidden
        self.rnn = nn.LSTM(both, both, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.query = nn.Linear(2 * both, 2 * both) if attention else None
        self.out = nn.Linear(2 * both, both)

    def forward(self, x: Tensor, edges: Tensor, real: Tensor) -> Tensor:
        h = self.relations(x, edges)
        joined = edges.any(1).to(x.dtype)
        h = self.neighbours(joined @ h) + self.own(h)
        h = run_packed(self.rnn, torch.cat([x, h], -1), real)
        if self.query is not None:
            scores = torch.tanh(self.query(h) @ h.mT)  # of bounded size, so that no dialogue is looked at in one place
            scores = scores.masked_fill(~real[:, None], -torch.inf)
            scores = torch.where(real[..., None], scores, 0)  # rows of padding: anything finite
            h = torch.softmax(scores, -1) @ h
        return torch.relu(self.out(h))


class GCNetBackbone(DialogueBackbone):
    """A two-layer BiLSTM over all modalities, a graph of times and a graph of speakers, added; a linear classifier.

    features[m] [B, U, T, D_m]; h[m] [B, U, D_m] (the input, or its linear map); z [B, U, 2 width + hidden]; logits
    [B, U, K]. Without ``front``, an absent modality is zeros to the net, and ``independent_encoders`` is False: the
    coalition engine runs whole forward passes on filled inputs.
    """

    def __init__(self, config: GCNetConfig | None = None):
        config = Maybe(Is("a GCNetConfig", GCNetConfig))("config", config) or GCNetConfig()
        super().__init__(config.input_widths, config.speakers, config.encode_absent and config.front is not None)
        self.config = config
        self.independent_encoders = config.front is not None and not config.encode_absent
        if config.front is not None:
            for name, input_width in config.input_widths.items():
                self.encoders[name] = nn.Linear(input_width, config.front)
        self.rnn = nn.LSTM(
            sum(self._widths().values()), config.width, 2, batch_first=True, bidirectional=True, dropout=config.dropout
        )
        sizes = (2 * config.width, config.hidden)
        self.times = Branch(*sizes, 3, config.attention, config.dropout)
        self.pairs = Branch(*sizes, config.speakers**2, config.attention, config.dropout)
        self.decoder = self.make_decoder(sum(sizes))

    def _widths(self) -> dict[str, int]:
        front = self.config.front
        return {name: width if front is None else front for name, width in self.config.input_widths.items()}

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.config.input_widths)

    @classmethod
    def for_data(cls, data: MultimodalDataset, **options: Any) -> GCNetBackbone:
        """The backbone that fits a data set's modalities, widths, speakers and outputs; options as in GCNetConfig."""
        return cls(GCNetConfig(**{**dialogue_options(data), **options}))

    def make_decoder(self, width: int) -> nn.Module:
        return nn.Linear(width, self.config.outputs)

    def input_columns(self) -> dict[str, slice]:
        """Per modality its columns in the first layer's input weights, ``rnn.weight_ih_l0`` and ``_l0_reverse``."""
        ends, start = {}, 0
        for name, width in self._widths().items():
            ends[name] = slice(start, start + width)
            start += width
        return ends

    def encode_dialogue(self, name: str, x: Tensor, real: Tensor, batch: MultimodalBatch) -> Tensor:
        return self.encoders[name](x) if self.config.front is not None else x

    def states(self, h: dict[str, Tensor], present: Tensor, real: Tensor) -> Tensor:
        """The first net's output [B, U, 2 width]."""
        return run_packed(self.rnn, torch.cat(list(self.present_only(h, present, real).values()), -1), real)

    def unimodal_states(self, batch: MultimodalBatch) -> dict[str, Tensor]:
        """Per modality the first net's output [B, U, 2 width] when the others are zeros to it."""
        h, real = self.encode(batch), real_utterances(batch)
        alone = [torch.cat([x if m == name else torch.zeros_like(x) for m, x in h.items()], -1) for name in h]
        every = run_packed(self.rnn, torch.cat(alone), real.repeat(len(h), 1))
        return dict(zip(h, every.chunk(len(h)), strict=True))

    def edges(self, real: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor]:
        """bool [B, 3, U, U], of kinds past, now and future, and [B, speakers^2, U, U], by the pair (i's, j's).

        [..., i, j] is True where utterance i hears j: j lies at most ``past`` before or ``future`` after it.
        """
        U, config = real.shape[1], self.config
        place = torch.arange(U, device=real.device)
        lag = place[None, :] - place[:, None]  # j - i
        near = (lag >= -(U if config.past < 0 else config.past)) & (lag <= (U if config.future < 0 else config.future))
        near = near & real[:, :, None] & real[:, None, :]
        times = torch.stack([lag < 0, lag == 0, lag > 0]) & near[:, None]
        pair = self.speakers * speaker[:, :, None] + speaker[:, None, :]
        kinds = torch.arange(self.speakers**2, device=real.device)[:, None, None]
        return times, near[:, None] & (pair[:, None] == kinds)

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        real, speaker = real_utterances(batch), speaker_numbers(batch, self.speakers)
        x, steps = self.states(h, present, real), used_steps(real)
        x, kept = x[:, :steps], real[:, :steps]
        times, pairs = self.edges(kept, speaker[:, :steps])
        z = self.times(x, times, kept) + self.pairs(x, pairs, kept)
        z = torch.where(kept[..., None], z, 0)
        return nn.functional.pad(z, (0, 0, 0, real.shape[1] - steps))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)
