"""DEAR: repair distributions, estimate how hard the repair was, trust accordingly.

Zou, Wei, Zhang: "DEAR: Distributional Error-Aware Reliability for Robust Multimodal Sentiment Analysis with Missing
Modalities", 2026. The file follows the paper's section 3: reconstruction under distributional constraints (HDCR, 3.2),
difficulty and reliability of each modality of each sample (SURE, 3.3), a synergistic and a robust stream with a gate
between them (SR-DS, 3.4), calibration and objective (3.5). There is no public code: where the paper leaves a choice,
`DEARConfig` has an option.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, Output
from ..checks import (
    RATE,
    SHAPES,
    Array,
    Either,
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
    from_reading,
    option,
)
from ..layers import MLP, SharesBatches, as_frames, frame_shapes, masked_mean, same_draw, scoring
from ..losses import mmd, sinkhorn, task_loss

__all__ = [
    "DEAR",
    "READINGS",
    "Assessed",
    "DEARConfig",
    "Diagnosis",
    "Encoded",
    "Reconstruction",
    "SummaryTokens",
    "SynergisticAttention",
    "TransformerLayer",
    "reliability_weights",
    "weight_entropy",
]

TEXT = ("language", "text")  # the names by which the query is found where none is given


@dataclass(frozen=True)
class DEARConfig:
    """Shapes of the data, sizes, loss weights, and each choice that the paper leaves."""

    # one sample of each modality: (T, D), (C, H, W), or (T,) token ids
    feature_shapes: Mapping[str, tuple[int, ...]] = option(MISSING, SHAPES)
    outputs: int = option(1, Whole(1))  # K: classes or labels, 1 for regression
    regression: bool = option(True, Flag())
    # width of the text encoder's tokens; None: what its config.hidden_size says
    text_width: int | None = option(None, Maybe(Whole(1)))

    width: int = option(128, Whole(1))  # d
    heads: int = option(8, Whole(1))
    head_width: int = option(64, Whole(1))
    hidden: int = option(128, Whole(1))  # of the MLPs: difficulty, gate, prediction heads
    dropout: float = option(0.0, RATE)
    freeze_text: bool = option(False, Flag())  # the text encoder stays as it is, in eval mode

    # 3.3, Eq. 5
    # Linear(LN(F)); "tokens": LNLN's, a Transformer whose learned tokens sum up a sequence
    encoder: str = option("projection", OneOf("projection", "tokens"))
    summary_tokens: int = option(8, Whole(1))
    token_layers: int = option(2, Whole(1))
    text_layers: int = option(0, Whole(0))  # further Transformer layers on the text's features

    # 3.2
    layers: int = option(2, Whole(1))
    # where X and its reconstruction live: Eq. 5's features, or the "raw" ones
    space: str = option("encoded", OneOf("encoded", "raw"))
    stop_complete: bool = option(True, Flag())  # no gradient through X
    # "mse": the paper's ablation "w/o HDCR"
    alignment: str = option("mmd", OneOf("mmd", "sinkhorn", "mse"))
    # what is aligned: a vector each sample, all "tokens", or "subsampled" tokens
    samples: str = option("mean", OneOf("mean", "tokens", "subsampled"))
    token_samples: int = option(256, Whole(1))  # with "subsampled", how many tokens of the batch
    bandwidths: tuple[float, ...] | None = option(None, Maybe(Several(Number(above=0), 1)))  # see losses.mmd
    epsilon: float = option(0.05, Number(above=0))  # see losses.sinkhorn
    iterations: int = option(50, Whole(1))
    # the joint term of Eq. 4; "literal": inside the sum over modalities, so M times
    joint_sum: str = option("once", OneOf("once", "literal"))

    # 3.3
    sure: bool = option(True, Flag())  # False: equal weights and no calibration (the paper's ablation "w/o SURE")
    norm: str = option("l2", OneOf("l2", "layer"))  # Norm in Eq. 6
    tau: float = option(1.0, Number(above=0))  # Eq. 8
    learn_tau: bool = option(False, Flag())  # tau, a parameter that starts there

    # 3.4
    # what the streams read: HDCR's output, or the "encoded" incomplete features
    stream_input: str = option("reconstructed", OneOf("reconstructed", "encoded"))
    # the modality that asks in Eq. 9; None: "language" or "text", else the first
    query: str | None = option(None, Maybe(Text))
    # the synergistic stream: Eq. 9, or "self" (Concat + SelfAttn), or "gated" (Gated Fusion)
    fusion: str = option("cross", OneOf("cross", "self", "gated"))
    # Eq. 9 as printed: K times w. "logbias": log w is added to the scores instead
    k_scale: str = option("key", OneOf("key", "logbias"))
    residual: bool = option(False, Flag())  # the query's own features are added to Eq. 9's output
    # "robust" (w/o SS), "synergistic" (w/o RS), "single" (w/o DS: a head on all features)
    streams: str = option("both", OneOf("both", "robust", "synergistic", "single"))

    # 3.5
    main: str = option("mse", OneOf("mse", "l1"))  # regression's L_main and L_aux; classes: cross-entropy
    # L_aux: the mean over the unimodal predictions, or over "all", the two streams with them
    aux: str = option("unimodal", OneOf("unimodal", "all"))
    error: str = option("mean", OneOf("mean", "sum"))  # e_m: mean over frames and features, or their "sum"
    error_grad: bool = option(False, Flag())  # Eq. 12's gradient also reaches the reconstruction
    error_scale: str = option("none", OneOf("none", "variance"))  # "variance": e_m over the variance of X_m
    lambda1: float = option(0.3, Number(0))
    lambda2: float = option(0.7, Number(0))
    alpha: float = option(0.8, Number(0))
    beta: float = option(0.3, Number(0))

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.feature_shapes) < 2:
            raise ValueError(
                f"feature_shapes: expected at least two modalities, between which reliability is weighed, got "
                f"{list(self.feature_shapes)}"
            )
        if self.regression and self.outputs != 1:
            raise ValueError(f"outputs: expected 1 for regression, got {self.outputs}")
        check_known("query", (self.query,) if self.query else (), self.feature_shapes)
        if self.space == "raw" and self.encoder == "tokens":
            raise ValueError("space: 'raw' features have a frame each, 'tokens' encoders do not; use 'projection'")
        if self.space == "raw" and self.samples != "mean":
            raise ValueError(f"samples: expected 'mean' for 'raw' features, whose widths differ, got {self.samples!r}")


READINGS: dict[str, dict[str, Any]] = {
    "paper": {},  # the equations as printed
    "table8": {"encoder": "tokens", "text_layers": 2},  # LNLN's encoders, with which Table 8's count is met
}


# --- blocks that follow LNLN ------------------------------------------------------------------------------------------


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward net, each behind layer normalisation: x [n, T, d], valid bool [n, T] -> x.

    As in LNLN, queries, keys and values have a normalisation each and no biases.
    """

    def __init__(self, width: int, heads: int, head_width: int, dropout: float = 0.0):
        super().__init__()
        for name, value in (("width", width), ("heads", heads), ("head_width", head_width)):
            Whole(1)(name, value)
        RATE("dropout", dropout)
        inner = heads * head_width
        self.heads, self.dropout = heads, dropout
        self.norm_q, self.norm_k, self.norm_v, self.norm = (nn.LayerNorm(width) for _ in range(4))
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.feed = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.q(self.norm_q(x))), split(self.k(self.norm_k(x))), split(self.v(self.norm_v(x)))
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=valid[:, None, None], dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm(x))


