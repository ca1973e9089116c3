"""What several sources need: splits, standardisation on the training split, fingerprints, layouts, frames."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, stable_ids
from ..checks import PATH, Either, Maybe, Named, Number, OneOf, Several, Whole
from .pickles import meaningless

ROOT = Maybe(PATH)
SEED = Whole(0, below=2**32)
SHARE = Number(above=0, below=1)
SIZES = Several(Whole(1), 3, 3)  # samples of train, valid and test
CLIP = 5.0  # standardised frames lie in [-CLIP, CLIP]
FRAMES = Maybe(Either(Whole(1), Named(Maybe(Whole(1)))))  # the most that are kept


def some_of(*names: str) -> Either:
    """A check for one of some modalities, or for a list of them."""
    return Either(OneOf(*names), Several(OneOf(*names), 1))


def fingerprint(dataset: MultimodalDataset | MultimodalBatch) -> str:
    """16 hexadecimal digits that change with any value, mask, target, id or modality name, also of ``complete``.

    The values of a streamed data set are not read: shapes stand for them, and what ``info["fingerprint"]`` says.
    """
    Either(DATASET, BATCH)("dataset", dataset)
    data = dataset.data if isinstance(dataset, MultimodalDataset) else dataset
    digest = hashlib.sha256()

    def add(key: str, x: Tensor | None) -> None:
        if x is not None:
            if x.is_meta:
                said = dataset.info.get("fingerprint") if isinstance(dataset, MultimodalDataset) else None
                digest.update(f"{key}|{x.dtype}|{tuple(x.shape)}|{said}".encode())
                return
            array = np.ascontiguousarray(x.detach().cpu().numpy())
            digest.update(f"{key}|{array.dtype.str}|{array.shape}|".encode())
            digest.update(array.tobytes())

    for name, x in data.features.items():
        add(f"features/{name}", x)
        add(f"valid/{name}", data.valid[name])
        add(f"observed/{name}", data.observed[name])
    add("present", data.present)
    add("target", data.target)
    add("ids", data.ids)
    for name, x in sorted(data.extras.items()):
        add(f"extras/{name}", x)
    if data.complete is not None:
        digest.update(f"complete|{fingerprint(data.complete)}|".encode())
    return digest.hexdigest()[:16]


def stratified_split(labels: np.ndarray, valid: float, test: float, seed: int) -> dict[str, np.ndarray]:
    """Sorted row numbers of train, valid and test, with each class in the same shares; valid and test in (0, 1)."""
    from sklearn.model_selection import train_test_split

    for what, share in (("valid", valid), ("test", test)):
        SHARE(what, share)
    if valid + test >= 1:
        raise ValueError(f"valid, test: expected shares that leave training samples, got {valid} + {test}")
    rows = np.arange(len(labels))
    rest, test_rows = train_test_split(rows, test_size=test, stratify=labels, random_state=seed)
    train, valid_rows = train_test_split(
        rest, test_size=round(valid * len(rows)), stratify=labels[rest], random_state=seed
    )
    return {"train": np.sort(train), "valid": np.sort(valid_rows), "test": np.sort(test_rows)}


def make_splits(
    rows: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    target: np.ndarray,
    names: Sequence[str],
    info: Mapping[str, Any],
    split_seed: int | None,
) -> dict[str, MultimodalDataset]:
    """One data set per entry of ``rows``, each with the facts of ``info``, its own fingerprint and unique ids."""
    classes = info.get("outputs") if info.get("task") == "classification" else None
    splits = {}
    for split, index in rows.items():
        dataset = MultimodalDataset.from_arrays(
            {m: x[index] for m, x in features.items()},
            target[index],
            ids=[names[i] for i in index],
            classes=classes,
            info={**info, "split": split, "split_seed": split_seed},
        )
        dataset.info["fingerprint"] = fingerprint(dataset)
        splits[split] = dataset
    return splits


def standardise(
    features: Mapping[str, np.ndarray], train: np.ndarray, per_feature: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Zero mean and unit variance on the training rows: one scale a modality, or one a feature [D].

    Returns float32 features and per modality {"mean", "std"} in the units before. A feature that is constant on the
    training rows becomes zero there.
    """
    scaled, facts = {}, {}
    for m, x in features.items():
        x = x.astype(np.float64)
        axis = tuple(range(x.ndim - 1)) if per_feature else None
        mean, std = x[train].mean(axis), x[train].std(axis)
        std = np.where(std > 1e-12, std, 1.0)
        scaled[m] = ((x - mean) / std).astype(np.float32)
        facts[m] = {"mean": np.asarray(mean).tolist(), "std": np.asarray(std).tolist()}
    return scaled, facts


