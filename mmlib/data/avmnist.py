"""AudiovisionMNIST, the 1,500 pairs of a handwritten and a spoken digit of SMIL and MCE, rebuilt from its sources.

``root`` is a folder that holds ``mnist/`` and ``fsdd/`` (see `LAYOUT`). The sounds are the Free Spoken Digit Dataset's
speakers jackson, nicolas and theo: takes 0 to 14 are the test split (450 pairs), takes 15 to 49 the training split
(1,050, that is 105 a class). Image j of a class goes with sound j of the class, sounds sorted by speaker, then take.
The training images are a class's first 105, the test images its last 45, in an order drawn once and for all: MNIST's
own order is not random (the writers of the test file's beginning are easier), which SMIL's picture files, sorted by
name, do not show. Where the training file is not there, all come from the test file, without overlap.

A sound becomes a picture, as in the released code: every third sample at a nominal 8 kHz, 20 MFCCs a frame, padded
on the right to 20 frames. That is a coarse picture: most recordings fill two or three of the 20 frames, which
``extras["frames"]`` counts. Image and sound are both shifted and scaled by (x - .5) / .5, so that the padding is -1.

MFCCs are computed once and kept in a cache folder: ``MMLIB_CACHE``, else ``XDG_CACHE_HOME/mmlib``, else
``~/.cache/mmlib``; the file's name depends on the content of the recordings and on the settings.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..batch import DATASET, MultimodalDataset
from ..checks import PATH, Flag, Maybe, OneOf, Whole, check_all
from ..files import atomic_write
from ._readers import ROOT, SEED, cache_folder, fingerprint, need_root

__all__ = ["LAYOUT", "PER_CLASS_COUNTS", "SPEAKERS", "cache_folder", "load", "read_idx", "sound_for_first"]

SPEAKERS = ("jackson", "nicolas", "theo")
TAKES, TEST_TAKES = 50, 15  # a speaker's takes of a digit; the first 15 are the test split
PER_CLASS_COUNTS = (12, 21, 33, 42, 54, 63, 75, 84, 96, 105)  # SMIL's pairs with sound per class, for 10 % to 100 %
RATE = 8000  # samples a second
FRAMES = COEFFICIENTS = 20
LAYOUT = """\
  root/mnist/t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz
      MNIST's 10,000 test images (LeCun et al.; .gz or unpacked)
  root/mnist/train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz
      optional: its 60,000 training images
  root/fsdd/recordings/{digit}_{speaker}_{take}.wav
      digits 0-9, speakers jackson, nicolas and theo, takes 0-49, 8 kHz mono:
      https://github.com/Jakobovski/free-spoken-digit-dataset
