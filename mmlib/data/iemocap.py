"""IEMOCAP as MMIN, RedCore and MCE read it: three HDF5 files of frames, and the splits of ten folds.

``root`` is the folder that holds ``A/``, ``V/``, ``L/`` and ``target/`` (see `LAYOUT`), or one with such a folder named
``iemocap`` or ``IEMOCAP_features_2021``. The features are those that MMIN's authors extracted. RedCore's variant for
MSP-IMPROV, one array a fold and split instead of the HDF5 files, is read too.

A split holds every utterance once. The releases repeat each validation and test utterance seven times (MMIN: six),
once for every subset of the modalities. Here a subset is a question to ask of the same samples
(`training.predict(..., present=...)`, `coalitions.coalition_logits`), and the mean over the seven subsets is the
accuracy on the repeated set.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import MultimodalDataset
from ..checks import Maybe, OneOf, Whole, check_known
from ._readers import FRAMES, ROOT, Frames, encodable, fingerprint, frames_dataset, need_root, read_npy

__all__ = ["LAYOUT", "WIDTHS", "load"]

WIDTHS = {"audio": 130, "vision": 342, "language": 1024}
CLASSES = 4
LAYOUT = """\
  root/A/comparE.h5, root/V/denseface.h5, root/L/bert_large.h5
      for every utterance id, e.g. Ses01F_impro01_F000, one data set [frames, 130], [frames, 342], [frames, 1024]
  root/A/comparE_mean_std.h5
      {fold}/mean and {fold}/std [130] of the training frames (not needed with audio_norm=None)
  root/target/{fold}/{trn,val,tst}_label.npy and {trn,val,tst}_int2name.npy
      folds 1-10: one-hot classes [n, 4] and the utterance ids, byte strings [n] or [n, 1]
  or, instead of the .h5 files, root/{A,V,L}/{fold}/{trn,val,tst}.npy
      arrays [n, frames, 130], [n, frames, 342], [n, frames, 1024] in the order of the ids
  IEMOCAP on request from https://sail.usc.edu/iemocap/; the features from https://github.com/AIM3-RUC/MMIN
