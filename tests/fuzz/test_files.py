"""Files that are wrong in a way that matters, for every loader: each ends in an error that names the file.

A case changes some files below a folder, or puts folders in their place, and calls a loader or reader. It is *fine* if
a ValueError, TypeError or OSError names the file or its folder, *cryptic* with another error, *silent* without one.
Pickles that could end the process are read in a process of their own first (tests/data/test_pickles.py).
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import pickle
import resource
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from data.test_avmnist import write_mnist, write_wav
from data.test_dialogue import as_tuple, make, write_gcnet
from data.test_iemocap import FILES, WIDTHS, split_of, write, write_targets
from data.test_mmsa import made_mult, small
from data.test_mmsa import store as store_pickle
from data.test_text import WORDS
from fuzz.pickles import forged

from mmlib import data
from mmlib.data import avmnist, mmsa, text
from mmlib.data.mfeat import VIEWS

FOLDER = object()  # a folder in the file's place


class Case(NamedTuple):
    """What is changed (path to new content, FOLDER, or a function that changes the file itself), and what is called."""

    what: str
    changes: dict[Path, Any]
    call: Callable[[], Any]


@contextlib.contextmanager
def changed(changes: dict[Path, Any]) -> Iterator[None]:
    kept = {path: path.read_bytes() if path.is_file() else None for path in changes}
    try:
        for path, content in changes.items():
            if callable(content):
                content(path)
            elif content is FOLDER or content is None:
                path.unlink(missing_ok=True)
                if content is FOLDER:
                    path.mkdir()
            else:
                path.write_bytes(content)
        yield
    finally:
        for path, content in kept.items():
            if path.is_dir():
                shutil.rmtree(path)
            if content is not None:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)


def _named(path: Path, text: str) -> bool:
    """Whether an error names the file, its folder, or the file and the root that it is below."""
    return str(path.parent) in text or (path.name in text and str(path.parents[2]) in text)


def judge(cases: list[Case], at_least: int) -> None:
    """Run all; every one has to be fine, and what they damage to be whole before."""
    for call in {case.call for case in cases if all(path.exists() for path in case.changes)}:
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    silent, cryptic = [], []
    for case in cases:
        with changed(case.changes), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                case.call()
                silent.append(case.what)
            except (ValueError, TypeError, OSError) as error:
                if not any(_named(path, str(error)) for path in case.changes):
                    cryptic.append(f"{case.what}: {type(error).__name__}: {str(error)[:200]}")
            except BaseException as error:  # whatever came from inside
                cryptic.append(f"{case.what}: {type(error).__name__}: {str(error)[:200]}")
    counts = f"{len(cases)} cases, {len(silent)} silent, {len(cryptic)} cryptic"
    print(counts)
    assert not silent + cryptic, "\n".join([counts, "silent:", *silent, "cryptic:", *cryptic])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < 700, f"the process grew by {grown} MiB"
    assert len(cases) >= at_least
    assert len({case.what for case in cases}) == len(cases)


def cuts(content: bytes, *, whole: int = 0) -> dict[str, bytes]:
    """The file cut short at its beginning, in its middle and by its last bytes, ``whole`` of which are spare."""
    n = len(content) - whole
    places = {0, 1, 2, 4, 9, n // 10, n // 4, n // 2, 3 * n // 4, 9 * n // 10, 99 * n // 100, n - 2, n - 1}
    return {f"cut at {k}": content[:k] for k in sorted(places) if 0 <= k < n}


def others(content: bytes) -> dict[str, Any]:
    """What may lie there in place of the file."""
    return {
        "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        "zeros": bytes(max(len(content), 100)),
        "noise": np.random.default_rng(0).bytes(max(len(content), 100)),
        "UTF-16": "fünf,sechs\n1,2\n".encode("utf-16"),
        "a pickle of None": pickle.dumps(None),
        "a large file's pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
        "packed once more": gzip.compress(content, 1),
        "a folder": FOLDER,
        "another's end": b"\n" + content,
    }


def files(
    name: str, path: Path, call: Callable[[], Any], *, whole: int = 0, more: dict[str, Any] | None = None
) -> list[Case]:
    """The cases of one file's bytes."""
    content = path.read_bytes()
    changes = {**cuts(content, whole=whole), **others(content), **(more or {})}
    return [Case(f"{name}: {path.name}: {what}", {path: change}, call) for what, change in changes.items()]


# -- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_forged_pickles(tmp_path):
    path = tmp_path / "forged.pkl"
    cases = [Case(name, {path: content}, lambda: data.safe_pickle_load(path)) for name, content in forged().items()]
    at_the_top = [c for c in cases if c.what.startswith(("a ", "an ", "objects", "bytes", "dtype"))]
    for name in ("mosi", "dialogue"):
        cases += [Case(f"{name}: {c.what}", c.changes, lambda n=name: data.load(n, path)) for c in at_the_top]
    judge(cases, 200)


WRONG: dict[str, Callable[[Any], Any]] = {
    "None": lambda x: None,
    "a number": lambda x: 3.5,
    "a text": lambda x: "abc",
    "texts": lambda x: ["abc"] * len(x),
    "a dict": lambda x: {i: row for i, row in enumerate(x)},
    "one less": lambda x: x[:-1],
    "one more": lambda x: [*x, *x[:1]] if isinstance(x, list) else np.concatenate([x, x[:1]]),
    "none": lambda x: x[:0],
    "two rows in one": lambda x: np.asarray(x)[None],
    "complex": lambda x: (
        np.asarray(x).astype(complex) if np.asarray(x).dtype.kind in "biuf" else np.zeros(len(x), complex)
    ),
    "unequal rows": lambda x: [[1.0], *([[1.0, 2.0]] * (len(x) - 1))],
    "a set": lambda x: {1, 2},
}


