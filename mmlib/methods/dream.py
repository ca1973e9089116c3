"""DREAM: see which modality the prediction hangs on, rebuild the others, fuse by trust.

Bi, Zhang, Wang, Niu, Zhao: "Two Challenges, One Solution: Robust Multimodal Learning through Dynamic Modality
Recognition and Enhancement", 2025. The file follows the paper's section 3: contributions of the modalities from a
frozen evaluator (3.3), enhancement of those that contribute nothing (3.4), fusion (3.5). There is no public code: where
the paper leaves a choice, `DREAMConfig` has an option, and where its text and its parameter counts disagree, a reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.base import pretrain
from ..backbones.evaluators import output_shape, split_labels
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
    check_options,
    from_reading,
    option,
)
from ..coalitions import (
    coalition_logits,
    coalition_masks,
    discrete_predictions,
    prediction_accuracy_score,
    prediction_shift_score,
    scoring,
)
from ..layers import MLP, as_frames, frame_shapes, masked_mean
from ..losses import task_loss

__all__ = [
    "DREAM",
    "READINGS",
    "Contributions",
    "CrossAttention",
    "CrossModalBlock",
    "DREAMConfig",
    "distillation_loss",
    "mask_weights",
    "permutation_coalitions",
    "permutation_scores",
]


@dataclass(frozen=True)
class DREAMConfig:
    """Shapes of the data, sizes, and each choice that the paper leaves; the defaults meet the counts of its Table 3."""

    # one sample of each modality: (T, D), (C, H, W) or (C, X, Y, Z)
    feature_shapes: Mapping[str, tuple[int, ...]] = option(MISSING, SHAPES)
    outputs: int = option(MISSING, Whole(1))  # K: classes, 1 for regression, 2 L for L labels
    regression: bool = option(False, Flag())
    # bool targets [B, K], a logit a label: both scores are means over labels
    multilabel: bool = option(False, Flag())
    # L: yes-or-no labels a sample, each with two logits (IEMOCAP: 4 emotions); 0: classes or a score
    labels: int = option(0, Whole(0))

    width: int = option(200, Whole(1))  # d
    heads: int = option(10, Whole(1))
    dropout: float = option(0.1, RATE)
    positions: int = option(50, Whole(1))  # rows of the learned position table, which all modalities share
    # hidden width of the net that predicts w; None: the "linear projection" of 3.5
    weight_hidden: int | None = option(128, Maybe(Whole(1)))
    affine: bool = option(False, Flag())  # whether the normalisation of Eq. 9 has parameters

    # 3.3
    # what a predicted score says: "sign_ge" (score >= 0), "sign_gt", or "round7"
    discretize: str = option("sign_ge", OneOf("sign_ge", "sign_gt", "round7"))
    # L labels: a prediction differs where "any" does, is right where all are; or the scores are computed for each label
    # and averaged, "mean_per_emotion"
    iemocap_agg: str = option("any", OneOf("any", "mean_per_emotion"))
    # the prediction from nothing: the evaluator's on zeros, or the training split's "majority"
    empty: str = option("forward", OneOf("forward", "majority"))
    # Monte-Carlo orders of arrival, the same for all samples; None: every coalition
    permutations: int | None = option(None, Maybe(Whole(1)))
    permutation_seed: int = option(0, Whole(0, below=2**63))
    max_rows: int | None = option(65536, Maybe(Whole(1)))  # pairs of a sample and a coalition that the evaluator sees

    # 3.4
    enhance: str = option("zero_pss", OneOf("zero_pss", "all", "none"))  # where PSS is 0; "all": the paper's ablation
    repeats: int = option(2, Whole(1))  # D
    tie_enhance: bool = option(True, Flag())  # the repeats share their parameters
    # all targets from the features before the repeat, or "sequential"
    enhance_order: str = option("parallel", OneOf("parallel", "sequential"))
    # Z: key and value frames one after another, or side by side along the "feature" axis
    concat: str = option("time", OneOf("time", "feature"))

    # 3.5
    # False: w' = softmax(w) and no distillation (the paper's ablation "w/o MMFM")
    masked_fusion: bool = option(True, Flag())
    mask_mode: str = option("mul", OneOf("mul", "add_log"))  # Eq. 10 as printed, or softmax(w + log(PSS + 1))
    # what Eq. 12 compares with: softmax(PAS / temperature), or PAS "clipped" at 0 / sum
    pas_target: str = option("softmax", OneOf("softmax", "clipped"))
    temperature: float = option(1.0, Number(above=0))
    distill_on: str = option("w", OneOf("w", "masked"))  # Eq. 12 acts on softmax(w), or on the "masked" w' of Eq. 10
    lambda_distill: float = option(0.1, Number(0))  # lambda of Eq. 13; 0 takes the term out

    def __post_init__(self) -> None:
        check_options(self)
        longest = max(frames for frames, _ in frame_shapes(self.feature_shapes).values())
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of the width {self.width}, got {self.heads}")
        if longest > self.positions:
            raise ValueError(
                f"positions: expected at least the longest modality's {longest} frames, got {self.positions}"
            )
        if self.regression and (self.outputs != 1 or self.labels):
            raise ValueError(f"outputs: expected 1 and no labels for regression, got {self.outputs} and {self.labels}")
        if self.multilabel and (self.regression or self.labels):
            raise ValueError("multilabel: expected neither regression nor labels with two logits each beside it")
        if self.labels and self.outputs != 2 * self.labels:
            raise ValueError(
                f"outputs: expected {2 * self.labels}, two for each of {self.labels} labels, got {self.outputs}"
            )


READINGS: dict[str, dict[str, Any]] = {
    "paper": {},  # the text, and Table 3 where the two disagree
    "text": {"weight_hidden": None, "affine": True},  # the text also there: a linear w, Eq. 9's LN with parameters
}


# --- 3.3 Dynamic Modality Contribution Evaluation ---------------------------------------------------------------------


class Contributions(NamedTuple):
    """What each modality contributes to the evaluator's prediction, per sample."""

    pss: Tensor  # [B, M] in [0, 1], Eq. 2
    pas: Tensor | None  # [B, M], Eqs. 3-4; None without a target