"""
_PARTS = {"train": "train", "test": "t10k"}
_CACHE_VERSION = 1


OPTIONS = {
    "root": ROOT,
    "preset": OneOf("default", "smil"),
    "split_seed": SEED,
    "held_out": Whole(),
    "image_order": OneOf("shuffled", "file"),
    "test_images": OneOf("paired", "all"),
    "scaling": OneOf("release", "train"),
    "mark_padding": Flag(),
    "every": Whole(1),
    "hop_length": Whole(1),
    "workers": Maybe(Whole(1)),
    "cache": Flag(),
    "progress": Maybe(Flag()),
}


def load(
    root: Path | None,
    preset: str = "default",
    split_seed: int = 0,
    held_out: int = 15,
    image_order: str = "shuffled",
    test_images: str = "paired",
    scaling: str = "release",
    mark_padding: bool = False,
    every: int = 3,
    hop_length: int = 512,
    workers: int | None = None,
    cache: bool = True,
    progress: bool | None = None,
) -> dict[str, MultimodalDataset]:
    """The pairs as ``image`` [1, 28, 28] and ``audio`` [1, 20 frames, 20 coefficients], classes 0 to 9.

    preset : "default" holds ``held_out`` pairs a class out of training for validation, the same number of each speaker;
        "smil" trains on all 105, and the result has no "valid": train a fixed number of steps and take the last iterate
    split_seed : which pairs are held out
    held_out : a multiple of 3 from 3 to 102
    image_order : "shuffled", the same in every call, or "file": with the test file alone, test images are then of
        harder writers than training images, and a linear probe of the image falls from .88 to .75
    test_images : "paired", one for each test sound, or "all" that MNIST's test file has and training has not (8,950 of
        the test file alone): image j of a class then goes with test sound j mod 45 of the class, so that the samples
        that share a sound are a cluster
    scaling : "release": (x - .5) / .5 of pixels in [0, 1] and of raw MFCCs (values down to about -1,200);
        "train": zero mean and unit variance on train, one scale for the pixels and one for each MFCC over the frames
        that are not padding, which is zero
    mark_padding : let ``valid`` say which sound frames are padding, and store zeros there. By default all 20 are valid:
        the released nets see a 20 x 20 picture
    every, hop_length : keep each ``every``-th sample; samples between frames. Smaller values fill more of the 20 frames
    workers : threads that read the recordings, default one a core
    cache : keep the MFCCs in the cache folder
    progress : a bar on stderr; None means if that is a terminal

    ``extras`` has, per sample, ``speaker`` (0 jackson, 1 nicolas, 2 theo), ``take`` and ``frames``. Raises
    FileNotFoundError and ValueError that name the file and the expected layout.
    """
    check_all(OPTIONS, locals())
    per_speaker = TAKES - TEST_TAKES
    if preset == "default" and (held_out % 3 or not 3 <= held_out < 3 * per_speaker):
        raise ValueError(f"held_out: expected a multiple of 3 from 3 to {3 * per_speaker - 3}, got {held_out}")
    root = need_root(root, "avmnist", LAYOUT)
    files = _recordings(root / "fsdd" / "recordings")
    images, origin = _images(root / "mnist", image_order, test_images)
    mfcc, counts = _sounds(files, every, hop_length, workers, cache, progress)

    # [class, speaker, take] -> the recordings of the two parts, each sorted by class, then speaker, then take
    shape = (10, len(SPEAKERS), TAKES)
    digit, speaker, take = (g.reshape(-1) for g in np.meshgrid(*(np.arange(k) for k in shape), indexing="ij"))
    part = {"train": np.flatnonzero(take >= TEST_TAKES), "test": np.flatnonzero(take < TEST_TAKES)}
    pairs, again = {}, {}  # part -> of each of its images its recording, and how often that has been taken before
    for key, recordings in part.items():
        turns = [np.arange(len(x)) for x in images[key]]
        pairs[key] = np.concatenate([r[j % len(r)] for r, j in zip(recordings.reshape(10, -1), turns, strict=True)])
        again[key] = np.concatenate([j // (len(recordings) // 10) for j in turns])
    pictures = {key: np.concatenate(x) for key, x in images.items()}
    rows = {"train": ("train", np.arange(len(pairs["train"]))), "test": ("test", np.arange(len(pairs["test"])))}
    if preset == "default":
        generator = np.random.default_rng(split_seed)
        order = generator.random((*shape[:2], per_speaker)).argsort(-1) < held_out // 3
        mask = order.reshape(-1)
        held = {"train": ("train", np.flatnonzero(~mask)), "valid": ("train", np.flatnonzero(mask))}
        rows = {**held, "test": rows["test"]}

    audio = mfcc[:, None]
    real = (np.arange(FRAMES) < counts[:, None])[:, None, :, None]
    if scaling == "release":
        pictures, audio = {key: (x - 0.5) / 0.5 for key, x in pictures.items()}, (audio - 0.5) / 0.5
    else:
        own = pictures["train"][rows["train"][1]]
        mean, scale = own.mean(dtype=np.float64), own.std(dtype=np.float64)
        pictures = {key: (x - mean) / scale for key, x in pictures.items()}
        some = pairs["train"][rows["train"][1]]
        frames = audio[some][np.broadcast_to(real[some], audio[some].shape)].reshape(-1, COEFFICIENTS)
        audio = np.where(real, (audio - frames.mean(0, dtype=np.float64)) / frames.std(0, dtype=np.float64), 0)
    audio = audio.astype(np.float32)

    info = {
        "name": "avmnist",
        "task": "classification",
        "outputs": 10,
        "classes": [str(c) for c in range(10)],
        "source": "MNIST (LeCun et al. 1998) and the Free Spoken Digit Dataset (Jackson et al.), paired as SMIL does",
        "licence": "CC BY-SA 3.0 (MNIST), CC BY-SA 4.0 (FSDD)",
        "images": origin,
        "image_order": image_order,
        "preset": preset,
        "units": {
            "image": "ink in [0, 1]" + (", (x - .5) / .5" if scaling == "release" else ", standardised on train"),
            "audio": "MFCC" + (", (x - .5) / .5" if scaling == "release" else ", standardised on train"),
        },
        "audio_settings": {"every": every, "hop_length": hop_length, "rate": RATE, "mark_padding": mark_padding},
    }
    splits = {}
    for split, (key, places) in rows.items():
        index, times = pairs[key][places], again[key][places]
        dataset = MultimodalDataset.from_arrays(
            {"image": pictures[key][places].astype(np.float32), "audio": audio[index]},
            digit[index],
            lengths={"audio": counts[index]} if mark_padding else None,
            ids=[
                f"avmnist/{digit[i]}_{SPEAKERS[speaker[i]]}_{take[i]}" + (f"/{k}" if k else "")
                for i, k in zip(index, times, strict=True)
            ],
            classes=10,
            info={**info, "split": split, "split_seed": split_seed if preset == "default" else None},
        )
        extras = {"speaker": speaker[index], "take": take[index], "frames": counts[index]}
        dataset.data = dataset.data.replace(extras={key: torch.as_tensor(x) for key, x in extras.items()})
        dataset.info["fingerprint"] = fingerprint(dataset)
        splits[split] = dataset
    return splits


def sound_for_first(train: MultimodalDataset, per_class: int) -> Tensor:
    """SMIL's training sets with little sound: ``per_class`` pairs a class keep theirs, bool present [n, M].

    They are the first ``per_class / 3`` takes of each speaker and class, for ``per_class`` in `PER_CLASS_COUNTS` the
    sounds that SMIL uses; larger counts contain the smaller ones. All other pairs are image only. Use it as
    ``train.drop(present=sound_for_first(train, 21))``. Raises ValueError where a class has fewer pairs, or for a count
    that the three speakers cannot share equally.
    """
    data = DATASET("train", train).data
    if "audio" not in data.features or not {"speaker", "take"} <= set(data.extras) or data.target is None:
        raise ValueError("train: expected a split of avmnist with audio, speaker and take")
    if Whole(0)("per_class", per_class) % 3:
        raise ValueError(f"per_class: expected a multiple of 3 from 0, got {per_class}")
    group = data.target * len(SPEAKERS) + data.extras["speaker"]
    key = group * TAKES + data.extras["take"]
    order = key.argsort()
    sizes = torch.bincount(group, minlength=10 * len(SPEAKERS))
    if per_class // 3 > int(sizes[sizes > 0].min()):
        raise ValueError(
            f"per_class: expected at most {3 * int(sizes[sizes > 0].min())}, what every class and speaker of this "
            f"split can give, got {per_class}"
        )
    first = torch.cat([torch.zeros_like(sizes[:1]), sizes.cumsum(0)[:-1]])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[group[order]]
    present = torch.ones_like(data.present)
    present[:, data.index("audio")] = rank < per_class // 3
    return present


# -- MNIST ----------------------------------------------------------------------------------------------------------


_GZIP_RATIO = 1100  # no more bytes than that come out of a byte: deflate's limit is 1,032


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an IDX file, gzipped where its name ends in .gz; ValueError for a damaged one.

    No more is unpacked than the header declares, and no more declared than gzip could hold in the file.
    """
    path = Path(PATH("path", path))
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                raise ValueError(
                    f"{path}: expected an IDX file of bytes, which begins with 00 00 08, got "
                    f"{head.hex(' ') or 'no data'}"
                )
            rank = head[3]
            sizes = file.read(4 * rank)
            if len(sizes) < 4 * rank:
                raise ValueError(f"{path}: the IDX header is cut short")
            shape = struct.unpack(f">{rank}I", sizes)
            count = math.prod(shape)
            if rank > 8 or count > path.stat().st_size * (_GZIP_RATIO if packed else 1):
                raise ValueError(
                    f"{path}: the header says {count} values {shape}, more than {path.stat().st_size} bytes can hold"
                )
            data = file.read(count)
            if len(data) < count or file.read(1):  # the read at the end is what compares gzip's checksum
                raise ValueError(
                    f"{path}: the header says {count} values {shape}, the file holds "
                    f"{len(data) if len(data) < count else 'more'}"
                )
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: damaged {'gzip ' if packed else ''}file ({error}); copy or download it again"
        ) from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def _mnist_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images [n, 28, 28] and labels [n] of one part, or None where neither file is there."""
    paths = []
    for what in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        found = [p for p in (folder / f"{what}.gz", folder / what) if p.exists()]
        paths.append(found[0] if found else None)
    if paths == [None, None]:
        return None
    if None in paths:
        have = next(p for p in paths if p)
        raise FileNotFoundError(f"avmnist: {have} is there, but not its images or labels. Expected:\n{LAYOUT}")
    images, labels = (read_idx(p) for p in paths if p)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{paths[0]}: expected images [n, 28, 28], got shape {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{paths[1]}: expected {len(images)} labels, one an image, got shape {labels.shape}")
    if labels.size and labels.max() > 9:
        raise ValueError(f"{paths[1]}: expected labels 0 to 9, got {labels.max()}")
    return images, labels


def _images(folder: Path, order: str, tested: str) -> tuple[dict[str, list[np.ndarray]], str]:
    """Pixels in [0, 1] of "train" and "test": for each class its images [n, 1, 28, 28]; and what they are.

    105 a class for training; for test 45, or all others of the file.
    """
    parts = {key: _mnist_part(folder, name) for key, name in _PARTS.items()}
    if parts["train"] is None and parts["test"] is None:
        raise FileNotFoundError(f"avmnist: no MNIST files in {folder}. Expected:\n{LAYOUT}")
    first, last = (TAKES - TEST_TAKES) * len(SPEAKERS), TEST_TAKES * len(SPEAKERS)
    for key, other in (("train", "test"), ("test", "train")):
        parts[key] = parts[key] or parts[other]
    same = parts["train"] is parts["test"]
    result: dict[str, list[np.ndarray]] = {}
    for key, count in (("train", first), ("test", last)):
        images, labels = parts[key]  # type: ignore[misc]
        need = first + last if same else count
        chosen = []
        for c in range(10):
            places = np.flatnonzero(labels == c)
            if len(places) < need:
                raise ValueError(
                    f"{folder}: expected at least {need} images of class {c} for {key}, got {len(places)}. "
                    f"Expected:\n{LAYOUT}"
                )
            if order == "shuffled":
                places = np.random.default_rng(c).permutation(places)
            if key == "train":
                places = places[:count]
            else:
                places = places[-count:] if tested == "paired" else places[first if same else 0 :]
            chosen.append(places)
        result[key] = [images[places][:, None].astype(np.float32) / np.float32(255) for places in chosen]
    if not same:
        origin = "MNIST's training images for train and valid, its test images for test"
    else:
        only = (
            "test" if not any((folder / f"train-images-idx3-ubyte{s}").is_file() for s in (".gz", "")) else "training"
        )
        origin = f"MNIST's {only} images for all splits ({first} a class for training, {last} others for test)"
    return result, origin


# -- the Free Spoken Digit Dataset -------------------------------------------------------------------------------------


def _recordings(folder: Path) -> list[Path]:
    """The 1,500 files, sorted by digit, speaker and take."""
    files = [folder / f"{d}_{s}_{t}.wav" for d in range(10) for s in SPEAKERS for t in range(TAKES)]
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [f.name for f in files if f.name not in there]
    if missing:
        raise FileNotFoundError(
            f"avmnist: {len(missing)} of {len(files)} recordings are not in {folder}, the first "
            f"{', '.join(missing[:3])}. Expected:\n{LAYOUT}"
        )
    return files


def _check_wav(path: Path, content: bytes) -> None:
    """ValueError unless the chunks of a RIFF file account for all its bytes: a sound that is cut short is shorter.

    Readers of sound files take what there is without a word.
    """
    problem = "it is no RIFF WAVE file"
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        size, at, found = int.from_bytes(content[4:8], "little") + 8, 12, []
        problem = "" if size == len(content) else f"its header says {size} bytes, the file holds {len(content)}"
        while not problem and at < size:
            name, length = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
            if at + 8 + length > size:
                problem = f"its chunk {name!r} has {length} bytes, of which the file holds {max(size - at - 8, 0)}"
            elif name == b"fmt " and length >= 16:
                kind, channels, rate, speed, block, bits = struct.unpack("<HHIIHH", content[at + 8 : at + 24])
                if kind not in (1, 3, 0xFFFE) or block * 8 != channels * bits or speed != rate * block:
                    problem = f"its format contradicts itself (code {kind}, {channels} x {bits} bits in {block} bytes)"
            found.append(name)
            at += 8 + length + length % 2
        if not problem and (found.count(b"fmt ") != 1 or found.count(b"data") != 1):
            problem = f"it has the chunks {found[:5]}, not one 'fmt ' and one 'data'"
    if problem:
        raise ValueError(f"{path}: not a readable sound file ({problem}); copy or download it again")


def _mfcc(path: Path, every: int, hop_length: int) -> tuple[np.ndarray, int]:
    """MFCCs [20 frames, 20 coefficients] of one recording, zero on the right, and how many frames are real."""
    import librosa
    import soundfile

    try:
        wave, rate = soundfile.read(path, dtype="float32")
    except RuntimeError as error:
        raise ValueError(f"{path}: not a readable sound file ({error}); copy or download it again") from error
    if rate != RATE or wave.ndim != 1:
        channels = 1 if wave.ndim == 1 else wave.shape[1]
        raise ValueError(f"{path}: expected one channel at {RATE} Hz, got {channels} at {rate} Hz")
    if not len(wave) or not np.isfinite(wave).all() or np.abs(wave).max() > 1e6:
        raise ValueError(f"{path}: expected samples that are finite numbers up to 1e6, got {len(wave)} samples")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_fft=")  # clips shorter than a window are padded
        rows = librosa.feature.mfcc(y=wave[::every], sr=RATE, n_mfcc=COEFFICIENTS, hop_length=hop_length).T
    count = min(len(rows), FRAMES)
    picture = np.zeros((FRAMES, COEFFICIENTS), np.float32)
    picture[:count] = rows[:count]
    return picture, count


def _sounds(
    files: list[Path], every: int, hop_length: int, workers: int | None, cache: bool, progress: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """MFCCs [1500, 20, 20] float32 and real frames [1500] int64, from the cache where it has them."""
    digest = hashlib.sha256(
        f"{_CACHE_VERSION}|{every}|{hop_length}|{FRAMES}|{COEFFICIENTS}|{version('librosa')}".encode()
    )
    for path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: not a readable sound file ({error}); copy or download it again") from error
        _check_wav(path, content)
        digest.update(f"|{path.name}|{len(content)}|".encode() + content)
    store = cache_folder() / f"avmnist-mfcc-{digest.hexdigest()[:24]}.npz"
    if cache and (kept := _read_cache(store, len(files))) is not None:
        return kept
    from joblib import Parallel, cpu_count, delayed
    from tqdm import tqdm

    # Threads: reading and the FFT release the interpreter's lock, and librosa is imported once
    jobs = Parallel(n_jobs=workers or cpu_count(), prefer="threads", return_as="generator")
    results = jobs(delayed(_mfcc)(path, every, hop_length) for path in files)
    disable = None if progress is None else not progress
    rows = list(tqdm(results, total=len(files), desc="avmnist: MFCCs", unit="file", disable=disable))
    mfcc, counts = np.stack([x for x, _ in rows]), np.array([k for _, k in rows], dtype=np.int64)
    if cache:
        _write_cache(store, mfcc, counts)
    return mfcc, counts


def _checksum(mfcc: np.ndarray, counts: np.ndarray) -> str:
    return hashlib.sha256(mfcc.tobytes() + counts.tobytes()).hexdigest()


def _read_cache(store: Path, n: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What the file holds, or None where it is not there or damaged: then it is made again."""
    if not store.is_file():
        return None
    try:
        with np.load(store, allow_pickle=False) as kept:
            mfcc, counts, checksum = kept["mfcc"], kept["frames"], str(kept["checksum"])
        if mfcc.shape == (n, FRAMES, COEFFICIENTS) and counts.shape == (n,) and checksum == _checksum(mfcc, counts):
            return mfcc, counts
        problem = "its checksum does not match"
    except Exception as error:  # a damaged zip file raises almost anything
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(f"the cache file {store} is damaged ({problem}); computing it again", stacklevel=4)
    return None


def _write_cache(store: Path, mfcc: np.ndarray, counts: np.ndarray) -> None:
    """A full disk, or a folder where nothing can be written, costs a warning."""
    buffer = io.BytesIO()
    np.savez(buffer, mfcc=mfcc, frames=counts, checksum=np.array(_checksum(mfcc, counts)))
    try:
        atomic_write(store, buffer.getbuffer())
    except OSError as error:
        warnings.warn(
            f"could not write the cache file {store} ({error}); the data are loaded all the same", stacklevel=4
        )
