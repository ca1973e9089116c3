"""Dialogues as the models of emotion recognition in conversation read them: IEMOCAP, CMU-MOSI and CMU-MOSEI by video.

A sample is a dialogue, one vector per utterance and modality. Three layouts are told apart by what the pickle holds:

* **BALM** (also the public CMU-MOSI conversation pickle): a dict with ``text``, ``audio``, ``visual``, ``label``,
  ``speaker`` and ``sentence``, each a dict from a video to a list over its utterances, and the lists ``trainVid``,
  ``testVid`` and, but for IEMOCAP, ``valVid``;
* **MMGCN** (also MM-DFN, DialogueRNN): the same as a tuple of nine, without ``valVid``: utterance ids, speakers,
  labels, text, audio, visual, sentences, trainVid, testVid;
* **GCNet** (also MoMKE, SDR-GNN): a list of seven, or of six without validation videos (utterance ids, labels,
  speakers, sentences, and the sets of train, validation and test videos), and the features in folders beside it: one
  ``.npy`` an utterance, whose frames are averaged, or a folder of them.

Features are [B, U, 1, D], padded to the split's longest dialogue. ``extras["utterance"]`` bool [B, U] says which
utterances are real, ``extras["speaker"]`` int64 [B, U] who speaks (0 in the padding); the target is [B, U], 0 in the
padding. What is missing by nature stays so: a vector of zeros alone is not ``present``, and enters no statistic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..batch import MultimodalDataset
from ..checks import PATH, Flag, Maybe, Named, OneOf, Several, Text, Whole, check_all, shown
from ._readers import (
    ROOT,
    SEED,
    SHARE,
    Frames,
    encodable,
    fingerprint,
    frames_dataset,
    measure_frames,
    plain_numbers,
    read_npy,
    scale_frames,
    some_of,
)
from .pickles import safe_pickle_load

__all__ = ["LAYOUT", "MODALITIES", "load", "transcripts"]

MODALITIES = ("audio", "language", "vision")  # in the order of BALM's missing rates
SPLITS = ("train", "valid", "test")
_KEYS = {"audio": "audio", "language": "text", "vision": "visual"}
_FOLDERS = {"audio": "wav2vec-large-c-UTT", "language": "deberta-large-4-UTT", "vision": "manet_UTT"}  # GCNet's


class _Corpus(NamedTuple):
    """A corpus: its folders and files below a root, its classes (None: scores in [-3, 3]), and who made it."""

    folders: tuple[str, ...]
    files: tuple[str, ...]
    classes: tuple[str, ...] | None
    source: str
    licence: str


_IEMOCAP = ("IEMOCAP (Busso et al. 2008)", "IEMOCAP's own, research only, on request")
_CORPORA = {
    "iemocap": _Corpus(
        ("iemocap", "IEMOCAP", "IEMOCAP_features"),
        ("iemocap.pkl", "IEMOCAP_features.pkl", "IEMOCAP_features_raw_6way.pkl"),
        ("happy", "sad", "neutral", "angry", "excited", "frustrated"),
        *_IEMOCAP,
    ),
    "iemocap4": _Corpus(
        ("iemocap", "IEMOCAP"),
        ("iemocap4.pkl", "IEMOCAP_features_raw_4way.pkl"),
        ("happy", "sad", "neutral", "angry"),
        *_IEMOCAP,
    ),
    "mosi": _Corpus(
        ("mosi", "MOSI", "CMUMOSI"),
        ("mosi_conversation.pkl", "mosi.pkl", "CMUMOSI_features_raw_2way.pkl"),
        None,
        "CMU-MOSI (Zadeh et al. 2016)",
        "CC BY 4.0 (the corpus); the features' own",
    ),
    "mosei": _Corpus(
        ("mosei", "MOSEI", "CMUMOSEI"),
        ("mosei.pkl", "CMUMOSEI_features_raw_2way.pkl"),
        None,
        "CMU-MOSEI (Zadeh et al. 2018)",
        "that of the corpus",
    ),
}
_LIMIT = 3.0  # of MOSI's and MOSEI's scores
LAYOUT = """\
  root is the pickle, or the folder of one of
      iemocap.pkl, mosei.pkl (BALM), mosi/mosi_conversation.pkl
          text, audio, visual, label, speaker, sentence: {video: [one an utterance]}; trainVid, valVid, testVid
          https://github.com/np4s/BALM_CVPR2026
      IEMOCAP_features/IEMOCAP_features.pkl (MMGCN)
          the same as a tuple of nine:  https://github.com/hujingwen6666/MMGCN
      CMUMOSI/CMUMOSI_features_raw_2way.pkl, CMUMOSEI/CMUMOSEI_features_raw_2way.pkl,
      IEMOCAP/IEMOCAP_features_raw_6way.pkl, IEMOCAP/IEMOCAP_features_raw_4way.pkl (GCNet)
          with features/{wav2vec-large-c-UTT, deberta-large-4-UTT, manet_UTT}/{utterance}.npy beside each
          https://github.com/zeroQiaoba/GCNet