def read_npy(path: Path) -> np.ndarray:
    """The array in a ``.npy`` file, whose header must account for every byte of the file before any is read.

    Raises ValueError naming the file for anything else. Pickled objects are refused, not read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header is a Python literal, and a damaged one a doubtful one
            x = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # and its parser raises almost anything
        if "pickle" in str(error) or "Python objects" in str(error):
            raise ValueError(
                f"{path}: refused to read pickled objects; expected an array of numbers or bytes"
            ) from error
        raise ValueError(f"{path}: not a whole .npy array ({error}); copy or download it again") from error
    if not isinstance(x, np.memmap):
        with contextlib.suppress(AttributeError):
            x.close()
        raise ValueError(f"{path}: expected one array, got an archive")
    if (size := path.stat().st_size) != x.offset + x.nbytes:
        raise ValueError(
            f"{path}: not a whole .npy array (the header says {x.dtype} {x.shape}, that is {x.offset + x.nbytes} bytes "
            f"with it, the file has {size}); copy or download it again"
        )
    x = np.array(x, order="K")
    if meaningless(x.reshape(-1, order="A")):
        raise ValueError(f"{path}: expected {x.dtype}, got values that are none; copy or download it again")
    return x


def encodable(text: str) -> bool:
    """Whether a text has whole characters alone: no halves of surrogate pairs, which no file or hash takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_numbers(values: Any) -> np.ndarray:
    """Numbers of any shape, without a copy where they are an array already; TypeError for anything else.

    Lists of texts are refused before NumPy makes an array of them, in which each takes as much as the longest.
    """
    some: list[Any] = [values]
    kinds: set[type] = set()
    while some:
        part = some.pop()
        if isinstance(part, (list, tuple)):
            kinds.update(map(type, part))
            some += [p for p in part if isinstance(p, (list, tuple))]
        elif not isinstance(part, np.ndarray):
            kinds.add(type(part))
    for kind in kinds:
        if not issubclass(kind, (int, float, np.number, np.bool_, np.ndarray, list, tuple)):
            raise TypeError(f"expected numbers, got {kind.__name__}")
    try:
        x = np.asarray(values)
    except ValueError as error:
        raise TypeError("expected an array, got lists of unequal lengths") from error
    if x.dtype == object:  # numbers that were stored one by one
        if wrong := [type(v).__name__ for v in x.flat if not isinstance(v, (int, float, np.number))]:
            raise TypeError(f"expected numbers, got objects, {wrong[0]} among them")
        x = x.astype(np.float64)
    if x.dtype.kind not in "biuf":
        raise TypeError(f"expected numbers, got {x.dtype} {x.shape}")
    return x


def need_root(root: Path | None, name: str, layout: str) -> Path:
    """``root`` if it is a folder; otherwise FileNotFoundError with the layout and where to get the files."""
    if root is None:
        raise FileNotFoundError(
            f"{name}: no folder given; pass root=..., or set the environment variable MMLIB_DATA. Expected:\n{layout}"
        )
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: {root} is not a folder. Expected:\n{layout}")
    return root


class Frames(NamedTuple):
    """One modality of one split: x [*N, T, D] (token ids [*N, T]), valid and observed bool [*N, T]."""

    x: np.ndarray
    valid: np.ndarray
    observed: np.ndarray


def frames_dataset(
    frames: Mapping[str, Frames],
    target: np.ndarray,
    names: Sequence[str],
    ids: Sequence[str] | None = None,
    fill: Mapping[str, int] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> MultimodalDataset:
    """One split. Everything was checked on reading, so the arrays become the data set's tensors without a copy.

    A modality with no observed frame is absent; ``ids`` identify the samples where ``names`` alone do not.
    """
    data = MultimodalBatch(
        {m: torch.from_numpy(f.x) for m, f in frames.items()},
        torch.from_numpy(np.stack([f.observed.any(-1) for f in frames.values()], -1)),
        torch.from_numpy(target),
        {m: torch.from_numpy(f.valid) for m, f in frames.items()},
        {m: torch.from_numpy(f.observed) for m, f in frames.items()},
        ids=stable_ids(names if ids is None else ids),
        fill=dict(fill or {}),
        extras=dict(extras or {}),
    )
    return MultimodalDataset(data, names=names)


def _parts(frames: Frames) -> Iterator[slice]:
    """Slices of the samples, of at most 128 MiB each as float64."""
    step = max(1, (1 << 24) // max(1, frames.x.shape[1] * frames.x.shape[2]))
    return (slice(i, i + step) for i in range(0, len(frames.x), step))


def measure_frames(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation float64 [D] of the observed frames; 1 where a feature does not vary.

    Values beyond the 0.5 and 99.5 percentiles (of at most 100,000 frames, evenly chosen) count as if they lay there,
    unless the two coincide: then the feature is rare, and its rare values are the feature.
    """
    rows, places = np.nonzero(frames.observed)
    pick = np.linspace(0, len(rows) - 1, min(len(rows), 100_000)).round().astype(np.int64)
    low, high = np.quantile(frames.x[rows[pick], places[pick]].astype(np.float64), (0.005, 0.995), axis=0)
    rare = low == high
    low, high = np.where(rare, -np.inf, low), np.where(rare, np.inf, high)

    def chunks() -> Iterator[np.ndarray]:
        for part in _parts(frames):
            yield frames.x[part][frames.observed[part]].astype(np.float64).clip(low, high)

    mean = np.sum([x.sum(0) for x in chunks()], 0) / len(rows)
    std = np.sqrt(np.sum([((x - mean) ** 2).sum(0) for x in chunks()], 0) / len(rows))
    return mean, np.where(std > 1e-12 * np.abs(mean), std, 1.0)


def scale_frames(frames: Frames, mean: np.ndarray, std: np.ndarray) -> None:
    """Standardise in place what was observed."""
    for part in _parts(frames):
        z = ((frames.x[part].astype(np.float64) - mean) / std).clip(-CLIP, CLIP)
        frames.x[part] = np.where(frames.observed[part][..., None], z, 0)


def cache_folder() -> Path:
    """Where computed features are kept: MMLIB_CACHE, else XDG_CACHE_HOME/mmlib, else ~/.cache/mmlib."""
    if own := os.environ.get("MMLIB_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mmlib"
