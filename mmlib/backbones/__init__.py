"""Encode-fuse-decode models that the methods plug into."""

from .avmnist import AVMNISTBackbone, AVMNISTConfig
from .base import Backbone
from .cubemlp import CubeMLPBackbone, CubeMLPConfig
from .evaluators import (
    CorrKDConfig,
    CorrKDEvaluator,
    EvaluatorConfig,
    MLPEvaluator,
    SelfMMConfig,
    SelfMMEvaluator,
    SelfMMTraining,
    Table3Evaluator,
)
from .generic import GenericBackbone, GenericConfig
from .mmin import MMINBackbone, MMINConfig

__all__ = [
    "AVMNISTBackbone",
    "AVMNISTConfig",
    "Backbone",
    "CorrKDConfig",
    "CorrKDEvaluator",
    "CubeMLPBackbone",
    "CubeMLPConfig",
    "EvaluatorConfig",
    "GenericBackbone",
    "GenericConfig",
    "MLPEvaluator",
    "MMINBackbone",
    "MMINConfig",
    "SelfMMConfig",
    "SelfMMEvaluator",
    "SelfMMTraining",
    "Table3Evaluator",
]