def at(split: str, key: str, change: Callable[[Any], Any]) -> Callable[[dict], None]:
    def apply(content: dict) -> None:
        content[split][key] = change(content[split][key])

    return apply


def put(split: str, key: str, place: Any, value: Any) -> Callable[[dict], None]:
    def change(x: Any) -> Any:
        x = list(x) if isinstance(x, list) else np.array(x)
        x[place] = value
        return x

    return at(split, key, change)


def edited(
    name: str, path: Path, content: Any, edits: dict[str, Callable[[Any], Any]], call: Callable[[], Any]
) -> list[Case]:
    """One case an edit of a pickle's content."""
    cases = []
    for what, edit in edits.items():
        new = copy.deepcopy(content)
        result = edit(new)
        cases.append(Case(f"{name}: {what}", {path: pickle.dumps(new if result is None else result)}, call))
    return cases


@pytest.mark.slow
def test_mmsa_pickles(tmp_path):
    content, _ = small(extra=True)
    path = store_pickle(tmp_path, "MOSI/Processed/unaligned_50.pkl", content)
    load = lambda: data.load("mosi", path, unimodal=True)
    cases = files("mosi", path, load, more={"twice": path.read_bytes() * 2})
    edits: dict[str, Callable[[Any], Any]] = {}
    keys = ("text", "text_bert", "audio", "vision", "audio_lengths", "vision_lengths", "regression_labels", "id")
    skipped = {("id", "texts"), ("id", "two rows in one"), ("id", "complex"), ("id", "unequal rows")}
    skipped |= {("audio_lengths", "one more"), ("vision_lengths", "one more")}  # too long a list is cut, as documented
    for split in mmsa.SPLITS:
        edits[f"{split}[id]: half a character"] = at(split, "id", lambda x: ["\udb31", *x[1:]])
        edits[f"{split}[id]: lists of nothing"] = at(split, "id", lambda x: [[] for _ in x])
        edits[f"without {split}"] = lambda c, s=split: c.pop(s) and None
        edits[f"{split} is a list"] = lambda c, s=split: c.update({s: [1, 2]})
        edits[f"{split} is empty"] = lambda c, s=split: c.update({s: {}})
        for key in keys:
            for what, change in WRONG.items():
                if (key, what) not in skipped:
                    edits[f"{split}[{key}]: {what}"] = at(split, key, change)
        for key in ("text", "audio", "vision", "text_bert", "regression_labels"):
            if key not in ("text_bert",):
                edits[f"{split}[{key}]: removed"] = lambda c, s=split, k=key: c[s].pop(k) is None
            for value in (np.nan, np.inf):
                edits[f"{split}[{key}]: {value}"] = put(split, key, 0, value)
        edits[f"{split}[regression_labels]: off the scale"] = put(split, "regression_labels", 1, 3.5)
        edits[f"{split}[regression_labels_A]: off the scale"] = put(split, "regression_labels_A", 1, -30)
        edits[f"{split}[text_bert]: negative ids"] = put(split, "text_bert", (0, 0, 0), -1)
        edits[f"{split}[text_bert]: huge ids"] = put(split, "text_bert", (0, 0, 0), 1e20)
        edits[f"{split}[text_bert]: ids between"] = put(split, "text_bert", (0, 0, 0), 1.5)
        edits[f"{split}[text_bert]: a mask of 2"] = put(split, "text_bert", (0, 1, 0), 2)
        for value in (-1, 10**9, 2.5, np.nan):
            edits[f"{split}[audio_lengths]: {value}"] = put(split, "audio_lengths", 0, value)
        for key in ("audio", "vision"):
            edits[f"{split}[{key}]: other widths"] = at(split, key, lambda x: x[..., :-1])
            edits[f"{split}[{key}]: no frames"] = at(split, key, lambda x: x[:, :0])
        edits[f"{split}: the ids of another split"] = lambda c, s=split: c[s].update(
            id=np.resize(c["test" if s == "train" else "train"]["id"], len(c[s]["id"]))
        )
    cases += edited("mosi", path, content, edits, load)
    mult, _ = made_mult(False, {"language": (8, 6), "audio": (12, 3), "vision": (9, 4)})
    other = store_pickle(tmp_path, "mult.pkl", mult)
    edits = {}
    for split in mmsa.SPLITS:
        for key in ("text", "audio", "vision", "labels"):
            edits[f"{split}[{key}]: removed"] = lambda c, s=split, k=key: c[s].pop(k) is None
            for what in ("None", "texts", "one less", "none", "complex", "unequal rows"):
                edits[f"{split}[{key}]: {what}"] = at(split, key, WRONG[what])
    cases += edited("mult", other, mult, edits, lambda: data.load("mosi", other))
    texts = {f"raw_text: {what}": at("valid", "raw_text", WRONG[what]) for what in ("None", "one less", "a dict")}
    cases += edited("transcripts", path, content, texts, lambda: mmsa.transcripts("mosi", path))
    judge(cases, 350)


