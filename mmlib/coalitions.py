"""What a model predicts from every subset of its modalities, and the Shapley values that follow.

A coalition is a set of modalities. Bit m of its number k says whether modality m belongs to it, so coalition 0 is
empty and coalition 2**M - 1 has everything; every table ``[..., 2**M]`` here is in that order.

Two halves. The pure tensor functions (`coalition_masks`, `shapley_values`, `prediction_shift_score`,
`prediction_accuracy_score`, `accuracy_values`) turn a table of values into credit per modality. `coalition_logits`
fills such a table: each modality is encoded once, a coalition is a selection between encodings, and only fusion and
decoder see a row per coalition and sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch import BATCH, MultimodalBatch, per_frame
from .checks import Array, Device, Flag, Function, Is, Maybe, Named, Number, OneOf, Text, Whole
from .layers import SharedBatch, scoring

__all__ = [
    "MAX_EXACT",
    "VALUE",
    "Pairs",
    "accuracy_values",
    "arrival_codes",
    "arrival_credit",
    "coalition_logits",
    "coalition_masks",
    "coalition_rows",
    "cut_table",
    "discrete_predictions",
    "monte_carlo_shapley",
    "permutation_shapley",
    "prediction_accuracy_score",
    "prediction_shift_score",
    "prediction_value",
    "scoring",
    "shapley_values",
    "shapley_weights",
    "subset_predictions",
    "subset_values",
]

MAX_EXACT = 16  # 2**16 coalitions a sample; beyond it, permutations are drawn


# --- values in, credit out -------------------------------------------------------------------------------------------


def coalition_masks(M: int, device: torch.device | str | None = None) -> Tensor:
    """All subsets of M modalities as bool [2**M, M]: row k is the binary expansion of k, bit m is modality m.

    Raises ValueError unless 1 <= M <= 16.
    """
    if Whole(1)("M", M) > MAX_EXACT:
        raise ValueError(
            f"M: expected an integer from 1 to {MAX_EXACT}, got {M}; with more modalities use monte_carlo_shapley"
        )
    return _bits(torch.arange(2**M, device=Maybe(Device())("device", device)), M)


def _bits(codes: Tensor, M: int) -> Tensor:
    """int64 [...] -> bool [..., M], the lowest bit first."""
    return (codes[..., None] >> torch.arange(M, device=codes.device)) & 1 == 1


def cut_table(table: Tensor, kept: Tensor) -> Tensor:
    """A table [*N, ..., 2**M] for what is left of each sample, bool [*N, M]: v'(S) = v(S and kept).

    What a model says of a sample that lost modalities, read from what it says of the sample as it was.
    """
    M = _players(table, "table")
    lead = Array("bool", "[*N, M]")("kept", kept).shape[:-1]
    if kept.shape[-1] != M or table.shape[: len(lead)] != lead:
        raise ValueError(f"kept: expected bool [*N, {M}] for a table {tuple(table.shape)}, got {tuple(kept.shape)}")
    bits = torch.arange(M, device=kept.device)
    codes = (kept.long() << bits).sum(-1, keepdim=True) & torch.arange(2**M, device=kept.device)  # [*N, 2**M]
    between = [1] * (table.ndim - codes.ndim)
    return table.gather(-1, codes.reshape(*lead, *between, 2**M).expand(table.shape))


def shapley_weights(M: int) -> tuple[float, ...]:
    """The weight s! (M - s - 1)! / M! of a coalition of s other modalities, for s = 0, ..., M - 1."""
    Whole(1)("M", M)
    return tuple(math.factorial(s) * math.factorial(M - s - 1) / math.factorial(M) for s in range(M))


def _build_matrix(M: int) -> Tensor:
    """W float64 [2**M, M] with phi = v @ W: a coalition adds to its members and takes from the others.

    W[k, m] = w(|k| - 1) where m is in k, and -w(|k|) where it is not.
    """
    masks = coalition_masks(M)
    weights = torch.tensor([0.0, *shapley_weights(M), 0.0], dtype=torch.float64)  # weights[s + 1] is w(s)
    size = masks.sum(-1, keepdim=True)
    return torch.where(masks, weights[size], -weights[size + 1])


def _build_pairs(M: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per modality the coalitions without it and the same with it, int64 [M, 2**(M-1)]; weights [2**(M-1)]."""
    others, m = torch.arange(2 ** (M - 1)), torch.arange(M)[:, None]
    without = (others >> m << (m + 1)) | (others & ((1 << m) - 1))  # a zero put in at bit m
    weights = torch.tensor(shapley_weights(M), dtype=torch.float64)[_bits(others, M).sum(-1)]
    return without, without + (1 << m), weights


_cached_matrix = lru_cache(maxsize=MAX_EXACT)(_build_matrix)
_cached_pairs = lru_cache(maxsize=MAX_EXACT)(_build_pairs)


TABLE = Array("float integer bool", "[..., 2**M]")


