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
from mmlib.training import History, State, TrainConfig, fit, predict, random_state

from .results import Claims, Config, Results, append, canonical, complete, config_hash, frame_of, keys_of, read

if TYPE_CHECKING:
    import pandas as pd

    from mmlib.missing import MissingPlan

__all__ = ["CURVES", "Setting", "backbone_class", "load_or_run", "method_class", "subsets", "train_and_score"]

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

    path : the results file, a CSV; predictions go to an ``.npz`` of the same name beside it
    run : config -> rows, each with at least ``metric`` and ``value`` and any other of `COLUMNS`, or `Results`; default
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


@dataclass(frozen=True)
class Setting:
    """What a first stage may need: the run's config, the splits as they are trained and selected on, and the budget."""

    config: Config  # with every entry
    train: MultimodalDataset  # masked, as its first epoch is
    valid: MultimodalDataset | None
    training: TrainConfig
    plan: MissingPlan | None  # the train plan where it resamples; ``whole`` is what it masks
    whole: MultimodalDataset

    def fit(self, method: Any, training: TrainConfig | None = None, callbacks: Sequence[Any] = ()) -> Any:
        """`training.fit`: a mask that stays is drawn once, for all that this run trains."""
        train = self.train if self.plan is None else self.whole
        given = training or self.training
        return fit(method, train, self.valid, given, train_plan=self.plan, callbacks=callbacks)


def backbone_class(name: str) -> Any:
    """The class of `mmlib.backbones` with this name; ValueError, which lists them, where there is none."""
    from mmlib import backbones

    OneOf(*(n for n in backbones.__all__ if hasattr(getattr(backbones, n), "for_data")))("backbone", name)
    return getattr(backbones, name)


def method_class(name: str, own: Mapping[str, Any] | None = None) -> Any:
    """The class of `mmlib`'s methods and baselines, or of ``own``, with this name; ValueError for an unknown one."""
    from mmlib import baselines, methods

    known = {n: getattr(home, n) for home in (methods, baselines) for n in home.__all__} | dict(own or {})
    OneOf(*sorted(n for n, kind in known.items() if hasattr(kind, "for_data")))("method", name)
    return known[name]


def _build(setting: Setting, own: Mapping[str, Any] | None) -> Any:
    """The run's method, for its data.

    A first stage that runs share is not left to the method's own `for_data`: its options are part of the config, it is
    kept for the next run, and what it gave is passed in.
    """
    given, train = setting.config, setting.train
    kind, options = method_class(given["method"], own), dict(given["method_options"])
    if given["method"] == "DEAR":  # a whole model
        return kind.for_data(train, _encoder_for(setting, options), setting.valid, **options)
    backbone = backbone_class(given["backbone"]).for_data(train, **given["backbone_options"])
    if given["method"] == "DREAM":
        evaluator = _evaluator_for(setting, options)
        model = kind.for_data(train, evaluator, **options).to(next(evaluator.parameters()).device)
        if setting.plan is None:
            model.precompute(train)
        return model
    if given["method"] == "MCE":
        options["upper"] = _upper_for(setting, options)
    return kind.for_data(train, backbone, setting.valid, setting.training, **options)


def _upper_for(setting: Setting, options: dict[str, Any]) -> Any:
    """MCE's upper bounds; the frozen models behind them get the run's own backbone, split, settings and seed.

    ``upper_bounds`` among the options: the frozen models learn from what the training split has of each modality, for
    as many epochs as the run ("epochs", default) or as many optimizer steps ("steps"), or from the complete split
    ("complete"). With "epochs", a rare modality's model takes few steps and its bound is low. "crossfit" is "epochs"
    with a sample's value from models that have not seen it, by five folds.
    """
    what = OneOf("epochs", "steps", "complete", "crossfit")("upper_bounds", options.pop("upper_bounds", "epochs"))
    if not options.get("state_factor", True) or options.get("upper_source", "frozen") != "frozen":
        return None
    left_out = ("method", "method_options", "conditions", "progress")
    config = {k: v for k, v in setting.config.items() if k not in left_out}
    return copy.deepcopy(_upper_bounds(json.dumps(config, sort_keys=True), what, _Hidden(setting)))


def _evaluator_for(setting: Setting, options: dict[str, Any]) -> Any:
    """DREAM's evaluator: a backbone that is trained first, on the run's own split, with its settings and seed.

    Among the options: ``evaluator``, a class of `mmlib.backbones` (default the run's backbone), ``evaluator_options``,
    ``evaluator_epochs`` (default the run's) and ``evaluator_dropout``, the modality dropout of its training. Self-MM on
    scores follows its own rule for pseudo-labels where that is 0. Contributions to a training split that is masked once
    are computed once.
    """
    given = setting.config
    name = options.pop("evaluator", None)
    stage = {
        "evaluator": name or given["backbone"],
        "evaluator_options": options.pop("evaluator_options", {} if name else given["backbone_options"]),
        "evaluator_epochs": options.pop("evaluator_epochs", None),
        "evaluator_dropout": options.pop("evaluator_dropout", 0.0),
    }
    backbone_class(stage["evaluator"])
    left_out = ("method", "method_options", "conditions", "progress", "backbone", "backbone_options")
    config = {**{k: v for k, v in given.items() if k not in left_out}, **stage}
    return copy.deepcopy(_evaluator(json.dumps(config, sort_keys=True), _Hidden(setting)))


