"""Data pickles without their danger: a pickle is a program, and this reader runs only what rebuilds arrays."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

__all__ = ["safe_pickle_load"]

# Builders of containers and arrays. None of them can call anything else: `_reconstruct` and `scalar` only make
# arrays, scalars and dtypes, and `_codecs.encode` (how Python 2 bytes are stored) only encodes text.
_ALLOWED = {
    "builtins": {"bytearray", "bytes", "complex", "dict", "frozenset", "list", "range", "set", "slice", "tuple"},
    "collections": {"OrderedDict"},
    "_codecs": {"encode"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
}
_PYTHON2 = {("__builtin__", "xrange"): ("builtins", "range")}  # protocols 0 to 2 use Python 2's names


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module, name = _PYTHON2.get((module, name), (module, name))
        module = "builtins" if module == "__builtin__" else module
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        # numpy.dtypes.Float32DType and its kin, which newer NumPy versions write
        if module == "numpy.dtypes" and name.endswith("DType") and name.isidentifier():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a container or a NumPy array")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file (a persistent id)")


def safe_pickle_load(path: str | os.PathLike[str], encoding: str = "latin1") -> Any:
    """The containers, numbers, strings and NumPy arrays in a pickle file; nothing else is ever imported or called.

    encoding : how 8-bit strings of Python 2 pickles are read; "latin1" keeps their arrays intact

    Raises FileNotFoundError, and ValueError naming the file for a forbidden global (by its name), an object array
    that asks for one, a truncated or damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no pickle file at {path}")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path}: the file is empty, expected a pickle")
    try:
        return _Unpickler(io.BytesIO(data), encoding=encoding).load()
    except pickle.UnpicklingError as error:
        text = str(error)
        if "truncated" in text or "ran out of input" in text.lower():
            raise ValueError(f"{path}: the pickle is truncated ({text}); copy or download it again") from error
        raise ValueError(f"{path}: refused to read this pickle: {text}") from error
    except (
        EOFError,
        IndexError,
        KeyError,
        AttributeError,
        ImportError,
        MemoryError,
        OverflowError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: the pickle is truncated or damaged ({reason}); copy or download it again") from error
