"""mmlib: multimodal learning when modalities are missing and imbalanced."""

from .batch import MultimodalBatch, MultimodalDataset, Output

__version__ = "0.1.0"
__all__ = ["MultimodalBatch", "MultimodalDataset", "Output", "__version__"]
