"""DREAM: see which modality the prediction hangs on, rebuild the others, fuse by trust.

Bi, Zhang, Wang, Niu, Zhao: "Two Challenges, One Solution: Robust Multimodal Learning through Dynamic Modality
Recognition and Enhancement", 2025. The file follows the paper's section 3: contributions of the modalities from a
frozen evaluator (3.3), enhancement of those that contribute nothing (3.4), fusion (3.5). There is no public code: where
the paper's text and its parameter counts disagree, this is what meets the counts of its Table 3, and other
interpretations are in `released.dream`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.base import pretrain
from ..backbones.sequences import output_shape, split_labels
from ..batch import DATASET, MultimodalBatch, MultimodalDataset, Output
from ..checks import RATE, SHAPES, Flag, Is, Maybe, Number, OneOf, Several, Text, Whole, check_options, option
from ..coalitions import (
    coalition_logits,
    coalition_masks,
    cut_table,
    discrete_predictions,
    prediction_accuracy_score,
    prediction_shift_score,
    scoring,
)
from ..layers import MLP, as_frames, frame_shapes, kept_modalities, masked_mean
from ..losses import task_loss
from ._data_checks import check_alike, check_logits, check_outputs, check_samples, check_target, frozen
from ._presets import Presets
from ._score_table import Precomputes, ScoreTable

__all__ = [
    "DREAM",
    "Contributions",
    "CrossAttention",
    "CrossModalBlock",
    "DREAMConfig",
    "distillation_loss",
    "mask_weights",
]


@dataclass(frozen=True)
class DREAMConfig:
    """Shapes of the data and sizes; the defaults meet the counts of the paper's Table 3."""

    # one sample of each modality: (T, D), (C, H, W) or (C, X, Y, Z)
    feature_shapes: Mapping[str, tuple[int, ...]] = option(MISSING, SHAPES)
    outputs: int = option(MISSING, Whole(1))  # K: classes, 1 for regression, 2 L for L labels
    regression: bool = option(False, Flag())
    # bool targets [B, K], a logit a label: both scores are means over labels
    multilabel: bool = option(False, Flag())
    # L: yes-or-no labels a sample, each with two logits (IEMOCAP: 4 emotions); a prediction is all of them
    labels: int = option(0, Whole(0))

    width: int = option(200, Whole(1))  # d
    heads: int = option(10, Whole(1))
    dropout: float = option(0.1, RATE)
    positions: int = option(50, Whole(1))  # length of the learned position table of all modalities
    weight_hidden: int = option(128, Whole(1))  # hidden width of the net that predicts w
    enhance: str = option("zero_pss", OneOf("zero_pss", "all"))  # where PSS is 0; "all": "w/o dynamic enhancement"
    repeats: int = option(2, Whole(1))  # D of 3.4, with the same parameters
    masked_fusion: bool = option(True, Flag())  # False: w' = softmax(w) and no distillation, "w/o MMFM"
    lambda_distill: float = option(0.1, Number(0))  # lambda of Eq. 13; 0 takes the term out
    modality_dropout: float = option(0.0, RATE)  # of each present modality of a sample, at each training step

    def __post_init__(self) -> None:
        check_options(self)
        longest = max(frames for frames, _ in frame_shapes(self.feature_shapes).values())
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of the width {self.width}, got {self.heads}")
        if longest > self.positions:
            raise ValueError(
                f"positions: expected at least the longest modality's {longest} frames, got {self.positions}"
            )
        check_outputs(self.outputs, regression=self.regression, labels=self.labels, multilabel=self.multilabel)


class Contributions(NamedTuple):
    """What each modality contributes to the evaluator's prediction, per sample (3.3)."""

    pss: Tensor  # [B, M] in [0, 1], Eq. 2
    pas: Tensor | None  # [B, M], Eqs. 3-4; None without a target


