"""Every network is made by ``for_data(data, **options)``, a method by ``for_data(data, network, valid, config)``."""

from __future__ import annotations

import inspect

import pytest

from mmlib import backbones, baselines, data, methods
from mmlib.backbones import Backbone, GenericBackbone, MLPEvaluator

METHODS = [getattr(home, name) for home in (methods, baselines) for name in home.__all__ if name != "released"]
NETS = [
    kind
    for name in backbones.__all__
    if inspect.isclass(kind := getattr(backbones, name)) and issubclass(kind, Backbone) and hasattr(kind, "for_data")
]
SIZES = {
    "DREAM": {"width": 8, "heads": 2},
    "DEAR": {"width": 8, "heads": 2, "head_width": 4, "hidden": 8, "layers": 1},
    "MCE": {"hidden": 8, "state_factor": False},
}


def positions(kind: type) -> list[str]:
    signature = inspect.signature(kind.for_data)
    return [name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_no_network_and_no_method_is_left_out() -> None:
    assert {kind.__name__ for kind in METHODS} >= {"MCE", "DREAM", "DEAR", "BALM", "JointTraining", "CGGM", "PMR"}
    assert len(NETS) >= 11


@pytest.mark.parametrize("kind", NETS)
def test_networks_start_from_the_data(kind: type) -> None:
    first, *rest = positions(kind)
    assert first == "data"
    assert set(rest) <= {"preset"}


@pytest.mark.parametrize("kind", METHODS)
def test_methods_take_data_network_validation_and_training(kind: type) -> None:
    first, network, *rest = positions(kind)
    assert first in ("data", "train")
    assert network in ("backbone", "evaluator", "text_encoder")
    assert rest == ["valid", "config"]


@pytest.mark.parametrize("kind", METHODS)
def test_methods_are_made_alike(kind: type) -> None:
    train = data.load("synthetic", sizes=(24, 8, 8))["train"]
    network = None if kind.__name__ == "DEAR" else (MLPEvaluator if kind.__name__ == "DREAM" else GenericBackbone)
    method = kind.for_data(
        train, network and network.for_data(train).eval(), None, None, **SIZES.get(kind.__name__, {})
    )
    assert method.train()(train[:]).losses
