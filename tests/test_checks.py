"""The one checker of arguments: the type before the range, and the name in every text."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from typing import Any

import numpy as np
import pytest
import torch

from mmlib.checks import (
    SHAPES,
    Array,
    Device,
    Either,
    Flag,
    Function,
    Is,
    Maybe,
    Named,
    Number,
    OneOf,
    Several,
    Text,
    Whole,
    check_all,
    check_known,
    check_options,
    option,
)


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


def test_objects_and_functions() -> None:
    assert Text("name", "a") == "a"
    assert Function("a function (x) -> y")("score", len) is len
    with pytest.raises(TypeError, match="method: expected an nn.Module, got 'net'"):
        Is("an nn.Module", torch.nn.Module)("method", "net")
    with pytest.raises(TypeError, match=r"score: expected a function \(x\) -> y, got 3"):
        Function("a function (x) -> y")("score", 3)


def test_tensors_by_kind_and_axes() -> None:
    flat, rows = Array("float", "[n, D]"), Array("bool integer", "[*N, K]")
    assert flat("x", torch.zeros(3, 2)).shape == (3, 2)
    assert rows("y", torch.zeros(3, 2, 4, dtype=torch.int16)).ndim == 3
    for bad in (None, "x", [[1.0]], np.zeros((3, 2)), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2) > 0):
        with pytest.raises(TypeError, match=r"^x: expected a tensor of floats \[n, D\], got"):
            flat("x", bad)
    for shape in ((), (3,), (3, 2, 1)):
        with pytest.raises(ValueError, match=r"^x: expected a tensor of floats \[n, D\], got"):
            flat("x", torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^y: expected a tensor of bools or integers"):
        rows("y", torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="^y: expected"):
        rows("y", torch.zeros(3, 2))


def test_one_of_some_checks() -> None:
    check = Either(OneOf("adam", "sgd"), Function("a function"))
    assert check("optimizer", "sgd") == "sgd"
    assert check("optimizer", max) is max
    with pytest.raises(ValueError, match="^optimizer: expected 'adam' or 'sgd' or a function, got 'lamb'"):
        check("optimizer", "lamb")
    with pytest.raises(TypeError, match="^optimizer: expected 'adam' or 'sgd' or a function, got 3"):
        check("optimizer", 3)


def test_lists_and_dicts_say_which_entry_is_wrong() -> None:
    assert SHAPES("shapes", {"a": (3, 2)}) == {"a": (3, 2)}
    for bad, kind, name in (
        ("ab", TypeError, "shapes"),
        ({}, ValueError, "shapes"),
        ({1: (3,)}, TypeError, "shapes"),
        ({"a": 3}, TypeError, r"shapes\['a'\]"),
        ({"a": ()}, ValueError, r"shapes\['a'\]"),
        ({"a": (3, 0)}, ValueError, r"shapes\['a'\]\[1\]"),
        ({"a": (3, 2.0)}, TypeError, r"shapes\['a'\]\[1\]"),
    ):
        with pytest.raises(kind, match=f"^{name}: expected"):
            SHAPES("shapes", bad)
    assert Several(Text)("names", ()) == ()
    assert Named(Whole(0), 0)("counts", {}) == {}
    with pytest.raises(ValueError, match=r"party: unknown modalities \['c'\]; known are \['a', 'b'\]"):
        check_known("party", ["a", "c"], {"a": 1, "b": 2})


def test_a_default_dict_is_each_object_s_own() -> None:
    @dataclass(frozen=True)
    class Config:
        widths: dict[str, int] = option({"a": 3}, Named(Whole(1)))

    Config().widths["a"] = 5
    assert Config().widths == {"a": 3}


def test_devices_by_name() -> None:
    assert Device()("device", "cpu") == torch.device("cpu")
    with pytest.raises(TypeError, match="^device: expected a device, such as 'cpu', got 3"):
        Device()("device", 3)
    with pytest.raises(ValueError, match="^device: expected a device, such as 'cpu', got 'gpu'"):
        Device()("device", "gpu")


def test_all_arguments_of_a_function() -> None:
    def load(width: int, on: bool = True, note: str = "") -> None:
        check_all({"width": Whole(1), "on": Flag()}, locals())

    load(3, note="not checked")
    with pytest.raises(TypeError, match="^on: expected True or False, got 1"):
        load(3, on=1)  # type: ignore[arg-type]
