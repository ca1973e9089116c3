"""MCE: incentives for the modality that is rare and under-used, and features that survive without it.

Zhao, Zhang, Zou: "MCE: Towards a General Framework for Handling Missing Modalities under Imbalanced Missing Rates",
Pattern Recognition 2025. The file follows the paper's section 3: the factors of Learning Capability Enhancement (LCE),
the reconstruction module, and the losses of Representation Capability Enhancement (RCE). Where the paper leaves a
choice, or its release does something else, `MCEConfig` has an option; ``reading="released"`` sets them as the release
does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.base import BACKBONE, Backbone, pretrain
from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, Output
from ..checks import (
    RATE,
    Array,
    Flag,
    Is,
    Maybe,
    Named,
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
    coalition_rows,
    monte_carlo_shapley,
    scoring,
    shapley_values,
    shapley_weights,
)
from ..layers import SharedBatch, SharesBatches, same_draw
from ..losses import sample_losses

__all__ = [
    "MCE",
    "READINGS",
    "CompletedBackbone",
    "MCEConfig",
    "ReconstructionModule",
    "UpperBounds",
    "learning_state_factor",
    "missing_rate_factor",
    "prediction_value",
    "released_shapley",
]

# --- 3.2.1 Missing rate balancing -------------------------------------------------------------------------------------


def missing_rate_factor(present: Tensor) -> Tensor:
    """A_m, how rare each modality is: bool [n, M] -> [M] with mean 1. MCE Eq. 3, divided by its mean.

    n / (samples that have m): a modality seen half as often weighs twice as much. Raises ValueError for a modality that
    no sample has, TypeError where ``present`` is not bool.
    """
    factor = _inverse_rate(present)
    return factor / factor.mean()


def _inverse_rate(present: Tensor) -> Tensor:
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


VALUE = Maybe(OneOf("accuracy", "tolerance", "dice", "iou"))


def prediction_value(logits: Tensor, target: Tensor, kind: str | None = None, tolerance: float = 0.5) -> Tensor:
    """f_acc of MCE Eq. 4: what a prediction is worth, in [0, 1]; logits [B, K] or [B, K, ...] -> [B].

    kind : "accuracy" (0/1; for a segmentation the share of right places, for a bool target [B, K] that of right
        labels), "tolerance" (scores: 1 where the error is at most ``tolerance``), "dice" or "iou" (segmentation: mean
        over the classes 1, ..., K - 1, or of the one class where K = 1; a class that neither has is 1). Default:
        tolerance for float targets, accuracy for classes and labels, dice for a segmentation

    Raises ValueError for an unknown kind, or one that does not fit the target.
    """
    Array("float", "[B, ...]")("logits", logits)
    Array("bool integer float", "[B, ...]")("target", target)
    Number(0)("tolerance", tolerance)
    Maybe(Text)("kind", kind)
    kind = kind or _kind_for(target)
    if kind == "tolerance":
        if not target.is_floating_point() or logits.shape != (*target.shape, 1):
            raise ValueError(
                f"value: 'tolerance' expects float scores [B] and logits [B, 1], got {target.dtype} "
                f"{tuple(target.shape)} and {tuple(logits.shape)}"
            )
        return ((logits[..., 0] - target).abs() <= tolerance).to(logits.dtype)
    if kind not in ("accuracy", "dice", "iou"):
        raise ValueError(f"kind, value: expected 'accuracy', 'tolerance', 'dice' or 'iou', got {kind!r}")
    if target.dtype == torch.bool:
        if kind != "accuracy" or logits.shape != target.shape or target.ndim != 2:
            raise ValueError(
                f"value: bool labels expect 'accuracy' and logits [B, K] like them, got {kind!r}, "
                f"{tuple(logits.shape)} and {tuple(target.shape)}"
            )
        return ((logits > 0) == target).to(logits.dtype).mean(-1)
    if (logits.shape[:1] + logits.shape[2:]) != target.shape or (target.is_floating_point() and kind == "accuracy"):
        raise ValueError(
            f"value: {kind!r} expects classes {(*target.shape[:1], *logits.shape[2:])} for logits "
            f"{tuple(logits.shape)}, got {target.dtype} {tuple(target.shape)}"
        )
    binary = logits.shape[1] == 1
    found = (logits[:, 0] > 0).long() if binary else logits.argmax(1)
    if kind == "accuracy":
        return (found == target).to(logits.dtype).reshape(len(logits), -1).mean(-1)
    if target.ndim < 2:
        raise ValueError(f"value: {kind!r} expects a segmentation target [B, ...], got {tuple(target.shape)}")
    classes = torch.arange(1, 2 if binary else logits.shape[1], device=logits.device)[:, None]
    ours = found.flatten(1)[:, None] == classes  # [B, K - 1, places]
    true = target.flatten(1)[:, None] == classes
    both, either = (ours & true).sum(-1), (ours | true).sum(-1)
    score = both / either.clamp_min(1)
    if kind == "dice":
        score = 2 * both / (both + either).clamp_min(1)
    return torch.where(either == 0, 1, score).mean(-1).to(logits.dtype)


def _kind_for(target: Tensor) -> str:
    if target.dtype == torch.bool:
        return "accuracy"
    return "dice" if target.ndim > 1 else "tolerance" if target.is_floating_point() else "accuracy"


def released_shapley(counts: Tensor, players: int | None = None) -> Tensor:
    """The release's "Shapley value": counts c_T [..., 2**M], summed over a batch -> [..., M].

    phi_i = c_i / n + sum over T with i, |T| >= 2, of (|T| - 1)! (n - |T|)! / n! (c_T - c_i). The marginal is taken
    against {i}, not against T without i, so phi_i *falls* in the modality's own score; and c_T counts only the samples
    that have all of T.

    players : n; default M. The AV-MNIST release uses 3 for two modalities, the nuScenes one 7 for three
    """
    M = Array("float", "[..., 2**M]")("counts", counts).shape[-1].bit_length() - 1
    if M < 1 or counts.shape[-1] != 2**M:
        raise ValueError(f"counts: expected [..., 2**M], one entry a coalition, got {tuple(counts.shape)}")
    masks = coalition_masks(M, counts.device)
    n = M if players is None else Whole(1)("players", players)
    if n < M:
        raise ValueError(f"players: expected at least the {M} modalities, got {players}")
    weights = torch.tensor([0.0, *shapley_weights(n)], dtype=counts.dtype, device=counts.device)[masks.sum(-1)]
    alone = counts[..., 2 ** torch.arange(M, device=counts.device)]  # c_i
    joint = (masks & (masks.sum(-1, keepdim=True) > 1)) * weights[:, None]  # [2**M, M]
    return alone / n + counts @ joint - alone * joint.sum(0)


class UpperBounds(nn.Module):
    """U of MCE Eq. 6, as a table: which training sample the frozen model of each modality alone gets right.

    The models are frozen, so what they say of a training sample never changes: they run once, before the training,
    and a step only looks rows up.

    table : float [n, M] in [0, 1]
    ids : int64 [n], all different
    modalities : the names of the columns
    """

    table: Tensor
    ids: Tensor

    def __init__(self, table: Tensor, ids: Tensor, modalities: tuple[str, ...]):
        super().__init__()
        Array("float", "[n, M]")("table", table)
        Array("integer", "[n]")("ids", ids)
        Several(Text, 1)("modalities", modalities)
        if table.shape != (len(ids), len(modalities)) or not len(ids):
            raise ValueError(
                f"table: expected [{len(ids)}, {len(modalities)}], a row a sample and a column a modality, "
                f"got {tuple(table.shape)}"
            )
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError("table: expected values in [0, 1]")
        order = ids.argsort()
        if len(ids) > 1 and bool((ids[order][1:] == ids[order][:-1]).any()):
            raise ValueError("ids: expected different ids, some occur twice")
        self.modalities = tuple(modalities)
        self.register_buffer("table", table[order].to(torch.get_default_dtype()))
        self.register_buffer("ids", ids[order].long())

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, nn.Module],
        data: MultimodalDataset,
        *,
        value: str | None = None,
        tolerance: float = 0.5,
        batch_size: int = 1024,
    ) -> UpperBounds:
        """The table of ``data`` (the training split) from one trained model a modality.

        models : name -> a method or backbone of that modality alone; left in the mode they were in
        value, tolerance : as in `prediction_value`

        Raises ValueError for models of other modalities than the data's, or data without target.
        """
        Named(Is("an nn.Module", nn.Module))("models", models)
        VALUE("value", value)
        Number(0)("tolerance", tolerance)
        Whole(1)("batch_size", batch_size)
        if set(models) != set(DATASET("data", data).modalities):
            raise ValueError(f"models: expected one for each of {list(data.modalities)}, got {sorted(models)}")
        target = data.data.target
        if target is None:
            raise ValueError("data: expected a split with a target")
        columns = [_right(models[name], data, name, value, tolerance, batch_size) for name in data.modalities]
        table = torch.stack(columns, -1)
        return cls(table, data.ids.cpu(), data.modalities)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table: int64 [B] -> [B, M]. An id that is not there gets some other row; see `check`."""
        place = torch.searchsorted(self.ids, ids).clamp_max(len(self.ids) - 1)
        return self.table[place]

    def check(self, ids: Tensor | None) -> None:
        """Raise ValueError unless every id is in the table."""
        if ids is None:
            raise ValueError("ids: expected samples with ids, by which the upper bounds are looked up")
        Array("integer", "[n]")("ids", ids)
        if not bool((known := torch.isin(ids.to(self.ids.device), self.ids)).all()):
            raise ValueError(
                f"ids: {int((~known).sum())} of {len(ids)} training samples have no upper bound; compute them with "
                f"UpperBounds.from_models on this very split"
            )


