"""Encode-fuse-decode models that the methods plug into."""

from .avmnist import AVMNISTBackbone, AVMNISTConfig
from .base import Backbone
from .corrkd import CorrKDConfig, CorrKDEvaluator
from .cubemlp import CubeMLPBackbone, CubeMLPConfig
from .dialogue import DialogueBackbone
from .gcnet import GCNetBackbone, GCNetConfig
from .generic import GenericBackbone, GenericConfig
from .mmdfn import MMDFNBackbone, MMDFNConfig
from .mmgcn import MMGCNBackbone, MMGCNConfig
from .mmin import MMINBackbone, MMINConfig
from .pooled import MLPEvaluator, Table3Evaluator
from .selfmm import SelfMMConfig, SelfMMEvaluator, SelfMMTraining
from .sequences import EvaluatorConfig

__all__ = [
    "AVMNISTBackbone",
    "AVMNISTConfig",
    "Backbone",
    "CorrKDConfig",
    "CorrKDEvaluator",
    "CubeMLPBackbone",
    "CubeMLPConfig",
    "DialogueBackbone",
    "EvaluatorConfig",
    "GCNetBackbone",
    "GCNetConfig",
    "GenericBackbone",
    "GenericConfig",
    "MLPEvaluator",
    "MMDFNBackbone",
    "MMDFNConfig",
    "MMGCNBackbone",
    "MMGCNConfig",
    "MMINBackbone",
    "MMINConfig",
    "SelfMMConfig",
    "SelfMMEvaluator",
    "SelfMMTraining",
    "Table3Evaluator",
]
