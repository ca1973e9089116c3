"""UCI Multiple Features: 2,000 handwritten digits in six views, from very good to weak.

``root`` is the folder that holds ``mfeat/`` (or that folder itself), with one CSV file a view: a header row, the
features, the class in the last column. The six files list the same digits in the same order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..batch import MultimodalDataset
from ..checks import Flag, check_all
from ._readers import ROOT, SEED, SHARE, make_splits, need_root, standardise, stratified_split

__all__ = ["LAYOUT", "VIEWS", "load"]

VIEWS = {
    "fou": (76, "Fourier coefficients of the shape"),
    "fac": (216, "profile correlations"),
    "kar": (64, "Karhunen-Loeve coefficients"),
    "pix": (240, "pixel averages in 2 x 3 windows"),
    "zer": (47, "Zernike moments"),
    "mor": (6, "morphological features"),
}
_LARGEST = 1e30
LAYOUT = """\
  root/mfeat/mfeat-{fou,fac,kar,pix,zer,mor}.csv
      a header row, the features (76, 216, 64, 240, 47 and 6 columns), the class 0-9 in the last column:
      https://archive.ics.uci.edu/dataset/72/multiple+features (also OpenML 12, 14, 16, 18, 20, 22)
"""


OPTIONS = {"root": ROOT, "split_seed": SEED, "valid": SHARE, "test": SHARE, "standardised": Flag()}


def load(
    root: Path | None, split_seed: int = 0, valid: float = 0.15, test: float = 0.25, standardised: bool = True
) -> dict[str, MultimodalDataset]:
    """Six views as vectors [1, D]: fou 76, fac 216, kar 64, pix 240, zer 47, mor 6; classes 0 to 9.

    split_seed : seed of the split, which keeps the classes' shares
    valid, test : shares of the 2,000 samples
    standardised : zero mean and unit variance per feature, measured on train; otherwise the files' values

    Raises FileNotFoundError and ValueError that name the file: other columns, cells that are no finite numbers below
    1e30, classes that differ between the files, fewer than 3 digits of a class, or 10 in a split.
    """
    check_all(OPTIONS, locals())
    root = need_root(root, "mfeat", LAYOUT)
    folder = root / "mfeat" if (root / "mfeat").is_dir() else root
    paths = {view: folder / f"mfeat-{view}.csv" for view in VIEWS}
    if missing := [p.name for p in paths.values() if not p.is_file()]:
        raise FileNotFoundError(f"mfeat: {', '.join(missing)} not found in {folder}. Expected:\n{LAYOUT}")
    features: dict[str, np.ndarray] = {}
    target: np.ndarray | None = None
    for view, path in paths.items():
        features[view], labels = _read(path, VIEWS[view][0])
        if target is None:
            target, first = labels, path
        elif len(labels) != len(target) or (labels != target).any():
            raise ValueError(
                f"{path}: its {len(labels)} classes differ from the {len(target)} of {first.name}; the six files must "
                f"list the same digits in the same order. Expected:\n{LAYOUT}"
            )
    assert target is not None
    counts = np.bincount(target, minlength=10)
    if counts.min() < 3 or 0 < min(valid, test) * len(target) < 10:
        raise ValueError(
            f"{folder}: expected at least 3 digits of each class, and 10 in each split, got {counts.tolist()}"
        )
    rows = stratified_split(target, valid, test, split_seed)
    info = {
        "name": "mfeat",
        "task": "classification",
        "outputs": 10,
        "classes": [str(c) for c in range(10)],
        "source": "Duin 1998, UCI Multiple Features",
        "licence": "CC BY 4.0",
        "units": {view: text for view, (_, text) in VIEWS.items()},
    }
    if standardised:
        features, _ = standardise(features, rows["train"], per_feature=True)
        info["units"] = {view: f"{text}, standardised on train" for view, (_, text) in VIEWS.items()}
    return make_splits(rows, features, target, [f"mfeat/{i:04d}" for i in range(len(target))], info, split_seed)


def _read(path: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 [n, width] and classes int64 [n] of one file."""
    import pandas as pd

    try:
        table = pd.read_csv(path)
        values = table.to_numpy(dtype=np.float64)
    except (OSError, ValueError, TypeError, OverflowError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path}: not a CSV file of numbers with a header ({error}). Expected:\n{LAYOUT}") from error
    # With one field more in every row than in the header, pandas makes the first one the index
    if values.shape[1] != width + 1 or not len(values) or not isinstance(table.index, pd.RangeIndex):
        extra = "" if isinstance(table.index, pd.RangeIndex) else " and more fields in its rows than in its header"
        raise ValueError(f"{path}: expected {width} features and the class, got a table {values.shape}{extra}")
    if (kinds := set(table.dtypes.astype(str))) - {"int64", "float64"}:
        raise ValueError(f"{path}: expected numbers, got columns of {', '.join(sorted(kinds))}")
    bad = ~(np.abs(values) < _LARGEST)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"{path}: expected finite numbers, got NaN, infinity or others beyond {_LARGEST:g} in row {row}, column "
            f"{column}"
        )
    labels = values[:, -1]
    if (labels != np.round(labels)).any() or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{path}: expected classes 0 to 9 in the last column, got {np.unique(labels)[:12].tolist()}")
    return values[:, :-1], labels.astype(np.int64)
