"""One paper, one file, top to bottom like the paper; and the joint-training baseline."""

from .dear import DEAR
from .dream import DREAM
from .joint import JointTraining
from .mbt_sample import MBTSample
from .mce import MCE
from .pmr import PMR

__all__ = ["DEAR", "DREAM", "MCE", "PMR", "JointTraining", "MBTSample"]
