"""Encode-fuse-decode models that the methods plug into."""

from .avmnist import AVMNISTBackbone, AVMNISTConfig
from .base import Backbone
from .generic import GenericBackbone, GenericConfig
from .mmin import MMINBackbone, MMINConfig

__all__ = [
    "AVMNISTBackbone",
    "AVMNISTConfig",
    "Backbone",
    "GenericBackbone",
    "GenericConfig",
    "MMINBackbone",
    "MMINConfig",
]
