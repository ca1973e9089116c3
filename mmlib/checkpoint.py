"""What is saved of a training run and resumed, and a method's weights: whole files of plain values, with checksums."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import numbers
import os
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .batch import MultimodalDataset
from .checks import PATH, Is
from .data import fingerprint as data_fingerprint
from .files import atomic_write

if TYPE_CHECKING:
    from .missing import MissingPlan
    from .training import State, TrainConfig

__all__ = ["load", "save"]

# What accelerate leaves on a model that it has prepared.
MARKS = ("forward", "_original_forward", "_is_accelerate_prepared", "_is_torch_compile")


def take_random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration as numbers and strings; callables by their names."""
    values = {k: getattr(config, k) for k in config.__dataclass_fields__}
    values["trackers"] = ",".join(str(getattr(t, "name", t)) for t in config.trackers)
    named = lambda v: f"{v.__module__}.{v.__qualname__}" if hasattr(v, "__qualname__") else type(v).__qualname__
    return {k: named(v) if callable(v) else v for k, v in values.items()}


@dataclass
class Best:
    epoch: int = 0
    value: float = math.nan
    weights: dict[str, Tensor] | None = None


class Checkpoint:
    """Everything that a run needs to go on, in one file, replaced as a whole after every epoch."""

    def __init__(
        self,
        path: str | Path | None,
        state: State,
        make_scheduler: Callable[[torch.optim.Optimizer, int], Any],
        scheduler: Any,
        budget: int,
        callbacks: Sequence[Any],
        monitor: str,
    ):
        self.path = Path(path or "")
        self.wanted = path is not None
        self.state, self.scheduler, self.budget = state, scheduler, budget
        self.make_scheduler = make_scheduler  # (optimizer, number of steps) -> scheduler
        self.callers = list(callbacks)
        self.callbacks = [
            callback
            for callback in callbacks
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
        ]
        self.monitor = monitor
        self.cut = False  # whether the last epoch ended before its data did
        self.best = Best()
        self.facts: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.changing: set[str] = set()  # what looks like a setting, but training itself changes it
        self.random: list[dict[str, Any]] | None = None

    def identify(self, train: MultimodalDataset, valid: MultimodalDataset | None, plan: MissingPlan | None) -> None:
        """What must be the same for a checkpoint to be this run's."""
        config = plain_config(self.state.config)
        for name in ("device", "progress", "trackers", "log_dir", "loader", "resident_limit", "loader_workers"):
            del config[name]
        del config["epochs"], config["steps"]  # the budget, which may grow
        shapes = {k: list(v.shape) for k, v in self.state.method.state_dict().items()}
        self.facts = {
            **config,
            "monitor": self.monitor,
            "method": type(self.state.method).__qualname__,
            "weights": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
            "train": data_fingerprint(train),
            "valid": None if valid is None else data_fingerprint(valid),
            "train_plan": None if plan is None else json.dumps(plan.to_dict(), sort_keys=True, default=str),
            "callbacks": ",".join(type(callback).__qualname__ for callback in self.callers),
            "processes": self.state.accelerator.num_processes,
        }
        self.settings = self._all_settings()

    def _all_settings(self) -> dict[str, Any]:
        found = _settings(self.state.method)
        for i, callback in enumerate(self.callers):
            found.update(_settings(callback, f"callbacks[{i}]."))
        return found

    def resume(self) -> None:
        if not self.path.exists():
            return
        content, state = _read(self.path, "mmlib-checkpoint"), self.state
        self._refuse_another_run(content)
        longer = content["budget"] != self.budget
        if longer:
            self._refuse_another_budget(content)
        self._put("method", state.method.load_state_dict, content["method"])
        rates: list[dict[str, Any]] = []
        if longer and self.scheduler is not None:  # the stored one may hold the number of steps that it was made for
            rates = _replay(self.scheduler, state.optimizer, content["step"])
        elif self.scheduler is not None:
            self._put("scheduler", self.scheduler.load_state_dict, content["scheduler"])
        self._put("optimizer", state.optimizer.load_state_dict, content["optimizer"])
        for group, values in zip(state.optimizer.param_groups, rates, strict=False):
            group.update(values)
        if state.accelerator.scaler is not None and content["scaler"] is not None:
            self._put("scaler", state.accelerator.scaler.load_state_dict, content["scaler"])
        self._put("callbacks", self._load_callbacks, content["callbacks"])
        self._put("best", self._load_best, content["best"])
        state.epoch, state.step, state.stop = content["epoch"], content["step"], content["stop"]
        state.history.epochs[:] = content["history"]
        state.history.best_epoch = self.best.epoch or None
        state.history.seconds = content["seconds"]
        self.random, self.cut, self.changing = content["random"], content["cut"], set(content["changing"])

    def _put(self, key: str, load: Callable[[Any], Any], value: Any) -> None:
        """Give a stored part to whom it belongs; what is wrong with it there is said with the file and the key."""
        try:
            load(value)
        except Exception as error:  # of torch or of a callback: whatever it likes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.path.name}: {key!r} does not fit this run ({reason:.200})") from error

    def _load_callbacks(self, stored: list[Any]) -> None:
        for callback, own in zip(self.callbacks, stored, strict=True):
            callback.load_state_dict(own)

    def _load_best(self, stored: Mapping[str, Any]) -> None:
        self.best = Best(stored["epoch"], stored["value"], stored["weights"])

    def _refuse_another_run(self, content: Mapping[str, Any]) -> None:
        skip = {*self.changing, *content["changing"]}
        differing = []
        for there, here in ((content["facts"], self.facts), (content["settings"], self.settings)):
            names = [k for k in {*there, *here} - skip if (k in there, there.get(k)) != (k in here, here.get(k))]
            for k in sorted(names, key=lambda k: (k.count("."), k)):  # a backbone's configuration before its parts
                of = lambda values, k=k: repr(values[k]) if k in values else "nothing"
                differing.append(f"{k} {of(there)} there, {of(here)} here")
        if differing:
            listed = ", ".join(differing[:5]) + (f", and {len(differing) - 5} more" if len(differing) > 5 else "")
            raise ValueError(
                f"checkpoint: {self.path.name} was written by another configuration ({listed}); give this run another "
                f"file, or remove that one"
            )

    def _refuse_another_budget(self, content: Mapping[str, Any]) -> None:
        """A run goes on to another number of steps where its steps so far do not depend on that number."""
        taken, config = content["step"], self.state.config
        start = f"checkpoint: {self.path.name} is of {content['budget']} optimizer steps and this run of {self.budget}"
        if taken > self.budget:
            raise ValueError(f"{start}, fewer than the {taken} it has taken; ask for more epochs, or use another file")
        if content["cut"]:
            raise ValueError(
                f"{start}, but it ended within epoch {content['epoch']}, whose other samples a longer run would see "
                f"first; train anew, with another file"
            )
        if config.schedule is None:
            return
        if not callable(config.schedule) or not _same_rates(
            self.state.optimizer, self.make_scheduler, (content["budget"], self.budget), taken
        ):
            raise ValueError(
                f"{start}, and the schedule {self.facts['schedule']!r} sets every learning rate by the number of "
                f"steps; train anew, with another file, or with schedule=None"
            )

    def restore_random_state(self) -> None:
        if self.random is not None:
            self._put("random", lambda all_: set_random_state(all_[self.state.accelerator.process_index]), self.random)

    def write(self, best: Best) -> None:
        if not self.wanted:
            return
        from accelerate.utils import gather_object

        state = self.state
        states = gather_object([take_random_state()])  # all processes take part
        if not state.accelerator.is_main_process:
            return
        now, missing = self._all_settings(), object()
        self.changing |= {k for k in {*now, *self.settings} if now.get(k, missing) != self.settings.get(k, missing)}
        scaler = state.accelerator.scaler
        content = {
            "facts": self.facts,
            "settings": self.settings,
            "changing": sorted(self.changing),
            "budget": self.budget,
            "cut": self.cut,
            "method": state.method.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "epoch": state.epoch,
            "step": state.step,
            "stop": state.stop,
            "history": state.history.epochs,
            "seconds": state.history.seconds,
            "best": {"epoch": best.epoch, "value": best.value, "weights": best.weights},
            "random": states,
        }
        _write(self.path, "mmlib-checkpoint", content)


