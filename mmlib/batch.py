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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arrays import (
    all_finite,
    as_features,
    as_lengths,
    as_present,
    blanked,
    check_empty,
    check_modalities,
    common_index,
    facts_of,
    find_observed,
    frame_axis,
    kind_of,
    names_of,
    per_frame,
    row_index,
    sample_names,
    tensor,
    token_settings,
)
from ._streams import MappedRows, Read, Reader, is_mapped, look_through
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
            raise TypeError(f"present: expected a bool tensor [*N, M], got {kind_of(self.present)}")
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
                raise TypeError(f"features[{name!r}]: expected a tensor of floats or int64 token ids, got {kind_of(x)}")
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
            raise TypeError(f"target: expected a tensor, got {kind_of(target)}")
        if target.dtype not in (torch.bool, torch.int64) and not target.is_floating_point():
            raise TypeError(f"target: expected int64 classes, float scores or bool labels, got {kind_of(target)}")
        if tuple(target.shape[: len(self.shape)]) != self.shape:
            raise ValueError(f"target: expected the leading shape {self.shape}, got {tuple(target.shape)}")
        if target.dtype == torch.bool and (target.ndim != len(self.shape) + 1 or not target.shape[-1]):
            raise ValueError(f"target: expected bool labels [*N, K] with N = {self.shape}, got {tuple(target.shape)}")

    @staticmethod
    def _check_mask(what: str, name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(f"{what}[{name!r}]: expected bool {expected}, got {kind_of(mask)}")

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
        index = row_index(rows, len(self), self.device)
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
                raise TypeError(f"present: expected a bool tensor [*N, M] or [M], got {kind_of(present)}")
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
                    raise TypeError(f"observed[{name!r}]: expected a bool tensor, got {kind_of(observed[name])}")
                if observed[name].shape != mask.shape:
                    raise ValueError(
                        f"observed[{name!r}]: expected {tuple(mask.shape)}, got {tuple(observed[name].shape)}"
                    )
                mask = mask & observed[name]
            features[name], seen[name] = blanked(x, mask, self.valid[name], self.fill.get(name)), mask
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
        return blanked(x, torch.zeros_like(valid), valid, self.fill.get(modality))

    def check_values(self, classes: int | None = None) -> None:
        """Raise ValueError unless all values that count are finite and all targets lie in [0, classes)."""
        Maybe(Whole(1))("classes", classes)
        for m, (name, x) in enumerate(self.features.items()):
            if x.is_floating_point() and not x.is_meta and not all_finite(x):
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
        Maybe(Is("what from_reader makes", Reader))("reader", reader)
        if reader is None and any(x.is_meta for x in data.features.values()):
            raise ValueError("data: expected features with values, got those of a streamed data set; use its methods")
        check_modalities(data.features)
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
        found = row_index(rows, n, torch.device("cpu"))
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
        check_modalities(features)
        Flag()("allow_empty", allow_empty)
        Maybe(Named(ANY, 0))("info", info)
        sizes, fill = token_settings(tokens, fill, lengths, features)
        index = common_index({**{f"features[{m!r}]": x for m, x in features.items()}, "target": target})
        columns: dict[str, Any] = {}
        for name, values in features.items():
            stays = is_mapped(values)
            columns[name] = values if stays else as_features(name, values, (lengths or {}).get(name), name in sizes)
        counts = {name: len(x[0] if isinstance(x, tuple) else x) for name, x in columns.items()}
        n = next(iter(counts.values()))
        if n == 0:
            raise ValueError("features: expected at least one sample, got an empty split")
        if len(set(counts.values())) > 1:
            raise ValueError(f"features: expected the same number of samples in every modality, got {counts}")
        given = None if present is None else as_present(present, n, len(features))
        tensors: dict[str, Tensor] = {}
        valid: dict[str, Tensor] = {}
        observed: dict[str, Tensor] = {}
        for m, (name, column) in enumerate(columns.items()):
            on = None if given is None else given[:, m]
            if isinstance(column, tuple):
                x, valid[name], there = column
                x, observed[name] = find_observed(name, x, valid[name], there, on, name in sizes, sizes.get(name))
                tensors[name] = blanked(x, observed[name], valid[name], fill.get(name))
            else:
                rest = (on, name in sizes, sizes.get(name))
                found = look_through(name, column, (lengths or {}).get(name), *rest)
                tensors[name], valid[name], observed[name] = found
            if not allow_empty and not observed[name].any():
                raise ValueError(
                    f"features[{name!r}]: the modality is missing in every sample; leave it out, or pass "
                    f"allow_empty=True"
                )
        here = torch.stack([seen.any(-1) for seen in observed.values()], -1)
        if not allow_empty:
            check_empty(here, ", or pass allow_empty=True")
        facts, y = facts_of(info, target, classes, sizes, n)
        names = sample_names(index if ids is None else ids, n)
        keys = stable_ids(range(n) if names is None else names)
        data = MultimodalBatch(tensors, here, y, valid, observed, ids=keys, fill=fill)
        data.check_values(facts.get("outputs"))
        mapped = {name: values for name, values in features.items() if is_mapped(values)}
        reader = Reader(MappedRows(mapped), torch.arange(n), sizes) if mapped else None
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
            raise TypeError(f"present: expected bool [n, M], got {kind_of(here)}")
        if here.ndim != 2 or not here.numel():
            raise ValueError(f"present: expected bool [n, M], got {kind_of(here)}")
        n, M = here.shape
        if not here.any(0).all():
            raise ValueError(
                f"present: expected every modality in some sample, got none in column {here.sum(0).argmin()}"
            )
        check_empty(here)
        first = sorted({int(here[:, m].nonzero()[0]) for m in range(M)})
        read_first = Is("a dict of arrays", Mapping)("read(rows)", read(first))
        if len(read_first) != M:
            raise ValueError(f"present, read: expected {M} columns' features, got those of {list(read_first)}")
        sizes, fill = token_settings(tokens, fill, lengths, read_first)
        try:
            check_modalities(read_first)
            found = {m: as_features(m, values, None, m in sizes)[0] for m, values in read_first.items()}
        except (TypeError, ValueError) as error:
            raise type(error)(f"read: {error}") from error
        features, valid = {}, {}
        for m, (name, x) in enumerate(found.items()):
            if len(x) != len(first):
                raise ValueError(f"read: expected {len(first)} rows of {name!r}, got {len(x)}")
            shape = list(x.shape[1:])
            axis = frame_axis(x, 1) - 1
            if (given := (lengths or {}).get(name)) is not None:
                count = as_lengths(name, given, n)
                shape[axis] = max(int(count.max()), 1)
                valid[name] = torch.arange(shape[axis]) < count[:, None]
                here[:, m] &= count > 0
            features[name] = torch.empty(n, *shape, dtype=x.dtype, device="meta")
        facts, y = facts_of(info, target, classes, sizes, n)
        names = sample_names(ids, n)
        keys = stable_ids(range(n) if names is None else names)
        data = MultimodalBatch(features, here, y, valid, ids=keys, fill=fill)
        data.check_values(facts.get("outputs"))
        index = torch.tensor(first)
        Reader(lambda rows: read_first, torch.arange(n), sizes).fill(data[index], index)  # which checks the values
        reader = Reader(read, torch.arange(n), sizes)
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
        lists = {m: names_of(f"columns[{m!r}]", given) for m, given in columns.items()}
        asked = [] if target is None else list(target) if isinstance(target, (list, tuple)) else [target]
        wanted = [c for names in lists.values() for c in names] + asked
        if unknown := [c for c in wanted if c not in frame.columns]:
            raise ValueError(f"columns, target: {unknown} are not in the frame, which has {list(frame.columns)}")
        if len(set(wanted)) != len(wanted):
            raise ValueError("columns, target: expected every column once, got one in two places")
        y = None if target is None else frame[asked] if isinstance(target, (list, tuple)) else frame[target]
        return cls.from_arrays({m: frame[names] for m, names in lists.items()}, y, **options)


BATCH = Is("a MultimodalBatch", MultimodalBatch)
DATASET = Is("a MultimodalDataset", MultimodalDataset)


def in_parts(data: MultimodalDataset | MultimodalBatch, batch_size: int) -> Iterator[MultimodalBatch]:
    """Batches of at most ``batch_size`` samples, in their order."""
    Either(DATASET, BATCH)("data", data)
    Whole(1)("batch_size", batch_size)
    for start in range(0, len(data), batch_size):
        yield data[start : start + batch_size]
