"""MCE: incentives for the modality that is rare and under-used, and features that survive without it.

Zhao, Zhang, Zou: "MCE: Towards a General Framework for Handling Missing Modalities under Imbalanced Missing Rates",
Pattern Recognition 2025. The file follows the paper's section 3: the factors of Learning Capability Enhancement (LCE),
the reconstruction module, the pairs of a sample and a subset, and the losses of Representation Capability Enhancement
(RCE). What the release does instead stands in ``released/mce.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.alone import UpperBounds
from ..backbones.base import BACKBONE, Backbone, check_splits
from ..backbones.completed import CompletedBackbone, ShowsCompleted
from ..batch import BATCH, MultimodalBatch, MultimodalDataset, Output
from ..checks import RATE, Array, Flag, Is, Maybe, Named, Number, Whole, check_options, option
from ..coalitions import (
    VALUE,
    Pairs,
    coalition_logits,
    coalition_rows,
    monte_carlo_shapley,
    prediction_value,
    shapley_values,
)
from ..layers import SharedBatch, SharesBatches
from ..losses import sample_losses
from ._presets import Presets

__all__ = [
    "MCE",
    "CompletedBackbone",
    "MCEConfig",
    "ReconstructionModule",
    "Step",
    "UpperBounds",
    "learning_state_factor",
    "missing_rate_factor",
    "prediction_value",
]

# --- 3.2.1 Missing rate balancing -------------------------------------------------------------------------------------


def missing_rate_factor(present: Tensor) -> Tensor:
    """A_m, how rare each modality is: bool [n, M] -> [M] with mean 1. MCE Eq. 3, divided by its mean.

    n / (samples that have m): a modality seen half as often weighs twice as much. Raises ValueError for a modality that
    no sample has, TypeError where ``present`` is not bool.
    """
    factor = inverse_rate(present)
    return factor / factor.mean()


def inverse_rate(present: Tensor) -> Tensor:
    """Eq. 3 as printed: N / count."""
    if not Array("bool", "[*n, M]")("present", present).numel():
        raise ValueError(f"present: expected [n, M] with at least one sample, got shape {tuple(present.shape)}")
    flat = present.flatten(0, -2)
    count = flat.sum(0)
    if not bool(count.all()):
        never = (count == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"present: expected every modality in some sample, modalities {never} are in none")
    return len(flat) / count.to(torch.get_default_dtype())


# --- 3.2.2 Learning state encouragement -------------------------------------------------------------------------------


def learning_state_factor(upper: Tensor, shapley: Tensor, present: Tensor, mask: bool = True) -> Tensor:
    """B_m, how far a modality stays behind what it can do alone: [M], [M], bool [B, M] -> [M]. MCE Eqs. 7-8.

    (U_m - phi_m) / count_m over the count of samples in the batch that have m; 0 where the batch has none.

    mask : negative gaps become 0, as the paper does; False keeps them
    """
    Array("float", "[M]")("upper", upper)
    Array("float", "[M]")("shapley", shapley)
    Array("bool", "[*B, M]")("present", present)
    Flag()("mask", mask)
    if present.shape[-1:] != upper.shape or upper.shape != shapley.shape:
        raise ValueError(
            f"upper, shapley, present: expected [M], [M] and bool [B, M], got {tuple(upper.shape)}, "
            f"{tuple(shapley.shape)} and {present.dtype} {tuple(present.shape)}"
        )
    count = present.flatten(0, -2).sum(0)
    gap = upper - shapley  # Eq. 7
    if mask:
        gap = gap.clamp_min(0)
    return torch.where(count > 0, gap / count.clamp_min(1), 0)


# --- 3.5 Network architecture -----------------------------------------------------------------------------------------


class ReconstructionModule(nn.Module):
    """f_rec of MCE Eq. 15: the modalities of a sample attend to each other; zeros stand for what is absent.

    h [*R, M, d] -> [*R, M, d]. A learned position for each modality, one pre-norm attention layer and a two-layer
    feed-forward net, both with residuals. Norms, heads, dropout and the bias-free query, key and value are the
    release's.

    width : d; ValueError unless ``heads`` divides it
    hidden : width of the feed-forward net
    """

    def __init__(self, modalities: int, width: int, heads: int = 8, hidden: int = 1024, dropout: float = 0.1):
        super().__init__()
        for name, value in (("modalities", modalities), ("width", width), ("heads", heads), ("hidden", hidden)):
            Whole(1)(name, value)
        RATE("dropout", dropout)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
        self.heads = heads
        self.position = nn.Parameter(torch.zeros(modalities, width))  # E_pos
        self.norm_attention, self.norm_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.dropout = dropout
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, h: Tensor) -> Tensor:
        if h.shape[-2:] != self.position.shape:
            raise ValueError(f"h: expected [*, {', '.join(map(str, self.position.shape))}], got {tuple(h.shape)}")
        h = h + self.position
        split = self.qkv(self.norm_attention(h)).unflatten(-1, (3, self.heads, -1))  # [*R, M, 3, heads, d / heads]
        q, k, v = split.movedim((-3, -2), (0, -3))  # each [*R, heads, M, d / heads]
        scores = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        scores = nn.functional.dropout(scores, self.dropout, self.training)
        mixed = (scores @ v).transpose(-3, -2).flatten(-2)
        h = h + nn.functional.dropout(self.out(mixed), self.dropout, self.training)
        return h + self.feed_forward(self.norm_hidden(h))


# --- 3.4 Objective ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MCEConfig:
    """The weights and parts of Eq. 14, and what the paper's settings differ in."""

    # a weight of 0 takes its term out; the paper: (1, 2, 1) IEMOCAP, (1, 1, 1) AV-MNIST
    lambda_single: float = option(1.0, Number(0))
    lambda_sub: float = option(1.0, Number(0))
    lambda_aux: float = option(1.0, Number(0))
    rate_factor: bool = option(True, Flag())  # A; without it 1
    state_factor: bool = option(True, Flag())  # B; without it 1
    attention_heads: int = option(8, Whole(1))
    hidden: int = option(1024, Whole(1))  # of f_rec: 1024 AV-MNIST, 2048 IEMOCAP, 512 nuScenes
    dropout: float = option(0.1, RATE)
    value: str | None = option(None, VALUE)  # f_acc of Eq. 4, see prediction_value
    tolerance: float = option(0.5, Number(0))
    permutations: int | None = option(None, Maybe(Whole(1)))  # Monte-Carlo orders a sample (sec. 5); None: exact

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Step:
    """What a training step has computed of a batch of B samples: R pairs, encodings of width d, K outputs."""

    batch: MultimodalBatch
    y: Tensor
    present: Tensor  # M_n, bool [B, M]
    pairs: Pairs
    h: dict[str, Tensor]  # encodings [B, d], Eq. 2
    logits: Tensor  # of every pair [R, K]
    completed: dict[str, Tensor]  # features of every pair, completed [R, d], Eq. 12
    main: Tensor  # the prediction itself: logits [B, K] of the pairs (n, M_n)
    full: dict[str, Tensor]  # their completed features [B, d]