def _settings(owner: Any, prefix: str = "") -> dict[str, Any]:
    """What a method or callback and its parts were made with, by names: classes, plain attributes, what is frozen.

    Attributes that are private, tensors, or of no describable kind are left out, as is what a module is in (`training`,
    and the wrappers of accelerate).
    """
    found: dict[str, Any] = {}
    for place, part in owner.named_modules() if isinstance(owner, nn.Module) else [("", owner)]:
        at = f"{prefix}{place}." if place else prefix
        if place:
            found[at[:-1]] = type(part).__qualname__
        for name, value in getattr(part, "__dict__", {}).items():
            if name.startswith("_") or name in ("training", *MARKS):
                continue
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                options = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
                found.update({f"{at}{name}.{k}": described for k, described in _described(options).items()})
            else:
                found.update({f"{at}{k}": described for k, described in _described({name: value}).items()})
        for name, p in part.named_parameters(recurse=False) if isinstance(part, nn.Module) else []:
            if not p.requires_grad:
                found[f"{at}{name}.requires_grad"] = False
    return found


def _described(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The describable among some values, as what a checkpoint may hold and == compares."""
    return {str(k): text for k, v in values.items() if (text := _describe(v)) is not _Nothing}


class _Nothing:
    """Stands for what cannot be described."""


def _describe(value: Any) -> Any:
    found: Any
    if value is None or isinstance(value, bool | str):
        found = value
    elif isinstance(value, numbers.Real):
        found = int(value) if isinstance(value, numbers.Integral) else float(value)
        found = found if math.isfinite(found) else str(found)  # NaN would not equal itself
    elif isinstance(value, Mapping):
        found = str(_described(value))
    elif isinstance(value, list | tuple | set | frozenset):
        items = [x for x in map(_describe, value) if x is not _Nothing]
        found = str(tuple(sorted(items, key=str) if isinstance(value, set | frozenset) else items))
    elif isinstance(value, torch.dtype | slice | os.PathLike):
        found = str(value)
    elif isinstance(value, functools.partial):
        found = str((_describe(value.func), *map(_describe, value.args), _described(value.keywords)))
    elif hasattr(value, "__qualname__"):  # a function or a class
        found = f"{value.__module__}.{value.__qualname__}"
    else:
        return _Nothing
    if isinstance(found, str) and len(found) > 200:
        found = f"{found[:80]}... (sha256 {hashlib.sha256(found.encode()).hexdigest()[:16]})"
    return found


def _same_rates(
    optimizer: torch.optim.Optimizer,
    make_scheduler: Callable[[torch.optim.Optimizer, int], Any],
    budgets: Iterable[int],
    taken: int,
) -> bool:
    """Whether the learning rates of the first steps are the same, whichever of the numbers of steps the run has."""
    found = []
    for steps in budgets:
        groups = [{**group, "lr": group.get("initial_lr", group["lr"])} for group in optimizer.param_groups]
        for group in groups:
            group["params"] = [torch.zeros(1, requires_grad=True)]
            group.pop("initial_lr", None)
        stand_in = torch.optim.SGD(groups, lr=1.0)  # every group has its own
        scheduler, rates = make_scheduler(stand_in, steps), []
        for _ in range(taken):
            rates.append([{k: v for k, v in group.items() if k != "params"} for group in stand_in.param_groups])
            stand_in.step()
            scheduler.step()
        found.append(rates)
    return all(rates == found[0] for rates in found)


def _replay(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, Any]]:
    """Take a new schedule to where it is after so many steps, and return the optimizer's settings there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch misses the optimizer's own steps
        for _ in range(steps):
            scheduler.step()
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


_SEAL = b"mmlib-sha256:"  # in front of the checksum, in the comment at the end of the zip archive that torch writes

_KINDS: dict[str, dict[str, Any]] = {  # what the files must hold, and of which type
    "mmlib-weights": {"method": str, "weights": dict, "facts": dict},
    "mmlib-checkpoint": {
        **{name: dict for name in ("facts", "settings", "method", "optimizer", "best")},
        **{name: list for name in ("changing", "callbacks", "history", "random")},
        **{name: int for name in ("budget", "epoch", "step")},
        **{name: bool for name in ("cut", "stop")},
        **{name: (dict, type(None)) for name in ("scheduler", "scaler")},
        "seconds": float,
    },
}


def _write(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"format": kind, "version": 2, **content}, buffer)
    size = len(_SEAL) + 64
    buffer.seek(-2, io.SEEK_END)
    buffer.write(size.to_bytes(2, "little"))  # the length of the archive's comment, which was 0
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(_SEAL + digest.encode())
    atomic_write(path, buffer.getbuffer())


