"""The five positional functions that draw masks, and what they and the plans are made of.

Every draw is a hash of (seed, sample id, modality, frame), see `Source`. The positional functions take the ids 0 to
n - 1 and a seed from a torch generator. Shapes: ``n`` samples, ``M`` modalities, ``T`` frames.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ..batch import tensor
from ..checks import Either, Flag, Is, Maybe, Number, Several, Whole, shown

__all__ = ["bernoulli_mask", "exact_count_mask", "frame_mask", "heterogeneous_mask", "imbalanced_mask"]


# --- Random numbers that belong to a sample -------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The 64-bit subset of ``value`` as the signed integer that torch stores."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# The constants of splitmix64 (Steele, Lea and Flood, 2014). torch has no unsigned 64-bit arithmetic, but products of
# int64 wrap modulo 2^64, and a logical right shift is an arithmetic one with its copied sign bits cleared.
GOLDEN, _MUL1, _MUL2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix_(z: Tensor, spare: Tensor | None = None) -> Tensor:
    """splitmix64's finaliser, in place: a bijection of 64 bits after which neighbours look independent."""
    spare = torch.empty_like(z) if spare is None else spare
    for shift, factor in ((30, _MUL1), (27, _MUL2), (31, 1)):
        torch.bitwise_right_shift(z, shift, out=spare)
        spare.bitwise_and_((1 << (64 - shift)) - 1)
        z.bitwise_xor_(spare)
        if factor != 1:
            z.mul_(factor)
    return z


