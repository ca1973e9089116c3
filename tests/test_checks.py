"""The one checker of arguments: the type before the range, and the name in every text."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from typing import Any

import numpy as np
import pytest
import torch

from mmlib.checks import Flag, Maybe, Number, OneOf, Whole, check_options, option


@pytest.mark.parametrize(
    ("check", "good", "words"),
    [
        (Number(), -3.5, "a finite number"),
        (Number(0), 0, "a number of at least 0"),
        (Number(above=0), 1e-9, "a number above 0"),
        (Number(0, below=1), 0.0, "a number in [0, 1)"),
        (Number(above=0, high=1), 1, "a number in (0, 1]"),
        (Number(high=2), -1e9, "a number of at most 2"),
        (Number(0, 1), np.float32(0.5), "a number in [0, 1]"),
        (Whole(1), np.int64(1), "an integer of at least 1"),
        (Whole(), 0, "an integer"),
        (Whole(0, below=4), 3, "an integer in [0, 4)"),
    ],
)
def test_a_number_is_taken_or_the_range_is_said(check: Any, good: float, words: str) -> None:
    assert check("x", good) == good
    assert check.expected == words
    for bad in (None, "1", True, [1], torch.tensor(1.0), np.ones(2), 1j):
        with pytest.raises(TypeError, match="^x: expected an? "):
            check("x", bad)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(TypeError if check.whole else ValueError, match="^x: expected "):
            check("x", bad)


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (Number(0), -1e-9),
        (Number(above=0), 0),
        (Number(0, below=1), 1),
        (Number(0, 1), 1.5),
        (Whole(1), 0),
        (Whole(0, below=4), 4),
    ],
)
def test_the_range_is_checked_after_the_type(check: Any, bad: float) -> None:
    with pytest.raises(ValueError, match=r"^x: expected an? "):
        check("x", bad)


def test_an_integer_is_no_float_and_a_flag_is_no_number() -> None:
    with pytest.raises(TypeError, match="expected an integer of at least 1, got 2.0"):
        Whole(1)("epochs", 2.0)
    assert Flag()("on", False) is False
    for bad in (0, 1, None, "True"):
        with pytest.raises(TypeError, match="on: expected True or False"):
            Flag()("on", bad)


def test_one_of_some_names() -> None:
    assert OneOf("adam", "sgd")("optimizer", "sgd") == "sgd"
    with pytest.raises(ValueError, match="optimizer: expected 'adam' or 'sgd', got 'lamb'"):
        OneOf("adam", "sgd")("optimizer", "lamb")
    with pytest.raises(TypeError, match="optimizer: expected one of a, b, c, got 3"):
        OneOf("a", "b", "c")("optimizer", 3)


def test_none_where_it_may_be() -> None:
    check = Maybe(Whole(1))
    assert check("patience", None) is None
    assert check("patience", 3) == 3
    with pytest.raises(ValueError, match="patience: expected None or an integer of at least 1, got 0"):
        check("patience", 0)


def test_options_are_declared_beside_their_fields() -> None:
    @dataclass(frozen=True)
    class Config:
        outputs: int = option(MISSING, Whole(1))
        dropout: float = option(0.1, Number(0, below=1))
        note: str = "not checked"

        def __post_init__(self) -> None:
            check_options(self)

    assert Config(3).dropout == 0.1
    with pytest.raises(TypeError, match="outputs"):
        Config("3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout: expected a number in \[0, 1\), got 1.0"):
        Config(3, dropout=1.0)


def test_what_came_is_said_shortly() -> None:
    with pytest.raises(TypeError, match=r"Tensor of torch.float32, shape \(1000, 1000\)"):
        Number()("lr", torch.zeros(1000, 1000))
    with pytest.raises(TypeError) as caught:
        Number()("lr", list(range(1000)))
    assert len(str(caught.value)) < 150
