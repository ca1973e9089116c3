"""Which modalities and frames of which sample are missing: the five positional functions, and the mask object.

A `MissingPlan` describes a protocol, ``plan.draw(dataset)`` draws a `MissingMask`, and ``mask.apply(dataset)`` takes
the values away. Every draw is a hash of (seed, sample id, modality, frame): a sample misses the same things whatever
the order of the samples, the batch, the epoch, the process or the method, unless resampling is asked for.

Two families of protocols differ in one respect that matters when a data set is cut into parts:

* *independent* ones ("none", "fixed", "bernoulli", "frames", "burst", "lnln" at a constant rate, "mar" on the class)
  decide for each sample alone: a part of the data set misses what it misses in the whole;
* *count-based* ones ("imbalanced", "exact_count", "heterogeneous", "per_class", "lnln" for training, "mar" on a
  modality, "mnar") meet counts or an average over the given set of ids, so a part drawn alone differs from the whole.

A *missing rate* is a fraction in [0, 1] of what could have been there. Shapes: ``n`` samples, ``N`` the leading shape
([n], or [B, U] for dialogues, where each real utterance is a sample), ``M`` modalities, ``T`` frames.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from .batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, frame_axis, tensor
from .checks import (
    PATH,
    Array,
    Device,
    Either,
    Flag,
    Is,
    Maybe,
    Named,
    Number,
    OneOf,
    Several,
    Text,
    Whole,
    check_known,
    check_options,
    option,
    shown,
)
from .files import atomic_write

__all__ = [
    "KINDS",
    "MissingMask",
    "MissingPlan",
    "bernoulli_mask",
    "exact_count_mask",
    "frame_mask",
    "heterogeneous_mask",
    "imbalanced_mask",
    "lnln_protocol",
]

Data = TypeVar("Data", MultimodalBatch, MultimodalDataset)


# --- Random numbers that belong to a sample -------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as the signed integer that torch stores."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# The constants of splitmix64 (Steele, Lea and Flood, 2014). torch has no unsigned 64-bit arithmetic, but products of
# int64 wrap modulo 2^64, and a logical right shift is an arithmetic one with its copied sign bits cleared.
_GOLDEN, _MUL1, _MUL2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix_(z: Tensor, spare: Tensor | None = None) -> Tensor:
    """splitmix64's finaliser, in place: a bijection of 64 bits after which neighbours look independent."""
    spare = torch.empty_like(z) if spare is None else spare
    for shift, factor in ((30, _MUL1), (27, _MUL2), (31, 1)):
        torch.bitwise_right_shift(z, shift, out=spare)
        spare.bitwise_and_((1 << (64 - shift)) - 1)
        z.bitwise_xor_(spare)
        if factor != 1:
            z.mul_(factor)
    return z