"""


OPTIONS = {
    "root": ROOT,
    "corpus": Maybe(OneOf(*_CORPORA)),
    "modalities": some_of(*MODALITIES),
    "features": Maybe(Named(PATH)),
    "standardised": Flag(),
    "speakers": Several(Text, 1),
    "valid": SHARE,
    "session": Maybe(Whole(1, 5)),
    "split_seed": SEED,
    "nan": OneOf("error", "drop"),
}


def load(
    root: Path | None,
    corpus: str | None = None,
    modalities: Sequence[str] = MODALITIES,
    features: Mapping[str, str] | None = None,
    standardised: bool = True,
    speakers: Sequence[str] = ("M", "F"),
    valid: float = 0.1,
    session: int | None = None,
    split_seed: int = 0,
    nan: str = "error",
) -> dict[str, MultimodalDataset]:
    """Dialogues whose utterances each have a class (IEMOCAP) or a sentiment score in [-3, 3] (MOSI, MOSEI).

    corpus : "iemocap" (six classes), "iemocap4", "mosi" or "mosei"; None: what the file's name says. A file of another
        name needs none: integers are classes, other numbers scores
    modalities : which to read, in this order
    features : GCNet's layout alone: per modality its folder, as a path or below ``features/`` beside the pickle
    standardised : audio and vision minus their mean, over their standard deviation, as `mmlib.data.mmsa.load` does it
    speakers : the speakers' names, in the order of their numbers; an empty name is the first of them
    valid : the share of the training videos that validates, where the file names none: 12 of IEMOCAP's 120
    session : IEMOCAP's 1 to 5 (the fifth character of a video's name): test on it, train on the others, whatever the
        file says, as GCNet does; None: the file's own split
    split_seed : the seed that chooses those validation videos
    nan : "error", or "drop": an utterance lacks a modality whose vector has a NaN

    ``info`` adds ``corpus``, ``layout``, ``file``, ``speakers`` (their number), ``utterances``, ``missing`` (per
    modality how many of them lack it), ``empty`` (those of which nothing is there), ``unused`` (videos of no split)
    and, for scores, ``scale`` (for `metrics.msa_scores`).

    Raises FileNotFoundError with the expected layout, and ValueError naming the file, the video and the utterance:
    keys that are not there, a video in two splits or without features, labels or utterances, unequal numbers of
    utterances, an unknown speaker, vectors of another width, NaN and infinity, labels out of range, a modality that
    train lacks, and pickles that are truncated or ask for anything but arrays and containers.
    """
    check_all(OPTIONS, locals())
    wanted = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"modalities: expected some of {', '.join(MODALITIES)}, each once, got {modalities!r}")
    if len(set(speakers)) < len(speakers):
        raise ValueError(f"speakers: expected a list of different names, got {speakers!r}")

    path, corpus = _find(root, corpus)
    file = _read(path, wanted, features)
    videos = _split(file, valid, session, split_seed)
    dialogues = {
        split: [_dialogue(file, video, wanted, tuple(speakers), nan) for video in videos[split]] for split in SPLITS
    }
    classes, targets = _targets(file, corpus, dialogues)

    frames: dict[str, dict[str, Frames]] = {m: {} for m in wanted}
    for m in wanted:
        width = _width(file, m, [d for split in SPLITS for d in dialogues[split]])
        for split in SPLITS:
            x = np.zeros((sum(len(d) for d in dialogues[split]), 1, width), np.float32)
            rows = (row for d in dialogues[split] for row in d.features[m])
            for to, row in zip(x, rows, strict=True):
                if row is not None:
                    to[0] = row
            there = (x != 0).any((1, 2))[:, None]
            frames[m][split] = Frames(x, there, there)
        if not frames[m]["train"].observed.any():
            raise ValueError(
                f"{path}: {_KEYS[m]!r} is missing in all training utterances; choose others with modalities=..."
            )
        if standardised and m != "language":
            mean, std = measure_frames(frames[m]["train"])
            for split in SPLITS:
                scale_frames(frames[m][split], mean, std)

    known = _CORPORA.get(corpus or "")
    scaled = ", standardised on train" if standardised else ""
    info: dict[str, Any] = {
        "name": "dialogue",
        "corpus": corpus,
        "task": "regression" if classes is None else "classification",
        "outputs": 1 if classes is None else len(classes),
        "classes": None if classes is None else list(classes),
        "source": f"{known.source if known else path.stem}, features in the layout of {file.layout}",
        "licence": known.licence if known else "not known",
        "file": path.name,
        "layout": file.layout,
        "speakers": max(1 + int(d.speaker.max()) for split in SPLITS for d in dialogues[split]),
        "official_split": session is None,
        "session": session,
        "unused": len(file.labels) - sum(len(videos[split]) for split in SPLITS),
        "units": {m: f"features of the file{scaled if m != 'language' else ''}" for m in wanted},
    }
    if classes is None:
        info["scale"] = "mosi"
    splits = {}
    for split in SPLITS:
        dataset = _dataset(dialogues[split], {m: frames[m].pop(split) for m in wanted}, targets[split])
        real = dataset.data.extras["utterance"]
        there = dataset.present[real]
        dataset.info.update(
            info,
            utterances=len(there),
            missing={m: int((~there[:, i]).sum()) for i, m in enumerate(wanted)},
            empty=int((~there.any(-1)).sum()),
            split=split,
            split_seed=None if file.videos["valid"] is not None and session is None else split_seed,
        )
        dataset.info["fingerprint"] = fingerprint(dataset)
        splits[split] = dataset
    return splits


def transcripts(root: Path | str | None, corpus: str | None = None) -> dict[str, list[str]]:
    """What was said: per video, by its name in ``dataset.names``, the text of its utterances in order.

    Raises as `load` does, for a file without sentences too.
    """
    check_all({name: OPTIONS[name] for name in ("root", "corpus")}, locals())
    file = _read(_find(None if root is None else Path(root), corpus)[0], (), None)
    if file.sentences is None:
        raise ValueError(f"{file.path}: lacks the key 'sentence'")
    return {
        video: [_text(s) for s in _rows(file.path, video, "sentence", sentences)]
        for video, sentences in file.sentences.items()
    }


# -- files ----------------------------------------------------------------------------------------------------------


def _find(root: Path | None, corpus: str | None) -> tuple[Path, str | None]:
    """The pickle, and the corpus that it holds where its name says so."""
    if root is None:
        raise FileNotFoundError(
            f"dialogue: no file or folder given; pass root=..., or set the environment variable MMLIB_DATA. "
            f"Expected:\n{LAYOUT}"
        )
    if root.is_file():
        named = next((name for name, c in _CORPORA.items() if root.name in c.files), None)
        return root, corpus or named
    if not root.is_dir():
        raise FileNotFoundError(f"dialogue: {root} is not a file or folder. Expected:\n{LAYOUT}")
    found: dict[str, Path] = {}
    for name, one in _CORPORA.items():
        if corpus in (None, name):
            places = [folder / file for file in one.files for folder in (*(root / f for f in one.folders), root)]
            if path := next((place for place in places if place.is_file()), None):
                found[name] = path
    if not found:
        raise FileNotFoundError(f"dialogue: no pickle of {corpus or 'dialogues'} in {root}. Expected:\n{LAYOUT}")
    if len(found) > 1:
        raise ValueError(f"corpus: {root} holds {', '.join(found)}; expected one of them, or the file itself as root")
    name, path = next(iter(found.items()))
    return path, name


@dataclass
class _File:
    """A pickle's contents by video, whatever its layout."""

    path: Path
    layout: str
    labels: Mapping[Any, Any]
    speakers: Mapping[Any, Any]
    sentences: Mapping[str, Any] | None
    features: dict[str, Mapping[Any, Any]]  # by modality; empty in GCNet's layout
    videos: dict[str, list[Any] | None]  # of each split
    utterances: Mapping[Any, Any] | None = None  # GCNet's names of them
    folders: dict[str, Path] | None = None  # GCNet's, by modality


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _read(path: Path, wanted: Sequence[str], features: Mapping[str, str] | None) -> _File:
    content = safe_pickle_load(path)
    if features is not None and (unknown := sorted(set(features) - set(MODALITIES))):
        raise ValueError(f"features: unknown modalities {unknown}; known are {list(MODALITIES)}")
    if isinstance(content, dict):
        if features:
            raise ValueError(f"features: {path.name} holds its features itself; folders belong to GCNet's layout")
        return _read_dict(path, content, wanted, "BALM")
    if isinstance(content, (list, tuple)) and len(content) == 9:
        if features:
            raise ValueError(f"features: {path.name} holds its features itself; folders belong to GCNet's layout")
        keys = ("ids", "speaker", "label", "text", "audio", "visual", "sentence", "trainVid", "testVid")
        return _read_dict(path, dict(zip(keys, content, strict=True)), wanted, "MMGCN")
    if isinstance(content, (list, tuple)) and len(content) in (6, 7):
        return _read_labels(path, list(content), wanted, features)
    found = type(content).__name__ + (f" of {len(content)}" if isinstance(content, (list, tuple)) else "")
    raise ValueError(
        f"{path}: expected a dict of text, audio, visual, label, speaker (BALM), a tuple of nine (MMGCN), or a list of "
        f"six or seven (GCNet), got {found}"
    )


