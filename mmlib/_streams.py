"""Features that stay where they are until samples are asked for: a user's function, or arrays mapped from files.

A streamed data set has a `Reader`. Its ``fill`` gives a batch, of which everything but the values is known, the values.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._arrays import (
    all_finite,
    as_features,
    as_lengths,
    as_numbers,
    blanked,
    checked_ids,
    find_observed,
    per_frame,
    tensor,
)
from .checks import Is

if TYPE_CHECKING:
    from .batch import MultimodalBatch


Read = Callable[[list[int]], Mapping[str, Any]]


class Reader(NamedTuple):
    """Where the features of a streamed data set come from."""

    read: Read
    rows: Tensor  # int64 [n]: the numbers that the samples have there
    sizes: Mapping[str, int | None]  # the modalities of token ids, and their vocabularies

    def at(self, index: Tensor) -> Reader:
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
        x, _ = as_numbers(name, given, None, name in self.sizes, warn=False)
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
                x = checked_ids(name, x, keep, self.sizes[name])
            # Whole batches are not copied: a streamed batch is large.
            features[name] = x if bool(keep.all()) else blanked(x, keep, batch.valid[name], batch.fill.get(name))
        complete = None if batch.complete is None else self._filled(batch.complete, found)
        return batch.replace(features=features, complete=complete)


class MappedRows:
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


PIECE = 1 << 22  # bytes of a mapped array that are looked through at once


def look_through(
    name: str, values: Any, lengths: Any, given: Tensor | None, tokens: bool, size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(features without values, valid, observed) of an array that is mapped from a file: its values stay there."""
    n = len(values)
    count = None if lengths is None else as_lengths(name, lengths, n)
    step = max(1, PIECE * n // max(values.nbytes, 1))
    like = valid = observed = torch.empty(0)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        piece = as_features(name, values[rows], None if count is None else count[rows], tokens, warn=first == 0)
        on = None if given is None else given[rows]
        x, seen = find_observed(name, *piece, on, tokens, size, first)
        if x.is_floating_point() and not all_finite(x) and (torch.isinf(x) & per_frame(seen, x)).any():
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


def is_mapped(x: Any) -> bool:
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