def _right(
    model: nn.Module, data: MultimodalDataset, name: str, value: str | None, tolerance: float, batch_size: int = 1024
) -> Tensor:
    """What the model of one modality makes of each sample, [n]; 0 for those that do not have it."""
    own, device = data.select([name]), next(model.parameters()).device
    column = torch.zeros(len(data))
    with scoring(model):
        for rows in data.present[:, data.modalities.index(name)].nonzero()[:, 0].split(batch_size):
            batch = own[rows].to(device)
            said = model(batch)
            logits = getattr(said, "logits", said)
            worth = prediction_value(logits, batch.target, value, tolerance)  # type: ignore[arg-type]
            column[rows.cpu()] = worth.float().cpu()
    return column


class _Alone(nn.Module):
    """The frozen model of one modality: a copy of a backbone's encoder, and a decoder of its own."""

    def __init__(self, backbone: Backbone, name: str, head: nn.Module):
        super().__init__()
        self.backbone, self.head, self.name = copy.deepcopy(backbone), copy.deepcopy(head), name

    def forward(self, batch: MultimodalBatch) -> Tensor:
        """Logits of samples that all have the modality."""
        return self.head(self.backbone.encode_modality(self.name, batch.features[self.name], batch.valid[self.name]))


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


class CompletedBackbone(nn.Module):
    """A backbone with the reconstruction module between its encoders and its fusion; itself used like a backbone.

    Encodings [*N, d], or [*N, d, ...] with places, where every place is a sample to the module. The fusion sees
    completed features, so it is told that every modality is there.
    """

    independent_encoders = True

    def __init__(self, backbone: Backbone, reconstruction: nn.Module):
        super().__init__()
        self.plain: Backbone = BACKBONE("backbone", backbone)
        self.reconstruction: nn.Module = Is("an nn.Module", nn.Module)("reconstruction", reconstruction)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.plain.modalities

    @property
    def encoders(self) -> nn.ModuleDict:
        return self.plain.encoders

    def encode(self, batch: MultimodalBatch) -> dict[str, Tensor]:
        return self.plain.encode(batch)

    def complete(self, h: dict[str, Tensor], present: Tensor) -> dict[str, Tensor]:
        """h[m] [*N, d, ...], zeroed where ``present`` [*N, M] is False, through f_rec (Eqs. 12 and 15)."""
        lead = present.ndim - 1
        shapes = {tuple(x.shape) for x in h.values()}
        if len(shapes) > 1:
            raise ValueError(f"encodings: expected one shape for all modalities, got {sorted(shapes)}")
        stacked = torch.stack(list(h.values()), lead)  # [*N, M, d, ...]
        keep = present.reshape(*present.shape, *[1] * (stacked.ndim - present.ndim))
        stacked = torch.where(keep, stacked, 0)
        if stacked.ndim > lead + 2:  # places go in front
            places = stacked.shape[lead + 2 :]
            flat = stacked.flatten(lead + 2).movedim(-1, lead)
            completed = self.reconstruction(flat).movedim(lead, -1).unflatten(-1, places)
        else:
            completed = self.reconstruction(stacked)
        return dict(zip(h, completed.unbind(lead), strict=True))

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        return self.fuse_completed(self.complete(h, present), batch)

    def fuse_completed(self, completed: dict[str, Tensor], batch: MultimodalBatch) -> Tensor:
        return self.plain.fuse(completed, torch.ones_like(batch.present), batch)

    def decode(self, z: Tensor) -> Tensor:
        return self.plain.decode(z)

    def forward(self, batch: MultimodalBatch) -> Tensor:
        return self.decode(self.fuse(self.encode(batch), batch.present, batch))


