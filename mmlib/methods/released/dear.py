"""DEAR in other interpretations: what its paper leaves open, decided otherwise, an option each. It has no release."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...batch import MultimodalBatch, Output
from ...checks import RATE, Flag, Is, OneOf, Several, Text, Whole, option
from ...layers import TransformerLayer, full, kept_modalities, masked_mean, same_draw
from ...losses import task_loss
from ..dear import (
    DEAR,
    Compared,
    DEARConfig,
    Diagnosis,
    Encoded,
    Projection,
    Reconstruction,
    SynergisticAttention,
    Tensors,
    reliability_weights,
)

__all__ = [
    "GatedFusion",
    "LogBiasAttention",
    "OtherDEAR",
    "OtherDEARConfig",
    "RawReconstruction",
    "SelfAttention",
    "SummaryTokens",
]

TOKENS, TOKEN_LAYERS = 8, 2  # LNLN's


@dataclass(frozen=True)
class OtherDEARConfig(DEARConfig):
    """The choices that the paper leaves; the first of each is that of `DEAR`."""

    # Eq. 5's encoders; "tokens": LNLN's, a Transformer whose learned tokens sum up a sequence
    encoder: str = option("projection", OneOf("projection", "tokens"))
    text_layers: int = option(2, Whole(0))  # further Transformer layers on the text's tokens
    normed: str = option("others", OneOf("others", "all", "none"))  # whose frames Eq. 5 normalises: all but the text's
    # the probability with which training drops each modality that is there, as `JointTraining` does; X is what it was
    modality_dropout: float = option(0.0, RATE)
    # 3.2: a Transformer for "each" modality, or one "joint" over the frames of all
    hdcr: str = option("each", OneOf("each", "joint"))
    alignment: str = option("mmd", OneOf("mmd", "sinkhorn", "mse"))  # "mse": the paper's ablation "w/o HDCR"
    # where X and its reconstruction are compared: Eq. 5's features, or the "raw" ones
    space: str = option("encoded", OneOf("encoded", "raw"))
    # what is aligned: a vector each sample, or as many "subsampled" tokens of the batch
    samples: str = option("mean", OneOf("mean", "subsampled"))
    token_samples: int = option(256, Whole(1))
    # the joint term of Eq. 4; "literal": inside the sum over modalities, so M times
    joint_sum: str = option("once", OneOf("once", "literal"))
    # 3.3
    norm: str = option("l2", OneOf("l2", "layer"))  # Norm in Eq. 6
    detach_descriptors: bool = option(False, Flag())  # Eq. 7's gradient stops at z: the difficulty shapes no features
    learn_tau: bool = option(False, Flag())  # tau, a parameter that starts where it is said
    # 3.4: what the streams read, HDCR's output, or the "encoded" incomplete features
    stream_input: str = option("reconstructed", OneOf("reconstructed", "encoded"))
    # the synergistic stream: Eq. 9, or Table 14's Concat + SelfAttn ("self") and Gated Fusion
    fusion: str = option("cross", OneOf("cross", "self", "gated"))
    k_scale: str = option("key", OneOf("key", "logbias"))  # Eq. 9: K times w, or log w added to the scores
    # the query's own features are added to Eq. 9's output, which as printed has none of the text's values
    residual: bool = option(False, Flag())
    # 3.5
    main: str = option("mse", OneOf("mse", "l1"))  # regression's L_main and L_aux
    # L_aux: the mean over the unimodal predictions, or over "all", the two streams with them
    aux: str = option("unimodal", OneOf("unimodal", "all"))
    # e_m: the squared norm of a frame (a token), mean over frames; a "mean" over features too; a "sum" over both
    error: str = option("token_norm", OneOf("token_norm", "mean", "sum"))
    error_grad: bool = option(False, Flag())  # Eq. 12's gradient also reaches the reconstruction
    error_scale: str = option("none", OneOf("none", "variance"))  # "variance": e_m over the variance of X_m

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space == "raw" and self.encoder == "tokens":
            raise ValueError("space: 'raw' features have a frame each, 'tokens' encoders do not; use 'projection'")
        if self.space == "raw" and self.samples != "mean":
            raise ValueError(f"samples: expected 'mean' for 'raw' features, whose widths differ, got {self.samples!r}")


class SummaryTokens(Projection):
    """LNLN's encoder: learned tokens in front of the projected frames; x [n, T, D] -> those tokens, [n, 8, d]."""

    def __init__(self, config: DEARConfig, frames: int, source: int, norm: bool = False):
        Is("a DEARConfig", DEARConfig)("config", config)
        super().__init__(source, config.width, norm)
        self.tokens = nn.Parameter(torch.zeros(TOKENS, config.width))
        self.transformer = Reconstruction(config, Whole(1)("frames", frames) + TOKENS, TOKEN_LAYERS)
        nn.init.normal_(self.transformer.position)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = torch.cat([self.tokens.expand(len(x), -1, -1), super().forward(x, valid)], 1)
        return self.transformer(x, F.pad(valid, (TOKENS, 0), value=True))[:, :TOKENS]


