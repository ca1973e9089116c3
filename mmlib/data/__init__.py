"""Data sets behind one call: ``load(name, root)`` gives every source as the same three `MultimodalDataset` splits.

``digits``, ``synthetic`` and ``conversations`` are embedded and need no files. ``avmnist``, ``mfeat``, ``iemocap``,
``mosi``, ``mosei``, ``sims``, ``simsv2`` and ``dialogue`` are read from a folder: ``root``, or the environment variable
``MMLIB_DATA``. Nothing is ever downloaded.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..batch import MultimodalDataset
from ..checks import OneOf
from . import avmnist, conversations, dialogue, digits, iemocap, mfeat, mmsa, synthetic, text
from ._readers import ROOT, fingerprint
from .pickles import safe_pickle_load

__all__ = [
    "avmnist",
    "conversations",
    "dialogue",
    "digits",
    "fingerprint",
    "iemocap",
    "load",
    "mfeat",
    "mmsa",
    "names",
    "options",
    "safe_pickle_load",
    "synthetic",
    "text",
]

_SOURCES: dict[str, Callable[..., dict[str, MultimodalDataset]]] = {
    "digits": digits.load,
    "synthetic": synthetic.load,
    "avmnist": avmnist.load,
    "mfeat": mfeat.load,
    "iemocap": iemocap.load,
    **{name: partial(mmsa.load, name) for name in ("mosi", "mosei", "sims", "simsv2")},
    "dialogue": dialogue.load,
    "conversations": conversations.load,
}


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return tuple(_SOURCES)


def _loader(name: str) -> Callable[..., dict[str, MultimodalDataset]]:
    return _SOURCES[OneOf(*_SOURCES)("name", name)]


def options(name: str) -> dict[str, Any]:
    """The options of one source with their defaults, as `load` takes them; the source's module documents them."""
    parameters = inspect.signature(_loader(name)).parameters
    return {key: p.default for key, p in parameters.items() if key != "root"}


def load(name: str, root: str | os.PathLike[str] | None = None, **options: Any) -> dict[str, MultimodalDataset]:
    """The splits ``{"train", "valid", "test"}`` of one source.

    name : one of `names`
    root : the folder of the files, or the one file, as the source's module describes it; without it, the environment
        variable ``MMLIB_DATA``. Embedded sources ignore it
    options : those of the source, see `options`

    Every split's ``info`` holds name, task, outputs, classes (list of str or None), source, licence, fingerprint (of
    this split's contents), split and split_seed. Raises ValueError for an unknown name or a value out of range,
    TypeError for an unknown option, FileNotFoundError with the expected layout where files are missing. A file that is
    truncated, damaged, of another layout, or larger unpacked than it can be, ends in a ValueError that names it. What
    has no checksum cannot be noticed: a pixel, a number, or a row that is another.
    """
    loader = _loader(name)
    ROOT("root", root)
    parameters = inspect.signature(loader).parameters
    known = [key for key in parameters if key != "root"]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"options: {name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    if "root" in parameters:
        given = root if root not in (None, "") else os.environ.get("MMLIB_DATA") or None
        return loader(None if given is None else Path(given).expanduser(), **options)
    return loader(**options)