"""
_FOLDERS = {"audio": "A", "vision": "V", "language": "L"}
_FILES = {"audio": "A/comparE.h5", "vision": "V/denseface.h5", "language": "L/bert_large.h5"}
_STATISTICS = "A/comparE_mean_std.h5"
_AMPLE = 64  # times a file's size that may come out of it: compressed frames, padded utterances
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3  # HDF5's numbers of the filters that it always has
_ALLOWED = 1 << 24  # and what any file may make
_LARGEST = 1e30  # values beyond are no features, but bytes in another order
_PARTS = {"train": "trn", "valid": "val", "test": "tst"}
# How many utterances of each class the corpus has, all different: they tell the columns' order, which no file says.
_CORPUS = {1103: "anger", 1636: "happiness", 1708: "neutral", 1084: "sadness"}


def load(
    root: Path | None,
    fold: int = 1,
    audio_norm: str | None = "trn",
    max_frames: int | Mapping[str, int] | None = None,
) -> dict[str, MultimodalDataset]:
    """Utterances as ``audio`` [T, 130], ``vision`` [T, 342] and ``language`` [T, 1024], and one of four emotions.

    fold : which of the folds in ``target/`` gives the three splits; MCE uses 1
    audio_norm : "trn": the audio minus the mean, over the standard deviation, of the fold's training frames, which
        ``comparE_mean_std.h5`` holds (with arrays a fold they are computed here: data that are normalised already stay
        as they are); None: the values of the files
    max_frames : keep an utterance's first frames alone, at most this many in every modality, or {modality: count}

    Frames are padded to the longest utterance of the three splits and ``valid`` tells them apart. In the arrays a fold,
    which hold no lengths, the zeros at an utterance's end are padding; an utterance of zeros keeps its first frame. An
    utterance with a data set of no frames misses the modality.

    ``info["classes"]`` holds the emotions' names where the fold has the corpus's 1,103 angry, 1,636 happy (or excited),
    1,708 neutral and 1,084 sad utterances, whose counts identify the columns; otherwise "class 0" to "class 3", since
    the files name no class. Raises FileNotFoundError with the expected layout where files are missing, and ValueError
    naming the file and the utterance for ids without features or in two splits, other widths, NaN, infinite values and
    those from 1e30, labels that are not one-hot, truncated files and pickled arrays, which are never unpickled. HDF5
    data sets have to lie in the file itself, all of them written: links, external and virtual data, chunks that are
    missing or not of their size, filters other than gzip, shuffle and fletcher32, and more than 64 times the file's
    size are refused.
    """
    ROOT("root", root)
    Whole(1)("fold", fold)
    Maybe(OneOf("trn"))("audio_norm", audio_norm)
    limits = _limits(max_frames)
    folder = _folder(need_root(root, "iemocap", LAYOUT))
    arrays = not (folder / _FILES["audio"]).is_file() and (folder / "A" / str(fold)).is_dir()
    _check_files(folder, fold, arrays, audio_norm)

    names, target = {}, {}
    for split, part in _PARTS.items():
        names[split], target[split] = _read_target(folder / "target" / str(fold), part)
    _check_ids(names, folder / "target" / str(fold))
    frames: dict[str, dict[str, Frames]] = {}
    for modality, width in WIDTHS.items():
        if arrays:
            paths = {split: folder / _FOLDERS[modality] / str(fold) / f"{part}.npy" for split, part in _PARTS.items()}
            frames[modality] = _read_arrays(paths, names, width, limits.get(modality))
        else:
            frames[modality] = _read_h5(folder / _FILES[modality], names, width, limits.get(modality))
    if audio_norm:
        if arrays:
            mean, std = _measure(frames["audio"]["train"])
        else:
            mean, std = _read_statistics(folder / _STATISTICS, fold)
        for x, valid, _ in frames["audio"].values():
            x -= mean
            x /= std
            x[~valid] = 0

    classes, known = _class_names(np.concatenate(list(target.values())))
    info = {
        "name": "iemocap",
        "task": "classification",
        "outputs": CLASSES,
        "classes": classes,
        "classes_from": "the corpus's class counts" if known else "not known",
        "source": "features in the layout of MMIN (Zhao, Li, Jin 2021), one array a fold"
        if arrays
        else "IEMOCAP (Busso et al. 2008), features of MMIN (Zhao, Li, Jin 2021)",
        "licence": "that of the corpus" if arrays else "IEMOCAP's own, research only, on request",
        "fold": fold,
        "audio_norm": audio_norm,
        "max_frames": limits or None,
        "units": {
            "audio": "openSMILE ComParE frames" + (", standardised on the training frames" if audio_norm else ""),
            "vision": "DenseFace frames",
            "language": "BERT-large tokens",
        },
    }
    splits = {}
    for split in _PARTS:
        ids = [f"iemocap/{name}" for name in names[split]]
        splits[split] = frames_dataset({m: frames[m].pop(split) for m in WIDTHS}, target[split], ids)
        empty = ~splits[split].present.any(-1)
        if bool(empty.any()):
            raise ValueError(f"iemocap: {names[split][int(empty.nonzero()[0])]} has no frames in any modality")
        splits[split].info.update(info, split=split, split_seed=None)
        splits[split].info["fingerprint"] = fingerprint(splits[split])
    return splits


# -- files ----------------------------------------------------------------------------------------------------------


def _limits(max_frames: int | Mapping[str, int] | None) -> dict[str, int]:
    FRAMES("max_frames", max_frames)
    limits = dict(max_frames) if isinstance(max_frames, Mapping) else dict.fromkeys(WIDTHS, max_frames)
    check_known("max_frames", limits, WIDTHS)
    return {modality: value for modality, value in limits.items() if value is not None}


def _folder(root: Path) -> Path:
    for name in ("iemocap", "IEMOCAP_features_2021"):
        if (root / name).is_dir():
            return root / name
    return root


def _check_files(folder: Path, fold: int, arrays: bool, audio_norm: str | None) -> None:
    """FileNotFoundError where a file is missing; ValueError where other folds are there."""
    folds = sorted(int(p.name) for p in (folder / "target").glob("*") if p.name.isdecimal())
    if folds and fold not in folds:
        raise ValueError(f"fold: expected one of {folds}, which {folder / 'target'} holds, got {fold}")
    if arrays:
        wanted = [f"{place}/{fold}/{part}.npy" for place in _FOLDERS.values() for part in _PARTS.values()]
    else:
        wanted = [*_FILES.values(), *([_STATISTICS] if audio_norm else [])]
    wanted += [f"target/{fold}/{part}_{kind}.npy" for part in _PARTS.values() for kind in ("label", "int2name")]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise FileNotFoundError(f"iemocap: {', '.join(missing)} not found in {folder}. Expected:\n{LAYOUT}")


def _read_target(folder: Path, part: str) -> tuple[list[str], np.ndarray]:
    """The utterance ids and the classes int64 [n] of one split."""
    path = folder / f"{part}_int2name.npy"
    ids = read_npy(path)
    if ids.dtype.kind not in "SU" or not (ids.ndim == 1 or (ids.ndim == 2 and ids.shape[1] == 1)):
        raise ValueError(f"{path}: expected byte strings [n] or [n, 1], got {ids.dtype} {ids.shape}")
    if not ids.size:
        raise ValueError(f"{path}: expected at least one utterance, got none")
    ids = ids.reshape(-1)
    try:
        names = (np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids).tolist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected ids in UTF-8 ({error})") from error
    if broken := [name for name in names if not encodable(name)]:
        raise ValueError(f"{path}: expected ids of whole characters, got {broken[0]!r}")

    path = folder / f"{part}_label.npy"
    labels = read_npy(path)
    if labels.dtype.kind not in "biuf" or labels.shape[:1] != (len(names),):
        raise ValueError(f"{path}: expected the classes of {len(names)} utterances, got {labels.dtype} {labels.shape}")
    if labels.shape == (len(names), CLASSES):
        wrong = ~(((labels == 0) | (labels == 1)).all(1) & (labels.sum(1) == 1))
        classes = labels.argmax(1)
    elif labels.ndim == 1:  # MSP-IMPROV's
        wrong = ~np.isin(labels, np.arange(CLASSES))
        classes = np.where(wrong, 0, labels)
    else:
        raise ValueError(
            f"{path}: expected one-hot classes [n, {CLASSES}] or numbers [n] below {CLASSES}, got shape {labels.shape}"
        )
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{path}: expected one-hot classes of {CLASSES} (or numbers below {CLASSES}), but {int(wrong.sum())} are "
            f"not, the first of {names[row]}: {labels[row].tolist()}"
        )
    return names, classes.astype(np.int64)


def _check_ids(names: Mapping[str, Sequence[str]], folder: Path) -> None:
    """ValueError for an utterance that occurs twice: a split that leaks into another one."""
    seen: dict[str, str] = {}
    for split, part in _PARTS.items():
        for name in names[split]:
            if name in seen:
                raise ValueError(
                    f"{folder}: utterance {name} occurs in {seen[name]}_int2name.npy and again in {part}_int2name.npy"
                )
            seen[name] = part


def _read_h5(path: Path, names: Mapping[str, Sequence[str]], width: int, limit: int | None) -> dict[str, Frames]:
    """One modality of all splits. The file is opened once and every utterance read once."""
    read: dict[str, list[np.ndarray]] = {}
    with _opened(path) as file:
        there = set(file.keys())
        left = _AMPLE * path.stat().st_size + _ALLOWED
        for split, ids in names.items():
            if missing := [name for name in ids if name not in there]:
                raise ValueError(
                    f"{path}: {len(missing)} of the {len(ids)} utterances of the {split} split "
                    f"({_PARTS[split]}_int2name.npy) have no features, the first {', '.join(missing[:3])}"
                )
            read[split] = []
            for name in ids:
                read[split].append(_read_utterance(path, file, name, width, limit, left))
                left -= read[split][-1].nbytes
    lengths = {split: [len(row) for row in rows] for split, rows in read.items()}
    longest, frames = max(1, *map(max, lengths.values())), sum(map(sum, lengths.values()))
    padded = longest * sum(map(len, lengths.values()))
    if padded > _AMPLE * frames and padded * width * 4 > 1 << 30:
        name = next(
            name for split, ids in names.items() for name, n in zip(ids, lengths[split], strict=True) if n == longest
        )
        raise ValueError(
            f"{path}: {name} has {longest} frames where the mean is {frames // len(there)}; to pad all to its length "
            f"takes {padded * width >> 28} GiB. max_frames=... cuts it"
        )
    result = {}
    for split in names:
        rows = read.pop(split)
        x = np.zeros((len(rows), longest, width), np.float32)
        for to, row in zip(x, rows, strict=True):
            to[: len(row)] = row
        result[split] = _frames(x, np.array([len(row) for row in rows]))
    return result


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An HDF5 file, whose library's errors become a ValueError naming the file."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, TypeError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: truncated, or not an HDF5 file ({error}); copy or download it again") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: damaged HDF5 file ({error}); copy or download it again") from error


def _stored(path: Path, group: Any, name: str, expected: str) -> Any:
    """The data set of that name, if all its numbers are stored in this file: no link, no other file, no gaps.

    HDF5 fills what was never written with zeros, and follows links into other files, without a word.
    """
    import h5py

    try:
        link, values = group.get(name, getlink=True), group[name]
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot read {name} ({error}); the file is damaged, copy it again") from error
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{path}: {name} is a link ({type(link).__name__}); expected the numbers themselves")
    if not isinstance(values, h5py.Dataset) or values.shape is None or values.dtype.kind not in "fiu":
        found = "a group" if not isinstance(values, h5py.Dataset) else f"{values.dtype} {values.shape}"
        raise ValueError(f"{path}: expected {expected} for {name}, got {found}")
    if values.external or values.is_virtual:
        raise ValueError(f"{path}: {name} lies in other files; expected the numbers themselves")
    count = math.prod(values.shape)
    if values.chunks:
        chunks = [-(-n // c) for n, c in zip(values.shape, values.chunks, strict=True)]
        whole = values.id.get_num_chunks() == math.prod(chunks)
    else:
        whole = values.id.get_storage_size() >= count * values.dtype.itemsize
    if count and not whole:
        raise ValueError(f"{path}: {name} declares {values.dtype} {values.shape}, but not all of it was ever written")
    return values


def _check_chunks(path: Path, name: str, values: Any, left: int) -> None:
    """ValueError unless every chunk has, unpacked, exactly its size: the library reads on beyond a shorter one."""
    settings, size = values.id.get_create_plist(), math.prod(values.chunks) * values.dtype.itemsize
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    if size > left + _ALLOWED or any(kind not in (_DEFLATE, _SHUFFLE, _FLETCHER32) for kind in filters):
        raise ValueError(
            f"{path}: {name} is stored in chunks of {size} bytes with the filters {filters}; expected no others than "
            f"gzip (1), shuffle (2) and fletcher32 (3), and chunks no larger than the file can hold"
        )
    for i in range(values.id.get_num_chunks()):
        place = values.id.get_chunk_info(i)
        mask, raw = values.id.read_direct_chunk(place.chunk_offset)
        for kind in reversed(filters):
            if kind == _FLETCHER32:
                raw = raw[:-4]
            elif kind == _DEFLATE:
                raw = zlib.decompressobj().decompress(raw, size + 1)
        if mask or place.filter_mask or len(raw) != size:
            raise ValueError(f"{path}: {name}: chunk {i} has {len(raw)} bytes, expected {size}; the file is damaged")


def _read_utterance(path: Path, file: Any, name: str, width: int, limit: int | None, left: int) -> np.ndarray:
    """float32 [T, width] of one utterance, of at most ``left`` bytes."""
    values = _stored(path, file, name, f"frames [T, {width}]")
    if len(values.shape) != 2 or values.shape[1] != width:
        raise ValueError(f"{path}: expected frames [T, {width}] for {name}, got {values.dtype} {values.shape}")
    rows = len(values) if limit is None else min(limit, len(values))
    if rows * width * 4 > left:
        raise ValueError(
            f"{path}: {name} declares {values.dtype} {values.shape}, more than {_AMPLE} times what the file can hold"
        )
    try:
        if values.chunks:
            _check_chunks(path, name, values, left)
        x = values[:rows]
    except (OSError, KeyError, RuntimeError, zlib.error) as error:
        raise ValueError(f"{path}: cannot read {name} ({error}); the file is damaged, copy it again") from error
    with np.errstate(over="ignore"):
        x = x.astype(np.float32, copy=False)
    _check_finite(path, name, x)
    return x


def _check_finite(path: Path, name: str, x: np.ndarray) -> None:
    bad = ~(np.abs(x) < _LARGEST)
    if bad.any():
        frame, column = np.argwhere(bad)[0]
        found = "NaN or infinite values" if not np.isfinite(x).all() else f"values as large as {x[frame, column]:g}"
        raise ValueError(f"{path}: {name} has {found}, the first in frame {frame}")


def _read_arrays(
    paths: Mapping[str, Path], names: Mapping[str, Sequence[str]], width: int, limit: int | None
) -> dict[str, Frames]:
    """One modality of all splits, from one array a split; zeros at an utterance's end are padding."""
    read: dict[str, np.ndarray] = {}
    for split, path in paths.items():
        x = read_npy(path)
        n = len(names[split])
        if x.dtype.kind not in "fiu" or x.ndim != 3 or len(x) != n or x.shape[2] != width or not x.shape[1]:
            raise ValueError(f"{path}: expected frames [{n}, T, {width}], got {x.dtype} {x.shape}")
        read[split] = np.array(x[:, :limit], np.float32)  # a copy: the file may be read-only, or change
        if bad := [i for i, row in enumerate(read[split]) if not (np.abs(row) < _LARGEST).all()]:
            _check_finite(path, names[split][bad[0]], read[split][bad[0]])
    lengths = {split: _last_frame(x) for split, x in read.items()}
    longest = max(int(count.max()) for count in lengths.values())
    result = {}
    for split, x in read.items():
        padding = ((0, 0), (0, max(longest - x.shape[1], 0)), (0, 0))
        result[split] = _frames(np.ascontiguousarray(np.pad(x[:, :longest], padding)), lengths[split])
    return result


