"""What every chapter does first: read its parameters, and refuse what it does not know.

Chapters import this once their first lines have found the repository; `mmlib` knows nothing of it.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmlib.checks import Check, Flag, Number, OneOf, Several, Text, Whole

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("quick", "tiny", "book", "paper")
PAPERMILL = {"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}  # what ``papermill --inject-paths`` adds
KINDS: dict[Any, Check] = {
    str: Text,
    bool: Flag(),
    int: Whole(),
    float: Number(),
    list[int]: Several(Whole(), 1),
    list[float]: Several(Number(), 1),
}
COMMON: dict[str, Check] = {
    "dataset": Text,
    "data_root": Text,
    "profile": OneOf(*PROFILES),
    "seeds": Several(Whole(0), 1),
    "device": OneOf("auto", "cpu", "cuda"),
    "results_dir": Text,
}


@dataclass(frozen=True)
class Setup:
    """A chapter's parameters, checked. ``own`` holds the chapter's own and the profile's budget, read as attributes."""

    dataset: str
    data_root: Path | None
    profile: str
    seeds: tuple[int, ...]
    device: str
    results_dir: Path
    own: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.own[name]
        except KeyError:
            raise AttributeError(f"no parameter {name!r}; known are {sorted(self.own)}") from None

    def __str__(self) -> str:
        common = {
            "dataset": self.dataset,
            "profile": self.profile,
            "seeds": list(self.seeds),
            "device": self.device,
        }
        return "  ".join(f"{k} = {v}" for k, v in {**common, **self.own}.items())


def begin(
    namespace: dict[str, Any],
    own: Iterable[str] = (),
    budget: Mapping[str, Mapping[str, Any]] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> Setup:
    """Read a chapter's parameters from its globals, in the first cell after the parameters.

    own : the names of the chapter's own parameters, beside the six that every chapter has. Their types are those of
        their annotations, one of `KINDS`; one that is None takes its value and its type from the budget
    budget : per profile the settings that a parameter of the same name, if not None, overrules
    choices : what a parameter may be that is a word

    Raises ValueError for a name that the chapter does not know (a misspelt ``papermill -p``), TypeError for a value of
    another type, ValueError for one out of range, FileNotFoundError for a ``data_root`` or ``results_dir`` that is not
    there. Each names the parameter.
    """
    warnings.filterwarnings("ignore", message="IProgress not found")  # without ipywidgets tqdm draws plain bars
    own = list(own)
    known = {*COMMON, *own}
    given = {k: v for k, v in namespace.items() if not k.startswith("_") and _is_literal(v)}
    given = {k: v for k, v in given.items() if k not in {"In", "Out"} | PAPERMILL}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"unknown parameters {unknown}; this chapter knows {sorted(known)}")
    for name, check in COMMON.items():
        check(name, given.get(name))
    values = dict((budget or {}).get(given["profile"], {}))
    annotations = namespace.get("__annotations__", {})
    for name in own:
        value, usual = given.get(name), values.get(name)
        if value is None and usual is not None:
            continue
        if name not in annotations and usual is None:
            raise TypeError(f"{name}: expected an annotation in the cell of the parameters, or a value in the budget")
        kind = annotations.get(name, type(usual))
        check = Whole(1) if kind is int and usual is not None else KINDS[kind]  # a budget counts something
        values[name] = OneOf(*choices[name])(name, value) if choices and name in choices else check(name, value)
    data_root = _existing("data_root", given["data_root"]) if given["data_root"] else None
    results = _existing("results_dir", given["results_dir"]) if given["results_dir"] else ROOT / "book" / "results"
    if not results.is_dir():
        raise NotADirectoryError(f"results_dir: expected a folder, got the file {results}")
    device = given["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Setup(given["dataset"], data_root, given["profile"], tuple(given["seeds"]), device, results, values)


def _is_literal(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))


def _existing(name: str, given: str) -> Path:
    """A relative path means the folder that papermill was called from, the kernel's, or else the repository's."""
    path = Path(given).expanduser()
    places = dict.fromkeys(folder / path for folder in (Path(os.environ.get("PWD", ".")), Path.cwd(), ROOT))
    if (found := next((p for p in places if p.exists()), None)) is None:
        tried = ", ".join(map(str, places))
        raise FileNotFoundError(f"{name}: expected a folder that exists, got {given!r} (looked for {tried})")
    return found


def source(thing: Callable[..., Any] | type, start: str | None = None, stop: str | None = None) -> Any:
    """The source of ``thing`` as the library has it, or its lines from one matching ``start`` to one before ``stop``.

    Shown, never retyped, so the page cannot drift from the code.
    """
    from IPython.display import Markdown

    lines = inspect.getsource(thing).splitlines()
    if start is not None:
        lines = lines[next(i for i, line in enumerate(lines) if re.search(start, line)) :]
    if stop is not None:
        lines = lines[: next(i for i, line in enumerate(lines) if i and re.search(stop, line))]
    margin = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
    return Markdown("```python\n" + "\n".join(x[margin:] for x in lines).rstrip() + "\n```")
