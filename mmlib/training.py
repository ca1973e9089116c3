"""One visible loop for every method, on Hugging Face accelerate; weights in and out; predictions with parts missing.

A method is an ``nn.Module`` with ``forward(batch) -> Output(logits, losses)``; the objective is the sum of ``losses``.
`fit` is the loop, top to bottom; what follows it in this file is what the loop calls. What a paper does besides its
loss (gradient rebalancing, a curriculum, statistics) is a *callback*: any object with some of the methods

    on_start  on_epoch_start  on_batch  on_backward  on_step  on_epoch_end  on_end        (each takes the State)

and, where it has a state to be checkpointed, ``state_dict`` and ``load_state_dict``. The method itself takes part as
the first callback, where it defines any of these. A method with the attribute ``needs_complete = True`` finds what a
plan dropped in ``batch.complete``, in training alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ._prediction import class_names, modalities_of, predict
from .batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, Output
from .checkpoint import MARKS, Best, Checkpoint, load, plain_config, save, set_random_state, take_random_state
from .checks import (
    PATH,
    RATE,
    Array,
    Either,
    Flag,
    Function,
    Is,
    Maybe,
    Number,
    OneOf,
    Several,
    Text,
    Whole,
    check_options,
    option,
)

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator

    from .missing import MissingPlan

__all__ = [
    "History",
    "State",
    "TrainConfig",
    "class_names",
    "fit",
    "load",
    "predict",
    "random_state",
    "save",
    "validation_scores",
]

Scores = Callable[[Tensor, MultimodalBatch], Mapping[str, float]]
Schedule = Callable[[torch.optim.Optimizer, int], Any]
SCHEDULES = ("cosine", "linear-warmup-cosine", "onecycle", "step")
STEP_AT = (0.6, 0.8)  # the fractions of the training after which "step" takes a tenth of the learning rate
SEED = Whole(0, below=2**63)
MINIMISED = ("loss", "mae", "mse", "rmse")  # validation metrics of which less is better


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Everything that can change the numbers is here, in the data, in the method or in the callbacks."""

    epochs: int = option(30, Whole(1))
    batch_size: int = option(64, Whole(1))  # samples that go through the method at once, over all processes together
    lr: float = option(1e-3, Number(above=0))
    weight_decay: float = option(0.0, Number(0))
    # adam, adamw, sgd (momentum 0.9), or a function (parameters) -> optimizer
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] = option(
        "adam", Either(OneOf("adam", "adamw", "sgd"), Function("a function (parameters) -> optimizer"))
    )
    clip: float | None = option(None, Maybe(Number(above=0)))  # largest norm of the whole gradient
    accumulation: int = option(1, Whole(1))  # mini-batches per optimizer step
    # cosine, linear-warmup-cosine, onecycle, step (see STEP_AT), or a function (optimizer, steps) -> scheduler
    schedule: str | Schedule | None = option(
        None, Maybe(Either(OneOf(*SCHEDULES), Function("a function (optimizer, steps) -> scheduler")))
    )
    warmup: float = option(0.1, RATE)  # share of the steps that linear-warmup-cosine warms up
    patience: int | None = option(None, Maybe(Whole(1)))  # stop after so many epochs without a better metric
    # keep the weights of the "best" epoch by the monitored validation metric, or of the "last"
    select: str = option("best", OneOf("best", "last"))
    # validation metric; None: accuracy for classes, mae for scores, macro_f1 for labels
    monitor: str | None = option(None, Maybe(Text))
    seed: int = option(0, SEED)
    device: str = option("auto", OneOf("auto", "cpu", "cuda"))
    mixed_precision: str = option("no", OneOf("no", "bf16", "fp16"))
    compile: bool | str = option(False, Either(Flag(), Text))  # True for torch.compile's default backend, or its name
    progress: bool = option(False, Flag())
    # names that accelerate knows, "jsonl", or GeneralTracker objects
    trackers: tuple[Any, ...] = option((), Several(Is("a name or a GeneralTracker", object)))
    log_dir: str = option("runs", PATH)  # where trackers write
    steps: int | None = option(None, Maybe(Whole(1)))  # optimizer steps in all, instead of epochs
    # resident: whole tensors on the device; stream: a DataLoader; auto: by resident_limit
    loader: str = option("auto", OneOf("auto", "resident", "stream"))
    resident_limit: int = option(4 << 30, Whole(0))  # bytes of a split that may be moved onto the device as a whole
    loader_workers: int = option(0, Whole(0))  # processes of the DataLoader

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class History:
    """What a run did: one dict an epoch (1, 2, ...) with ``epoch``, ``step``, ``lr`` (at its end), ``seconds``,
    ``train_loss``, one ``train_<term>`` for each loss term (means over samples) and ``valid_<metric>``."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None  # the epoch with the best validation metric; None without validation
    seconds: float = 0.0

    def frame(self) -> pd.DataFrame:
        """The epochs as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.epochs)


