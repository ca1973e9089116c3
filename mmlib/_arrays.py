"""From what a user has to tensors: arrays, lists, frames and masked arrays, whose absent values become masks.

The rules of `MultimodalDataset.from_arrays` stand here, one function a question: what a feature's axes mean, which
frames exist, what the target is, which names and ids are possible. Nothing here knows a batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Array, Is, Whole, check_known, shown


def frame_axis(x: Tensor, lead: int) -> int:
    """The axis of ``x`` that counts frames, where ``lead`` axes come before the sample's own.

    Token ids [T] and sequences [T, D] have frames first; an image [C, H, W] has its rows as frames, a volume
    [C, X, Y, Z] its X slices. Raises ValueError for any other rank.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {shown(x)}")
    rank = x.ndim - Whole(1)("lead", lead)
    if rank == 1 and not x.is_floating_point():
        return lead
    if rank == 2:
        return lead
    if rank in (3, 4):
        return lead + 1
    raise ValueError(
        f"features: expected int64 token ids [*N, T], sequences [*N, T, D], images [*N, C, H, W] or volumes "
        f"[*N, C, X, Y, Z] with lead = {lead} axes before, got x of shape {tuple(x.shape)} of {x.dtype}"
    )


def per_frame(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` [*N, T], reshaped so that it broadcasts over the features ``x`` of the same samples and frames."""
    lead = Array("bool", "[*N, T]")("mask", mask).ndim - 1
    axis = frame_axis(x, lead)
    if mask.shape[-1] != x.shape[axis]:
        raise ValueError(f"mask: expected {x.shape[axis]} frames, as x has, got {tuple(mask.shape)}")
    shape = [*mask.shape[:-1]] + [1] * (x.ndim - lead)
    shape[axis] = mask.shape[-1]
    return mask.reshape(shape)


def all_finite(x: Tensor) -> bool:
    """Whether the values are surely finite; a sum costs no memory and a tenth of the time. It may overflow."""
    return bool(torch.isfinite(x.sum()))


def kind_of(x: Any) -> str:
    """What ``x`` is, for messages."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def blanked(x: Tensor, keep: Tensor, valid: Tensor, fill: int | None) -> Tensor:
    """``x`` with the frames outside ``keep`` zeroed; token ids become ``fill`` where valid, but for the two ends."""
    if x.is_meta:  # of a data set that reads its samples on demand
        return x
    if x.is_floating_point():
        return torch.where(per_frame(keep, x), x, 0)  # where, not a product: a NaN placeholder must not survive
    before = valid.cumsum(-1)
    ends = valid & ((before == 1) | (before == before[..., -1:]))
    filled = torch.full_like(x, 0 if fill is None else fill)
    return torch.where(keep | ends | ~valid, x, filled)


def row_index(rows: Any, n: int, device: torch.device) -> Tensor | slice:
    """``rows`` as an index of n samples; what can be seen without waiting for the device is checked."""
    if isinstance(rows, slice):
        return rows
    if not isinstance(rows, Tensor):
        whole = isinstance(rows, int) and not isinstance(rows, bool)
        rows = torch.tensor(rows) if whole else tensor("rows", rows)
        rows = rows if rows.numel() else rows.long()  # an empty list is float by default
        if rows.numel() and rows.dtype != torch.bool and not rows.is_floating_point():
            low, high = int(rows.min()), int(rows.max())
            if not -n <= low <= high < n:
                raise IndexError(f"rows: expected an index below {n}, got {low if low < -n else high}")
        rows = rows.to(device)
    if rows.is_floating_point() or rows.is_complex() or (rows.dtype == torch.bool and rows.ndim == 0):
        raise TypeError(f"rows: expected integers, a bool mask or a slice, got {kind_of(rows)}")
    if rows.ndim > 1:
        raise ValueError(f"rows: expected one axis, got shape {tuple(rows.shape)}")
    if rows.dtype == torch.bool:
        if len(rows) != n:
            raise ValueError(f"rows: expected a bool mask of the {n} samples, got one of {len(rows)}")
        return rows
    return rows.reshape(-1).long()


# Names, ids, settings


_TAKEN = nn.ModuleDict()  # its attributes cannot name one of its modules


def check_modalities(names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"features: expected strings as the names of modalities, got {shown(name)}")
        if not name or "." in name or hasattr(_TAKEN, name):
            raise ValueError(
                f"features: {name!r} cannot name a modality, since torch could not keep its encoder under that name; "
                f"expected a name without a dot that is no attribute of nn.ModuleDict, got {name!r}"
            )


def names_of(what: str, given: Any) -> list[Any]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(f"{what}: expected a list of names, got {shown(given)}")
    return list(given)


def token_settings(
    tokens: Any, fill: Any, lengths: Any, features: Mapping[str, Any]
) -> tuple[dict[str, int | None], dict[str, int]]:
    """Per modality of token ids the size of its vocabulary, None where it is not said; and ``fill``, checked."""
    for what, given in (("lengths", lengths), ("fill", fill)):
        if given is not None:
            check_known(what, Is("a dict by modality", Mapping)(what, given), features)
    sizes: dict[str, int | None] = dict.fromkeys(names_of("tokens", tokens))
    check_known("tokens", sizes, features)
    if isinstance(tokens, Mapping):
        sizes = {name: int(Whole(1)(f"tokens[{name!r}]", size)) for name, size in tokens.items()}
    for name, value in (fill or {}).items():
        Whole(0, below=sizes.setdefault(name, None) or math.inf)(f"fill[{name!r}]", value)
    return sizes, dict(fill or {})


def common_index(given: Mapping[str, Any]) -> list[Any] | None:
    """The index of the pandas frames and series among ``given``, None without one; ValueError where they differ."""
    found = {what: list(x.index) for what, x in given.items() if _is_pandas(x) and hasattr(x, "index")}
    first = next(iter(found), None)
    for what, index in found.items():
        if index != found[first]:  # type: ignore[index]
            raise ValueError(f"{what}: its index is another than that of {first}; expected the same samples in order")
    return None if first is None else found[first]


def _is_pandas(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "pandas"


def sample_names(ids: Any, n: int) -> list[Any] | None:
    if ids is None:
        return None
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"ids: expected {n} names or integers, got {shown(ids)}")
    names = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not all(isinstance(name, (str, int)) or hasattr(name, "__hash__") for name in names):
        raise TypeError(f"ids: expected {n} names or integers, got {shown(ids)}")
    if len(names) != n or len(set(names)) != n:
        raise ValueError(f"ids: expected {n} unique ids, got {len(names)} of which {len(set(names))} differ")
    return names


def check_empty(here: Tensor, hint: str = "") -> None:
    if not here.any(-1).all():
        rows = (~here.any(-1)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"present: every sample needs a modality, but {len(rows)} have none, the first at {rows[:5]}; remove them"
            f"{hint}"
        )


def as_present(present: Any, n: int, modalities: int) -> Tensor:
    here = tensor("present", present)
    if here.dtype != torch.bool:
        raise TypeError(f"present: expected bool {(n, modalities)}, got {kind_of(here)}")
    if here.shape != (n, modalities):
        raise ValueError(f"present: expected bool {(n, modalities)}, got {kind_of(here)}")
    return here


# Features


def as_numbers(name: str, values: Any, lengths: Any, tokens: bool, warn: bool = True) -> tuple[Tensor, Any]:
    """The features [n, ...] of one modality, from whatever the user has, and its lengths."""
    what = f"features[{name!r}]"
    if tokens and _is_masked(values):
        values, lengths = _masked_ids(what, values, lengths)
    if isinstance(values, (list, tuple)) and any(
        v is None or getattr(v, "ndim", 0) or (tokens and isinstance(v, (list, tuple))) for v in values
    ):
        values, lengths = _pad(name, values, lengths, tokens, warn)
    x = tensor(what, values)
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{what}: expected floats or integers, got {x.dtype}")
    if tokens:
        if x.is_floating_point():
            raise TypeError(f"{what}: expected integer token ids [n, T], got {kind_of(x)}")
        if x.ndim != 2:
            raise ValueError(f"{what}: expected integer token ids [n, T], got {kind_of(x)}")
        x = x.to(torch.int64)
    else:
        if warn:
            _warn_of_images(what, x)
        x = x.to(torch.float32)
        if x.ndim == 2:
            x = x[:, None, :]  # vectors are sequences of one frame
    if not (x.ndim == 2 or 3 <= x.ndim <= 5):
        raise ValueError(
            f"{what}: expected [n, D], [n, T, D], [n, C, H, W], [n, C, X, Y, Z], or token ids [n, T] said by tokens, "
            f"got shape {tuple(x.shape)}"
        )
    if 0 in x.shape[1:]:
        raise ValueError(f"{what}: expected at least one frame and one value, got shape {tuple(x.shape)}")
    return x, lengths


def as_features(name: str, values: Any, lengths: Any, tokens: bool, warn: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(features [n, ...], valid [n, T], there [n]) of one modality, from whatever the user has."""
    x, lengths = as_numbers(name, values, lengths, tokens, warn)
    frames = x.shape[frame_axis(x, 1)]
    there = torch.ones(len(x), dtype=torch.bool)
    if x.is_floating_point() and not all_finite(x):
        there = ~torch.isnan(x).flatten(1).all(-1)
    valid = torch.ones(len(x), frames, dtype=torch.bool)
    if lengths is not None:
        count = as_lengths(name, lengths, len(x), frames)
        valid = torch.arange(frames) < count[:, None]
        there = there & (count > 0)
    return x, valid, there


def find_observed(
    name: str,
    x: Tensor,
    valid: Tensor,
    there: Tensor,
    given: Tensor | None,
    tokens: bool,
    size: int | None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """(features, observed) of one modality; what is not observed has not been blanked.

    there : bool [n], where values say that the modality is; given : bool [n], where the user does
    first : the number of the first sample, for errors
    """
    seen = valid & (there if given is None else given)[:, None]
    if x.is_floating_point() and not all_finite(x):
        axis = frame_axis(x, 1)
        per = x.movedim(axis, 1).flatten(2) if x.ndim > 2 else x[..., None]
        nan = torch.isnan(per)
        partly = nan.any(-1) & ~nan.all(-1) & seen
        if partly.any() or (given is not None and (nan.any(-1) & seen).any()):
            row = int((nan.any(-1) & seen).any(-1).nonzero()[0])
            raise ValueError(
                f"features[{name!r}]: sample {first + row} has NaN values where the modality is present; expected a "
                f"frame to be wholly NaN (missing) or wholly finite. Impute them, or set the sample to None"
            )
        seen = seen & ~nan.all(-1)
    if tokens:
        x = checked_ids(name, x, seen, size, first)
    return x, seen


def as_lengths(name: str, lengths: Any, n: int, frames: float = math.inf) -> Tensor:
    """int64 [n]: how many frames of each sample exist."""
    count = tensor(f"lengths[{name!r}]", lengths)
    expected = f"{n} integers from 0 to {frames}" if frames < math.inf else f"{n} integers of at least 0"
    if count.is_floating_point() or count.dtype == torch.bool:
        raise TypeError(f"lengths[{name!r}]: expected {expected}, got {shown(lengths)}")
    if count.shape != (n,) or (n and not 0 <= count.min() <= count.max() <= frames):
        raise ValueError(f"lengths[{name!r}]: expected {expected}, got {shown(lengths)}")
    return count.long()


def _warn_of_images(what: str, x: Tensor) -> None:
    """A word about what is surely not meant, though it could be."""
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and min(x.shape[1:3]) > 4:
        warnings.warn(
            f"{what}: shape {tuple(x.shape)} looks like images [n, H, W, C], but is read as {x.shape[1]} channels of "
            f"{x.shape[2]} x {x.shape[3]}; pass images [n, C, H, W], such as x.transpose(0, 3, 1, 2)",
            stacklevel=5,
        )
    if x.dtype == torch.uint8 and x.ndim > 2 and x.numel() and int(x.max()) > 1:
        warnings.warn(
            f"{what}: bytes are read as numbers from {int(x.min())} to {int(x.max())}; scale them, such as x / 255",
            stacklevel=5,
        )


def checked_ids(name: str, x: Tensor, seen: Tensor, size: int | None, first: int = 0) -> Tensor:
    """Token ids, checked where they are read; whatever stands outside becomes an id that an embedding has."""
    good = x >= 0 if size is None else (x >= 0) & (x < size)
    if bool((seen & ~good).any()):
        row = first + int((seen & ~good).any(-1).nonzero()[0])
        expected = "token ids of at least 0" if size is None else f"token ids in [0, {size}), the vocabulary"
        found = x[seen]
        raise ValueError(
            f"features[{name!r}]: expected {expected}, got values from {int(found.min())} to {int(found.max())}, the "
            f"first outside in sample {row}"
        )
    return torch.where(good, x, 0)


def _is_masked(values: Any) -> bool:
    """Whether this is a NumPy masked array; the core does not import NumPy."""
    return hasattr(values, "mask") and hasattr(values, "filled")


def _masked_ids(what: str, values: Any, lengths: Any) -> tuple[Any, Any]:
    """Token ids of a masked array: masked ones are padding, so they come last."""
    keep = ~torch.as_tensor(values.mask).expand(values.shape)  # NumPy keeps one False for a mask of nothing
    count = keep.sum(-1)
    if lengths is not None:
        raise ValueError(f"lengths: {what} is a masked array, whose mask says its lengths; expected one of the two")
    if not torch.equal(keep, torch.arange(keep.shape[-1]) < count[..., None]):
        raise ValueError(f"{what}: expected masked token ids after the others, as padding, got some between them")
    return values.filled(0), count


def _pad(name: str, values: Sequence[Any], lengths: Any, tokens: bool, warn: bool) -> tuple[Tensor, Any]:
    """A list of arrays, some None, as one tensor: missing rows NaN (token ids: 0), shorter sequences zero-padded."""
    what = f"features[{name!r}]"
    rows = [None if v is None else tensor(what, v) for v in values]
    if tokens:
        rows = [r.long() if r is not None and not r.numel() else r for r in rows]  # an empty list is float by default
    given = [r for r in rows if r is not None]
    if not given:
        raise ValueError(f"{what}: the modality is missing in every sample")
    if tokens and any(r.is_floating_point() or r.is_complex() or r.dtype == torch.bool for r in given):
        raise TypeError(f"{what}: expected integer token ids, got {sorted({str(r.dtype) for r in given})}")
    sequence = tokens or all(r.ndim == 2 for r in given)
    tails = {(r.ndim, *(r.shape[1:] if sequence else r.shape)) for r in given}
    if len(tails) > 1 or min(r.ndim for r in given) == 0:
        shapes = sorted({tuple(r.shape) for r in given})
        ids = all(r.ndim == 1 and not r.is_floating_point() for r in given) and not tokens
        hint = f"; if they are token ids, say so: tokens=({name!r},)" if ids else ""
        raise ValueError(f"{what}: expected arrays of one rank and width, got shapes {shapes[:5]}{hint}")
    if sequence and lengths is None:
        lengths = [0 if r is None else len(r) for r in rows]
    longest = max(len(r) for r in given)
    shape = (longest, *given[0].shape[1:])
    if tokens:
        blank = torch.zeros(shape, dtype=torch.int64)
    else:
        if warn:
            _warn_of_images(what, given[0][None])
        blank = torch.full(shape, torch.nan)
    x = blank.repeat(len(rows), *[1] * len(shape))
    for i, r in enumerate(rows):
        if r is not None:
            x[i] = 0
            x[i, : len(r)] = r.to(x.dtype)
    return x, lengths


def tensor(what: str, values: Any) -> Tensor:
    """``values`` as a tensor of numbers, masked ones NaN; TypeError or ValueError that names the argument."""
    try:
        if _is_masked(values):
            values = values.astype("float32").filled(math.nan)
        elif hasattr(values, "columns") and hasattr(values, "to_numpy"):  # a pandas frame
            whole = all(getattr(kind, "kind", "O") in "iu" and hasattr(kind, "byteorder") for kind in values.dtypes)
            values = values.to_numpy() if whole else values.astype("float32").to_numpy()
        elif hasattr(values, "to_numpy"):
            values = values.to_numpy()
        if getattr(getattr(values, "dtype", None), "kind", "") == "O":
            values = values.tolist()
        if getattr(getattr(values, "flags", None), "writeable", True) is False:
            values = values.copy()  # a read-only NumPy array, which torch cannot share
        return torch.as_tensor(values)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{what}: expected numbers, got {type(values).__name__} ({error})") from error
    except ValueError as error:
        raise ValueError(f"{what}: expected an array of numbers, got {type(values).__name__} ({error})") from error


# Targets


def facts_of(
    info: Mapping[str, Any] | None, target: Any, classes: Any, sizes: Mapping[str, int | None], n: int
) -> tuple[dict[str, Any], Tensor | None]:
    """The facts of a data set with this target, and the target as a tensor."""
    facts = dict(info or {})
    names: list[str] | None = None
    if classes is not None and not isinstance(classes, (str, bytes)) and isinstance(classes, Iterable):
        names = [str(name) for name in classes]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"classes: expected a number or different names, got {shown(classes)}")
    elif classes is not None:
        facts["outputs"] = int(Whole(1)("classes", classes))
    known = names or facts.get("classes")
    numbered = classes is not None and names is None
    y, found = _as_target(target, n, None if known is None else [str(name) for name in known], numbered)
    if names is not None or found is not None:
        facts["classes"] = names or found
    count = facts.get("outputs") if names is None else len(names)
    if count is None and found is not None:
        count = len(found)
    if y is not None and y.is_floating_point():
        if classes is not None:
            raise TypeError(f"target: expected integers for {classes} classes, got {kind_of(y)}")
        return facts, y
    if y is not None and count is None:
        count = y.shape[-1] if y.dtype == torch.bool else max(int(y.max()) + 1, 1)
    if y is not None and y.dtype == torch.bool and count != y.shape[-1]:
        raise ValueError(f"target: expected {count} labels a sample, got {kind_of(y)}")
    if facts.get("classes") is not None and count is not None and len(facts["classes"]) != count:
        raise ValueError(f"classes: expected {len(facts['classes'])}, the number of their names, got {count}")
    if count is not None:
        facts["outputs"] = count
    if any(size is not None for size in sizes.values()):
        facts["vocabulary"] = {name: size for name, size in sizes.items() if size is not None}
    return facts, y


def _as_target(
    target: Any, n: int, names: Sequence[str] | None, numbered: bool
) -> tuple[Tensor | None, list[str] | None]:
    """The target as a tensor, and the names of the classes where it says them; ``numbered`` ones are not labels."""
    if target is None:
        return None, None
    if _is_masked(target):
        if bool(torch.as_tensor(target.mask).any()):
            raise ValueError("target: expected a value for every sample, got a masked array with masked ones")
        target = target.data
    category = getattr(target, "cat", target)  # of a pandas Series, or a Categorical itself
    columns = getattr(target, "columns", None)
    if hasattr(category, "categories") and hasattr(category, "codes"):
        codes = category.codes.tolist()
        order = [str(name) for name in category.categories]
        found = names or order
        return _coded([None if code < 0 else order[code] for code in codes], n, found), list(found)
    if hasattr(target, "to_numpy"):
        target = target.to_numpy()
    values = target.tolist() if getattr(getattr(target, "dtype", None), "kind", "") in ("U", "O") else target
    if isinstance(values, (list, tuple)) and any(isinstance(v, str) for v in values):
        odd = next((v for v in values if not isinstance(v, str) and not _is_nothing(v)), None)
        if odd is not None:
            raise TypeError(f"target: expected strings alone or numbers alone, got {shown(odd)} among strings")
        labels = [None if _is_nothing(v) else v for v in values]
        found = names or sorted({v for v in labels if v is not None})
        return _coded(labels, n, found), list(found)
    y = tensor("target", values)
    if y.is_complex():
        raise TypeError(f"target: expected classes, scores or labels, got {kind_of(y)}")
    if y.ndim < 1 or len(y) != n:
        raise ValueError(f"target: expected {n} values, one a sample, got shape {tuple(y.shape)}")
    if y.ndim == 2 and y.shape[1] == 1:
        raise ValueError(f"target: expected {n} values, one a sample, got shape {tuple(y.shape)}; pass target[:, 0]")
    if y.ndim == 2 and not numbered and bool(((y == 0) | (y == 1)).all()):
        y = y != 0
        if n > 1 and bool((y.sum(-1) == 1).all()):
            warnings.warn(
                f"target: each of the {n} samples has exactly one of {y.shape[1]} labels; if these are classes, pass "
                f"target.argmax(1)",
                stacklevel=4,
            )
        return y, None if columns is None else [str(c) for c in columns]
    if y.ndim > 1 and y.is_floating_point():
        raise ValueError(
            f"target: expected {n} scores, or zeros and ones [{n}, K] for several labels a sample, got {kind_of(y)}"
        )
    return y.to(torch.float32 if y.is_floating_point() else torch.int64), None


def _is_nothing(value: Any) -> bool:
    """None, NaN, or pandas' NA, which is equal to nothing."""
    return value is None or type(value).__name__ == "NAType" or value != value


def _coded(labels: Sequence[str | None], n: int, names: Sequence[str]) -> Tensor:
    """int64 [n]: the place of each label among ``names``."""
    if len(labels) != n:
        raise ValueError(f"target: expected {n} values, one a sample, got {len(labels)}")
    place: dict[str | None, int] = {name: k for k, name in enumerate(names)}
    for row, label in enumerate(labels):
        if label not in place:
            missing = "nothing" if label is None else repr(label)
            raise ValueError(f"target: expected one of the classes {list(names)}, got {missing} for sample {row}")
    return torch.tensor([place[label] for label in labels], dtype=torch.int64)