@pytest.mark.slow
def test_dialogue_pickles(tmp_path):
    load = lambda path: lambda: data.load("dialogue", path)
    balm = make(lengths=(3, 2, 4, 2, 3, 2))
    videos = list(balm["label"])
    path = store_pickle(tmp_path, "iemocap.pkl", balm)
    cases = files("BALM", path, load(path))
    edits: dict[str, Callable[[Any], Any]] = {}
    keys = ("text", "audio", "visual", "label", "speaker")
    for key in keys:
        edits[f"{key}: removed"] = lambda c, k=key: c.pop(k) and None
        for what, value in (("None", None), ("a list", [1]), ("a text", "abc"), ("empty", {}), ("numbers", {1: 2})):
            edits[f"{key}: {what}"] = lambda c, k=key, v=value: c.update({k: v})
        for video in (videos[0], videos[-1]):
            edits[f"{key}[{video}]: removed"] = lambda c, k=key, v=video: c[k].pop(v) and None
            for what in ("None", "a number", "a text", "a dict", "one less", "one more", "none", "a set"):
                edits[f"{key}[{video}]: {what}"] = at(key, video, WRONG[what])
    for key in ("text", "audio", "visual"):
        for what, value in {
            "a text": "abc", "texts": ["a", "b"], "nan": np.full(5, np.nan), "inf": np.full(5, np.inf), "a dict": {},
            "another width": np.ones(3), "a matrix": np.ones((3, 4)), "no value": np.ones(0),
            "complex": np.ones(5, complex), "an overflow": np.full(5, 1e300), "unequal": [[1], [1, 2]],
        }.items():  # fmt: skip
            edits[f"{key}, one utterance: {what}"] = lambda c, k=key, v=value: c[k][videos[0]].__setitem__(0, v)
    for what, value in (
        ("-1", -1),
        ("6", 6),
        ("1.5", 1.5),
        ("nan", np.nan),
        ("text", "sad"),
        ("None", None),
        ("list", [1, 2]),
    ):
        edits[f"label, one utterance: {what}"] = lambda c, v=value: c["label"][videos[0]].__setitem__(0, v)
    for what, value in (("unknown", "X"), ("None", None), ("number", 3), ("two", [1, 1]), ("nested", [[1]])):
        edits[f"speaker, one utterance: {what}"] = lambda c, v=value: c["speaker"][videos[0]].__setitem__(0, v)
    for key in ("trainVid", "testVid"):
        edits[f"{key}: removed"] = lambda c, k=key: c.pop(k) and None
        for what, value in (
            ("None", None), ("a text", "abc"), ("a number", 3), ("empty", []), ("unknown", ["x"]), ("lists", [["x"]]),
            ("half a character", ["\udb31"]), ("arrays", np.ones((2, 2))),
            ("a dict", {}), ("twice", [videos[0], videos[0]]), ("all", videos),
        ):  # fmt: skip
            edits[f"{key}: {what}"] = lambda c, k=key, v=value: c.update({k: v})
    cases += edited("BALM", path, balm, edits, load(path))
    scores = make(lengths=(3, 2, 4, 2, 3, 2, 2, 3), scores=True)
    first = next(iter(scores["label"]))
    other = store_pickle(tmp_path, "mosi_conversation.pkl", scores)
    edits = {
        f"label: {value}": (lambda c, v=value: c["label"][first].__setitem__(0, v))
        for value in (3.5, -30, np.nan, np.inf)
    }
    edits["valVid: unknown"] = lambda c: c.update(valVid=["x"])
    edits["valVid: of train"] = lambda c: c.update(valVid=c["trainVid"][:1])
    cases += edited("MOSI", other, scores, edits, load(other))
    nine = store_pickle(tmp_path, "IEMOCAP_features.pkl", as_tuple(balm))
    edits = {f"eight, without {i}": (lambda c, i=i: (*c[:i], *c[i + 1 :])) for i in range(9)}
    edits |= {f"place {i}: {what}": (lambda c, i=i, v=value: (*c[:i], v, *c[i + 1 :]))
              for i in (1, 2, 3, 4, 5, 7, 8) for what, value in (("None", None), ("a dict", {}), ("a list", []))
              }  # fmt: skip
    cases += edited("MMGCN", nine, as_tuple(balm), edits, load(nine))
    judge(cases, 240)


