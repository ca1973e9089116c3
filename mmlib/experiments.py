"""A grid of runs becomes one tidy table: every finished run is stored at once, none is ever run twice.

A run is a *config*: a dict that JSON can hold. Its hash is its name in the results file, a CSV with one row per test
condition and metric. `load_or_run` loads what is there and runs the rest, here, in several processes, or on a Dask
cluster. What it stores is complete: a run's rows appear together, and its predictions before them.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .batch import MultimodalDataset
from .checks import PATH, Flag, Function, Is, Maybe, Named, OneOf, Several, Text, Whole, check_known
from .files import atomic_write
from .training import TrainConfig, fit, predict, random_state

if TYPE_CHECKING:
    import pandas as pd

    from .missing import MissingPlan

__all__ = [
    "BACKBONES",
    "COLUMNS",
    "METHODS",
    "Rows",
    "config_hash",
    "grid",
    "load_or_run",
    "load_rows",
    "missing_rows",
    "not_run",
    "predictions",
    "subsets",
    "train_and_score",
]

# fmt: off
COLUMNS = (
    "experiment", "config_hash", "method", "backbone", "data", "data_hash", "mask_hash", "test", "seed", "profile",
    "metric", "value", "n", "seconds", "peak_memory_mb", "device", "kernels", "torch", "mmlib", "commit", "date",
    "command", "rows", "digest", "config",
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
    "rows",
    "digest",
    "config",
)  # fmt: skip
NUMBERS: dict[str, type] = {
    **dict.fromkeys(("value", "seconds", "peak_memory_mb"), float),
    **dict.fromkeys(("seed", "n", "rows"), int),
}  # the columns that hold numbers; an empty one is unknown
KINDS = {int: "a whole number", float: "a number"}
MACHINE = ("data_root", "device", "progress")  # entries of a config that say where it runs, not what it computes

POLL = 0.2  # seconds between two looks at the runs that other processes have

Config = dict[str, Any]
Run = Callable[[Config], list[dict[str, Any]]]
Done = tuple[str, list[dict[str, Any]], dict[str, np.ndarray], str | None]  # key, rows, predictions, traceback


class Rows(list[dict[str, Any]]):
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
    return hashlib.sha256(_canonical(config).encode()).hexdigest()[:16]


def _canonical(config: Mapping[str, Any]) -> str:
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


def load_rows(path: str | Path, configs: Sequence[Config] | None = None) -> pd.DataFrame:
    """The stored rows, of these configs in this order or of all; a file that is not there has none.

    Columns: `COLUMNS`. ``kernels`` says what computed the run (the CPU's instructions as PyTorch uses them, its vendor,
    family and model, and variables that choose kernels); "" means unknown. ``rows`` and ``digest`` are how many rows
    the run has and what they come to.

    Raises ValueError, which names the file and the line, for a file of another schema, for a value that is no number,
    and for a run that lost a row, has one twice or one that was edited.
    """
    stored = _read(Path(PATH("path", path)))
    keys = list(stored) if configs is None else _keys(configs)
    return _frame([row for key in keys for row in stored.get(key, ())])


def missing_rows(path: str | Path, configs: Sequence[Config]) -> list[Config]:
    """The configs that the results file does not have yet."""
    stored = _read(Path(PATH("path", path)))
    return [config for key, config in zip(_keys(configs), configs, strict=True) if key not in stored]


def not_run(path: str | Path, configs: Sequence[Config], command: str) -> str:
    """A sentence for a page: how many of the runs are not there, and the command that fills them in; "" if all are."""
    Text("command", command)
    missing = len(missing_rows(path, configs))
    return f"{missing} of {len(configs)} runs not run; `{command}` fills them in" if missing else ""


def predictions(path: str | Path, config: Mapping[str, Any] | str) -> dict[str, np.ndarray]:
    """The stored predictions of one run (a config or its hash): per test condition [n], besides ``target`` and ``ids``.

    Classes are int16, scores float32; a sample that a condition leaves empty is -1 or NaN. Raises FileNotFoundError
    where none are stored, ValueError for what is no hash and for a file that cannot be read, which it names.
    """
    PATH("path", path)
    key = config if isinstance(config, str) else config_hash(config)
    if not re.fullmatch("[0-9a-f]{16}", key):
        raise ValueError(f"config: expected a config, or the 16 hexadecimal digits of its hash, got {key!r:.100}")
    file = _predictions_file(Path(path), key)
    if not file.exists():
        raise FileNotFoundError(f"config: no predictions of {key} are stored beside {Path(path).name}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:
        raise ValueError(f"{file.name}: not a readable predictions file ({error}); delete it and run again") from error


def _predictions_file(path: Path, key: str) -> Path:
    return path.with_name(f"{path.stem}.predictions") / f"{key}.npz"


def _keys(configs: Sequence[Config]) -> list[str]:
    Several(Is("a config", Mapping))("configs", configs)
    return list(dict.fromkeys(config_hash(c) for c in configs))


def _read(path: Path) -> dict[str, list[dict[str, str]]]:
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
        if rows[0]["rows"] != str(len(rows)):
            raise ValueError(
                f"{place} says that it has {rows[0]['rows'] or 'an unknown number of'} rows, and has {len(rows)}: "
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
    said = [[row[name] for name in COLUMNS if name not in ("rows", "digest")] for row in rows]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def _frame(rows: list[dict[str, str]]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=COLUMNS, dtype=str)
    for name, kind in NUMBERS.items():
        if kind is float:
            frame[name] = [float(v) if v else math.nan for v in frame[name]]
        else:
            frame[name] = pd.array([int(v) if v else None for v in frame[name]], dtype="Int64")
    return frame


def _append(path: Path, key: str, rows: list[dict[str, str]], arrays: Mapping[str, np.ndarray]) -> None:
    """Store a run that is claimed. The whole file is replaced at once: no crash or full disk harms what is in it."""
    from filelock import FileLock

    if arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        atomic_write(_predictions_file(path, key), buffer.getbuffer(), locked=True)  # the run is claimed
    with FileLock(path.with_name(f".{path.name}.lock")):
        stored = _read(path)
        if key in stored:  # another process was faster
            return
        _write(path, [*stored.values(), rows])


def _write(path: Path, runs: Iterable[list[dict[str, str]]]) -> None:
    """Replace the file by one of these runs, each of which says how many rows it has and what they come to."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for rows in runs:
        rows = [_filled(row, rows[0]) for row in rows]
        sealed = {"rows": str(len(rows)), "digest": _digest(rows)}
        first, *rest = ({**row, **sealed} for row in rows)
        writer.writerow(first)
        same = dict.fromkeys((name for name in ONCE if all(row[name] == first[name] for row in rest)), "")
        writer.writerows({**row, **same} for row in rest)
    atomic_write(path, text.getvalue().encode(), locked=True)


