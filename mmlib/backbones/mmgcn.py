"""MMGCN: every modality of every utterance is a node; a deep graph net mixes the nodes of a dialogue.

Hu, Liu, Zhao, Jin (ACL 2021), as BALM builds on it. Within a dialogue, the nodes of one modality form a complete graph,
the modalities of one utterance are joined, and an edge weighs 1 - arccos(0.99999 cos(x, y)) / pi. The graph of a batch
falls apart into dialogues, and between two modalities it is diagonal; here nothing else of it is ever stored: blocks
[B, M, U, U] within modalities and [B, U, M, M] between them, which is linear in the number of dialogues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import MultimodalBatch, MultimodalDataset
from ..checks import (
    RATE,
    Array,
    Flag,
    Is,
    Maybe,
    Number,
    OneOf,
    Several,
    Text,
    Whole,
    check_known,
    check_options,
    option,
)
from .dialogue import (
    WIDTHS,
    DialogueBackbone,
    dialogue_options,
    real_utterances,
    run_packed,
    speaker_numbers,
    used_steps,
)

__all__ = ["GCNII", "MMGCNBackbone", "MMGCNConfig", "PRESETS", "dialogue_graph", "propagate"]

PRESETS: dict[str, dict[str, Any]] = {
    "balm": {},  # the defaults
    "original": {"layers": 64, "embedded": ("language",)},
}


@dataclass(frozen=True)
class MMGCNConfig:
    """Modalities and sizes. The defaults are BALM's for IEMOCAP."""

    input_widths: Mapping[str, int] = option({"audio": 1582, "language": 1024, "vision": 342}, WIDTHS)
    outputs: int = option(6, Whole(1))  # K
    speakers: int = option(2, Whole(1))
    # modalities with a recurrent net over the dialogue; None: "language" alone
    context: tuple[str, ...] | None = option(None, Maybe(Several(Text)))
    # modalities whose nodes get the speaker's embedding; None: all
    embedded: tuple[str, ...] | None = option(None, Maybe(Several(Text)))
    width: int = option(200, Whole(1))  # of a node; even, for a recurrent net in two directions
    hidden: int = option(100, Whole(1))  # of the graph net
    layers: int = option(4, Whole(1))
    alpha: float = option(0.1, Number(0, 1))  # share of the first layer in each layer
    lamda: float = option(0.5, Number(above=0))  # layer l mixes its features with theta_l = log(lamda / l + 1)
    dropout: float = option(0.4, RATE)
    # the recurrent nets of `context` see each dialogue alone; False, as in the releases: its padding too
    packed: bool = option(True, Flag())
    encode_absent: bool = option(True, Flag())  # see DialogueBackbone

    def __post_init__(self) -> None:
        check_options(self)
        if self.width % 2:
            raise ValueError(f"width: expected an even number, for two directions, got {self.width}")
        for name in ("context", "embedded"):
            check_known(name, getattr(self, name) or (), self.input_widths)

    def in_context(self, modality: str) -> bool:
        """Whether a modality's encoder sees the whole dialogue."""
        return modality in self.context if self.context is not None else modality == "language"

    def with_speaker(self, modality: str) -> bool:
        """Whether a modality's nodes get the speaker's embedding."""
        return self.embedded is None or modality in self.embedded


