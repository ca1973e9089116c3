"""Sentiment of spoken utterances as MMSA and MulT store it: one pickle a data set, its three splits inside.

``mosi``, ``mosei``, ``sims`` and ``simsv2`` share this reader. ``root`` is the pickle itself, or a folder that holds it
under the name that its makers gave it (see `LAYOUT`). Two layouts are told apart by their keys:

* **MMSA** (also LNLN, TFR-Net, RedCore): ``regression_labels``; zeros at the end are padding; ``text_bert`` holds the
  token ids and their attention mask; ``audio_lengths`` and ``vision_lengths`` where the frames follow no words;
* **MulT** (also MultiBench, MPLMM): ``labels``; no lengths, and zeros in *front* are padding. Such sequences are moved
  to the start here, as MultiBench does, so that a frame's place means the same in every layout.

What is missing by nature stays so: a modality with a length of zero, or of zeros alone, is not ``present``, and enters
no statistic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..batch import MultimodalDataset
from ..checks import Flag, Maybe, OneOf, Whole, check_all, check_known, shown
from ._readers import (
    FRAMES,
    ROOT,
    Frames,
    encodable,
    fingerprint,
    frames_dataset,
    measure_frames,
    plain_numbers,
    scale_frames,
    some_of,
)
from .pickles import safe_pickle_load

__all__ = ["LAYOUT", "MODALITIES", "load", "transcripts"]

MODALITIES = ("language", "audio", "vision")
SPLITS = ("train", "valid", "test")
_KEYS = {"language": "text", "audio": "audio", "vision": "vision"}
_UNIMODAL = {"language": "regression_labels_T", "audio": "regression_labels_A", "vision": "regression_labels_V"}


class _Source(NamedTuple):
    """A data set: its folders and files below a root, and what its authors say of it."""

    folders: tuple[str, ...]
    unaligned: tuple[str, ...]
    aligned: tuple[str, ...]
    sizes: tuple[int, int, int]  # train, valid, test
    limit: float  # scores lie in [-limit, limit]
    scale: str  # what metrics.msa_scores calls it
    source: str
    licence: str


_SOURCES = {
    "mosi": _Source(
        ("MOSI", "mosi"),
        ("unaligned_50.pkl", "mosi_data_noalign.pkl", "mosi_utterance.pkl"),
        ("aligned_50.pkl", "mosi_data.pkl", "mosi_raw.pkl"),
        (1284, 229, 686),
        3.0,
        "mosi",
        "CMU-MOSI (Zadeh et al. 2016)",
        "CC BY 4.0 (the corpus); the features' own",
    ),
    "mosei": _Source(
        ("MOSEI", "mosei"),
        ("unaligned_50.pkl", "mosei_senti_data_noalign.pkl"),
        ("aligned_50.pkl", "mosei_senti_data.pkl", "mosei_raw.pkl"),
        (16326, 1871, 4659),
        3.0,
        "mosi",
        "CMU-MOSEI (Zadeh et al. 2018)",
        "that of the corpus",
    ),
    "sims": _Source(
        ("SIMS", "sims"),
        ("unaligned_39.pkl",),
        (),
        (1368, 456, 457),
        1.0,
        "sims",
        "CH-SIMS (Yu et al. 2020)",
        "that of the corpus",
    ),
    "simsv2": _Source(
        ("SIMSv2", "SIMS_V2", "simsv2"),
        ("sims_unaligned.pkl", "ch-simsv2s.pkl"),
        (),
        (2722, 647, 1034),
        1.0,
        "sims",
        "CH-SIMS v2.0 (Liu et al. 2022)",
        "that of the corpus",
    ),
}
LAYOUT = """\
  root is the pickle, or the folder of
      MOSI/Processed/unaligned_50.pkl    MOSI/Processed/aligned_50.pkl
      MOSEI/Processed/unaligned_50.pkl   MOSEI/Processed/aligned_50.pkl
      SIMS/Processed/unaligned_39.pkl    SIMSv2/Processed/sims_unaligned.pkl (or SIMS_V2/ch-simsv2s.pkl)
          train, valid, test, each with text [n, L, 768], text_bert [n, 3, L], audio and vision [n, T, D],
          audio_lengths, vision_lengths, id, raw_text, regression_labels:  https://github.com/thuiar/MMSA
      mosi_data.pkl, mosi_data_noalign.pkl, mosei_senti_data.pkl, mosei_senti_data_noalign.pkl
          train, valid, test, each with text [n, L, 300], audio, vision, labels [n, 1, 1], id:
          https://github.com/yaohungt/Multimodal-Transformer