class _Source:
    """Random numbers for ``ids`` int64 [n] that depend on (seed, stream, id) and on nothing else."""

    def __init__(self, ids: Tensor, *seed: Any):
        self.ids, self.seed = ids, seed

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, *stream: Any) -> Tensor:
        """int64 [n], distinct for distinct ids, since every step is a bijection."""
        digest = hashlib.blake2b(repr((self.seed, stream)).encode(), digest_size=8).digest()
        return _mix_(self.ids * _GOLDEN + _signed(int.from_bytes(digest, "little")))

    def uniform(self, *stream: Any) -> Tensor:
        """float64 [n] in [0, 1), with 53 random bits."""
        return ((self.key(*stream) >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53

    def order(self, *stream: Any) -> Tensor:
        """A random order of the samples, int64 [n]: it shuffles ids, not positions."""
        return self.key(*stream).argsort()


def _positional(n: int, generator: Generator | None) -> _Source:
    """The source of the positional functions: ids 0 to n - 1 and one seed taken from ``generator``."""
    Whole(1)("n", n)
    Maybe(SOME)("generator", generator)
    device = None if generator is None else generator.device
    seed = int(torch.randint(1 << 62, (1,), generator=generator, device=device))
    return _Source(torch.arange(n), seed)


def _noise(keys: Tensor, frames: int, spare: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Uniform int32 [n, frames] from the samples' keys int64 [n]; each 64-bit hash serves two frames."""
    half = (frames + 1) // 2
    steps = torch.arange(1, half + 1, device=keys.device) * _GOLDEN
    z, other = spare or (torch.empty(len(keys), half, dtype=torch.int64, device=keys.device), None)
    torch.add(keys[:, None], steps, out=z)
    return _mix_(z, other).view(torch.int32)[:, :frames]


def _survives(keys: Tensor, frames: int, rate: Tensor) -> Tensor:
    """bool [n, frames]: True with probability 1 - rate [n]. What a low rate drops, a higher rate drops too."""
    half, n = (frames + 1) // 2, len(keys)
    # Blocks of rows whose 64-bit temporaries stay in the cache: six times faster than whole tensors.
    rows = max(1, (1 << 18) // max(half, 1)) if keys.device.type == "cpu" else n
    z = torch.empty(min(rows, n), half, dtype=torch.int64, device=keys.device)
    other = torch.empty_like(z)
    limit = (rate * 2.0**32).round().to(torch.int64) - (1 << 31)
    low = limit.clamp(max=(1 << 31) - 1).to(torch.int32)[:, None]
    result = torch.empty(n, frames, dtype=torch.bool, device=keys.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        noise = _noise(keys[start:stop], frames, (z[: stop - start], other[: stop - start]))
        torch.ge(noise, low[start:stop], out=result[start:stop])
    all_gone = limit > (1 << 31) - 1
    if all_gone.device.type != "cpu" or all_gone.any():  # elsewhere the answer would have to be waited for
        result &= ~all_gone[:, None]
    return result


# --- Checking what comes in -----------------------------------------------------------------------------------------


A_RATE = Number(0, 1)  # of what is missing
SOME = Is("a torch.Generator", Generator)
NAMES = Either(Text, Several(Text))


def _as_rate(value: Any, name: str) -> float:
    return float(A_RATE(name, value.item() if isinstance(value, Tensor) and value.ndim == 0 else value))


def _as_rates(rates: Any, name: str = "rates") -> list[float]:
    values = rates.tolist() if hasattr(rates, "tolist") else rates
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected one missing rate per modality, got {shown(rates)}")
    if not values:
        raise ValueError(f"{name}: expected one missing rate per modality, got none")
    return [_as_rate(r, f"{name}[{i}]") for i, r in enumerate(values)]


def _some_left(rates: Sequence[float], name: str = "rates") -> None:
    if all(r >= 1.0 for r in rates):
        raise ValueError(
            f"{name}: expected one missing rate below 1, since every sample keeps a modality, got {list(rates)}"
        )


def _as_lengths(lengths: Any, columns: int | None) -> Tensor:
    counts = tensor("lengths", lengths)
    rank = 1 if columns is None else 2
    if counts.ndim != rank or counts.is_floating_point() or counts.dtype == torch.bool or counts.numel() == 0:
        wanted = "[n]" if columns is None else "[n, M]"
        raise ValueError(f"lengths: expected integers {wanted}, got {counts.dtype} of shape {tuple(counts.shape)}")
    return counts.to(torch.int64)


def _within(lengths: Tensor, max_len: int, name: str = "max_len") -> Tensor:
    """bool [n, max_len]: frames before each sample's length."""
    Whole(1)(name, max_len)
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > max_len:
        raise ValueError(f"lengths: expected values from 0 to {name} = {max_len}, got from {low} to {high}")
    return torch.arange(max_len) < lengths[:, None]


# --- Whole modalities -----------------------------------------------------------------------------------------------


def _pattern_counts(n: int, rates: Sequence[float], allow_empty: bool = False) -> list[tuple[tuple[bool, ...], int]]:
    """How many of n samples get each pattern: BALM Eq. 36, [(pattern, count), ...], from all present downwards."""
    if len(rates) > 16:
        raise ValueError(f"rates: expected at most 16 modalities (2^M patterns are counted), got {len(rates)}")
    patterns = list(itertools.product((True, False), repeat=len(rates)))
    share = {p: math.prod(1 - r if there else r for there, r in zip(p, rates, strict=True)) for p in patterns}
    # The smallest double error below an exact product must not cost a sample: 1e-9 of a sample is added first.
    count = {p: math.floor(n * share[p] + 1e-9) if any(p) or allow_empty else 0 for p in patterns}
    # The share of the samples that would lose everything, and what rounding down left over, go in equal parts to the
    # one-modality patterns. Where a rate is 0 or 1 not all of those are possible; then to the smallest that are.
    possible = [p for p in patterns if any(p) and share[p] > 0]
    smallest = [p for p in possible if sum(p) == min(map(sum, possible))]
    if possible:
        each, odd = divmod(n - sum(count.values()), len(smallest))
        for i, p in enumerate(sorted(smallest, reverse=True)):
            count[p] += each + (i < odd)
    else:  # all rates are 1 and the samples may be empty
        count[patterns[-1]] = n
    return list(count.items())


def _imbalanced(order: Tensor, rates: Sequence[float], allow_empty: bool = False) -> Tensor:
    """bool [n, M]: the patterns' counts laid along ``order``."""
    counts = _pattern_counts(len(order), rates, allow_empty)
    patterns = torch.tensor([p for p, _ in counts])
    present = torch.empty(len(order), len(rates), dtype=torch.bool)
    present[order] = patterns.repeat_interleave(torch.tensor([c for _, c in counts]), 0)
    return present


def _bernoulli(source: _Source, rates: Tensor, available: Tensor, names: Sequence[Any], allow_empty: bool) -> Tensor:
    """bool [n, M]: independent per sample and modality; rows that lost everything are drawn again, given they do not.

    One second draw suffices: its first kept modality is j with probability (1 - r_j) prod_{k<j} r_k / (1 - prod r), and
    those after j are independent again, which is the distribution of a row that is known to be non-empty.
    """
    uniform = torch.stack([source.uniform("modality", name) for name in names], -1)
    present = (uniform >= rates) & available
    if allow_empty:
        return present
    rows = (~present.any(-1) & available.any(-1)).nonzero()[:, 0]
    if len(rows):
        again = _Source(source.ids[rows], *source.seed)
        gone = torch.where(available[rows], rates.expand(available.shape)[rows], 1.0)
        before = torch.cat([torch.ones(len(rows), 1, dtype=gone.dtype), gone.cumprod(-1)[:, :-1]], -1)
        weight = before * (1 - gone)
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, available[rows].to(gone.dtype))
        total = weight.cumsum(-1)
        first = (again.uniform("first")[:, None] * total[:, -1:] >= total).sum(-1, keepdim=True)
        place = torch.arange(len(names))
        later = torch.stack([again.uniform("again", name) for name in names], -1) >= gone
        present[rows] = (place == first) | ((place > first) & later)
    return present


def _exact_count(source: _Source, rates: Sequence[float], names: Sequence[Any], repair: bool) -> Tensor:
    """bool [n, M]: modality m is missing in int(n r_m) samples; rows that lost everything swap with richer ones."""
    n = len(source)
    present = torch.ones(n, len(rates), dtype=torch.bool)
    for m, (name, rate) in enumerate(zip(names, rates, strict=True)):
        present[source.order("modality", name)[: int(n * rate)], m] = False
    if not repair:
        return present
    total = int(present.sum())
    if total < n:
        raise ValueError(
            f"rates: expected to leave every one of {n} samples a modality, but when {[int(n * r) for r in rates]} of "
            f"them miss each, only {total} presences are left; lower the rates or allow samples with nothing"
        )
    # In each round a row with several modalities hands at most one to an empty row: counts per modality stay. Excess
    # presences are at least as many as empty rows (total >= n), and at most M - 1 in a row, so M - 1 rounds suffice.
    for turn in range(len(rates)):
        empty = ~present.any(-1)
        if not empty.any():
            break
        order = source.order("swap", turn)
        takers, givers = order[empty[order]], order[(present.sum(-1) > 1)[order]]
        k = min(len(takers), len(givers))
        takers, givers = takers[:k], givers[:k]
        given = _pick(source, givers, present[givers], names, turn)
        present[givers, given] = False
        present[takers, given] = True
    return present


def imbalanced_mask(n: int, rates: Sequence[float], generator: Generator | None = None) -> Tensor:
    """Exact pattern counts for unequal missing rates, shuffled: BALM Eq. 36 (corrected).

    Pattern e is given to floor(n prod_m (1 - r_m if e_m else r_m)) samples. The share prod(r) that would lose
    everything, and what rounding left, is split equally over the one-modality patterns (one more to the first of them
    until it is used up): every row has a True, and the achieved rates lie prod(r) / M below the asked, up to rounding.

    n : samples, at least 1
    rates : M missing rates in [0, 1], one below 1; a modality of rate 0 is never missing, one of rate 1 never there
    generator : of the shuffle; default torch's global one

    Returns bool [n, M]. Raises ValueError for other n and rates.
    """
    asked = _as_rates(rates)
    _some_left(asked)
    source = _positional(n, generator)
    return _to(_imbalanced(source.order("rows"), asked), generator)


def bernoulli_mask(n: int, rates: Sequence[float], generator: Generator | None = None) -> Tensor:
    """Independent missingness per sample and modality; empty rows are redrawn until they keep something.

    Conditioning on a non-empty row lowers the rates: modality m is missing in a fraction
    (r_m - prod r) / (1 - prod r) of the samples, in expectation.

    n : samples, at least 1
    rates : M missing rates in [0, 1], one below 1

    Returns bool [n, M], every row has a True. Raises ValueError for other n and rates.
    """
    asked = _as_rates(rates)
    _some_left(asked)
    source = _positional(n, generator)
    everything = torch.ones(n, len(asked), dtype=torch.bool)
    row = torch.tensor(asked, dtype=torch.float64)
    return _to(_bernoulli(source, row, everything, range(len(asked)), False), generator)


def exact_count_mask(n: int, rates: Sequence[float], generator: Generator | None = None) -> Tensor:
    """Exact counts per modality, dropped independently of each other (RedCore, MCE), with empty rows repaired.

    Modality m is missing in exactly int(n * r_m) samples (the product in double precision, rounded down, as in the
    releases: n = 100, r = 0.29 gives 28). A row that lost everything receives a modality from a row that has several,
    so the counts per modality stay.

    n : samples, at least 1
    rates : M missing rates in [0, 1], one below 1

    Returns bool [n, M], every row has a True. Raises ValueError for other n and rates, and where fewer than n presences
    are left, so that no repair exists.
    """
    asked = _as_rates(rates)
    _some_left(asked)
    source = _positional(n, generator)
    return _to(_exact_count(source, asked, range(len(asked)), True), generator)


def _to(mask: Tensor, generator: Generator | None) -> Tensor:
    return mask if generator is None else mask.to(generator.device)


# --- Frames ---------------------------------------------------------------------------------------------------------


def _some(mask: Tensor) -> Tensor:
    """``mask.any(-1)``, three times as fast for bool tensors of many columns."""
    return mask.view(torch.uint8).amax(-1).to(torch.bool)


def _ends(base: Tensor) -> Tensor:
    """bool [n, T]: the first and the last True of each row of ``base``."""
    flat = base.to(torch.uint8)
    first = flat.argmax(-1, keepdim=True)
    last = base.shape[-1] - 1 - flat.flip(-1).argmax(-1, keepdim=True)
    ends = torch.zeros_like(base).scatter_(1, first, True).scatter_(1, last, True)
    return ends & base


def _drop_frames(
    keys: Tensor, base: Tensor, rate: Tensor, keep_ends: bool = False, keep_one: bool = False, drop_one: bool = False
) -> Tensor:
    """bool [n, T]: ``base`` without the frames that are dropped, each with probability rate [n] (float64).

    keep_one and drop_one concern rows with a frame, and with two: there the frame that a rising rate drops last is
    kept, and the one that it drops first is dropped.
    """
    frames = base.shape[-1]
    keep = _survives(keys, frames, rate)
    keep &= base
    if drop_one:
        rows = ((keep == base).all(-1) & (base.sum(-1) > 1)).nonzero()[:, 0]
        noise = torch.where(base[rows], _noise(keys[rows], frames), torch.iinfo(torch.int32).max)
        keep[rows, noise.argmin(-1)] = False
    return _keep(keep, base, keys, keep_ends, keep_one)


def _keep(keep: Tensor, base: Tensor, keys: Tensor, ends: bool, one: bool) -> Tensor:
    """``keep`` with the first and last frame of ``base`` back, or with one frame where it has none left."""
    if ends:
        keep |= _ends(base)
    if one:
        rows = (~keep.any(-1) & base.any(-1)).nonzero()[:, 0]
        keep[rows, _last_to_go(keys[rows], base[rows])] = True
    return keep


def _last_to_go(keys: Tensor, base: Tensor) -> Tensor:
    """int64 [n]: of each row's frames in ``base`` bool [n, T] the one that a rising rate drops last."""
    noise = _noise(keys, base.shape[-1])
    return torch.where(base, noise, torch.iinfo(torch.int32).min).argmax(-1)


def _drop_bursts(source: _Source, stream: Any, base: Tensor, rate: Tensor, blocks: int) -> Tensor:
    """bool [n, T]: each row of ``base`` is cut into ``blocks`` equal stretches, and each stretch loses one block.

    A block of a stretch of s frames has floor(rate s + u) frames, u uniform: the expected fraction is exactly the rate.
    """
    length = base.sum(-1, keepdim=True)
    place = torch.arange(base.shape[-1], dtype=torch.int32)[None]
    if not torch.equal(base, place < length):  # frames are missing in between: count those that are there
        place = base.cumsum(-1, dtype=torch.int32) - 1
    part = torch.arange(blocks)
    edge = length * torch.arange(blocks + 1) // blocks
    start, stretch = edge[:, :-1], edge[:, 1:] - edge[:, :-1]
    extent = torch.stack([source.uniform("extent", stream, int(b)) for b in part], -1)
    where = torch.stack([source.uniform("start", stream, int(b)) for b in part], -1)
    size = (rate[:, None] * stretch + extent).floor().to(torch.int64)
    size = torch.minimum(size, stretch)
    begin = start + (where * (stretch - size + 1)).floor().to(torch.int64)
    first, end = begin.to(torch.int32), (begin + size).to(torch.int32)
    keep = base.clone()
    for b in range(blocks):
        keep &= (place < first[:, b, None]) | (place >= end[:, b, None])
    return keep


def frame_mask(
    lengths: Any,
    max_len: int,
    rate: Any,
    generator: Generator | None = None,
    keep_ends: bool = False,
    keep_one: bool = False,
) -> Tensor:
    """Drop frames independently of each other: bool [n, max_len], True where a frame within its length is kept.

    lengths : int [n], from 0 to max_len; frames from there on are padding and False
    rate : missing rate in [0, 1] of all samples, or one per sample [n]
    keep_ends : keep the first and the last frame of every sample (tokens: [CLS] and [SEP])
    keep_one : keep at least one frame of every sample that has any

    The same generator state drops nested sets: what a low rate drops, a higher rate drops too.
    Raises ValueError for wrong shapes, lengths outside [0, max_len] and rates outside [0, 1] or NaN.
    """
    counts = _as_lengths(lengths, None)
    Flag()("keep_ends", keep_ends)
    Flag()("keep_one", keep_one)
    base = _within(counts.cpu(), max_len)
    if (per_sample := tensor("rate", rate)).dtype == torch.bool:
        raise TypeError(f"rate: expected missing rates in [0, 1], got {shown(rate)}")
    per_sample = per_sample.to(torch.float64).cpu()
    if per_sample.ndim > 1 or (per_sample.ndim == 1 and per_sample.shape != counts.shape):
        raise ValueError(f"rate: expected a float or {len(counts)} of them, got shape {tuple(per_sample.shape)}")
    if not bool(((per_sample >= 0) & (per_sample <= 1)).all()):
        raise ValueError(f"rate: expected missing rates in [0, 1], got {rate!r:.80}")
    source = _positional(len(counts), generator)
    keep = _drop_frames(source.key("frame"), base, per_sample.expand(len(counts)), keep_ends, keep_one)
    return keep.to(counts.device)


def _heterogeneous(
    source: _Source, base: Sequence[Tensor], available: Tensor, eta: float, names: Sequence[Any]
) -> tuple[Tensor, list[Tensor]]:
    """DREAM A.4 on frames ``base[m]`` bool [n, T_m]; see `heterogeneous_mask`."""
    n, m = available.shape
    if m < 2:
        raise ValueError(f"modalities: heterogeneous missingness drops one of at least two modalities, got {m}")
    one = math.floor(eta * n / 5 + 1e-9)
    two = math.floor(2 * eta * n / 5 + 1e-9)
    rank = torch.empty(n, dtype=torch.int64)
    rank[source.order("set")] = torch.arange(n)
    inter = (rank < two) | ((rank >= 2 * two) & (rank < 2 * two + one))
    intra = (rank >= two) & (rank < 2 * two + one)
    code = 1 + (source.uniform("pattern") * ((1 << m) - 2)).floor().to(torch.int64)  # 1 to 2^M - 2: incomplete
    pattern = (code[:, None] >> torch.arange(m)) & 1 == 1
    present = available & (pattern | ~inter[:, None])
    _restore_modality(source, present, available, names)
    ratio = 0.1 + 0.8 * source.uniform("ratio")
    rows = intra.nonzero()[:, 0]
    observed = []
    for i, (name, frames) in enumerate(zip(names, base, strict=True)):
        keep = frames & present[:, i, None]
        keys = source.key("frame", name)[rows]
        keep[rows] = _drop_frames(keys, keep[rows], ratio[rows], keep_one=True, drop_one=True)
        observed.append(keep)
    return present, observed


def heterogeneous_mask(
    lengths: Any, max_len: int | Sequence[int], eta: float, generator: Generator | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Whole modalities in some samples, frames in others, both in a few: DREAM, appendix A.4.

    Of n samples floor(2 eta n / 5) lose modalities only, as many lose frames only, floor(eta n / 5) both; the sets are
    disjoint and random. Our reading of what the paper leaves open: the pattern is uniform over the incomplete non-empty
    ones; the frames are dropped at a ratio drawn from U(0.1, 0.9) per sample, of every modality that is left, where at
    least one frame is kept and, of two or more, at least one dropped.

    lengths : int [n, M]; 0 means that the modality is missing by nature
    max_len : frames per modality, or one number for all
    eta : fraction of samples affected, in [0, 1]

    Returns present bool [n, M] and a list of M observed bool [n, T].
    Raises ValueError for fewer than two modalities, other shapes, and eta outside [0, 1].
    """
    counts = _as_lengths(lengths, 2)
    Either(Whole(1), Several(Whole(1)))("max_len", max_len)
    asked = _as_rate(eta, "eta")
    limits: list[int] = list(max_len) if isinstance(max_len, Sequence) else [max_len] * counts.shape[1]
    if len(limits) != counts.shape[1]:
        raise ValueError(f"max_len: expected {counts.shape[1]} numbers of frames, got {len(limits)}")
    local = counts.cpu()
    base = [_within(local[:, m], limit, f"max_len[{m}]") for m, limit in enumerate(limits)]
    source = _positional(len(counts), generator)
    present, observed = _heterogeneous(source, base, local > 0, asked, range(len(limits)))
    return present.to(counts.device), [x.to(counts.device) for x in observed]


def _pick(source: _Source, rows: Tensor, among: Tensor, names: Sequence[Any], *stream: Any) -> Tensor:
    """int64 [k]: for each of the samples ``rows`` [k] a random modality of those ``among`` bool [k, M]."""
    keys = torch.stack([source.key("pick", *stream, name)[rows] for name in names], -1)
    return torch.where(among, keys, torch.iinfo(torch.int64).min).argmax(-1)


def _restore_modality(source: _Source, present: Tensor, available: Tensor, names: Sequence[Any]) -> int:
    """Give every sample that lost all it had one modality back, in place; how many were."""
    rows = (~present.any(-1) & available.any(-1)).nonzero()[:, 0]
    if len(rows):
        present[rows, _pick(source, rows, available[rows], names)] = True
    return len(rows)


# --- The mask object ------------------------------------------------------------------------------------------------

_OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fixed": ("present",),
    "imbalanced": ("rates", "assign"),
    "bernoulli": ("rates",),
    "exact_count": ("rates", "all_missing"),
    "frames": ("rates", "keep_ends", "keep_one", "shared"),
    "lnln": ("rates", "keep_ends", "keep_one", "shared"),
    "heterogeneous": ("rates",),
    "per_class": ("counts",),
    "mar": ("rates", "on", "slope", "statistic"),
    "mnar": ("rates", "slope", "statistic"),
    "burst": ("rates", "blocks", "keep_ends", "keep_one", "shared"),
}
KINDS = tuple(_OPTIONS)
"""The kinds of `MissingPlan`."""

_NEEDS_RATES = {"imbalanced", "bernoulli", "exact_count", "frames", "heterogeneous", "mar", "mnar", "burst"}
_WHOLE = {"imbalanced", "bernoulli", "exact_count"}


@dataclass(frozen=True)
class MissingPlan:
    """A missing-data protocol: what kind, how much, from which seed. ``plan.draw(dataset)`` gives its `MissingMask`.

    The kinds:

    * ``"none"``: nothing is dropped.
    * ``"fixed"``: only the modalities ``present`` stay, in every sample.
    * ``"imbalanced"``: exact pattern counts, BALM Eq. 36. With ``assign="shuffled"`` every sample gets its own pattern,
      with ``"blocked"`` patterns lie in contiguous blocks along ascending ids (the released habit).
    * ``"bernoulli"``: independent per sample and modality, given that something is left.
    * ``"exact_count"``: int(n r) samples miss each modality (RedCore, MCE). With ``all_missing="repair"`` empty samples
      are repaired by swaps, with ``"keep"`` they stay (the releases).
    * ``"frames"``: frames are dropped independently; ``"burst"``: in ``blocks`` contiguous blocks per sample.
    * ``"lnln"``: LNLN and DEAR. Without rates, for training: per sample and modality a rate from U(0, 1), which is 0
      for half (rounded down) of the samples of each modality. With rates: constant, as in their tests.
    * ``"heterogeneous"``: DREAM A.4, see `heterogeneous_mask`; ``rates`` is eta.
    * ``"per_class"``: SMIL. With ``counts={"audio": k}`` the first k samples of each class, in a random order, have it.
    * ``"mar"``: missing at random. The chance to lose a modality is logistic in a summary of the modality ``on``, which
      is always seen; or ``on="class"`` with one rate per class, ``rates={"audio": [r_0, ..., r_K-1]}``.
    * ``"mnar"``: missing not at random, logistic in a summary of the very values that are dropped.

    kind : one of `KINDS`
    rates : missing rates in [0, 1]: one for all modalities, or one each in the data set's order, or a mapping from
        names (others lose nothing). In "frames", "burst" and "lnln" a rate may also be a pair (low, high): uniform per
        sample; or the name of an entry of ``extras`` that holds one rate per sample
    seed : any integer
    resample : draw anew in every epoch, ``draw(dataset, epoch=e)``
    present : in "fixed", the names of the modalities that stay
    counts : in "per_class", per modality the samples of each class that have it
    assign, all_missing : see "imbalanced" and "exact_count"
    on, slope, statistic : in "mar" and "mnar", the log-odds change by slope per standard deviation of the summary:
        "mean" or "norm" of the values, or "length" in frames
    shared : the same frames in all modalities (of equal length); "equal": in those whose sequences are equally long
        with their padding, the others on their own
    blocks : in "burst", contiguous blocks per sample
    keep_ends : names of the modalities whose first and last frame stay; default those of token ids
    keep_one : every modality keeps a frame
    allow_empty : samples may lose everything. Otherwise none does: one that would keeps a modality or frame drawn at
        random (``achieved()["restored"]`` counts them), or ValueError where a "fixed" pattern leaves nothing
    then : a plan applied to what this one left, such as frames after modalities

    The module's first lines say which kinds depend on the set of ids. Raises ValueError or TypeError for settings that
    are unknown, out of range, or not used by the kind.
    """

    kind: str = option(MISSING, OneOf(*KINDS))
    rates: Any = None
    seed: int = option(0, Whole())
    resample: bool = option(False, Flag())
    present: tuple[str, ...] = option((), NAMES)
    counts: Mapping[str, int] = option({}, Named(Whole(0), 0))
    assign: str = option("shuffled", OneOf("shuffled", "blocked"))
    all_missing: str = option("repair", OneOf("repair", "keep"))
    on: str | None = option(None, Maybe(Text))
    slope: float = option(2.0, Number())
    statistic: str = option("mean", OneOf("mean", "norm", "length"))
    shared: bool | str = option(False, Either(Flag(), OneOf("equal")))
    blocks: int = option(1, Whole(1))
    keep_ends: tuple[str, ...] | None = option(None, Maybe(NAMES))
    keep_one: bool = option(False, Flag())
    allow_empty: bool = option(False, Flag())
    then: MissingPlan | None = None

    def __post_init__(self) -> None:
        check_options(self)
        Maybe(Is("a MissingPlan", MissingPlan))("then", self.then)
        object.__setattr__(self, "seed", int(self.seed))
        for name in ("present", "keep_ends"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "counts", dict(self.counts))
        object.__setattr__(self, "rates", _plain(self.rates))
        every = {"kind", "seed", "resample", "allow_empty", "then"}
        for name, value in self._changed().items():
            if name not in every and name not in _OPTIONS[self.kind]:
                raise ValueError(f"{name}: a plan of kind {self.kind!r} does not use it, got {value!r}")
        if self.kind in _NEEDS_RATES and self.rates is None:
            raise ValueError(f"rates: a plan of kind {self.kind!r} needs missing rates, got none")
        _check_rates(self)
        if self.kind == "fixed" and not self.present and not self.allow_empty:
            raise ValueError("present: expected the names of the modalities that stay, got none")
        if self.kind == "per_class" and not self.counts:
            raise ValueError("counts: expected {modality: samples per class that have it}, got none")
        if self.kind == "mar" and self.on is None:
            raise ValueError('on: a plan of kind "mar" needs the modality that decides, or "class"')

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def _changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        blank: dict[str, Any] = {"present": (), "counts": {}}
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != blank.get(f.name, f.default) or f.name == "kind"
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON's own types, defaults left out; `from_dict` reads it back."""
        out = dict(self._changed())
        for name in ("present", "keep_ends"):
            if name in out:
                out[name] = list(out[name])
        if self.then is not None:
            out["then"] = self.then.to_dict()
        return out

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> MissingPlan:
        """The plan of `to_dict`; ValueError for settings that do not exist."""
        values = dict(Named(Is("a setting", object), 0)("settings", settings))
        check_known("settings", values, [f.name for f in fields(cls)], "settings")
        if isinstance(values.get("then"), Mapping):
            values["then"] = cls.from_dict(values["then"])
        return cls(**values)

    def draw(
        self,
        dataset: MultimodalDataset | MultimodalBatch,
        epoch: int | None = None,
        device: torch.device | str | None = None,
    ) -> MissingMask:
        """The mask of ``dataset``'s samples, by their ids.

        epoch : the epoch that a plan with ``resample=True`` draws for (default 0); without it every epoch is the same.
        device : where the mask is kept (default the CPU). "frames" and "lnln" are also drawn there, the same on every
            device; other kinds are drawn on the CPU and moved

        Raises ValueError for modalities that the data set does not have, ids that repeat, targets that the kind needs
        and the data set lacks, and protocols that would leave a sample with nothing.
        """
        Either(DATASET, BATCH)("dataset", dataset)
        Maybe(Whole(0))("epoch", epoch)
        data = dataset.data if isinstance(dataset, MultimodalDataset) else dataset
        where = Device()("device", "cpu" if device is None else device)
        plan: MissingPlan | None = self
        there = True
        while plan is not None:
            there, plan = there and plan.kind in ("none", "frames", "lnln"), plan.then
        state = _State(data, where if there else torch.device("cpu"))
        plan, step = self, 0
        while plan is not None:
            turn = (epoch or 0) if plan.resample else "every epoch"
            # A second plan of the same seed must not repeat the numbers of the first: its place is part of the seed.
            _apply_plan(plan, state, _Source(state.ids, plan.seed, turn, step))
            plan, step = plan.then, step + 1
        return state.mask(self, epoch if self.resample else None).to(where)


def _plain(rates: Any) -> Any:
    """Rates as numbers, strings, lists and dicts, so that a plan compares, hashes and travels as JSON."""
    if isinstance(rates, Mapping):
        return {str(k): _plain(v) for k, v in rates.items()}
    if hasattr(rates, "tolist"):
        rates = rates.tolist()
    if isinstance(rates, (list, tuple)):
        return [_plain(r) for r in rates]
    return rates


def _check_rates(plan: MissingPlan) -> None:
    """Everything about a plan's rates that can be known without a data set."""
    rates = plan.rates
    if rates is None:
        return
    per_sample = plan.kind in ("frames", "burst", "lnln")
    if plan.kind == "heterogeneous":
        _as_rate(rates, "rates")
        return
    if plan.kind == "mar" and plan.on == "class":
        if not isinstance(rates, Mapping):
            raise TypeError(f'rates: with on="class" expected {{modality: one rate per class}}, got {rates!r}')
        for name, values in rates.items():
            _as_rates(values, f"rates[{name!r}]")
        return
    if isinstance(rates, Mapping):
        items = [(f"rates[{name!r}]", r) for name, r in rates.items()]
    elif isinstance(rates, list):
        items = [(f"rates[{i}]", r) for i, r in enumerate(rates)]
    else:
        items = [("rates", rates)]
    if not items:
        raise ValueError("rates: expected one missing rate per modality, got none")
    for name, rate in items:
        if per_sample and isinstance(rate, str):
            continue
        if per_sample and isinstance(rate, list):
            pair = _as_rates(rate, name)
            if len(pair) != 2 or pair[0] > pair[1]:
                raise ValueError(f"{name}: expected a pair (low, high) of missing rates, got {rate!r}")
        else:
            _as_rate(rate, name)
    # With a mapping or a number the modalities are not known yet; `draw` checks again.
    if plan.kind in _WHOLE and isinstance(rates, list) and not plan.allow_empty and plan.all_missing == "repair":
        _some_left(rates)


def _rates_of(plan: MissingPlan, names: Sequence[str]) -> list[Any]:
    """One rate (a number, a pair or a name) per modality of the data set."""
    rates = plan.rates
    if isinstance(rates, Mapping):
        check_known("rates", rates, names)
        return [rates.get(name, 0.0) for name in names]
    if isinstance(rates, list):
        if len(rates) != len(names):
            raise ValueError(f"rates: expected {len(names)} of them, for {list(names)}, got {len(rates)}: {rates}")
        return rates
    return [rates] * len(names)


LNLN_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def lnln_protocol(
    seed: int = 0,
    static_masks: bool = False,
    rates: Sequence[float] = LNLN_RATES,
    test_seed: int = 1111,
    keep_ends: Sequence[str] | None = None,
) -> tuple[MissingPlan, dict[str, MissingPlan]]:
    """LNLN's protocol, which DEAR inherits: (training plan, test plans by name "r=0.0" to "r=0.9").

    Training draws a rate per sample and modality from U(0, 1), which is 0 for half of the samples of each modality,
    anew in every epoch. Tests have one constant rate for all samples and modalities; their masks are those of
    ``test_seed`` whatever the run's seed, so all runs are tested alike. Scores are reported as the mean over the rates.

    seed : of training
    static_masks : as the public code behaves: training draws once, from ``test_seed`` and not the run's seed, and
        modalities whose sequences are equally long lose the same frames. (There, the choice of the half that loses
        nothing alone follows the run's seed; here it does not.)
    rates : of the tests, in [0, 1]
    keep_ends : modalities whose first and last frame stay; default those of token ids. Name text that is stored as
        features, whose [CLS] and [SEP] the protocol keeps too

    A sample that would lose everything keeps one frame, so a rate of 1 needs text whose ends stay.
    """
    Maybe(Several(Text))("keep_ends", keep_ends)
    ends = None if keep_ends is None else tuple(keep_ends)
    Whole()("seed", seed)
    Whole()("test_seed", test_seed)
    Flag()("static_masks", static_masks)
    shared: bool | str = "equal" if static_masks else False
    train = MissingPlan(
        "lnln", seed=test_seed if static_masks else seed, resample=not static_masks, keep_ends=ends, shared=shared
    )
    tests = {
        f"r={float(r)!r}": MissingPlan("lnln", float(r), seed=test_seed, keep_ends=ends, shared=shared)
        for r in _as_rates(rates)
    }
    return train, tests


class _State:
    """What is left of a data set while plans are applied to it, one row per real sample."""

    def __init__(self, data: MultimodalBatch, device: torch.device):
        if len(data) == 0:
            raise ValueError("dataset: expected at least one sample, got an empty one")
        self.device = device
        if data.ids is None:
            raise ValueError("dataset: expected samples with ids, got a batch without")
        self.data, self.names = data, data.modalities
        self.rows: Tensor | None = None
        ids = data.ids.to(device)
        if len(data.shape) > 1:  # dialogues: every real utterance is a sample, keyed by dialogue and place
            if ids.ndim < len(data.shape):
                place = torch.arange(math.prod(data.shape[1:]), device=device).reshape(1, *data.shape[1:]) + 1
                ids = _mix_(ids.reshape(-1, *[1] * (len(data.shape) - 1)) * _GOLDEN + place)
            real = data.extras.get("utterance")
            if real is not None:
                self.rows = real.to(device).reshape(-1).nonzero()[:, 0]
        self.ids = self.take(ids)
        if len(self.ids.unique()) != len(self.ids):
            raise ValueError("ids: expected every id once, got samples that share one; masks are keyed by id")
        self.available = self.take(data.present).clone()
        self.present = self.available.clone()
        self.observed: dict[str, Tensor] = {}
        self.restored = 0

    def take(self, x: Tensor) -> Tensor:
        """``x`` [*N, ...] with one row per real sample, where the mask is drawn."""
        x = x.to(self.device)
        flat = x.flatten(0, len(self.data.shape) - 1) if len(self.data.shape) > 1 else x
        return flat if self.rows is None else flat[self.rows]

    def put(self, x: Tensor) -> Tensor:
        """The inverse of `take`: back to [*N, ...], False where there is no sample."""
        if self.rows is not None:
            full = x.new_zeros(math.prod(self.data.shape), *x.shape[1:])
            full[self.rows] = x
            x = full
        return x.reshape(*self.data.shape, *x.shape[1:])

    def frames(self, name: str) -> Tensor:
        """bool [n, T]: the frames of modality ``name`` that are left (before its presence is applied)."""
        return self.observed[name] if name in self.observed else self.take(self.data.observed[name])

    def target(self) -> Tensor:
        y = self.data.target
        if y is None or y.is_floating_point() or tuple(y.shape) != self.data.shape:
            got = "none" if y is None else f"{y.dtype} {tuple(y.shape)}"
            raise ValueError(f"target: this plan needs integer classes {self.data.shape}, got {got}")
        return self.take(y)

    def mask(self, plan: MissingPlan, epoch: int | None) -> MissingMask:
        frames = {}
        for name, keep in self.observed.items():
            there = self.present[:, self.names.index(name)]
            if not there.all():
                self.observed[name] = keep & there[:, None]
            frames[name] = int(self.take(self.data.observed[name]).count_nonzero())
        assert self.data.ids is not None
        return MissingMask(
            self.put(self.present),
            {name: self.put(keep) for name, keep in self.observed.items()},
            self.data.ids.to(self.device),
            self.names,
            plan=plan,
            epoch=epoch,
            available=self.put(self.available),
            frames=frames,
            restored=self.restored,
        )


def _apply_plan(plan: MissingPlan, state: _State, source: _Source) -> None:
    """Take away what ``plan`` drops, in place."""
    check_known("present", plan.present, state.names)
    check_known("counts", plan.counts, state.names)
    check_known("keep_ends", plan.keep_ends or (), state.names)
    before = state.present
    if plan.kind in ("frames", "burst", "lnln", "heterogeneous"):
        _apply_frames(plan, state, source)
        return
    present = before & _whole(plan, state, source)
    if not plan.allow_empty and not (plan.kind == "exact_count" and plan.all_missing == "keep"):
        if plan.kind == "fixed":
            lost = int((before.any(-1) & ~present.any(-1)).sum())
            if lost:
                raise ValueError(
                    f"present: {lost} of {len(present)} samples have nothing of {list(plan.present)}; leave them out, "
                    f"or pass allow_empty=True"
                )
        state.restored += _restore_modality(source, present, before, state.names)
    state.present = present


def _whole(plan: MissingPlan, state: _State, source: _Source) -> Tensor:
    """bool [n, M]: the modalities that a plan of a modality-level kind leaves."""
    names, before = state.names, state.present
    n, width = before.shape
    if plan.kind == "none":
        return before
    if plan.kind == "fixed":
        return torch.tensor([name in plan.present for name in names]).expand(n, width)
    if plan.kind == "per_class":
        return _first_of_class(plan, state, source)
    rates = _rates_of(plan, names)
    if plan.kind in ("mar", "mnar"):
        return _dependent(plan, state, source, rates)
    if not plan.allow_empty and plan.all_missing == "repair":
        _some_left(rates)
    if plan.kind == "bernoulli":
        row = torch.tensor(rates, dtype=torch.float64)
        return _bernoulli(source, row, before, names, plan.allow_empty)
    if plan.kind == "exact_count":
        repair = plan.all_missing == "repair" and not plan.allow_empty
        return _exact_count(source, rates, names, repair)
    order = source.order("rows") if plan.assign == "shuffled" else _ascending(state)
    return _imbalanced(order, rates, plan.allow_empty)


def _ascending(state: _State) -> Tensor:
    """The samples by ascending id; utterances dialogue by dialogue, in their order."""
    data = state.data
    assert data.ids is not None
    if len(data.shape) == 1 or data.ids.ndim > 1:
        return state.ids.argsort()
    dialogues = data.ids.cpu().reshape(-1, *[1] * (len(data.shape) - 1)).expand(data.shape)
    return state.take(dialogues).argsort(stable=True)


def _first_of_class(plan: MissingPlan, state: _State, source: _Source) -> Tensor:
    """bool [n, M]: of each class the first k samples in a random order keep the modality (SMIL)."""
    present = state.present.clone()
    target = state.target()
    for name, count in plan.counts.items():
        m = state.names.index(name)
        order = source.order("class", name)
        order = order[state.present[order, m]]
        order = order[target[order].argsort(stable=True)]
        _, sizes = target[order].unique_consecutive(return_counts=True)
        start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        present[order, m] = torch.arange(len(order)) - start < count
    return present


def _dependent(plan: MissingPlan, state: _State, source: _Source, rates: list[Any]) -> Tensor:
    """bool [n, M]: modalities dropped with a probability that depends on the data (MAR, MNAR)."""
    present = state.present.clone()
    by_class = plan.kind == "mar" and plan.on == "class"
    decider = plan.on if plan.kind == "mar" and not by_class else None
    if decider is not None:
        check_known("on", (decider,), state.names)
        if rates[state.names.index(decider)] and not isinstance(plan.rates, Mapping):
            rates = [0.0 if name == decider else r for name, r in zip(state.names, rates, strict=True)]
        elif rates[state.names.index(decider)]:
            raise ValueError(f"rates[{decider!r}]: the modality that decides is always seen; expected 0 or no rate")
    for m, (name, rate) in enumerate(zip(state.names, rates, strict=True)):
        if rate == 0.0:
            continue
        if by_class:
            target = state.target()
            if int(target.min()) < 0 or int(target.max()) >= len(rate):
                raise ValueError(
                    f"rates[{name!r}]: expected one rate per class, {int(target.max()) + 1}, got {len(rate)}"
                )
            chance = torch.tensor(rate, dtype=torch.float64)[target]
        else:
            chance = _logistic(state, decider or name, plan.statistic, plan.slope, rate)
        present[:, m] &= source.uniform("modality", name) >= chance
    return present


def _logistic(state: _State, name: str, statistic: str, slope: float, rate: float) -> Tensor:
    """float64 [n]: sigmoid(a + slope z), z the standardised summary of modality ``name``, a such that the mean is rate.

    Samples in which the modality is not there have z = 0.
    """
    if rate in (0.0, 1.0):
        return torch.full((len(state.ids),), rate, dtype=torch.float64)
    there = state.present[:, state.names.index(name)]
    order = state.ids.argsort()  # sums in the order of the ids, so that no last digit depends on the samples' order
    z = _summary(state, name, statistic)[order]
    known = there[order]
    if known.any():
        z = z - z[known].mean()
        z = z / z[known].std(correction=0).clamp_min(1e-12)
    z = torch.where(known, z, 0.0)
    low, high = torch.tensor(-1e3, dtype=z.dtype), torch.tensor(1e3, dtype=z.dtype)
    for _ in range(100):
        middle = (low + high) / 2
        if torch.sigmoid(middle + slope * z).mean() < rate:
            low = middle
        else:
            high = middle
    chance = torch.empty_like(z)
    chance[order] = torch.sigmoid((low + high) / 2 + slope * z)
    return chance


def _summary(state: _State, name: str, statistic: str) -> Tensor:
    """float64 [n]: the mean or the Euclidean norm of the observed values of a modality, or its number of frames."""
    seen = state.frames(name)
    if statistic == "length":
        return seen.sum(-1).to(torch.float64)
    x = state.data.features[name]
    if not x.is_floating_point():
        raise ValueError(f'statistic: {statistic!r} says nothing about the token ids of {name!r}; expected "length"')
    if x.is_meta:
        raise ValueError(
            f"dataset: this plan looks at the values of {name!r}, which a streamed data set does not keep; draw it "
            f'from dataset.to("cpu"), and apply the mask to the streamed one'
        )
    values = state.take(x)
    axis = frame_axis(values, 1)
    per = values.movedim(axis, 1).flatten(2).to(torch.float64)
    per = torch.where(seen[..., None], per, 0.0)
    if statistic == "norm":
        return per.square().sum((1, 2)).sqrt()
    return per.sum((1, 2)) / (seen.sum(-1) * per.shape[-1]).clamp_min(1)


def _apply_frames(plan: MissingPlan, state: _State, source: _Source) -> None:
    """Drop frames, in place; a sample that would lose all keeps one, unless the plan allows it to be empty."""
    names, before = state.names, state.present
    n = len(before)
    base = {name: state.frames(name) for name in names}
    if plan.kind == "heterogeneous":
        present, observed = _heterogeneous(source, [base[m] for m in names], before, float(plan.rates), names)
        state.present = present
        state.observed.update(zip(names, observed, strict=True))
        return
    training = plan.kind == "lnln" and plan.rates is None
    rates = [0.0] * len(names) if training else _rates_of(plan, names)
    ends = plan.keep_ends
    if ends is None:
        ends = tuple(name for name in names if not state.data.features[name].is_floating_point())
    present = before.clone()
    for m, (name, asked) in enumerate(zip(names, rates, strict=True)):
        if asked == 0 and not training:
            continue
        stream = _stream(plan, name, base[name])
        key = source.key("frame", stream)
        if training:
            rate = source.uniform("rate", name)
            rate[source.order("zero", name)[: n // 2]] = 0.0
        else:
            rate = _rate_per_sample(state, source, name, asked)
        if plan.kind == "burst":
            keep = _drop_bursts(source, stream, base[name], rate, plan.blocks)
            keep = _keep(keep, base[name], key, name in ends, plan.keep_one)
        else:
            keep = _drop_frames(key, base[name], rate, name in ends, plan.keep_one)
        state.observed[name] = keep
        present[:, m] &= _some(keep)  # a modality without frames is not there
    state.present = present
    lost = (before.any(-1) & ~present.any(-1)).nonzero()[:, 0]
    if plan.allow_empty or not len(lost):
        return
    if not training and all(isinstance(r, (int, float)) and r >= 1 for r in rates):
        raise ValueError(
            "rates: missing rates of 1 leave nothing of some samples; lower one, pass keep_one=True or allow_empty=True"
        )
    chosen = _pick(source, lost, before[lost], names)
    for m, name in enumerate(names):
        rows = lost[chosen == m]
        if len(rows):
            key = source.key("frame", _stream(plan, name, base[name]))[rows]
            state.observed[name][rows, _last_to_go(key, base[name][rows])] = True
    present[lost, chosen] = True
    state.restored += len(lost)


def _stream(plan: MissingPlan, name: str, base: Tensor) -> Any:
    """What a modality's frame noise is keyed by: its name, or what it shares."""
    if plan.shared == "equal":
        return "length", base.shape[-1]
    return "all" if plan.shared else name


def _rate_per_sample(state: _State, source: _Source, name: str, asked: Any) -> Tensor:
    """float64 [n]: a number for all, a draw from U(low, high) each, or what an entry of ``extras`` says."""
    n = len(state.ids)
    if isinstance(asked, str):
        given = state.data.extras.get(asked)
        if given is None:
            raise ValueError(f"rates: {asked!r} names no entry of extras, which has {sorted(state.data.extras)}")
        if tuple(given.shape) != state.data.shape:
            raise ValueError(
                f"extras[{asked!r}]: expected one rate per sample {state.data.shape}, got {tuple(given.shape)}"
            )
        rate = state.take(given).to(torch.float64)
        if not bool(((rate >= 0) & (rate <= 1)).all()):
            raise ValueError(f"extras[{asked!r}]: expected missing rates in [0, 1]")
        return rate
    if isinstance(asked, list):
        return asked[0] + (asked[1] - asked[0]) * source.uniform("rate", name)
    return torch.full((n,), float(asked), dtype=torch.float64, device=state.ids.device)


class MissingMask:
    """What is left of which sample: the draw of a `MissingPlan`, or your own table.

    present : bool [*N, M], what is there after dropping
    observed : per modality that lost frames bool [*N, T], the frames that are left
    ids : int64, the samples' ids, [n] (dialogues [B] or [B, U]), unique
    modalities : M names
    plan, epoch : where it comes from; optional
    available : bool [*N, M], what was there before; default everything
    frames : per modality in ``observed`` the number of frames there were; default the entries of ``observed``
    restored : samples that would have lost everything and kept something for that reason alone

    Raises ValueError or TypeError for other shapes and types, unknown modalities and repeated ids.
    """

    def __init__(
        self,
        present: Tensor,
        observed: Mapping[str, Tensor] | None,
        ids: Tensor,
        modalities: Sequence[str],
        *,
        plan: MissingPlan | None = None,
        epoch: int | None = None,
        available: Tensor | None = None,
        frames: Mapping[str, int] | None = None,
        restored: int = 0,
    ):
        self.modalities = tuple(Several(Text, 1)("modalities", modalities))
        Maybe(Is("a MissingPlan", MissingPlan))("plan", plan)
        Maybe(Whole(0))("epoch", epoch)
        Maybe(Named(Array("bool", "[*N, T]"), 0))("observed", observed)
        Maybe(Array("bool", "[*N, M]"))("available", available)
        Maybe(Named(Whole(0), 0))("frames", frames)
        if Array("bool", "[*N, M]")("present", present).shape[-1] != len(self.modalities):
            raise ValueError(
                f"present: expected bool [*N, {len(self.modalities)}] for {list(self.modalities)}, got {present.dtype} "
                f"{tuple(present.shape)}"
            )
        if len(present) == 0:
            raise ValueError("present: expected at least one sample, got an empty mask")
        self.present = present
        self.observed = dict(observed or {})
        check_known("observed", self.observed, self.modalities)
        for name, keep in self.observed.items():
            if keep.shape[:-1] != present.shape[:-1]:
                raise ValueError(
                    f"observed[{name!r}]: expected bool {[*present.shape[:-1], 'T']}, got {keep.dtype} "
                    f"{tuple(keep.shape)}"
                )
        if Array("integer", "[*n]")("ids", ids).dtype != torch.int64 or tuple(ids.shape) not in (
            tuple(present.shape[:-1]),
            (len(present),),
        ):
            raise ValueError(
                f"ids: expected int64 [{len(present)}], one a sample, got {ids.dtype} of shape {tuple(ids.shape)}"
            )
        self.ids = ids
        if len(self._keys.unique()) != len(present):
            raise ValueError("ids: expected every id once, got samples that share one")
        self.plan, self.epoch, self.restored = plan, epoch, Whole(0)("restored", restored)
        self.available = torch.ones_like(present) if available is None else available
        if self.available.shape != present.shape:
            raise ValueError(f"available: expected bool {tuple(present.shape)}, got {tuple(self.available.shape)}")
        self.frames = {name: int(keep.numel()) for name, keep in self.observed.items()}
        self.frames.update(frames or {})

    def __len__(self) -> int:
        return len(self.present)

    def to(self, device: torch.device | str) -> MissingMask:
        """The mask with its tensors on another device; itself where they are there already."""
        if self.present.device == Device()("device", device):
            return self
        return MissingMask(
            self.present.to(device),
            {name: keep.to(device) for name, keep in self.observed.items()},
            self.ids.to(device),
            self.modalities,
            plan=self.plan,
            epoch=self.epoch,
            available=self.available.to(device),
            frames=self.frames,
            restored=self.restored,
        )

    def __repr__(self) -> str:
        report = self.achieved()
        parts = [f"{name} {rate:.1%}" for name, rate in report["rates"].items()]
        parts += [f"{name} frames {rate:.1%}" for name, rate in report["frames"].items()]
        kind = "a table" if self.plan is None else repr(self.plan.kind)
        return f"MissingMask({kind}, {report['samples']} samples; missing: {', '.join(parts)}; {self.fingerprint})"

    @property
    def _keys(self) -> Tensor:
        """int64 [n]: what rows are matched by; a dialogue by its first utterance where utterances have ids."""
        return self.ids if self.ids.ndim == 1 else self.ids.flatten(1)[:, 0].contiguous()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the contents: the same for the same samples and masks, whatever the order of the samples."""
        order = self._keys.argsort()
        digest = hashlib.blake2b(digest_size=8)
        digest.update(json.dumps([self.modalities, list(self.present.shape), sorted(self.observed)]).encode())
        digest.update(_bytes(self.ids[order]))
        digest.update(_bytes(_pack(self.present[order])))
        for name in sorted(self.observed):
            digest.update(str(tuple(self.observed[name].shape)).encode())
            digest.update(_bytes(_pack(self.observed[name][order])))
        return digest.hexdigest()

    def rows(self, ids: Tensor) -> Tensor:
        """int64 [n]: the mask's rows of the samples ``ids``; ValueError naming the ids that it does not know."""
        ids = Array("integer", "[*n]")("ids", ids).to(self.ids.device)
        wanted = ids if ids.ndim == 1 else ids.flatten(1)[:, 0].contiguous()
        known, order = self._keys.sort()
        place = torch.searchsorted(known, wanted).clamp_max(len(known) - 1)
        strange = known[place] != wanted
        if strange.any():
            raise ValueError(
                f"ids: {int(strange.sum())} of {len(wanted)} samples are not in this mask of {len(known)}, the first "
                f"{wanted[strange][:5].tolist()}; draw the mask for these samples"
            )
        return order[place]

    def apply(self, dataset: Data, keep_complete: bool = False) -> Data:
        """``dataset`` without what is missing; rows are matched by id, modalities by name.

        dataset : a MultimodalDataset or MultimodalBatch, all of whose ids and modalities the mask knows, in any order
        keep_complete : store what was there before as ``complete``, for methods that may train on it
        Raises ValueError for unknown ids, unknown modalities and sequences of another length.
        """
        Either(DATASET, BATCH)("dataset", dataset)
        Flag()("keep_complete", keep_complete)
        data: MultimodalBatch = dataset.data if isinstance(dataset, MultimodalDataset) else dataset
        if data.ids is None:
            raise ValueError("dataset: expected samples with ids, got a batch without")
        if unknown := [name for name in data.modalities if name not in self.modalities]:
            raise ValueError(f"dataset: the mask of {list(self.modalities)} says nothing about {unknown}")
        rows = self.rows(data.ids)
        columns = [self.modalities.index(name) for name in data.modalities]
        present = self.present[rows][..., columns]
        if present.shape != data.present.shape:
            raise ValueError(f"dataset: expected presence {tuple(present.shape)}, got {tuple(data.present.shape)}")
        observed = {}
        for name in data.modalities:
            if name in self.observed:
                frames, mine = data.valid[name].shape[-1], self.observed[name].shape[-1]
                if frames != mine:
                    raise ValueError(f"dataset: {name!r} has {frames} frames, the mask was drawn for {mine}")
                observed[name] = self.observed[name][rows].to(data.device)
        return dataset.drop(present.to(data.device), observed, keep_complete)

    def achieved(self) -> dict[str, Any]:
        """What the draw came to, as numbers that JSON knows.

        ``samples``; ``rates`` per modality: the fraction of the samples that had it and lost it; ``natural``: the
        fraction that never had it; ``frames`` per modality: the fraction of its frames that are gone, with or without
        the whole modality; ``patterns``: presence such as "101", in the order of the modalities, to its number of
        samples, most frequent first; ``empty``: samples with nothing left; ``restored``; ``asked``: the plan's rates.
        """
        there = self.available.flatten(0, -2)
        real = there.any(-1)
        here = self.present.flatten(0, -2)[real]
        there = there[real]
        had = there.sum(0)
        lost = (there & ~here).sum(0)
        rates = {m: _ratio(lost[i], had[i]) for i, m in enumerate(self.modalities)}
        natural = {m: _ratio(len(there) - had[i], len(there)) for i, m in enumerate(self.modalities)}
        rows, counts = here.unique(dim=0, return_counts=True)
        order = counts.argsort(descending=True, stable=True).tolist()
        patterns = {"".join("01"[int(x)] for x in rows[i].tolist()): int(counts[i]) for i in order}
        return {
            "samples": len(there),
            "rates": rates,
            "natural": natural,
            "frames": {m: 1 - _ratio(x.count_nonzero(), self.frames[m]) for m, x in self.observed.items()},
            "patterns": patterns,
            "empty": int((~here.any(-1)).sum()),
            "restored": self.restored,
            "asked": None if self.plan is None else self.plan.rates,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask to one file, whole or not at all."""
        PATH("path", path)
        content = {
            "format": _FORMAT,
            "modalities": list(self.modalities),
            "ids": self.ids.cpu(),
            "present": _packed(self.present),
            "available": _packed(self.available),
            "observed": {name: _packed(x) for name, x in self.observed.items()},
            "frames": self.frames,
            "restored": self.restored,
            "epoch": self.epoch,
            "plan": None if self.plan is None else json.dumps(self.plan.to_dict()),
            "fingerprint": self.fingerprint,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        atomic_write(path, buffer.getbuffer())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MissingMask:
        """The mask in a file of `save`.

        Raises FileNotFoundError, and ValueError for a file that is truncated, altered or not a mask. Nothing in the
        file is executed.
        """
        if not Path(PATH("path", path)).is_file():
            raise FileNotFoundError(f"path: no mask file at {os.fspath(path)!r}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"path: {os.fspath(path)!r} is truncated or not a mask file ({type(error).__name__})"
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"path: {os.fspath(path)!r} is not a mask file of this version ({_FORMAT})")
        try:
            plan = content["plan"]
            mask = cls(
                _unpacked(content["present"]),
                {name: _unpacked(x) for name, x in content["observed"].items()},
                content["ids"],
                content["modalities"],
                plan=None if plan is None else MissingPlan.from_dict(json.loads(plan)),
                epoch=content["epoch"],
                available=_unpacked(content["available"]),
                frames=content["frames"],
                restored=content["restored"],
            )
            intact = mask.fingerprint == content["fingerprint"]
        except Exception as error:
            raise ValueError(f"path: {os.fspath(path)!r} is not a whole mask file: {error}") from error
        if not intact:
            raise ValueError(f"path: the contents of {os.fspath(path)!r} do not match its fingerprint; it was altered")
        return mask


_FORMAT = "mmlib.MissingMask 1"


def _ratio(part: Tensor | int, whole: Tensor | int) -> float:
    return float(part) / float(whole) if float(whole) else 0.0


def _pack(mask: Tensor) -> Tensor:
    """uint8: eight entries of a bool tensor to a byte, the last byte filled up with zeros."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    result = flat[:, 0].clone()
    for bit in range(1, 8):
        result |= flat[:, bit] << bit
    return result


def _packed(mask: Tensor) -> tuple[list[int], Tensor]:
    return list(mask.shape), _pack(mask.cpu())


def _unpacked(packed: tuple[list[int], Tensor]) -> Tensor:
    shape, bits = packed
    flat = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)
    return flat[: math.prod(shape)].reshape(shape).to(torch.bool)


def _bytes(x: Tensor) -> bytes:
    """The tensor's memory; ctypes, since torch hands it out quickly only through NumPy."""
    x = x.contiguous().cpu()
    return ctypes.string_at(x.data_ptr(), x.numel() * x.element_size())