class Source:
    """Random numbers for ``ids`` int64 [n] that depend on (seed, stream, id) and on nothing else."""

    def __init__(self, ids: Tensor, *seed: Any):
        self.ids, self.seed = ids, seed

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, *stream: Any) -> Tensor:
        """int64 [n], distinct for distinct ids, since every step is a bijection."""
        digest = hashlib.blake2b(repr((self.seed, stream)).encode(), digest_size=8).digest()
        return mix_(self.ids * GOLDEN + _signed(int.from_bytes(digest, "little")))

    def uniform(self, *stream: Any) -> Tensor:
        """float64 [n] in [0, 1), with 53 random bits."""
        return ((self.key(*stream) >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53

    def order(self, *stream: Any) -> Tensor:
        """A random order of the samples, int64 [n]: it shuffles ids, not positions."""
        return self.key(*stream).argsort()


def _positional(n: int, generator: Generator | None) -> Source:
    """The source of the positional functions: ids 0 to n - 1 and one seed taken from ``generator``."""
    Whole(1)("n", n)
    Maybe(SOME)("generator", generator)
    device = None if generator is None else generator.device
    seed = int(torch.randint(1 << 62, (1,), generator=generator, device=device))
    return Source(torch.arange(n), seed)


def _noise(keys: Tensor, frames: int, spare: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Uniform int32 [n, frames] from the samples' keys int64 [n]; each 64-bit hash serves two frames."""
    half = (frames + 1) // 2
    steps = torch.arange(1, half + 1, device=keys.device) * GOLDEN
    z, other = spare or (torch.empty(len(keys), half, dtype=torch.int64, device=keys.device), None)
    torch.add(keys[:, None], steps, out=z)
    return mix_(z, other).view(torch.int32)[:, :frames]


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


def as_rate(value: Any, name: str) -> float:
    return float(A_RATE(name, value.item() if isinstance(value, Tensor) and value.ndim == 0 else value))


def as_rates(rates: Any, name: str = "rates") -> list[float]:
    values = rates.tolist() if hasattr(rates, "tolist") else rates
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected one missing rate per modality, got {shown(rates)}")
    if not values:
        raise ValueError(f"{name}: expected one missing rate per modality, got none")
    return [as_rate(r, f"{name}[{i}]") for i, r in enumerate(values)]


def check_some_left(rates: Sequence[float], name: str = "rates") -> None:
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


def subset_counts(n: int, rates: Sequence[float], allow_empty: bool = False) -> list[tuple[tuple[bool, ...], int]]:
    """How many of n samples get each subset: BALM Eq. 36, [(subset, count), ...], from all present downwards."""
    if len(rates) > 16:
        raise ValueError(f"rates: expected at most 16 modalities (2^M subsets are counted), got {len(rates)}")
    subsets = list(itertools.product((True, False), repeat=len(rates)))
    fraction = {p: math.prod(1 - r if there else r for there, r in zip(p, rates, strict=True)) for p in subsets}
    # The smallest double error below an exact product must not cost a sample: 1e-9 of a sample is added first.
    count = {p: math.floor(n * fraction[p] + 1e-9) if any(p) or allow_empty else 0 for p in subsets}
    # The fraction of the samples that would lose everything, and what rounding down left over, go in equal parts to the
    # one-modality subsets. Where a rate is 0 or 1 not all of those are possible; then to the smallest that are.
    possible = [p for p in subsets if any(p) and fraction[p] > 0]
    smallest = [p for p in possible if sum(p) == min(map(sum, possible))]
    if possible:
        each, odd = divmod(n - sum(count.values()), len(smallest))
        for i, p in enumerate(sorted(smallest, reverse=True)):
            count[p] += each + (i < odd)
    else:  # all rates are 1 and the samples may be empty
        count[subsets[-1]] = n
    return list(count.items())


def draw_imbalanced(order: Tensor, rates: Sequence[float], allow_empty: bool = False) -> Tensor:
    """bool [n, M]: the subsets' counts laid along ``order``."""
    counts = subset_counts(len(order), rates, allow_empty)
    subsets = torch.tensor([p for p, _ in counts])
    present = torch.empty(len(order), len(rates), dtype=torch.bool)
    present[order] = subsets.repeat_interleave(torch.tensor([c for _, c in counts]), 0)
    return present


def draw_bernoulli(source: Source, rates: Tensor, available: Tensor, names: Sequence[Any], allow_empty: bool) -> Tensor:
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
        again = Source(source.ids[rows], *source.seed)
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


def draw_exact_count(source: Source, rates: Sequence[float], names: Sequence[Any], repair: bool) -> Tensor:
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
        given = pick(source, givers, present[givers], names, turn)
        present[givers, given] = False
        present[takers, given] = True
    return present


def imbalanced_mask(n: int, rates: Sequence[float], generator: Generator | None = None) -> Tensor:
    """Exact subset counts for unequal missing rates, shuffled: BALM Eq. 36 (corrected).

    Subset e is given to floor(n prod_m (1 - r_m if e_m else r_m)) samples. The fraction prod(r) that would lose
    everything, and what rounding left, is split equally over the one-modality subsets (one more to the first of them
    until it is used up): every row has a True, and the realised rates lie prod(r) / M below the nominal ones, up to
    rounding.

    n : samples, at least 1
    rates : M missing rates in [0, 1], one below 1; a modality of rate 0 is never missing, one of rate 1 never there
    generator : of the shuffle; default torch's global one

    Returns bool [n, M]. Raises ValueError for other n and rates.
    """
    nominal = as_rates(rates)
    check_some_left(nominal)
    source = _positional(n, generator)
    return _to(draw_imbalanced(source.order("rows"), nominal), generator)


def bernoulli_mask(n: int, rates: Sequence[float], generator: Generator | None = None) -> Tensor:
    """Independent missingness per sample and modality; empty rows are redrawn until they keep something.

    Conditioning on a non-empty row lowers the rates: modality m is missing in a fraction
    (r_m - prod r) / (1 - prod r) of the samples, in expectation.

    n : samples, at least 1
    rates : M missing rates in [0, 1], one below 1

    Returns bool [n, M], every row has a True. Raises ValueError for other n and rates.
    """
    nominal = as_rates(rates)
    check_some_left(nominal)
    source = _positional(n, generator)
    everything = torch.ones(n, len(nominal), dtype=torch.bool)
    row = torch.tensor(nominal, dtype=torch.float64)
    return _to(draw_bernoulli(source, row, everything, range(len(nominal)), False), generator)


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
    nominal = as_rates(rates)
    check_some_left(nominal)
    source = _positional(n, generator)
    return _to(draw_exact_count(source, nominal, range(len(nominal)), True), generator)


def _to(mask: Tensor, generator: Generator | None) -> Tensor:
    return mask if generator is None else mask.to(generator.device)


# --- Frames ---------------------------------------------------------------------------------------------------------


def any_frame(mask: Tensor) -> Tensor:
    """``mask.any(-1)``, three times as fast for bool tensors of many columns."""
    return mask.view(torch.uint8).amax(-1).to(torch.bool)


def _ends(base: Tensor) -> Tensor:
    """bool [n, T]: the first and the last True of each row of ``base``."""
    flat = base.to(torch.uint8)
    first = flat.argmax(-1, keepdim=True)
    last = base.shape[-1] - 1 - flat.flip(-1).argmax(-1, keepdim=True)
    ends = torch.zeros_like(base).scatter_(1, first, True).scatter_(1, last, True)
    return ends & base


def drop_frames(
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
    return keep_some(keep, base, keys, keep_ends, keep_one)


def keep_some(keep: Tensor, base: Tensor, keys: Tensor, ends: bool, one: bool) -> Tensor:
    """``keep`` with the first and last frame of ``base`` back, or with one frame where it has none left."""
    if ends:
        keep |= _ends(base)
    if one:
        rows = (~keep.any(-1) & base.any(-1)).nonzero()[:, 0]
        keep[rows, last_to_go(keys[rows], base[rows])] = True
    return keep


def last_to_go(keys: Tensor, base: Tensor) -> Tensor:
    """int64 [n]: of each row's frames in ``base`` bool [n, T] the one that a rising rate drops last."""
    noise = _noise(keys, base.shape[-1])
    return torch.where(base, noise, torch.iinfo(torch.int32).min).argmax(-1)


def drop_bursts(source: Source, stream: Any, base: Tensor, rate: Tensor, blocks: int) -> Tensor:
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
    keep = drop_frames(source.key("frame"), base, per_sample.expand(len(counts)), keep_ends, keep_one)
    return keep.to(counts.device)


def draw_heterogeneous(
    source: Source, base: Sequence[Tensor], available: Tensor, eta: float, names: Sequence[Any]
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
    subset = (code[:, None] >> torch.arange(m)) & 1 == 1
    present = available & (subset | ~inter[:, None])
    restore_modality(source, present, available, names)
    ratio = 0.1 + 0.8 * source.uniform("ratio")
    rows = intra.nonzero()[:, 0]
    observed = []
    for i, (name, frames) in enumerate(zip(names, base, strict=True)):
        keep = frames & present[:, i, None]
        keys = source.key("frame", name)[rows]
        keep[rows] = drop_frames(keys, keep[rows], ratio[rows], keep_one=True, drop_one=True)
        observed.append(keep)
    return present, observed


def heterogeneous_mask(
    lengths: Any, max_len: int | Sequence[int], eta: float, generator: Generator | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Whole modalities in some samples, frames in others, both in a few: DREAM, appendix A.4.

    Of n samples floor(2 eta n / 5) lose modalities only, as many lose frames only, floor(eta n / 5) both; the sets are
    disjoint and random. Our interpretation of what the paper leaves open: the subset is uniform over the incomplete
    non-empty ones; the frames are dropped at a ratio drawn from U(0.1, 0.9) per sample, of every modality that is left,
    where at least one frame is kept and, of two or more, at least one dropped.

    lengths : int [n, M]; 0 means that the modality is missing by nature
    max_len : frames per modality, or one number for all
    eta : fraction of samples affected, in [0, 1]

    Returns present bool [n, M] and a list of M observed bool [n, T].
    Raises ValueError for fewer than two modalities, other shapes, and eta outside [0, 1].
    """
    counts = _as_lengths(lengths, 2)
    Either(Whole(1), Several(Whole(1)))("max_len", max_len)
    nominal = as_rate(eta, "eta")
    limits: list[int] = list(max_len) if isinstance(max_len, Sequence) else [max_len] * counts.shape[1]
    if len(limits) != counts.shape[1]:
        raise ValueError(f"max_len: expected {counts.shape[1]} numbers of frames, got {len(limits)}")
    local = counts.cpu()
    base = [_within(local[:, m], limit, f"max_len[{m}]") for m, limit in enumerate(limits)]
    source = _positional(len(counts), generator)
    present, observed = draw_heterogeneous(source, base, local > 0, nominal, range(len(limits)))
    return present.to(counts.device), [x.to(counts.device) for x in observed]


def pick(source: Source, rows: Tensor, among: Tensor, names: Sequence[Any], *stream: Any) -> Tensor:
    """int64 [k]: for each of the samples ``rows`` [k] a random modality of those ``among`` bool [k, M]."""
    keys = torch.stack([source.key("pick", *stream, name)[rows] for name in names], -1)
    return torch.where(among, keys, torch.iinfo(torch.int64).min).argmax(-1)


def restore_modality(source: Source, present: Tensor, available: Tensor, names: Sequence[Any]) -> int:
    """Give every sample that lost all it had one modality back, in place; how many were."""
    rows = (~present.any(-1) & available.any(-1)).nonzero()[:, 0]
    if len(rows):
        present[rows, pick(source, rows, available[rows], names)] = True
    return len(rows)