def npy(x: np.ndarray, *, header: Callable[[bytes], bytes] = lambda h: h, body: bytes | None = None) -> bytes:
    """A ``.npy`` file whose header was changed without changing its length."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, x, allow_pickle=True)
    whole = buffer.getvalue()
    start = 10 + int.from_bytes(whole[8:10], "little")
    text = header(whole[10:start])
    return (
        whole[:10] + text.rstrip().ljust(start - 11)[: start - 11] + b"\n" + (whole[start:] if body is None else body)
    )


def arrays(name: str, path: Path, call: Callable[[], Any], columns: bool = False) -> list[Case]:
    """The cases of one ``.npy`` file."""
    x = np.load(path)
    shape = str(x.shape).encode()
    forged_shape = lambda new: npy(x, header=lambda h: h.replace(shape, new))
    descr = x.dtype.str.encode()
    more = {
        "a shape of 2**62": forged_shape(b"(%d,)" % (1 << 62)),
        "a shape of 2**93": forged_shape(b"(2147483648, 2147483648, 2147483648)"),
        "a negative shape": forged_shape(b"(-%d, %s" % (x.shape[0], shape.partition(b", ")[2] or b")")),
        "a shape of text": forged_shape(b"('a',)"),
        "no shape": npy(x, header=lambda h: h.replace(b"'shape'", b"'shapo'")),
        "another width": npy(x, header=lambda h: h.replace(descr, descr[:-1] + (b"2" if descr[-1:] != b"2" else b"4"))),
        "the dtype object": npy(x, header=lambda h: h.replace(descr, b"|O")),
        "a dtype that is none": npy(x, header=lambda h: h.replace(descr, b"<q9")),
        "a structured dtype": npy(x, header=lambda h: h.replace(b"'" + descr + b"'", b"[('a', '|O')]")),
        "code in the header": npy(x, header=lambda h: b"__import__('os').getcwd()"),
        "brackets": npy(x, header=lambda h: b"(" * (len(h) - 1)),
        "no magic": b"\x93NUMPX" + npy(x)[6:],
        "version 9": npy(x)[:6] + b"\x09\x00" + npy(x)[8:],
        "a header of 65,535": npy(x)[:8] + b"\xff\xff" + npy(x)[10:],
        "objects": npy(np.array([{"a": 1}, None], object)),
        "one row less": npy(x[:-1]),
        "one row more": npy(np.concatenate([x, x[:1]])),
        "no rows": npy(x[:0]),
        "no axes": npy(np.array(x.flat[0])),
        "complex": npy(np.ones(x.shape, complex)),
        "dates": npy(np.zeros(x.shape, "M8[s]")),
        "more behind it": path.read_bytes() + b"\0" * 8,
    }
    if columns:
        more |= {
            "nan": npy(np.full_like(x, np.nan)),
            "inf": npy(np.full_like(x, np.inf)),
            "huge": npy(np.full_like(x, 3e38)),
        }
    return files(name, path, call, more=more)


@pytest.fixture(scope="module")
def gcnet(tmp_path_factory):
    root = tmp_path_factory.mktemp("gcnet")
    return write_gcnet(root, make(lengths=(3, 2, 4, 2, 3, 2)))


def test_gcnets_folders(gcnet):
    load = lambda: data.load("dialogue", gcnet)
    cases = files("GCNet", gcnet, load)
    sound = sorted((gcnet.parent / "features" / "wav2vec-large-c-UTT").glob("*.npy"))[0]
    skipped = ("one row", "no rows")  # frames are averaged, and an utterance may have none
    cases += [c for c in arrays("GCNet", sound, load) if not any(s in c.what for s in skipped)]
    content = pickle.loads(gcnet.read_bytes())
    first = next(iter(content[0]))
    name = content[0][first][0]
    edits: dict[str, Callable[[Any], Any]] = {
        f"an utterance {what!r}": (lambda c, v=value: c[0][first].__setitem__(0, v))
        for what, value in (
            ("../x", "../x"),
            ("/etc/x", "/etc/x"),
            ("..", ".."),
            ("", ""),
            ("a/b", f"a/{name}"),
            ("0", "\0"),
        )
    }
    for i in range(4):
        for what, value in (("None", None), ("a list", []), ("empty", {})):
            if i != 3 or what != "empty":
                edits[f"place {i}: {what}"] = lambda c, i=i, v=value: c.__setitem__(i, v)
    for i in (4, 5):
        for what, value in (("empty", set()), ("unknown", {"x"}), ("a number", 3), ("a dict", {})):
            edits[f"place {i}: {what}"] = lambda c, i=i, v=value: c.__setitem__(i, v)
    cases += edited("GCNet", gcnet, content, edits, load)
    judge(cases, 75)


# -- HDF5 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("iemocap")
    write(root)
    return root


def inside(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A change of an HDF5 file through its own library."""

    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            change(file)

    return apply


def replaced(name: str, make: Callable[[Any, str], Any]) -> Callable[[Path], None]:
    def change(file: Any) -> None:
        del file[name]
        make(file, name)

    return inside(change)


def _virtual(file: Any, name: str, width: int) -> None:
    layout = h5py.VirtualLayout((3, width), np.float32)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (3, width))
    file.create_virtual_dataset(name, layout)


def _packed(file: Any, name: str, width: int) -> None:
    """A million frames of zeros, which pack well."""
    frames = 25_000
    values = file.create_dataset(name, (10**6, width), np.uint8, chunks=(frames, width), compression="gzip")
    chunk = zlib.compress(bytes(frames * width))
    for start in range(0, 10**6, frames):
        values.id.write_direct_chunk((start, 0), chunk)


def _flipped(path: Path, name: str, width: int) -> None:
    """Frames with a checksum, one bit of which is another."""
    g = np.random.default_rng(0)
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_dataset(name, data=g.normal(size=(3, width)).astype(np.float32), chunks=(3, width), fletcher32=True)
        place = file[name].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 5] ^= 16
    path.write_bytes(bytes(content))


