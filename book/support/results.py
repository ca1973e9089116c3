"""The store of results: a CSV with one row per test condition and metric of every finished run, and its predictions.

A run is a *config*: a dict that JSON can hold. Its hash is its name in the results file. What is stored is complete: a
run's rows appear together, and its predictions before them; `Claims` keeps two processes off one run.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmlib.checks import PATH, Is, Maybe, Named, Several, Text
from mmlib.files import atomic_write

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "COLUMNS",
    "Claims",
    "Config",
    "Results",
    "append",
    "canonical",
    "complete",
    "config_hash",
    "frame_of",
    "grid",
    "keys_of",
    "load_results",
    "missing_runs",
    "not_run",
    "predictions",
    "read",
]

# fmt: off
COLUMNS = (
    "experiment", "config_hash", "method", "backbone", "data", "data_hash", "mask_hash", "condition", "seed", "profile",
    "metric", "value", "n", "seconds", "peak_memory_mb", "device", "kernels", "torch", "mmlib", "commit", "date",
    "command", "results", "digest", "config",
)
# fmt: on
# What is the same in all rows of a run: a file has it in the first row alone, where no row says otherwise
ONCE = (
    "experiment",
    "device",
    "kernels",
    "torch",
    "mmlib",
    "commit",
    "date",
    "command",
    "results",
    "digest",
    "config",
)  # fmt: skip
NUMBERS: dict[str, type] = {
    **dict.fromkeys(("value", "seconds", "peak_memory_mb"), float),
    **dict.fromkeys(("seed", "n", "results"), int),
}  # the columns that hold numbers; an empty one is unknown
KINDS = {int: "a whole number", float: "a number"}
MACHINE = ("data_root", "device", "progress")  # entries of a config that say where it runs, not what it computes

POLL = 0.2  # seconds between two looks at the runs that other processes have

Config = dict[str, Any]


class Results(list[dict[str, Any]]):
    """A run's rows, with the predictions that they were computed from: one array [n] a test condition."""

    def __init__(self, rows: Iterable[dict[str, Any]] = (), predictions: Mapping[str, np.ndarray] | None = None):
        super().__init__(Several(Is("a dict", Mapping))("rows", list(rows) if isinstance(rows, Iterable) else rows))
        self.predictions = dict(Maybe(Named(Is("an array", object), 0))("predictions", predictions) or {})


def grid(**lists: Any) -> list[Config]:
    """All combinations of the given lists, as dicts; what is not a list or tuple is the same in all of them."""
    values = [v if isinstance(v, (list, tuple)) else [v] for v in lists.values()]
    return [dict(zip(lists, combination, strict=True)) for combination in itertools.product(*values)]