def _encoder_for(setting: Setting, options: dict[str, Any]) -> Any:
    """DEAR's text encoder, which data with token ids need (``data_options={"text": "ids"}``).

    ``text_encoder`` among the options: a `transformers` checkpoint, a folder below ``data_root`` or the environment
    variable ``MMLIB_DATA``, or a name.
    """
    checkpoint = options.pop("text_encoder", None)
    if checkpoint is None:
        return None
    roots = [setting.config["data_root"], os.environ.get("MMLIB_DATA")]
    places = [Path(root).expanduser() / checkpoint for root in roots if root]
    place = next((str(p) for p in places if p.is_dir()), str(checkpoint))
    return copy.deepcopy(_text_encoder(place))


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
    from mmlib.backbones.alone import fold_places, having, values_alone
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

    def trained(own: MultimodalDataset, held: MultimodalDataset | None) -> Any:
        with random_state(training.seed):
            model = JointTraining(backbone_class(given["backbone"]).for_data(own, **given["backbone_options"]))
        fit(model, own, held, training)
        return model

    models, table = {}, torch.zeros(len(train), len(train.modalities))
    for m, name in enumerate(train.modalities):
        own, held = train.select([name]), None if valid is None else _with_any(valid.select([name]))[0]
        if what != "crossfit":
            models[name] = trained(_with_any(own)[0], held)
            continue
        for learnt, valued in fold_places(having(train, name), 5, training.seed):
            model = trained(own.subset(learnt), held)
            table[valued, m] = values_alone(model, train.subset(valued), name, None, 0.5)
    if what == "crossfit":
        return UpperBounds(table, train.ids, train.modalities)
    return UpperBounds.from_models(models, whole)  # a plan that resamples may show any of it; `present` cuts the rest


@functools.lru_cache(maxsize=4)
def _evaluator(config: str, hidden: _Hidden) -> Any:
    """A worker's last evaluators, since the variants of DREAM share them."""
    from mmlib.backbones import SelfMMEvaluator, SelfMMTraining
    from mmlib.baselines import JointTraining

    setting: Setting = hidden.value
    given = json.loads(config)
    training, epochs, train = setting.training, given["evaluator_epochs"], setting.train
    training = training if epochs is None else replace(training, epochs=epochs, steps=None)
    with random_state(training.seed):
        net = backbone_class(given["evaluator"]).for_data(train, **given["evaluator_options"])
        scores = train.target is not None and train.target.is_floating_point()
        method = (
            SelfMMTraining(net, train)
            if isinstance(net, SelfMMEvaluator) and scores and not given["evaluator_dropout"]
            else JointTraining(net, given["evaluator_dropout"])
        )
    setting.fit(method, training)
    return net.eval()


CURVES = ("curve of training", "curve of validation")  # stored with a run's predictions, a number an epoch

DEFAULTS: Config = {
    "data": "digits",
    "data_root": None,
    "data_options": {},
    "modalities": None,  # these alone, in this order
    "backbone": "GenericBackbone",
    "backbone_options": {},
    "method": "JointTraining",
    "method_options": {},
    "train_plan": None,  # MissingPlan.from_dict; without a seed, the run's
    "valid_plan": "train",  # another plan, None for all that is there, or "train": the train plan, on these samples
    "conditions": "complete",  # "complete", "subsets", {name: plan or list of modalities}, or a list of these
    "last_epoch": False,  # True: every condition is also scored with the weights of the last epoch
    "train": {},  # fields of TrainConfig
    "seed": 0,
    "profile": "quick",
    "device": "auto",
    "progress": False,
}