def _read_dict(path: Path, content: dict[str, Any], wanted: Sequence[str], layout: str) -> _File:
    keys = {m: _KEYS[m] for m in wanted}
    for key in (*keys.values(), "label", "speaker", "trainVid", "testVid"):
        if key not in content:
            raise ValueError(f"{path}: lacks the key {key!r}; it has {', '.join(sorted(map(str, content)))}")
    for key in (*keys.values(), "label", "speaker"):
        _check_mapping(path, key, content[key])
    sentences = content.get("sentence")
    if sentences is not None:
        _check_mapping(path, "sentence", sentences)
    return _File(
        path,
        layout,
        content["label"],
        content["speaker"],
        None if sentences is None else {_text(video): value for video, value in sentences.items()},
        {m: content[key] for m, key in keys.items()},
        {split: _listed(path, key, content.get(key)) for split, key in zip(SPLITS, _VIDEOS, strict=True)},
    )


_VIDEOS = ("trainVid", "valVid", "testVid")


def _read_labels(path: Path, content: list[Any], wanted: Sequence[str], features: Mapping[str, str] | None) -> _File:
    """GCNet's label pickle, and where its features are."""
    names = ("videoIDs", "videoLabels", "videoSpeakers", "videoSentences")
    for key, value in zip(names, content[:4], strict=True):
        _check_mapping(path, key, value)
    videos = content[4:] if len(content) == 7 else [content[4], None, content[5]]
    below = path.parent / "features"
    folders = {}
    for m in wanted:
        name = (features or {}).get(m, _FOLDERS[m])
        folders[m] = next((f for f in (below / name, Path(name).expanduser()) if f.is_dir()), below / name)
        if not folders[m].is_dir():
            raise FileNotFoundError(f"dialogue: no folder {folders[m]} of {m} features. Expected:\n{LAYOUT}")
    return _File(
        path,
        "GCNet",
        content[1],
        content[2],
        {_text(video): value for video, value in content[3].items()},
        {},
        {split: _listed(path, key, v) for split, key, v in zip(SPLITS, _VIDEOS, videos, strict=True)},
        content[0],
        folders,
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, bytes, int)) and encodable(_text(value))