@pytest.mark.slow
def test_iemocap_files(made, tmp_path):
    load = lambda: data.load("iemocap", made)
    cases = []
    for modality, file in FILES.items():
        path, width, name = made / file, WIDTHS[modality], split_of(1)["trn"][0]
        cases += files("iemocap", path, load)
        last = split_of(1)["tst"][-1]
        elsewhere = tmp_path / "elsewhere.h5"
        with h5py.File(elsewhere, "w") as other:
            other["x"] = np.ones((3, width), np.float32)
        (tmp_path / "raw").write_bytes(bytes(4 * 3 * width))
        forms = {
            "missing": lambda f, n: None,
            "an external link": lambda f, n, e=elsewhere: f.__setitem__(n, h5py.ExternalLink(str(e), "x")),
            "an external link to itself": lambda f, n, p=path: f.__setitem__(n, h5py.ExternalLink(str(p), n)),
            "a soft link": lambda f, n, o=last: f.__setitem__(n, h5py.SoftLink(f"/{o}")),
            "a soft link to nothing": lambda f, n: f.__setitem__(n, h5py.SoftLink("/nowhere")),
            "a soft link to itself": lambda f, n: f.__setitem__(n, h5py.SoftLink(f"/{n}")),
            "external storage": lambda f, n, w=width: f.create_dataset(
                n, (3, w), np.float32, external=[(str(tmp_path / "raw"), 0, 4 * 3 * w)]),
            "external storage that is not there": lambda f, n, w=width: f.create_dataset(
                n, (3, w), np.float32, external=[("/etc/none", 0, 4 * 3 * w)]),
            "virtual": lambda f, n, w=width: _virtual(f, n, w),
            "a group": lambda f, n: f.create_group(n),
            "nothing in it": lambda f, n: f.create_dataset(n, data=h5py.Empty("f4")),
            "never written": lambda f, n, w=width: f.create_dataset(n, (3, w), np.float32),
            "10**8 frames never written": lambda f, n, w=width: f.create_dataset(
                n, (10**8, w), np.float32, chunks=(64, w)),
            "10**15 frames": lambda f, n, w=width: f.create_dataset(n, (10**15, w), np.float32, chunks=(64, w)),
            "10**6 frames of zeros packed": lambda f, n, w=width: _packed(f, n, w),
            "a chunk never written": lambda f, n, w=width: f.create_dataset(
                n, (128, w), np.float32, chunks=(64, w)).__setitem__(slice(0, 64), 1),
            "a damaged chunk": lambda f, n, w=width: f.create_dataset(
                n, (64, w), np.float32, chunks=(64, w), compression="gzip").id.write_direct_chunk((0, 0), b"no zlib"),
            "a chunk too short under gzip": lambda f, n, w=width: f.create_dataset(
                n, (64, w), np.float32, chunks=(64, w), compression="gzip").id.write_direct_chunk(
                    (0, 0), zlib.compress(bytes(40))),
            "a chunk too long under gzip": lambda f, n, w=width: f.create_dataset(
                n, (64, w), np.float32, chunks=(64, w), compression="gzip").id.write_direct_chunk(
                    (0, 0), zlib.compress(bytes(10**7))),
            "a chunk that says it is not packed": lambda f, n, w=width: f.create_dataset(
                n, (64, w), np.float32, chunks=(64, w), compression="gzip").id.write_direct_chunk((0, 0), b"xyz", 1),
            "a chunk that is too short": lambda f, n, w=width: f.create_dataset(
                n, (64, w), np.float32, chunks=(64, w)).id.write_direct_chunk((0, 0), b"xyz"),
            "another filter": lambda f, n, w=width: f.create_dataset(n, data=np.ones((64, w), "f4"), compression="lzf"),
            "texts": lambda f, n, w=width: f.__setitem__(n, np.full((2, w), b"abc")),
            "texts of any length": lambda f, n: f.create_dataset(n, data=["a", "b"]),
            "complex": lambda f, n, w=width: f.__setitem__(n, np.ones((2, w), complex)),
            "records": lambda f, n: f.__setitem__(n, np.zeros(2, [("a", "f4")])),
            "one axis": lambda f, n, w=width: f.__setitem__(n, np.ones(w)),
            "three axes": lambda f, n, w=width: f.__setitem__(n, np.ones((1, 2, w))),
            "no axes": lambda f, n: f.__setitem__(n, 3.0),
            "wider": lambda f, n, w=width: f.__setitem__(n, np.ones((2, w + 1))),
            "turned": lambda f, n, w=width: f.__setitem__(n, np.ones((w, 2))),
            "nan": lambda f, n, w=width: f.__setitem__(n, np.full((2, w), np.nan)),
            "inf": lambda f, n, w=width: f.__setitem__(n, np.full((2, w), np.inf)),
            "an overflow": lambda f, n, w=width: f.__setitem__(n, np.full((2, w), 1e300)),
            "bytes in another order": lambda f, n, w=width: f.__setitem__(
                n, np.random.default_rng(0).normal(size=(50, w)).astype(">f4").view("<f4")),
        }  # fmt: skip
        for what, form in forms.items():
            cases.append(Case(f"iemocap: {file}: {what}", {path: replaced(name, form)}, load))
        flip = lambda p, n=name, w=width: _flipped(p, n, w)
        cases.append(Case(f"iemocap: {file}: a flipped bit under a checksum", {path: flip}, load))
        swap = next(made / other for other in FILES.values() if other != file)
        cases.append(Case(f"iemocap: {file}: swapped", {path: swap.read_bytes()}, load))
    path = made / "A/comparE_mean_std.h5"
    cases += files("iemocap", path, load)
    for key in ("mean", "std"):
        forms = {
            "missing": lambda f, n: None,
            "shorter": lambda f, n: f.__setitem__(n, np.ones(129)),
            "texts": lambda f, n: f.__setitem__(n, np.full(130, b"a")),
            "nan": lambda f, n: f.__setitem__(n, np.full(130, np.nan)),
            "inf": lambda f, n: f.__setitem__(n, np.full(130, np.inf)),
            "never written": lambda f, n: f.create_dataset(n, (130,), np.float32),
            "a group": lambda f, n: f.create_group(n),
            "a link": lambda f, n: f.__setitem__(n, h5py.SoftLink("/2/mean")),
            "an external link": lambda f, n: f.__setitem__(n, h5py.ExternalLink("elsewhere.h5", "/x")),
        }
        for what, form in forms.items():
            cases.append(Case(f"iemocap: 1/{key}: {what}", {path: replaced(f"1/{key}", form)}, load))
    zero = replaced("1/std", lambda f, n: f.__setitem__(n, np.zeros(130)))
    cases.append(Case("iemocap: 1/std: zeros", {path: zero}, load))
    forms = {
        "missing": lambda f, n: None,
        "a data set": lambda f, n: f.__setitem__(n, np.ones(3)),
        "a soft link": lambda f, n: f.__setitem__(n, h5py.SoftLink("/2")),
        "an external link": lambda f, n: f.__setitem__(n, h5py.ExternalLink("elsewhere.h5", "/x")),
    }
    for what, form in forms.items():
        cases.append(Case(f"iemocap: fold 1: {what}", {path: replaced("1", form)}, load))
    judge(cases, 180)