def train_and_score(config: Config, own: Mapping[str, Any] | None = None) -> Results:
    """Train one method on one data set and score it under the test conditions: the entries of a config are `DEFAULTS`.

    Weights, order and dropout follow ``seed``; selection is on validation, whose metric is the result of the condition
    "valid". Results: per condition ``accuracy`` for classes, or the metrics of `metrics.msa_scores` for scores or of
    `metrics.multilabel_scores` for bool labels, over the n samples of which the condition leaves something; seconds of
    training; peak memory of the process, or of the GPU. With the predictions are stored the curves (`CURVES`).

    Of dialogues the samples are the real utterances: n counts them, classes have ``weighted_f1`` besides, predictions
    and target are stored for them alone, dialogue by dialogue, and ``ids`` says whose each is. With ``last_epoch`` the
    condition "same" has a second one, "same, last epoch": the same training without selection.

    own : classes of methods by name, besides those of `mmlib`
    conditions : "complete" (what is there), "subsets" (every non-empty subset of the modalities, named "image+audio"),
        a dict from names to plans or lists of modalities, or a list of these

    Raises ValueError for an unknown entry or name, listing the known ones.
    """
    check_known("config", Named(Is("an entry", object), 0)("config", config), sorted(DEFAULTS), "entries")
    given = {**DEFAULTS, **config}
    for name in ("train", "data_options", "backbone_options"):
        Named(Is("an option", object), 0)(name, given[name])
    backbone_class(given["backbone"])
    kind = method_class(given["method"], own)
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
        masked = drawn.apply(train, keep_complete=bool(getattr(kind, "needs_complete", False)))
        if len(train.modalities) == 1 and not train_plan.resample:
            masked, _ = _with_any(masked)  # a net of one modality learns from the samples that have it
        mask = drawn.fingerprint
    resampled = train_plan if train_plan is not None and train_plan.resample else None
    setting = Setting(given, masked, valid, training, resampled, train)

    with random_state(given["seed"]), _Memory() as memory:
        method, last = _build(setting, own), _LastEpoch()
        history = setting.fit(method, callbacks=[last] if given["last_epoch"] else [])
    common: dict[str, Any] = {
        **{name: given[name] for name in ("method", "backbone", "data", "seed", "profile")},
        "data_hash": hashlib.sha256(
            "".join(str(splits[k].info.get("fingerprint")) for k in sorted(splits)).encode()
        ).hexdigest()[:12],
        "seconds": round(history.seconds, 3),
        "peak_memory_mb": None if math.isnan(memory.peak_mb) else round(memory.peak_mb),
        "device": _device(method),
    }
    rows, kept = Results(), {}
    if history.best_epoch is not None and valid is not None:
        chosen = history.epochs[history.best_epoch - 1 if training.select == "best" else -1]
        for metric in ("accuracy", "weighted_f1", "mae", "macro_f1"):
            if f"valid_{metric}" in chosen:
                score = {"metric": metric, "value": chosen[f"valid_{metric}"], "n": int(_samples(valid).sum())}
                rows.append({**common, "condition": "valid", "mask_hash": f"{mask[:12]}/-", **score})
    chosen_epoch = [(*one, False) for one in _conditions(given["conditions"], test, given["seed"])]
    last_epoch = [(f"{name}, last epoch", data, mark, True) for name, data, mark, _ in chosen_epoch]
    tested = chosen_epoch + (last_epoch if given["last_epoch"] else [])
    for name, condition, fingerprint, at_end in tested:
        if at_end:
            method.load_state_dict(last.weights)
        scored, places = _with_any(condition)
        logits = predict(method, scored)
        count = int((_samples(scored) & scored.present.cpu().any(-1)).sum())
        for metric, value in _scores(logits, scored).items():
            masks = {"condition": name, "mask_hash": f"{mask[:12]}/{fingerprint[:12]}"}
            rows.append({**common, **masks, "metric": metric, "value": value, "n": count})
        kept[name] = _compact(logits, scored, test, places)
    assert test.target is not None
    samples = _samples(test)
    target = test.target.cpu()[samples].numpy()
    kept["target"] = target.astype(np.float32 if test.target.is_floating_point() else np.int16)
    ids = test.ids.cpu()
    kept["ids"] = ids.reshape(*ids.shape, *[1] * (samples.ndim - ids.ndim)).expand(samples.shape)[samples].numpy()
    rows.predictions = {**kept, **_curves(history, training.monitor)}
    return rows


class _LastEpoch:
    """A callback that keeps the weights of the last epoch, where training goes back to the best one's."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_epoch_end(self, state: State) -> None:
        self.weights = {name: value.clone() for name, value in state.method.state_dict().items()}


def _curves(history: History, monitor: str | None) -> dict[str, np.ndarray]:
    """The run's curves as `CURVES` names them, float32 [epochs]: the training loss, and the metric that selects."""
    names = {name for epoch in history.epochs for name in epoch}
    chosen = next((f"valid_{m}" for m in (monitor, "accuracy", "mae", "macro_f1") if f"valid_{m}" in names), None)
    return {
        kept: np.array([epoch.get(name, math.nan) for epoch in history.epochs], np.float32)
        for kept, name in zip(CURVES, ("train_loss", chosen), strict=True)
        if name in names
    }


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


def _conditions(given: Any, test: MultimodalDataset, seed: int) -> Iterator[tuple[str, MultimodalDataset, str]]:
    """(name, test split under the condition, mask fingerprint or "-") of each test condition."""
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _conditions(one, test, seed)
    elif given == "complete":
        yield "complete", test, "-"
    elif given == "subsets":
        yield from _conditions(subsets(test.modalities), test, seed)
    elif isinstance(given, Mapping):
        for name, what in given.items():
            if name in ("valid", "target", "ids", *CURVES):
                raise ValueError(f"conditions: expected another name than {name!r}, which the results use themselves")
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
                raise ValueError(f"conditions[{name!r}]: expected a plan or a list of modalities, got {what!r}")
    else:
        raise ValueError(f"conditions: expected 'complete', 'subsets', a dict or a list of these, got {given!r}")


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
