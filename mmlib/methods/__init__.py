"""One paper, one file, top to bottom like the paper; and the joint-training baseline."""

from . import released  # its classes make themselves known as presets
from .balm import BALM
from .cggm import CGGM
from .dear import DEAR
from .dream import DREAM
from .joint import JointTraining
from .mbt_sample import MBTSample
from .mce import MCE
from .ogm_ge import OGMGE
from .pmr import PMR

__all__ = ["BALM", "CGGM", "DEAR", "DREAM", "MCE", "OGMGE", "PMR", "JointTraining", "MBTSample", "released"]