@pytest.mark.slow
def test_iemocaps_targets_and_arrays(made, tmp_path_factory):
    load = lambda: data.load("iemocap", made)
    cases = []
    for part in ("trn", "tst"):
        labels, names = (made / "target" / "1" / f"{part}_{kind}.npy" for kind in ("label", "int2name"))
        cases += arrays(part, labels, load, columns=True)
        cases += arrays(part, names, load)
        x, ids = np.load(labels), np.load(names)
        for what, new in {
            "two classes": np.ones_like(x), "no class": np.zeros_like(x), "halves": x / 2,
            "five columns": np.eye(5)[x.argmax(1)],
            "numbers from 4": x.argmax(1) + 4, "negative": -x, "texts": np.full(x.shape, "a"),
        }.items():  # fmt: skip
            cases.append(Case(f"{part}: labels: {what}", {labels: npy(new)}, load))
        twice, unknown = ids.copy(), ids.copy()
        twice[0], unknown[0] = ids[1], b"Ses09F_x"
        for what, new in {
            "twice": twice, "unknown": unknown, "numbers": np.arange(len(ids)),
            "two columns": np.concatenate([ids, ids], 1), "no UTF-8": np.full(ids.shape, b"\xff\xfe"),
            "empty": np.full(ids.shape, b""), "half a character": np.full(ids.shape, 0xDB31, "u4").view("U1"),
            "no characters": np.full(ids.shape, 0x7FFFFFFF, "u4").view("U1"),
        }.items():  # fmt: skip
            cases.append(Case(f"{part}: ids: {what}", {names: npy(new)}, load))
        swap = {labels: names.read_bytes(), names: labels.read_bytes()}
        cases.append(Case(f"{part}: labels and ids swapped", swap, load))
    root = tmp_path_factory.mktemp("arrays")
    write_targets(root, 1, one_hot=False, column=False, kind=str)
    g = np.random.default_rng(0)
    for place, width in zip("AVL", WIDTHS.values(), strict=True):
        (root / place / "1").mkdir(parents=True)
        for part, ids in split_of(1).items():
            np.save(root / place / "1" / f"{part}.npy", g.normal(size=(len(ids), 4, width)).astype(np.float32))
    read = lambda: data.load("iemocap", root)
    cases += arrays("arrays", root / "A/1/trn.npy", read, columns=True)
    cases += arrays("arrays", root / "V/1/val.npy", read, columns=True)
    order = npy(np.load(root / "A/1/tst.npy"), header=lambda h: h.replace(b"<f4", b">f4"))
    cases.append(Case("arrays: bytes in another order", {root / "A/1/tst.npy": order}, read))
    cases.append(Case("arrays: A for V", {root / "V/1/tst.npy": (root / "A/1/tst.npy").read_bytes()}, read))
    judge(cases, 200)


# -- MNIST and sounds -----------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(pair_files, monkeypatch):
    """Recordings of the same content are read once: the 1,500 are alike."""
    known: dict[tuple, Any] = {}
    read = avmnist._mfcc

    def once(path: Path, *options: int) -> Any:
        key = (path.read_bytes(), *options)
        known[key] = known.get(key) or read(path, *options)
        return known[key]

    monkeypatch.setattr(avmnist, "_mfcc", once)
    return pair_files


@pytest.fixture(scope="module")
def pair_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("avmnist")
    write_mnist(root / "mnist", "t10k", 150)
    folder = root / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    write_wav(folder / "one.wav", 0.1 * np.random.default_rng(0).normal(size=400).clip(-5, 5))
    one = (folder / "one.wav").read_bytes()
    (folder / "one.wav").unlink()
    for d in range(10):
        for s in avmnist.SPEAKERS:
            for t in range(50):
                (folder / f"{d}_{s}_{t}.wav").write_bytes(one)
    return root


def gz(content: bytes) -> bytes:
    return gzip.compress(content, 1)


