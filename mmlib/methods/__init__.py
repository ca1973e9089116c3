"""One paper, one file, top to bottom like the paper; and the joint-training baseline."""

from .joint import JointTraining

__all__ = ["JointTraining"]