@dataclass
class State:
    """What a callback sees, and may change: ``train`` in on_epoch_start (for that epoch), ``batch`` in on_batch, the
    gradients in on_backward, ``stop`` at any time."""

    method: nn.Module  # the method itself, not its wrappers
    optimizer: Any
    accelerator: Accelerator
    config: TrainConfig
    history: History
    train: MultimodalDataset  # the training split as it is trained on in this epoch
    epoch: int = 0  # 1 in the first epoch
    step: int = 0  # optimizer steps taken
    batch: MultimodalBatch | None = None  # this process's part of the mini-batch
    weight: float = 1.0  # of its mean loss; 0 where this process has no part of its own and repeats a sample
    output: Output | None = None
    stop: bool = False  # True ends the training after this epoch


def fit(
    method: nn.Module,
    train: MultimodalDataset,
    valid: MultimodalDataset | None = None,
    config: TrainConfig = TrainConfig(),
    *,
    train_plan: MissingPlan | None = None,
    callbacks: Sequence[Any] = (),
    checkpoint: str | Path | None = None,
    metrics: Scores | None = None,
) -> History:
    """Train ``method`` in place and return its history; it is left on the training device, in eval mode.

    train_plan : what the training split misses, drawn once, or anew every epoch where the plan resamples
    callbacks : called in order; ``on_batch`` before a forward pass, ``on_backward`` between the last backward pass and
        the optimizer step, when gradients are whole, unscaled and the same in every process, ``on_step`` after it
    checkpoint : a file that is rewritten after every epoch and resumed from where it exists. On the CPU a resumed run
        gives the numbers of an uninterrupted one, to the bit. It belongs to its configuration, data, plan, method and
        callbacks: to the settings of all their parts, the public attributes that hold numbers, strings, tuples of them
        or dataclasses, as far as training does not change them. With more epochs (or steps) a run goes on, also a
        finished one, unless the schedule depends on how many steps there are, or it ended within an epoch
    metrics : (logits, batch) -> dict of validation metrics; default `validation_scores`

    Each epoch is a seeded permutation and drops nothing. A mini-batch is split between the processes and its loss
    weighted by their shares, so the gradient is the one-process gradient wherever the loss is a mean over samples and
    samples do not meet (no batch normalisation); the library's methods gather what else they take from a mini-batch, or
    say that they support one process. The same holds for accumulation, but that statistics are those of a mini-batch.
    Every process trains, the main one validates and writes. The caller's random state (Python, NumPy, torch) is the
    same after the call as before.

    A method or callback may put another data set into ``state.train`` in ``on_epoch_start``, the same in every process;
    it holds for that epoch, and the next begins with the split again. ``epochs`` means that many passes over the
    *split* in optimizer steps: the schedule, and the end of training, count steps, so a method that lengthens its
    epochs has fewer of them and the same number of steps as any other method.

    Raises ValueError for what does not fit together or a checkpoint of another configuration, and FloatingPointError,
    naming epoch, step and loss term, when a loss or a weight is not finite; the last checkpoint stays as it was.
    """
    _check_call(method, train, valid, config, train_plan, callbacks, checkpoint, metrics)
    labels = train.target is not None and train.target.dtype == torch.bool
    usual = "macro_f1" if labels else "mae" if train.info.get("task") == "regression" else "accuracy"
    monitor = config.monitor or usual
    if valid is None and (config.select == "best" or config.patience is not None):
        raise ValueError(
            "valid: select='best' and patience need a validation split; pass one, or TrainConfig(select='last')"
        )
    if not any(p.requires_grad for p in method.parameters()):
        raise ValueError("method: expected at least one parameter that requires a gradient, got none")
    steps_per_epoch = math.ceil(len(train) / (config.batch_size * config.accumulation))
    epochs = config.epochs if config.steps is None else math.ceil(config.steps / steps_per_epoch)
    budget = config.steps or epochs * steps_per_epoch

    with random_state(config.seed), _accelerate(method, config) as accelerator:
        rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        optimizer = _optimizer(method, config)
        make_scheduler = lambda optimizer, steps: _scheduler(optimizer, config, steps)
        scheduler = make_scheduler(optimizer, budget)
        model, scaled_optimizer = accelerator.prepare(method, optimizer)
        # accelerate's wrapper searches the disk for optional packages at every step; only a gradient scaler needs it.
        take_step = optimizer.step if accelerator.scaler is None else scaled_optimizer.step
        keep_complete = bool(getattr(method, "needs_complete", False))
        data = _masked(train, train_plan, 1, keep_complete)
        resident = (
            config.loader != "stream"
            and not data.streamed
            and (config.loader == "resident" or data.device == device or _bytes(data.data) <= config.resident_limit)
        )
        data = data.to(device) if resident else data
        held_out = valid.to(device) if valid is not None and resident and not valid.streamed else valid

        state = State(method, optimizer, accelerator, config, History(), data)
        callers = [*([method] if any(hasattr(method, name) for name in _EVENTS) else []), *callbacks]
        call = lambda event: [getattr(callback, event)(state) for callback in callers if hasattr(callback, event)]
        saved = Checkpoint(checkpoint, state, make_scheduler, scheduler, budget, callbacks, monitor)
        if checkpoint is not None:
            saved.identify(train, valid, train_plan)
            saved.resume()
        call("on_start")
        saved.restore_random_state()
        best = saved.best
        bar = _progress(config, accelerator, epochs, state.epoch)

        while state.step < budget and not state.stop:
            started = time.perf_counter()
            state.epoch += 1
            if train_plan is not None and train_plan.resample and state.epoch > 1:
                data = _masked(train, train_plan, state.epoch, keep_complete)
                data = data.to(device) if resident else data
            state.train = data
            call("on_epoch_start")
            epoch_data = state.train.to(device) if resident and state.train.device != device else state.train
            model.train()
            order = _permutation(len(epoch_data), config.seed, state.epoch)
            steps = _steps(order.to(device) if resident else order, config, rank, world, epoch_data)
            saved.cut = len(steps) > budget - state.step
            steps = steps[: budget - state.step]
            batches = _batches(epoch_data, [rows for step in steps for rows, _, _ in step], config, device, resident)
            losses = _LossMeter(device)

            for step in steps:
                for i, (_, weight, samples) in enumerate(step):
                    state.batch = state.output = None  # so that two batches are never in memory
                    state.batch, state.weight = next(batches), weight
                    call("on_batch")
                    last = i + 1 == len(step)
                    with contextlib.nullcontext() if last else accelerator.no_sync(model):
                        state.output = model(state.batch)
                        accelerator.backward(_objective(state.output) * weight)
                    losses.add(state.output.losses, samples, state.step + 1)
                accelerator.unscale_gradients()
                call("on_backward")
                if config.clip is not None:
                    nn.utils.clip_grad_norm_(method.parameters(), config.clip)
                take_step()
                optimizer.zero_grad()
                if scheduler is not None and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                state.step += 1
                call("on_step")

            state.batch = state.output = None  # a streamed batch is large, and validation has its own
            row = {"epoch": state.epoch, "step": state.step, "lr": optimizer.param_groups[0]["lr"]}
            row.update(losses.read(state.epoch))
            _check_weights(method, state.epoch, state.step)
            _share_buffers(method, world)
            if held_out is not None:
                row.update(_validate(method, held_out, metrics, accelerator, config))
                best = _better(best, row, monitor, method, keep=config.select == "best")
                state.history.best_epoch = best.epoch
                if config.patience is not None and state.epoch - best.epoch >= config.patience:
                    state.stop = True
            row["seconds"] = time.perf_counter() - started
            state.history.epochs.append(row)
            state.history.seconds += row["seconds"]
            call("on_epoch_end")
            accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=state.epoch)
            saved.write(best)
            bar.set_postfix({k: f"{row[k]:.3g}" for k in ("train_loss", f"valid_{monitor}") if k in row}, refresh=False)
            bar.update()

        bar.close()
        if config.select == "best" and best.weights is not None:
            method.load_state_dict(best.weights)
        method.eval()
        call("on_end")
    return state.history


