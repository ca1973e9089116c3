"""A run and a sweep: `train_and_score` does one, `load_or_run` a grid of them, and none is ever run twice.

`load_or_run` loads what the results file has and runs the rest, here, in several processes, or on a Dask cluster; every
finished run is stored at once (`book.support.results`).
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import subprocess
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmlib.batch import MultimodalDataset
from mmlib.checks import PATH, Flag, Function, Is, Maybe, Named, OneOf, Several, Text, Whole, check_known
from mmlib.training import TrainConfig, fit, predict, random_state

from .results import Claims, Config, Rows, append, canonical, complete, config_hash, frame_of, keys_of, read

if TYPE_CHECKING:
    import pandas as pd

    from mmlib.missing import MissingPlan

__all__ = ["BACKBONES", "METHODS", "load_or_run", "subsets", "train_and_score"]

Run = Callable[[Config], list[dict[str, Any]]]
Done = tuple[str, list[dict[str, Any]], dict[str, np.ndarray], str | None]  # key, rows, predictions, traceback


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
    keys = keys_of(configs)
    stored = read(path)
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
    with Claims(path, todo) as claims, _bar(total, progress) as bar:
        while todo:
            with contextlib.closing(_run_all(claims, run, workers, backend, client, threads)) as results:
                for key, rows, arrays, trace in results:
                    if trace is None:
                        try:
                            if not rows:
                                raise ValueError("run: expected at least one row, got none")
                            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                            common = {**facts, "date": now}
                            append(path, key, [complete(row, key, by_key[key], common) for row in rows], arrays)
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
            f"{canonical(by_key[key])}:\n{trace}"
        )
    done = read(path)
    return frame_of([row for key in keys for row in done[key]])


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
    from mmlib import __version__

    return __version__


@functools.cache
def _commit() -> str:
    """The git commit of this code, with a + where it was changed since; empty outside a repository."""
    folder = Path(__file__).resolve().parents[2]
    try:
        ask = lambda *words: subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        changed = ask("status", "--porcelain", "--", "mmlib", "book/support", "book/studies")
        return ask("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


# The general runner


def _generic(data: MultimodalDataset, options: Mapping[str, Any]) -> Any:
    from mmlib.backbones import GenericBackbone

    return GenericBackbone.for_data(data, **options)


def _mmin(data: MultimodalDataset, options: Mapping[str, Any]) -> Any:
    from mmlib.backbones import MMINBackbone

    return MMINBackbone.for_data(data, **options)


def _avmnist(data: MultimodalDataset, options: Mapping[str, Any]) -> Any:
    from mmlib.backbones import AVMNISTBackbone, AVMNISTConfig

    return AVMNISTBackbone(AVMNISTConfig(modalities=data.modalities, outputs=data.info["outputs"], **options))


def _sequences(name: str) -> Callable[[MultimodalDataset, Mapping[str, Any]], Any]:
    """The builder of a net that finds its configuration in the data."""

    def build(data: MultimodalDataset, options: Mapping[str, Any]) -> Any:
        from mmlib import backbones

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
    from mmlib.baselines import JointTraining

    return JointTraining(backbone, **options)


def _balm(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    """BALM or a variant of it on any backbone; ``variant``, ``reading`` and the fields of BALMConfig as options."""
    from mmlib.methods import BALM

    return BALM(backbone, setting.train.feature_shapes, **options)


def _cggm(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from mmlib.baselines import CGGM

    return CGGM(backbone, feature_shapes=setting.train.feature_shapes, **options)


def _ogm_ge(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from mmlib.baselines import OGMGE

    if setting.train.info["task"] != "classification":
        raise ValueError("method: expected classes for 'ogm_ge', which compares their probabilities, got scores")
    return OGMGE(backbone, **options)


def _mbt_sample(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from mmlib.baselines import MBTSample

    return MBTSample(backbone, **options)


def _pmr(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    from mmlib.baselines import PMR

    if setting.train.info["task"] != "classification":
        raise ValueError("method: expected classes for 'pmr', whose prototypes are class means, got scores")
    return PMR(backbone, setting.train.info["outputs"], **options)


def _mce(backbone: Any, setting: Setting, options: Mapping[str, Any]) -> Any:
    """MCE; the frozen models of its upper bounds get the run's own backbone, split, settings and seed.

    ``upper_bounds`` among the options: the frozen models learn from what the training split has of each modality, for
    as many epochs as the run ("epochs", default) or as many optimizer steps ("steps"), or from the complete split
    ("complete"). With "epochs", a rare modality's model takes few steps and its bound is low.
    """
    from mmlib.methods import MCE

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
    from mmlib.methods import DREAM

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
    from mmlib.methods import DEAR

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
    from mmlib.data.text import load_encoder

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
    from mmlib.baselines import JointTraining
    from mmlib.methods.mce import UpperBounds

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
    from mmlib.backbones import SelfMMEvaluator, SelfMMTraining
    from mmlib.baselines import JointTraining

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
    from mmlib import data

    return data.load(name, root or None, **json.loads(options))


def _plan(given: Any, seed: int) -> MissingPlan | None:
    from mmlib.missing import MissingPlan

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
        from mmlib.metrics import multilabel_scores

        return multilabel_scores(logits, target)
    if not target.is_floating_point():
        scores = {"accuracy": (logits.argmax(-1) == target).double().mean().item()}
        if counts.ndim > 1:
            from mmlib.metrics import classification_scores

            scores["weighted_f1"] = classification_scores(logits, target)["weighted_f1"]
        return scores
    from mmlib.metrics import msa_scores

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
