"""One way to check arguments: the type first (TypeError), then the range (ValueError), and the text names the argument.

A check is made once and called with the name and the value that came; it returns the value::

    RATE = Number(0, below=1)
    self.modality_dropout = RATE("modality_dropout", modality_dropout)

Beside the field of a configuration it is declared, and `check_options` in ``__post_init__`` calls all of them::

    @dataclass(frozen=True)
    class Config:
        width: int = option(64, Whole(1))
        dropout: float = option(0.1, RATE)

        def __post_init__(self) -> None:
            check_options(self)
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PATH",
    "RATE",
    "SHAPES",
    "Array",
    "Check",
    "Device",
    "Either",
    "Flag",
    "Function",
    "Is",
    "Maybe",
    "Named",
    "Number",
    "OneOf",
    "Several",
    "Text",
    "Whole",
    "check_all",
    "check_known",
    "check_options",
    "option",
    "shown",
]

Check = Callable[[str, Any], Any]


def shown(value: Any) -> str:
    """What came, for an error: short, and for arrays the shape in place of the numbers."""
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{type(value).__name__} of {getattr(value, 'dtype', '?')}, shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Number:
    """A finite real number within bounds: ``low`` and ``high`` belong to the range, ``above`` and ``below`` do not.

    NumPy's scalars are numbers; booleans, strings, arrays and tensors are not.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole = False

    @property
    def expected(self) -> str:
        """The range in words, such as "a number in [0, 1)"."""
        what = "an integer" if self.whole else "a number"
        left, start = ("[", self.low) if self.low > self.above or math.isinf(self.above) else ("(", self.above)
        right, end = ("]", self.high) if self.high < self.below or math.isinf(self.below) else (")", self.below)
        if math.isinf(start) and math.isinf(end):
            return what if self.whole else "a finite number"
        if math.isinf(end):
            return f"{what} of at least {start:g}" if left == "[" else f"{what} above {start:g}"
        if math.isinf(start):
            return f"{what} of at most {end:g}" if right == "]" else f"{what} below {end:g}"
        return f"{what} in {left}{start:g}, {end:g}{right}"

    def __call__(self, name: str, value: Any) -> Any:
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        found: Any = value
        if not (self.low <= found <= self.high and self.above < found < self.below):  # NaN and infinity neither
            raise ValueError(f"{name}: expected {self.expected}, got {shown(value)}")
        return value


class Whole(Number):
    """An integer within bounds; ``Whole(1)`` is one of at least 1."""

    whole = True


RATE = Number(0, below=1)  # of a dropout


@dataclass(frozen=True)
class Flag:
    """True or False, nothing that merely counts as one of them."""

    expected = "True or False"

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        return value


class OneOf:
    """One of some strings."""

    def __init__(self, *names: str):
        self.names = names

    @property
    def expected(self) -> str:
        """The names in words."""
        return " or ".join(map(repr, self.names)) if len(self.names) < 3 else f"one of {', '.join(self.names)}"

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        if value not in self.names:
            raise ValueError(f"{name}: expected {self.expected}, got {value!r}")
        return value


class Is:
    """An object of one of some classes; ``expected`` says which in words."""

    def __init__(self, expected: str, *kinds: type):
        self.expected, self.kinds = expected, kinds

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, self.kinds):
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        return value


Text = Is("a string", str)
PATH = Is("a path", str, os.PathLike)


class Function(Is):
    """Anything that can be called; ``expected`` says with what."""

    def __call__(self, name: str, value: Any) -> Any:
        if not callable(value):
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        return value


class Array:
    """A tensor, by its kind of numbers and its axes: ``Array("bool", "[*N, M]")``. Its values are not looked at.

    kinds : "bool", "integer" or "float", or several with a blank between them
    axes : their names; one with an asterisk stands for one axis or more, "..." for any number
    """

    def __init__(self, kinds: str, axes: str):
        self.kinds = kinds.split()
        names = axes.strip("[]").split(", ")
        self.count, self.more = len([name for name in names if name != "..."]), "*" in axes or "..." in names
        self.expected = f"a tensor of {' or '.join(f'{k}s' for k in self.kinds)} {axes}"

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or _number_kind(value.dtype) not in self.kinds:
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        if value.ndim < self.count or (value.ndim > self.count and not self.more):
            raise ValueError(f"{name}: expected {self.expected}, got {shown(value)}")
        return value