@pytest.mark.slow
def test_mnist_files(pairs, tmp_path):
    load = lambda: data.load("avmnist", pairs, cache=False, workers=1)
    images, labels = (pairs / "mnist" / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    pixels, numbers = (gzip.decompress(p.read_bytes()) for p in (images, labels))
    head = lambda rank, *sizes, kind=8: b"\0\0" + bytes([kind, rank]) + struct.pack(f">{len(sizes)}I", *sizes)
    cases = []
    for path, content, rank in ((images, pixels, 3), (labels, numbers, 1)):
        start = 4 + 4 * rank
        more = {
            "an IDX header of 2**93": gz(head(3, 1 << 31, 1 << 31, 1 << 31)),
            "an IDX header of 2**64": gz(head(4, 1 << 16, 1 << 16, 1 << 16, 1 << 16)),
            "255 axes": gz(head(255, *[1] * 255) + b"\0"),
            "a bomb": gz(content[:start] + bytes(1 << 24)),
            "a declared bomb": gz(head(1, 1 << 30) + bytes(1 << 20)),
            "a byte less": gz(content[:-1]),
            "a byte more": gz(content + b"\0"),
            "junk behind it": path.read_bytes() + b"junk",
            "one item less declared": gz(content[:4] + struct.pack(">I", 1499) + content[8:]),
            "no items": gz(head(rank, *[0] * rank)),
            "another type": gz(content[:2] + b"\x0d" + content[3:]),
            "no magic": gz(b"\x01" + content[1:]),
            "a header alone": gz(content[:start]),
            "half a header": gz(content[: start - 2]),
            "not packed": content,
            "a wrong checksum": path.read_bytes()[:-8] + b"\0\0\0\0" + path.read_bytes()[-4:],
            "a wrong size": path.read_bytes()[:-4] + b"\xff\xff\xff\x7f",
            **{f"bit {bit} of byte {k}": gz(content[:k] + bytes([content[k] ^ 1 << bit]) + content[k + 1 :])
               for k in range(start) for bit in (0, 3, 7)},
        }  # fmt: skip
        cases += files("MNIST", path, load, more=more)
    cases.append(Case("MNIST: swapped", {images: labels.read_bytes(), labels: images.read_bytes()}, load))
    cases.append(Case("MNIST: only images", {labels: None}, load))
    cases.append(Case("MNIST: a class too rare", {labels: gz(numbers[:8] + bytes(1500))}, load))
    cases.append(Case("MNIST: labels from 10", {labels: gz(numbers[:8] + b"\x0a" * 1500)}, load))
    flat = tmp_path / "flat-idx3-ubyte"
    flat.write_bytes(head(3, 2, 3, 4) + bytes(24))
    more = {"2**93": head(3, 1 << 31, 1 << 31, 1 << 31), "more": flat.read_bytes() + b"\0"}
    cases += files("read_idx", flat, lambda: avmnist.read_idx(flat), more=more)
    judge(cases, 110)


@pytest.mark.slow
def test_sound_files(pairs):
    load = lambda: data.load("avmnist", pairs, cache=False, workers=1)
    path = pairs / "fsdd" / "recordings" / "0_jackson_0.wav"
    content = path.read_bytes()
    field = lambda place, form, value: (
        content[:place] + struct.pack(form, value) + content[place + struct.calcsize(form) :]
    )
    more: dict[str, Any] = {
        f"{what} {value}": field(place, form, value)
        for what, place, form, values in (
            ("size", 4, "<I", (0, 1, len(content), 0xFFFFFFFF)), ("format's length", 16, "<I", (0, 4, 18, 1 << 31)),
            ("code", 20, "<H", (0, 2, 6, 0x11, 0x55)), ("channels", 22, "<H", (0, 2, 65535)),
            ("rate", 24, "<I", (0, 8001, 16000, 1 << 31)), ("speed", 28, "<I", (0, 8000)),
            ("block", 32, "<H", (0, 1, 4)), ("bits", 34, "<H", (0, 8, 24, 32)),
            ("data", 40, "<I", (0, 100, len(content), 0x7FFFFFFF, 0xFFFFFFFF)),
        ) for value in values
    }  # fmt: skip
    more |= {
        f"bit {b} of byte {k}": content[:k] + bytes([content[k] ^ 1 << b]) + content[k + 1 :]
        for k in range(44)
        for b in (0, 5)
    }
    floats = np.full(400, np.nan, np.float32).tobytes()
    riff = lambda form, body: b"RIFF" + struct.pack("<I", 28 + len(body) + 8) + b"WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, *form) + b"data" + struct.pack("<I", len(body)) + body  # fmt: skip
    more |= {
        "no samples": riff((1, 1, 8000, 16000, 2, 16), b""),
        "nan": riff((3, 1, 8000, 32000, 4, 32), floats),
        "huge": riff((3, 1, 8000, 32000, 4, 32), np.full(400, 1e30, np.float32).tobytes()),
        "two channels": riff((1, 2, 8000, 32000, 4, 16), bytes(400)),
        "16 kHz": riff((1, 1, 16000, 32000, 2, 16), bytes(400)),
        "more behind it": content + b"junk",
        "no format": b"RIFF" + struct.pack("<I", 12) + b"WAVEdata" + bytes(4),
        "not there": None,
    }
    judge(files("FSDD", path, load, more=more), 130)


# -- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mfeat_tables(tmp_path):
    g = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 12)
    (tmp_path / "mfeat").mkdir()
    for view, (width, _) in VIEWS.items():
        rows = [",".join(f"f{i}" for i in range(width)) + ",class"]
        rows += [
            ",".join([*(f"{v:.3f}" for v in row), str(c)])
            for row, c in zip(g.normal(size=(120, width)), labels, strict=True)
        ]
        (tmp_path / "mfeat" / f"mfeat-{view}.csv").write_text("\n".join(rows) + "\n")
    load = lambda: data.load("mfeat", tmp_path)
    cases = []
    for view in VIEWS:
        path = tmp_path / "mfeat" / f"mfeat-{view}.csv"
        lines = path.read_text().splitlines()
        cell = lambda row, column, value, lines=lines: "\n".join(
            ",".join(value if j == column % len(lines[0].split(",")) else v for j, v in enumerate(line.split(",")))
            if i == row else line for i, line in enumerate(lines)
        ).encode() + b"\n"  # fmt: skip
        join = lambda rows: ("\n".join(rows) + "\n").encode()
        more = {
            "no header": join(lines[1:]),
            "a header alone": join(lines[:1]),
            "a row less": join(lines[:-1]),
            "half the rows": join(lines[:61]),
            "a row more": join([*lines, lines[-1]]),
            "a class left out": join([line for line in lines if not line.endswith(",3")]),
            "rows in another order": join([lines[0], *lines[:0:-1]]),
            "a column less": join([line.partition(",")[2] for line in lines]),
            "a column more": join([f"0,{line}" for line in lines]),
            "a column more without a name": join([lines[0], *(f"0,{line}" for line in lines[1:])]),
            "a column more at the end": join([lines[0], *(f"{line},0" for line in lines[1:])]),
            "a short row": join([*lines[:3], lines[3].rpartition(",")[0], *lines[4:]]),
            "a long row": join([*lines[:3], lines[3] + ",1", *lines[4:]]),
            "semicolons": join(lines).replace(b",", b";"),
            "a comma for the point": join(lines).replace(b".", b","),
            "no UTF-8": b"\xff\xfe" + join(lines),
            "UTF-16 of it": join(lines).decode().encode("utf-16"),
            "a zero byte": cell(2, 1, "1\0"),
            "an open quote": cell(2, 1, '"1'),
            **{f"a cell {value!r}": cell(5, 1, value) for value in (
               "", "nan", "inf", "-inf", "1e400", "1e300", "abc", "1.2.3", "True", "2020-01-01", "0x1p3", "1,5", "1+2j",
               "?")},
            **{f"a class {value!r}": cell(5, -1, value) for value in ("", "-1", "10", "1.5", "nan", "zero", "1e9")},
        }  # fmt: skip
        chosen = files("mfeat", path, load, whole=1, more=more)
        chosen = [case for case in chosen if not case.what.endswith("another's end")]  # an empty line is skipped
        cases += chosen if view in ("fou", "mor") else chosen[::4]
    one, other = tmp_path / "mfeat" / "mfeat-fou.csv", tmp_path / "mfeat" / "mfeat-mor.csv"
    cases.append(Case("mfeat: swapped", {one: other.read_bytes(), other: one.read_bytes()}, load))
    judge(cases, 150)