def _check_call(
    method: Any, train: Any, valid: Any, config: Any, train_plan: Any, callbacks: Any, checkpoint: Any, metrics: Any
) -> None:
    from .missing import MissingPlan

    Is("an nn.Module", nn.Module)("method", method)
    Maybe(DATASET)("valid", valid)
    Is("a TrainConfig", TrainConfig)("config", config)
    Maybe(Is("a MissingPlan", MissingPlan))("train_plan", train_plan)
    Several(Is("an object with events", object))("callbacks", callbacks)
    Maybe(PATH)("checkpoint", checkpoint)
    Maybe(Function("a function (logits, batch) -> dict"))("metrics", metrics)
    known = modalities_of(method)
    if known is not None and tuple(known) != DATASET("train", train).modalities:
        raise ValueError(f"train: expected the method's modalities {list(known)}, got {list(train.modalities)}")
    if valid is not None and valid.modalities != DATASET("train", train).modalities:
        raise ValueError(f"valid: expected train's modalities {list(train.modalities)}, got {list(valid.modalities)}")
    if config.loader == "resident" and (train.streamed or (valid is not None and valid.streamed)):
        raise ValueError(
            "loader: a streamed data set stays where it is, so expected 'auto' or 'stream', got 'resident'; to(device) "
            "reads all of it into memory"
        )
    for fact in ("task", "outputs", "classes"):
        ours, theirs = (None if split is None else split.info.get(fact) for split in (train, valid))
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"valid: expected train's {fact} {ours!r}, got {theirs!r}; pass the same classes= where the splits are "
                f"made, or make them from one data set with subset"
            )


