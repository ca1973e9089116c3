"""DEAR: repair distributions, estimate how hard the repair was, trust accordingly.

Zou, Wei, Zhang: "DEAR: Distributional Error-Aware Reliability for Robust Multimodal Sentiment Analysis with Missing
Modalities", 2026. The file follows the paper's section 3: reconstruction under distributional constraints (HDCR, 3.2),
difficulty and reliability of each modality of each sample (SURE, 3.3), a synergistic and a robust stream with a gate
between them (SR-DS, 3.4), calibration and objective (3.5). There is no public code: where the paper leaves a choice,
this file has one interpretation of it and `released.dear` the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.text import ReadsText
from ..batch import DATASET, MultimodalBatch, MultimodalDataset, Output, in_parts
from ..checks import RATE, SHAPES, Array, Flag, Is, Maybe, Number, OneOf, Several, Text, Whole, check_options, option
from ..layers import MLP, SharesBatches, TransformerLayer, as_frames, check_finite, full, joined, masked_mean, scoring
from ..losses import check_target, mmd, sinkhorn, task_loss
from ._presets import Presets

__all__ = [
    "DEAR",
    "Compared",
    "DEARConfig",
    "Diagnosis",
    "Encoded",
    "Projection",
    "Reconstruction",
    "SynergisticAttention",
    "reliability_weights",
    "weight_entropy",
]

Tensors = Mapping[str, Tensor]  # by modality


@dataclass(frozen=True)
class DEARConfig:
    """Shapes of the data, sizes, loss weights, and the paper's ablations."""

    # one sample of each modality: (T, D), (C, H, W), or (T,) token ids
    feature_shapes: Mapping[str, tuple[int, ...]] = option(MISSING, SHAPES)
    outputs: int = option(1, Whole(1))  # K: classes or labels, 1 for regression
    regression: bool = option(True, Flag())
    text_width: int | None = option(None, Maybe(Whole(1)))  # of tokens; None: the text encoder's config.hidden_size
    freeze_text: bool = option(False, Flag())  # the text encoder stays as it is, in eval mode
    width: int = option(128, Whole(1))  # d
    heads: int = option(8, Whole(1))
    head_width: int = option(64, Whole(1))
    hidden: int = option(128, Whole(1))  # of the MLPs: difficulty, gate, prediction heads
    dropout: float = option(0.0, RATE)
    layers: int = option(2, Whole(1))  # of HDCR
    alignment: str = option("mmd", OneOf("mmd", "sinkhorn"))
    sure: bool = option(True, Flag())  # False, "w/o SURE": equal weights and no calibration
    tau: float = option(1.0, Number(above=0))  # Eq. 8
    # the modality that asks in Eq. 9; None: "language" or "text", else the first
    query: str | None = option(None, Maybe(Text))
    # "robust" (w/o SS), "synergistic" (w/o RS), "single" (w/o DS: a head on all features)
    streams: str = option("both", OneOf("both", "robust", "synergistic", "single"))
    lambda1: float = option(0.3, Number(0))
    lambda2: float = option(0.7, Number(0))
    alpha: float = option(0.8, Number(0))
    beta: float = option(0.3, Number(0))

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.feature_shapes) < 2:
            raise ValueError(f"feature_shapes: expected at least two modalities, got {list(self.feature_shapes)}")
        if self.regression and self.outputs != 1:
            raise ValueError(f"outputs: expected 1 for regression, got {self.outputs}")
        Maybe(OneOf(*self.feature_shapes))("query", self.query)


# --- 3.2 Hierarchical Distribution Constraint Reconstruction ----------------------------------------------------------


