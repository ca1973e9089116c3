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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Check", "Flag", "Maybe", "Number", "OneOf", "Whole", "check_options", "option", "shown"]

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


@dataclass(frozen=True)
class Flag:
    """True or False, nothing that merely counts as one of them."""

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {shown(value)}")
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


@dataclass(frozen=True)
class Maybe:
    """None, or what another check takes."""

    check: Any

    def __call__(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        try:
            return self.check(name, value)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("expected ", "expected None or ", 1)) from None


def option(default: Any, check: Check) -> Any:
    """A dataclass field with its check beside it; ``dataclasses.MISSING`` for a field without a default."""
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"check": check})
    return dataclasses.field(default=default, metadata={"check": check})


def check_options(config: Any) -> None:
    """Call the check of every field that has one; TypeError or ValueError names the first that does not fit."""
    for field in dataclasses.fields(config):
        if (check := field.metadata.get("check")) is not None:
            check(field.name, getattr(config, field.name))