_LAST = ("rate_factor", "state_factor", "shapley", "upper", "counts")


class MCE(Presets, SharesBatches, nn.Module, config=MCEConfig, presets={"paper": {}}):
    """A backbone with the reconstruction module, trained with MCE's factors and losses (Eq. 14, Algorithm 1).

    backbone : any backbone with independent encoders whose encodings have one width (``backbone.width``); its fusion
        and decoder are used as they are
    upper : the frozen bounds U of Eq. 6; needed unless ``state_factor=False``
    preset : "paper", or one of `released.mce`
    heads : per modality a decoder h[m] -> logits, for Eq. 9; default ``backbone.make_decoder(width)`` each
    present : bool [n, M] of the whole training split, for Eq. 3. `training.fit` tells it by itself, at every epoch
    options : fields of `MCEConfig` (or of `released.mce`), over those of the preset

    ``forward(batch)`` gives the logits of what is present and, in training, the losses "task", "single", "subset" and
    "completion", those with weight 0 left out. The batches are samples [B], not dialogues. After a training step,
    ``last`` holds the factors and what they came from. Several processes train as one does, but for what each draws for
    its own samples: dropout, and orders for Monte-Carlo Shapley values. Raises ValueError for what does not fit
    together.
    """

    config: MCEConfig
    rates: Tensor
    last_values: Tensor

    def __init__(
        self,
        backbone: Backbone,
        upper: UpperBounds | None = None,
        *,
        preset: str = "paper",
        heads: Mapping[str, nn.Module] | None = None,
        present: Tensor | None = None,
        **options: Any,
    ):
        super().__init__()
        self.config = config = self.configured(preset, options)
        Maybe(Is("UpperBounds", UpperBounds))("upper", upper)
        Maybe(Named(Is("an nn.Module", nn.Module)))("heads", heads)
        names = BACKBONE("backbone", backbone).modalities
        if not getattr(backbone, "independent_encoders", False) or getattr(backbone, "width", None) is None:
            raise ValueError(
                "backbone: expected one with independent encoders whose encodings have one width, `backbone.width`"
            )
        if self.needs_bounds(config) and upper is None:
            raise ValueError(
                "upper: expected UpperBounds; train a model of each modality alone and use UpperBounds.from_models, "
                "or leave B out with state_factor=False"
            )
        if upper is not None and upper.modalities != names:
            raise ValueError(f"upper: expected bounds of {list(names)}, got bounds of {list(upper.modalities)}")
        if heads is not None and set(heads) != set(names):
            raise ValueError(f"heads: expected one for each of {list(names)}, got {sorted(heads)}")
        reconstruction = ReconstructionModule(
            len(names), backbone.width, config.attention_heads, config.hidden, config.dropout
        )
        self.evaluator = CompletedBackbone(backbone, reconstruction)
        self.heads = nn.ModuleDict({m: heads[m] if heads else backbone.make_decoder(backbone.width) for m in names})
        self.upper = upper
        self.register_buffer("rates", torch.full((len(names),), torch.nan))
        self.register_buffer("last_values", torch.zeros(len(_LAST), len(names)))
        if present is not None:
            self.observe(present)

    @staticmethod
    def needs_bounds(config: Any) -> bool:
        """Whether U is looked up in a table that has to be there before the training."""
        return bool(config.state_factor)

    @classmethod
    def for_data(
        cls,
        data: MultimodalDataset,
        backbone: Any = None,
        valid: MultimodalDataset | None = None,
        config: Any = None,
        *,
        upper: UpperBounds | None = None,
        folds: int | None = None,
        **options: Any,
    ) -> MCE:
        """MCE on a backbone for this data set, with its first stage done: the frozen models behind the bounds U.

        Per modality a copy of its encoder and a decoder are trained on the samples of ``data`` that have it, asked for
        their column of `UpperBounds`, and dropped. ``upper``, and options that need no bounds, skip this.

        data : the training split as `fit` will see it: with a plan that is drawn once, the masked one
        folds : cross-fitted bounds, see `UpperBounds.trained`; None: of the samples that the models have seen
        config : how those models are trained, see `pretrain`; mostly the `TrainConfig` of the training itself
        options : as the constructor takes them: the preset, ``heads``, and fields of `MCEConfig`

        Raises ValueError for a modality that no sample of ``data`` has, and what `pretrain` raises.
        """
        check_splits(Is("a Backbone", Backbone)("backbone", backbone), data, valid, "data")
        preset = options.get("preset", "paper")
        settings = {name: value for name, value in options.items() if name not in ("preset", "heads", "present")}
        chosen, found = cls.chosen(preset, settings), cls.configured(preset, settings)
        if upper is None and chosen.needs_bounds(found):
            how = {"heads": options.get("heads"), "value": found.value, "tolerance": found.tolerance}
            upper = UpperBounds.trained(backbone, data, valid, config, folds=folds, **how)
        return cls(backbone, upper, **{"present": data.present, **options})

    @property
    def backbone(self) -> Backbone:
        """The backbone alone, without the reconstruction module."""
        return self.evaluator.plain

    @property
    def reconstruction(self) -> ReconstructionModule:
        return self.evaluator.reconstruction  # type: ignore[return-value]

    @property
    def last(self) -> dict[str, Tensor]:
        """Of the last training step, each [M]: rate_factor A, state_factor B, shapley, upper, counts."""
        return dict(zip(_LAST, self.last_values, strict=True))

    def observe(self, present: Tensor) -> None:
        """Set A from who has what in the training split, bool [n, M]. MCE Eq. 3; Algorithm 1, line 2."""
        M = len(self.evaluator.modalities)
        if Array("bool", "[*n, M]")("present", present).shape[-1:] != (M,):
            raise ValueError(f"present: expected [n, {M}], got {tuple(present.shape)}")
        self.rates = self._rate(present).to(self.rates)

    def on_epoch_start(self, state: Any) -> None:
        """The loop's event: the split as it is trained on in this epoch."""
        self.observe(state.train.present)
        if self.needs_bounds(self.config) and self.upper is not None:
            self.upper.check(state.train.ids)

    def forward(self, batch: MultimodalBatch) -> Output:
        config = self.config
        if not self.training or BATCH("batch", batch).target is None:
            return Output(self.evaluator(batch), {})
        if len(batch.shape) != 1:
            raise ValueError(f"batch: expected samples [B], got the leading shape {batch.shape}")
        if config.rate_factor and self.rates.isnan().any():
            raise ValueError("present: A is not known yet; call observe(train.present) before training without fit")
        step = self._step(batch)
        pairs, counted = step.pairs, self._counted(step)
        task = sample_losses(step.main, step.y, lead=1)
        losses = {"task": (task * counted).sum() / pairs.shared.count(counted.sum())}
        weights = self._factors(step)  # A_m B_m
        if config.lambda_single:
            losses["single"] = config.lambda_single * (weights * self._single_losses(step)).sum()  # Eq. 9
        if config.lambda_sub:
            each = sample_losses(step.logits, step.y[pairs.row], lead=1)  # of every pair [R]
            losses["subset"] = config.lambda_sub * (each * self._subset_weights(pairs)).sum()  # Eq. 11
        if config.lambda_aux:
            losses["completion"] = config.lambda_aux * self._completion_loss(step, weights)
        return Output(step.main, losses)

    def _step(self, batch: MultimodalBatch) -> Step:
        """The one pass of a step: encodings once, then every pair of Eq. 10."""
        h = self.evaluator.encode(batch)  # Eq. 2
        present = self._columns(batch.present)
        pairs = self._pairs(present, self.shared(batch))
        assert batch.target is not None
        return Step(batch, batch.target, present, pairs, h, *self._pass(batch, h, pairs))

    def _pairs(self, present: Tensor, shared: SharedBatch) -> Pairs:
        occurring = shared.sum(Pairs.feasible(present).sum(-1)) > 0
        return Pairs(present, shared, self._chosen(occurring))

    def _sees_all(self) -> bool:
        """Whether a step evaluates every pair; else only the predictions themselves, beside what Shapley values ask."""
        config = self.config
        return bool(config.lambda_sub or config.lambda_aux or (config.state_factor and config.permutations is None))

    def _chosen(self, occurring: Tensor) -> Tensor | None:
        return occurring if self._sees_all() else None

    def _pass(self, batch: MultimodalBatch, h: dict[str, Tensor], pairs: Pairs) -> tuple[Any, ...]:
        """The last four fields of `Step`; the prediction itself is that of the pairs (n, M_n)."""
        logits, completed = coalition_rows(ShowsCompleted(self.evaluator), batch, pairs.row, pairs.members, encodings=h)
        return logits, completed, logits[pairs.full], {m: x[pairs.full] for m, x in completed.items()}

    def _rate(self, present: Tensor) -> Tensor:
        return missing_rate_factor(present)

    def _columns(self, present: Tensor) -> Tensor:
        """Which modalities the losses take a sample to have."""
        return present

    def _counted(self, step: Step) -> Tensor:
        """The samples [B] of the task loss: those that have something."""
        return step.present.any(-1)

    # --- 3.2 LCE ---

    @torch.no_grad()
    def _factors(self, step: Step) -> Tensor:
        """A_m B_m [M], without gradient; what it came from goes to ``last``."""
        shared, one = step.pairs.shared, torch.ones_like(self.rates)
        present = shared.rows(step.present)  # of all processes
        rate = self.rates if self.config.rate_factor else one
        state, upper, shapley = one, torch.full_like(one, torch.nan), torch.full_like(one, torch.nan)
        if self.config.state_factor:
            upper = shared.sum((self._bounds(step) * step.present).sum(0).to(one))  # Eq. 6, summed over the batch
            shapley = shared.sum(self._shapley(step).to(one))
            state = self._state(upper, shapley, present)
        self.last_values.copy_(torch.stack([rate, state, shapley, upper, present.sum(0).to(rate)]))
        return rate * state

    def _bounds(self, step: Step) -> Tensor:
        """U of each sample [B, M]."""
        assert self.upper is not None
        if step.batch.ids is None:
            raise ValueError("batch: expected ids, by which the upper bounds are looked up")
        return self.upper(step.batch.ids)

    def _state(self, upper: Tensor, shapley: Tensor, present: Tensor) -> Tensor:
        return learning_state_factor(upper, shapley, present)

    def _value(self, logits: Tensor, y: Tensor) -> Tensor:
        return prediction_value(logits, y, self.config.value, self.config.tolerance)

    def _shapley(self, step: Step) -> Tensor:
        """phi [M] of Eq. 5, summed over the batch; exact, or from drawn orders (section 5)."""
        pairs, present, orders = step.pairs, step.present, self.config.permutations
        if not self._sees_all():
            return monte_carlo_shapley(lambda masks: self._visit(step, masks), present, orders or 1).sum(0)
        values = pairs.table(self._value(step.logits, step.y[pairs.row]))
        reach = pairs.own[:, None] & torch.arange(pairs.size[1], device=present.device)  # S cut to M_n
        values = values.gather(1, reach)
        if orders is None:
            return shapley_values(values.sum(0))  # linear: the value of the sum is the sum of the values
        return monte_carlo_shapley(lambda masks: values.gather(1, pairs.code_of(masks).t()).t(), present, orders).sum(0)

    def _visit(self, step: Step, masks: Tensor) -> Tensor:
        """v_n(S) of the coalitions that drawn orders visit, in a pass of their own: bool [S, B, M] -> [S, B]."""
        rows = step.batch.replace(present=step.present & step.batch.present)
        logits = coalition_logits(self.evaluator, rows, masks, encodings=step.h)
        y = step.y.repeat(len(masks), *[1] * (step.y.ndim - 1))
        return self._value(logits.flatten(0, 1), y).unflatten(0, logits.shape[:2]) * (masks & step.present).any(-1)

    # --- 3.3 RCE ---

    def _head(self, name: str, h: Tensor) -> Tensor:
        try:
            return self.heads[name](h)
        except RuntimeError as error:
            if "shape" not in str(error) and "size" not in str(error):
                raise
            raise ValueError(f"heads[{name!r}]: expected a decoder of encodings {list(h.shape)}: {error}") from error

    def _single_losses(self, step: Step) -> Tensor:
        """rho(f_dec^m(h_m), y) of Eq. 9 [M], the mean over the samples that have m."""
        losses = []
        for m, (name, h) in enumerate(step.h.items()):
            there = step.present[:, m]
            each = sample_losses(self._head(name, h), step.y, lead=1)
            losses.append((each * there).sum() / step.pairs.shared.count(there.sum()))
        return torch.stack(losses)

    def _subset_weights(self, pairs: Pairs) -> Tensor:
        return pairs.weights()

    def _completion_loss(self, step: Step, weights: Tensor) -> Tensor:
        """Eq. 13: how far the features of dropped modalities, rebuilt from the others, are from the encoded ones."""
        distances = []
        for name, h in step.h.items():
            gap = torch.linalg.vector_norm(step.completed[name] - h.detach()[step.pairs.row], dim=1)
            distances.append(gap.flatten(1).mean(-1) if gap.ndim > 1 else gap)
        each = torch.stack(distances, -1) * step.pairs.dropped * weights  # [R, M]
        each = each / step.pairs.dropped.sum(-1, keepdim=True).clamp_min(1)
        return (each.sum(-1) * step.pairs.weights()).sum()
