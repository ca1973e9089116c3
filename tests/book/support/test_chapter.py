"""book/support/chapter.py: parameters are checked, the profile is read, source is shown as the library has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from book.support import chapter

DEFAULTS: dict[str, Any] = {
    "dataset": "digits",
    "data_root": "",
    "profile": "quick",
    "seeds": [0],
    "device": "cpu",
    "results_dir": "",
}
BUDGET = {"tiny": {"epochs": 1}, "quick": {"epochs": 5}, "book": {"epochs": 50}, "paper": {"epochs": 500}}


def begin(own: tuple[str, ...] = (), budget: Any = None, choices: Any = None, **given: Any) -> chapter.Setup:
    return chapter.begin({**DEFAULTS, **given}, own=own, budget=budget, choices=choices)


def test_the_six_common_parameters() -> None:
    setup = begin()
    assert (setup.dataset, setup.profile, setup.seeds, setup.device) == ("digits", "quick", (0,), "cpu")
    assert setup.data_root is None
    assert setup.results_dir == chapter.ROOT / "book" / "results"


def test_what_jupyter_puts_into_the_namespace_is_not_a_parameter() -> None:
    begin(_=3, _i1="x", __name__="__main__", In=["a"], Out={}, Path=Path, begin=begin)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown parameters \['epoch'\].*'epochs'"):
        begin(own=("epochs",), budget=BUDGET, epochs=3, epoch=4)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"profile": "huge"}, ValueError, "profile: expected one of"),
        ({"profile": 3}, TypeError, "profile: expected one of"),
        ({"device": "tpu"}, ValueError, "device: expected one of auto, cpu, cuda"),
        ({"seeds": []}, ValueError, "seeds: expected a list .* of at least 1"),
        ({"seeds": ["a"]}, TypeError, r"seeds\[0\]: expected an integer"),
        ({"seeds": [0, True]}, TypeError, r"seeds\[1\]: expected an integer"),
        ({"seeds": [0.5]}, TypeError, r"seeds\[0\]: expected an integer"),
        ({"seeds": [3, -1]}, ValueError, r"seeds\[1\]: expected an integer of at least 0, got -1"),
        ({"seeds": "(0, 1)"}, TypeError, "seeds: expected a list"),
        ({"dataset": None}, TypeError, "dataset: expected a string, got None"),
        ({"data_root": 5}, TypeError, "data_root: expected a string, got 5"),
        ({"data_root": "no/such/folder"}, FileNotFoundError, "data_root: expected a folder that exists, got 'no/such"),
        ({"results_dir": "no/such"}, FileNotFoundError, "results_dir: expected a folder that exists, got 'no/such'"),
        ({"results_dir": "README.md"}, NotADirectoryError, "results_dir: expected a folder, got the file"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        begin(**given)


OWN = {"rho": float, "width": int, "head": str, "rates": list[float], "steps": list[int], "quiet": bool}
GOOD = {"rho": 1.4, "width": 8, "head": "a", "rates": [0.1, 1], "steps": [2], "quiet": False, "epochs": None}


@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        ("rho", "notanumber", TypeError, "rho: expected a finite number, got 'notanumber'"),
        ("rho", True, TypeError, "rho: expected a finite number, got True"),
        ("rho", None, TypeError, "rho: expected a finite number, got None"),
        ("rho", float("nan"), ValueError, "rho: expected a finite number, got nan"),
        ("width", 2.0, TypeError, "width: expected an integer, got 2.0"),
        ("width", True, TypeError, "width: expected an integer, got True"),
        ("head", 3, TypeError, "head: expected a string, got 3"),
        ("rates", 0.5, TypeError, "rates: expected a list .* got 0.5"),
        ("rates", [0.5, "x"], TypeError, r"rates\[1\]: expected a finite number, got 'x'"),
        ("steps", [1.5], TypeError, r"steps\[0\]: expected an integer, got 1.5"),
        ("quiet", 1, TypeError, "quiet: expected True or False, got 1"),
        ("epochs", "many", TypeError, "epochs: expected an integer of at least 1, got 'many'"),
        ("epochs", True, TypeError, "epochs: expected an integer of at least 1, got True"),
        ("epochs", 0, ValueError, "epochs: expected an integer of at least 1, got 0"),
    ],
)
def test_a_chapters_own_parameters_keep_their_type(name: str, value: Any, error: type[Exception], said: str) -> None:
    own = tuple(GOOD)
    setup = begin(own=own, budget=BUDGET, __annotations__=OWN, **GOOD)
    assert (setup.rho, setup.rates, setup.epochs) == (1.4, [0.1, 1], 5)
    with pytest.raises(error, match=said):
        begin(own=own, budget=BUDGET, __annotations__=OWN, **{**GOOD, name: value})


def test_a_word_is_one_of_the_choices() -> None:
    given: dict[str, Any] = {"own": ("head",), "choices": {"head": ["a", "b"]}, "__annotations__": OWN}
    assert begin(**given, head="b").head == "b"
    with pytest.raises(ValueError, match="head: expected 'a' or 'b', got 'c'"):
        begin(**given, head="c")
    with pytest.raises(TypeError, match="head: expected 'a' or 'b', got 3"):
        begin(**given, head=3)


def test_a_parameter_without_a_type_is_the_chapters_mistake() -> None:
    with pytest.raises(TypeError, match="rho: expected an annotation"):
        begin(own=("rho",), rho=1.4)


def test_the_paths_that_papermill_adds_are_no_parameters() -> None:
    assert begin(PAPERMILL_INPUT_PATH="a.ipynb", PAPERMILL_OUTPUT_PATH="b.ipynb").own == {}


def test_a_missing_common_parameter_is_named() -> None:
    with pytest.raises(TypeError, match="seeds"):
        chapter.begin({k: v for k, v in DEFAULTS.items() if k != "seeds"})


@pytest.mark.parametrize("profile", chapter.PROFILES)
def test_the_profile_sets_the_budget(profile: str) -> None:
    assert begin(own=("epochs",), budget=BUDGET, profile=profile, epochs=None).epochs == BUDGET[profile]["epochs"]


def test_a_parameter_that_is_given_overrules_the_budget() -> None:
    assert begin(own=("epochs",), budget=BUDGET, epochs=7).epochs == 7


def test_own_parameters_are_attributes_and_unknown_ones_say_what_there_is() -> None:
    setup = begin(own=("rate",), __annotations__={"rate": float}, rate=0.3)
    assert setup.rate == 0.3
    with pytest.raises(AttributeError, match=r"no parameter 'rates'; known are \['rate'\]"):
        _ = setup.rates
    assert "rate = 0.3" in str(setup)


def test_a_relative_data_root_is_the_callers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("PWD", str(tmp_path))
    assert begin(data_root="data").data_root == tmp_path / "data"
    assert begin(data_root=str(tmp_path)).data_root == tmp_path
    monkeypatch.setenv("PWD", "/")
    assert begin(data_root="mmlib").data_root == chapter.ROOT / "mmlib"


def test_printing_says_nothing_of_the_machine(tmp_path: Path) -> None:
    assert str(tmp_path) not in str(begin(data_root=str(tmp_path), results_dir=str(tmp_path)))


def sample(x: int) -> int:
    """Twice."""
    y = 2 * x
    return y


def test_source_is_shown_as_it_is() -> None:
    pytest.importorskip("IPython")
    assert chapter.source(sample).data.startswith("```python\ndef sample(x: int) -> int:\n")
    assert chapter.source(sample, start=r"y = ", stop="return").data == "```python\ny = 2 * x\n```"
