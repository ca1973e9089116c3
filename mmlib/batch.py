"""Batches and data sets of several modalities, any of which may be missing.

Everything in mmlib reads and writes these two classes. Shapes use the book's alphabet: ``N`` is the leading shape
(``[B]`` samples, or ``[B, U]`` for dialogues of U utterances), ``M`` the number of modalities, ``T`` frames, ``D`` the
feature width, ``K`` outputs.

A value that was dropped is zero *and* masked. Three masks say three different things:

* ``present[..., m]``: modality m of this sample is there at all;
* ``valid[m][..., t]``: frame t exists, it is not padding (dropping a frame does not change this);
* ``observed[m][..., t]``: the frame is valid, its modality is present, and it was not dropped.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import (
    Array,
    Device,
    Either,
    Flag,
    Function,
    Is,
    Maybe,
    Named,
    Several,
    Text,
    Whole,
    check_all,
    check_known,
    shown,
)

__all__ = ["MultimodalBatch", "MultimodalDataset", "Output", "frame_axis", "in_parts", "per_frame", "stable_ids"]


class Output(NamedTuple):
    """What a method returns: ``logits`` [*N, K] and, in training, its loss terms, each already weighted.

    The objective is the sum of ``losses``; a method in eval mode or without a target returns an empty dict.
    """

    logits: Tensor
    losses: dict[str, Tensor]


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


def stable_ids(names: Iterable[Any]) -> Tensor:
    """63-bit integers int64 [n] that identify the samples: integers stay as they are, other names are hashed.

    The hash (BLAKE2b) is the same in every process and on every machine, so masks keyed by it are too.
    """
    if not isinstance(names, Iterable):
        raise TypeError(f"names: expected a list of names, got {shown(names)}")
    values = []
    for name in names:
        if isinstance(name, int) or (hasattr(name, "__index__") and not isinstance(name, bool)):
            values.append(int(name))
        else:
            digest = hashlib.blake2b(str(name).encode(), digest_size=8).digest()
            values.append(int.from_bytes(digest, "little") >> 1)
    return torch.tensor(values, dtype=torch.int64)


def find_ids(known: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of the ids [n] stands among ``known`` [k], ascending, k >= 1: int64 [n], and bool [n] whether it does.

    The place of an id that is not there is that of another one.
    """
    place = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
    return place, known[place] == ids


ANY = Is("anything", object)
_BATCH = {
    "features": Named(ANY),
    "valid": Named(ANY, 0),
    "observed": Named(ANY, 0),
    "fill": Named(Whole(0), 0),
    "ids": Maybe(Array("integer", "[*N]")),
    "extras": Named(Is("a tensor", Tensor), 0),
}