# Running


def load_or_run(
    path: str | Path,
    configs: Sequence[Config],
    run: Run | None = None,
    *,
    workers: int = 1,
    backend: str = "loky",
    client: Any = None,
    threads: int = 1,
    experiment: str | None = None,
    command: str = "",
    progress: bool = False,
) -> pd.DataFrame:
    """The rows of all ``configs``: stored ones are loaded, the others are run and stored as each of them finishes.

    path : the results file, a CSV; predictions go to the folder ``<stem>.predictions`` beside it
    run : config -> rows, each with at least ``metric`` and ``value`` and any other of `COLUMNS`, or `Rows`; default
        `train_and_score`
    workers : processes; 1 runs here. With ``backend="dask"`` the runs go to ``client``, or to a local cluster of so
        many processes; other backends are joblib's
    threads : torch threads in each worker
    experiment : what the rows belong to; default the file's stem
    command : what a reader types to fill this file; it is stored with every row

    Interrupted or killed, it goes on where it was when called again. Several processes that fill one file share its
    runs: each is done by one of them, and by another one if that one dies. A run that raises does not stop the others:
    what finished is stored, then RuntimeError names the failed ones. Raises ValueError
    for a results file of another schema or experiment, OSError when the disk is full; what was stored stays.
    """
    path = Path(PATH("path", path))
    Maybe(Function("a function config -> rows"))("run", run)
    Whole(1)("workers", workers)
    OneOf("loky", "multiprocessing", "threading", "sequential", "dask")("backend", backend)
    Whole(1)("threads", threads)
    Maybe(Text)("experiment", experiment)
    Text("command", command)
    Flag()("progress", progress)
    run = run or train_and_score
    experiment = experiment or path.stem
    if "\n" in command or "\n" in experiment:
        raise ValueError("command, experiment: expected a single line")
    keys = _keys(configs)
    stored = _read(path)
    others = sorted({row["experiment"] for key in stored for row in stored[key]} - {experiment})
    if others:
        raise ValueError(
            f"{path.name}: expected rows of the experiment {experiment!r}, got rows of {others}; give this experiment "
            f"a file of its own"
        )
    by_key = {config_hash(config): config for config in configs}
    todo = {key: config for key, config in by_key.items() if key not in stored}
    facts = {"experiment": experiment, "command": command, "commit": _commit()}
    failed: dict[str, str] = {}
    total = len(todo)
    with _Claims(path, todo) as claims, _bar(total, progress) as bar:
        while todo:
            with contextlib.closing(_run_all(claims, run, workers, backend, client, threads)) as results:
                for key, rows, arrays, trace in results:
                    if trace is None:
                        try:
                            if not rows:
                                raise ValueError("run: expected at least one row, got none")
                            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                            common = {**facts, "date": now}
                            _append(path, key, [_complete(row, key, by_key[key], common) for row in rows], arrays)
                        except (TypeError, ValueError) as error:
                            trace = f"{type(error).__name__}: {error}"
                    if trace is not None:
                        failed[key] = trace
                    claims.drop(key)
                    bar.update(total - len(todo) - bar.n)
            claims.wait()
    if failed:
        key, trace = next(iter(failed.items()))
        raise RuntimeError(
            f"{len(failed)} of {total} runs failed, the others are stored in {path.name}. The first, {key}, was "
            f"{_canonical(by_key[key])}:\n{trace}"
        )
    done = _read(path)
    return _frame([row for key in keys for row in done[key]])