def _players(table: Tensor, name: str) -> int:
    """M, from a table [..., 2**M]."""
    count = TABLE(name, table).shape[-1]
    M = count.bit_length() - 1
    if count < 2 or count != 2**M:
        raise ValueError(
            f"{name}: expected [..., 2**M] with one entry per coalition of M >= 1 modalities, "
            f"got shape {tuple(table.shape)}"
        )
    if M > MAX_EXACT:
        raise ValueError(f"{name}: expected at most {MAX_EXACT} modalities, got {M}; use monte_carlo_shapley")
    return M


def _check_finite(values: Tensor, name: str) -> None:
    # A compiled graph cannot branch on values; there the caller's values are taken as they are.
    if not torch.compiler.is_compiling() and values.is_floating_point() and not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def shapley_values(v: Tensor) -> Tensor:
    """The exact Shapley value of each modality, from the value of every coalition: v [..., 2**M] -> [..., M].

    phi_m = sum over S without m of |S|! (M - |S| - 1)! / M! (v(S + m) - v(S)), as one product ``v @ W`` whose matrix
    is built once per M. The values sum to v(all) - v(nothing). Integers and bools count as floats. A modality that
    never changes v (an absent one) gets 0, up to rounding. Shapley (1953); MCE Eq. 5.

    Raises ValueError for a last axis that is no power of two, for M > 16, and for NaN or infinite values.
    """
    M = _players(v, "v")
    _check_finite(v, "v")
    if not v.is_floating_point():
        v = v.to(torch.get_default_dtype())
    matrix = _build_matrix(M) if torch.compiler.is_compiling() else _cached_matrix(M)
    return v @ matrix.to(v)


def prediction_shift_score(predictions: Tensor) -> Tensor:
    """How often a modality changes the prediction: int [..., 2**M] -> [..., M] in [0, 1], DREAM Eqs. 1-2.

    The Shapley-weighted share of the coalitions S without m where the prediction from S + m differs from that from S.
    Needs no label. Exactly 0 for a modality that never changes the prediction, 1 for one that always does.

    Raises TypeError for floating predictions (see `discrete_predictions`), ValueError as `shapley_values`.
    """
    if TABLE("predictions", predictions).is_floating_point():
        raise TypeError(
            f"predictions: expected integer classes, got {predictions.dtype}; use discrete_predictions for scores"
        )
    M = _players(predictions, "predictions")
    without, joined, weights = _build_pairs(M) if torch.compiler.is_compiling() else _cached_pairs(M)
    device, dtype = predictions.device, torch.get_default_dtype()
    shift = predictions[..., joined.to(device)] != predictions[..., without.to(device)]
    return (shift * weights.to(device, dtype)).sum(-1)


def prediction_accuracy_score(predictions: Tensor, target: Tensor) -> Tensor:
    """What a modality adds to being right: int [..., 2**M] and target [...] -> [..., M], DREAM Eqs. 3-4.

    The Shapley value of V(S) = |S| where the prediction from S equals the target, else 0; so V(nothing) = 0, and the
    scores sum to M where the full prediction is right and to 0 where it is wrong. A score can be negative.

    ``target`` broadcasts against ``predictions[..., 0]``; ValueError if it does not.
    """
    M = _players(predictions, "predictions")
    Array("integer bool", "[...]")("target", target)
    try:
        target = torch.broadcast_to(target, predictions.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"target: expected a shape that broadcasts to {tuple(predictions.shape[:-1])}, got {tuple(target.shape)}"
        ) from None
    size = coalition_masks(M, predictions.device).sum(-1)
    return shapley_values((predictions == target[..., None]) * size)


def arrival_codes(orders: Tensor, present: Tensor | None = None) -> Tensor:
    """The coalitions that grow along orders of arrival, as numbers: int64 [..., R, M] -> [..., R, M + 1], first 0.

    present : bool [..., M]; what is absent arrives and leaves the coalition as it is

    Raises ValueError for what is no permutation of 0 to M - 1.
    """
    M = Array("integer", "[..., R, M]")("orders", orders).shape[-1]
    if not torch.equal(orders.sort(-1).values, torch.arange(M).to(orders).expand_as(orders)):
        raise ValueError(f"orders: expected permutations of 0 to {M - 1} along the last axis, got others")
    joins = torch.ones_like(orders) << orders
    if Maybe(Array("bool", "[..., M]"))("present", present) is not None:
        assert present is not None
        if present.shape != (*orders.shape[:-2], M):
            raise ValueError(f"present: expected {[*orders.shape[:-2], M]}, got {list(present.shape)}")
        joins = joins * present[..., None, :].expand(orders.shape).gather(-1, orders)
    return F.pad(joins.cumsum(-1), (1, 0))