def permutation_coalitions(orders: Tensor) -> tuple[Tensor, Tensor]:
    """The coalitions that grow along orders of arrival int64 [R, M]: masks bool [S, M], path int64 [R, M + 1].

    ``masks`` are distinct, and ``path[r, k]`` is the place among them of the first k arrivals of order r.
    """
    R, M = Array("integer", "[R, M]")("orders", orders).shape
    if not torch.equal(orders.sort(-1).values, torch.arange(M).to(orders).expand_as(orders)):
        raise ValueError(f"orders: expected permutations of 0 to {M - 1}, got others")
    arrived = F.one_hot(orders, M).cumsum(1).bool()  # [R, M, M]
    along = torch.cat([arrived.new_zeros(R, 1, M), arrived], 1)
    masks, path = torch.unique(along.flatten(0, 1), dim=0, return_inverse=True)
    return masks, path.view(R, M + 1)


def permutation_scores(
    predictions: Tensor, path: Tensor, orders: Tensor, target: Tensor | None = None
) -> Contributions:
    """PSS and PAS averaged over orders of arrival: predictions int [..., S] of the coalitions -> [..., M] each.

    A modality's share is what its arrival changes: the prediction (Eq. 1), or V (Eq. 4). Unbiased for orders drawn
    evenly, exact for all M!. PSS is never positive where the exact one is 0; it may be 0 where that is positive.

    path, orders : of `permutation_coalitions`. target : [...]
    """
    Array("integer bool", "[..., S]")("predictions", predictions)
    Array("integer", "[R, M + 1]")("path", path)
    if path.shape != (*Array("integer", "[R, M]")("orders", orders).shape[:1], orders.shape[1] + 1):
        raise ValueError(f"path: expected {[len(orders), orders.shape[1] + 1]}, got {list(path.shape)}")
    if path.device.type == "cpu" and path.numel() and int(path.amax()) >= predictions.shape[-1]:
        raise ValueError(f"path: expected places below {predictions.shape[-1]}, as predictions has, got {path.amax()}")
    if target is not None and Array("integer bool", "[...]")("target", target).shape != predictions.shape[:-1]:
        raise ValueError(f"target: expected {list(predictions.shape[:-1])}, got {list(target.shape)}")
    along = predictions[..., path]  # [..., R, M + 1]
    arrival = orders.argsort(-1).expand(*along.shape[:-1], -1)  # when each modality arrives
    credit = lambda gains: gains.to(torch.get_default_dtype()).gather(-1, arrival).mean(-2)
    pss = credit(along[..., 1:] != along[..., :-1])
    if target is None:
        return Contributions(pss, None)
    value = (along == target[..., None, None]) * torch.arange(along.shape[-1], device=along.device)  # |S| where right
    return Contributions(pss, credit(value.diff(dim=-1)))