class Reconstruction(nn.Module):
    """HDCR's network for one modality: positions and Transformer layers, x [n, T, d], valid bool [n, T] -> [n, T, d].

    ``out`` : None, or the width of the raw features that it ends in; then the result is (hidden, raw).
    """

    def __init__(self, config: DEARConfig, frames: int, layers: int, out: int | None = None):
        super().__init__()
        Is("a DEARConfig", DEARConfig)("config", config)
        Whole(1)("frames", frames)
        Whole(0)("layers", layers)
        Maybe(Whole(1))("out", out)
        self.position = nn.Parameter(0.02 * torch.randn(frames, config.width))
        self.layers = nn.ModuleList(
            TransformerLayer(config.width, config.heads, config.head_width, config.dropout) for _ in range(layers)
        )
        self.raw = None if out is None else nn.Linear(config.width, out)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.position[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, valid)
        return x, x if self.raw is None else self.raw(x)


class SummaryTokens(nn.Module):
    """LNLN's encoder: learned tokens in front of the projected frames; x [n, T, D] -> those tokens, [n, 8, d]."""

    def __init__(self, config: DEARConfig, frames: int, source: int):
        super().__init__()
        Is("a DEARConfig", DEARConfig)("config", config)
        Whole(1)("frames", frames)
        self.project = nn.Linear(Whole(1)("source", source), config.width)
        self.tokens = nn.Parameter(torch.zeros(config.summary_tokens, config.width))
        self.transformer = Reconstruction(config, frames + config.summary_tokens, config.token_layers)
        nn.init.normal_(self.transformer.position)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        count = len(self.tokens)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), self.project(x)], 1)
        return self.transformer(x, F.pad(valid, (count, 0), value=True))[0][:, :count]


class _Deeper(nn.Module):
    """An encoder of Eq. 5 with Transformer layers behind it."""

    def __init__(self, first: nn.Module, rest: nn.Module, summary: bool):
        super().__init__()
        self.first, self.rest, self.summary = first, rest, summary

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        h = self.first(x, valid)
        return self.rest(h, valid.new_ones(h.shape[:2]) if self.summary else valid)[0]