def _check_mapping(path: Path, key: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: {key!r}: expected a dict by video, got {type(value).__name__}")
    if wrong := [name for name in value if not _is_name(name)]:
        raise ValueError(f"{path}: {key!r}: expected videos as names, got {shown(wrong[0])}")


def _listed(path: Path, key: str, videos: Any) -> list[Any] | None:
    """The videos of a split in a fixed order: a set has none, so it is sorted."""
    if videos is None:
        return None
    if isinstance(videos, (set, frozenset)):
        videos = sorted(videos, key=_text)
    if not isinstance(videos, (list, tuple, np.ndarray)) or getattr(videos, "ndim", 1) == 0:
        raise ValueError(f"{path}: {key!r}: expected a list or set of videos, got {type(videos).__name__}")
    if wrong := [video for video in videos if not _is_name(video)]:
        raise ValueError(f"{path}: {key!r}: expected names of videos, got {shown(wrong[0])}")
    return list(videos)


def _split(file: _File, valid: float, session: int | None, seed: int) -> dict[str, list[Any]]:
    """The videos of each split; no video is in two of them."""
    seen: dict[Any, str] = {}
    for key, videos in zip(_VIDEOS, (file.videos[split] for split in SPLITS), strict=True):
        for video in videos or ():
            if video in seen:
                raise ValueError(f"{file.path}: the video {_text(video)} is in {seen[video]!r} and again in {key!r}")
            seen[video] = key
            if video not in file.labels:
                raise ValueError(f"{file.path}: the video {_text(video)} of {key!r} has no labels")
    parts: dict[str, list[Any]] = {split: list(file.videos[split] or ()) for split in SPLITS}
    if session is not None:
        known = [v for split in SPLITS for v in parts[split]]
        if wrong := [v for v in known if _text(v)[4:5] not in "12345" or not _text(v)[4:5]]:
            raise ValueError(
                f"session: {file.path} has videos whose fifth character is no session, such as {_text(wrong[0])}"
            )
        parts["test"] = [v for v in known if _text(v)[4] == str(session)]
        parts["train"], parts["valid"] = [v for v in known if _text(v)[4] != str(session)], []
    if session is not None or file.videos["valid"] is None:
        order = np.random.default_rng(seed).permutation(len(parts["train"]))
        held = set(order[: max(int(len(order) * valid), 1)].tolist())
        parts["valid"] = [v for i, v in enumerate(parts["train"]) if i in held]
        parts["train"] = [v for i, v in enumerate(parts["train"]) if i not in held]
    for split, videos in parts.items():
        if not videos:
            raise ValueError(f"{file.path}: expected at least one video for {split}, got none")
    return parts


# -- dialogues ------------------------------------------------------------------------------------------------------


@dataclass
class _Dialogue:
    """One video: per modality a vector or None for each utterance, and its labels and speakers."""

    name: str
    features: dict[str, list[np.ndarray | None]]
    labels: list[Any]
    speaker: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def _dialogue(file: _File, video: Any, wanted: Sequence[str], speakers: tuple[str, ...], nan: str) -> _Dialogue:
    name, path = _text(video), file.path
    labels = _rows(path, name, "label", file.labels[video])
    n = len(labels)
    if not n:
        raise ValueError(f"{path}: the video {name} has no utterances")
    if video not in file.speakers:
        raise ValueError(f"{path}: the video {name} has no speakers")
    said = _rows(path, name, "speaker", file.speakers[video])
    if len(said) != n:
        raise ValueError(f"{path}: {name}: expected {n} speakers, one an utterance, got {len(said)}")
    if file.utterances is not None:
        ids = [_text(u) for u in _rows(path, name, "videoIDs", file.utterances.get(video, ()))]
        if outside := [u for u in ids if u in ("", ".", "..") or "/" in u or "\\" in u or "\0" in u]:
            raise ValueError(f"{path}: {name}: expected utterance ids that name files of a folder, got {outside[0]!r}")
        if len(ids) != n:
            raise ValueError(f"{path}: {name}: expected {n} utterance ids, one a label, got {len(ids)}")
    else:
        ids = [f"{name}, utterance {i}" for i in range(n)]
    number = np.array([_speaker(path, u, s, speakers) for u, s in zip(ids, said, strict=True)], np.int64)
    features: dict[str, list[np.ndarray | None]] = {}
    for m in wanted:
        if file.folders is not None:
            rows = [_read_features(file.folders[m], u, _text(s)) for u, s in zip(ids, said, strict=True)]
        else:
            if video not in file.features[m]:
                raise ValueError(f"{path}: the video {name} has no {_KEYS[m]!r}")
            rows = _rows(path, name, _KEYS[m], file.features[m][video])
        if len(rows) != n:
            raise ValueError(f"{path}: {name}: expected {n} vectors of {_KEYS[m]!r}, one an utterance, got {len(rows)}")
        features[m] = [_vector(path, u, m, row, nan) for u, row in zip(ids, rows, strict=True)]
        widths = {len(row) for row in features[m] if row is not None}
        if len(widths) > 1:
            first = next(len(row) for row in features[m] if row is not None)
            i = next(i for i, row in enumerate(features[m]) if row is not None and len(row) != first)
            raise ValueError(
                f"{path}: {_KEYS[m]!r}: expected vectors of one width in a dialogue, got widths {sorted(widths)}; "
                f"{ids[i]} is the first that differs"
            )
    return _Dialogue(name, features, labels, number)


def _rows(path: Path, video: str, key: str, values: Any) -> list[Any]:
    """One entry an utterance."""
    if not isinstance(values, (list, tuple, np.ndarray)) or getattr(values, "ndim", 1) == 0:
        raise ValueError(f"{path}: {video}: {key!r}: expected a list over utterances, got {type(values).__name__}")
    return list(values)


def _speaker(path: Path, utterance: str, said: Any, speakers: tuple[str, ...]) -> int:
    """The number of a speaker: by name, or of a one-hot vector."""
    if isinstance(said, (list, tuple, np.ndarray)):  # MELD's
        with contextlib.suppress(TypeError):
            hot = plain_numbers(said)
            if hot.ndim == 1 and hot.sum() == 1 and np.isin(hot, (0, 1)).all():
                return int(hot.argmax())
    name = _text(said)
    if name in speakers:
        return speakers.index(name)
    if name == "":  # MOSI's and MOSEI's only one
        return 0
    raise ValueError(f"{path}: {utterance}: unknown speaker {shown(said)}; known are {', '.join(map(repr, speakers))}")


def _vector(path: Path, utterance: str, modality: str, values: Any, nan: str) -> np.ndarray | None:
    """float32 [D], or None for what is missing."""
    if values is None:
        return None
    try:
        x = plain_numbers(values)
    except TypeError as error:
        raise ValueError(f"{path}: {utterance}: {_KEYS[modality]!r}: expected a vector of numbers ({error})") from error
    if x.ndim == 2 and 1 in x.shape:
        x = x.reshape(-1)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"{path}: {utterance}: {_KEYS[modality]!r}: expected a vector [D], got shape {x.shape}")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if np.isnan(x).any() and nan == "drop":
        return None
    if not np.isfinite(x).all():
        raise ValueError(
            f"{path}: {utterance}: {_KEYS[modality]!r}: expected finite values, got {int((~np.isfinite(x)).sum())} NaN "
            f"or infinite ones" + ("; nan='drop' takes such vectors as missing" if np.isnan(x).any() else "")
        )
    return x


