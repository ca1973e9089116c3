"""scikit-learn's handwritten digits (UCI, 1,797 images of 8 x 8 pixels, embedded) seen as three modalities.

``left`` and ``right`` are the halves of the image: eight frames (the rows) of four pixels. ``projection`` is a weak
third, the ink of each column: eight frames (the columns) of one value. Linear probes tell left about .84, right
about .89, projection about .55, all three about .97.
"""

from __future__ import annotations

import numpy as np

from ..batch import MultimodalDataset
from ..checks import Flag
from ._readers import SEED, make_splits, standardise, stratified_split

__all__ = ["load"]


def load(
    split_seed: int = 0, valid: float = 0.15, test: float = 0.25, standardised: bool = True
) -> dict[str, MultimodalDataset]:
    """The digits as ``left`` [8, 4], ``right`` [8, 4] and ``projection`` [8, 1], classes 0 to 9.

    split_seed : seed of the split, which keeps the classes' shares
    valid, test : shares of the 1,797 samples
    standardised : zero mean and unit variance per modality, measured on train (one scale a modality: pixels of a half
        stay comparable). Otherwise ink in [0, 1] per pixel, and the mean ink of a column in [0, 1]
    """
    from sklearn.datasets import load_digits

    SEED("split_seed", split_seed)
    Flag()("standardised", standardised)
    pixels, target = load_digits(return_X_y=True)
    images = np.asarray(pixels, dtype=np.float64).reshape(-1, 8, 8) / 16
    features = {"left": images[:, :, :4], "right": images[:, :, 4:], "projection": images.mean(1)[..., None]}
    rows = stratified_split(target, valid, test, split_seed)
    info = {
        "name": "digits",
        "task": "classification",
        "outputs": 10,
        "classes": [str(c) for c in range(10)],
        "source": "Alpaydin and Kaynak 1998, UCI Optical Recognition of Handwritten Digits; the copy in scikit-learn",
        "licence": "CC BY 4.0",
        "units": {"left": "ink in [0, 1]", "right": "ink in [0, 1]", "projection": "mean ink of a column in [0, 1]"},
    }
    if standardised:
        features, facts = standardise(features, rows["train"], per_feature=False)
        info["standardised"] = facts
        info["units"] = {m: f"{unit}, standardised on train" for m, unit in info["units"].items()}  # type: ignore[attr-defined]
    names = [f"digits/{i:04d}" for i in range(len(target))]
    return make_splits(rows, features, np.asarray(target), names, info, split_seed)