def _read(path: Path, kind: str) -> dict[str, Any]:
    """A file of ours; ValueError for one that is damaged, foreign, incomplete, or holds more than plain values."""
    if not path.exists():
        raise FileNotFoundError(f"path: there is no file {path}")
    stored = path.read_bytes()
    expected = f"{path.name}: expected a file written by mmlib ({kind})"
    body, seal = memoryview(stored)[: -len(_SEAL) - 64], stored[-len(_SEAL) - 64 :]
    if not seal.startswith(_SEAL):
        raise ValueError(
            f"{expected} with its checksum at the end, which is not there; it is cut short, of another kind, or of an "
            f"earlier version of mmlib"
        )
    if seal[len(_SEAL) :] != hashlib.sha256(body).hexdigest().encode():
        raise ValueError(f"{expected}, but its checksum is another; it was damaged or altered")
    try:
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes: RuntimeError, EOFError, UnpicklingError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{expected}, but it cannot be read ({reason:.120})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != kind:
        raise ValueError(f"{expected}, got {found or type(content).__name__!r}")
    if content.get("version") != 2:
        raise ValueError(f"{path.name}: expected version 2, got {content.get('version')!r}; use a newer mmlib")
    for key, types in _KINDS[kind].items():
        if key not in content:
            raise ValueError(f"{path.name}: {key!r} is missing, of a file written by mmlib ({kind})")
        value = content[key]
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            named = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
            raise ValueError(f"{path.name}: {key!r}: expected {named}, got {type(value).__name__}")
    return content