class _Projection(nn.Module):
    """phi of Eq. 5: Linear(LN(F)). A frame of one value has nothing to be normalised and goes without."""

    def __init__(self, source: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(source) if source > 1 else nn.Identity()
        self.project = nn.Linear(source, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.project(self.norm(x))


# --- 3.3 Sample-level Uncertainty and Reliability Estimation ----------------------------------------------------------


def reliability_weights(difficulty: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    """The Monotonic Weighting Network, Eq. 8: softmax(-d / tau), [..., M] -> [..., M]; falls in a modality's own d."""
    return torch.softmax(-difficulty / tau, -1)


def weight_entropy(w: Tensor) -> Tensor:
    """H(w) = -sum w log w in nats, [..., M] -> [...], from 0 to log M.

    Its slope is infinite where w is 0, and softmax would make that NaN: a weight that has underflowed gives none.
    """
    tiny = torch.finfo(Array("float", "[..., M]")("w", w).dtype).tiny
    return torch.special.entr(torch.where(w < tiny, 1, w)).sum(-1)  # 1 has the entropy of 0


# --- 3.4 Synergistic-Robust Dual-Stream Fusion ------------------------------------------------------------------------


class SynergisticAttention(nn.Module):
    """Eq. 9: the query's frames attend to the others', whose keys and values are scaled by their reliability.

    h[m] [n, T_m, d], valid[m] bool [n, T_m], w[m] [n] -> [n, T_query, d]. A small w makes a key's score 0, not small:
    attention becomes flat, and only the value is suppressed. With k_scale "logbias", log w is added to the score.
    """

    def __init__(self, query: str, modalities: tuple[str, ...], config: DEARConfig):
        super().__init__()
        Is("a DEARConfig", DEARConfig)("config", config)
        OneOf(*Several(Text, 2)("modalities", modalities))("query", query)
        self.query, self.others = query, [m for m in modalities if m != query]
        self.by_bias = config.k_scale == "logbias"
        self.W_Q, self.W_K, self.W_V = (nn.Linear(config.width, config.width, bias=False) for _ in range(3))

    def forward(self, h: Mapping[str, Tensor], valid: Mapping[str, Tensor], w: Mapping[str, Tensor]) -> Tensor:
        q = self.W_Q(h[self.query])
        keys = [self.W_K(h[m]) if self.by_bias else w[m][:, None, None] * self.W_K(h[m]) for m in self.others]
        values = torch.cat([w[m][:, None, None] * self.W_V(h[m]) for m in self.others], 1)
        scores = q @ torch.cat(keys, 1).transpose(1, 2) / math.sqrt(q.shape[-1])
        if self.by_bias:
            bias = [
                w[m].clamp_min(torch.finfo(w[m].dtype).tiny).log()[:, None].expand(h[m].shape[:2]) for m in self.others
            ]
            scores = scores + torch.cat(bias, 1)[:, None]
        off = ~torch.cat([valid[m] for m in self.others], 1)[:, None]
        return torch.softmax(scores.masked_fill(off, -torch.inf), -1) @ values


class _SelfAttention(nn.Module):
    """Table 14's Concat + SelfAttn in our reading: all frames in a row attend to one another; weights play no part."""

    def __init__(self, modalities: tuple[str, ...], config: DEARConfig):
        super().__init__()
        self.modalities = modalities
        self.layer = TransformerLayer(config.width, config.heads, config.head_width, config.dropout)

    def forward(self, h: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> Tensor:
        frames = torch.cat([valid[m] for m in self.modalities], 1)
        return masked_mean(self.layer(torch.cat([h[m] for m in self.modalities], 1), frames), frames)


class _GatedFusion(nn.Module):
    """Table 14's Gated Fusion in our reading: sum_m sigmoid(U_m [p_1; ...; p_M]) * tanh(V_m p_m), pooled p_m [n, d]."""

    def __init__(self, modalities: tuple[str, ...], config: DEARConfig):
        super().__init__()
        d = config.width
        self.gate = nn.ModuleDict({m: nn.Linear(len(modalities) * d, d) for m in modalities})
        self.value = nn.ModuleDict({m: nn.Linear(d, d) for m in modalities})

    def forward(self, pooled: Mapping[str, Tensor]) -> Tensor:
        everything = torch.cat(list(pooled.values()), -1)
        return torch.stack(
            [torch.sigmoid(self.gate[m](everything)) * torch.tanh(self.value[m](p)) for m, p in pooled.items()]
        ).sum(0)


# --- the model --------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Eq. 5: features h[m] [B, T_m, d], their frames valid[m] [B, T_m], and what they come from, raw[m] [B, T_m, D]."""

    h: dict[str, Tensor]
    valid: dict[str, Tensor]
    raw: dict[str, Tensor]


class Assessed(NamedTuple):
    """What SURE and the streams say of a batch."""

    prediction: Tensor  # [B, K]
    synergistic: Tensor | None  # [B, K]
    robust: Tensor  # [B, K]
    unimodal: Tensor  # [B, M, K]
    difficulty: Tensor | None  # d [B, M]; None without SURE
    weights: Tensor  # w [B, M]
    entropy: Tensor  # H(w) [B]
    gate: Tensor  # g [B]: 1 is the synergistic stream alone


class Diagnosis(NamedTuple):
    """What DEAR thinks of each sample, and how it did; everything on the CPU."""

    prediction: Tensor  # [n, K]
    synergistic: Tensor | None  # [n, K]; None with streams "robust"
    robust: Tensor  # [n, K]
    unimodal: Tensor  # [n, M, K]
    difficulty: Tensor | None  # [n, M]
    weights: Tensor  # [n, M]
    entropy: Tensor  # [n]
    gate: Tensor  # [n]
    error: Tensor | None  # e_m [n, M], NaN where the modality is missing by nature; None where nothing says what was
    original: dict[str, Tensor]  # per modality the mean of X_m over its frames [n, d]; {} where nothing says what was
    reconstructed: dict[str, Tensor]  # the same of the reconstruction


class DEAR(SharesBatches, nn.Module):
    """The whole model: HDCR, SURE and SR-DS (Eqs. 1-13).

    text_encoder : for a modality of token ids, a module that takes ``input_ids`` and ``attention_mask`` [B, T] and
        gives ``last_hidden_state`` (or is) [B, T, D], such as `data.text.load_encoder` reads; fine-tuned, unless
        ``freeze_text``. Dropped tokens are the data set's fill, [UNK], and stay attended to
    reading : "paper", or "table8" (`READINGS`)
    options : fields of `DEARConfig`, over those of the reading; feature_shapes are needed. `for_data` takes them, and
        what is to be predicted, from a data set

    ``forward(batch)`` gives logits [B, K] and, in training, the losses "task", "aux", "unimodal", "joint" and
    "calibration", each with its weight. It reads features and ``valid``; what was dropped is read from
    ``batch.complete`` in training alone (without it nothing was), and ``present`` and ``observed`` of that alone: what
    is missing by nature has no original to align with. A distance between fewer than two such samples is 0 and counted
    in ``skipped``, which the training history shows.

    Raises ValueError for other modalities, shapes or targets than those it was made for, ids outside the vocabulary,
    texts longer than the encoder reads and, in eval mode, features that are not finite.
    """

    needs_complete = True
    skipped: Tensor
    variance: Tensor

    def __init__(self, text_encoder: nn.Module | None = None, *, reading: str = "paper", **options: Any):
        super().__init__()
        Maybe(Is("an nn.Module", nn.Module))("text_encoder", text_encoder)
        self.config = config = from_reading(DEARConfig, READINGS, reading, options)
        self.modalities = names = tuple(config.feature_shapes)
        self.tokens = [m for m, shape in config.feature_shapes.items() if len(shape) == 1]
        self.query = config.query or next((m for m in TEXT if m in names), names[0])
        self.text_encoder = self._checked(text_encoder)
        self.shapes = {m: self._frames(m) for m in names}
        M, d = len(names), config.width

        # 3.3, Eq. 5
        self.encoder = nn.ModuleDict({m: self._encoder(m) for m in names})
        # 3.2
        self.hdcr = nn.ModuleDict(
            {
                m: Reconstruction(
                    config,
                    config.summary_tokens if config.encoder == "tokens" else frames,
                    config.layers,
                    source if config.space == "raw" else None,
                )
                for m, (frames, source) in self.shapes.items()
            }
        )
        # 3.3
        if config.sure:
            self.difficulty = MLP([M * d, config.hidden, M], config.dropout)  # the Transfer Difficulty Estimator
        self.log_tau = nn.Parameter(torch.tensor(math.log(config.tau))) if config.sure and config.learn_tau else None
        # 3.4
        head = lambda width: MLP([width, config.hidden, config.outputs], config.dropout)
        self.unimodal = nn.ModuleDict({m: head(d) for m in names})
        if config.streams == "single":
            self.single = head(M * d)
        elif config.streams != "robust":
            self.fusion: nn.Module
            if config.fusion == "cross":
                self.fusion = SynergisticAttention(self.query, names, config)
            else:
                self.fusion = (_SelfAttention if config.fusion == "self" else _GatedFusion)(names, config)
            self.synergistic = head(d)
        if config.streams == "both":
            self.gate = MLP([d + M + 1, config.hidden, 1], config.dropout)
        self.register_buffer("skipped", torch.zeros(M + 1, dtype=torch.int64), persistent=False)
        if config.error_scale == "variance":
            self.register_buffer("variance", torch.ones(M))  # of X_m, a running mean over training steps

    @classmethod
    def for_data(cls, data: MultimodalDataset, text_encoder: nn.Module | None = None, **options: Any) -> DEAR:
        """The model that fits a data set's shapes and targets; its token ids are checked against the vocabulary."""
        fitting = {
            "feature_shapes": DATASET("data", data).feature_shapes,
            "outputs": data.info.get("outputs", 1),
            "regression": data.info.get("task", "regression") == "regression",
        }
        model = cls(text_encoder, **{**fitting, **options})
        model._check_batch(data.data)
        model._check_ids(data.data)
        return model

    def _checked(self, encoder: nn.Module | None) -> nn.Module | None:
        """The text encoder, frozen where that is asked for, its limits known."""
        if bool(self.tokens) != (encoder is not None):
            raise ValueError(
                f"text_encoder: expected one for the token ids in {self.tokens}, got none"
                if self.tokens
                else f"text_encoder: none of {list(self.modalities)} has token ids, of shape (T,), that it could read"
            )
        about = getattr(encoder, "config", None)
        self.vocabulary: int | None = getattr(about, "vocab_size", None)
        self.longest: int | None = getattr(about, "max_position_embeddings", None)
        self.text_width: int | None = self.config.text_width or getattr(about, "hidden_size", None)
        if encoder is not None and self.text_width is None:
            raise ValueError("text_width: the text encoder's config says no hidden_size; pass the width of its tokens")
        if encoder is not None and self.config.freeze_text:
            encoder.requires_grad_(False).eval()
        return encoder

    def _frames(self, m: str) -> tuple[int, int]:
        """(T, D) of a modality as its encoder of Eq. 5 reads it."""
        shape = self.config.feature_shapes[m]
        if m not in self.tokens:
            return frame_shapes({m: shape})[m]
        if self.longest is not None and shape[0] > self.longest:
            raise ValueError(
                f"features[{m!r}]: expected at most {self.longest} tokens, which the text encoder reads, got {shape[0]}"
            )
        assert self.text_width is not None
        return shape[0], self.text_width

    def _encoder(self, m: str) -> nn.Module:
        config, (frames, source) = self.config, self.shapes[m]
        if config.encoder == "tokens":
            first: nn.Module = SummaryTokens(config, frames, source)
            frames = config.summary_tokens
        else:
            first = _Projection(source, config.width)
        if m != self.query or not config.text_layers:
            return first
        return _Deeper(first, Reconstruction(config, frames, config.text_layers), config.encoder == "tokens")

    def train(self, mode: bool = True) -> DEAR:
        """As usual, but a frozen text encoder stays in eval mode."""
        super().train(mode)
        if self.text_encoder is not None and self.config.freeze_text:
            self.text_encoder.eval()
        return self

    def forward(self, batch: MultimodalBatch) -> Output:
        self._check_batch(batch)
        if not self.training or batch.device.type == "cpu":  # elsewhere the answer would have to be waited for
            self._check_ids(batch)
        encoded = self.encode(batch)
        repaired = self.reconstruct(encoded)
        found = self._assess(encoded, repaired)
        if not self.training:
            _check_finite(found.prediction)
        if not self.training or batch.target is None:
            return Output(found.prediction, {})
        return Output(found.prediction, self._losses(batch, encoded, repaired, found))

    # --- 3.3.1 ---

    def encode(self, batch: MultimodalBatch) -> Encoded:
        """Eq. 5. A sequence without a valid frame is read as zeros of full length, so no attention is without a key."""
        h, valid, raw = {}, {}, {}
        for m, values in batch.features.items():
            seen = batch.valid[m]
            if m in self.tokens:
                frames = self._read(torch.where(seen, values, 0), seen | ~seen.any(-1, keepdim=True))
            else:
                frames = as_frames(values)
            raw[m] = torch.where(seen[..., None], frames, 0).to(next(self.encoder[m].parameters()).dtype)
            seen = seen | ~seen.any(-1, keepdim=True)
            h[m] = self.encoder[m](raw[m], seen)
            valid[m] = seen.new_ones(h[m].shape[:2]) if self.config.encoder == "tokens" else seen
        return Encoded(h, valid, raw)

    def _read(self, ids: Tensor, attended: Tensor) -> Tensor:
        assert self.text_encoder is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_text):
            out = self.text_encoder(input_ids=ids, attention_mask=attended.long())
        out = getattr(out, "last_hidden_state", out)
        if tuple(out.shape) != (*ids.shape, self.text_width):
            raise ValueError(
                f"text_encoder: expected tokens {(*ids.shape, self.text_width)}, got {tuple(out.shape)}; see text_width"
            )
        return out

    # --- 3.2 Hierarchical Distribution Constraint Reconstruction ---

    def reconstruct(self, encoded: Encoded) -> dict[str, tuple[Tensor, Tensor]]:
        """Per modality HDCR's output: what the streams read [B, T, d], and the reconstruction in the chosen space."""
        return {m: self.hdcr[m](encoded.h[m], encoded.valid[m]) for m in self.modalities}

    def _original(self, batch: MultimodalBatch, encoded: Encoded) -> tuple[Encoded, Tensor, dict[str, Tensor]]:
        """X: the complete samples through the same encoders; which samples [B, M] and frames [B, T] it speaks for."""
        complete = batch.complete
        if complete is None:
            known, whole = batch, encoded
        else:
            self._check_batch(complete)
            if complete.device.type == "cpu":
                self._check_ids(complete)
            known = complete
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.stop_complete):
                whole = self.encode(complete)
        rows = known.present & torch.stack([known.valid[m].any(-1) for m in self.modalities], -1)
        # What a token sums up is there where the sample is; else the frames that are there by nature.
        frames = whole.valid if self.config.encoder == "tokens" else known.observed
        return whole, rows, frames

    def _target(self, whole: Encoded) -> dict[str, Tensor]:
        x = whole.raw if self.config.space == "raw" else whole.h
        return {m: v.detach() if self.config.stop_complete else v for m, v in x.items()}

    def _align(
        self, x: dict[str, Tensor], y: dict[str, Tensor], rows: Tensor, frames: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """L_uni (summed over modalities, Eq. 2) and L_joint (Eq. 3), each with its weight of Eq. 4."""
        config, M = self.config, len(self.modalities)
        every = rows.all(-1)
        losses = {}
        if config.lambda1:
            each = [self._distance([m], x, y, rows[:, i], frames, i) for i, m in enumerate(self.modalities)]
            losses["unimodal"] = config.lambda1 * torch.stack(each).sum()
        if config.lambda2:
            joint = self._distance(list(self.modalities), x, y, every, frames, M)
            losses["joint"] = config.lambda2 * (M if config.joint_sum == "literal" else 1) * joint
        return losses

    def _distance(
        self,
        names: list[str],
        x: Mapping[str, Tensor],
        y: Mapping[str, Tensor],
        rows: Tensor,
        frames: Mapping[str, Tensor],
        place: int,
    ) -> Tensor:
        """Between the originals and the reconstructions of the samples ``rows`` bool [B] in some modalities."""
        config = self.config
        kept = {m: frames[m] & rows[:, None] for m in names}
        if config.alignment == "mse":
            total = torch.stack([((x[m] - y[m]).square().mean(-1) * kept[m]).sum() * x[m].shape[-1] for m in names])
            count = torch.stack([kept[m].sum() * x[m].shape[-1] for m in names]).sum()
            self._note(place, count > 0)
            return total.sum() / count.clamp_min(1)
        if config.samples == "mean":  # one vector a sample, the modalities side by side
            p, q = (torch.cat([masked_mean(v[m], frames[m]) for m in names], -1) for v in (x, y))
            weight = rows
        else:  # the tokens of all samples, the modalities one after another
            p, q = (torch.cat([v[m].flatten(0, 1) for m in names]) for v in (x, y))
            weight = torch.cat([kept[m].flatten() for m in names])
            if config.samples == "subsampled" and config.token_samples < len(p):
                chosen = (same_draw(torch.rand(len(p), device=p.device)) + weight).topk(config.token_samples).indices
                p, q, weight = p[chosen], q[chosen], weight[chosen]
        enough = weight.sum() > 1
        self._note(place, enough)
        weight = weight & enough
        if config.alignment == "mmd":
            return mmd(p, q, config.bandwidths, x_weight=weight, y_weight=weight)
        return sinkhorn(p, q, config.epsilon, config.iterations, x_weight=weight, y_weight=weight)

    def _note(self, place: int, enough: Tensor) -> None:
        with torch.no_grad():
            self.skipped[place] += ~enough

    # --- 3.3 and 3.4 ---

    def tau(self) -> Tensor | float:
        """The temperature of Eq. 8."""
        return self.config.tau if self.log_tau is None else self.log_tau.exp()

    def _assess(self, encoded: Encoded, repaired: Mapping[str, tuple[Tensor, Tensor]]) -> Assessed:
        config, names, valid = self.config, self.modalities, encoded.valid
        seen = {m: masked_mean(encoded.h[m], valid[m]) for m in names}
        d, z = None, None
        if config.sure:
            z = [
                F.normalize(p, dim=-1) if config.norm == "l2" else F.layer_norm(p, p.shape[-1:]) for p in seen.values()
            ]
            d = F.softplus(self.difficulty(torch.cat(z, -1)))  # Eqs. 6-7
            w = reliability_weights(_full(d), self.tau())  # Eq. 8
        else:
            w = seen[self.query].new_full((len(seen[self.query]), len(names)), 1 / len(names))
            w = _full(w)
        entropy = weight_entropy(w)

        h = {m: repaired[m][0] for m in names} if config.stream_input == "reconstructed" else encoded.h
        pooled = {m: masked_mean(h[m], valid[m]) for m in names}
        unimodal = torch.stack([self.unimodal[m](pooled[m]) for m in names], 1)  # [B, M, K]
        robust = (w[..., None] * unimodal).sum(1)  # Eq. 10
        if config.streams == "robust":
            return Assessed(robust, None, robust, unimodal, d, w, entropy, torch.zeros_like(entropy))
        if config.streams == "single":
            together = self.single(torch.cat(list(pooled.values()), -1))
        else:
            together = self.synergistic(self._fuse(h, pooled, valid, w))
        if config.streams != "both":
            return Assessed(together, together, robust, unimodal, d, w, entropy, torch.ones_like(entropy))
        told = torch.zeros_like(w) if d is None else d
        g = torch.sigmoid(self.gate(torch.cat([seen[self.query], told.to(w), entropy[:, None]], -1)))  # Eq. 11
        return Assessed(g * together + (1 - g) * robust, together, robust, unimodal, d, w, entropy, g[:, 0])

    def _fuse(
        self, h: Mapping[str, Tensor], pooled: Mapping[str, Tensor], valid: Mapping[str, Tensor], w: Tensor
    ) -> Tensor:
        """What the synergistic stream's head reads, [B, d]."""
        if self.config.fusion == "gated":
            return self.fusion(pooled)
        if self.config.fusion == "self":
            return self.fusion(h, valid)
        attended = self.fusion(h, valid, dict(zip(self.modalities, w.unbind(-1), strict=True)))
        if self.config.residual:
            attended = attended + h[self.query]
        return masked_mean(attended, valid[self.query])

    # --- 3.5 Self-supervised Calibration and Task Objectives ---

    def _losses(
        self,
        batch: MultimodalBatch,
        encoded: Encoded,
        repaired: Mapping[str, tuple[Tensor, Tensor]],
        found: Assessed,
    ) -> dict[str, Tensor]:
        """Eq. 13, term by term."""
        config, y = self.config, batch.target
        assert y is not None
        self._check_target(y)
        losses = {"task": self._task(found.prediction, y)}
        if config.alpha:
            each = list(found.unimodal.unbind(1))
            if config.aux == "all":
                each += [found.robust] if found.synergistic is None else [found.synergistic, found.robust]
            losses["aux"] = config.alpha * torch.stack([self._task(one, y) for one in each]).mean()
        if not (config.lambda1 or config.lambda2 or (config.beta and found.difficulty is not None)):
            return losses
        whole, rows, frames = self._original(batch, encoded)
        x, x_hat = self._target(whole), {m: repaired[m][1] for m in self.modalities}
        shared = self.shared(batch)
        every = lambda values: {m: shared.rows(v) for m, v in values.items()}
        all_x, all_rows, all_frames = every(x), shared.rows(rows), every(frames)  # of all processes
        losses.update(self._align(all_x, every(x_hat), all_rows, all_frames))
        if config.beta and found.difficulty is not None:
            error = self._error(x, x_hat, frames)
            if config.error_scale == "variance":
                error = error / self._variances(all_x, all_rows, all_frames)
            error = error if config.error_grad else error.detach()
            missed = torch.where(rows, error - found.difficulty, 0).square()  # Eq. 12
            losses["calibration"] = config.beta * missed.sum() / shared.count(rows.sum())
        return losses

    def _task(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.config.regression and self.config.main == "mse":
            return (logits[..., 0] - y).square().mean()
        return task_loss(logits, y, lead=1)  # L1 for scores, cross-entropy else (binary for bool labels)

    def _error(self, x: Mapping[str, Tensor], x_hat: Mapping[str, Tensor], frames: Mapping[str, Tensor]) -> Tensor:
        """e_m = |X_m - its reconstruction|^2 of each sample, [B, M]."""
        errors = []
        for m in self.modalities:
            squared = (_full(x[m]) - _full(x_hat[m])).square()
            if self.config.error == "mean":
                errors.append(masked_mean(squared, frames[m]).mean(-1))
            else:
                errors.append((squared.sum(-1) * frames[m]).sum(-1))
        return torch.stack(errors, -1)

    @torch.no_grad()
    def _variances(self, x: Mapping[str, Tensor], rows: Tensor, frames: Mapping[str, Tensor]) -> Tensor:
        """Of X_m about its mean frame, per feature, [M]; where the batch has none, what is known so far."""
        found = []
        for i, m in enumerate(self.modalities):
            kept = (frames[m] & rows[:, i, None]).flatten()
            values = _full(x[m]).flatten(0, 1)
            centred = values - masked_mean(values, kept)
            found.append(masked_mean(centred.square(), kept).mean())
        now = torch.stack(found)
        now = torch.where(now > 0, now, self.variance)
        self.variance.lerp_(now.to(self.variance), 0.1)
        return now

    # --- looking at it ---

    def diagnose(self, data: MultimodalDataset | MultimodalBatch, batch_size: int = 256) -> Diagnosis:
        """Predictions, difficulty, weights, gate and errors of every sample, in eval mode and without gradients.

        Errors and originals need what was there before: apply the mask with ``keep_complete=True``. With error_scale
        "variance" the errors are in units of the variance seen in training.
        """
        Either(DATASET, BATCH)("data", data)
        Whole(1)("batch_size", batch_size)
        parts: list[Diagnosis] = []
        device = next(self.encoder.parameters()).device
        with scoring(self):
            for part in _parts(data, batch_size):
                batch = part.to(device)
                self._check_batch(batch)
                self._check_ids(batch)
                encoded = self.encode(batch)
                repaired = self.reconstruct(encoded)
                found = self._assess(encoded, repaired)
                _check_finite(found.prediction)
                error, original, rebuilt = None, {}, {}
                if batch.complete is not None:
                    whole, rows, frames = self._original(batch, encoded)
                    x, x_hat = self._target(whole), {m: repaired[m][1] for m in self.modalities}
                    error = torch.where(rows, self._error(x, x_hat, frames), torch.nan)
                    if self.config.error_scale == "variance":
                        error = error / self.variance
                    original = {m: masked_mean(x[m], frames[m]) for m in self.modalities}
                    rebuilt = {m: masked_mean(x_hat[m], frames[m]) for m in self.modalities}
                parts.append(Diagnosis(*found, error, original, rebuilt))
        return Diagnosis(*(_joined(column) for column in zip(*parts, strict=True)))

    # --- the loop's events ---

    def on_epoch_start(self, state: Any) -> None:
        """The whole split's ids once, since looking at a batch on a GPU would mean to wait for it."""
        data: MultimodalDataset = state.train
        self._check_batch(data.data)
        self._check_ids(data.data)
        if data.data.complete is not None:
            self._check_ids(data.data.complete)
        self.skipped.zero_()

    def on_epoch_end(self, state: Any) -> None:
        """Into the history: how many steps had too few originals for a distance."""
        for name, count in zip((*self.modalities, "joint"), self.skipped.tolist(), strict=True):
            if count:
                state.history.epochs[-1][f"skipped_{name}"] = count

    # --- what may be wrong ---

    def _check_batch(self, batch: MultimodalBatch) -> None:
        if BATCH("batch", batch).modalities != self.modalities:
            raise ValueError(f"batch: expected the modalities {list(self.modalities)}, got {list(batch.modalities)}")
        if len(batch.shape) != 1:
            raise ValueError(f"batch: expected samples [B], got the leading shape {batch.shape}")
        for m, x in batch.features.items():
            frames, width = self.shapes[m]
            expected = self.config.feature_shapes[m]
            if m in self.tokens:
                right = not x.is_floating_point() and x.shape[1] <= frames
            else:
                got = frame_shapes({m: tuple(x.shape[1:])})[m] if x.is_floating_point() else (0, 0)
                right = got[1] == width and got[0] <= frames
            if not right:
                raise ValueError(
                    f"features[{m!r}]: expected {'token ids' if m in self.tokens else 'float samples'} of shape "
                    f"{tuple(expected)}, or fewer frames, got {x.dtype} {tuple(x.shape[1:])}"
                )

    def _check_ids(self, batch: MultimodalBatch) -> None:
        for m in self.tokens:
            ids = batch.features[m]
            if self.vocabulary is not None and ids.numel() and not ids.is_meta:  # a streamed data set has none yet
                low, high = int(ids.min()), int(ids.max())
                if low < 0 or high >= self.vocabulary:
                    raise ValueError(
                        f"features[{m!r}]: expected ids in [0, {self.vocabulary}), the text encoder's vocabulary, got "
                        f"values from {low} to {high}"
                    )

    def _check_target(self, y: Tensor) -> None:
        regression, labels = self.config.regression, y.dtype == torch.bool
        if y.is_floating_point() != regression or y.ndim != 1 + labels:
            expected = "float scores [B]" if regression else "int64 classes [B] or bool labels [B, K]"
            raise ValueError(f"target: expected {expected}, got {y.dtype} {tuple(y.shape)}")


def _check_finite(prediction: Tensor) -> None:
    if not bool((finite := torch.isfinite(prediction).all(-1)).all()):
        rows = (~finite).nonzero()[:, 0].tolist()
        raise ValueError(
            f"features: expected finite values; the predictions of {len(rows)} samples are NaN or infinite, the first "
            f"at {rows[:5]}"
        )


def _full(x: Tensor) -> Tensor:
    """At least float32, whatever the autocast made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _joined(column: tuple[Any, ...]) -> Any:
    """The parts of one field, batch by batch, as one on the CPU."""
    if isinstance(column[0], dict):
        return {m: _joined(tuple(part[m] for part in column)) for m in column[0]}
    return None if column[0] is None else torch.cat(column).cpu()


def _parts(data: MultimodalDataset | MultimodalBatch, size: int) -> Iterator[MultimodalBatch]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
