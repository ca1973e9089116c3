"""One paper, one file, top to bottom like the paper."""

from . import released  # its classes make themselves known as presets
from .balm import BALM
from .dear import DEAR
from .dream import DREAM
from .mce import MCE

__all__ = ["BALM", "DEAR", "DREAM", "MCE", "released"]
