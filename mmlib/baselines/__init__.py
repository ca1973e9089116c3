"""What the papers compare with: joint training and the methods of others, one short file each."""

from .cggm import CGGM
from .joint import JointTraining
from .mbt_sample import MBTSample
from .ogm_ge import OGMGE
from .pmr import PMR

__all__ = ["CGGM", "OGMGE", "PMR", "JointTraining", "MBTSample"]