def _read_features(folder: Path, utterance: str, speaker: str) -> np.ndarray | None:
    """The mean over frames of an utterance's ``.npy`` file, or of the files in its folder; None where there are none.

    In a folder of faces, a file whose name holds an F shows the woman, any other the man: of the speakers "F" and "M",
    the own faces count alone.
    """
    if (file := folder / f"{utterance}.npy").is_file():
        files = [file]
    elif (place := folder / utterance).is_dir():
        files = sorted(place.glob("*.npy"))
        if speaker in ("F", "M"):
            files = [f for f in files if ("F" in f.name) == (speaker == "F")]
    else:
        raise ValueError(f"{folder}: no {utterance}.npy, nor a folder of that name")
    rows = [_load_npy(file) for file in files]
    rows = [x.reshape(1, -1) if x.ndim == 1 else x.reshape(-1, x.shape[-1]) for x in rows if x.size]
    if not rows:
        return None
    if len({x.shape[1] for x in rows}) > 1:
        raise ValueError(
            f"{folder}: {utterance}: expected frames of one width, got {sorted({x.shape[1] for x in rows})}"
        )
    return np.concatenate(rows).mean(0)


def _load_npy(path: Path) -> np.ndarray:
    x = read_npy(path)
    if x.dtype.kind not in "biuf" or not x.ndim:
        raise ValueError(f"{path}: expected an array of numbers, got {x.dtype} {x.shape}")
    return x