class _Deeper(nn.Module):
    """The text's `SummaryTokens` with Transformer layers behind it."""

    def __init__(self, first: nn.Module, config: DEARConfig, layers: int):
        super().__init__()
        self.first, self.rest = first, Reconstruction(config, TOKENS, layers)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        h = self.first(x, valid)
        return self.rest(h, valid.new_ones(h.shape[:2]))


class RawReconstruction(Reconstruction):
    """HDCR's network with a map ``raw`` from its output [n, T, d] to the modality's own width [n, T, out]."""

    def __init__(self, config: DEARConfig, frames: int, layers: int, out: int):
        super().__init__(config, frames, layers)
        self.raw = nn.Linear(config.width, Whole(1)("out", out))


class LogBiasAttention(SynergisticAttention):
    """Eq. 9 with log w added to the scores in place of keys times w, so that w = 0 gets no attention."""

    def forward(self, h: Tensors, valid: Tensors, w: Tensors) -> Tensor:
        q = self.W_Q(h[self.query])
        keys = torch.cat([self.W_K(h[m]) for m in self.others], 1)
        values = torch.cat([w[m][:, None, None] * self.W_V(h[m]) for m in self.others], 1)
        scores = q @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
        bias = [w[m].clamp_min(torch.finfo(w[m].dtype).tiny).log()[:, None].expand(h[m].shape[:2]) for m in self.others]
        scores = scores + torch.cat(bias, 1)[:, None]
        off = ~torch.cat([valid[m] for m in self.others], 1)[:, None]
        return torch.softmax(scores.masked_fill(off, -torch.inf), -1) @ values


class SelfAttention(nn.Module):
    """Our interpretation of Table 14's Concat + SelfAttn: all frames in a row attend to one another; no weights."""

    def __init__(self, config: DEARConfig):
        super().__init__()
        Is("a DEARConfig", DEARConfig)("config", config)
        self.layer = TransformerLayer(config.width, config.heads, config.head_width, config.dropout)

    def forward(self, h: Tensors, valid: Tensors) -> Tensor:
        frames = torch.cat(list(valid.values()), 1)
        return masked_mean(self.layer(torch.cat([h[m] for m in valid], 1), frames), frames)


class GatedFusion(nn.Module):
    """Our interpretation of Table 14's Gated Fusion: sum_m sigmoid(U_m [p_1; ...; p_M]) * tanh(V_m p_m), p_m [n, d]."""

    def __init__(self, modalities: tuple[str, ...], width: int):
        super().__init__()
        Several(Text, 2)("modalities", modalities)
        Whole(1)("width", width)
        self.gate = nn.ModuleDict({m: nn.Linear(len(modalities) * width, width) for m in modalities})
        self.value = nn.ModuleDict({m: nn.Linear(width, width) for m in modalities})

    def forward(self, pooled: Tensors) -> Tensor:
        everything = torch.cat(list(pooled.values()), -1)
        return torch.stack(
            [torch.sigmoid(self.gate[m](everything)) * torch.tanh(self.value[m](p)) for m, p in pooled.items()]
        ).sum(0)