@dataclass(repr=False)
class MultimodalBatch:
    """Some samples of every modality, with what is known about what is missing.

    features : dict of Tensor
        ``features[m]`` float [*N, T, D] (vectors: T = 1), images [*N, C, H, W], volumes [*N, C, X, Y, Z], or token ids
        int64 [*N, T]. The dict's order is the order of the modalities everywhere.
    present : bool [*N, M]
    target : int64 classes [*N], float32 scores [*N], bool [*N, K] for several labels a sample, or int64 [*N, ...] for
        segmentation; optional
    valid, observed : dict of bool [*N, T], defaults all True and ``valid & present``
    complete : the same samples before anything was dropped, where a method's training may see them; optional
    ids : int64, the samples' stable ids, [*N] or [B]; optional
    fill : ``fill[m]`` is the token id that replaces a dropped token of modality m (first and last valid token stay)
    extras : anything else with the samples first, such as ``speaker`` [B, U] and ``utterance`` bool [B, U]

    Shapes and dtypes are checked when a batch is made (ValueError, TypeError); values are checked once, when a
    MultimodalDataset is made, and by `check_values`.
    """

    features: dict[str, Tensor]
    present: Tensor
    target: Tensor | None = None
    valid: dict[str, Tensor] = field(default_factory=dict)
    observed: dict[str, Tensor] = field(default_factory=dict)
    complete: MultimodalBatch | None = None
    ids: Tensor | None = None
    fill: dict[str, int] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_all(_BATCH, vars(self))
        Maybe(BATCH)("complete", self.complete)
        if not isinstance(self.present, Tensor) or self.present.dtype != torch.bool:
            raise TypeError(f"present: expected a bool tensor [*N, M], got {_kind(self.present)}")
        if self.present.ndim < 2 or self.present.shape[-1] != len(self.features):
            raise ValueError(
                f"present: expected shape [*N, {len(self.features)}] for the modalities {list(self.features)}, "
                f"got {tuple(self.present.shape)}"
            )
        for name in ("valid", "observed", "fill"):
            unknown = set(getattr(self, name)) - set(self.features)
            if unknown:
                raise ValueError(f"{name}: unknown modalities {sorted(unknown)}; known are {list(self.features)}")
        valid, observed = {}, {}
        for m, (name, x) in enumerate(self.features.items()):
            if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.int64):
                raise TypeError(f"features[{name!r}]: expected a tensor of floats or int64 token ids, got {_kind(x)}")
            if tuple(x.shape[: len(self.shape)]) != self.shape:
                raise ValueError(
                    f"features[{name!r}]: expected the leading shape {self.shape} of present, got {tuple(x.shape)}"
                )
            if not x.is_floating_point() and x.ndim != len(self.shape) + 1:
                raise TypeError(
                    f"features[{name!r}]: expected int64 token ids [*N, T] or float features, got {x.dtype} "
                    f"{tuple(x.shape)}"
                )
            frames = x.shape[frame_axis(x, len(self.shape))]
            expected = (*self.shape, frames)
            if name in self.valid:
                valid[name] = self.valid[name]
            else:
                valid[name] = torch.ones(expected, dtype=torch.bool, device=self.present.device)
            self._check_mask("valid", name, valid[name], expected)
            if name in self.observed:
                observed[name] = self.observed[name]
            else:
                observed[name] = valid[name] & self.present[..., m, None]
            self._check_mask("observed", name, observed[name], expected)
        self.valid, self.observed = valid, observed
        if self.target is not None:
            self._check_target(self.target)
        for what, rows in {"ids": self.ids, **self.extras}.items():
            if rows is not None and (rows.ndim < 1 or rows.shape[0] != self.shape[0]):
                raise ValueError(f"{what}: expected {self.shape[0]} rows, got shape {tuple(rows.shape)}")
        if self.complete is not None and self.complete.shape != self.shape:
            raise ValueError(f"complete: expected the leading shape {self.shape}, got {self.complete.shape}")

    def _check_target(self, target: Tensor) -> None:
        if not isinstance(target, Tensor):
            raise TypeError(f"target: expected a tensor, got {_kind(target)}")
        if target.dtype not in (torch.bool, torch.int64) and not target.is_floating_point():
            raise TypeError(f"target: expected int64 classes, float scores or bool labels, got {_kind(target)}")
        if tuple(target.shape[: len(self.shape)]) != self.shape:
            raise ValueError(f"target: expected the leading shape {self.shape}, got {tuple(target.shape)}")
        if target.dtype == torch.bool and (target.ndim != len(self.shape) + 1 or not target.shape[-1]):
            raise ValueError(f"target: expected bool labels [*N, K] with N = {self.shape}, got {tuple(target.shape)}")

    @staticmethod
    def _check_mask(what: str, name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(f"{what}[{name!r}]: expected bool {expected}, got {_kind(mask)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading shape ``N``."""
        return tuple(self.present.shape[:-1])

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def device(self) -> torch.device:
        return self.present.device

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        parts = [f"{name} {list(x.shape)}" for name, x in self.features.items()]
        target = "none" if self.target is None else f"{list(self.target.shape)}"
        return f"MultimodalBatch({', '.join(parts)}; present {list(self.present.shape)}, target {target})"

    def index(self, modality: str) -> int:
        """The place of ``modality`` in ``modalities``; ValueError for a name that is not there."""
        if Text("modality", modality) not in self.features:
            raise ValueError(f"modality: expected one of {list(self.features)}, got {modality!r}")
        return self.modalities.index(modality)

    def _map(self, function) -> MultimodalBatch:  # type: ignore[no-untyped-def]
        """The batch with ``function`` applied to every tensor, without checking the shapes again."""
        result = object.__new__(MultimodalBatch)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                value = function(value)
            elif isinstance(value, dict):
                value = {k: function(v) if isinstance(v, Tensor) else v for k, v in value.items()}
            elif isinstance(value, MultimodalBatch):
                value = value._map(function)
            setattr(result, f.name, value)
        return result

    def __getitem__(self, rows: Tensor | slice | Sequence[int] | int) -> MultimodalBatch:
        """The samples at ``rows`` (an index tensor, bool mask, slice, list or one integer), as a batch."""
        index = _rows(rows, len(self), self.device)
        try:
            return self._map(lambda x: x[index])
        except IndexError as error:
            raise IndexError(f"rows: expected places below {len(self)} ({error})") from error

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MultimodalBatch:
        where = Device()("device", device)
        Flag()("non_blocking", non_blocking)
        return self._map(lambda x: x.to(where, non_blocking=non_blocking))

    def replace(self, **changes: Any) -> MultimodalBatch:
        """A copy with some fields exchanged (checked); tensors that are not exchanged are shared."""
        return replace(self, **changes)

    def drop(
        self,
        present: Tensor | Sequence[str] | None = None,
        observed: Mapping[str, Tensor] | None = None,
        keep_complete: bool = False,
    ) -> MultimodalBatch:
        """The batch with modalities and frames taken away: what is gone is zero (tokens: ``fill``) and masked.

        present : bool [*N, M], or [M] for all samples alike; True keeps the modality where it was there. Or the names
            of the modalities that are kept in all samples, such as ``["audio"]``
        observed : per modality bool [*N, T]; True keeps the frame where it was observed
        keep_complete : store this batch as the result's ``complete``, unless there is one already

        A modality that loses all its frames becomes absent. ``valid`` never changes.
        """
        keep = self.present
        Flag()("keep_complete", keep_complete)
        Maybe(Named(ANY, 0))("observed", observed)
        if present is not None:
            present = self.named(present)
            if not isinstance(present, Tensor) or present.dtype != torch.bool:
                raise TypeError(f"present: expected a bool tensor [*N, M] or [M], got {_kind(present)}")
            if present.shape not in (keep.shape, keep.shape[-1:]):
                raise ValueError(f"present: expected [*N, M] = {tuple(keep.shape)} or [M], got {tuple(present.shape)}")
            keep = keep & present
        if observed is not None and (unknown := set(observed) - set(self.features)):
            raise ValueError(f"observed: unknown modalities {sorted(unknown)}; known are {list(self.features)}")
        features, seen, there = {}, {}, []
        for m, (name, x) in enumerate(self.features.items()):
            mask = self.observed[name] & keep[..., m, None]
            if observed is not None and name in observed:
                if not isinstance(observed[name], Tensor) or observed[name].dtype != torch.bool:
                    raise TypeError(f"observed[{name!r}]: expected a bool tensor, got {_kind(observed[name])}")
                if observed[name].shape != mask.shape:
                    raise ValueError(
                        f"observed[{name!r}]: expected {tuple(mask.shape)}, got {tuple(observed[name].shape)}"
                    )
                mask = mask & observed[name]
            features[name], seen[name] = _blank(x, mask, self.valid[name], self.fill.get(name)), mask
            there.append(keep[..., m] & mask.any(-1))
        complete = self if keep_complete and self.complete is None else self.complete
        return self.replace(features=features, present=torch.stack(there, -1), observed=seen, complete=complete)

    def named(self, present: Any) -> Any:
        """``present`` as bool [M] where it is a list of modalities' names, and as it came otherwise."""
        if isinstance(present, (list, tuple, set)) and present and all(isinstance(name, str) for name in present):
            check_known("present", present, self.features)
            on = [self.index(name) for name in present]
            return torch.tensor([m in on for m in range(len(self.features))], device=self.device)
        return present

    def widened(self, feature_shapes: Mapping[str, tuple[int, ...]], fill: Mapping[str, int] = {}) -> MultimodalBatch:
        """The batch with the modalities of ``feature_shapes``, in their order; those that it lacks are absent.

        feature_shapes : per modality the shape of one sample, as `MultimodalDataset.feature_shapes` gives it
        fill : per token modality the id of a dropped token
        Raises ValueError for a batch with a modality that is not among them.
        """
        Named(ANY)("feature_shapes", feature_shapes)
        Named(Whole(0), 0)("fill", fill)
        if unknown := [name for name in self.features if name not in feature_shapes]:
            raise ValueError(f"features: unknown modalities {unknown}; feature_shapes has {list(feature_shapes)}")
        features, valid, observed, columns = {}, {}, {}, []
        for name, shape in feature_shapes.items():
            if name in self.features:
                features[name], valid[name], observed[name] = self.features[name], self.valid[name], self.observed[name]
                columns.append(self.present[..., self.index(name)])
                continue
            kind = torch.int64 if len(shape) == 1 else torch.float32
            x = torch.zeros(*self.shape, *shape, dtype=kind, device=self.device)
            frames = (*self.shape, x.shape[frame_axis(x, len(self.shape))])
            features[name] = x
            # A missing text has no tokens, as in `from_arrays`; other modalities have the frames of the data set.
            valid[name] = torch.full(frames, len(shape) > 1, dtype=torch.bool, device=self.device)
            observed[name] = torch.zeros(frames, dtype=torch.bool, device=self.device)
            columns.append(torch.zeros(self.shape, dtype=torch.bool, device=self.device))
        return self.replace(
            features=features,
            present=torch.stack(columns, -1),
            valid=valid,
            observed=observed,
            fill={**fill, **self.fill},
            complete=None if self.complete is None else self.complete.widened(feature_shapes, fill),
        )

    def select(self, modalities: Sequence[str]) -> MultimodalBatch:
        """The batch with these modalities alone, in this order. A sample may be left with none of them."""
        check_known("modalities", Several(Text, 1)("modalities", modalities), self.features)
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"modalities: expected a list of different names, got {modalities!r}")
        places = [self.index(name) for name in modalities]
        pick = lambda d: {name: d[name] for name in modalities if name in d}
        return self.replace(
            features=pick(self.features),
            present=self.present[..., places],
            valid=pick(self.valid),
            observed=pick(self.observed),
            fill=pick(self.fill),
            complete=None if self.complete is None else self.complete.select(modalities),
        )

    def blank(self, modality: str) -> Tensor:
        """The features of ``modality`` when all of it is dropped: zeros, or ``fill`` between the ends."""
        self.index(modality)
        x, valid = self.features[modality], self.valid[modality]
        return _blank(x, torch.zeros_like(valid), valid, self.fill.get(modality))

    def check_values(self, classes: int | None = None) -> None:
        """Raise ValueError unless all values that count are finite and all targets lie in [0, classes)."""
        Maybe(Whole(1))("classes", classes)
        for m, (name, x) in enumerate(self.features.items()):
            if x.is_floating_point() and not x.is_meta and not _all_finite(x):
                bad = ~torch.isfinite(x) & per_frame(self.observed[name], x)
                if bad.any():
                    row = bad.flatten(len(self.shape)).any(-1).nonzero()[0].tolist()
                    raise ValueError(
                        f"features[{name!r}]: expected finite values where the modality is present, got "
                        f"{int(bad.sum())} NaN or infinite ones, the first in sample {row}"
                    )
            if bool((self.observed[name] & ~(self.valid[name] & self.present[..., m, None])).any()):
                raise ValueError(f"observed[{name!r}]: expected only frames that are valid and of present modalities")
        if self.target is None or self.target.dtype == torch.bool:
            return
        if self.target.is_floating_point():
            if not torch.isfinite(self.target).all():
                raise ValueError("target: expected finite scores, got NaN or infinity")
        elif classes is not None and self.target.numel():
            low, high = int(self.target.min()), int(self.target.max())
            if low < 0 or high >= classes:
                raise ValueError(f"target: expected classes in [0, {classes}), got values from {low} to {high}")


def _all_finite(x: Tensor) -> bool:
    """Whether the values are surely finite; a sum costs no memory and a tenth of the time. It may overflow."""
    return bool(torch.isfinite(x.sum()))


def _kind(x: Any) -> str:
    """What ``x`` is, for messages."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _rows(rows: Any, n: int, device: torch.device) -> Tensor | slice:
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
        raise TypeError(f"rows: expected integers, a bool mask or a slice, got {_kind(rows)}")
    if rows.ndim > 1:
        raise ValueError(f"rows: expected one axis, got shape {tuple(rows.shape)}")
    if rows.dtype == torch.bool:
        if len(rows) != n:
            raise ValueError(f"rows: expected a bool mask of the {n} samples, got one of {len(rows)}")
        return rows
    return rows.reshape(-1).long()


def _blank(x: Tensor, keep: Tensor, valid: Tensor, fill: int | None) -> Tensor:
    """``x`` with the frames outside ``keep`` zeroed; token ids become ``fill`` where valid, but for the two ends."""
    if x.is_meta:  # of a data set that reads its samples on demand
        return x
    if x.is_floating_point():
        return torch.where(per_frame(keep, x), x, 0)  # where, not a product: a NaN placeholder must not survive
    before = valid.cumsum(-1)
    ends = valid & ((before == 1) | (before == before[..., -1:]))
    filled = torch.full_like(x, 0 if fill is None else fill)
    return torch.where(keep | ends | ~valid, x, filled)


Read = Callable[[list[int]], Mapping[str, Any]]


class MultimodalDataset(torch.utils.data.Dataset):
    """A whole split: one MultimodalBatch, the samples' names, and facts about where it comes from.

    ``dataset[rows]`` is a MultimodalBatch: small data stay on one device as whole tensors and a mini-batch is an
    index selection. With a DataLoader, pass ``collate_fn=MultimodalDataset.collate``.

    A *streamed* data set (`from_reader`, and `from_arrays` on memory-mapped arrays) reads features when samples are
    asked for. Its ``data`` has everything but their values: features there are on torch's device "meta", which knows
    shapes and types alone, and whoever computes with them gets an error. ``to(device)`` reads all of it into memory.

    ``info`` holds at least ``name``, ``task`` ("classification", "multilabel" or "regression") and ``outputs`` (K);
    ``classes``, where the classes or labels have names; loaders add ``source``, ``fingerprint``, ``split`` and what
    else a reader should know.
    """

    def __init__(
        self,
        data: MultimodalBatch,
        info: Mapping[str, Any] | None = None,
        names: Sequence[str] | None = None,
        *,
        reader: Any = None,  # what from_reader makes
    ):
        if len(BATCH("data", data)) == 0:
            raise ValueError("data: expected at least one sample, got an empty split")
        Maybe(Named(ANY, 0))("info", info)
        if isinstance(names, str) or not hasattr([] if names is None else names, "__len__"):
            raise TypeError(f"names: expected a list of names, got {shown(names)}")
        Maybe(Is("what from_reader makes", _Reader))("reader", reader)
        if reader is None and any(x.is_meta for x in data.features.values()):
            raise ValueError("data: expected features with values, got those of a streamed data set; use its methods")
        _check_names(data.features)
        if names is not None and len(names) != len(data):
            raise ValueError(f"names: expected {len(data)} names, got {len(names)}")
        self.data = data
        self._reader = reader
        self.names = None if names is None else list(names)
        self.info: dict[str, Any] = dict(info or {})
        if data.target is not None:
            labels, scores = data.target.dtype == torch.bool, data.target.is_floating_point()
            self.info.setdefault("task", "multilabel" if labels else "regression" if scores else "classification")
            if "outputs" not in self.info:
                self.info["outputs"] = 1 if scores else data.target.shape[-1] if labels else int(data.target.max()) + 1
        self.info.setdefault("name", "arrays")
        if data.ids is None:
            self.data = data.replace(ids=stable_ids(self.names or range(len(data))).to(data.device))

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.data.modalities

    @property
    def present(self) -> Tensor:
        return self.data.present

    @property
    def target(self) -> Tensor | None:
        return self.data.target

    @property
    def ids(self) -> Tensor:
        assert self.data.ids is not None
        return self.data.ids

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def streamed(self) -> bool:
        """Whether features are read on demand."""
        return self._reader is not None

    @property
    def feature_shapes(self) -> dict[str, tuple[int, ...]]:
        """Per modality the shape of one sample: (T, D), (C, H, W), (C, X, Y, Z), or (T,) for token ids."""
        lead = len(self.data.shape)
        return {name: tuple(x.shape[lead:]) for name, x in self.data.features.items()}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: Tensor | slice | Sequence[int] | int) -> MultimodalBatch:
        if self._reader is None:
            return self.data[rows]
        index = self._places(rows)
        return self._reader.fill(self.data[index], index)

    def __getitems__(self, rows: Sequence[int]) -> MultimodalBatch:
        return self[rows]

    def _places(self, rows: Any) -> Tensor:
        """int64 [k]: the samples at ``rows``, all of which are there."""
        n = len(self)
        found = _rows(rows, n, torch.device("cpu"))
        index = torch.arange(n)[found] if isinstance(found, slice) or found.dtype == torch.bool else found.cpu()
        if bool(((index < -n) | (index >= n)).any()):
            raise IndexError(f"rows: expected an index below {n}, got {index[(index < -n) | (index >= n)][0]}")
        return index

    @staticmethod
    def collate(batch: MultimodalBatch) -> MultimodalBatch:
        """For DataLoader: the batch was already selected as one."""
        return BATCH("batch", batch)

    def __repr__(self) -> str:
        there = self.present.flatten(0, -2).float().mean(0)
        parts = [
            f"{name} {list(shape)} ({p:.0%})"
            for (name, shape), p in zip(self.feature_shapes.items(), there.tolist(), strict=True)
        ]
        return f"MultimodalDataset({self.info['name']!r}, {len(self)} samples: {', '.join(parts)})"

    def to(self, device: torch.device | str) -> MultimodalDataset:
        """As `MultimodalBatch.to`; a streamed data set is read as a whole, and is none any more."""
        return MultimodalDataset(self[:].to(device) if self.streamed else self.data.to(device), self.info, self.names)

    def subset(self, rows: Tensor | slice | Sequence[int]) -> MultimodalDataset:
        """The samples at ``rows``, integers from -n to n - 1 or a bool mask of all n, as a data set of its own.

        Raises TypeError for what is neither, ValueError for a mask of another length, IndexError for a sample that is
        not there.
        """
        index = self._places(rows)
        if not index.numel():
            raise ValueError("rows: expected at least one sample, got an empty split")
        names = None if self.names is None else [self.names[i] for i in index.tolist()]
        reader = None if self._reader is None else self._reader.at(index)
        return MultimodalDataset(self.data[index.to(self.device)], self.info, names, reader=reader)

    def select(self, modalities: Sequence[str]) -> MultimodalDataset:
        """As `MultimodalBatch.select`, for the whole split."""
        return MultimodalDataset(self.data.select(modalities), self.info, self.names, reader=self._reader)

    def drop(
        self,
        present: Tensor | Sequence[str] | None = None,
        observed: Mapping[str, Tensor] | None = None,
        keep_complete: bool = False,
    ) -> MultimodalDataset:
        """As `MultimodalBatch.drop`, for the whole split."""
        data = self.data.drop(present, observed, keep_complete)
        return MultimodalDataset(data, self.info, self.names, reader=self._reader)

    @classmethod
    def from_arrays(
        cls,
        features: Mapping[str, Any],
        target: Any = None,
        *,
        present: Any = None,
        lengths: Mapping[str, Any] | None = None,
        ids: Iterable[Any] | None = None,
        classes: int | Sequence[str] | None = None,
        tokens: Sequence[str] | Mapping[str, int] = (),
        fill: Mapping[str, int] | None = None,
        info: Mapping[str, Any] | None = None,
        allow_empty: bool = False,
    ) -> MultimodalDataset:
        """A data set from arrays, tensors, lists or frames; what is NaN, None or masked becomes missing.

        features : per modality an array or frame [n, D] (vectors, of integers too), [n, T, D], [n, C, H, W],
            [n, C, X, Y, Z], token ids [n, T] where ``tokens`` says so, or a list of n arrays [T_i, D] or token ids
            [T_i] of any lengths, None where the modality is missing
        target : n integer classes, n float scores, n strings or a categorical (classes with names), n x K zeros and
            ones (several labels a sample, K > 1), or integers [n, ...] (segmentation); optional
        present : bool [n, M]; values where it is False are ignored, a NaN where it is True is an error.
            Without it, a sample whose values are all NaN misses the modality; a frame that is all NaN was dropped
        lengths : per modality n integers; frames from there on are padding, 0 means missing
        ids : n stable names or integers, unique; default the index of the frames, else 0 to n - 1
        classes : number of classes K, or their names in order; default the largest class + 1, the categories, or the
            strings that occur, sorted. Splits that are made one by one should say it. A number makes zeros and ones
            [n, T] the classes of T places
        tokens : the modalities whose integers are token ids, such as ``("text",)``, or each with the size of its
            vocabulary, ``{"text": 30522}``
        fill : per modality of token ids the id that stands for a dropped token; this says that they are tokens, too
        allow_empty : accept samples, and modalities, of which nothing is there

        Arrays that are mapped from files (``numpy.memmap``, ``numpy.load(..., mmap_mode="r")``) are looked through
        once, a piece at a time, and stay where they are: the data set is streamed.

        Raises ValueError naming the argument, what was expected and what came: no samples, unequal sample counts,
        names that torch keeps for itself, wrong ranks, unknown modalities, partly NaN frames, infinities, ids outside
        the vocabulary, classes out of range, empty samples; TypeError for what is not numbers. Warns of images with the
        channels last and of bytes that nobody scaled.
        """
        Is("a dict of arrays", Mapping)("features", features)
        if not features:
            raise ValueError("features: expected at least one modality, got none")
        _check_names(features)
        Flag()("allow_empty", allow_empty)
        Maybe(Named(ANY, 0))("info", info)
        sizes, fill = _token_settings(tokens, fill, lengths, features)
        index = _common_index({**{f"features[{m!r}]": x for m, x in features.items()}, "target": target})
        columns: dict[str, Any] = {}
        for name, values in features.items():
            stays = _is_mapped(values)
            columns[name] = values if stays else _as_features(name, values, (lengths or {}).get(name), name in sizes)
        counts = {name: len(x[0] if isinstance(x, tuple) else x) for name, x in columns.items()}
        n = next(iter(counts.values()))
        if n == 0:
            raise ValueError("features: expected at least one sample, got an empty split")
        if len(set(counts.values())) > 1:
            raise ValueError(f"features: expected the same number of samples in every modality, got {counts}")
        given = None if present is None else _as_present(present, n, len(features))
        tensors: dict[str, Tensor] = {}
        valid: dict[str, Tensor] = {}
        observed: dict[str, Tensor] = {}
        for m, (name, column) in enumerate(columns.items()):
            on = None if given is None else given[:, m]
            if isinstance(column, tuple):
                x, valid[name], there = column
                x, observed[name] = _observed(name, x, valid[name], there, on, name in sizes, sizes.get(name))
                tensors[name] = _blank(x, observed[name], valid[name], fill.get(name))
            else:
                rest = (on, name in sizes, sizes.get(name))
                found = _looked_through(name, column, (lengths or {}).get(name), *rest)
                tensors[name], valid[name], observed[name] = found
            if not allow_empty and not observed[name].any():
                raise ValueError(
                    f"features[{name!r}]: the modality is missing in every sample; leave it out, or pass "
                    f"allow_empty=True"
                )
        here = torch.stack([seen.any(-1) for seen in observed.values()], -1)
        if not allow_empty:
            _check_empty(here, ", or pass allow_empty=True")
        facts, y = _facts(info, target, classes, sizes, n)
        names = _sample_names(index if ids is None else ids, n)
        keys = stable_ids(range(n) if names is None else names)
        data = MultimodalBatch(tensors, here, y, valid, observed, ids=keys, fill=fill)
        data.check_values(facts.get("outputs"))
        mapped = {name: values for name, values in features.items() if _is_mapped(values)}
        reader = _Reader(_Mapped(mapped), torch.arange(n), sizes) if mapped else None
        return cls(data, facts, None if names is None else [str(name) for name in names], reader=reader)

    @classmethod
    def from_reader(
        cls,
        read: Read,
        present: Any,
        ids: Iterable[Any] | None = None,
        target: Any = None,
        *,
        lengths: Mapping[str, Any] | None = None,
        classes: int | Sequence[str] | None = None,
        tokens: Sequence[str] | Mapping[str, int] = (),
        fill: Mapping[str, int] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> MultimodalDataset:
        """A streamed data set: features are read when samples are asked for, so they may be larger than memory.

        read : a function of a list of row numbers from 0 to n - 1, in any order, that returns per modality those rows'
            features: an array [k, ...] of the ranks that `from_arrays` takes, or a list of k arrays. Rows of a modality
            that is not there may hold anything, or be None in a list. It is called once here, for one row a modality,
            which says the shapes, and once a batch in training; in the processes of a DataLoader, too
        present : bool [n, M], the modalities in the order of what ``read`` returns
        ids : n stable names or integers, unique; default 0 to n - 1
        target, classes, tokens, fill : as in `from_arrays`; they are in memory
        lengths : per modality n integers; frames from there on are padding. The longest is the number of frames that
            every batch is padded to; without it, all samples have as many frames as the first one read

        The values are checked as they are read: ValueError for another shape than the first, for NaN where the modality
        is present, and for ids outside the vocabulary. A fingerprint of the data set is one of its ids, targets, masks
        and shapes; where the values behind them may change, say which they are in ``info["fingerprint"]``.

        Raises ValueError naming the argument, what was expected and what came; TypeError for a wrong type.
        """
        Function("a function of a list of row numbers")("read", read)
        Maybe(Named(ANY, 0))("info", info)
        here = tensor("present", present).clone()
        if here.dtype != torch.bool:
            raise TypeError(f"present: expected bool [n, M], got {_kind(here)}")
        if here.ndim != 2 or not here.numel():
            raise ValueError(f"present: expected bool [n, M], got {_kind(here)}")
        n, M = here.shape
        if not here.any(0).all():
            raise ValueError(
                f"present: expected every modality in some sample, got none in column {here.sum(0).argmin()}"
            )
        _check_empty(here)
        first = sorted({int(here[:, m].nonzero()[0]) for m in range(M)})
        read_first = Is("a dict of arrays", Mapping)("read(rows)", read(first))
        if len(read_first) != M:
            raise ValueError(f"present, read: expected {M} columns' features, got those of {list(read_first)}")
        sizes, fill = _token_settings(tokens, fill, lengths, read_first)
        try:
            _check_names(read_first)
            found = {m: _as_features(m, values, None, m in sizes)[0] for m, values in read_first.items()}
        except (TypeError, ValueError) as error:
            raise type(error)(f"read: {error}") from error
        features, valid = {}, {}
        for m, (name, x) in enumerate(found.items()):
            if len(x) != len(first):
                raise ValueError(f"read: expected {len(first)} rows of {name!r}, got {len(x)}")
            shape = list(x.shape[1:])
            axis = frame_axis(x, 1) - 1
            if (given := (lengths or {}).get(name)) is not None:
                count = _lengths(name, given, n)
                shape[axis] = max(int(count.max()), 1)
                valid[name] = torch.arange(shape[axis]) < count[:, None]
                here[:, m] &= count > 0
            features[name] = torch.empty(n, *shape, dtype=x.dtype, device="meta")
        facts, y = _facts(info, target, classes, sizes, n)
        names = _sample_names(ids, n)
        keys = stable_ids(range(n) if names is None else names)
        data = MultimodalBatch(features, here, y, valid, ids=keys, fill=fill)
        data.check_values(facts.get("outputs"))
        index = torch.tensor(first)
        _Reader(lambda rows: read_first, torch.arange(n), sizes).fill(data[index], index)  # which checks the values
        reader = _Reader(read, torch.arange(n), sizes)
        return cls(data, facts, None if names is None else [str(name) for name in names], reader=reader)

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        columns: Mapping[str, Sequence[str]],
        target: str | Sequence[str] | None = None,
        **options: Any,
    ) -> MultimodalDataset:
        """A data set of vectors from a pandas DataFrame: ``columns[m]`` names the columns of modality m.

        target : the column of the classes or scores, or a list of columns of zeros and ones: several labels a sample

        The frame's index gives the ids; a row whose columns of one modality are all NaN or None misses it. Options as
        in `from_arrays`. Raises TypeError for what is no frame, ValueError for columns that are not there or not
        unique.
        """
        if not hasattr(frame, "columns") or not hasattr(frame, "index"):
            raise TypeError(f"frame: expected a pandas DataFrame, got {shown(frame)}")
        Named(ANY)("columns", columns)
        lists = {m: _names_of(f"columns[{m!r}]", given) for m, given in columns.items()}
        asked = [] if target is None else list(target) if isinstance(target, (list, tuple)) else [target]
        wanted = [c for names in lists.values() for c in names] + asked
        if unknown := [c for c in wanted if c not in frame.columns]:
            raise ValueError(f"columns, target: {unknown} are not in the frame, which has {list(frame.columns)}")
        if len(set(wanted)) != len(wanted):
            raise ValueError("columns, target: expected every column once, got one in two places")
        y = None if target is None else frame[asked] if isinstance(target, (list, tuple)) else frame[target]
        return cls.from_arrays({m: frame[names] for m, names in lists.items()}, y, **options)


class _Reader(NamedTuple):
    """Where the features of a streamed data set come from."""

    read: Read
    rows: Tensor  # int64 [n]: the numbers that the samples have there
    sizes: Mapping[str, int | None]  # the modalities of token ids, and their vocabularies

    def at(self, index: Tensor) -> _Reader:
        return self._replace(rows=self.rows[index])

    def fill(self, batch: MultimodalBatch, index: Tensor) -> MultimodalBatch:
        """``batch``, the samples at ``index`` without their values, with them."""
        rows = self.rows[index].tolist()
        values = Is("a dict of arrays", Mapping)("read(rows)", self.read(rows)) if rows else {}
        found = {name: self._column(name, values, x, rows) for name, x in batch.features.items() if x.is_meta}
        batch = self._filled(batch, found)
        batch.check_values()
        return batch

    def _column(self, name: str, values: Mapping[str, Any], like: Tensor, rows: list[int]) -> Tensor:
        if not rows:
            return torch.zeros(like.shape, dtype=like.dtype)
        if name not in values:
            raise ValueError(f"read: expected features of {name!r}, got those of {list(values)}")
        given = values[name]
        if isinstance(given, (list, tuple)) and all(v is None for v in given):
            return torch.zeros(like.shape, dtype=like.dtype)
        x, _ = _numbers(name, given, None, name in self.sizes, warn=False)
        if x.ndim == like.ndim and x.ndim < 4 and x.shape[1] < like.shape[1]:  # shorter sequences are padded
            short, x = x, torch.zeros(len(x), *like.shape[1:2], *x.shape[2:], dtype=x.dtype)
            x[:, : short.shape[1]] = short
        if x.shape != like.shape:
            raise ValueError(
                f"read: expected features[{name!r}] of shape {tuple(like.shape)} for {len(rows)} rows from "
                f"{rows[0]}, got {tuple(x.shape)}"
            )
        return x

    def _filled(self, batch: MultimodalBatch, found: Mapping[str, Tensor]) -> MultimodalBatch:
        features = dict(batch.features)
        for name, x in found.items():
            keep = batch.observed[name]
            if name in self.sizes:
                x = _checked_ids(name, x, keep, self.sizes[name])
            # Whole batches are not copied: a streamed batch is large.
            features[name] = x if bool(keep.all()) else _blank(x, keep, batch.valid[name], batch.fill.get(name))
        complete = None if batch.complete is None else self._filled(batch.complete, found)
        return batch.replace(features=features, complete=complete)


class _Mapped:
    """Reads rows of arrays that are mapped from files.

    They are read from the file where it holds what the array does, which costs no memory but theirs. Else they come
    through the mapping, some at a time: a row, however small, maps a large page (2 MB) of the file.
    """

    def __init__(self, arrays: Mapping[str, Any]):
        self.arrays = dict(arrays)
        self.files = {name: _FileRows.of(x) for name, x in arrays.items()}

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: self._taken(name, x, rows) for name, x in self.arrays.items()}

    def _taken(self, name: str, x: Any, rows: list[int]) -> Tensor:
        file, found = self.files[name], torch.empty(0)
        if file is not None and (read := file.read(name, rows)) is not None:
            return read
        for first in range(0, len(rows), 16):
            some = tensor(f"features[{name!r}]", x[rows[first : first + 16]])
            _let_go(x)
            if not first:
                found = torch.empty(len(rows), *some.shape[1:], dtype=some.dtype)
            found[first : first + 16] = some
        return found


class _FileRows(NamedTuple):
    """Where the rows of an array lie in a file."""

    path: str
    identity: tuple[int, int]  # the file's device and inode: another one may come to have its name
    start: int  # bytes before the first row
    shape: tuple[int, ...]  # of a row
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Any) -> _FileRows | None:
        """None where the file alone does not say what the array holds, or the system cannot read at a place."""
        changed, root = False, x
        while not isinstance(root.base, mmap.mmap):
            changed, root = changed or getattr(root, "mode", None) == "c", root.base
        path, before = getattr(root, "filename", None), getattr(root, "offset", None)
        changed = changed or getattr(root, "mode", None) == "c"  # copied on write: the file does not know it
        if changed or path is None or before is None or not hasattr(os, "preadv"):
            return None
        if not (x.size and x.flags.c_contiguous and x.dtype.isnative and x.dtype.kind in "iuf"):
            return None
        try:
            about, like = os.stat(path), torch.as_tensor(x[:1].copy())
        except (OSError, TypeError):
            return None
        start = before + x.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        return cls(os.fspath(path), (about.st_dev, about.st_ino), start, x.shape[1:], like.dtype)

    def read(self, name: str, rows: list[int]) -> Tensor | None:
        """The rows [k, ...]; None where the file is no longer there."""
        found = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        held = memoryview(found.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        size = len(held) // len(rows)
        try:
            file = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return None
        try:
            about = os.fstat(file)
            if (about.st_dev, about.st_ino) != self.identity:
                return None
            for row, place in enumerate(rows):
                rest, begin = held[row * size : (row + 1) * size], self.start + place * size
                while rest:
                    count = os.preadv(file, [rest], begin)
                    if count == 0:
                        raise ValueError(f"features[{name!r}]: its file ends in row {place}, which was there before")
                    rest, begin = rest[count:], begin + count
        finally:
            os.close(file)
        return found


BATCH = Is("a MultimodalBatch", MultimodalBatch)
DATASET = Is("a MultimodalDataset", MultimodalDataset)


def in_parts(data: MultimodalDataset | MultimodalBatch, batch_size: int) -> Iterator[MultimodalBatch]:
    """Batches of at most ``batch_size`` samples, in their order."""
    Either(DATASET, BATCH)("data", data)
    Whole(1)("batch_size", batch_size)
    for start in range(0, len(data), batch_size):
        yield data[start : start + batch_size]


# From what a user has to tensors

_TAKEN = nn.ModuleDict()  # its attributes cannot name one of its modules


def _check_names(names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"features: expected strings as the names of modalities, got {shown(name)}")
        if not name or "." in name or hasattr(_TAKEN, name):
            raise ValueError(
                f"features: {name!r} cannot name a modality, since torch could not keep its encoder under that name; "
                f"expected a name without a dot that is no attribute of nn.ModuleDict, got {name!r}"
            )


def _names_of(what: str, given: Any) -> list[Any]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(f"{what}: expected a list of names, got {shown(given)}")
    return list(given)


def _token_settings(
    tokens: Any, fill: Any, lengths: Any, features: Mapping[str, Any]
) -> tuple[dict[str, int | None], dict[str, int]]:
    """Per modality of token ids the size of its vocabulary, None where it is not said; and ``fill``, checked."""
    for what, given in (("lengths", lengths), ("fill", fill)):
        if given is not None:
            check_known(what, Is("a dict by modality", Mapping)(what, given), features)
    sizes: dict[str, int | None] = dict.fromkeys(_names_of("tokens", tokens))
    check_known("tokens", sizes, features)
    if isinstance(tokens, Mapping):
        sizes = {name: int(Whole(1)(f"tokens[{name!r}]", size)) for name, size in tokens.items()}
    for name, value in (fill or {}).items():
        Whole(0, below=sizes.setdefault(name, None) or math.inf)(f"fill[{name!r}]", value)
    return sizes, dict(fill or {})


def _common_index(given: Mapping[str, Any]) -> list[Any] | None:
    """The index of the pandas frames and series among ``given``, None without one; ValueError where they differ."""
    found = {what: list(x.index) for what, x in given.items() if _is_pandas(x) and hasattr(x, "index")}
    first = next(iter(found), None)
    for what, index in found.items():
        if index != found[first]:  # type: ignore[index]
            raise ValueError(f"{what}: its index is another than that of {first}; expected the same samples in order")
    return None if first is None else found[first]


def _is_pandas(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "pandas"


def _sample_names(ids: Any, n: int) -> list[Any] | None:
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


def _check_empty(here: Tensor, hint: str = "") -> None:
    if not here.any(-1).all():
        rows = (~here.any(-1)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"present: every sample needs a modality, but {len(rows)} have none, the first at {rows[:5]}; remove them"
            f"{hint}"
        )


def _as_present(present: Any, n: int, modalities: int) -> Tensor:
    here = tensor("present", present)
    if here.dtype != torch.bool:
        raise TypeError(f"present: expected bool {(n, modalities)}, got {_kind(here)}")
    if here.shape != (n, modalities):
        raise ValueError(f"present: expected bool {(n, modalities)}, got {_kind(here)}")
    return here


def _observed(
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
    if x.is_floating_point() and not _all_finite(x):
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
        x = _checked_ids(name, x, seen, size, first)
    return x, seen


PIECE = 1 << 22  # bytes of a mapped array that are looked through at once


def _looked_through(
    name: str, values: Any, lengths: Any, given: Tensor | None, tokens: bool, size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(features without values, valid, observed) of an array that is mapped from a file: its values stay there."""
    n = len(values)
    count = None if lengths is None else _lengths(name, lengths, n)
    step = max(1, PIECE * n // max(values.nbytes, 1))
    like = valid = observed = torch.empty(0)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        piece = _as_features(name, values[rows], None if count is None else count[rows], tokens, warn=first == 0)
        on = None if given is None else given[rows]
        x, seen = _observed(name, *piece, on, tokens, size, first)
        if x.is_floating_point() and not _all_finite(x) and (torch.isinf(x) & per_frame(seen, x)).any():
            row = first + int((torch.isinf(x) & per_frame(seen, x)).flatten(1).any(-1).nonzero()[0])
            raise ValueError(
                f"features[{name!r}]: expected finite values, got infinite ones, the first in sample {row}"
            )
        if not first:  # once for all: small pieces that stay between large ones that go would keep their memory
            valid, observed = (torch.empty(n, seen.shape[1], dtype=torch.bool) for _ in range(2))
            like = torch.empty(n, *x.shape[1:], dtype=x.dtype, device="meta")
        valid[rows], observed[rows] = piece[1], seen
        _let_go(values)
    return like, valid, observed


def _is_mapped(x: Any) -> bool:
    """Whether an array lies in a file that is mapped into memory."""
    if not hasattr(x, "__array_interface__"):
        return False
    while x is not None and not isinstance(x, mmap.mmap):
        x = getattr(x, "base", None)
    return x is not None


def _let_go(x: Any) -> None:
    """Give the pages of a mapped array back: they are read again when they are needed."""
    changed = False
    while not isinstance(x, mmap.mmap):
        changed = changed or getattr(x, "mode", None) == "c"  # copied on write: pages hold what the file does not
        x = x.base
    if not changed and hasattr(mmap, "MADV_DONTNEED"):
        x.madvise(mmap.MADV_DONTNEED)


def _numbers(name: str, values: Any, lengths: Any, tokens: bool, warn: bool = True) -> tuple[Tensor, Any]:
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
            raise TypeError(f"{what}: expected integer token ids [n, T], got {_kind(x)}")
        if x.ndim != 2:
            raise ValueError(f"{what}: expected integer token ids [n, T], got {_kind(x)}")
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


def _as_features(
    name: str, values: Any, lengths: Any, tokens: bool, warn: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(features [n, ...], valid [n, T], there [n]) of one modality, from whatever the user has."""
    x, lengths = _numbers(name, values, lengths, tokens, warn)
    frames = x.shape[frame_axis(x, 1)]
    there = torch.ones(len(x), dtype=torch.bool)
    if x.is_floating_point() and not _all_finite(x):
        there = ~torch.isnan(x).flatten(1).all(-1)
    valid = torch.ones(len(x), frames, dtype=torch.bool)
    if lengths is not None:
        count = _lengths(name, lengths, len(x), frames)
        valid = torch.arange(frames) < count[:, None]
        there = there & (count > 0)
    return x, valid, there


def _lengths(name: str, lengths: Any, n: int, frames: float = math.inf) -> Tensor:
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


def _checked_ids(name: str, x: Tensor, seen: Tensor, size: int | None, first: int = 0) -> Tensor:
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


def _facts(
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
            raise TypeError(f"target: expected integers for {classes} classes, got {_kind(y)}")
        return facts, y
    if y is not None and count is None:
        count = y.shape[-1] if y.dtype == torch.bool else max(int(y.max()) + 1, 1)
    if y is not None and y.dtype == torch.bool and count != y.shape[-1]:
        raise ValueError(f"target: expected {count} labels a sample, got {_kind(y)}")
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
        raise TypeError(f"target: expected classes, scores or labels, got {_kind(y)}")
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
            f"target: expected {n} scores, or zeros and ones [{n}, K] for several labels a sample, got {_kind(y)}"
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