def _number_kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    return "bool" if dtype == torch.bool else "complex" if dtype.is_complex else "integer"


class Device:
    """A device that torch knows, by name or as one."""

    expected = "a device, such as 'cpu'"

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, (str, torch.device)):
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        try:
            return torch.device(value)
        except RuntimeError as error:
            raise ValueError(f"{name}: expected {self.expected}, got {value!r}") from error


@dataclass(frozen=True)
class Maybe:
    """None, or what another check takes."""

    check: Any

    @property
    def expected(self) -> str:
        """What the other check takes, or None."""
        return f"None or {self.check.expected}"

    def __call__(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        try:
            return self.check(name, value)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("expected ", "expected None or ", 1)) from None


class Either:
    """What one of some checks takes; ValueError where the type would do for one of them."""

    def __init__(self, *checks: Any):
        self.checks = checks

    @property
    def expected(self) -> str:
        """What they take, in words."""
        return " or ".join(check.expected for check in self.checks)

    def __call__(self, name: str, value: Any) -> Any:
        kind: type[Exception] = TypeError
        for check in self.checks:
            try:
                return check(name, value)
            except ValueError:
                kind = ValueError
            except TypeError:
                continue
        raise kind(f"{name}: expected {self.expected}, got {shown(value)}")


@dataclass(frozen=True)
class Several:
    """A list or tuple of at least ``low`` (and at most ``high``) entries, each as ``check`` takes it."""

    check: Any
    low: int = 0
    high: float = math.inf

    @property
    def expected(self) -> str:
        """How many and of what, in words."""
        count = f"{self.low}" if self.low == self.high else f"at least {self.low}" if self.low else "any number"
        return f"a list or tuple of {count}, each {self.check.expected}"

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        if not self.low <= len(value) <= self.high:
            raise ValueError(f"{name}: expected {self.expected}, got {shown(value)}")
        for i, each in enumerate(value):
            self.check(f"{name}[{i}]", each)
        return value


@dataclass(frozen=True)
class Named:
    """A dict by names (of modalities, say) with at least ``low`` entries, each as ``check`` takes it."""

    check: Any
    low: int = 1

    @property
    def expected(self) -> str:
        """How many and of what, in words."""
        return f"a dict by names{f' with at least {self.low}' if self.low else ''}, each {self.check.expected}"

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise TypeError(f"{name}: expected {self.expected}, got {shown(value)}")
        if len(value) < self.low:
            raise ValueError(f"{name}: expected {self.expected}, got {shown(value)}")
        for key, each in value.items():
            self.check(f"{name}[{key!r}]", each)
        return value


SHAPES = Named(Several(Whole(1), 1, 4))  # one sample of each modality: (T,), (T, D), (C, H, W), (C, X, Y, Z)


def check_known(name: str, given: Iterable[Any], known: Iterable[str], what: str = "modalities") -> None:
    """Raise ValueError unless all of the given names are known."""
    names = list(known)
    if unknown := [each for each in given if each not in names]:
        raise ValueError(f"{name}: unknown {what} {unknown}; known are {names}")


def option(default: Any, check: Check) -> Any:
    """A dataclass field with its check beside it; ``dataclasses.MISSING`` for a field without a default.

    A dict is copied for every object.
    """
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"check": check})
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"check": check})
    return dataclasses.field(default=default, metadata={"check": check})


def check_options(config: Any) -> None:
    """Call the check of every field that has one; TypeError or ValueError names the first that does not fit."""
    for field in dataclasses.fields(config):
        if (check := field.metadata.get("check")) is not None:
            check(field.name, getattr(config, field.name))


def check_all(checks: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Call a check for each of some arguments; ``given`` is mostly ``locals()`` at a function's first line."""
    for name, check in checks.items():
        check(name, given[name])