# LNLN's encoders, with which the parameters of Table 8 are met
class OtherDEAR(DEAR, config=OtherDEARConfig, presets={"table8": {"encoder": "tokens", "normed": "none"}}):
    """DEAR with the options of `OtherDEARConfig`; with "variance", errors are in units of that seen in training."""

    config: OtherDEARConfig
    variance: Tensor

    def __init__(self, text_encoder: nn.Module | None = None, *, preset: str = "paper", **options: Any):
        super().__init__(text_encoder, preset=preset, **options)
        if self.config.hdcr == "joint":
            self.across = Reconstruction(self.config, 1, self.config.layers).layers
        tau = self.config.tau
        learned = self.config.sure and self.config.learn_tau
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau))) if learned else None
        if self.config.joint_sum == "literal":
            self.joint_terms = len(self.modalities)
        if self.config.error_scale == "variance":
            self.register_buffer("variance", torch.ones(len(self.modalities)))  # a running mean over training steps

    def make_encoder(self, m: str) -> nn.Module:
        config, (frames, source) = self.config, self.shapes[m]
        norm = config.normed == "all" or (config.normed == "others" and m != self.text)
        if config.encoder == "projection":
            return Projection(source, config.width, norm)
        first = SummaryTokens(config, frames, source, norm)
        deeper = config.text_layers and m == (self.text or self.query)
        return _Deeper(first, config, config.text_layers) if deeper else first

    def make_hdcr(self, m: str) -> nn.Module:
        config, (frames, source) = self.config, self.shapes[m]
        layers = config.layers if config.hdcr == "each" else 0  # then its own are the positions alone
        if config.space == "raw":
            return RawReconstruction(config, frames, layers, source)
        return Reconstruction(config, TOKENS if config.encoder == "tokens" else frames, layers)

    def make_fusion(self) -> nn.Module:
        if self.config.fusion == "self":
            return SelfAttention(self.config)
        if self.config.fusion == "gated":
            return GatedFusion(self.modalities, self.config.width)
        kind = LogBiasAttention if self.config.k_scale == "logbias" else SynergisticAttention
        return kind(self.query, self.modalities, self.config.width)

    def forward(self, batch: MultimodalBatch) -> Output:
        if self.training and self.config.modality_dropout:
            kept = kept_modalities(batch.present, self.config.modality_dropout)
            batch = batch.drop(present=kept, keep_complete=True)
        return super().forward(batch)

    # --- 3.2 ---

    def encode(self, batch: MultimodalBatch) -> Encoded:
        h, valid, raw = super().encode(batch)
        if self.config.encoder == "tokens":  # a token has no frame that could be padding
            valid = {m: valid[m].new_ones(h[m].shape[:2]) for m in h}
        return Encoded(h, valid, raw)

    def reconstruct(self, encoded: Encoded) -> tuple[Tensors, Tensors]:
        repaired, x_hat = super().reconstruct(encoded)
        if self.config.hdcr == "joint":
            h, valid = (torch.cat([side[m] for m in self.modalities], 1) for side in (repaired, encoded.valid))
            for layer in self.across:
                h = layer(h, valid)
            lengths = [repaired[m].shape[1] for m in self.modalities]
            repaired = x_hat = dict(zip(self.modalities, h.split(lengths, 1), strict=True))
        if self.config.space == "raw":
            x_hat = {m: self.hdcr[m].get_submodule("raw")(h) for m, h in repaired.items()}
        return repaired, x_hat

    def compared(self, batch: MultimodalBatch, encoded: Encoded, x_hat: Tensors) -> Compared:
        both = super().compared(batch, encoded, x_hat)
        if self.config.encoder == "tokens":  # what a token sums up is there where the sample is
            both = both._replace(frames={m: both.rows.new_ones(x.shape[:2]) for m, x in both.x.items()})
        return both

    def originals(self, whole: Encoded) -> Tensors:
        return super().originals(whole if self.config.space == "encoded" else whole._replace(h=whole.raw))

    def distance(self, both: Compared, names: list[str], rows: Tensor, place: int) -> Tensor:
        if self.config.alignment != "mse":
            return super().distance(both, names, rows, place)
        kept = {m: both.frames[m] & rows[:, None] for m in names}
        missed = {m: (both.x[m] - both.y[m]).square().mean(-1) * kept[m] for m in names}
        total = torch.stack([missed[m].sum() * both.x[m].shape[-1] for m in names])
        count = torch.stack([kept[m].sum() * both.x[m].shape[-1] for m in names]).sum()
        with torch.no_grad():
            self.skipped[place] += count == 0
        return total.sum() / count.clamp_min(1)

    def points(self, both: Compared, names: list[str], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.config.samples == "mean":
            return super().points(both, names, rows)
        # the tokens of all samples, the modalities one after another
        p, q = (torch.cat([v[m].flatten(0, 1) for m in names]) for v in (both.x, both.y))
        weight = torch.cat([(both.frames[m] & rows[:, None]).flatten() for m in names])
        if self.config.token_samples >= len(p):
            return p, q, weight
        chosen = (same_draw(torch.rand(len(p), device=p.device)) + weight).topk(self.config.token_samples).indices
        return p[chosen], q[chosen], weight[chosen]

    # --- 3.3 ---

    def descriptor(self, pooled: Tensor) -> Tensor:
        pooled = pooled.detach() if self.config.detach_descriptors else pooled
        return super().descriptor(pooled) if self.config.norm == "l2" else F.layer_norm(pooled, pooled.shape[-1:])

    def reliability(self, pooled: Tensors) -> tuple[Tensor | None, Tensor]:
        d, w = super().reliability(pooled)
        return d, w if d is None or self.log_tau is None else reliability_weights(full(d), self.log_tau.exp())

    # --- 3.4 ---

    def assess(self, encoded: Encoded, repaired: Tensors) -> Diagnosis:
        return super().assess(encoded, repaired if self.config.stream_input == "reconstructed" else encoded.h)

    def fuse(self, h: Tensors, pooled: Tensors, valid: Tensors, w: Tensor) -> Tensor:
        if self.config.fusion == "gated":
            return self.fusion(pooled)
        if self.config.fusion == "self":
            return self.fusion(h, valid)
        if not self.config.residual:
            return super().fuse(h, pooled, valid, w)
        attended = self.fusion(h, valid, dict(zip(self.modalities, w.unbind(-1), strict=True)))
        return masked_mean(attended + h[self.query], valid[self.query])

    # --- 3.5 ---

    def task(self, logits: Tensor, y: Tensor) -> Tensor:
        return super().task(logits, y) if self.config.main == "mse" else task_loss(logits, y, lead=1)

    def supervised(self, found: Diagnosis) -> list[Tensor]:
        streams = [found.robust] if found.synergistic is None else [found.synergistic, found.robust]
        return super().supervised(found) + (streams if self.config.aux == "all" else [])

    def error(self, own: Compared, both: Compared) -> Tensor:
        over: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "token_norm": lambda e, frames: masked_mean(e, frames).sum(-1),
            "mean": lambda e, frames: masked_mean(e, frames).mean(-1),
            "sum": lambda e, frames: (e.sum(-1) * frames).sum(-1),
        }
        squared = {m: (full(own.x[m]) - full(own.y[m])).square() for m in self.modalities}
        error = torch.stack([over[self.config.error](e, own.frames[m]) for m, e in squared.items()], -1)
        if self.config.error_scale == "variance":
            error = error / (self._variances(both) if self.training else self.variance)
        return error if self.config.error_grad else error.detach()

    @torch.no_grad()
    def _variances(self, both: Compared) -> Tensor:
        """Of X_m about its mean frame, per feature, [M]; where the batch has none, what is known so far."""
        found = []
        for i, m in enumerate(self.modalities):
            kept = (both.frames[m] & both.rows[:, i, None]).flatten()
            values = full(both.x[m]).flatten(0, 1)
            found.append(masked_mean((values - masked_mean(values, kept)).square(), kept).mean())
        now = torch.stack(found)
        now = torch.where(now > 0, now, self.variance)
        self.variance.lerp_(now.to(self.variance), 0.1)
        return now