class _Claims:
    """The runs of ``todo`` that this process takes: each by a lock beside the results file, which keeps others off it.

    Iterating takes them one by one and passes over those that other processes have; `wait` before the next pass, which
    finds them stored or given back. The system gives back a process's locks when it dies, however it does. What is
    stored meanwhile leaves ``todo``.
    """

    def __init__(self, path: Path, todo: dict[str, Config]):
        self.path, self.todo = path, todo
        self.held: dict[str, Any] = {}
        self.error: Exception | None = None

    def __enter__(self) -> _Claims:
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
        if key in _read(self.path):  # another process was faster
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


def _run_all(
    todo: Iterable[tuple[str, Config]], run: Run, workers: int, backend: str, client: Any, threads: int
) -> Generator[Done, None, None]:
    """Each finished run as soon as it is: its key, rows and predictions, or the traceback."""
    todo = iter(todo)
    first = next(todo, None)
    if first is None:
        return
    todo = itertools.chain([first], todo)
    if workers == 1 and backend != "dask":
        for key, config in todo:
            yield _run_one(run, key, config, threads)
        return
    import joblib

    options: dict[str, Any] = {}
    cluster: Any = None
    if backend == "dask":
        import distributed

        if client is None:
            cluster = distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                silence_logs=logging.ERROR,
            )
            client = distributed.Client(cluster, set_as_default=False)
        options["client"] = client
    elif backend == "loky":
        options["inner_max_num_threads"] = threads
    try:
        with joblib.parallel_config(backend=backend, n_jobs=workers, **options):
            # a run is taken when a worker is free for it: what waits here, another process may do
            parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
            yield from parallel(joblib.delayed(_run_one)(run, key, config, threads) for key, config in todo)
    finally:
        if cluster is not None:
            client.close()
            cluster.close()


def _run_one(run: Run, key: str, config: Config, threads: int) -> Done:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = run(dict(config))
        arrays = {name: np.asarray(array) for name, array in getattr(rows, "predictions", {}).items()}
        here = {"torch": torch.__version__, "mmlib": _version(), "device": _cpu("cpu"), "kernels": _kernels()}
        return key, [{**here, **row} for row in rows], arrays, None
    except Exception:
        return key, [], {}, traceback.format_exc()
    finally:
        torch.set_num_threads(before)


def _complete(row: Mapping[str, Any], key: str, config: Config, facts: Mapping[str, str]) -> dict[str, str]:
    """One row with every column, as text: numbers in full precision, no folder and no line break anywhere."""
    if unknown := [name for name in row if name not in COLUMNS]:
        raise ValueError(f"run: expected rows with columns of {COLUMNS}, got {unknown}")
    if lacking := [name for name in ("metric", "value") if name not in row]:
        raise ValueError(f"run: expected rows with metric and value, one lacks {lacking}")
    known = {k: config.get(k, "") for k in ("method", "backbone", "data", "seed", "profile")}
    whole = {**known, **row, **facts, "config_hash": key, "config": _canonical(config)}
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


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="run", disable=not progress or not total)


