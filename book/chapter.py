"""What every chapter does first: find the repository, read its parameters, refuse what it does not know.

Chapters import this after a four-line bootstrap; `mmlib` knows nothing of it.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("quick", "tiny", "book", "paper")
COMMON = {"dataset": str, "data_root": str, "profile": str, "seeds": list, "device": str, "results_dir": str}


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
    namespace: dict[str, Any], own: Iterable[str] = (), budget: Mapping[str, Mapping[str, Any]] | None = None
) -> Setup:
    """Read a chapter's parameters from its globals, in the first cell after the parameters.

    own : the names of the chapter's own parameters, beside the six that every chapter has
    budget : per profile the settings that a parameter of the same name, if not None, overrules

    Raises ValueError for a name that the chapter does not know (a misspelt ``papermill -p``), TypeError for a value of
    another type.
    """
    import torch

    warnings.filterwarnings("ignore", message="IProgress not found")  # without ipywidgets tqdm draws plain bars
    known = {*COMMON, *own}
    given = {k: v for k, v in namespace.items() if not k.startswith("_") and _is_literal(v)}
    given = {k: v for k, v in given.items() if k not in {"In", "Out"}}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"unknown parameters {unknown}; this chapter knows {sorted(known)}")
    for name, kind in COMMON.items():
        if not isinstance(given.get(name), kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {given.get(name)!r}")
    if given["profile"] not in PROFILES:
        raise ValueError(f"profile: expected one of {PROFILES}, got {given['profile']!r}")
    if not given["seeds"] or not all(isinstance(s, int) for s in given["seeds"]):
        raise TypeError(f"seeds: expected a list of integers, got {given['seeds']!r}")
    if given["device"] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {given['device']!r}")
    data_root = Path(given["data_root"]).expanduser() if given["data_root"] else None
    if data_root is not None and not data_root.is_absolute():
        data_root = _first_existing(data_root)
    results = Path(given["results_dir"]).expanduser() if given["results_dir"] else ROOT / "book" / "results"
    values = dict((budget or {}).get(given["profile"], {}))
    values.update({k: given.get(k) for k in own if given.get(k) is not None or k not in values})
    device = given["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Setup(given["dataset"], data_root, given["profile"], tuple(given["seeds"]), device, results, values)


def _is_literal(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))


def _first_existing(path: Path) -> Path:
    """A relative data_root means the caller's folder, or else the repository's."""
    caller = Path(os.environ.get("PWD", ".")) / path
    return next((p for p in (caller, Path.cwd() / path, ROOT / path) if p.exists()), caller)


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


if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