def save(method: nn.Module, path: str | Path, **facts: Any) -> None:
    """Write the method's weights and buffers, with plain facts about it (anything that JSON can hold), as one file.

    The file is replaced atomically and holds tensors and plain values alone (``torch.load(weights_only=True)`` reads
    it), and at its end a checksum of all that.
    """
    Is("an nn.Module", nn.Module)("method", method)
    PATH("path", path)
    try:
        json.dumps(facts)
    except (TypeError, ValueError) as error:
        raise TypeError(f"facts: expected numbers, strings, lists and dicts of them, got {facts!r:.200}") from error
    weights = {k: v.detach().cpu() for k, v in method.state_dict().items()}
    content = {"method": type(method).__qualname__, "weights": weights, "facts": facts}
    _write(Path(path), "mmlib-weights", content)


def load(method: nn.Module, path: str | Path) -> dict[str, Any]:
    """Read weights written by `save` into ``method`` (in place, all or nothing) and return the stored facts.

    Raises FileNotFoundError, or ValueError for a file that is damaged, cut short, foreign, without its checksum (as the
    files of earlier versions are), or whose weights do not fit; the first key that does not fit is named.
    """
    Is("an nn.Module", nn.Module)("method", method)
    content = _read(Path(PATH("path", path)), "mmlib-weights")
    stored, here = content["weights"], method.state_dict()
    of = f"{Path(path).name} (a {content['method']}) does not fit this method, a {type(method).__qualname__}"
    for key, value in here.items():
        if key not in stored:
            raise ValueError(f"{of}: {key!r} is not in the file")
        if not isinstance(stored[key], Tensor):
            raise ValueError(f"{of}: {key!r} is {type(stored[key]).__name__} there, expected a tensor")
        if stored[key].shape != value.shape:
            raise ValueError(f"{of}: {key!r} has shape {tuple(stored[key].shape)} there, {tuple(value.shape)} here")
    if extra := [key for key in stored if key not in here]:
        raise ValueError(f"{of}: the file has {extra[0]!r} besides")
    method.load_state_dict(stored)
    return content["facts"]