class _Showing(nn.Module):
    """A `CompletedBackbone` whose answer is the logits *and* the completed features, for the coalition engine."""

    independent_encoders = True

    def __init__(self, backbone: CompletedBackbone):
        super().__init__()
        self.backbone = backbone

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        completed = self.backbone.complete(h, present)
        return self.backbone.fuse_completed(completed, batch), completed

    def decode(self, z: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.backbone.decode(z[0]), z[1]


# --- the method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MCEConfig:
    """The weights of Eq. 14 and every reading; each default is the paper's, where the paper says it.

    An alternative marked R is what the release does.
    """

    # a weight of 0 takes its term out; the paper: (1, 2, 1) IEMOCAP, (1, 1, 1) AV-MNIST
    lambda_single: float = option(1.0, Number(0))
    lambda_sub: float = option(1.0, Number(0))
    lambda_aux: float = option(1.0, Number(0))
    rate_factor: bool = option(True, Flag())  # A; without it 1
    state_factor: bool = option(True, Flag())  # B; without it 1

    attention_heads: int = option(8, Whole(1))
    hidden: int = option(1024, Whole(1))  # of f_rec: 1024 AV-MNIST, 2048 IEMOCAP, 512 nuScenes
    dropout: float = option(0.1, RATE)
    train_position: bool = option(True, Flag())  # E_pos is trained; R (IEMOCAP): False, it stays 0

    # f_acc of Eq. 4, see prediction_value
    value: str | None = option(None, VALUE)
    tolerance: float = option(0.5, Number(0))
    # values from the training pass (as R), or from one of their own in "eval" mode
    value_pass: str = option("shared", OneOf("shared", "eval"))
    shapley: str = option("exact", OneOf("exact", "released"))  # Eq. 5; R: "released", see released_shapley
    players: int | None = option(None, Maybe(Whole(1)))  # n of released_shapley
    permutations: int | None = option(None, Maybe(Whole(1)))  # Monte-Carlo orders a sample (sec. 5); None: exact
    subsets: int | None = option(None, Maybe(Whole(1)))  # coalitions drawn a step; None: all

    rate_norm: str = option("mean", OneOf("mean", "none"))  # A divided by its mean; R: "none"
    mask_negative: bool = option(True, Flag())  # B is 0 where a modality does better than alone
    state_norm: bool = option(True, Flag())  # B is per sample; R (nuScenes): False
    # U from frozen models; R (nuScenes): "current", the heads as they are
    upper_source: str = option("frozen", OneOf("frozen", "current"))

    # mean over the samples that have m; R: "released", over all, after f_rec
    single_loss: str = option("present", OneOf("present", "released"))
    # Eq. 11; R: "strict", without the full set, sum over a sample's subsets / (2^M_n - 1)
    subset_loss: str = option("mean", OneOf("mean", "strict"))
    # encodings are dropped, then completed; R: "reconstructed", completed, dropped, and completed again
    subset_features: str = option("encoded", OneOf("encoded", "reconstructed"))
    # R: "released", L1 to completed features, or "released_last", of one subset alone
    completion_loss: str = option("eq13", OneOf("eq13", "released", "released_last"))
    # samples with nothing count in no loss; R: "keep", in the task loss
    all_missing: str = option("exclude", OneOf("exclude", "keep"))
    # the column of present that the losses read for each modality; R (IEMOCAP): (0, 2, 1)
    columns: tuple[int, ...] | None = option(None, Maybe(Several(Whole(0))))

    def __post_init__(self) -> None:
        check_options(self)
        if self.shapley == "released" and (self.permutations or self.subsets):
            raise ValueError("shapley: 'released' needs every coalition; leave permutations and subsets out")
        if self.subsets and (self.subset_loss, self.completion_loss) != ("mean", "eq13"):
            raise ValueError("subsets: only Eqs. 11 and 13 are means over coalitions that drawing some leaves unbiased")
        if self.columns is not None:
            object.__setattr__(self, "columns", tuple(self.columns))


READINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "shapley": "released",
        "rate_norm": "none",
        "single_loss": "released",
        "subset_loss": "strict",
        "subset_features": "reconstructed",
        "completion_loss": "released",
        "all_missing": "keep",
    },
}


