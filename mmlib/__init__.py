"""mmlib: multimodal learning when modalities are missing and imbalanced."""

from .batch import MultimodalBatch, MultimodalDataset, Output
from .methods import BALM, DEAR, DREAM, MCE
from .missing import MissingMask, MissingPlan

__version__ = "0.2.0"
__all__ = [
    "BALM",
    "DEAR",
    "DREAM",
    "MCE",
    "MissingMask",
    "MissingPlan",
    "MultimodalBatch",
    "MultimodalDataset",
    "Output",
    "__version__",
]