_EVENTS = ("on_start", "on_epoch_start", "on_batch", "on_backward", "on_step", "on_epoch_end", "on_end")


def _objective(output: Output) -> Tensor:
    if not output.losses:
        raise ValueError("method: expected loss terms in training, got none; does the training split have a target?")
    return torch.stack([loss.float() for loss in output.losses.values()]).sum()


# Seeds, devices, optimizers


@contextlib.contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch inside the block; afterwards they are as they were before it."""
    before = take_random_state()
    random.seed(SEED("seed", seed))
    np.random.seed(seed % 2**32)  # noqa: NPY002  the legacy state is the one that other libraries draw from
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)


@contextlib.contextmanager
def _accelerate(method: nn.Module, config: TrainConfig) -> Iterator[Accelerator]:
    """An Accelerator of its own for this run; method and accelerate's global state are as before afterwards.

    accelerate keeps one global state a process and marks the models it has prepared, so without this a notebook could
    neither train on another device or precision than the first time, nor train the same method twice.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu or auto, since torch finds no CUDA device here, got 'cuda'")
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision: fp16 needs a GPU; expected no or bf16, got 'fp16'")
    cpu = config.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    backend = ("inductor" if config.compile else None) if isinstance(config.compile, bool) else config.compile
    globals_ = [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]
    before = [dict(shared) for shared in globals_]
    marks = {name: method.__dict__.get(name) for name in MARKS}
    for shared in globals_:
        shared.clear()
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.mixed_precision,
            dynamo_backend=backend,
            log_with=_trackers(config) or None,
            project_dir=config.log_dir if config.trackers else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop weights and counts itself
            # A batch without a modality leaves its encoder without a gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if accelerator.process_index:  # not the same dropout in every process
            torch.manual_seed(config.seed + 1_000_003 * accelerator.process_index)
        accelerator.init_trackers("mmlib", config=plain_config(config))
        try:
            yield accelerator
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
    finally:
        for name, value in marks.items():
            if value is None:
                method.__dict__.pop(name, None)
            else:
                method.__dict__[name] = value
        for shared, content in zip(globals_, before, strict=True):
            shared.clear()
            shared.update(content)


def _trackers(config: TrainConfig) -> list[Any]:
    """Names and objects as accelerate wants them; it would drop the ones that are not installed without a word."""
    if not config.trackers:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    chosen: list[Any] = []
    for name in config.trackers:
        if isinstance(name, GeneralTracker):
            chosen.append(name)
        elif name == "jsonl":
            chosen.append(_json_lines(Path(config.log_dir) / "mmlib.jsonl"))
        elif name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"trackers: expected 'jsonl' or one of {sorted(LOGGER_TYPE_TO_CLASS)}, got {name!r}")
        elif name in _PACKAGES and name not in {str(t) for t in get_available_trackers()}:
            raise ModuleNotFoundError(f"trackers: {name!r} is not installed; run `pip install {_PACKAGES[name]}`")
        else:
            chosen.append(name)
    return chosen