def _width(file: _File, modality: str, dialogues: Iterable[_Dialogue]) -> int:
    """The width of a modality; ValueError where two dialogues differ."""
    found: tuple[int, str] | None = None
    for d in dialogues:
        width = next((len(row) for row in d.features[modality] if row is not None), None)
        if width is None:
            continue
        if found is None:
            found = (width, d.name)
        elif width != found[0]:
            raise ValueError(
                f"{file.path}: {_KEYS[modality]!r}: expected vectors of one width, got {found[0]} in {found[1]} and "
                f"{width} in {d.name}"
            )
    if found is None:
        raise ValueError(
            f"{file.path}: {_KEYS[modality]!r} is missing in all utterances; choose others with modalities=..."
        )
    return found[0]


def _targets(
    file: _File, corpus: str | None, dialogues: Mapping[str, Sequence[_Dialogue]]
) -> tuple[tuple[str, ...] | None, dict[str, np.ndarray]]:
    """The classes' names (None for scores), and per split the labels of all its utterances, one after the other."""
    targets, whole = {}, True
    for split, some in dialogues.items():
        rows = []
        for d in some:
            try:
                x = plain_numbers(d.labels)
            except TypeError as error:
                raise ValueError(f"{file.path}: {d.name}: expected {len(d)} numbers as labels ({error})") from error
            x = x.reshape(-1) if x.size == len(d) else x
            if x.shape != (len(d),) or x.dtype.kind not in "iuf":
                raise ValueError(f"{file.path}: {d.name}: expected {len(d)} numbers as labels, got {x.dtype} {x.shape}")
            whole = whole and x.dtype.kind in "iu"
            rows.append(x.astype(np.float64))
        targets[split] = np.concatenate(rows)
    names = _CORPORA[corpus].classes if corpus is not None else None
    if corpus is None and whole:
        names = tuple(f"class {k}" for k in range(int(max(t.max() for t in targets.values())) + 1))
    for split, t in targets.items():
        if names is None:
            good = np.abs(t) <= _LIMIT + 1e-4 if corpus is not None else np.isfinite(t)
        else:
            good = (t == np.round(t)) & (t >= 0) & (t < len(names))
        if not good.all():
            i = int((~good).argmax())
            video = next(d for d in dialogues[split] if (i := i - len(d)) < 0)
            expected = f"classes below {len(names)}" if names is not None else f"scores in [{-_LIMIT:g}, {_LIMIT:g}]"
            raise ValueError(
                f"{file.path}: {video.name}, utterance {i + len(video)}: expected {expected}, got "
                f"{t[int((~good).argmax())]:g}"
            )
        targets[split] = t.astype(np.float32 if names is None else np.int64)
    return names, targets


def _dataset(dialogues: Sequence[_Dialogue], frames: Mapping[str, Frames], target: np.ndarray) -> MultimodalDataset:
    """One split, its utterances padded to [B, U]."""
    lengths = np.array([len(d) for d in dialogues])
    real = np.arange(lengths.max()) < lengths[:, None]

    def padded(x: np.ndarray) -> np.ndarray:
        whole = np.zeros((*real.shape, *x.shape[1:]), x.dtype)
        whole[real] = x
        return whole

    names = [d.name for d in dialogues]
    speaker = torch.from_numpy(padded(np.concatenate([d.speaker for d in dialogues])))
    return frames_dataset(
        {m: Frames(padded(f.x), real[..., None].copy(), padded(f.observed)) for m, f in frames.items()},
        padded(target),
        names,
        ids=[f"dialogue/{name}" for name in names],
        extras={"utterance": torch.from_numpy(real), "speaker": speaker},
    )