def arrival_credit(gains: Tensor, orders: Tensor) -> Tensor:
    """What each modality brings on arriving, a mean over orders: gains [..., R, M] of the arrivals -> [..., M].

    orders : int64 [..., R, M], or [R, M] for all alike; ``gains[..., r, k]`` is credited to ``orders[..., r, k]``
    """
    R, M = Array("float", "[..., R, M]")("gains", gains).shape[-2:]
    if Array("integer", "[..., R, M]")("orders", orders).shape not in (gains.shape, (R, M)) or not R:
        raise ValueError(f"orders: expected {list(gains.shape)} or {[R, M]} with R >= 1, got {list(orders.shape)}")
    place = orders.expand(gains.shape).flatten(-2)
    return gains.new_zeros(*gains.shape[:-2], M).scatter_add(-1, place, gains.flatten(-2)) / R


def permutation_shapley(value: Callable[[Tensor], Tensor], present: Tensor, orders: Tensor) -> Tensor:
    """Shapley values averaged over the given orders of arrival: int64 [B, R, M] -> [B, M].

    Each row of ``orders`` is a permutation of the modalities. A modality is credited with what it adds on arriving;
    absent modalities arrive and add nothing. With all M! orders the result is exact.

    value : bool [S, B, M] -> float [S, B], called once; in column b, no coalition but the empty one occurs twice. A
        sample with fewer distinct coalitions than another is padded with its empty one.
    present : bool [B, M]; coalitions are cut to it before they are evaluated

    Raises ValueError for wrong shapes, for M > 62, and where ``value`` returns a wrong shape, NaN or infinity.
    """
    Function("a function of masks [S, B, M]")("value", value)
    Array("integer", "[B, R, M]")("orders", orders)
    B, M = Array("bool", "[B, M]")("present", present).shape
    if not 1 <= M <= 62:
        raise ValueError(f"present: expected 1 to 62 modalities, got {M}")
    if orders.shape[0] != B or orders.shape[2] != M or orders.shape[1] < 1:
        raise ValueError(f"orders: expected int64 [{B}, R, {M}] with R >= 1, got {tuple(orders.shape)}")
    R = orders.shape[1]
    codes = arrival_codes(orders, present).flatten(1)

    # Per sample: sort, number the distinct coalitions, and remember each one's place.
    ordered, where = codes.sort(-1)
    place = torch.zeros_like(ordered)
    place[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    S = int(place[:, -1].max()) + 1 if B else 1
    distinct = codes.new_zeros(B, S).scatter_(1, place, ordered)  # what is left over stays 0, the empty coalition
    masks = _bits(distinct.t(), M)

    values = value(masks)
    if Array("float integer bool", "[...]")("value", values).shape != (S, B):
        raise ValueError(f"value: expected a function that returns [{S}, {B}] for masks [{S}, {B}, {M}], "
                         f"got shape {tuple(values.shape)}")  # fmt: skip
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    _check_finite(values, "value")
    index = torch.empty_like(place).scatter_(1, where, place)
    path = values.t().gather(1, index).view(B, R, M + 1)
    return arrival_credit(path[..., 1:] - path[..., :-1], orders)


def monte_carlo_shapley(
    value: Callable[[Tensor], Tensor],
    present: Tensor,
    permutations: int,
    generator: torch.Generator | None = None,
    antithetic: bool = False,
) -> Tensor:
    """Unbiased estimates of the Shapley values from random orders of arrival, for any M up to 62 -> [B, M].

    Every sample draws its own ``permutations`` orders. Coalitions that recur are evaluated once and re-weighted, so
    the cost never exceeds the exact one of 2**(present modalities). The estimates of a sample sum to
    v(all present) - v(nothing) whatever is drawn, and an absent modality gets exactly 0. Castro et al. (2009); MCE
    section 5.

    value : bool [S, B, M] -> float [S, B], called once (see `permutation_shapley`)
    antithetic : every second order is the reverse of the one before it

    Raises ValueError for permutations < 1 and as `permutation_shapley`.
    """
    Whole(1)("permutations", permutations)
    Maybe(Is("a torch.Generator", torch.Generator))("generator", generator)
    Flag()("antithetic", antithetic)
    B, M = Array("bool", "[B, M]")("present", present).shape
    drawn = (permutations + 1) // 2 if antithetic else permutations
    device = present.device if generator is None else generator.device
    orders = torch.rand(B, drawn, M, generator=generator, device=device, dtype=torch.float64).argsort(-1)
    if antithetic:
        orders = torch.stack([orders, orders.flip(-1)], 2).flatten(1, 2)[:, :permutations]
    return permutation_shapley(value, present, orders.to(present.device))


# --- logits to values ------------------------------------------------------------------------------------------------


def discrete_predictions(logits: Tensor, regression: bool, how: str = "sign_ge", *, multilabel: bool = False) -> Tensor:
    """The prediction as an integer: logits [..., K] -> int64 [...], which class, or for regression which side.

    how : for regression, "sign_ge" (1 where score >= 0), "sign_gt" (score > 0) or "round7" (the nearest integer in
        -3 to 3). Ignored for classes.
    multilabel : the K outputs are labels of their own: int64 [..., K], 1 where the logit is above 0
    """
    Array("float", "[..., K]")("logits", logits)
    OneOf("sign_ge", "sign_gt", "round7")("how", how)
    Flag()("regression", regression)
    if Flag()("multilabel", multilabel):
        return (logits > 0).long()
    if not regression:
        return logits.argmax(-1)
    if logits.shape[-1] != 1:
        raise ValueError(f"logits: expected one score [..., 1] for regression, got {tuple(logits.shape)}")
    score = logits[..., 0]
    if how == "sign_ge":
        return (score >= 0).long()
    if how == "sign_gt":
        return (score > 0).long()
    return score.clamp(-3, 3).round().long()


VALUE = Maybe(OneOf("accuracy", "tolerance", "dice", "iou"))


def prediction_value(logits: Tensor, target: Tensor, kind: str | None = None, tolerance: float = 0.5) -> Tensor:
    """f_acc of MCE Eq. 4: the value of a prediction, in [0, 1]; logits [B, K] or [B, K, ...] -> [B].

    kind : "accuracy" (0/1; for a segmentation the fraction of right places, for a bool target [B, K] that of right
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
        return _right(logits, target, tolerance)
    if kind not in ("accuracy", "dice", "iou"):
        raise ValueError(f"kind, value: expected 'accuracy', 'tolerance', 'dice' or 'iou', got {kind!r}")
    if target.dtype == torch.bool:
        if kind != "accuracy" or logits.shape != target.shape or target.ndim != 2:
            raise ValueError(
                f"value: bool labels expect 'accuracy' and logits [B, K] like them, got {kind!r}, "
                f"{tuple(logits.shape)} and {tuple(target.shape)}"
            )
        return _right(logits, target)
    if (logits.shape[:1] + logits.shape[2:]) != target.shape or (target.is_floating_point() and kind == "accuracy"):
        raise ValueError(
            f"value: {kind!r} expects classes {(*target.shape[:1], *logits.shape[2:])} for logits "
            f"{tuple(logits.shape)}, got {target.dtype} {tuple(target.shape)}"
        )
    logits = logits.movedim(1, -1)
    if kind == "accuracy":
        return _right(logits, target).reshape(len(logits), -1).mean(-1)
    if target.ndim < 2:
        raise ValueError(f"value: {kind!r} expects a segmentation target [B, ...], got {tuple(target.shape)}")
    classes = torch.arange(1, max(logits.shape[-1], 2), device=logits.device)[:, None]
    ours = _class(logits).flatten(1)[:, None] == classes  # [B, K - 1, places]
    true = target.flatten(1)[:, None] == classes
    both, either = (ours & true).sum(-1), (ours | true).sum(-1)
    score = both / either.clamp_min(1)
    if kind == "dice":
        score = 2 * both / (both + either).clamp_min(1)
    return torch.where(either == 0, 1, score).mean(-1).to(logits.dtype)


def _class(logits: Tensor) -> Tensor:
    """The class said, int64 [...] of [..., K]; of one logit, 1 where it is above 0."""
    return (logits[..., 0] > 0).long() if logits.shape[-1] == 1 else logits.argmax(-1)


def _right(logits: Tensor, target: Tensor, tolerance: float = 0.5) -> Tensor:
    """1 where a prediction [..., K] has the class or is near the score; of labels the fraction that is right."""
    if target.dtype == torch.bool:
        return ((logits > 0) == target).to(logits.dtype).mean(-1)
    if target.is_floating_point():
        return ((logits[..., 0] - target).abs() <= tolerance).to(logits.dtype)
    return (_class(logits) == target).to(logits.dtype)


def _kind_for(target: Tensor) -> str:
    if target.dtype == torch.bool:
        return "accuracy"
    return "dice" if target.ndim > 1 else "tolerance" if target.is_floating_point() else "accuracy"


def accuracy_values(
    logits: Tensor,
    target: Tensor,
    masks: Tensor | None = None,
    present: Tensor | None = None,
    empty: float | None = 0.0,
    tolerance: float = 0.5,
) -> Tensor:
    """The 0/1 value of each coalition, MCE Eq. 4: logits [S, *N, K] and target [*N] -> [*N, S].

    1 where the class is right (of one logit, class 1 is said where it is above 0), or for float targets where the error
    is at most ``tolerance``. For a bool target [*N, K] the fraction of its labels that are right, in [0, 1].

    masks : bool [S, M] or [S, B, M], the coalitions of the logits; default `coalition_masks` in order
    present : bool [*N, M]. A coalition with nothing present in the sample (in the whole dialogue) is empty too
    empty : v(nothing), by MCE's and DREAM's convention 0; None keeps what the prediction on nothing is worth
    """
    Array("float", "[S, ..., K]")("logits", logits)
    Maybe(Number())("empty", empty)
    Number(0)("tolerance", tolerance)
    Maybe(Array("bool", "[S, ..., M]"))("masks", masks)
    Maybe(Array("bool", "[*N, M]"))("present", present)
    N = Array("bool integer float", "[*N]")("target", target).shape
    if target.dtype == torch.bool:
        if logits.shape[1:] != target.shape or target.ndim < 2:
            raise ValueError(f"logits: expected [S, {tuple(target.shape)}] for labels, got {tuple(logits.shape)}")
        N = target.shape[:-1]
    elif target.is_floating_point():
        if logits.shape != (logits.shape[0], *target.shape, 1):
            raise ValueError(f"logits: expected [S, {tuple(target.shape)}, 1] for scores, got {tuple(logits.shape)}")
    elif logits.shape[1:-1] != target.shape:
        raise ValueError(f"logits: expected [S, {tuple(target.shape)}, K], got {tuple(logits.shape)}")
    values = _right(logits, target, tolerance)
    if empty is not None:
        S, lead = logits.shape[0], len(N)
        if masks is None:
            M = _players(logits.movedim(0, -1), "logits")
            masks = coalition_masks(M, logits.device)
        elif masks.shape[0] != S or masks.ndim not in (2, 3):
            raise ValueError(f"masks: expected bool [{S}, M] or [{S}, B, M], got {masks.dtype} {tuple(masks.shape)}")
        members = masks if masks.ndim == 3 else masks[:, None, :]
        if present is not None:
            if present.shape != (*N, masks.shape[-1]):
                raise ValueError(f"present: expected {(*N, masks.shape[-1])}, got {tuple(present.shape)}")
            members = members & _somewhere(present)
        nothing = ~members.any(-1)  # [S, 1] or [S, B]
        values = torch.where(nothing.reshape(*nothing.shape, *[1] * (lead - 1)), empty, values)
    return values.movedim(0, -1)


def _somewhere(present: Tensor) -> Tensor:
    """present [*N, M] -> [B, M]: for dialogues, whether any utterance has the modality."""
    return present if present.ndim == 2 else present.flatten(1, -2).any(1)


# --- batches to logits -----------------------------------------------------------------------------------------------


def coalition_logits(
    model: nn.Module,
    batch: MultimodalBatch,
    masks: Tensor,
    absent: str = "zero_feature",
    use_present: bool = True,
    max_rows: int | None = None,
    encodings: dict[str, Tensor] | None = None,
) -> Tensor:
    """The model's logits for every coalition of modalities: masks bool [S, M] -> [S, *N, K].

    Each modality is encoded once; only fusion and decoder see S x N rows. Runs in the mode that the model is in, with
    gradients where they are on: inside ``with scoring(model)`` for values that are only looked at, without it for
    values that share the training pass.

    model : a Backbone (encode, fuse, decode). One whose ``independent_encoders`` is not True, or any module that maps
        a batch to logits or to an Output, gets the coalitions as rows of one filled batch instead, with the same
        results at S times the cost
    masks : bool [S, M], True for the modalities of the coalition; [S, B, M] gives every sample its own coalitions.
        In dialogues (N = [B, U]) a coalition switches a modality off in the whole dialogue
    absent : what a modality that is off becomes, whether the coalition leaves it out or the data miss it.
        "zero_feature": h[m] = 0, and the fusion is told which modalities are there (MCE).
        "zero_input": the encoding of the modality's blank (zeros, or the fill token between the ends, on the sample's
        valid frames), and the fusion is told that everything is there (DREAM Eq. 1). Blanks that are alike are encoded
        once, unless the encoders use batch statistics
    use_present : coalitions with the same present modalities share one evaluation, and all that are empty, of all
        samples, take one: the prediction on nothing (blanks of full length; extras zero, or True). False evaluates
        every coalition of every sample by itself
    max_rows : evaluate at most about this many rows of N at a time. Bounds memory where gradients are off
    encodings : ``model.encode(batch)``, where the caller has it already

    Fusion sees a batch whose features are blank, since what it needs of them is in the encodings; present, valid,
    observed, ids and extras are those of each row. Raises TypeError or ValueError for masks of another type or shape,
    an unknown ``absent`` and max_rows < 1.
    """
    _check_call(model, batch, absent, encodings)
    M, B, S = len(batch.modalities), len(batch), len(Array("bool", "[S, ..., M]")("masks", masks))
    Flag()("use_present", use_present)
    Maybe(Whole(1))("max_rows", max_rows)
    if S < 1 or masks.shape not in ((S, M), (S, B, M)):
        raise ValueError(f"masks: expected [S, {M}] or [S, {B}, {M}] with S >= 1, got {tuple(masks.shape)}")
    masks = masks.to(batch.device)

    members = (masks if masks.ndim == 3 else masks[:, None, :]).expand(S, B, M)
    row = torch.arange(B, device=batch.device).expand(S, B).flatten()
    inverse = None
    if use_present:
        members = members & _somewhere(batch.present)
        row, members, inverse = _distinct(row, members.flatten(0, 1), B)
    else:
        members = members.flatten(0, 1)

    rows = _Rows(model, batch, absent, nothing=use_present, encodings=encodings)
    utterances = math.prod(batch.shape[1:])
    step = len(row) if max_rows is None else max(max_rows // max(utterances, 1), 1)
    parts = [rows.logits(r, e) for r, e in zip(row.split(step), members.split(step), strict=True)]
    logits = parts[0] if len(parts) == 1 else torch.cat(parts)
    if inverse is not None:
        logits = logits.index_select(0, inverse)
    return logits.unflatten(0, (S, B))


def coalition_rows(
    model: nn.Module,
    batch: MultimodalBatch,
    row: Tensor,
    members: Tensor,
    absent: str = "zero_feature",
    encodings: dict[str, Tensor] | None = None,
) -> Any:
    """What the model says of chosen samples under chosen coalitions: row int64 [R], members bool [R, M] -> [R, ..., K].

    For losses that name their pairs themselves; `coalition_logits` is the same for all pairs of a table. In
    mode and gradients as there. Whatever ``model.decode`` returns is handed back, a tensor or a tuple of tensors.
    """
    _check_call(model, batch, absent, encodings)
    Array("integer", "[R]")("row", row)
    if Array("bool", "[R, M]")("members", members).shape != (len(row), len(batch.modalities)):
        raise ValueError(
            f"row, members: expected int64 [R] and bool [R, {len(batch.modalities)}], got {tuple(row.shape)} and "
            f"{members.dtype} {tuple(members.shape)}"
        )
    try:
        return _Rows(model, batch, absent, nothing=False, encodings=encodings).logits(row, members)
    except IndexError as error:
        raise ValueError(f"row: expected places in [0, {len(batch)}) ({error})") from error


# --- pairs of a sample and a coalition of what it has ----------------------------------------------------------------


class Pairs:
    """Pairs of a sample n and a subset S, not empty, of its modalities M_n. MCE Eq. 10.

    row int64 [R] and members bool [R, M]: n and S. dropped bool [R, M]: M_n without S. ``full`` [B] says where each
    sample's own full set stands (a sample with nothing has the pair with the empty set, which no loss counts).

    chosen : bool [2**M], the subsets that the losses count, of those that occur in the batch; or None for none
    """

    def __init__(self, present: Tensor, shared: SharedBatch, chosen: Tensor | None):
        B, M = present.shape
        self.shared, self.size, self.own = shared, (B, 2**M), self.code_of(present)
        feasible, full = self.feasible(present), torch.arange(2**M, device=present.device)[:, None] == self.own
        self.chosen = torch.zeros_like(feasible[:, 0]) if chosen is None else chosen  # S_batch
        counted = feasible & self.chosen[:, None]
        self.code, self.row = (counted | full).nonzero().unbind(-1)
        self.counted, self.is_full = counted[self.code, self.row], full[self.code, self.row]
        self.members = (self.code[:, None] >> torch.arange(M, device=present.device)) & 1 == 1
        self.dropped = present[self.row] & ~self.members
        places = torch.arange(len(self.code), device=present.device)
        self.full = places.new_zeros(B).index_copy(0, self.row[self.is_full], places[self.is_full])

    @staticmethod
    def code_of(masks: Tensor) -> Tensor:
        """The number of a subset: bool [..., M] -> int64 [...]."""
        return (masks.long() << torch.arange(masks.shape[-1], device=masks.device)).sum(-1)

    @classmethod
    def feasible(cls, present: Tensor) -> Tensor:
        """Which subsets each sample has: bool [B, M] -> [2**M, B]."""
        codes = torch.arange(2 ** present.shape[-1], device=present.device)[:, None]
        return ((codes & ~cls.code_of(present)) == 0) & (codes > 0)

    def weights(self) -> Tensor:
        """The weight [R] of each pair in a mean over the subsets and, within one, over its samples. Eqs. 11 and 13."""
        samples = torch.zeros(self.size[1], device=self.row.device).index_add_(0, self.code, self.counted.float())
        return self.counted / (self.shared.count(samples)[self.code] * self.chosen.sum().clamp_min(1))

    def table(self, values: Tensor) -> Tensor:
        """Values [R] of the pairs as v_n(S) [B, 2**M], zero for the empty set and where there is no pair."""
        return values.new_zeros(self.size).index_put((self.row, self.code), values * (self.code > 0))


def _check_call(model: Any, batch: Any, absent: Any, encodings: Any) -> None:
    Is("an nn.Module", nn.Module)("model", model)
    BATCH("batch", batch)
    OneOf("zero_feature", "zero_input")("absent", absent)
    if encodings is not None and tuple(Named(Array("float", "[*N, d]"))("encodings", encodings)) != batch.modalities:
        raise ValueError(f"encodings: expected those of {list(batch.modalities)}, got {list(encodings)}")


def _distinct(row: Tensor, members: Tensor, B: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct (row, coalition) pairs among them, and where each of the given ones went.

    An empty coalition has nothing of its sample: its row becomes B, one beyond the last.
    """
    M = members.shape[-1]
    if M <= 40:
        code = (members << torch.arange(M, device=members.device)).sum(-1)
    else:
        code = torch.unique(members, dim=0, return_inverse=True)[1]
    row = torch.where(members.any(-1), row, B)
    pairs, inverse = torch.unique(code * (B + 1) + row, return_inverse=True)
    first = torch.empty_like(pairs).scatter_(0, inverse, torch.arange(len(inverse), device=pairs.device))
    return row[first], members[first], inverse