_PACKAGES = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def _json_lines(path: Path) -> Any:
    from accelerate.tracking import GeneralTracker, on_main_process

    class JsonLinesTracker(GeneralTracker):
        """Appends one JSON object a line: first the configuration, then one an epoch."""

        name = "jsonl"
        requires_logging_directory = False

        @property
        def tracker(self) -> Path:
            return path

        @on_main_process
        def _write(self, values: dict[str, Any]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self._write({"config": values})

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            self._write({"epoch": step, **values})

    return JsonLinesTracker()


def _optimizer(method: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in method.parameters() if p.requires_grad]
    if callable(config.optimizer):
        return config.optimizer(parameters)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """A scheduler that is stepped after every optimizer step, ``steps`` times in all."""
    if config.schedule is None:
        return None
    if callable(config.schedule):
        return config.schedule(optimizer, steps)
    if config.schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=config.lr, total_steps=max(steps, 2))
    if config.schedule == "step":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, int(at * steps)) for at in STEP_AT])
    warm = int(config.warmup * steps) if config.schedule == "linear-warmup-cosine" else 0

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm)))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# Mini-batches


def _masked(train: MultimodalDataset, plan: MissingPlan | None, epoch: int, keep_complete: bool) -> MultimodalDataset:
    if plan is None:
        return train
    mask = plan.draw(train, epoch=epoch if plan.resample else None, device=train.device)
    return mask.apply(train, keep_complete=keep_complete)


def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in this epoch, a function of seed and epoch alone."""
    word = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(word) >> 1))


def _steps(
    order: Tensor, config: TrainConfig, rank: int, world: int, data: MultimodalDataset
) -> list[list[tuple[Tensor, float, float]]]:
    """Per optimizer step its mini-batches: this process's rows, the weight of their mean loss, how many samples it is.

    The weights make the sum over mini-batches of the mean over processes the mean over the step's samples. A process's
    part of dialogues, whose losses are means over utterances, is counted in these. A process without a row takes one
    at weight 0, since all processes must meet in the backward pass.
    """
    real = data.data.extras.get("utterance") if world > 1 else None
    utterances = None if real is None else real.flatten(1).sum(1).to(order.device)
    steps = []
    for group in order.split(config.batch_size * config.accumulation):
        step = []
        for batch in group.split(config.batch_size):
            mine = batch[rank::world]
            samples: float = len(mine)
            if utterances is not None:
                samples = len(batch) * float(utterances[mine].sum() / utterances[batch].sum().clamp_min(1))
            step.append((mine if len(mine) else batch[:1], world * samples / len(group), samples))
        steps.append(step)
    return steps


def _batches(
    data: MultimodalDataset, rows: list[Tensor], config: TrainConfig, device: torch.device, resident: bool
) -> Iterator[MultimodalBatch]:
    if resident:
        for index in rows:
            yield data[index]
        return
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=[index.tolist() for index in rows],
        collate_fn=MultimodalDataset.collate,  # type: ignore[arg-type]
        num_workers=config.loader_workers,
        generator=torch.Generator(),  # so that it does not draw from the global one, as resident data do not
    )
    yield from map(lambda batch: batch.to(device, non_blocking=True), loader)  # which keeps no batch that was used


def _bytes(batch: MultimodalBatch) -> int:
    total = 0
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, dict):
            total += sum(v.nbytes for v in value.values() if isinstance(v, Tensor))
        elif isinstance(value, MultimodalBatch):
            total += _bytes(value)
    return total


# What an epoch leaves behind


class _LossMeter:
    """Sums of the loss terms, kept on the device and read once an epoch."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.bad: dict[str, Tensor] = {}  # the first step with a loss that is not finite, or a huge number

    def add(self, losses: Mapping[str, Tensor], rows: float, step: int) -> None:
        for name, loss in losses.items():
            loss = loss.detach().float()
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=self.device)
                self.bad[name] = torch.full((), math.inf, device=self.device)
                self.counts[name] = 0
            self.sums[name] += loss * rows
            self.bad[name] = torch.where(torch.isfinite(loss), self.bad[name], self.bad[name].clamp(max=step))
            self.counts[name] += rows

    def read(self, epoch: int) -> dict[str, float]:
        """Means over samples of all processes; FloatingPointError where a loss was not finite."""
        from accelerate.utils import gather_object

        mine = {k: (self.sums[k].item(), self.counts[k], self.bad[k].item()) for k in self.sums}
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        bad: dict[str, float] = {}
        for part in gather_object([mine]):
            for name, (total, count, step) in part.items():
                sums[name] = sums.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
                bad[name] = min(bad.get(name, math.inf), step)
        if bad and min(bad.values()) < math.inf:
            name = min(bad, key=lambda k: bad[k])
            raise FloatingPointError(
                f"epoch {epoch}, step {int(bad[name])}: the loss term {name!r} is NaN or infinite; a lower lr, "
                f"clip=1.0 or standardised features may help. The last checkpoint, if any, is from before"
            )
        rows = max(counts.values(), default=1)
        means = {f"train_{name}": sums[name] / max(counts[name], 1) for name in sums}
        return {**means, "train_loss": sum(sums.values()) / max(rows, 1)}


