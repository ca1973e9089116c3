"""What a paper's release, or another interpretation of its text, does differently: a file a paper.

Subclasses of the papers' classes, each with its own options and presets (see ``methods/_presets.py``).
"""

from .balm import ReleasedBALM
from .dear import OtherDEAR
from .dream import OtherDREAM
from .mce import ReleasedMCE

__all__ = ["OtherDEAR", "OtherDREAM", "ReleasedBALM", "ReleasedMCE"]