def _last_frame(x: np.ndarray) -> np.ndarray:
    """How many frames of x [n, T, D] there are up to the last that is not zero, at least one."""
    some = (x != 0).any(-1)
    return np.maximum(np.where(some, np.arange(1, x.shape[1] + 1), 0).max(1), 1)


def _frames(x: np.ndarray, lengths: np.ndarray) -> Frames:
    """x [n, T, D], zero after the utterance's own length [n]."""
    valid = np.arange(x.shape[1]) < lengths[:, None]
    return Frames(x, valid, valid.copy())


def _measure(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [D] of the frames; 1 where they do not vary."""
    rows = frames.x[frames.valid].astype(np.float64)
    std = rows.std(0)
    return rows.mean(0).astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


def _read_statistics(path: Path, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [130] of a fold's training frames."""
    import h5py

    width, found = WIDTHS["audio"], {}
    with _opened(path) as file:
        if str(fold) not in file:
            raise ValueError(f"{path}: expected the statistics of fold {fold}, got folds {sorted(file)}")
        if not isinstance(file.get(str(fold), getlink=True), h5py.HardLink) or not isinstance(
            file[str(fold)], h5py.Group
        ):
            raise ValueError(f"{path}: expected the group of fold {fold}, got a link or a data set")
        for key in ("mean", "std"):
            if key not in file[str(fold)]:
                raise ValueError(f"{path}: fold {fold} lacks {key!r}")
            values = _stored(path, file[str(fold)], key, f"numbers [{width}]")
            if values.shape != (width,):
                raise ValueError(
                    f"{path}: expected mean and std [{width}] of fold {fold}, got {values.shape} for {key}"
                )
            if values.chunks:
                _check_chunks(path, key, values, _ALLOWED)
            with np.errstate(over="ignore"):
                found[key] = np.asarray(values[()], np.float32)
    mean, std = found["mean"], found["std"]
    if not ((np.abs(mean) < _LARGEST).all() and (std < _LARGEST).all() and (std > 0).all()):
        raise ValueError(f"{path}: expected finite means and positive standard deviations in fold {fold}")
    return mean, std


# -- data sets ------------------------------------------------------------------------------------------------------


def _class_names(target: np.ndarray) -> tuple[list[str], bool]:
    """Names of the classes, by how many utterances each has; whether they are known."""
    counts = np.bincount(target, minlength=CLASSES).tolist()
    if sorted(counts) == sorted(_CORPUS):
        return [_CORPUS[count] for count in counts], True
    return [f"class {k}" for k in range(CLASSES)], False
