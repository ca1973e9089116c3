"""book/chapter.py: parameters are checked, the profile is read, source is shown as the library has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from book import chapter

DEFAULTS: dict[str, Any] = {
    "dataset": "digits",
    "data_root": "",
    "profile": "quick",
    "seeds": [0],
    "device": "cpu",
    "results_dir": "",
}
BUDGET = {"tiny": {"epochs": 1}, "quick": {"epochs": 5}, "book": {"epochs": 50}, "paper": {"epochs": 500}}


def begin(own: tuple[str, ...] = (), budget: Any = None, **given: Any) -> chapter.Setup:
    return chapter.begin({**DEFAULTS, **given}, own=own, budget=budget)


def test_the_six_common_parameters() -> None:
    setup = begin()
    assert (setup.dataset, setup.profile, setup.seeds, setup.device) == ("digits", "quick", (0,), "cpu")
    assert setup.data_root is None
    assert setup.results_dir == chapter.ROOT / "book" / "results"


def test_what_jupyter_puts_into_the_namespace_is_not_a_parameter() -> None:
    begin(_=3, _i1="x", __name__="__main__", In=["a"], Out={}, Path=Path, begin=begin)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown parameters \['epoch'\].*'epochs'"):
        begin(own=("epochs",), epochs=3, epoch=4)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"profile": "huge"}, ValueError, "profile: expected one of"),
        ({"device": "tpu"}, ValueError, "device: expected auto, cpu or cuda"),
        ({"seeds": []}, TypeError, "seeds: expected a list of integers"),
        ({"seeds": ["a"]}, TypeError, "seeds: expected a list of integers"),
        ({"seeds": "(0, 1)"}, TypeError, "seeds: expected list"),
        ({"dataset": None}, TypeError, "dataset: expected str"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        begin(**given)


def test_a_missing_common_parameter_is_named() -> None:
    with pytest.raises(TypeError, match="seeds"):
        chapter.begin({k: v for k, v in DEFAULTS.items() if k != "seeds"})


@pytest.mark.parametrize("profile", chapter.PROFILES)
def test_the_profile_sets_the_budget(profile: str) -> None:
    assert begin(own=("epochs",), budget=BUDGET, profile=profile, epochs=None).epochs == BUDGET[profile]["epochs"]


def test_a_parameter_that_is_given_overrules_the_budget() -> None:
    assert begin(own=("epochs",), budget=BUDGET, epochs=7).epochs == 7


def test_own_parameters_are_attributes_and_unknown_ones_say_what_there_is() -> None:
    setup = begin(own=("rate",), rate=0.3)
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