class MCE(SharesBatches, nn.Module):
    """A backbone with the reconstruction module, trained with MCE's factors and losses (Eq. 14, Algorithm 1).

    backbone : any backbone with independent encoders whose encodings have one width (``backbone.width``); its fusion
        and decoder are used as they are
    upper : the frozen bounds U of Eq. 6; needed unless ``state_factor=False`` or ``upper_source="current"``
    reading : "paper", or "released": the options as the MCE release has them (`READINGS`)
    heads : per modality a decoder h[m] -> logits, for Eq. 9; default ``backbone.make_decoder(width)`` each
    present : bool [n, M] of the whole training split, for Eq. 3. `training.fit` tells it by itself, at every epoch
    options : fields of `MCEConfig`, over those of the reading

    ``forward(batch)`` gives the logits of what is present and, in training, the losses "task", "single", "subset" and
    "completion", those with weight 0 left out. The batches are samples [B], not dialogues. After a training step,
    ``last`` holds the factors and what they came from. Several processes train as one does, but for what each draws for
    its own samples: dropout, and orders for Monte-Carlo Shapley values (``permutations`` or ``subsets``). Raises
    ValueError for what does not fit together.
    """

    rates: Tensor
    last_values: Tensor

    def __init__(
        self,
        backbone: Backbone,
        upper: UpperBounds | None = None,
        *,
        reading: str = "paper",
        heads: Mapping[str, nn.Module] | None = None,
        present: Tensor | None = None,
        **options: Any,
    ):
        super().__init__()
        self.config = config = from_reading(MCEConfig, READINGS, reading, options)
        Maybe(Is("UpperBounds", UpperBounds))("upper", upper)
        Maybe(Named(Is("an nn.Module", nn.Module)))("heads", heads)
        names = BACKBONE("backbone", backbone).modalities
        if not getattr(backbone, "independent_encoders", False) or getattr(backbone, "width", None) is None:
            raise ValueError(
                "backbone: expected one with independent encoders whose encodings have one width, `backbone.width`"
            )
        if config.columns is not None and sorted(config.columns) != list(range(len(names))):
            raise ValueError(f"columns: expected an order of 0 to {len(names) - 1}, got {config.columns}")
        if config.state_factor and config.upper_source == "frozen" and upper is None:
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
        reconstruction.position.requires_grad_(config.train_position)
        self.evaluator = CompletedBackbone(backbone, reconstruction)
        self.heads = nn.ModuleDict({m: heads[m] if heads else backbone.make_decoder(backbone.width) for m in names})
        self.upper = upper
        self.register_buffer("rates", torch.full((len(names),), torch.nan))
        self.register_buffer("last_values", torch.zeros(len(_LAST), len(names)))
        if present is not None:
            self.observe(present)

    @classmethod
    def for_data(
        cls,
        backbone: Backbone,
        train: MultimodalDataset,
        valid: MultimodalDataset | None = None,
        config: Any = None,
        **options: Any,
    ) -> MCE:
        """MCE on a backbone for this data set, with its first stage done: the frozen models behind the bounds U.

        Per modality a copy of its encoder and a decoder are trained on the samples of ``train`` that have it, asked for
        their column of `UpperBounds`, and dropped. Options that need no bounds skip this.

        train : the split as `fit` will see it: with a plan that is drawn once, the masked one
        config : how those models are trained, see `pretrain`; mostly the `TrainConfig` of the training itself
        options : as the constructor takes them: the reading, ``heads``, and fields of `MCEConfig`

        Raises ValueError for a modality that no sample of ``train`` has, and what `pretrain` raises.
        """
        Is("a Backbone", Backbone)("backbone", backbone)
        DATASET("train", train), Maybe(DATASET)("valid", valid)
        if train.modalities != backbone.modalities:
            raise ValueError(
                f"train: expected the modalities {list(backbone.modalities)}, got {list(train.modalities)}"
            )
        if valid is not None and valid.modalities != backbone.modalities:
            raise ValueError(
                f"valid: expected the modalities {list(backbone.modalities)}, got {list(valid.modalities)}"
            )
        settings = {name: value for name, value in options.items() if name not in ("reading", "heads", "present")}
        from_reading(MCEConfig, READINGS, options.get("reading", "paper"), settings)  # before anything is trained
        asked = {**READINGS.get(options.get("reading", "paper"), {}), **options}
        upper = None
        if asked.get("state_factor", True) and asked.get("upper_source", "frozen") == "frozen":
            value, tolerance = asked.get("value"), asked.get("tolerance", MCEConfig.tolerance)
            columns = []
            for name in train.modalities:
                own, held = _having(train, name), None if valid is None else _having(valid, name)
                if own is None:
                    raise ValueError(f"train: expected every modality in some sample, {name!r} is in none")
                heads = options.get("heads") or {name: backbone.make_decoder(backbone.width)}
                model = _Alone(backbone, name, heads[name])
                pretrain(model, own, held, config)
                columns.append(_right(model, train, name, value, tolerance))
            upper = UpperBounds(torch.stack(columns, -1), train.ids.cpu(), train.modalities)
        return cls(backbone, upper, **{"present": train.present, **options})

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
        seen = self._columns(present)
        factor = missing_rate_factor(seen) if self.config.rate_norm == "mean" else _inverse_rate(seen)
        self.rates = factor.to(self.rates)

    def on_epoch_start(self, state: Any) -> None:
        """The loop's event: the split as it is trained on in this epoch."""
        self.observe(state.train.present)
        if self.config.state_factor and self.upper is not None and self.config.upper_source == "frozen":
            self.upper.check(state.train.ids)

    def forward(self, batch: MultimodalBatch) -> Output:
        evaluator, config = self.evaluator, self.config
        BATCH("batch", batch)
        if not self.training or batch.target is None:
            return Output(evaluator(batch), {})
        if len(batch.shape) != 1:
            raise ValueError(f"batch: expected samples [B], got the leading shape {batch.shape}")
        if config.single_loss == "released" and batch.target.dtype == torch.bool:
            raise ValueError(
                "single_loss: 'released' gives missing samples the class 0, of which labels have none; use 'present'"
            )
        if config.rate_factor and self.rates.isnan().any():
            raise ValueError("present: A is not known yet; call observe(train.present) before training without fit")
        y, present, shared = batch.target, self._columns(batch.present), self.shared(batch)

        h = evaluator.encode(batch)  # Eq. 2
        pairs = self._pairs(present, shared)
        logits, completed, main, first_pass = self._predict(batch, h, present, pairs)
        each = sample_losses(logits, y[pairs.row], lead=1)  # of every pair of a sample and a coalition [R]
        task = sample_losses(main, y, lead=1)
        some = present.any(-1) if config.all_missing == "exclude" else torch.ones_like(present[:, 0])
        losses = {"task": (task * some).sum() / shared.count(some.sum())}

        weights = self._factors(batch, h, present, pairs, logits)  # A_m B_m, without gradient
        if config.lambda_single:
            single = self._single_losses(h, first_pass, present, y, shared)
            losses["single"] = config.lambda_single * (weights * single).sum()
        if config.lambda_sub:
            losses["subset"] = config.lambda_sub * (each * pairs.share(config.subset_loss)).sum()
        if config.lambda_aux:
            losses["completion"] = config.lambda_aux * self._completion_loss(h, completed, first_pass, pairs, weights)
        return Output(main, losses)

    # --- the pass over coalitions ---

    def _columns(self, present: Tensor) -> Tensor:
        return present if self.config.columns is None else present[..., list(self.config.columns)]

    def _pairs(self, present: Tensor, shared: SharedBatch | None = None) -> _Pairs:
        """The pairs (n, S), S a subset of M_n, that this step evaluates: all (Eq. 10), or all of the drawn S."""
        config = self.config
        wanted = bool(config.lambda_sub or config.lambda_aux)
        whole = config.state_factor and config.permutations is None and config.subsets is None
        return _Pairs(present, every=wanted or whole, draw=config.subsets if wanted else None, shared=shared)

    def _predict(
        self, batch: MultimodalBatch, h: dict[str, Tensor], present: Tensor, pairs: _Pairs
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Logits [R, K] and completed features [R, d] of the pairs; logits [B, K] and features [B, d] of all there is.

        In one pass, since the pair (n, M_n) is the prediction itself; with a second pass where completed features are
        dropped and completed again, or where the losses look at other columns.
        """
        showing = _Showing(self.evaluator)
        if self.config.subset_features == "encoded" and self.config.columns is None:
            logits, completed = coalition_rows(showing, batch, pairs.row, pairs.members, encodings=h)
            return logits, completed, logits[pairs.full], {m: x[pairs.full] for m, x in completed.items()}
        first_pass = self.evaluator.complete(h, batch.present)
        main = self.evaluator.decode(self.evaluator.fuse_completed(first_pass, batch))
        dropped = h if self.config.subset_features == "encoded" else first_pass
        logits, completed = coalition_rows(showing, batch, pairs.row, pairs.members, encodings=dropped)
        return torch.where(_like(pairs.is_full, logits), main[pairs.row], logits), completed, main, first_pass

    # --- LCE ---

    @torch.no_grad()
    def _factors(
        self, batch: MultimodalBatch, h: dict[str, Tensor], present: Tensor, pairs: _Pairs, logits: Tensor
    ) -> Tensor:
        """A_m B_m [M]; what it came from goes to ``last``."""
        config, y = self.config, batch.target
        assert y is not None
        one = torch.ones_like(self.rates)
        rate = self.rates if config.rate_factor else one
        shared = pairs.shared
        seen = shared.rows(present)
        count = seen.sum(0)
        state, upper, shapley = one, torch.full_like(one, torch.nan), torch.full_like(one, torch.nan)
        if config.state_factor:
            worth = lambda said, true: prediction_value(said, true, config.value, config.tolerance)
            if config.upper_source == "frozen":
                assert self.upper is not None
                if batch.ids is None:
                    raise ValueError("batch: expected ids, by which the upper bounds are looked up")
                bound = self.upper(batch.ids)
            else:
                bound = torch.stack([worth(self._head(m, x), y) for m, x in h.items()], -1)
            upper = shared.sum((bound * present).sum(0).to(one))  # Eq. 6, summed over the batch
            shapley = shared.sum(self._shapley(batch, h, present, pairs, logits, worth).to(one))
            state = learning_state_factor(upper, shapley, seen, config.mask_negative)
            if not config.state_norm:
                state = state * count
        values = torch.stack([rate, state, shapley, upper, count.to(rate)])
        self.last_values.copy_(values)
        return rate * state

    def _shapley(
        self, batch: MultimodalBatch, h: dict[str, Tensor], present: Tensor, pairs: _Pairs, logits: Tensor, worth: Any
    ) -> Tensor:
        """phi [M] of Eq. 5, summed over the batch."""
        config, y, M = self.config, batch.target, present.shape[-1]
        assert y is not None
        if config.value_pass == "eval":
            with scoring(self):
                h = self.evaluator.encode(batch)
                if pairs.every:
                    logits = self._predict(batch, h, present, pairs)[0]
        if not pairs.every:  # Monte-Carlo, with a pass for what the orders visit

            def visit(masks: Tensor) -> Tensor:
                rows = batch.replace(present=present & batch.present)
                said = coalition_logits(self.evaluator, rows, masks, encodings=h)
                value = worth(said.flatten(0, 1), y.repeat(len(masks), *[1] * (y.ndim - 1)))
                return value.unflatten(0, said.shape[:2]) * (masks & present).any(-1)

            if config.value_pass == "eval":
                with scoring(self):
                    return monte_carlo_shapley(visit, present, config.permutations or 1).sum(0)
            return monte_carlo_shapley(visit, present, config.permutations or 1).sum(0)
        values = pairs.table(worth(logits, y[pairs.row]))  # v_n(S) [B, 2**M], 0 for the empty and for what n lacks
        if config.shapley == "released":
            return released_shapley(values.sum(0), config.players)
        reach = pairs.code_of(present)[:, None] & torch.arange(2**M, device=present.device)  # S cut to M_n
        values = values.gather(1, reach)
        if config.permutations is None:
            return shapley_values(values.sum(0))  # linear: the value of the sum is the sum of the values
        lookup = lambda masks: values.gather(1, pairs.code_of(masks).t()).t()
        return monte_carlo_shapley(lookup, present, config.permutations).sum(0)

    # --- RCE ---

    def _head(self, name: str, h: Tensor) -> Tensor:
        try:
            return self.heads[name](h)
        except RuntimeError as error:
            if "shape" not in str(error) and "size" not in str(error):
                raise
            raise ValueError(f"heads[{name!r}]: expected a decoder of encodings {list(h.shape)}: {error}") from error

    def _single_losses(
        self, h: dict[str, Tensor], first_pass: dict[str, Tensor], present: Tensor, y: Tensor, shared: SharedBatch
    ) -> Tensor:
        """rho(f_dec^m(h_m), y) of Eq. 9, [M]."""
        released = self.config.single_loss == "released"
        losses = []
        for m, name in enumerate(h):
            there = present[:, m]
            if released:
                # The release zeroes logits and labels of missing samples: a constant loss, in a mean over all samples.
                logits = self._head(name, first_pass[name])
                logits = torch.where(_like(there, logits), logits, 0)
                losses.append(sample_losses(logits, torch.where(_like(there, y), y, 0), lead=1).mean())
            else:
                each = sample_losses(self._head(name, h[name]), y, lead=1)
                losses.append((each * there).sum() / shared.count(there.sum()))
        return torch.stack(losses)

    def _completion_loss(
        self,
        h: dict[str, Tensor],
        completed: dict[str, Tensor],
        first_pass: dict[str, Tensor],
        pairs: _Pairs,
        weights: Tensor,
    ) -> Tensor:
        """Eq. 13: how far the features of dropped modalities, rebuilt from the others, are from the encoded ones."""
        released = self.config.completion_loss != "eq13"
        distances = []
        for name in h:
            if released:
                gap = completed[name] - first_pass[name][pairs.row]
                distances.append(gap.abs().flatten(1).mean(-1))
            else:
                gap = completed[name] - h[name].detach()[pairs.row]
                norm = torch.linalg.vector_norm(gap, dim=1)
                distances.append(norm.flatten(1).mean(-1) if norm.ndim > 1 else norm)
        each = torch.stack(distances, -1) * pairs.dropped * weights  # [R, M]
        if not released:
            each = each / pairs.dropped.sum(-1, keepdim=True).clamp_min(1)
            return (each.sum(-1) * pairs.share("mean")).sum()
        last = self.config.completion_loss == "released_last"
        return (each.sum(-1) * pairs.share("last" if last else "strict")).sum()


_LAST = ("rate_factor", "state_factor", "shapley", "upper", "counts")


class _Pairs:
    """Pairs of a sample n and a coalition S, not empty, of its modalities M_n (Eq. 10).

    row int64 [R], members bool [R, M]; ``full`` [B] says where each sample's own full set stands (a sample with
    nothing has the pair with the empty coalition, which no loss counts).
    """

    def __init__(self, present: Tensor, every: bool = True, draw: int | None = None, shared: SharedBatch | None = None):
        B, M = present.shape
        self.shared = shared = shared or SharedBatch(B, present)
        codes = torch.arange(2**M, device=present.device)
        self.own = self.code_of(present)  # [B]
        full = codes[:, None] == self.own  # [2**M, B]
        feasible = ((codes[:, None] & ~self.own) == 0) & (codes[:, None] > 0)
        self.chosen = shared.sum(feasible.sum(-1)) > 0 if every else torch.zeros_like(feasible[:, 0])  # S_batch
        self.every = every and draw is None
        if draw is not None and every:
            count = min(draw, int(self.chosen.sum()))
            some = same_draw(torch.multinomial(self.chosen.float(), count)) if count else codes[:0]
            self.chosen = torch.zeros_like(self.chosen).index_fill(0, some, True)
        counted = feasible & self.chosen[:, None]
        code, self.row = (counted | full).nonzero().unbind(-1)
        self.code, self.size = code, (B, 2**M)
        self.counted = counted[code, self.row]
        self.is_full = full[code, self.row]
        self.members = (code[:, None] >> torch.arange(M, device=present.device)) & 1 == 1
        self.dropped = present[self.row] & ~self.members
        places = torch.arange(len(code), device=present.device)
        self.full = places.new_zeros(B).index_copy(0, self.row[self.is_full], places[self.is_full])

    @staticmethod
    def code_of(masks: Tensor) -> Tensor:
        """The number of a coalition: bool [..., M] -> int64 [...]."""
        return (masks.long() << torch.arange(masks.shape[-1], device=masks.device)).sum(-1)

    def share(self, how: str) -> Tensor:
        """The weight [R] of each pair in a loss: "mean" over S and, within it, over n (Eq. 11), or the release's.

        "strict" leaves the full sets out and divides by the 2^|M_n| - 1 subsets of a sample, "last" keeps only each
        sample's last strict subset.
        """
        B, _ = self.size
        if how == "mean":
            feasible = torch.zeros(self.size[1], device=self.row.device).index_add_(0, self.code, self.counted.float())
            return self.counted / (self.shared.count(feasible)[self.code] * self.chosen.sum().clamp_min(1))
        strict = self.counted & ~self.is_full
        if how == "last":
            last = torch.zeros(B, dtype=torch.int64, device=self.row.device)
            last = last.scatter_reduce(0, self.row, torch.where(strict, self.code, 0), "amax")
            strict = strict & (self.code == last[self.row])
        subsets = 2.0 ** self._sizes()[self.row] - 1
        return strict / (B * subsets.clamp_min(1))

    def _sizes(self) -> Tensor:
        """|M_n| [B]."""
        return self.members[self.full].sum(-1)

    def table(self, values: Tensor) -> Tensor:
        """Values [R] of the pairs as [B, 2**M], zero where there is no pair or the coalition is empty."""
        table = values.new_zeros(self.size)
        return table.index_put((self.row, self.code), values * (self.code > 0))


def _having(data: MultimodalDataset, name: str) -> MultimodalDataset | None:
    """One modality of the samples that have it; None where there is none."""
    rows = data.present[:, data.modalities.index(name)].nonzero()[:, 0]
    return data.select([name]).subset(rows) if len(rows) else None


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """mask [n] with as many axes as x [n, ...]."""
    return mask.reshape(len(mask), *[1] * (x.ndim - 1))