# --- 3.4 Modality Enhancement -----------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """CA of Eqs. 7-8: one layer normalisation for queries, keys and values (as in MulT), then multi-head attention.

    q [n, T, d], parts [n, T_k, d] each, valid bool [n, T_k] each or None where all are -> [n, T, d]. Z is the parts
    one after another in time, or side by side along the feature axis (then T_k must all be T).
    """

    def __init__(self, config: DREAMConfig, parts: int):
        super().__init__()
        Is("a DREAMConfig", DREAMConfig)("config", config)
        Whole(1)("parts", parts)
        self.by_feature = config.concat == "feature"
        source = config.width * (parts if self.by_feature else 1)
        self.norm = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(
            config.width, config.heads, config.dropout, kdim=source, vdim=source, batch_first=True
        )

    def forward(self, q: Tensor, parts: list[Tensor], valid: list[Tensor] | None) -> Tensor:
        if self.by_feature and len({x.shape[1] for x in parts}) > 1:
            raise ValueError(
                f"concat: 'feature' expects equal lengths in all modalities, got {[x.shape[1] for x in parts]}"
            )
        z = torch.cat([self.norm(x) for x in parts], 2 if self.by_feature else 1)
        off = None
        if valid is not None:
            off = ~(torch.stack(valid).any(0) if self.by_feature else torch.cat(valid, 1))
        return self.attention(self.norm(q), z, z, key_padding_mask=off, need_weights=False)[0]


class CrossModalBlock(nn.Module):
    """Eqs. 5-9 for one target: LN(x_t + CA(x_t, all) + sum_k CA(x_t, [x_t; x_k])).

    x[m] [n, T_m, d], valid[m] bool [n, T_m] -> [n, T_t, d]
    """

    def __init__(self, target: str, modalities: tuple[str, ...], config: DREAMConfig):
        super().__init__()
        Is("a DREAMConfig", DREAMConfig)("config", config)
        self.target = OneOf(*Several(Text, 1)("modalities", modalities))("target", target)
        self.others = [m for m in modalities if m != target]
        self.whole = CrossAttention(config, len(modalities))
        self.partial = nn.ModuleDict({k: CrossAttention(config, 2) for k in self.others})
        self.norm = nn.LayerNorm(config.width, elementwise_affine=config.affine)

    def forward(self, x: Mapping[str, Tensor], valid: Mapping[str, Tensor] | None) -> Tensor:
        t = self.target
        take = lambda names: ([x[m] for m in names], None if valid is None else [valid[m] for m in names])
        total = x[t] + self.whole(x[t], *take([t, *self.others]))  # Eqs. 5 and 7
        for k in self.others:
            total = total + self.partial[k](x[t], *take([t, k]))  # Eqs. 6 and 8
        return self.norm(total)  # Eq. 9


# --- 3.5 Modality-aware Masked Fusion ---------------------------------------------------------------------------------


def mask_weights(w: Tensor, pss: Tensor, mode: str = "mul") -> Tensor:
    """What Eq. 10 takes the softmax of: w (PSS + 1), or with mode "add_log" w + log(PSS + 1); [..., M].

    The product is not monotone: where w is negative, a larger PSS lowers the weight.
    """
    OneOf("mul", "add_log")("mode", mode)
    _same_shape("pss", pss, w)
    return w * (pss + 1) if mode == "mul" else w + torch.log1p(pss)


def _same_shape(name: str, x: Tensor, w: Tensor) -> None:
    Array("float", "[..., M]")("w", w)
    if Array("float", "[..., M]")(name, x).shape != w.shape:
        raise ValueError(f"{name}: expected the shape {list(w.shape)} of w, got {list(x.shape)}")


def distillation_loss(w: Tensor, pas: Tensor, target: str = "softmax", temperature: float = 1.0) -> Tensor:
    """Eq. 12, in our reading KL(q || softmax(w)), mean over the batch: w, pas [B, M] -> [].

    q is softmax(PAS / temperature), since PAS is no distribution and may be negative; with target "clipped" PAS
    without its negative part over its sum (uniform where nothing is left). No gradient reaches PAS.
    """
    OneOf("softmax", "clipped")("target", target)
    Number(above=0)("temperature", temperature)
    _same_shape("pas", pas, w)
    w = w.to(torch.promote_types(w.dtype, pas.dtype))
    pas = pas.detach().to(w)
    if target == "softmax":
        q = torch.softmax(pas / temperature, -1)
    else:
        kept = pas.clamp_min(0)
        total = kept.sum(-1, keepdim=True)
        q = torch.where(total > 0, kept / total.clamp_min(torch.finfo(kept.dtype).tiny), 1 / pas.shape[-1])
    return F.kl_div(torch.log_softmax(w, -1), q, reduction="batchmean")


# --- the model --------------------------------------------------------------------------------------------------------


class DREAM(nn.Module):
    """The whole model: contributions from a frozen evaluator, enhancement, masked fusion (Eqs. 1-13).

    evaluator : a trained `Backbone` of the same modalities and outputs, in eval mode; it is frozen here (its parameters
        get ``requires_grad=False``) and stays in eval mode. Best one that is trained with zeros for what is missing,
        as those of `backbones.evaluators` are
    reading : "paper", or "text" (`READINGS`)
    options : fields of `DREAMConfig`, over those of the reading; feature_shapes and outputs are needed. `for_data`
        takes them from a data set

    ``forward(batch)`` gives logits [B, K] (or [B, 2, L] with L labels) and, in training, the losses "task" and
    "distillation". It reads features and ``valid``, never ``present`` or ``observed``: a missing modality is zeros, and
    that it is missing has to show in its PSS. A sequence without a valid frame is zeros of full length. The batches are
    samples [B], not dialogues.

    Raises ValueError for an evaluator in train mode or of other modalities than the data, values that are not finite,
    and targets outside the scale.
    """

    majority: Tensor
    orders: Tensor
    table: Tensor
    table_ids: Tensor
    table_check: Tensor

    def __init__(self, evaluator: nn.Module, *, reading: str = "paper", **options: Any):
        super().__init__()
        self.config = config = from_reading(DREAMConfig, READINGS, reading, options)
        self.modalities = names = tuple(config.feature_shapes)
        self.evaluator = _checked(evaluator, names)
        M, d = len(names), config.width

        widths = {m: width for m, (_, width) in frame_shapes(config.feature_shapes).items()}
        self.project = nn.ModuleDict({m: nn.Conv1d(width, d, 1, bias=False) for m, width in widths.items()})
        self.position = nn.Parameter(torch.randn(config.positions, d) * 0.02)
        blocks = lambda: nn.ModuleDict({m: CrossModalBlock(m, names, config) for m in names})
        rounds = 0 if config.enhance == "none" else 1 if config.tie_enhance else config.repeats
        self.enhancement = nn.ModuleList(blocks() for _ in range(rounds))
        self.fusion = blocks()
        hidden = [] if config.weight_hidden is None else [config.weight_hidden]
        self.weigh = MLP([M * d, *hidden, M], config.dropout)
        self.out = nn.Linear(d, config.outputs)

        if config.permutations is not None:
            generator = torch.Generator().manual_seed(config.permutation_seed)
            self.register_buffer("orders", torch.rand(config.permutations, M, generator=generator).argsort(-1))
        answers = config.outputs if config.multilabel else max(config.labels, 1)  # that a prediction is made of
        self.register_buffer("majority", torch.full((answers,), -100))  # -100: not known yet
        # The table is of one training split, so it is no part of what is saved.
        self.register_buffer("table", torch.zeros(0, 2, M), persistent=False)
        self.register_buffer("table_ids", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("table_check", torch.zeros(0, M, dtype=torch.float64), persistent=False)

    @classmethod
    def for_data(
        cls,
        evaluator: nn.Module,
        data: MultimodalDataset,
        valid: MultimodalDataset | None = None,
        config: Any = None,
        **options: Any,
    ) -> DREAM:
        """The model that fits a data set's shapes and targets.

        Bool targets [n, K] are labels with a logit each. Integer targets [n, L] are L yes-or-no labels with two logits
        each, as on IEMOCAP, whose scores follow ``iemocap_agg``.

        evaluator : a trained one in eval mode; or, with ``config``, one that is trained here first, as `pretrain` says
        data : the training split as `fit` will see it: with a plan that is drawn once, the masked one
        config : how the evaluator is trained on ``data``, mostly the `TrainConfig` of the training itself; ``valid``
            chooses its epoch. None: not at all
        """
        outputs, labels = output_shape(data)
        longest = max(frames for frames, _ in frame_shapes(data.feature_shapes).values())
        fitting = {
            "feature_shapes": data.feature_shapes,
            "outputs": outputs,
            "labels": labels,
            "regression": data.info.get("task") == "regression",
            "multilabel": data.target is not None and data.target.dtype == torch.bool,
            "positions": max(longest, DREAMConfig.positions),
        }
        settings = {**fitting, **options}
        reading = settings.pop("reading", "paper")
        from_reading(DREAMConfig, READINGS, reading, settings)  # before anything is trained
        known = getattr(Is("an nn.Module", nn.Module)("evaluator", evaluator), "modalities", data.modalities)
        if tuple(known) != data.modalities:
            raise ValueError(f"data: expected the evaluator's modalities {list(known)}, got {list(data.modalities)}")
        if config is not None and hasattr(evaluator, "modalities"):  # else the constructor says what is wrong with it
            pretrain(evaluator, data, Maybe(DATASET)("valid", valid), config)
        model = cls(evaluator, reading=reading, **settings)
        return model if config is None else model.to(next(evaluator.parameters()).device)

    def train(self, mode: bool = True) -> DREAM:
        """As usual, but the evaluator stays in eval mode."""
        super().train(mode)
        self.evaluator.eval()
        return self

    def forward(self, batch: MultimodalBatch) -> Output:
        self._check_batch(batch)
        config, y = self.config, batch.target
        learning = self.training and y is not None
        found = self._training_scores(batch) if learning else self.contributions(batch.replace(target=None))
        w, masked, logits = self._predict(batch, found.pss)
        if not learning:
            return Output(logits, {})
        assert y is not None
        assert found.pas is not None
        losses = {"task": task_loss(logits, y, lead=1)}  # L1 for scores, cross-entropy else
        if config.lambda_distill and config.masked_fusion:
            on = w if config.distill_on == "w" else masked
            kl = distillation_loss(on, found.pas, config.pas_target, config.temperature)
            losses["distillation"] = config.lambda_distill * kl  # Eqs. 12-13
        return Output(logits, losses)

    def weights(self, batch: MultimodalBatch) -> Tensor:
        """The fusion weights w' of Eq. 10, [B, M], each row summing to 1, in the mode that the model is in."""
        self._check_batch(batch)
        return torch.softmax(self._predict(batch, self.contributions(batch.replace(target=None)).pss)[1], -1)

    # --- 3.3 ---

    @torch.no_grad()
    def contributions(self, batch: MultimodalBatch) -> Contributions:
        """PSS and, where the batch has a target, PAS of every sample, from the evaluator as it is now: [B, M] each."""
        self._check_batch(batch)
        config, y = self.config, batch.target
        blind = batch.replace(
            present=torch.ones_like(batch.present), observed=dict(batch.valid), target=None, complete=None, extras={}
        )
        if config.permutations is None:
            masks = coalition_masks(len(self.modalities), batch.device)
        else:
            masks, path = permutation_coalitions(self.orders)
        # In full precision whatever the training's is, so that a score does not depend on where it is computed.
        with scoring(self.evaluator), torch.autocast(batch.device.type, enabled=False):
            logits = coalition_logits(
                self.evaluator, blind, masks, absent="zero_input", use_present=False, max_rows=config.max_rows
            )
            said = self._discrete(logits, masks)  # [B, S], or [B, L, S] label by label
            true = None if y is None else self._combine(self._classes(y)[..., None])[..., 0]
            if config.permutations is not None:
                pss, pas = permutation_scores(said, path, self.orders, true)
            else:
                pss = prediction_shift_score(said)
                pas = None if true is None else prediction_accuracy_score(said, true)
        if pss.ndim > 2:
            pss, pas = pss.mean(1), None if pas is None else pas.mean(1)
        return Contributions(pss, pas)

    def _discrete(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Logits [S, B, K] (or [S, B, 2, L]) of the coalitions bool [S, M] -> what they predict, int64 [B, S]."""
        config = self.config
        tail = (2, config.labels) if config.labels else (config.outputs,)
        if tuple(logits.shape[2:]) != tail:
            raise ValueError(f"evaluator: expected logits {['B', *tail]}, got {['B', *logits.shape[2:]]}")
        if not bool((finite := torch.isfinite(logits).flatten(2).all(-1).all(0)).all()):
            rows = (~finite).nonzero()[:, 0].tolist()
            raise ValueError(
                f"features: expected finite values; the evaluator's predictions of {len(rows)} samples are NaN or "
                f"infinite, the first at {rows[:5]}"
            )
        if config.labels:
            said = logits.argmax(2).movedim(0, -1)  # [B, L, S]
        elif config.multilabel:
            said = discrete_predictions(logits, False, multilabel=True).movedim(0, -1)  # [B, K, S]
        else:
            said = discrete_predictions(logits, config.regression, config.discretize).t()[:, None]
        if config.empty == "majority":
            if bool((self.majority == -100).any()):
                raise ValueError(
                    "empty: the majority is not known yet; call observe(train) before training without fit"
                )
            said = torch.where(masks.any(-1), said, self.majority[:, None])
        return self._combine(said)

    def _classes(self, y: Tensor) -> Tensor:
        """Targets [B], [B, L] or [B, K] as what `_discrete` compares them with, int64 [B, L, K or 1]."""
        if self.config.regression:
            y = discrete_predictions(y[:, None], True, self.config.discretize)
        return y.long() if self.config.labels or self.config.multilabel else y[:, None]

    def _combine(self, classes: Tensor) -> Tensor:
        """int64 [B, L, K or 1, S] -> [B, S]: one number for all labels; label by label it stays as it is."""
        if self.config.multilabel or (self.config.labels and self.config.iemocap_agg == "mean_per_emotion"):
            return classes
        if not self.config.labels:
            return classes[:, 0]
        return (classes << torch.arange(classes.shape[1], device=classes.device)[:, None]).sum(1)

    def observe(self, data: MultimodalDataset | MultimodalBatch) -> None:
        """Learn the majority prediction of the training split's targets, for ``empty="majority"``."""
        y = Either(DATASET, BATCH)("data", data).target
        self._check_target(y)
        assert y is not None
        self.majority.copy_(self._classes(y).mode(0).values)

    def precompute(self, data: MultimodalDataset, batch_size: int = 1024) -> None:
        """Compute the contributions of a static training split once; training steps then look them up by id.

        The evaluator is frozen, so this equals live scores wherever the same samples come with the same features in
        every epoch. `training.fit` checks that at every epoch. In eval mode scores are always live.
        """
        Whole(1)("batch_size", batch_size)
        if DATASET("data", data).modalities != self.modalities:
            raise ValueError(f"data: expected the modalities {list(self.modalities)}, got {list(data.modalities)}")
        ids = data.ids.cpu()
        if len(ids.unique()) < len(ids):
            raise ValueError("data: expected different ids, some occur twice")
        self.observe(data)
        device = self.position.device
        found = [self.contributions(batch.to(device)) for batch in _parts(data, batch_size)]
        table = torch.cat([torch.stack([pss, pas], 1) for pss, pas in found])  # type: ignore[list-item]
        order = ids.argsort()
        self.table, self.table_ids = table[order.to(device)], ids[order].to(device)
        self.table_check = _checksum(data)[order].to(device)

    def _training_scores(self, batch: MultimodalBatch) -> Contributions:
        self._check_target(batch.target)
        if not len(self.table):
            return self.contributions(batch)
        if batch.ids is None:
            raise ValueError("batch: expected ids, by which the precomputed contributions are looked up")
        place = torch.searchsorted(self.table_ids, batch.ids).clamp_max(len(self.table_ids) - 1)
        if not torch.equal(self.table_ids[place], batch.ids):
            raise ValueError("ids: some samples have no precomputed contributions; call precompute on this very split")
        return Contributions(*self.table[place].unbind(1))

    def on_epoch_start(self, state: Any) -> None:
        """The loop's event: check the split as it is trained on in this epoch, and what was precomputed for it."""
        data: MultimodalDataset = state.train
        self._check_batch(data.data)
        self._check_target(data.target)
        if self.config.empty == "majority":
            self.observe(data)
        if not len(self.table):
            return
        ids = data.ids.to(self.table_ids.device)
        place = torch.searchsorted(self.table_ids, ids).clamp_max(len(self.table_ids) - 1)
        if not torch.equal(self.table_ids[place], ids):
            raise ValueError(
                f"ids: {int((self.table_ids[place] != ids).sum())} of {len(ids)} training samples have no precomputed "
                f"contributions; call precompute on this very split"
            )
        same = torch.isclose(_checksum(data).to(self.table_check.device), self.table_check[place], 1e-7, 1e-7)
        if not bool(same.all()):
            raise ValueError(
                f"features: {int((~same.all(-1)).sum())} of {len(ids)} training samples are not as they were when "
                f"their contributions were precomputed; a plan that resamples needs live scores, without precompute"
            )

    # --- 3.4 and 3.5 ---

    def _predict(self, batch: MultimodalBatch, pss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w [B, M] of 3.5, what Eq. 10 takes the softmax of, and the logits."""
        config = self.config
        x, valid = self._embed(batch)
        x = self._enhance(x, valid, pss)
        h = torch.stack([self._pool(self.fusion[m](x, valid), valid, m) for m in self.modalities], 1)  # [B, M, d]
        w = self.weigh(h.flatten(1))
        masked = mask_weights(w, pss, config.mask_mode) if config.masked_fusion else w
        fused = (torch.softmax(masked, -1)[..., None] * h).sum(1)  # Eqs. 10-11
        return w, masked, split_labels(self.out(fused), config.labels)

    def _embed(self, batch: MultimodalBatch) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """x[m] [B, T_m, d] with positions, and the frames to attend to (None: all of them).

        A sequence without a valid frame is read as zeros of full length, so no attention is without a key.
        """
        x, valid = {}, {}
        for m, values in batch.features.items():
            seen = batch.valid[m]
            frames = torch.where(seen[..., None], as_frames(values), 0)
            if frames.shape[1] > len(self.position):
                raise ValueError(
                    f"features[{m!r}]: expected at most {len(self.position)} frames (positions), got {frames.shape[1]}"
                )
            projected = self.project[m](frames.to(self.position.dtype).transpose(1, 2)).transpose(1, 2)
            x[m] = projected + self.position[: frames.shape[1]]
            valid[m] = seen | ~seen.any(-1, keepdim=True)
        whole = bool(torch.stack([v.all() for v in valid.values()]).all())
        return x, None if whole else valid

    def _enhance(self, x: dict[str, Tensor], valid: dict[str, Tensor] | None, pss: Tensor) -> dict[str, Tensor]:
        """Eqs. 5-9, D times, for the samples and targets whose PSS is 0; the rest stays as it is."""
        config = self.config
        if config.enhance == "none":
            return x
        targets: list[tuple[str, Tensor | None]] = []
        for i, m in enumerate(self.modalities):
            if config.enhance == "all":
                targets.append((m, None))
            elif len(rows := (pss[:, i] == 0).nonzero()[:, 0]):
                targets.append((m, rows if len(rows) < len(pss) else None))
        for r in range(config.repeats):
            after = dict(x)
            for m, chosen in targets:
                block = self.enhancement[0 if config.tie_enhance else r].get_submodule(m)
                before = x if config.enhance_order == "parallel" else after
                if chosen is None:
                    after[m] = block(before, valid).to(x[m])
                else:
                    of_chosen = lambda tensors, chosen=chosen: {k: v[chosen] for k, v in tensors.items()}
                    enhanced = block(of_chosen(before), None if valid is None else of_chosen(valid))
                    after[m] = after[m].index_copy(0, chosen, enhanced.to(x[m]))
            x = after
        return x

    def _pool(self, x: Tensor, valid: dict[str, Tensor] | None, modality: str) -> Tensor:
        return x.mean(1) if valid is None else masked_mean(x, valid[modality])

    # --- what may be wrong ---

    def _check_batch(self, batch: MultimodalBatch) -> None:
        if BATCH("batch", batch).modalities != self.modalities:
            raise ValueError(f"batch: expected the modalities {list(self.modalities)}, got {list(batch.modalities)}")
        if len(batch.shape) != 1:
            raise ValueError(f"batch: expected samples [B], got the leading shape {batch.shape}")
        for m, x in batch.features.items():
            expected = self.config.feature_shapes[m]
            if (
                not x.is_floating_point()
                or frame_shapes({m: tuple(x.shape[1:])})[m][1] != frame_shapes({m: expected})[m][1]
            ):
                raise ValueError(
                    f"features[{m!r}]: expected float samples of shape {tuple(expected)}, got {x.dtype} "
                    f"{tuple(x.shape[1:])}"
                )

    def _check_target(self, y: Tensor | None) -> None:
        config = self.config
        if y is None:
            raise ValueError("target: expected one, from which PAS and the losses are computed, got none")
        if config.multilabel:
            if y.dtype != torch.bool or y.ndim != 2 or y.shape[1] != config.outputs:
                raise ValueError(f"target: expected bool labels [B, {config.outputs}], got {y.dtype} {tuple(y.shape)}")
            return
        kind = (
            "float scores [B]" if config.regression else f"int64 {'labels [B, L]' if config.labels else 'classes [B]'}"
        )
        wrong = y.is_floating_point() != config.regression or y.dtype == torch.bool
        if wrong or y.ndim != 1 + bool(config.labels):
            raise ValueError(f"target: expected {kind}, got {y.dtype} {tuple(y.shape)}")
        if config.labels and y.shape[1] != config.labels:
            raise ValueError(f"target: expected {config.labels} labels a sample, got {y.shape[1]}")
        if config.regression:
            low, high = (-3.0, 3.0) if config.discretize == "round7" else (-float("inf"), float("inf"))
        else:
            low, high = 0, (2 if config.labels else config.outputs) - 1
        if not bool(((y >= low) & (y <= high) & torch.isfinite(y)).all()):
            found = f"values from {y.min().item()} to {y.max().item()}"
            raise ValueError(f"target: expected {kind}, finite and in [{low}, {high}], got {found}")


def _checked(evaluator: nn.Module, modalities: tuple[str, ...]) -> nn.Module:
    """The evaluator, frozen."""
    Is("an nn.Module", nn.Module)("evaluator", evaluator)
    has = getattr(evaluator, "modalities", None)
    if has is None:
        inner = hasattr(getattr(evaluator, "backbone", None), "modalities")
        raise ValueError(
            f"evaluator: expected a backbone, which says its modalities, got {type(evaluator).__name__}"
            + ("; pass its .backbone" if inner else "")
        )
    if tuple(has) != modalities:
        raise ValueError(f"evaluator: expected one of the data's modalities {list(modalities)}, got {list(has)}")
    if any(part.training for part in evaluator.modules()):
        raise ValueError("evaluator: expected a trained one in eval mode, got train mode; call evaluator.eval()")
    return evaluator.requires_grad_(False)


def _parts(data: MultimodalDataset, size: int) -> Iterator[MultimodalBatch]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _checksum(data: MultimodalDataset) -> Tensor:
    """One number [n, M] for the values and the valid frames of each modality of each sample, on the CPU."""
    columns = []
    for name in data.modalities:
        parts = []
        for batch in _parts(data, 1024):
            values = batch.features[name].flatten(1)
            values = torch.cat([values, batch.valid[name].to(values)], 1)
            wave = torch.sin(torch.arange(1, values.shape[1] + 1, device=values.device, dtype=torch.float64))
            parts.append((values.double() @ wave).cpu())
        columns.append(torch.cat(parts))
    return torch.stack(columns, -1)
