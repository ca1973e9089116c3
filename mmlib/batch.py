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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import Is

__all__ = ["MultimodalBatch", "MultimodalDataset", "Output", "frame_axis", "per_frame", "stable_ids"]


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
    rank = x.ndim - lead
    if rank == 1 and not x.is_floating_point():
        return lead
    if rank == 2:
        return lead
    if rank in (3, 4):
        return lead + 1
    raise ValueError(
        f"features: expected int64 token ids [*N, T], sequences [*N, T, D], images [*N, C, H, W] or volumes "
        f"[*N, C, X, Y, Z] with {lead} leading axes, got shape {tuple(x.shape)} of {x.dtype}"
    )


def per_frame(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` [*N, T], reshaped so that it broadcasts over the features ``x`` of the same samples and frames."""
    lead = mask.ndim - 1
    axis = frame_axis(x, lead)
    shape = [*mask.shape[:-1]] + [1] * (x.ndim - lead)
    shape[axis] = mask.shape[-1]
    return mask.reshape(shape)


def stable_ids(names: Iterable[Any]) -> Tensor:
    """63-bit integers int64 [n] that identify the samples: integers stay as they are, other names are hashed.

    The hash (BLAKE2b) is the same in every process and on every machine, so masks keyed by it are too.
    """
    values = []
    for name in names:
        if isinstance(name, int) or (hasattr(name, "__index__") and not isinstance(name, bool)):
            values.append(int(name))
        else:
            digest = hashlib.blake2b(str(name).encode(), digest_size=8).digest()
            values.append(int.from_bytes(digest, "little") >> 1)
    return torch.tensor(values, dtype=torch.int64)


@dataclass(repr=False)
class MultimodalBatch:
    """Some samples of every modality, with what is known about what is missing.

    features : dict of Tensor
        ``features[m]`` float [*N, T, D] (vectors: T = 1), images [*N, C, H, W], volumes [*N, C, X, Y, Z], or token ids
        int64 [*N, T]. The dict's order is the order of the modalities everywhere.
    present : bool [*N, M]
    target : int64 classes [*N], float32 scores [*N], or [*N, ...] for segmentation; optional
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
        if not self.features:
            raise ValueError("features: expected at least one modality, got none")
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
                valid[name] = torch.ones(expected, dtype=torch.bool, device=x.device)
            self._check_mask("valid", name, valid[name], expected)
            if name in self.observed:
                observed[name] = self.observed[name]
            else:
                observed[name] = valid[name] & self.present[..., m, None]
            self._check_mask("observed", name, observed[name], expected)
        self.valid, self.observed = valid, observed
        if self.target is not None and not isinstance(self.target, Tensor):
            raise TypeError(f"target: expected a tensor, got {_kind(self.target)}")
        if self.target is not None and tuple(self.target.shape[: len(self.shape)]) != self.shape:
            raise ValueError(f"target: expected the leading shape {self.shape}, got {tuple(self.target.shape)}")
        for what, rows in {"ids": self.ids, **self.extras}.items():
            if rows is not None and (rows.ndim < 1 or rows.shape[0] != self.shape[0]):
                raise ValueError(f"{what}: expected {self.shape[0]} rows, got shape {tuple(rows.shape)}")
        if self.complete is not None and self.complete.shape != self.shape:
            raise ValueError(f"complete: expected the leading shape {self.shape}, got {self.complete.shape}")

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
        if modality not in self.features:
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
        if isinstance(rows, int) or getattr(rows, "ndim", None) == 0:
            rows = int(rows)  # type: ignore[arg-type]  # also NumPy's and torch's integers
            if not -len(self) <= rows < len(self):
                raise IndexError(f"rows: expected an index below {len(self)}, got {rows}")
            rows = slice(rows, rows + 1) if rows != -1 else slice(-1, None)
        if not isinstance(rows, (Tensor, slice)):
            rows = torch.as_tensor(rows, device=self.device)
            rows = rows if rows.numel() else rows.long()  # an empty list is float by default
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MultimodalBatch:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def replace(self, **changes: Any) -> MultimodalBatch:
        """A copy with some fields exchanged (checked); tensors that are not exchanged are shared."""
        return replace(self, **changes)

    def drop(
        self, present: Tensor | None = None, observed: Mapping[str, Tensor] | None = None, keep_complete: bool = False
    ) -> MultimodalBatch:
        """The batch with modalities and frames taken away: what is gone is zero (tokens: ``fill``) and masked.

        present : bool [*N, M], or [M] for all samples alike; True keeps the modality where it was there
        observed : per modality bool [*N, T]; True keeps the frame where it was observed
        keep_complete : store this batch as the result's ``complete``, unless there is one already

        A modality that loses all its frames becomes absent. ``valid`` never changes.
        """
        keep = self.present
        if present is not None:
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

    def select(self, modalities: Sequence[str]) -> MultimodalBatch:
        """The batch with these modalities alone, in this order. A sample may be left with none of them."""
        if isinstance(modalities, str) or len(set(modalities)) < len(modalities):
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
        for m, (name, x) in enumerate(self.features.items()):
            if x.is_floating_point():
                bad = ~torch.isfinite(x) & per_frame(self.observed[name], x)
                if bad.any():
                    row = bad.flatten(len(self.shape)).any(-1).nonzero()[0].tolist()
                    raise ValueError(
                        f"features[{name!r}]: expected finite values where the modality is present, got "
                        f"{int(bad.sum())} NaN or infinite ones, the first in sample {row}"
                    )
            if bool((self.observed[name] & ~(self.valid[name] & self.present[..., m, None])).any()):
                raise ValueError(f"observed[{name!r}]: expected only frames that are valid and of present modalities")
        if self.target is None:
            return
        if self.target.is_floating_point():
            if not torch.isfinite(self.target).all():
                raise ValueError("target: expected finite scores, got NaN or infinity")
        elif classes is not None and self.target.numel():
            low, high = int(self.target.min()), int(self.target.max())
            if low < 0 or high >= classes:
                raise ValueError(f"target: expected classes in [0, {classes}), got values from {low} to {high}")


def _kind(x: Any) -> str:
    """What ``x`` is, for messages."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _blank(x: Tensor, keep: Tensor, valid: Tensor, fill: int | None) -> Tensor:
    """``x`` with the frames outside ``keep`` zeroed; token ids become ``fill`` where valid, but for the two ends."""
    if x.is_floating_point():
        return torch.where(per_frame(keep, x), x, 0)  # where, not a product: a NaN placeholder must not survive
    before = valid.cumsum(-1)
    ends = valid & ((before == 1) | (before == before[..., -1:]))
    filled = torch.full_like(x, 0 if fill is None else fill)
    return torch.where(keep | ends | ~valid, x, filled)


class MultimodalDataset(torch.utils.data.Dataset):
    """A whole split in memory: one MultimodalBatch, the samples' names, and facts about where it comes from.

    ``dataset[rows]`` is a MultimodalBatch: small data stay on one device as whole tensors and a mini-batch is an
    index selection. With a DataLoader, pass ``collate_fn=MultimodalDataset.collate``.

    ``info`` holds at least ``name``, ``task`` ("classification" or "regression") and ``outputs`` (K); loaders add
    ``classes``, ``source``, ``fingerprint``, ``split`` and what else a reader should know.
    """

    def __init__(
        self, data: MultimodalBatch, info: Mapping[str, Any] | None = None, names: Sequence[str] | None = None
    ):
        if len(data) == 0:
            raise ValueError("data: expected at least one sample, got an empty split")
        if names is not None and len(names) != len(data):
            raise ValueError(f"names: expected {len(data)} names, got {len(names)}")
        self.data = data
        self.names = None if names is None else list(names)
        self.info: dict[str, Any] = dict(info or {})
        if data.target is not None:
            regression = data.target.is_floating_point()
            self.info.setdefault("task", "regression" if regression else "classification")
            self.info.setdefault("outputs", 1 if regression else int(data.target.max()) + 1)
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
    def feature_shapes(self) -> dict[str, tuple[int, ...]]:
        """Per modality the shape of one sample: (T, D), (C, H, W), (C, X, Y, Z), or (T,) for token ids."""
        lead = len(self.data.shape)
        return {name: tuple(x.shape[lead:]) for name, x in self.data.features.items()}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: Tensor | slice | Sequence[int] | int) -> MultimodalBatch:
        return self.data[rows]

    def __getitems__(self, rows: Sequence[int]) -> MultimodalBatch:
        return self.data[rows]

    @staticmethod
    def collate(batch: MultimodalBatch) -> MultimodalBatch:
        """For DataLoader: the batch was already selected as one."""
        return batch

    def __repr__(self) -> str:
        there = self.present.flatten(0, -2).float().mean(0)
        parts = [
            f"{name} {list(shape)} ({p:.0%})"
            for (name, shape), p in zip(self.feature_shapes.items(), there.tolist(), strict=True)
        ]
        return f"MultimodalDataset({self.info['name']!r}, {len(self)} samples: {', '.join(parts)})"

    def to(self, device: torch.device | str) -> MultimodalDataset:
        return MultimodalDataset(self.data.to(device), self.info, self.names)

    def subset(self, rows: Tensor | Sequence[int]) -> MultimodalDataset:
        """The samples at ``rows`` as a data set of its own."""
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        if not index.numel():
            raise ValueError("rows: expected at least one sample, got an empty split")
        names = None if self.names is None else [self.names[i] for i in index.tolist()]
        return MultimodalDataset(self.data[index.to(self.device)], self.info, names)

    def select(self, modalities: Sequence[str]) -> MultimodalDataset:
        """As `MultimodalBatch.select`, for the whole split."""
        return MultimodalDataset(self.data.select(modalities), self.info, self.names)

    def drop(
        self, present: Tensor | None = None, observed: Mapping[str, Tensor] | None = None, keep_complete: bool = False
    ) -> MultimodalDataset:
        """As `MultimodalBatch.drop`, for the whole split."""
        return MultimodalDataset(self.data.drop(present, observed, keep_complete), self.info, self.names)

    @classmethod
    def from_arrays(
        cls,
        features: Mapping[str, Any],
        target: Any = None,
        *,
        present: Any = None,
        lengths: Mapping[str, Any] | None = None,
        ids: Sequence[Any] | None = None,
        classes: int | None = None,
        fill: Mapping[str, int] | None = None,
        info: Mapping[str, Any] | None = None,
        allow_empty: bool = False,
    ) -> MultimodalDataset:
        """A data set from arrays, tensors or lists; what is NaN or None becomes missing.

        features : per modality an array [n, D] (vectors), [n, T, D], [n, C, H, W], [n, C, X, Y, Z], integer token ids
            [n, T], or a list of n arrays [T_i, D] or token ids [T_i] of any lengths, None where the modality is
            missing
        target : n integer classes or n float scores; optional
        present : bool [n, M]; values where it is False are ignored, a NaN where it is True is an error.
            Without it, a sample whose values are all NaN misses the modality; a frame that is all NaN was dropped
        lengths : per modality n integers; frames from there on are padding, 0 means missing
        ids : n stable names or integers, unique; default 0 to n - 1
        classes : number of classes K; default the largest class + 1
        fill : per token modality the id that stands for a dropped token
        allow_empty : accept samples, and modalities, of which nothing is there

        Raises ValueError naming the argument, what was expected and what came: no samples, unequal sample counts,
        wrong ranks, unknown modalities, partly NaN frames, infinities, classes out of range, empty samples; TypeError
        for what is not numbers.
        """
        if not features:
            raise ValueError("features: expected at least one modality, got none")
        for what, given in (("lengths", lengths), ("fill", fill)):
            if given and (unknown := set(given) - set(features)):
                raise ValueError(f"{what}: unknown modalities {sorted(unknown)}; known are {list(features)}")
        tensors: dict[str, Tensor] = {}
        valid: dict[str, Tensor] = {}
        there: dict[str, Tensor] = {}
        for name, values in features.items():
            tensors[name], valid[name], there[name] = _as_features(name, values, (lengths or {}).get(name))
        counts = {name: len(x) for name, x in tensors.items()}
        n = next(iter(counts.values()))
        if n == 0:
            raise ValueError("features: expected at least one sample, got an empty split")
        if len(set(counts.values())) > 1:
            raise ValueError(f"features: expected the same number of samples in every modality, got {counts}")

        if present is None:
            here = torch.stack([there[m] for m in tensors], -1)
        else:
            here = torch.as_tensor(present)
            if here.dtype != torch.bool or here.shape != (n, len(tensors)):
                raise ValueError(f"present: expected bool {(n, len(tensors))}, got {here.dtype} {tuple(here.shape)}")
            here = here.clone()
        observed: dict[str, Tensor] = {}
        for m, (name, x) in enumerate(tensors.items()):
            seen = valid[name] & here[:, m, None]
            if x.is_floating_point():
                axis = frame_axis(x, 1)
                per = x.movedim(axis, 1).flatten(2) if x.ndim > 2 else x[..., None]
                nan = torch.isnan(per)
                partly = nan.any(-1) & ~nan.all(-1) & seen
                if partly.any() or (present is not None and (nan.any(-1) & seen).any()):
                    row = int((nan.any(-1) & seen).any(-1).nonzero()[0])
                    raise ValueError(
                        f"features[{name!r}]: sample {row} has NaN values where the modality is present; expected a "
                        f"frame to be wholly NaN (missing) or wholly finite. Impute them, or set the sample to None"
                    )
                seen = seen & ~nan.all(-1)
            here[:, m] &= seen.any(-1)
            seen = seen & here[:, m, None]
            observed[name] = seen
            tensors[name] = _blank(x, seen, valid[name], (fill or {}).get(name))
            if not allow_empty and not here[:, m].any():
                raise ValueError(
                    f"features[{name!r}]: the modality is missing in every sample; leave it out, or pass "
                    f"allow_empty=True"
                )
        if not allow_empty and not here.any(-1).all():
            rows = (~here.any(-1)).nonzero()[:, 0].tolist()
            raise ValueError(
                f"present: every sample needs a modality, but {len(rows)} have none, the first at {rows[:5]}; remove "
                f"them, or pass allow_empty=True"
            )
        if ids is not None and (len(ids) != n or len(set(ids)) != n):
            raise ValueError(f"ids: expected {n} unique ids, got {len(ids)} of which {len(set(ids))} differ")
        data = MultimodalBatch(
            tensors,
            here,
            _as_target(target, n),
            valid,
            observed,
            ids=stable_ids(ids if ids is not None else range(n)),
            fill=dict(fill or {}),
        )
        facts = dict(info or {})
        if classes is not None:
            facts["outputs"] = classes
        if classes is not None and data.target is not None and data.target.is_floating_point():
            raise TypeError(f"target: expected integers for {classes} classes, got {_kind(data.target)}")
        if classes is None and data.target is not None and not data.target.is_floating_point():
            classes = max(int(data.target.max()) + 1, 1)
        data.check_values(classes)
        return cls(data, facts, None if ids is None else [str(i) for i in ids])

    @classmethod
    def from_frame(
        cls, frame: Any, columns: Mapping[str, Sequence[str]], target: str | None = None, **options: Any
    ) -> MultimodalDataset:
        """A data set of vectors from a pandas DataFrame: ``columns[m]`` names the columns of modality m.

        The frame's index gives the ids; a row whose columns of one modality are all NaN or None misses it. Options as
        in `from_arrays`. Raises ValueError for columns that are not there or not unique.
        """
        wanted = [c for names in columns.values() for c in names] + ([target] if target else [])
        if unknown := [c for c in wanted if c not in frame.columns]:
            raise ValueError(f"columns: {unknown} are not in the frame, which has {list(frame.columns)}")
        if len(set(wanted)) != len(wanted):
            raise ValueError("columns: expected every column once, got one in two places")
        arrays = {m: frame[list(names)].astype("float32").to_numpy() for m, names in columns.items()}
        options.setdefault("ids", frame.index.tolist())
        return cls.from_arrays(arrays, None if target is None else frame[target].to_numpy(), **options)


BATCH = Is("a MultimodalBatch", MultimodalBatch)
DATASET = Is("a MultimodalDataset", MultimodalDataset)


def _as_features(name: str, values: Any, lengths: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(features [n, ...], valid [n, T], there [n]) of one modality, from whatever the user has."""
    if isinstance(values, (list, tuple)) and any(v is None or getattr(v, "ndim", 0) for v in values):
        values, lengths = _pad(name, values, lengths)
    x = _tensor(f"features[{name!r}]", values)
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"features[{name!r}]: expected floats or integer token ids, got {x.dtype}")
    x = x.to(torch.float32 if x.is_floating_point() or x.ndim != 2 else torch.int64)
    if x.is_floating_point() and x.ndim == 2:
        x = x[:, None, :]  # vectors are sequences of one frame
    if not (x.ndim == 2 or 3 <= x.ndim <= 5):
        raise ValueError(
            f"features[{name!r}]: expected [n, D], [n, T, D], [n, C, H, W], [n, C, X, Y, Z] or integer ids [n, T], "
            f"got shape {tuple(x.shape)}"
        )
    if 0 in x.shape[1:]:
        raise ValueError(f"features[{name!r}]: expected at least one frame and one value, got shape {tuple(x.shape)}")
    frames = x.shape[frame_axis(x, 1)]
    there = torch.ones(len(x), dtype=torch.bool)
    if x.is_floating_point():
        there = ~torch.isnan(x).flatten(1).all(-1)
    valid = torch.ones(len(x), frames, dtype=torch.bool)
    if lengths is not None:
        count = torch.as_tensor(lengths)
        if (
            count.shape != (len(x),)
            or count.is_floating_point()
            or (len(x) and not 0 <= count.min() <= count.max() <= frames)
        ):
            raise ValueError(f"lengths[{name!r}]: expected {len(x)} integers from 0 to {frames}, got {lengths!r:.80}")
        valid = torch.arange(frames) < count[:, None]
        there = there & (count > 0)
    return x, valid, there


def _pad(name: str, values: Sequence[Any], lengths: Any) -> tuple[Tensor, Any]:
    """A list of arrays, some None, as one tensor: missing rows NaN (token ids: 0), shorter sequences zero-padded."""
    rows = [None if v is None else _tensor(f"features[{name!r}]", v) for v in values]
    given = [r for r in rows if r is not None]
    if not given:
        raise ValueError(f"features[{name!r}]: the modality is missing in every sample")
    tokens = all(r.ndim == 1 and not r.is_floating_point() and not r.is_complex() for r in given)
    sequence = tokens or all(r.ndim == 2 for r in given)
    tails = {(r.ndim, *(r.shape[1:] if sequence else r.shape)) for r in given}
    if len(tails) > 1 or min(r.ndim for r in given) == 0:
        shapes = sorted({tuple(r.shape) for r in given})
        raise ValueError(f"features[{name!r}]: expected arrays of one rank and width, got shapes {shapes[:5]}")
    if sequence and lengths is None:
        lengths = [0 if r is None else len(r) for r in rows]
    longest = max(len(r) for r in given)
    shape = (longest, *given[0].shape[1:])
    blank = torch.zeros(shape, dtype=torch.int64) if tokens else torch.full(shape, torch.nan)
    x = blank.repeat(len(rows), *[1] * len(shape))
    for i, r in enumerate(rows):
        if r is not None:
            x[i] = 0
            x[i, : len(r)] = r.to(x.dtype)
    return x, lengths


def _tensor(what: str, values: Any) -> Tensor:
    """``values`` as a tensor of numbers; TypeError or ValueError that names the argument."""
    try:
        if getattr(getattr(values, "flags", None), "writeable", True) is False:
            values = values.copy()  # a read-only NumPy array, which torch cannot share
        return torch.as_tensor(values)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{what}: expected numbers, got {type(values).__name__} ({error})") from error
    except ValueError as error:
        raise ValueError(f"{what}: expected an array of numbers, got {type(values).__name__} ({error})") from error


def _as_target(target: Any, n: int) -> Tensor | None:
    if target is None:
        return None
    y = _tensor("target", target)
    y = y.to(torch.float32) if y.is_floating_point() else y.to(torch.int64)
    if y.ndim < 1 or len(y) != n:
        raise ValueError(f"target: expected {n} values, one a sample, got shape {tuple(y.shape)}")
    return y