# --- 3.4 Modality Enhancement -----------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """CA of Eqs. 7-8: one layer normalisation for queries, keys and values (as in MulT), then multi-head attention.

    q [n, T, d], parts [n, T_k, d] each, valid bool [n, T_k] each or None where all are -> [n, T, d]. Z is the parts
    one after another in time.
    """

    axis = 1  # along which the parts become Z

    def __init__(self, config: DREAMConfig, parts: int):
        super().__init__()
        Is("a DREAMConfig", DREAMConfig)("config", config)
        Whole(1)("parts", parts)
        source = config.width * (parts if self.axis == 2 else 1)
        self.norm = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(
            config.width, config.heads, config.dropout, kdim=source, vdim=source, batch_first=True
        )

    def forward(self, q: Tensor, parts: list[Tensor], valid: list[Tensor] | None) -> Tensor:
        z = torch.cat([self.norm(x) for x in parts], self.axis)
        off = None if valid is None else ~self._frames(valid)
        return self.attention(self.norm(q), z, z, key_padding_mask=off, need_weights=False)[0]

    def _frames(self, valid: list[Tensor]) -> Tensor:
        """The frames of Z that exist, bool."""
        return torch.cat(valid, 1)


class CrossModalBlock(nn.Module):
    """Eqs. 5-9 for one target: LN(x_t + CA(x_t, all) + sum_k CA(x_t, [x_t; x_k])).

    x[m] [n, T_m, d], valid[m] bool [n, T_m] -> [n, T_t, d]
    """

    def __init__(self, target: str, modalities: tuple[str, ...], config: DREAMConfig):
        super().__init__()
        Is("a DREAMConfig", DREAMConfig)("config", config)
        self.target = OneOf(*Several(Text, 1)("modalities", modalities))("target", target)
        self.others = [m for m in modalities if m != target]
        self.whole = self._attention(config, len(modalities))
        self.partial = nn.ModuleDict({k: self._attention(config, 2) for k in self.others})
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)

    def _attention(self, config: DREAMConfig, parts: int) -> CrossAttention:
        """The CA of one concatenation of so many modalities."""
        return CrossAttention(config, parts)

    def forward(self, x: Mapping[str, Tensor], valid: Mapping[str, Tensor] | None) -> Tensor:
        t = self.target
        take = lambda names: ([x[m] for m in names], None if valid is None else [valid[m] for m in names])
        total = x[t] + self.whole(x[t], *take([t, *self.others]))  # Eqs. 5 and 7
        for k in self.others:
            total = total + self.partial[k](x[t], *take([t, k]))  # Eqs. 6 and 8
        return self.norm(total)  # Eq. 9


# --- 3.5 Modality-aware Masked Fusion ---------------------------------------------------------------------------------


def mask_weights(w: Tensor, pss: Tensor) -> Tensor:
    """What Eq. 10 takes the softmax of: w (PSS + 1), [..., M].

    The product is not monotone: where w is negative, a larger PSS lowers the weight.
    """
    check_alike("pss", pss, w)
    return w * (pss + 1)


def distillation_loss(w: Tensor, pas: Tensor) -> Tensor:
    """Eq. 12, in our interpretation KL(softmax(PAS) || softmax(w)), mean over the batch: w, pas [B, M] -> [].

    The softmax makes a distribution of PAS, which is none and may be negative. No gradient reaches PAS.
    """
    check_alike("pas", pas, w)
    w = w.to(torch.promote_types(w.dtype, pas.dtype))
    q = torch.softmax(pas.detach().to(w), -1)
    return F.kl_div(torch.log_softmax(w, -1), q, reduction="batchmean")


# --- the model --------------------------------------------------------------------------------------------------------


class DREAM(Presets, Precomputes, nn.Module, config=DREAMConfig, presets={"paper": {}}):
    """The whole model: contributions from a frozen evaluator, enhancement, masked fusion (Eqs. 1-13).

    evaluator : a trained `Backbone` of the same modalities and outputs, in eval mode; it is frozen here (its parameters
        get ``requires_grad=False``) and stays in eval mode. Best one that is trained with zeros for what is missing,
        as those of `backbones.sequences` are
    preset : "paper", or one of `released.dream`
    options : fields of `DREAMConfig` (or of the preset's), over those of the preset; feature_shapes and outputs are
        needed. `for_data` takes them from a data set

    ``forward(batch)`` gives logits [B, K] (or [B, 2, L] with L labels) and, in training, the losses "task" and
    "distillation". It reads features and ``valid``, never ``present`` or ``observed``: a missing modality is zeros, and
    that it is missing has to show in its PSS; modality dropout alone asks what is there to drop. A sequence without a
    valid frame is zeros of full length. The batches are samples [B], not dialogues.

    Raises ValueError for an evaluator in train mode or of other modalities than the data, values that are not finite,
    and targets outside the scale.
    """

    config: Any

    def __init__(self, evaluator: nn.Module, *, preset: str = "paper", **options: Any):
        super().__init__()
        self.config = config = self.configured(preset, options)
        self.modalities = names = tuple(config.feature_shapes)
        self.evaluator = frozen(evaluator, names)
        M, d = len(names), config.width

        self.project = self._projections({m: width for m, (_, width) in frame_shapes(config.feature_shapes).items()})
        self.position = nn.Parameter(torch.randn(config.positions, d) * 0.02)
        self.enhancement = self._enhancers()
        self.fusion = self._blocks()
        self.weigh = MLP([M * d, *self._hidden_widths(), M], config.dropout)
        self.out = nn.Linear(d, config.outputs)
        self.table = ScoreTable()  # of the subsets' predictions, which `precompute` keeps

    def _projections(self, widths: dict[str, int]) -> nn.ModuleDict:
        """Frames of these widths to the width d."""
        return nn.ModuleDict({m: nn.Conv1d(k, self.config.width, 1, bias=False) for m, k in widths.items()})

    def _blocks(self) -> nn.ModuleDict:
        """Eqs. 5-9 for each modality as the target."""
        return nn.ModuleDict({m: CrossModalBlock(m, self.modalities, self.config) for m in self.modalities})

    def _enhancers(self) -> nn.ModuleList:
        """The blocks of 3.4: one set, which all repeats share."""
        return nn.ModuleList([self._blocks()])

    def _hidden_widths(self) -> list[int]:
        """Of the net that predicts w; the text says "linear projection", the parameter counts a hidden layer."""
        return [self.config.weight_hidden]

    @classmethod
    def for_data(
        cls,
        data: MultimodalDataset,
        evaluator: Any = None,
        valid: MultimodalDataset | None = None,
        config: Any = None,
        **options: Any,
    ) -> DREAM:
        """The model that fits a data set's shapes and targets.

        Bool targets [n, K] are labels with a logit each. Integer targets [n, L] are L yes-or-no labels with two logits
        each, as on IEMOCAP.

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
        preset = settings.pop("preset", "paper")
        cls.configured(preset, settings)  # before anything is trained
        known = getattr(Is("an nn.Module", nn.Module)("evaluator", evaluator), "modalities", data.modalities)
        if tuple(known) != data.modalities:
            raise ValueError(f"data: expected the evaluator's modalities {list(known)}, got {list(data.modalities)}")
        if config is not None and hasattr(evaluator, "modalities"):  # else the constructor says what is wrong with it
            pretrain(evaluator, data, Maybe(DATASET)("valid", valid), config)
        model: DREAM = cls(evaluator, preset=preset, **settings)
        return model if config is None else model.to(next(evaluator.parameters()).device)

    def train(self, mode: bool = True) -> DREAM:
        """As usual, but the evaluator stays in eval mode."""
        super().train(mode)
        self.evaluator.eval()
        return self

    def forward(self, batch: MultimodalBatch) -> Output:
        check_samples(batch, self.config.feature_shapes)
        y = batch.target
        if not self.training or y is None:
            return Output(self._predict(batch, self.contributions(batch.replace(target=None)).pss)[2], {})
        self._check_target(y)
        predictions = self.table(batch.ids) if len(self.table) else self._predictions(batch)
        if self.config.modality_dropout:
            kept = kept_modalities(batch.present, self.config.modality_dropout)
            batch, predictions = batch.drop(present=kept), cut_table(predictions, kept)
        pss, pas = self._credit(predictions, y)
        assert pas is not None
        w, masked, logits = self._predict(batch, pss)
        losses = {"task": task_loss(logits, y, lead=1)}  # L1 for scores, cross-entropy else
        if self.config.lambda_distill and self.config.masked_fusion:
            losses["distillation"] = self.config.lambda_distill * self._distillation(w, masked, pas)  # Eq. 13
        return Output(logits, losses)

    def _check_target(self, y: Tensor | None) -> None:
        """Raise ValueError for targets that do not fit the configuration."""
        c = self.config
        check_target(y, c.outputs, regression=c.regression, labels=c.labels, multilabel=c.multilabel)

    def weights(self, batch: MultimodalBatch) -> Tensor:
        """The fusion weights w' of Eq. 10, [B, M], each row summing to 1, in the mode that the model is in."""
        check_samples(batch, self.config.feature_shapes)
        return torch.softmax(self._predict(batch, self.contributions(batch.replace(target=None)).pss)[1], -1)

    # --- 3.3 Dynamic Modality Contribution Evaluation ---

    @torch.no_grad()
    def contributions(self, batch: MultimodalBatch) -> Contributions:
        """PSS and, where the batch has a target, PAS of every sample, from the evaluator as it is now: [B, M] each."""
        check_samples(batch, self.config.feature_shapes)
        return self._credit(self._predictions(batch), batch.target)

    def _predictions(self, batch: MultimodalBatch) -> Tensor:
        """What the evaluator predicts from every subset, int64 [B, S], or with a logit a label [B, K, S]."""
        blind = batch.replace(
            present=torch.ones_like(batch.present), observed=dict(batch.valid), target=None, complete=None, extras={}
        )
        masks = self._subsets(batch.device)
        # In full precision whatever the training's is, so that a score does not depend on where it is computed.
        with scoring(self.evaluator), torch.autocast(batch.device.type, enabled=False):
            logits = coalition_logits(
                self.evaluator, blind, masks, absent="zero_input", use_present=False, max_rows=65536
            )
            return self._joined(self._predicted(logits, masks))

    def _credit(self, predictions: Tensor, y: Tensor | None) -> Contributions:
        """PSS and PAS [B, M] of a table of `_predictions` and the targets."""
        with torch.autocast(predictions.device.type, enabled=False):
            target = None if y is None else self._joined(self._classes(y)[..., None])[..., 0]
            pss, pas = self._scores(predictions, target)
        if pss.ndim > 2:  # label by label
            pss, pas = pss.mean(1), None if pas is None else pas.mean(1)
        return Contributions(pss, pas)

    def _subsets(self, device: torch.device) -> Tensor:
        """The subsets of the modalities that the evaluator is asked about, bool [S, M]."""
        return coalition_masks(len(self.modalities), device)

    def _scores(self, predictions: Tensor, target: Tensor | None) -> Contributions:
        """Eqs. 1-4: predictions int64 [..., S] from the subsets, target [...] -> PSS and PAS [..., M]."""
        pas = None if target is None else prediction_accuracy_score(predictions, target)
        return Contributions(prediction_shift_score(predictions), pas)

    def _predicted(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Logits [S, B, K] (or [S, B, 2, L]) of subsets bool [S, M] -> what they predict, int64 [B, L, K or 1, S]."""
        tail = (2, self.config.labels) if self.config.labels else (self.config.outputs,)
        check_logits(logits, tail)
        if self.config.labels:
            return logits.argmax(2).movedim(0, -1)
        if self.config.multilabel:
            return discrete_predictions(logits, False, multilabel=True).movedim(0, -1)
        return (self._sides(logits) if self.config.regression else logits.argmax(-1)).t()[:, None]

    def _sides(self, scores: Tensor) -> Tensor:
        """What a score [..., 1] says as an integer: 1 where it is at least 0."""
        return discrete_predictions(scores, True)

    def _classes(self, y: Tensor) -> Tensor:
        """Targets [B], [B, L] or [B, K] as what `_predicted` gives, int64 [B, L, K or 1]."""
        if self.config.labels or self.config.multilabel:
            return y.long()
        return self._sides(y[:, None])[:, None] if self.config.regression else y[:, None]

    def _joined(self, classes: Tensor) -> Tensor:
        """int64 [B, L, K or 1, S] -> [B, S], one number for all labels; with a logit a label it stays [B, K, S]."""
        if self.config.multilabel:
            return classes
        return (classes << torch.arange(classes.shape[1], device=classes.device)[:, None]).sum(1)

    # --- 3.4 and 3.5 ---

    def _predict(self, batch: MultimodalBatch, pss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w [B, M] of 3.5, what Eq. 10 takes the softmax of, and the logits."""
        x, valid = self._embed(batch)
        x = self._enhanced(x, valid, pss)
        pool = lambda m, x: x.mean(1) if valid is None else masked_mean(x, valid[m])
        h = torch.stack([pool(m, self.fusion[m](x, valid)) for m in self.modalities], 1)  # [B, M, d]
        w = self.weigh(h.flatten(1))
        masked = self._masked(w, pss) if self.config.masked_fusion else w
        fused = (torch.softmax(masked, -1)[..., None] * h).sum(1)  # Eqs. 10-11
        return w, masked, split_labels(self.out(fused), self.config.labels)

    def _embed(self, batch: MultimodalBatch) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """x[m] [B, T_m, d] with positions, and the frames to attend to (None: all of them).

        A sequence without a valid frame is read as zeros of full length, so no attention is without a key.
        """
        x, valid = {}, {}
        for m, values in batch.features.items():
            seen = batch.valid[m]
            frames = self._frames(torch.where(seen[..., None], as_frames(values), 0), m)
            if frames.shape[1] > len(self.position):
                raise ValueError(
                    f"features[{m!r}]: expected at most {len(self.position)} frames (positions), got {frames.shape[1]}"
                )
            projected = self.project[m](frames.to(self.position.dtype).transpose(1, 2)).transpose(1, 2)
            x[m] = projected + self.position[: frames.shape[1]]
            valid[m] = seen | ~seen.any(-1, keepdim=True)
        whole = bool(torch.stack([v.all() for v in valid.values()]).all())
        return x, None if whole else valid

    def _frames(self, frames: Tensor, name: str) -> Tensor:
        """What is projected of a modality's frames [B, T, D]: the values as they are."""
        return frames

    def _enhanced(self, x: dict[str, Tensor], valid: dict[str, Tensor] | None, pss: Tensor) -> dict[str, Tensor]:
        """Eqs. 5-9, D times, for the samples and targets whose PSS is 0; the rest stays as it is."""
        chosen = torch.ones_like(pss) if self.config.enhance == "all" else pss == 0
        places = {m: chosen[:, i].nonzero()[:, 0] for i, m in enumerate(self.modalities)}
        for repeat in range(self.config.repeats):
            blocks = self.enhancement[min(repeat, len(self.enhancement) - 1)]
            before, x = x, dict(x)
            for m in self.modalities:
                x[m] = self._rebuilt(blocks.get_submodule(m), *self._seen(m, before, x, valid, pss), places[m])
        return x

    def _rebuilt(self, block: nn.Module, x: dict[str, Tensor], valid: dict[str, Tensor] | None, some: Tensor) -> Tensor:
        """The block's target, as the block gives it for some samples int64 [n], else as it was."""
        old = x[str(block.target)]
        if not len(some):
            return old
        if len(some) == len(old):
            return block(x, valid).to(old)
        take = lambda tensors: {m: tensor[some] for m, tensor in tensors.items()}
        new = block(take(x), None if valid is None else take(valid))
        return old.index_copy(0, some, new.to(old))

    def _seen(
        self,
        target: str,
        before: dict[str, Tensor],
        after: dict[str, Tensor],
        valid: dict[str, Tensor] | None,
        pss: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What a target is rebuilt from: all modalities as they were before the repeat, placeholders too."""
        return before, valid

    def _masked(self, w: Tensor, pss: Tensor) -> Tensor:
        """What Eq. 10 takes the softmax of, [B, M]."""
        return mask_weights(w, pss)

    def _distillation(self, w: Tensor, masked: Tensor, pas: Tensor) -> Tensor:
        """Eq. 12, from w and from what Eq. 10 makes of it, [B, M] each -> []."""
        return distillation_loss(w, pas)