# -- checkpoints of text encoders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="checkpoints are read with transformers")
    folder = tmp_path_factory.mktemp("encoder")
    about = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertModel(about).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary, model_max_length=12).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_encoder_checkpoints(checkpoint):
    encoder, tokenizer = lambda: text.load_encoder(checkpoint), lambda: text.load_tokenizer(checkpoint)
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    some = next(name for name in head if name.endswith("query.weight"))

    def rewritten(change: Callable[[dict], Any], body: bytes = content[8 + size :]) -> bytes:
        new = copy.deepcopy(head)
        change(new)
        said = json.dumps(new).encode()
        return struct.pack("<Q", len(said)) + said + body

    start = 8 + size + head[some]["data_offsets"][0]
    more: dict[str, Any] = {
        "a header of 2**63": struct.pack("<Q", 1 << 63) + content[8:],
        "a header of 2**40": struct.pack("<Q", 1 << 40) + content[8:],
        "a header of 0": bytes(8) + content[8:],
        "a header too short": struct.pack("<Q", size // 2) + content[8:],
        "no JSON": content[:8] + b"x" * size + content[8 + size :],
        "a tensor less": rewritten(lambda h: h.pop(some)),
        "another name": rewritten(lambda h: h.update({some + "x": h.pop(some)})),
        "another shape": rewritten(lambda h: h[some].update(shape=[4, 16])),
        "a huge shape": rewritten(lambda h: h[some].update(shape=[1 << 40, 1 << 40])),
        "a negative shape": rewritten(lambda h: h[some].update(shape=[-8, -8])),
        "another dtype": rewritten(lambda h: h[some].update(dtype="F64")),
        "an unknown dtype": rewritten(lambda h: h[some].update(dtype="F33")),
        "offsets beyond the file": rewritten(lambda h: h[some].update(data_offsets=[0, 1 << 40])),
        "offsets that overlap": rewritten(lambda h: h[some].update(data_offsets=[0, 256])),
        "more behind it": content + b"junk",
        "nan": content[:start] + struct.pack("<f", np.nan) + content[start + 4 :],
        "inf": content[:start] + struct.pack("<f", np.inf) + content[start + 4 :],
        "not there": None,
    }
    cases = files("encoder", weights, encoder, more=more)
    config = checkpoint / "config.json"
    known = json.loads(config.read_text())
    edits = {
        "another width": {"hidden_size": 16}, "no width": {"hidden_size": 0}, "a width of text": {"hidden_size": "8"},
        "a layer less": {"num_hidden_layers": 1}, "a layer more": {"num_hidden_layers": 3},
        "no layers": {"num_hidden_layers": 0}, "more words": {"vocab_size": len(WORDS) + 5},
        "a negative vocabulary": {"vocab_size": -1},
        "heads that do not divide": {"num_attention_heads": 3}, "an unknown kind": {"model_type": "nothing"},
        "an encoder-decoder": {"model_type": "t5"}, "no kind": {"model_type": None},
        "more places": {"max_position_embeddings": 99},
    }  # fmt: skip
    changed_config = {what: json.dumps({**known, **edit}).encode() for what, edit in edits.items()}
    cases += [Case(f"encoder: config: {what}", {config: new}, encoder) for what, new in changed_config.items()]
    for what, new in {**cuts(config.read_bytes(), whole=1), **others(config.read_bytes())}.items():
        if what != "another's end":
            cases.append(Case(f"encoder: config.json: {what}", {config: new}, encoder))
    for name in ("tokenizer.json",):
        path = checkpoint / name
        whole = len(path.read_bytes()) - len(path.read_bytes().rstrip())
        changes = {**cuts(path.read_bytes(), whole=whole), **others(path.read_bytes())}
        model = json.loads(path.read_text())
        model["model"]["vocab"] = {**model["model"]["vocab"], **{f"w{i}": 100 + i for i in range(300)}}
        changes["a larger vocabulary"] = json.dumps(model).encode()
        for what, new in changes.items():
            if what != "another's end":
                cases.append(Case(f"tokenizer: {name}: {what}", {path: new}, tokenizer))
    judge(cases, 75)