def _kernels() -> str:
    """What decides which kernels compute here, and so a training's numbers: "AVX2 AuthenticAMD 25/1" (family, model).

    PyTorch's, oneDNN's and MKL's own variables choose others; where they are set they are part of it.
    """
    parts = [torch.backends.cpu.get_cpu_capability(), *_processor()]
    variables = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
    return " ".join(filter(None, [*parts, *(f"{k}={os.environ[k]}" for k in variables if os.environ.get(k))]))


@functools.cache
def _processor() -> list[str]:
    """The CPU's vendor, family and model, as far as the system says."""
    about: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            about.setdefault(name.strip(), value.strip())
    if "vendor_id" not in about:
        return [" ".join((platform.processor() or platform.machine()).split())]
    return [about["vendor_id"], "/".join(about[k] for k in ("cpu family", "model") if k in about)]


def _version() -> str:
    from . import __version__

    return __version__


@functools.cache
def _commit() -> str:
    """The git commit of this code, with a + where it was changed since; empty outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        ask = lambda *words: subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        return ask("rev-parse", "--short=12", "HEAD") + ("+" if ask("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


# The general runner


def _generic(data: MultimodalDataset, options: Mapping[str, Any]) -> Any:
    from .backbones import GenericBackbone

    return GenericBackbone.for_data(data, **options)


def _mmin(data: MultimodalDataset, options: Mapping[str, Any]) -> Any:
    from .backbones import MMINBackbone

    return MMINBackbone.for_data(data, **options)


def _avmnist(data: MultimodalDataset, options: Mapping[str, Any]) -> Any:
    from .backbones import AVMNISTBackbone, AVMNISTConfig

    return AVMNISTBackbone(AVMNISTConfig(modalities=data.modalities, outputs=data.info["outputs"], **options))


def _sequences(name: str) -> Callable[[MultimodalDataset, Mapping[str, Any]], Any]:
    """The builder of a net that finds its configuration in the data."""

    def build(data: MultimodalDataset, options: Mapping[str, Any]) -> Any:
        from . import backbones

        return getattr(backbones, name).for_data(data, **options)

    return build


@dataclass(frozen=True)
class Setting:
    """What a method may need besides its backbone: the splits as they are trained and selected on, and the budget."""

    config: Config  # the run's, with every entry
    train: MultimodalDataset
    valid: MultimodalDataset | None
    training: TrainConfig


def _joint(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from .methods import JointTraining

    return JointTraining(backbone, **options)


def _balm(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    """BALM or a variant of it on any backbone; ``variant``, ``reading`` and the fields of BALMConfig as options."""
    from .methods import BALM

    return BALM(backbone, setting.train.feature_shapes, **options)


def _cggm(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from .methods import CGGM

    return CGGM(backbone, feature_shapes=setting.train.feature_shapes, **options)


def _ogm_ge(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from .methods import OGMGE

    if setting.train.info["task"] != "classification":
        raise ValueError("method: expected classes for 'ogm_ge', which compares their probabilities, got scores")
    return OGMGE(backbone, **options)


def _mbt_sample(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from .methods import MBTSample

    return MBTSample(backbone, **options)


def _pmr(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from .methods import PMR

    if setting.train.info["task"] != "classification":
        raise ValueError("method: expected classes for 'pmr', whose prototypes are class means, got scores")
    return PMR(backbone, setting.train.info["outputs"], **options)


def _mce(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    """MCE; the frozen models of its upper bounds get the run's own backbone, split, settings and seed.

    ``upper_bounds`` among the options: the frozen models learn from what the training split has of each modality, for
    as many epochs as the run ("epochs", default) or as many optimizer steps ("steps"), or from the complete split
    ("complete"). With "epochs", a rare modality's model takes few steps and its bound is low.
    """
    from .methods import MCE

    options = dict(options)
    what = options.pop("upper_bounds", "epochs")
    if what not in ("epochs", "steps", "complete"):
        raise ValueError(f"upper_bounds: expected 'epochs', 'steps' or 'complete', got {what!r}")
    upper = None
    if options.get("state_factor", True) and options.get("upper_source", "frozen") == "frozen":
        config = {k: v for k, v in setting.config.items() if k not in ("method", "method_options", "test", "progress")}
        upper = copy.deepcopy(_upper_bounds(json.dumps(config, sort_keys=True), what, _Hidden(setting)))
    return MCE(backbone, upper, **options)


def _dream(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    """DREAM; its evaluator is a backbone that is trained first, on the run's own split, with its settings and seed.

    Among the options: ``evaluator``, a name of `BACKBONES` (default the run's backbone), ``evaluator_options``,
    ``evaluator_epochs`` (default the run's) and ``evaluator_dropout``, the modality dropout of its training. Self-MM on
    scores follows its own rule for pseudo-labels where that is 0. Contributions to a training split that is masked once
    are computed once.
    """
    from .methods import DREAM

    options, given = dict(options), setting.config
    name = options.pop("evaluator", None)
    asked = {
        "evaluator": name or given["backbone"],
        "evaluator_options": options.pop("evaluator_options", {} if name else given["backbone_options"]),
        "evaluator_epochs": options.pop("evaluator_epochs", None),
        "evaluator_dropout": options.pop("evaluator_dropout", 0.0),
    }
    if asked["evaluator"] not in BACKBONES:
        raise ValueError(f"evaluator: expected one of {sorted(BACKBONES)}, got {asked['evaluator']!r}")
    left_out = ("method", "method_options", "test", "progress", "backbone", "backbone_options")
    config = {**{k: v for k, v in given.items() if k not in left_out}, **asked}
    evaluator = copy.deepcopy(_evaluator(json.dumps(config, sort_keys=True), _Hidden(setting)))
    model = DREAM.for_data(evaluator, setting.train, **options).to(next(evaluator.parameters()).device)
    plan = _plan(given["train_plan"], given["seed"])
    if plan is None or not plan.resample:
        model.precompute(setting.train)
    return model


def _dear(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    """DEAR, a whole model: the backbone has no part in it.

    Among the options: ``text_encoder``, a `transformers` checkpoint, which data with token ids need
    (``data_options={"text": "ids"}``): a folder below ``data_root`` or the environment variable ``MMLIB_DATA``, or a
    name.
    """
    from .methods import DEAR

    options = dict(options)
    checkpoint, encoder = options.pop("text_encoder", None), None
    if checkpoint is not None:
        roots = [setting.config["data_root"], os.environ.get("MMLIB_DATA")]
        places = [Path(root).expanduser() / checkpoint for root in roots if root]
        place = next((str(p) for p in places if p.is_dir()), str(checkpoint))
        encoder = copy.deepcopy(_text_encoder(place))
    return DEAR.for_data(setting.train, encoder, **options)


@functools.lru_cache(maxsize=1)
def _text_encoder(checkpoint: str) -> Any:
    from .data.text import load_encoder

    return load_encoder(checkpoint)


class _Hidden:
    """Carries a value past `lru_cache`, whose keys it leaves alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=4)
def _upper_bounds(config: str, what: str, hidden: _Hidden) -> Any:
    """A worker's last upper bounds, since the variants of a method share them."""
    from .methods import JointTraining
    from .methods.mce import UpperBounds

    setting: Setting = hidden.value
    given = setting.config
    train, valid, training = setting.train, setting.valid, setting.training
    if what == "steps" and training.steps is None:
        each = math.ceil(len(train) / (training.batch_size * training.accumulation))
        training = replace(training, steps=training.epochs * each)
    splits = _splits(given["data"], given["data_root"], json.dumps(given["data_options"], sort_keys=True))
    whole = splits["train"].select(train.modalities)
    if what == "complete":
        train, valid = whole, None if valid is None else splits["valid"].select(train.modalities)
    models = {}
    for name in train.modalities:
        own = _with_any(train.select([name]))[0]
        own_valid = None if valid is None else _with_any(valid.select([name]))[0]
        with random_state(training.seed):
            model = JointTraining(BACKBONES[given["backbone"]](own, given["backbone_options"]))
        fit(model, own, own_valid, training)
        models[name] = model
    return UpperBounds.from_models(models, whole)  # a plan that resamples may show any of it; `present` cuts the rest


@functools.lru_cache(maxsize=4)
def _evaluator(config: str, hidden: _Hidden) -> Any:
    """A worker's last evaluators, since the variants of DREAM share them."""
    from .backbones import SelfMMEvaluator, SelfMMTraining
    from .methods import JointTraining

    setting: Setting = hidden.value
    asked = json.loads(config)
    splits = _splits(asked["data"], asked["data_root"], json.dumps(asked["data_options"], sort_keys=True))
    train = _with_any(splits["train"].select(setting.train.modalities))[0]  # the plan masks it, as it does for DREAM
    plan = _plan(asked["train_plan"], asked["seed"])
    training, epochs = setting.training, asked["evaluator_epochs"]
    training = training if epochs is None else replace(training, epochs=epochs, steps=None)
    with random_state(training.seed):
        net = BACKBONES[asked["evaluator"]](train, asked["evaluator_options"])
        scores = train.target is not None and train.target.is_floating_point()
        method = (
            SelfMMTraining(net, train)
            if isinstance(net, SelfMMEvaluator) and scores and not asked["evaluator_dropout"]
            else JointTraining(net, asked["evaluator_dropout"])
        )
    fit(method, train, setting.valid, training, train_plan=plan)
    return net.eval()


BACKBONES: dict[str, Callable[[MultimodalDataset, Mapping[str, Any]], Any]] = {
    "generic": _generic,
    "avmnist": _avmnist,
    "mmin": _mmin,
    "table3": _sequences("Table3Evaluator"),
    "corrkd": _sequences("CorrKDEvaluator"),
    "selfmm": _sequences("SelfMMEvaluator"),
    "mlp": _sequences("MLPEvaluator"),
    "cubemlp": _sequences("CubeMLPBackbone"),
    "mmgcn": _sequences("MMGCNBackbone"),
    "mmdfn": _sequences("MMDFNBackbone"),
    "gcnet": _sequences("GCNetBackbone"),
}
METHODS: dict[str, Callable[[Any, Setting, Mapping[str, Any]], Any]] = {
    "balm": _balm,
    "cggm": _cggm,
    "dear": _dear,
    "dream": _dream,
    "joint": _joint,
    "mbt_sample": _mbt_sample,
    "mce": _mce,
    "ogm_ge": _ogm_ge,
    "pmr": _pmr,
}

WHOLE = ("dear",)  # methods that are whole models; a config's backbone is not built for them

DEFAULTS: Config = {
    "data": "digits",
    "data_root": None,
    "data_options": {},
    "modalities": None,  # these alone, in this order
    "backbone": "generic",
    "backbone_options": {},
    "method": "joint",
    "method_options": {},
    "train_plan": None,  # MissingPlan.from_dict; without a seed, the run's
    "valid_plan": "train",  # another plan, None for all that is there, or "train": the train plan, on these samples
    "test": "complete",  # "complete", "subsets", {name: plan or list of modalities}, or a list of these
    "train": {},  # fields of TrainConfig
    "seed": 0,
    "profile": "quick",
    "device": "auto",
    "progress": False,
}


def train_and_score(config: Config) -> Rows:
    """Train one method on one data set and score it under the test conditions: the entries of a config are `DEFAULTS`.

    Weights, order and dropout follow ``seed``; selection is on validation, its metric is the row with test "valid".
    Rows: per condition ``accuracy`` for classes, or the metrics of `metrics.msa_scores` for scores or of
    `metrics.multilabel_scores` for bool labels, over the n samples of which the condition leaves something; seconds of
    training; peak memory of the process, or of the GPU.

    Of dialogues the samples are the real utterances: n counts them, classes have ``weighted_f1`` besides, predictions
    and target are stored for them alone, dialogue by dialogue, and ``ids`` says whose each is.

    test : "complete" (what is there), "subsets" (every non-empty subset of the modalities, named "image+audio"), a dict
        from names to plans or lists of modalities, or a list of these

    Raises ValueError for an unknown entry or name, listing the known ones.
    """
    check_known("config", Named(Is("an entry", object), 0)("config", config), sorted(DEFAULTS), "entries")
    given = {**DEFAULTS, **config}
    for name in ("train", "data_options", "backbone_options"):
        Named(Is("an option", object), 0)(name, given[name])
    for name, known in (("backbone", BACKBONES), ("method", METHODS)):
        if given[name] not in known:
            raise ValueError(f"{name}: expected one of {sorted(known)}, got {given[name]!r}")
    settings = {"seed": given["seed"], "device": given["device"], "progress": given["progress"], **given["train"]}
    if unknown := sorted(set(settings) - set(TrainConfig.__dataclass_fields__)):
        raise ValueError(f"train: unknown settings {unknown}; known are {sorted(TrainConfig.__dataclass_fields__)}")
    training = TrainConfig(**settings)

    splits = _splits(given["data"], given["data_root"], json.dumps(given["data_options"], sort_keys=True))
    splits = {name: split for name, split in splits.items() if split is not None}
    if given["modalities"] is not None:
        splits = {name: _with_any(split.select(given["modalities"]))[0] for name, split in splits.items()}
    train, valid, test = splits["train"], splits.get("valid"), splits["test"]
    train_plan = _plan(given["train_plan"], given["seed"])
    valid_plan = train_plan if given["valid_plan"] == "train" else _plan(given["valid_plan"], given["seed"])
    if valid is not None and valid_plan is not None:
        valid = valid_plan.draw(valid, epoch=0 if valid_plan.resample else None).apply(valid)
    masked, mask = train, "-"
    if train_plan is not None:
        drawn = train_plan.draw(train, epoch=1 if train_plan.resample else None)
        masked, mask = drawn.apply(train), drawn.fingerprint

    with random_state(given["seed"]), _Memory() as memory:
        backbone = None
        if given["method"] not in WHOLE:
            backbone = BACKBONES[given["backbone"]](train, given["backbone_options"])
        setting = Setting(given, masked, valid, training)
        method = METHODS[given["method"]](backbone, setting, given["method_options"])
        history = fit(method, train, valid, training, train_plan=train_plan)
    common: dict[str, Any] = {
        **{name: given[name] for name in ("method", "backbone", "data", "seed", "profile")},
        "data_hash": hashlib.sha256(
            "".join(str(splits[k].info.get("fingerprint")) for k in sorted(splits)).encode()
        ).hexdigest()[:12],
        "seconds": round(history.seconds, 3),
        "peak_memory_mb": None if math.isnan(memory.peak_mb) else round(memory.peak_mb),
        "device": _device(method),
    }
    rows, kept = Rows(), {}
    if history.best_epoch is not None and valid is not None:
        chosen = history.epochs[history.best_epoch - 1 if training.select == "best" else -1]
        for metric in ("accuracy", "weighted_f1", "mae", "macro_f1"):
            if f"valid_{metric}" in chosen:
                score = {"metric": metric, "value": chosen[f"valid_{metric}"], "n": int(_samples(valid).sum())}
                rows.append({**common, "test": "valid", "mask_hash": f"{mask[:12]}/-", **score})
    for name, condition, fingerprint in _conditions(given["test"], test, given["seed"]):
        scored, places = _with_any(condition)
        logits = predict(method, scored)
        count = int((_samples(scored) & scored.present.cpu().any(-1)).sum())
        for metric, value in _scores(logits, scored).items():
            masks = {"test": name, "mask_hash": f"{mask[:12]}/{fingerprint[:12]}"}
            rows.append({**common, **masks, "metric": metric, "value": value, "n": count})
        kept[name] = _compact(logits, scored, test, places)
    assert test.target is not None
    samples = _samples(test)
    target = test.target.cpu()[samples].numpy()
    kept["target"] = target.astype(np.float32 if test.target.is_floating_point() else np.int16)
    ids = test.ids.cpu()
    kept["ids"] = ids.reshape(*ids.shape, *[1] * (samples.ndim - ids.ndim)).expand(samples.shape)[samples].numpy()
    rows.predictions = kept
    return rows


@functools.lru_cache(maxsize=2)
def _splits(name: str, root: str | None, options: str) -> dict[str, MultimodalDataset]:
    """A worker's data sets, read once."""
    from . import data

    return data.load(name, root or None, **json.loads(options))


def _plan(given: Any, seed: int) -> MissingPlan | None:
    from .missing import MissingPlan

    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"plan: expected None or a dict for MissingPlan.from_dict, got {given!r}")
    return MissingPlan.from_dict({"seed": seed, **given})


