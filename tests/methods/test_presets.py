"""A method's presets: which class one gets for a name and options, and that it is like any other module afterwards."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from mmlib.checks import Flag, OneOf, Whole, check_options, option
from mmlib.methods._presets import Presets


@dataclass(frozen=True)
class Config:
    width: int = option(3, Whole(1))
    norm: str = option("mean", OneOf("mean"))

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class OtherConfig(Config):
    norm: str = option("mean", OneOf("mean", "none"))
    deep: bool = option(False, Flag())


class Method(Presets, nn.Module, config=Config, presets={"paper": {}, "wide": {"width": 9}}):
    def __init__(self, start: float, *, preset: str = "paper", extra: Any = None, **options: Any):
        super().__init__()
        self.config, self.extra = self.configured(preset, options), extra
        self.layer = nn.Linear(self.config.width, 1)
        nn.init.constant_(self.layer.weight, start)

    @classmethod
    def for_data(cls, start: float, **options: Any) -> Method:
        return cls(start, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Other(Method, config=OtherConfig, presets={"released": {"norm": "none"}}):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Third(Method, config=Config, presets={"third": {"width": 4}}):
    pass


class Own(Method):
    """A reader's subclass."""


def test_the_first_class_that_has_the_preset_and_takes_the_options():
    assert type(Method(1.0)) is Method
    assert type(Method(1.0, preset="wide", extra=3)) is Method
    assert type(Method(1.0, preset="released")) is Other
    assert type(Method(1.0, norm="none")) is Other  # a value that only the other has
    assert type(Method(1.0, norm="mean")) is Method
    assert type(Method(1.0, preset="wide", deep=True)) is Other  # with a preset of its base
    assert type(Method(1.0, preset="third")) is Third
    assert type(Method.for_data(1.0, preset="released", width=5)) is Other
    assert type(Other(1.0)) is Other
    assert type(Own(1.0)) is Own
    assert isinstance(Method(1.0, deep=True), Method)


def test_the_configuration_is_the_presets_with_the_options_over_it():
    assert Method(1.0).config == Config()
    assert Method(1.0, preset="released").config == OtherConfig(norm="none")
    assert Method(1.0, preset="wide", width=2).config == Config(2)
    assert Method(1.0, preset="wide", deep=True).config == OtherConfig(9, deep=True)
    assert Method.configured("released", {"width": 4}) == OtherConfig(4, "none")
    assert set(Method.PRESETS) == {"paper", "wide"}
    assert set(Other.PRESETS) == {"paper", "wide", "released"}


def test_a_module_as_any_other():
    model = Method(1.0, preset="released", width=2)
    twin = copy.deepcopy(model)
    assert type(twin) is Other
    assert twin.config == model.config
    x = torch.ones(1, 2)
    assert twin(x).item() == model(x).item()
    twin.load_state_dict(Method(3.0, preset="released", width=2).state_dict())
    assert twin(x).item() != model(x).item()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"preset": "code"}, ValueError, "preset: expected one of paper, wide, released, third, got 'code'"),
        ({"preset": None}, TypeError, "preset: expected"),
        ({"preset": ["paper"]}, TypeError, "preset: expected"),
        ({"height": 1}, ValueError, r"options: unknown options \['height'\]; known are \['width', 'norm', 'deep'\]"),
        ({"norm": "max"}, ValueError, "norm: expected 'mean' or 'none', got 'max'"),
        ({"width": 0}, ValueError, "width: expected an integer of at least 1"),
        ({"preset": "third", "deep": True}, ValueError, "preset: 'third' with the options"),
    ],
)
def test_what_no_class_has(options, kind, message):
    with pytest.raises(kind, match=message):
        Method(1.0, **options)
    with pytest.raises(ValueError, match="preset: 'released' with the options"):
        Own(1.0, preset="released")