class _Rows:
    """Evaluates rows (sample, coalition) of one batch: encodings once, then selections between them."""

    def __init__(
        self,
        model: Any,
        batch: MultimodalBatch,
        absent: str,
        nothing: bool,
        encodings: dict[str, Tensor] | None,
    ):
        self.model, self.batch, self.filled = model, batch, absent == "zero_input"
        self.independent = getattr(model, "independent_encoders", False) is True
        # What a row carries beside its features; with `nothing`, one more row that has nothing of any sample.
        self.present, self.ids = batch.present, batch.ids
        self.valid, self.observed, self.extras = dict(batch.valid), dict(batch.observed), dict(batch.extras)
        self.tokens = {name: batch.blank(name) for name, x in batch.features.items() if not x.is_floating_point()}
        if nothing:
            last = _nothing(batch)
            self.present = torch.cat([batch.present, last.present])
            self.ids = None if batch.ids is None or last.ids is None else torch.cat([batch.ids, last.ids])
            for mine, its in (
                (self.valid, last.valid),
                (self.observed, last.observed),
                (self.extras, last.extras),
                (self.tokens, last.features),
            ):
                mine.update({name: torch.cat([x, its[name]]) for name, x in mine.items()})
        if not self.independent:
            return
        self.encodings: dict[str, Tensor] = self.model.encode(batch) if encodings is None else encodings
        if self.filled:
            self.fill, self.fill_row = self._encode_blanks()

    def _encode_blanks(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encodings of the distinct blanks of each modality, and which of them each row has."""
        batch, chosen, place = self.batch, {}, {}
        everything = torch.arange(len(self.present), device=batch.device)
        # Batch statistics see as many blanks as there are rows; a dialogue's encoding may depend on its extras.
        separate = _uses_batch_statistics(self.model) or (bool(self.extras) and len(batch.shape) > 1)
        for name in batch.modalities:
            if separate:
                chosen[name] = place[name] = everything
                continue
            looks = self.valid[name].flatten(1).long()
            if name in self.tokens:
                looks = torch.cat([looks, self.tokens[name].flatten(1)], 1)
            chosen[name], place[name] = _distinct_rows(looks)
        rows = max(len(c) for c in chosen.values())
        features, valid = {}, {}
        for name, x in batch.features.items():
            pick = torch.cat([chosen[name], chosen[name].new_zeros(rows - len(chosen[name]))])
            valid[name] = self.valid[name][pick]
            features[name] = self.tokens[name][pick] if name in self.tokens else x.new_zeros(rows, *x.shape[1:])
        blanks = MultimodalBatch(
            features,
            self.present.new_ones(rows, *self.present.shape[1:]),
            valid=valid,
            observed=valid,
            fill=batch.fill,
            extras={name: x[:rows] for name, x in self.extras.items()},
        )
        encoded: dict[str, Tensor] = self.model.encode(blanks)
        return {name: encoded[name][: len(chosen[name])] for name in encoded}, place

    def logits(self, row: Tensor, members: Tensor) -> Tensor:
        """row int64 [R], members bool [R, M] -> [R, *N[1:], K]."""
        batch, lead = self.batch, len(self.batch.shape)
        there = self.present.index_select(0, row)
        on = there & members.reshape(len(row), *[1] * (lead - 1), -1)
        told = torch.ones_like(on) if self.filled else on
        sample = row.clamp(max=len(batch) - 1)  # the row of nothing takes no part of any sample, so any will do
        take = lambda tensors: {name: x.index_select(0, row) for name, x in tensors.items()}  # of what rows carry
        valid = take(self.valid)
        observed = valid
        if not self.filled:
            observed = take(self.observed)
            observed = {name: observed[name] & on[..., m, None] for m, name in enumerate(batch.modalities)}
        features = {}
        for m, (name, x) in enumerate(batch.features.items()):
            if self.independent:  # a view that takes no memory
                features[name] = x.new_zeros(()).expand(len(row), *x.shape[1:])
            else:
                keep = per_frame(on[..., m, None].expand(valid[name].shape), x)
                off = self.tokens[name].index_select(0, row) if name in self.tokens else 0
                features[name] = torch.where(keep, x.index_select(0, sample), off)
        ids = None if self.ids is None else self.ids.index_select(0, row)
        rows = MultimodalBatch(
            features, told, None, valid, observed, ids=ids, fill=batch.fill, extras=take(self.extras)
        )
        if not self.independent:
            output = self.model(rows)
            return getattr(output, "logits", output)
        h = {}
        for m, name in enumerate(batch.modalities):
            x = self.encodings[name].index_select(0, sample)
            keep = on[..., m].reshape(on.shape[:-1] + (1,) * (x.ndim - lead))
            blank: Tensor | int = 0
            if self.filled:
                blank = self.fill[name]  # one row serves all
                if len(blank) > 1:
                    blank = blank.index_select(0, self.fill_row[name].index_select(0, row))
            h[name] = torch.where(keep, x, blank)
        return self.model.decode(self.model.fuse(h, told, rows))


def _nothing(batch: MultimodalBatch) -> MultimodalBatch:
    """One row with nothing of any sample in it: blanks of full length, no modality present, extras zero or True."""
    one = lambda x: torch.ones_like(x[:1]) if x.dtype == torch.bool else torch.zeros_like(x[:1])
    features = {}
    for name, x in batch.features.items():
        if x.is_floating_point():
            features[name] = torch.zeros_like(x[:1])
            continue
        # The ends that stay in a blank are special tokens, the same in every sample: any sample with tokens has them.
        known = batch.valid[name].flatten(0, -2)
        some = known.any(-1).byte().argmax()
        known, ids = known[some], x.flatten(0, -2)[some]
        first, last = known.byte().argmax(), len(known) - 1 - known.byte().flip(0).argmax()
        fill = torch.full_like(x[:1], batch.fill.get(name, 0))
        fill[..., 0] = torch.where(known.any(), ids[first], fill[..., 0])
        fill[..., -1] = torch.where(known.any(), ids[last], fill[..., -1])
        features[name] = fill
    valid = {name: torch.ones_like(v[:1]) for name, v in batch.valid.items()}
    return MultimodalBatch(
        features,
        torch.zeros_like(batch.present[:1]),
        valid=valid,
        observed={name: torch.zeros_like(v) for name, v in valid.items()},
        ids=None if batch.ids is None else torch.full_like(batch.ids[:1], -1),
        extras={name: one(x) for name, x in batch.extras.items()},
    )


def _distinct_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the distinct rows of x int64 [n, k] stand, and which of them each row is: int64 [r], [n]."""
    if bool((x == x[:1]).all()):
        return x.new_zeros(1), x.new_zeros(len(x))
    distinct, place = torch.unique(x, dim=0, return_inverse=True)
    return place.new_empty(len(distinct)).scatter_(0, place, torch.arange(len(x), device=x.device)), place


def _uses_batch_statistics(model: nn.Module) -> bool:
    """Whether an encoder normalises over the batch in the mode it is in."""
    encoders = getattr(model, "encoders", None)
    encoders = encoders if isinstance(encoders, nn.Module) else model
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(x, kinds) and (x.training or not x.track_running_stats) for x in encoders.modules())