def _check_weights(method: nn.Module, epoch: int, step: int) -> None:
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    finite = torch.stack([torch.isfinite(p).all() for _, p in named]).tolist()
    if not all(finite):
        raise FloatingPointError(
            f"epoch {epoch}, step {step}: the weight {named[finite.index(False)][0]!r} is NaN or infinite though every "
            f"loss was finite; look for a gradient that is not, such as that of a square root at 0"
        )


def _share_buffers(method: nn.Module, world: int) -> None:
    """Every process takes the main one's buffers (running statistics), which are the ones validated and stored."""
    if world > 1:
        for buffer in method.buffers():
            torch.distributed.broadcast(buffer, 0)


def validation_scores(logits: Tensor, batch: MultimodalBatch) -> dict[str, float]:
    """Accuracy for classes, mean absolute error for scores, over all samples with a target (``loss`` is task_loss).

    logits [*N, K]. Where the batch has ``extras["utterance"]`` [B, U], over real utterances alone, and classes have
    ``weighted_f1`` besides. Bool labels have `metrics.multilabel_scores`, of which ``macro_f1`` selects the epoch: it
    is of what `predict` decides, and rare labels count as much as frequent ones. Where nothing is predicted for many
    epochs it stays 0; then monitor "loss".
    """
    from .losses import task_loss

    Array("float", "[..., K]")("logits", logits)
    target = BATCH("batch", batch).target
    if target is None:
        raise ValueError("batch, valid: expected a split with a target, got none")
    target = target.to(logits.device)
    mask = batch.extras.get("utterance")
    if mask is not None:
        logits, target = logits[mask.to(logits.device)], target[mask.to(logits.device)]
    loss = task_loss(logits, target).item()
    if target.is_floating_point():
        return {"mae": loss, "loss": loss}
    if target.dtype == torch.bool:
        from .metrics import multilabel_scores

        return {**multilabel_scores(logits, target), "loss": loss}
    scores = {"accuracy": (logits.argmax(-1) == target).double().mean().item(), "loss": loss}
    if mask is not None:
        from .metrics import classification_scores

        scores["weighted_f1"] = classification_scores(logits, target)["weighted_f1"]
    return scores


def _validate(
    method: nn.Module, valid: MultimodalDataset, metrics: Scores | None, accelerator: Accelerator, config: TrainConfig
) -> dict[str, float]:
    """The main process validates, so that all decide alike and batch statistics are its own."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if accelerator.is_main_process:
        size = config.batch_size if valid.streamed else 1024  # a batch of streamed data may be all that fits
        logits = predict(method, valid, batch_size=size)
        found = [{f"valid_{k}": float(v) for k, v in (metrics or validation_scores)(logits, valid.data).items()}]
    return broadcast_object_list(found)[0] if accelerator.num_processes > 1 else found[0]


def _better(best: Best, row: Mapping[str, Any], monitor: str, method: nn.Module, keep: bool) -> Best:
    """The best epoch so far; of equals the earliest."""
    if f"valid_{monitor}" not in row:
        known = sorted(k.removeprefix("valid_") for k in row if k.startswith("valid_"))
        raise ValueError(f"monitor: expected one of the validation metrics {known}, got {monitor!r}")
    value = row[f"valid_{monitor}"]
    better = value < best.value if monitor in MINIMISED else value > best.value
    if not better and not (math.isnan(best.value) and (best.epoch == 0 or not math.isnan(value))):
        return best
    weights = {k: v.detach().clone() for k, v in method.state_dict().items()} if keep else None
    return Best(row["epoch"], value, weights)


def _progress(config: TrainConfig, accelerator: Accelerator, epochs: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=epochs, initial=done, unit="epoch", disable=not (config.progress and accelerator.is_main_process))