def subsets(modalities: Sequence[str]) -> dict[str, list[str]]:
    """Every non-empty subset of the modalities by its name, such as "image+audio"; all of them last."""
    found = {}
    for size in range(1, len(Several(Text, 1)("modalities", modalities)) + 1):
        for names in itertools.combinations(modalities, size):
            found["+".join(names)] = list(names)
    return found


def _conditions(asked: Any, test: MultimodalDataset, seed: int) -> Iterator[tuple[str, MultimodalDataset, str]]:
    """(name, test split under the condition, mask fingerprint or "-") of each test condition."""
    if isinstance(asked, (list, tuple)):
        for one in asked:
            yield from _conditions(one, test, seed)
    elif asked == "complete":
        yield "complete", test, "-"
    elif asked == "subsets":
        yield from _conditions(subsets(test.modalities), test, seed)
    elif isinstance(asked, Mapping):
        for name, what in asked.items():
            if name in ("valid", "target", "ids"):
                raise ValueError(f"test: expected another name than {name!r}, which the results use themselves")
            if isinstance(what, Mapping):
                plan = _plan(what, seed)
                assert plan is not None
                drawn = plan.draw(test, epoch=0 if plan.resample else None)
                yield name, drawn.apply(test), drawn.fingerprint
            elif isinstance(what, (list, tuple)):
                on = torch.zeros(len(test.modalities), dtype=torch.bool, device=test.device)
                for modality in what:
                    on[test.data.index(modality)] = True
                yield name, test.drop(present=on), "-"
            else:
                raise ValueError(f"test[{name!r}]: expected a plan or a list of modalities, got {what!r}")
    else:
        raise ValueError(f"test: expected 'complete', 'subsets', a dict or a list of these, got {asked!r}")