"""


OPTIONS = {
    "root": ROOT,
    "aligned": Maybe(Flag()),
    "text": OneOf("features", "ids"),
    "modalities": some_of(*MODALITIES),
    "standardised": Flag(),
    "max_frames": FRAMES,
    "unimodal": Flag(),
    "drop": Maybe(OneOf("empty", "incomplete")),
    "nan": OneOf("error", "drop"),
    "strict": Flag(),
    "unk": Whole(0),
}


def load(
    name: str,
    root: Path | None,
    aligned: bool | None = None,
    text: str = "features",
    modalities: Sequence[str] = MODALITIES,
    standardised: bool = True,
    max_frames: int | Mapping[str, int] | None = None,
    unimodal: bool = False,
    drop: str | None = None,
    nan: str = "error",
    strict: bool = False,
    unk: int = 100,
) -> dict[str, MultimodalDataset]:
    """Utterances as ``language`` [L, D], ``audio`` [T, D] and ``vision`` [T, D], and a sentiment score each.

    name : "mosi" or "mosei" (scores in [-3, 3]), "sims" or "simsv2" (in [-1, 1])
    aligned : True: the file whose audio and vision frames follow the words; False: the one whose do not; None:
        whichever is there, the unaligned one first
    text : "features": the vectors in ``text``; "ids": the token ids in ``text_bert``, int64 [L], valid where its
        attention mask is 1, with ``unk`` as the id that replaces a dropped token
    modalities : which to read, in this order
    standardised : audio and vision minus their mean, over their standard deviation, per feature. Both are measured on
        the frames of present modalities of train, with what lies beyond their 0.5 and 99.5 percentiles moved there;
        the result is cut at +-5, since openSMILE and COVAREP statistics have values 100 deviations off. False: the
        values of the file
    max_frames : keep an utterance's first frames alone, at most this many in every modality, or {modality: count}
    unimodal : ``extras["target_language"]``, ``["target_audio"]``, ``["target_vision"]`` [n]: the scores that SIMS's
        annotators gave one modality alone
    drop : None: keep all samples; "empty": leave out those of which nothing is there; "incomplete": those that miss a
        modality by nature
    nan : "error", or "drop": a frame with a NaN was not observed
    strict : refuse a file whose splits have other sizes than the published ones
    unk : the vocabulary's [UNK], 100 in the uncased English and in the Chinese BERT

    ``valid`` comes from the attention mask and the lengths; where a file has none, from the zeros around the frames (of
    aligned modalities: around all of them together, so that they stay aligned). What lies beyond the length is zeroed.
    -inf in ``audio`` (COVAREP's log of nothing) reads 0 in the file's units, as in every release.

    ``info`` adds ``scale`` (for `metrics.msa_scores`), ``layout``, ``aligned``, ``file``, ``official_split``,
    ``missing`` (per modality how many of this split's samples miss it), ``empty`` (the samples of which nothing is
    there) and ``repairs`` (per modality how many values were -inf, how many samples had frames beyond their length, how
    many frames a NaN).

    Raises FileNotFoundError with the expected layout, and ValueError that names the file, split and key:
    keys and splits that are not there, unequal numbers of samples, other shapes, lengths, masks and ids out of range,
    NaN and infinity, scores off the scale, samples in two splits, a modality that train lacks, another data set's
    splits, and pickles that are truncated or ask for anything but arrays and containers.
    """
    check_all(OPTIONS, locals())
    source = _source(name)
    wanted = _check_modalities(modalities)
    limits = _limits(max_frames)

    path = _find(name, source, root, aligned)
    file = _File(path)
    official = _check_sizes(path, name, file.sizes, strict)
    layout = "mmsa" if "regression_labels" in file.parts["train"] else "mult"
    names = {split: file.names(split, f"{name}/") for split in SPLITS}
    _check_leaks(path, names)
    target_key = "regression_labels" if layout == "mmsa" else "labels"
    target = {split: file.scores(split, target_key, source.limit) for split in SPLITS}
    extras: dict[str, dict[str, torch.Tensor]] = {split: {} for split in SPLITS}
    if unimodal:
        for modality, key in _UNIMODAL.items():
            for split in SPLITS:
                scores = torch.from_numpy(file.scores(split, key, source.limit))
                extras[split][f"target_{modality}"] = scores

    frames, follows = _read_frames(file, wanted, text, aligned)
    for modality in wanted:
        tokens = modality == "language" and text == "ids"
        for split in SPLITS:
            frames[modality][split] = _clean(
                file, split, modality, frames[modality][split], names[split], limits.get(modality), tokens, nan
            )
        train = frames[modality]["train"]
        if not train.valid.any():
            raise ValueError(
                f"{file.at('train', 'text_bert' if tokens else _KEYS[modality])}: the modality is missing in all "
                f"{file.sizes['train']} samples; choose others with modalities=..."
            )
        if standardised and modality != "language":
            mean, std = measure_frames(train)
            for split in SPLITS:
                scale_frames(frames[modality][split], mean, std)

    scaled = ", standardised on train" if standardised else ""
    info = {
        "name": name,
        "task": "regression",
        "outputs": 1,
        "classes": None,
        "scale": source.scale,
        "source": f"{source.source}, features in the layout of {'MMSA' if layout == 'mmsa' else 'MulT'}",
        "licence": source.licence,
        "file": path.name,
        "layout": layout,
        "aligned": follows,
        "official_split": official,
        "text": text,
        "max_frames": limits or None,
        "units": {
            m: f"{'token ids' if m == 'language' and text == 'ids' else 'features of the file'}"
            f"{scaled if m != 'language' else ''}"
            for m in wanted
        },
    }
    splits = {}
    for split in SPLITS:
        fill = {"language": unk} if text == "ids" and "language" in wanted else {}
        parts = {m: frames[m].pop(split) for m in wanted}
        dataset = frames_dataset(parts, target[split], names[split], fill=fill, extras=extras[split])
        there = dataset.present
        keep = torch.ones(len(there), dtype=torch.bool)
        if drop is not None:
            keep = there.any(-1) if drop == "empty" else there.all(-1)
        if not keep.any():
            raise ValueError(f"drop: {path.name} has no sample in {split} that {drop!r} would keep")
        if not keep.all():
            dataset = dataset.subset(keep)
        assert dataset.names is not None
        dataset.info.update(
            info,
            missing={m: int((~dataset.present[:, i]).sum()) for i, m in enumerate(wanted)},
            empty=[dataset.names[i] for i in (~dataset.present.any(-1)).nonzero()[:, 0].tolist()],
            repairs={m: counts for m in wanted if (counts := file.repairs.get((split, m)))},
            split=split,
            split_seed=None,
        )
        dataset.info["fingerprint"] = fingerprint(dataset)
        splits[split] = dataset
    return splits


def transcripts(name: str, root: Path | str | None, aligned: bool | None = None) -> dict[str, str]:
    """What was said: the text of every sample of all splits by its name in ``dataset.names``.

    Raises as `load` does, for a file without ``raw_text`` too.
    """
    ROOT("root", root)
    Maybe(Flag())("aligned", aligned)
    file = _File(_find(name, _source(name), None if root is None else Path(root), aligned))
    said: dict[str, str] = {}
    for split, n in file.sizes.items():
        texts = file.listed(split, "raw_text", n)
        for key, value in zip(file.names(split, f"{name}/"), texts, strict=True):
            said[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return said


# -- options and files ----------------------------------------------------------------------------------------------


def _source(name: str) -> _Source:
    return _SOURCES[OneOf(*_SOURCES)("name", name)]


def _check_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    wanted = tuple(modalities) if not isinstance(modalities, str) else (modalities,)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"modalities: expected some of {', '.join(MODALITIES)}, each once, got {modalities!r}")
    return wanted


def _limits(max_frames: int | Mapping[str, int] | None) -> dict[str, int]:
    limits = dict(max_frames) if isinstance(max_frames, Mapping) else dict.fromkeys(MODALITIES, max_frames)
    check_known("max_frames", limits, MODALITIES)
    return {modality: value for modality, value in limits.items() if value is not None}


def _find(name: str, source: _Source, root: Path | None, aligned: bool | None) -> Path:
    """The pickle: ``root`` itself, or the first of the known names below it."""
    if root is None:
        raise FileNotFoundError(
            f"{name}: no file or folder given; pass root=..., or set the environment variable MMLIB_DATA. "
            f"Expected:\n{LAYOUT}"
        )
    if root.is_file():
        return root
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: {root} is not a folder. Expected:\n{LAYOUT}")
    files = (() if aligned else source.unaligned) + (() if aligned is False else source.aligned)
    if not files:
        raise ValueError(f"aligned: {name} has no aligned version; expected False or None, got True")
    folders = [root / folder / inner for folder in source.folders for inner in ("Processed", "")]
    folders += [root / "Processed", root]
    for file in files:
        for folder in folders:
            if (folder / file).is_file():
                return folder / file
    raise FileNotFoundError(f"{name}: no {', '.join(files)} in {root}. Expected:\n{LAYOUT}")


def _check_sizes(path: Path, name: str, sizes: Mapping[str, int], strict: bool) -> bool:
    """Whether the splits have the published sizes; ValueError where they have those of another data set."""
    found = tuple(sizes[split] for split in SPLITS)
    if found == _SOURCES[name].sizes:
        return True
    if others := [other for other, source in _SOURCES.items() if source.sizes == found]:
        raise ValueError(f"{path}: its splits have the sizes of {others[0]}, {found}, not of {name}")
    if strict:
        raise ValueError(
            f"{path}: expected train, valid and test of {_SOURCES[name].sizes} samples, as {name} was published, got "
            f"{found}; strict=False reads it"
        )
    return False


def _check_leaks(path: Path, names: Mapping[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    for split, known in names.items():
        for key in known:
            if key in seen:
                raise ValueError(f"{path}: {key} is in {seen[key]}['id'] and again in {split}['id']")
        seen.update(dict.fromkeys(known, split))


class _File:
    """One pickle's splits, each key of which is read once, checked, and let go."""

    def __init__(self, path: Path):
        self.path = path
        self.repairs: dict[tuple[str, str], dict[str, int]] = {}
        content = safe_pickle_load(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a dict of {', '.join(SPLITS)}, got {type(content).__name__}")
        if missing := [split for split in SPLITS if split not in content]:
            raise ValueError(f"{path}: the split {missing[0]!r} is missing; the file has {sorted(map(str, content))}")
        self.parts: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            if not isinstance(content[split], dict):
                raise ValueError(f"{path}: {split}: expected a dict of arrays, got {type(content[split]).__name__}")
            self.parts[split] = dict(content[split])
        self.sizes = {split: self._size(split) for split in SPLITS}

    def at(self, split: str, key: str) -> str:
        """Where a value stands, for messages."""
        return f"{self.path}: {split}[{key!r}]"

    def note(self, split: str, modality: str, what: str, count: int) -> None:
        if count:
            self.repairs.setdefault((split, modality), {})[what] = count

    def take(self, split: str, key: str) -> Any:
        if key not in self.parts[split]:
            raise ValueError(
                f"{self.path}: {split} lacks the key {key!r}; it has {', '.join(sorted(map(str, self.parts[split])))}"
            )
        return self.parts[split].pop(key)

    def array(self, split: str, key: str) -> np.ndarray:
        """Numbers of any shape, without a copy where they are an array already."""
        try:
            return plain_numbers(self.take(split, key))
        except TypeError as error:
            raise ValueError(f"{self.at(split, key)}: {error}") from error

    def _size(self, split: str) -> int:
        """The number of samples of a split, by its scores."""
        part = self.parts[split]
        key = next((key for key in ("regression_labels", "labels") if key in part), None)
        if key is None:
            raise ValueError(
                f"{self.path}: {split} lacks the key 'regression_labels' (or MulT's 'labels'); it has "
                f"{', '.join(sorted(map(str, part)))}"
            )
        sized = isinstance(part[key], (list, tuple)) or (isinstance(part[key], np.ndarray) and part[key].ndim > 0)
        size = len(part[key]) if sized else 0
        if not size:
            raise ValueError(f"{self.at(split, key)}: expected at least one sample, got none")
        return size

    def listed(self, split: str, key: str, n: int) -> list[Any]:
        values = self.take(split, key)
        if not isinstance(values, (list, tuple, np.ndarray)) or (isinstance(values, np.ndarray) and not values.ndim):
            raise ValueError(f"{self.at(split, key)}: expected {n} entries, one a sample, got {shown(values)}")
        values = values.tolist() if isinstance(values, np.ndarray) else list(values)
        if len(values) != n:
            raise ValueError(f"{self.at(split, key)}: expected {n} entries, one a sample, got {len(values)}")
        return values

    def names(self, split: str, prefix: str) -> list[str]:
        """Unique names: the ids, MulT's [video, start, end] joined, or the rows' numbers where there are none."""
        if "id" not in self.parts[split]:
            return [f"{prefix}{split}/{i}" for i in range(self.sizes[split])]
        names: list[str] = []
        times: dict[str, int] = {}
        for value in self.listed(split, "id", self.sizes[split]):
            pieces = value if isinstance(value, (list, tuple)) else [value]
            if not pieces or not all(isinstance(p, (str, bytes, int, float, np.generic)) for p in pieces):
                raise ValueError(f"{self.at(split, 'id')}: expected a name or number a sample, got {shown(value)}")
            key = "$_$".join(p.decode("utf-8", "replace") if isinstance(p, bytes) else str(p) for p in pieces)
            if not encodable(key):
                raise ValueError(f"{self.at(split, 'id')}: expected names of whole characters, got {key!r}")
            times[key] = times.get(key, 0) + 1
            names.append(f"{prefix}{key}" + (f"#{times[key]}" if times[key] > 1 else ""))
        return names

    def scores(self, split: str, key: str, limit: float) -> np.ndarray:
        """float32 [n] in [-limit, limit]."""
        x, n = self.array(split, key), self.sizes[split]
        if x.shape[:1] != (n,) or x.size != n:
            raise ValueError(f"{self.at(split, key)}: expected a score for each of {n} samples, got shape {x.shape}")
        x = x.reshape(n).astype(np.float32)
        wrong = ~(np.abs(x) <= limit + 1e-4)  # NaN is wrong too
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{self.at(split, key)}: expected scores in [{-limit:g}, {limit:g}], but {int(wrong.sum())} are not, "
                f"the first of sample {row}: {x[row]:g}"
            )
        return x

    def frames(self, split: str, key: str) -> np.ndarray:
        """[n, T, D] as stored; vectors [n, D] are sequences of one frame."""
        x = self.array(split, key)
        if x.ndim == 2:
            x = x[:, None]
        n = self.sizes[split]
        if x.ndim != 3 or len(x) != n or not x.shape[1] or not x.shape[2]:
            raise ValueError(f"{self.at(split, key)}: expected frames [{n}, T, D], got {x.dtype} {x.shape}")
        return x

    def tokens(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [n, L] and the attention mask bool [n, L]."""
        x, n, at = self.array(split, "text_bert"), self.sizes[split], self.at(split, "text_bert")
        if x.ndim != 3 or x.shape[:2] != (n, 3) or not x.shape[2]:
            raise ValueError(f"{at}: expected ids, attention mask and segments [{n}, 3, L], got {x.dtype} {x.shape}")
        ids, mask = x[:, 0], x[:, 1]
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(
                f"{at}: expected an attention mask of 0 and 1 in [:, 1], got {np.unique(mask)[:8].tolist()}"
            )
        if not (np.isfinite(ids).all() and (ids == np.round(ids)).all() and (ids >= 0).all() and (ids < 1 << 31).all()):
            raise ValueError(
                f"{at}: expected token ids, integers from 0, in [:, 0], got {ids.min():g} to {ids.max():g}"
            )
        return ids.astype(np.int64), mask.astype(bool)

    def lengths(self, split: str, key: str, some: np.ndarray) -> np.ndarray:
        """int64 [n] in [0, T]; ``some`` bool [n, T] tells the frames that are not zero."""
        at, (n, frames) = self.at(split, key), some.shape
        x = self.array(split, key)
        x = x.reshape(len(x), -1)[:, 0] if x.ndim and 0 < x.size == len(x) else x
        if x.ndim != 1 or len(x) < n:
            raise ValueError(f"{at}: expected {n} lengths, one a sample, got shape {x.shape}")
        # A list that is too long is cut, which is what reading it by sample does, if the frames bear it out.
        if len(x) > n and bool((some & (np.arange(frames) >= x[:n, None])).any()):
            raise ValueError(f"{at}: expected {n} lengths, one a sample, got {len(x)}")
        x = x[:n]
        good = (x == np.round(x)) & (x >= 0) & (x <= frames)
        if not good.all():
            row = int((~good).argmax())
            raise ValueError(f"{at}: expected lengths from 0 to the {frames} frames, got {x[row]:g} for sample {row}")
        return x.astype(np.int64)


# -- frames ---------------------------------------------------------------------------------------------------------


def _read_frames(
    file: _File, wanted: Sequence[str], text: str, aligned: bool | None
) -> tuple[dict[str, dict[str, Frames]], bool]:
    """The frames as stored, but moved to the start, and which are valid; whether audio and vision follow the words."""
    ids = text == "ids"
    key = {**_KEYS, "language": "text_bert"} if ids else _KEYS
    # What was not asked for is still read where it is there: it tells where the words of aligned frames end.
    known = [m for m in MODALITIES if m in wanted or all(key[m] in file.parts[split] for split in SPLITS)]
    x: dict[str, dict[str, np.ndarray]] = {m: {} for m in known}
    mask: dict[str, np.ndarray] = {}
    masked = "language" in known and any("text_bert" in file.parts[split] for split in SPLITS)
    for split in SPLITS:
        for m in known:
            if not (ids and m == "language"):
                x[m][split] = file.frames(split, _KEYS[m])
        if masked or (ids and "language" in known):
            tokens, mask[split] = file.tokens(split)
            if ids:
                x["language"][split] = tokens
    for m in known:
        shape = list(x[m]["train"].shape[1:])
        for split in SPLITS[1:]:
            if list(x[m][split].shape[1:]) != shape:
                raise ValueError(
                    f"{file.at(split, key[m])}: expected samples of shape {shape}, as in train, got "
                    f"{list(x[m][split].shape[1:])}"
                )
    counts = {m: x[m]["train"].shape[1] for m in known}
    if masked and any(a.shape[1] != counts["language"] for a in mask.values()):
        mask.clear()  # the tokens of other vectors than these
    lengths = {m for m in known if m != "language" and any(f"{m}_lengths" in file.parts[split] for split in SPLITS)}
    equal = len(set(counts.values())) == 1
    follows = len(known) == 3 and equal and (not lengths or aligned is True)
    if aligned is not None and len(known) == 3 and aligned != follows:
        found = "are as many as the words, without lengths" if equal else "differ in number from the words"
        raise ValueError(f"aligned: expected {follows}, since the frames of {file.path} {found}: {counts}")

    some = {m: {split: _some(a) for split, a in x[m].items()} for m in known}
    front = not mask and _padded_in_front([some[m]["train"] for m in known])
    valid: dict[str, dict[str, np.ndarray]] = {m: {} for m in known}
    for m in known:
        mine = front if follows else _padded_in_front([some[m]["train"]])
        for split in SPLITS:
            rows, own = np.arange(counts[m]), some[m][split]
            if m == "language" and mask:
                valid[m][split] = mask[split]
            elif m in lengths:
                valid[m][split] = rows < file.lengths(split, f"{m}_lengths", own)[:, None]
            elif mine:
                start = np.min([_first(some[o][split]) for o in known], 0) if follows else _first(own)
                order = (rows + start[:, None]) % counts[m]
                x[m][split] = np.take_along_axis(x[m][split], order[..., None], 1)
                valid[m][split] = rows < (counts[m] - start)[:, None]
            else:
                ends = [own]
                if follows:  # the words' end is their mask's; vectors of padding need not be zero
                    ends = [mask[split] if o == "language" and mask else some[o][split] for o in known]
                valid[m][split] = rows < np.max([_last(a) for a in ends], 0)[:, None]
    return {m: {s: Frames(x[m][s], valid[m][s], valid[m][s]) for s in SPLITS} for m in known}, follows


def _some(x: np.ndarray) -> np.ndarray:
    """bool [n, T]: which frames of [n, T, D], or which ids of [n, T], are not zero."""
    return (x != 0).any(-1) if x.ndim == 3 else x != 0


def _first(some: np.ndarray) -> np.ndarray:
    """int64 [n]: the first true frame, T where there is none."""
    return np.where(some.any(1), some.argmax(1), some.shape[1])


def _last(some: np.ndarray) -> np.ndarray:
    """int64 [n]: one past the last true frame, 0 where there is none."""
    return np.where(some.any(1), some.shape[1] - some[:, ::-1].argmax(1), 0)


def _padded_in_front(some: Sequence[np.ndarray]) -> bool:
    """Whether more zeros stand before the frames than after them."""
    before = sum(int(_first(a)[a.any(1)].sum()) for a in some)
    after = sum(int((a.shape[1] - _last(a))[a.any(1)].sum()) for a in some)
    return before > after


def _clean(
    file: _File,
    split: str,
    modality: str,
    frames: Frames,
    names: Sequence[str],
    limit: int | None,
    tokens: bool,
    nan: str,
) -> Frames:
    """float32 [n, T, D], finite, zero where nothing was observed; a modality of zeros alone loses its frames."""
    if tokens:
        valid = frames.valid[:, :limit]
        return Frames(np.ascontiguousarray(np.where(frames.valid, frames.x, 0)[:, :limit]), valid, valid.copy())
    beyond = ((frames.x != 0).any(-1) & ~frames.valid).any(1)
    file.note(split, modality, "beyond_length", int(beyond.sum()))
    valid = frames.valid[:, :limit].copy()
    with np.errstate(over="ignore"):
        x = np.array(frames.x[:, :limit], np.float32)  # a copy: what the caller of the unpickler holds stays as it is
    x[~valid] = 0
    at = file.at(split, _KEYS[modality])
    if modality == "audio":
        nothing = np.isneginf(x)
        file.note(split, modality, "minus_inf", int(nothing.sum()))
        x[nothing] = 0
    seen = valid
    finite = np.isfinite(x).all(-1)
    if not finite.all():
        gone = np.isnan(x).any(-1)
        for what, bad in (("NaN", gone), ("infinity", ~finite & ~gone)):
            if bad.any() and (what == "infinity" or nan == "error"):
                row, frame = np.argwhere(bad)[0]
                raise ValueError(
                    f"{at}: expected finite values, got {what} in {int(bad.sum())} frames, the first of {names[row]} "
                    f"(sample {row}), frame {frame}"
                    + ("; nan='drop' takes such frames as not observed" if what == "NaN" else "")
                )
        file.note(split, modality, "nan_frames", int(gone.sum()))
        x[gone] = 0
        seen = valid & ~gone
    there = (x != 0).any((1, 2))
    return Frames(x, valid & there[:, None], seen & there[:, None])