def subset_values(
    model: nn.Module, batch: MultimodalBatch, *, empty: float | None = 0.0, tolerance: float = 0.5, **options: Any
) -> Tensor:
    """Per sample, which coalitions predict it right: [*N, 2**M] in [0, 1], ready for `shapley_values`.

    Runs in eval mode without gradients and restores the model's mode. ``options`` go to `coalition_logits`,
    ``empty`` and ``tolerance`` to `accuracy_values`. Raises ValueError for a batch without target.
    """
    BATCH("batch", batch)
    if batch.target is None:
        raise ValueError("batch: expected one with a target")
    masks = coalition_masks(len(batch.modalities), batch.device)
    with scoring(Is("an nn.Module", nn.Module)("model", model)):
        logits = coalition_logits(model, batch, masks, **options)
        return accuracy_values(logits, batch.target, masks, batch.present, empty, tolerance)


def subset_predictions(
    model: nn.Module,
    batch: MultimodalBatch,
    *,
    regression: bool = False,
    how: str = "sign_ge",
    multilabel: bool = False,
    **options: Any,
) -> Tensor:
    """Per sample, what each coalition predicts: int64 [*N, 2**M], ready for the two prediction scores.

    Runs in eval mode without gradients and restores the model's mode. ``options`` go to `coalition_logits`,
    ``regression``, ``how`` and ``multilabel`` to `discrete_predictions`. With ``multilabel`` it is [*N, K, 2**M]: both
    scores are then label by label [*N, K, M], and their means over labels are the sample's.
    """
    masks = coalition_masks(len(BATCH("batch", batch).modalities), batch.device)
    with scoring(Is("an nn.Module", nn.Module)("model", model)):
        logits = coalition_logits(model, batch, masks, **options)
    return discrete_predictions(logits, regression, how, multilabel=multilabel).movedim(0, -1)