def _with_any(data: MultimodalDataset) -> tuple[MultimodalDataset, torch.Tensor]:
    """The samples of which something is there, and their places."""
    there = data.present.flatten(1).any(-1)
    places = there.nonzero()[:, 0]
    if len(places) == 0:
        raise ValueError("data: expected samples of which a modality is there, got none")
    return (data if len(places) == len(data) else data.subset(places)), places.cpu()


def _samples(data: MultimodalDataset) -> torch.Tensor:
    """bool [*N]: what counts as a sample: all but the padding of dialogues."""
    real = data.data.extras.get("utterance")
    return torch.ones(data.data.shape, dtype=torch.bool) if real is None else real.cpu()


def _scores(logits: torch.Tensor, data: MultimodalDataset) -> dict[str, float]:
    """The metrics of the samples of which something is there; padding and empty utterances do not count."""
    assert data.target is not None
    counts = _samples(data) & data.present.cpu().any(-1)
    logits, target = logits[counts], data.target.cpu()[counts]
    if target.dtype == torch.bool:
        from .metrics import multilabel_scores

        return multilabel_scores(logits, target)
    if not target.is_floating_point():
        scores = {"accuracy": (logits.argmax(-1) == target).double().mean().item()}
        if counts.ndim > 1:
            from .metrics import classification_scores

            scores["weighted_f1"] = classification_scores(logits, target)["weighted_f1"]
        return scores
    from .metrics import msa_scores

    return msa_scores(logits[..., 0].numpy(), target.numpy(), scale=data.info.get("scale", "mosi"))


