"""What was dropped: `MissingMask` is the draw of a plan, or your own table. It reports, saves and hashes itself."""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, find_ids
from ..checks import PATH, Array, Device, Either, Flag, Is, Maybe, Named, Several, Text, Whole, check_known
from ..files import atomic_write
from .plan import MissingPlan

__all__ = ["MissingMask"]

Data = TypeVar("Data", MultimodalBatch, MultimodalDataset)


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
        report = self.realised()
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
        place, found = find_ids(known, wanted)
        if not found.all():
            raise ValueError(
                f"ids: {int((~found).sum())} of {len(wanted)} samples are not in this mask of {len(known)}, the first "
                f"{wanted[~found][:5].tolist()}; draw the mask for these samples"
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

    def realised(self) -> dict[str, Any]:
        """What the draw came to, as numbers that JSON knows.

        ``samples``; ``rates`` per modality: the fraction of the samples that had it and lost it; ``natural``: the
        fraction that never had it; ``frames`` per modality: the fraction of its frames that are gone, with or without
        the whole modality; ``subsets``: presence such as "101", in the order of the modalities, to its number of
        samples, most frequent first; ``empty``: samples with nothing left; ``restored``; ``nominal``: the plan's rates.
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
        subsets = {"".join("01"[int(x)] for x in rows[i].tolist()): int(counts[i]) for i in order}
        return {
            "samples": len(there),
            "rates": rates,
            "natural": natural,
            "frames": {m: 1 - _ratio(x.count_nonzero(), self.frames[m]) for m, x in self.observed.items()},
            "subsets": subsets,
            "empty": int((~here.any(-1)).sum()),
            "restored": self.restored,
            "nominal": None if self.plan is None else self.plan.rates,
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