class Projection(nn.Module):
    """phi of Eq. 5: Linear(LN(F)); text, and a frame of one value, which has nothing to be normalised, without LN."""

    def __init__(self, source: int, width: int, norm: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(source) if Whole(1)("source", source) > 1 and Flag()("norm", norm) else nn.Identity()
        self.project = nn.Linear(source, Whole(1)("width", width))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.project(self.norm(x))


class Reconstruction(nn.Module):
    """HDCR's network for a modality, positions and Transformer layers: x [n, T, d], valid bool [n, T] -> [n, T, d]."""

    def __init__(self, config: DEARConfig, frames: int, layers: int):
        super().__init__()
        Is("a DEARConfig", DEARConfig)("config", config)
        self.position = nn.Parameter(0.02 * torch.randn(Whole(1)("frames", frames), config.width))
        self.layers = nn.ModuleList(
            TransformerLayer(config.width, config.heads, config.head_width, config.dropout)
            for _ in range(Whole(0)("layers", layers))
        )

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = x + self.position[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, valid)
        return x


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
    attention becomes flat, and only the value is suppressed. As printed, y_syn carries no values of the text.
    """

    def __init__(self, query: str, modalities: tuple[str, ...], width: int):
        super().__init__()
        OneOf(*Several(Text, 2)("modalities", modalities))("query", query)
        self.query, self.others = query, [m for m in modalities if m != query]
        self.W_Q, self.W_K, self.W_V = (nn.Linear(Whole(1)("width", width), width, bias=False) for _ in range(3))

    def forward(self, h: Tensors, valid: Tensors, w: Tensors) -> Tensor:
        q = self.W_Q(h[self.query])
        keys = torch.cat([w[m][:, None, None] * self.W_K(h[m]) for m in self.others], 1)
        values = torch.cat([w[m][:, None, None] * self.W_V(h[m]) for m in self.others], 1)
        scores = q @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
        off = ~torch.cat([valid[m] for m in self.others], 1)[:, None]
        return torch.softmax(scores.masked_fill(off, -torch.inf), -1) @ values


# --- the model --------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Eq. 5: features h[m] [B, T_m, d], their frames valid[m] [B, T_m], and what they come from, raw[m] [B, T_m, D]."""

    h: Tensors
    valid: Tensors
    raw: Tensors


class Compared(NamedTuple):
    """The originals X_m and their reconstructions [B, T, .] as they are compared, and where there is an original."""

    x: Tensors
    y: Tensors
    frames: Tensors  # bool [B, T]
    rows: Tensor  # bool [B, M]


class Diagnosis(NamedTuple):
    """What SURE and the streams make of each sample and, from `DEAR.diagnose`, how well the repair did."""

    prediction: Tensor  # [B, K]
    synergistic: Tensor | None  # [B, K]; None with streams "robust"
    robust: Tensor  # [B, K]
    unimodal: Tensor  # [B, M, K]
    difficulty: Tensor | None  # d [B, M]; None without SURE
    weights: Tensor  # w [B, M]
    entropy: Tensor  # H(w) [B]
    gate: Tensor  # g [B]: 1 is the synergistic stream alone
    # e_m [B, M]; NaN where modality m is missing by nature; None where nothing says what was
    error: Tensor | None = None
    original: Tensors = {}  # per modality the mean of X_m over its frames [B, d]; {} where nothing says what was
    reconstructed: Tensors = {}  # the same of the reconstruction


class DEAR(Presets, SharesBatches, ReadsText, config=DEARConfig, presets={"paper": {}}):
    """The whole model: HDCR, SURE and SR-DS (Eqs. 1-13).

    text_encoder : for a modality of token ids, a module that takes ``input_ids`` and ``attention_mask`` [B, T] and
        gives ``last_hidden_state`` (or is) [B, T, D], such as `data.text.load_encoder` reads; fine-tuned, unless
        ``freeze_text``. Dropped tokens are the data set's fill, [UNK], and stay attended to
    preset : "paper", or "table8" (`released.dear`)
    options : fields of `DEARConfig`, over those of the preset; feature_shapes are needed. `for_data` takes them, and
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
    joint_terms = 1  # how often Eq. 4 counts the joint term
    skipped: Tensor

    def __init__(self, text_encoder: nn.Module | None = None, *, preset: str = "paper", **options: Any):
        super().__init__()
        self.config = config = self.configured(preset, options)
        self.modalities = names = tuple(config.feature_shapes)
        self.text = next((m for m in ("language", "text") if m in names), None)
        self.query = config.query or self.text or names[0]
        self.read_with(text_encoder, config.feature_shapes, config.text_width, config.freeze_text)
        self.shapes = {m: self.frames_read(m, shape) for m, shape in config.feature_shapes.items()}
        M, d = len(names), config.width
        self.encoder = nn.ModuleDict({m: self.make_encoder(m) for m in names})  # Eq. 5
        self.hdcr = nn.ModuleDict({m: self.make_hdcr(m) for m in names})  # 3.2
        if config.sure:  # 3.3
            self.difficulty = MLP([M * d, config.hidden, M], config.dropout)  # the Transfer Difficulty Estimator
        head = lambda width: MLP([width, config.hidden, config.outputs], config.dropout)  # 3.4
        self.unimodal = nn.ModuleDict({m: head(d) for m in names})
        if config.streams == "single":
            self.single = head(M * d)
        elif config.streams != "robust":
            self.fusion: nn.Module = self.make_fusion()
            self.synergistic = head(d)
        if config.streams == "both":
            self.gate = MLP([d + M + 1, config.hidden, 1], config.dropout)
        self.register_buffer("skipped", torch.zeros(M + 1, dtype=torch.int64), persistent=False)

    @classmethod
    def for_data(
        cls, data: MultimodalDataset, text_encoder: Any = None, valid: Any = None, config: Any = None, **options: Any
    ) -> DEAR:
        """The model that fits a data set's shapes and targets; it has no first stage for ``valid`` and ``config``."""
        fitting = {
            "feature_shapes": DATASET("data", data).feature_shapes,
            "outputs": data.info.get("outputs", 1),
            "regression": data.info.get("task", "regression") == "regression",
        }
        model = cls(text_encoder, **{**fitting, **options})
        model.check(data.data)
        return model

    def make_encoder(self, m: str) -> nn.Module:
        return Projection(self.shapes[m][1], self.config.width, norm=m != self.text)

    def make_hdcr(self, m: str) -> nn.Module:
        return Reconstruction(self.config, self.shapes[m][0], self.config.layers)

    def make_fusion(self) -> nn.Module:
        return SynergisticAttention(self.query, self.modalities, self.config.width)

    def forward(self, batch: MultimodalBatch) -> Output:
        self.check(batch, wait=not self.training)
        encoded = self.encode(batch)
        repaired, x_hat = self.reconstruct(encoded)
        found = self.assess(encoded, repaired)
        if not self.training:
            check_finite(found.prediction)
        if not self.training or batch.target is None:
            return Output(found.prediction, {})
        return Output(found.prediction, self.losses(batch, encoded, x_hat, found))

    # --- 3.2: Eqs. 1-5 ---

    def encode(self, batch: MultimodalBatch) -> Encoded:
        """Eq. 5. A sequence without a valid frame is read as zeros of full length, so no attention is without a key."""
        h, valid, raw = {}, {}, {}
        for m, values in batch.features.items():
            seen = batch.valid[m]
            valid[m] = seen | ~seen.any(-1, keepdim=True)
            frames = self.read(torch.where(seen, values, 0), valid[m]) if m in self.token_ids else as_frames(values)
            raw[m] = torch.where(seen[..., None], frames, 0).to(next(self.encoder[m].parameters()).dtype)
            h[m] = self.encoder[m](raw[m], valid[m])
        return Encoded(h, valid, raw)

    def reconstruct(self, encoded: Encoded) -> tuple[Tensors, Tensors]:
        """HDCR's output, per modality [B, T, d], and the same in the space where it is compared with X."""
        repaired = {m: self.hdcr[m](encoded.h[m], encoded.valid[m]) for m in self.modalities}
        return repaired, repaired

    def compared(self, batch: MultimodalBatch, encoded: Encoded, x_hat: Tensors) -> Compared:
        """HDCR's output beside X: the complete samples through the same encoders, without gradient."""
        known, whole = batch, encoded
        if batch.complete is not None:
            known = batch.complete
            with torch.no_grad():
                whole = self.encode(known)
        rows = known.present & torch.stack([known.valid[m].any(-1) for m in self.modalities], -1)
        return Compared(self.originals(whole), x_hat, known.observed, rows)

    def originals(self, whole: Encoded) -> Tensors:
        """X_m where it is compared: Eq. 5's features of the complete samples, without gradient."""
        return {m: h.detach() for m, h in whole.h.items()}

    def align(self, both: Compared) -> dict[str, Tensor]:
        """L_uni (Eq. 2, summed over modalities) and L_joint (Eq. 3), each with its weight of Eq. 4."""
        config, names, losses = self.config, list(self.modalities), {}
        if config.lambda1:
            each = [self.distance(both, [m], both.rows[:, i], i) for i, m in enumerate(names)]
            losses["unimodal"] = config.lambda1 * torch.stack(each).sum()
        if config.lambda2:
            whole = self.distance(both, names, both.rows.all(-1), len(names))
            losses["joint"] = config.lambda2 * self.joint_terms * whole
        return losses

    def distance(self, both: Compared, names: list[str], rows: Tensor, place: int) -> Tensor:
        """Eq. 1 between originals and reconstructions in some modalities, of the samples ``rows`` bool [B]."""
        p, q, weight = self.points(both, names, rows)
        enough = weight.sum() > 1
        with torch.no_grad():
            self.skipped[place] += ~enough
        weight = weight & enough
        return (mmd if self.config.alignment == "mmd" else sinkhorn)(p, q, x_weight=weight, y_weight=weight)

    def points(self, both: Compared, names: list[str], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is compared: a vector a sample [B, sum of d], the modalities side by side; and which samples count."""
        p, q = (torch.cat([masked_mean(v[m], both.frames[m]) for m in names], -1) for v in (both.x, both.y))
        return p, q, rows

    # --- 3.3: Eqs. 6-8 ---

    def reliability(self, pooled: Tensors) -> tuple[Tensor | None, Tensor]:
        """From the pooled incomplete features [B, d] the difficulty d, None without SURE, and the weights w, [B, M]."""
        if not self.config.sure:
            p = pooled[self.query]
            return None, full(p.new_full((len(p), len(pooled)), 1 / len(pooled)))
        z = [self.descriptor(p) for p in pooled.values()]
        d = F.softplus(self.difficulty(torch.cat(z, -1)))  # Eq. 7
        return d, reliability_weights(full(d), self.config.tau)  # Eq. 8

    def descriptor(self, pooled: Tensor) -> Tensor:
        """Norm in Eq. 6, [B, d] -> [B, d]."""
        return F.normalize(pooled, dim=-1)

    # --- 3.4: Eqs. 9-11 ---

    def assess(self, encoded: Encoded, repaired: Tensors) -> Diagnosis:
        """Difficulty, weights, both streams and the gate between them. The H of Eqs. 9 and 10 is HDCR's output."""
        config, valid = self.config, encoded.valid
        seen = {m: masked_mean(h, valid[m]) for m, h in encoded.h.items()}
        d, w = self.reliability(seen)
        entropy = weight_entropy(w)
        pooled = {m: masked_mean(repaired[m], valid[m]) for m in self.modalities}
        unimodal = torch.stack([self.unimodal[m](p) for m, p in pooled.items()], 1)  # [B, M, K]
        robust = (w[..., None] * unimodal).sum(1)  # Eq. 10
        if config.streams == "robust":
            return Diagnosis(robust, None, robust, unimodal, d, w, entropy, torch.zeros_like(entropy))
        if config.streams == "single":
            together = self.single(torch.cat(list(pooled.values()), -1))
        else:
            together = self.synergistic(self.fuse(repaired, pooled, valid, w))  # Eq. 9
        if config.streams != "both":
            return Diagnosis(together, together, robust, unimodal, d, w, entropy, torch.ones_like(entropy))
        known = torch.zeros_like(w) if d is None else d.to(w)
        g = torch.sigmoid(self.gate(torch.cat([seen[self.query], known, entropy[:, None]], -1)))  # Eq. 11
        return Diagnosis(g * together + (1 - g) * robust, together, robust, unimodal, d, w, entropy, g[:, 0])

    def fuse(self, h: Tensors, pooled: Tensors, valid: Tensors, w: Tensor) -> Tensor:
        """What the synergistic stream's head reads, [B, d]: the mean of Eq. 9 over the query's frames."""
        attended = self.fusion(h, valid, dict(zip(self.modalities, w.unbind(-1), strict=True)))
        return masked_mean(attended, valid[self.query])

    # --- 3.5: Eqs. 12 and 13 ---

    def losses(self, batch: MultimodalBatch, encoded: Encoded, x_hat: Tensors, found: Diagnosis) -> dict[str, Tensor]:
        """Eq. 13, term by term; distances are of the rows of all processes."""
        config, y = self.config, batch.target
        assert y is not None
        check_target(y, config.regression)
        losses = {"task": self.task(found.prediction, y)}
        if config.alpha:
            losses["aux"] = config.alpha * torch.stack([self.task(one, y) for one in self.supervised(found)]).mean()
        d = found.difficulty if config.beta else None
        if not (config.lambda1 or config.lambda2) and d is None:
            return losses
        own, shared = self.compared(batch, encoded, x_hat), self.shared(batch)
        every = lambda values: {m: shared.rows(v) for m, v in values.items()}
        both = Compared(every(own.x), every(own.y), every(own.frames), shared.rows(own.rows))
        losses.update(self.align(both))
        if d is not None:
            missed = torch.where(own.rows, self.error(own, both) - d, 0).square()  # Eq. 12
            losses["calibration"] = config.beta * missed.sum() / shared.count(own.rows.sum())
        return losses

    def task(self, logits: Tensor, y: Tensor) -> Tensor:
        """L_main: the squared error for scores, cross-entropy else (binary for bool labels)."""
        return (logits[..., 0] - y).square().mean() if self.config.regression else task_loss(logits, y, lead=1)

    def supervised(self, found: Diagnosis) -> list[Tensor]:
        """The predictions of which L_aux is the mean."""
        return list(found.unimodal.unbind(1))

    def error(self, own: Compared, both: Compared) -> Tensor:
        """Eq. 12's e_m = |X_m - its reconstruction|^2, a sum over features, mean over frames, [B, M]; no gradient.

        ``both`` has the samples of all processes where ``own`` has those of one.
        """
        squared = {m: (full(own.x[m]) - full(own.y[m])).square() for m in self.modalities}
        return torch.stack([masked_mean(e, own.frames[m]).sum(-1) for m, e in squared.items()], -1).detach()

    # --- looking at it ---

    def diagnose(self, data: MultimodalDataset | MultimodalBatch, batch_size: int = 256) -> Diagnosis:
        """Predictions, difficulty, weights, gate and errors of every sample, in eval mode and without gradients.

        Errors and originals need what was there before: apply the mask with ``keep_complete=True``.
        """
        device = next(self.encoder.parameters()).device
        with scoring(self):
            parts = [self._diagnosed(part.to(device)) for part in in_parts(data, batch_size)]
        return Diagnosis(*(joined(column) for column in zip(*parts, strict=True)))

    def _diagnosed(self, batch: MultimodalBatch) -> Diagnosis:
        self.check(batch)
        encoded = self.encode(batch)
        repaired, x_hat = self.reconstruct(encoded)
        found = self.assess(encoded, repaired)
        check_finite(found.prediction)
        if batch.complete is None:
            return found
        both = self.compared(batch, encoded, x_hat)
        error = torch.where(both.rows, self.error(both, both), torch.nan)
        mean = lambda values: {m: masked_mean(values[m], both.frames[m]) for m in self.modalities}
        return found._replace(error=error, original=mean(both.x), reconstructed=mean(both.y))

    # --- the loop's events ---

    def on_epoch_start(self, state: Any) -> None:
        """The whole split's ids once, since looking at a batch on a GPU would mean to wait for it."""
        self.check(state.train.data)
        self.skipped.zero_()

    def on_epoch_end(self, state: Any) -> None:
        """Into the history: how many steps had too few originals for a distance."""
        for name, count in zip((*self.modalities, "joint"), self.skipped.tolist(), strict=True):
            if count:
                state.history.epochs[-1][f"skipped_{name}"] = count