class Encoder(nn.Module):
    """Dialogues [B, U, D] -> [B, U, d]: a linear map, then where asked two recurrent layers in both directions.

    packed : the recurrent layers do not see padding; False: they run over it, twice as fast in small batches, and what
        an utterance gets from the direction that begins in the padding depends on how long that is
    """

    def __init__(
        self,
        input_width: int,
        width: int,
        rnn: type[nn.LSTM] | type[nn.GRU] | None,
        dropout: float,
        packed: bool = True,
    ):
        super().__init__()
        self.packed = packed
        self.linear = nn.Linear(input_width, width)
        self.rnn: nn.RNNBase | None = None
        if rnn is not None:
            self.rnn = rnn(width, width // 2, 2, batch_first=True, bidirectional=True, dropout=dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return self.context(self.linear(x), real)

    def context(self, x: Tensor, real: Tensor) -> Tensor:
        if self.rnn is None:
            return x
        return run_packed(self.rnn, x, real) if self.packed else self.rnn(x)[0]


def _similarity(cosine: Tensor) -> Tensor:
    return 1 - torch.arccos(0.99999 * cosine.clamp(-1, 1)) / math.pi


def dialogue_graph(nodes: Tensor, real: Tensor, cross_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """The normalised adjacency D^-1/2 A D^-1/2 of each dialogue, as blocks.

    nodes [B, M, U, d], real bool [B, U] -> ``same`` [B, M, U, U] between the utterances of a modality (with itself:
    0.998576 before normalisation, no self-loop is added), ``cross`` [B, U, M, M] between the modalities of an utterance
    (diagonal zero), times ``cross_weight``. Rows and columns of padding are zero. A node of zeros has cosine 0 with
    every node, itself included, so weight one half, and gets no gradient from there.
    """
    Array("bool", "[B, U]")("real", real)
    if Array("float", "[B, M, U, d]")("nodes", nodes).shape[::2] != (real.shape[0], real.shape[1]):
        raise ValueError(f"nodes, real: expected [B, M, U, d] and [B, U], got {[*nodes.shape]} and {[*real.shape]}")
    Number(0)("cross_weight", cross_weight)
    with torch.autocast(nodes.device.type, enabled=False):  # half precision would leave the domain of arccos
        nodes = nodes if nodes.dtype == torch.float64 else nodes.float()
        norm = torch.linalg.vector_norm(nodes, dim=-1, keepdim=True)
        some = norm > 1e-12
        unit = torch.where(some, nodes / torch.where(some, norm, 1), 0)
        pairs = real[:, :, None] & real[:, None, :]
        same = torch.where(pairs[:, None], _similarity(unit @ unit.mT), 0)
        by_utterance = unit.transpose(1, 2)  # [B, U, M, d]
        others = ~torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
        cross = _similarity(by_utterance @ by_utterance.mT) * cross_weight
        cross = torch.where(real[..., None, None] & others, cross, 0)
        degree = same.sum(-1) + cross.sum(-1).transpose(1, 2)  # [B, M, U]
        scale = torch.where(real[:, None], torch.where(real[:, None], degree, 1).rsqrt(), 0)
        same = scale[..., :, None] * same * scale[..., None, :]
        scale = scale.transpose(1, 2)
        return same, scale[..., :, None] * cross * scale[..., None, :]


def propagate(graph: tuple[Tensor, Tensor], h: Tensor) -> Tensor:
    """The product of the graph's adjacency with h [B, M, U, d]."""
    B, M, U, _ = Array("float", "[B, M, U, d]")("h", h).shape
    Several(Array("float", "[B, n, m, m]"), 2, 2)("graph", graph)
    if graph[0].shape != (B, M, U, U) or graph[1].shape != (B, U, M, M):
        raise ValueError(f"graph: expected blocks {[B, M, U, U]} and {[B, U, M, M]} for h, got others")
    same, cross = (part.to(h.dtype) for part in graph)
    return same @ h + (cross @ h.transpose(1, 2)).transpose(1, 2)


class GCNII(nn.Module):
    """The deep graph net of Chen et al. (ICML 2020), its variant: nodes [B, M, U, d] -> [B, M, U, d + hidden].

    h_0 = ReLU(W_0 x); layer l: g = A h, h' = ReLU(theta_l [g; h_0] W_l + (1 - theta_l) ((1 - alpha) g + alpha h_0)),
    theta_l = log(lamda / l + 1); the input (dropped out) and the last h are concatenated. With ``reasoning``, MM-DFN's
    memory: an LSTM step, its state carried from layer to layer, before each layer, and a residual past both.
    """

    def __init__(
        self, width: int, hidden: int, layers: int, alpha: float, lamda: float, dropout: float, reasoning: bool = False
    ):
        super().__init__()
        for name, value in (("width", width), ("hidden", hidden), ("layers", layers)):
            Whole(1)(name, value)
        self.alpha, self.lamda = Number(0, 1)("alpha", alpha), Number(above=0)("lamda", lamda)
        RATE("dropout", dropout)
        Flag()("reasoning", reasoning)
        self.first = nn.Linear(width, hidden)
        self.layers = nn.ModuleList(nn.Linear(2 * hidden, hidden, bias=False) for _ in range(layers))
        for layer in self.layers:
            nn.init.uniform_(layer.weight, -(hidden**-0.5), hidden**-0.5)  # type: ignore[arg-type]
        self.memory = nn.LSTMCell(hidden, hidden) if reasoning else None
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, graph: tuple[Tensor, Tensor]) -> Tensor:
        x = self.drop(x)
        start = torch.relu(self.first(x))
        h, state = self.drop(start), None
        for number, layer in enumerate(self.layers, 1):
            before = h
            if self.memory is not None:
                state = self.memory(h.flatten(0, 2), state)
                h = state[0].unflatten(0, h.shape[:3])
            theta = math.log(self.lamda / number + 1)
            g = propagate(graph, h)
            h = theta * layer(torch.cat([g, start], -1)) + (1 - theta) * ((1 - self.alpha) * g + self.alpha * start)
            h = self.drop(torch.relu(h))
            if self.memory is not None:
                h = h + before
        return torch.cat([x, h], -1)


class MMGCNBackbone(DialogueBackbone):
    """A linear map a modality (the language through a BiLSTM besides), speaker embeddings, the graph net, a classifier.

    features[m] [B, U, T, D_m]; h[m] [B, U, 200]; z [B, U, 300 M]; logits [B, U, K]. The classifier is dropout, ReLU and
    one linear map, as in the release. See `DialogueBackbone` for what is absent.
    """

    cross_weight = 1.0

    def __init__(self, config: MMGCNConfig | None = None):
        config = Maybe(Is("an MMGCNConfig", MMGCNConfig))("config", config) or MMGCNConfig()
        super().__init__(config.input_widths, config.speakers, config.encode_absent)
        self.config = config
        for name, input_width in config.input_widths.items():
            rnn = nn.LSTM if config.in_context(name) else None
            self.encoders[name] = Encoder(input_width, config.width, rnn, config.dropout, config.packed)
        self.width = config.width
        self._build_graph(config, False)

    def _build_graph(self, config: MMGCNConfig, reasoning: bool) -> None:
        some = any(config.with_speaker(name) for name in config.input_widths)
        self.speaker_embedding = nn.Embedding(config.speakers, config.width) if some else None
        self.graph_net = GCNII(
            config.width, config.hidden, config.layers, config.alpha, config.lamda, config.dropout, reasoning
        )
        self.decoder = self.make_decoder((config.width + config.hidden) * len(config.input_widths))

    @classmethod
    def for_data(cls, data: MultimodalDataset, preset: str = "balm", **options: Any) -> MMGCNBackbone:
        """The backbone that fits a data set's modalities, widths, speakers and outputs.

        preset : "balm" or "original" (64 layers, the speaker's embedding on the language alone), over the
            options of `MMGCNConfig`
        """
        OneOf(*PRESETS)("preset", preset)
        return cls(MMGCNConfig(**{**dialogue_options(data), **PRESETS[preset], **options}))

    def make_decoder(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(self.config.dropout), nn.ReLU(), nn.Linear(width, self.config.outputs))

    def encode_dialogue(self, name: str, x: Tensor, real: Tensor, batch: MultimodalBatch) -> Tensor:
        return self.encoders[name](x, real)

    def nodes(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        """The graph's nodes [B, M, U, d]: encodings and speaker embeddings, zeros in the padding."""
        real = real_utterances(batch)
        h = self.present_only(h, present, real)
        if self.speaker_embedding is not None:
            who = self.speaker_embedding(speaker_numbers(batch, self.speakers))
            h = {name: x + who if self.config.with_speaker(name) else x for name, x in h.items()}
        return torch.where(real[:, None, :, None], torch.stack(list(h.values()), 1), 0)

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        real, nodes = real_utterances(batch), self.nodes(h, present, batch)
        steps = used_steps(real)
        nodes = nodes[:, :, :steps]
        z = self.graph_net(nodes, dialogue_graph(nodes, real[:, :steps], self.cross_weight))
        z = z.transpose(1, 2).flatten(2)  # [B, steps, M (d + hidden)]
        return nn.functional.pad(z, (0, 0, 0, real.shape[1] - steps))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)