def config_hash(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name a config; where it runs (`MACHINE`) does not count."""
    Named(Is("a value", object), 0)("config, configs", config)
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:16]


def canonical(config: Mapping[str, Any]) -> str:
    """The config as JSON with sorted keys, without what belongs to the machine."""
    kept = {k: v for k, v in config.items() if k not in MACHINE}
    if folders := [text for text in _strings(kept) if PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive]:
        raise ValueError(
            f"config, configs: expected no absolute path but in data_root, since configs are stored; got {folders}"
        )

    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, torch.Tensor)):
            return value.tolist()
        raise TypeError(f"config, configs: expected values that JSON can hold, got {value!r:.100} in {sorted(kept)}")

    try:
        return json.dumps(kept, sort_keys=True, default=plain, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"config, configs: expected finite numbers ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for one in value.values() for text in _strings(one))
    elif isinstance(value, (list, tuple)):
        yield from (text for one in value for text in _strings(one))


# The results file


def load_results(path: str | Path, configs: Sequence[Config] | None = None) -> pd.DataFrame:
    """The stored rows, of these configs in this order or of all; a file that is not there has none.

    Columns: `COLUMNS`. ``kernels`` says what computed the run (the CPU's instructions as PyTorch uses them, its vendor,
    family and model, and variables that choose kernels); "" means unknown. ``results`` and ``digest`` are how many rows
    the run has and what they come to.

    Raises ValueError, which names the file and the line, for a file of another schema, for a value that is no number,
    and for a run that lost a row, has one twice or one that was edited.
    """
    stored = read(Path(PATH("path", path)))
    keys = list(stored) if configs is None else keys_of(configs)
    return frame_of([row for key in keys for row in stored.get(key, ())])


def missing_runs(path: str | Path, configs: Sequence[Config]) -> list[Config]:
    """The configs that the results file does not have yet."""
    stored = read(Path(PATH("path", path)))
    return [config for key, config in zip(keys_of(configs), configs, strict=True) if key not in stored]


def not_run(path: str | Path, configs: Sequence[Config], command: str) -> str:
    """A sentence for a page: how many of the runs are not there, and the command that fills them in; "" if all are."""
    Text("command", command)
    missing = len(missing_runs(path, configs))
    return f"{missing} of {len(configs)} runs not run; `{command}` fills them in" if missing else ""


def predictions(path: str | Path, config: Mapping[str, Any] | str) -> dict[str, np.ndarray]:
    """The stored predictions of one run (a config or its hash): per test condition [n], besides ``target`` and ``ids``.

    Classes are int16, scores float32; a sample that a condition leaves empty is -1 or NaN. They stand in one ``.npz``
    beside the results file, as ``HASH/CONDITION``. Raises FileNotFoundError where none are stored, ValueError for what
    is no hash and for a file that cannot be read, which it names.
    """
    PATH("path", path)
    key = config if isinstance(config, str) else config_hash(config)
    if not re.fullmatch("[0-9a-f]{16}", key):
        raise ValueError(f"config: expected a config, or the 16 hexadecimal digits of its hash, got {key!r:.100}")
    file = Path(path).with_suffix(".npz")
    try:
        found = _unpacked(file, key) if file.exists() else {}
    except Exception as error:
        raise ValueError(
            f"{file.name}: not a readable predictions file ({error}); restore it, or delete it and run again"
        ) from error
    if not found:
        raise FileNotFoundError(f"config: no predictions of {key} are stored beside {Path(path).name}")
    return found


def _unpacked(file: Path, key: str) -> dict[str, np.ndarray]:
    about = file.stat()  # a file that another process replaced is another one
    arrays, names = _opened(file, about.st_mtime_ns, about.st_ino, about.st_size)
    return {name.partition("/")[2]: arrays[name] for name in names.get(key, ())}


@functools.lru_cache(maxsize=8)
def _opened(file: Path, *version: int) -> tuple[Any, dict[str, list[str]]]:
    """The open archive and each run's arrays in it: a page asks for hundreds of runs of one table."""
    arrays = np.load(file, allow_pickle=False)
    names: dict[str, list[str]] = {}
    for name in arrays.files:
        names.setdefault(name.partition("/")[0], []).append(name)
    return arrays, names


def _pack(file: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Add a run's arrays to the predictions of its table, whose lock is held; the file is replaced as a whole."""
    packed = io.BytesIO(file.read_bytes() if file.exists() else b"")
    if file.exists() and not zipfile.is_zipfile(packed):  # else a second archive would begin behind it
        raise ValueError(f"{file.name}: not a readable predictions file; restore it, or delete it and run again")
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with warnings.catch_warnings():  # a process that was stopped before it stored its results left the same
                warnings.filterwarnings("ignore", "Duplicate name", UserWarning)  # name; the last one counts
                place = archive.open(f"{key}/{name}.npy", "w", force_zip64=True)
            with place:
                np.lib.format.write_array(place, np.asanyarray(array), allow_pickle=False)
    atomic_write(file, packed.getbuffer(), locked=True)


def keys_of(configs: Sequence[Config]) -> list[str]:
    Several(Is("a config", Mapping))("configs", configs)
    return list(dict.fromkeys(config_hash(c) for c in configs))


def read(path: Path) -> dict[str, list[dict[str, str]]]:
    """The stored rows by config hash. Of a file that ends in the middle of a line, that line's run is left out.

    Each run's rows stand together and are written at once; only something else than this module can leave half a line.
    """
    if not path.exists():
        return {}
    text = path.read_bytes().decode("utf-8", errors="replace")
    end = text.rfind("\n") + 1
    text, torn = text[:end], text[end:]
    reader = csv.reader(io.StringIO(text))
    try:
        lines = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {reader.line_num}: expected comma-separated values ({error})") from None
    if not lines and torn and ",".join(COLUMNS).startswith(torn):
        return {}
    if not lines or tuple(lines[0]) != COLUMNS:
        found = lines[0] if lines else []
        lacking, extra = [c for c in COLUMNS if c not in found], [c for c in found if c not in COLUMNS]
        raise ValueError(
            f"{path.name}: expected a results file with the columns {', '.join(COLUMNS)}; this one lacks {lacking} and "
            f"has {extra} besides (or in another order). Give the new results another file"
        )
    stored: dict[str, list[dict[str, str]]] = {}
    first: dict[str, int] = {}  # the line in which each run begins
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(COLUMNS):
            raise ValueError(f"{path.name}, line {number}: expected {len(COLUMNS)} values, got {len(line)}")
        row = dict(zip(COLUMNS, line, strict=True))
        for name, kind in NUMBERS.items():
            try:
                kind(row[name] or 0)
            except ValueError:
                raise ValueError(
                    f"{path.name}, line {number}, {name}: expected {KINDS[kind]}, got {row[name]!r:.100}"
                ) from None
        rows = stored.setdefault(row["config_hash"], [])
        first.setdefault(row["config_hash"], number)
        rows.append(_filled(row, rows[0]) if rows else row)
    if torn and stored:
        begun = next(csv.reader([torn]))
        lost = begun[1] if len(begun) > 2 else list(stored)[-1]  # if the line does not say whose it is: the last run's
        stored.pop(lost, None)
        warnings.warn(
            f"{path.name} ends in the middle of a line; the run {lost} may be incomplete and is run again", stacklevel=3
        )
    for key, rows in stored.items():
        place, last = f"{path.name}, line {first[key]}: the run {key}", "Remove its rows and run it again"
        if hashlib.sha256(rows[0]["config"].encode()).hexdigest()[:16] != key:
            raise ValueError(
                f"{place} holds another configuration than its hash says: its first row was lost or edited. {last}"
            )
        if rows[0]["results"] != str(len(rows)):
            raise ValueError(
                f"{place} says that it has {rows[0]['results'] or 'an unknown number of'} rows, and has {len(rows)}: "
                f"one was lost or doubled. {last}"
            )
        if rows[0]["digest"] != _digest(rows):
            raise ValueError(f"{place} has rows with another digest than it says: one was edited. {last}")
    return stored


def _filled(row: dict[str, str], first: Mapping[str, str]) -> dict[str, str]:
    """A run's row with what its first row says for all of them."""
    return {**row, **{name: row[name] or first[name] for name in ONCE}}


def _digest(rows: Iterable[Mapping[str, str]]) -> str:
    """Twelve hexadecimal digits of all that a run's rows say."""
    said = [[row[name] for name in COLUMNS if name not in ("results", "digest")] for row in rows]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def frame_of(rows: list[dict[str, str]]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=COLUMNS, dtype=str)
    for name, kind in NUMBERS.items():
        if kind is float:
            frame[name] = [float(v) if v else math.nan for v in frame[name]]
        else:
            frame[name] = pd.array([int(v) if v else None for v in frame[name]], dtype="Int64")
    return frame


def append(path: Path, key: str, rows: list[dict[str, str]], arrays: Mapping[str, np.ndarray]) -> None:
    """Store a run that is claimed. The whole file is replaced at once: no crash or full disk harms what is in it."""
    from filelock import FileLock

    with FileLock(path.with_name(f".{path.name}.lock")):
        stored = read(path)
        if key in stored:  # another process was faster
            return
        if arrays:
            _pack(path.with_suffix(".npz"), key, arrays)
        _write(path, [*stored.values(), rows])


def _write(path: Path, runs: Iterable[list[dict[str, str]]]) -> None:
    """Replace the file by one of these runs, each of which says how many rows it has and what they come to."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for rows in runs:
        rows = [_filled(row, rows[0]) for row in rows]
        sealed = {"results": str(len(rows)), "digest": _digest(rows)}
        first, *rest = ({**row, **sealed} for row in rows)
        writer.writerow(first)
        same = dict.fromkeys((name for name in ONCE if all(row[name] == first[name] for row in rest)), "")
        writer.writerows({**row, **same} for row in rest)
    atomic_write(path, text.getvalue().encode(), locked=True)


class Claims:
    """The runs of ``todo`` that this process takes: each by a lock beside the results file, which keeps others off it.

    Iterating takes them one by one and passes over those that other processes have; `wait` before the next pass, which
    finds them stored or given back. The system gives back a process's locks when it dies, however it does. What is
    stored meanwhile leaves ``todo``.
    """

    def __init__(self, path: Path, todo: dict[str, Config]):
        self.path, self.todo = path, todo
        self.held: dict[str, Any] = {}
        self.error: Exception | None = None

    def __enter__(self) -> Claims:
        return self

    def __iter__(self) -> Iterator[tuple[str, Config]]:
        try:
            for key in list(self.todo):
                if self._take(key):
                    yield key, self.todo[key]
        except Exception as error:  # joblib asks for runs in a thread of its own, in which errors are lost
            self.error = error

    def _take(self, key: str) -> bool:
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.stem}.{key}.lock"), thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        self.held[key] = lock
        if key in read(self.path):  # another process was faster
            self.drop(key)
            return False
        return True

    def drop(self, key: str) -> None:
        """The run is stored, or failed: it is no longer to do."""
        self.todo.pop(key, None)
        self._give_back(key)

    def _give_back(self, key: str) -> None:
        lock = self.held.pop(key)
        with contextlib.suppress(OSError):  # while it is held: who opened it before sees that it is gone
            os.unlink(lock.lock_file)
        lock.release()

    def wait(self) -> None:
        """A moment for those who have the rest. Raises what went wrong while runs were taken."""
        if self.error is not None:
            raise self.error
        if self.todo:
            time.sleep(POLL)

    def __exit__(self, *_: Any) -> None:
        for key in list(self.held):
            self._give_back(key)


def complete(row: Mapping[str, Any], key: str, config: Config, facts: Mapping[str, str]) -> dict[str, str]:
    """One row with every column, as text: numbers in full precision, no folder and no line break anywhere."""
    if unknown := [name for name in row if name not in COLUMNS]:
        raise ValueError(f"run: expected rows with columns of {COLUMNS}, got {unknown}")
    if lacking := [name for name in ("metric", "value") if name not in row]:
        raise ValueError(f"run: expected rows with metric and value, one lacks {lacking}")
    known = {k: config.get(k, "") for k in ("method", "backbone", "data", "seed", "profile")}
    whole = {**known, **row, **facts, "config_hash": key, "config": canonical(config)}
    values = {name: _text(whole.get(name, "")) for name in COLUMNS}
    if broken := [name for name, value in values.items() if "\n" in value or "\r" in value]:
        raise ValueError(f"run: expected single-line values, got a line break in {broken}")
    return values


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    return repr(value) if isinstance(value, float) else str(value)