def _compact(
    logits: torch.Tensor, scored: MultimodalDataset, test: MultimodalDataset, places: torch.Tensor
) -> np.ndarray:
    """Predicted classes (labels 0 and 1) int16 or scores float32 of all test samples; -1 or NaN where nothing was."""
    assert test.target is not None
    if test.target.is_floating_point():
        found, empty = logits[..., 0].float(), math.nan
    elif test.target.dtype == torch.bool:
        found, empty = (logits > 0).to(torch.int16), -1
    else:
        found, empty = logits.argmax(-1).to(torch.int16), -1
    samples = _samples(test)
    whole = torch.full((*samples.shape, *found.shape[samples.ndim :]), empty, dtype=found.dtype)
    there = scored.present.cpu().any(-1)
    whole[places] = torch.where(there.reshape(*there.shape, *[1] * (found.ndim - there.ndim)), found, empty)
    return whole[samples].numpy()


def _device(method: torch.nn.Module) -> str:
    device = next(method.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu(device.type)


def _cpu(kind: str) -> str:
    threads = torch.get_num_threads()
    return f"{kind}, {threads} thread{'s' if threads > 1 else ''}"


class _Memory:
    """Peak memory inside the block: of the GPU where one is in use, else the resident memory of this process.

    Linux forgets the process's earlier peak; elsewhere it is the peak since the process began.
    """

    peak_mb = math.nan

    def __enter__(self) -> _Memory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
            self.peak_mb = torch.cuda.max_memory_allocated() / 2**20
            return
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.peak_mb = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
            return
        with contextlib.suppress(ImportError):
            import resource

            unit = 1 if platform.system() == "Darwin" else 1024
            self.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
