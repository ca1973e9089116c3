"""scikit-learn's face: a classifier and a regressor over any method, for tables and dicts of arrays with parts missing.

``from mmlib.sklearn import MissingModalityClassifier``. With a frame or a 2-D array and ``columns`` everything of
scikit-learn works on them: Pipeline, GridSearchCV, cross_val_score, clone. A dict of arrays, which also takes sequences
and images, can be fitted, predicted and scored, but scikit-learn cannot split it into folds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from .backbones import GenericBackbone
from .backbones.pooled import MLPEvaluator
from .baselines import CGGM, OGMGE, PMR, JointTraining, MBTSample
from .batch import MultimodalDataset
from .checks import RATE, Flag, Is, Maybe, Named, OneOf, Whole, check_known
from .methods import BALM, DEAR, DREAM, MCE
from .missing import MissingPlan
from .training import TrainConfig, fit, predict, random_state

__all__ = ["METHODS", "MissingModalityClassifier", "MissingModalityRegressor"]

Build = Callable[
    [MultimodalDataset, "MultimodalDataset | None", TrainConfig, dict[str, Any], dict[str, Any]], nn.Module
]


def _on(network: Any, kind: Any) -> Build:
    """A method on a network for the data, its first stage done too."""
    return lambda train, valid, config, net, options: kind.for_data(
        train, network and network.for_data(train, **net), valid, config, **options
    )


METHODS: dict[str, Build] = {
    "joint": _on(GenericBackbone, JointTraining),
    "mce": _on(GenericBackbone, MCE),
    "dream": _on(MLPEvaluator, DREAM),
    "dear": _on(None, DEAR),  # a whole model
    "balm": _on(GenericBackbone, BALM),
    "cggm": _on(GenericBackbone, CGGM),
    "ogm-ge": _on(GenericBackbone, OGMGE),
    "pmr": _on(GenericBackbone, PMR),
    "mbt-sample": _on(GenericBackbone, MBTSample),
}


class _MissingModality(BaseEstimator):
    def __init__(
        self,
        method: str | Build = "joint",
        *,
        columns: Mapping[str, Any] | None = None,
        method_options: Mapping[str, Any] | None = None,
        width: int = 64,
        dropout: float = 0.1,
        modality_dropout: float = 0.2,
        epochs: int = 100,
        batch_size: int = 64,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        validation_fraction: float = 0.1,
        patience: int | None = 20,
        random_state: Any = None,
        device: str = "cpu",
        verbose: bool = False,
    ):
        self.method = method
        self.columns = columns
        self.method_options = method_options
        self.width = width
        self.dropout = dropout
        self.modality_dropout = modality_dropout
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.target_tags.required = True
        return tags

    # --- what comes in ---

    def _data(self, X: Any, reset: bool) -> MultimodalDataset:
        by_name = isinstance(X, Mapping) and not hasattr(X, "shape")  # SciPy has a sparse matrix that is a dict
        if reset:
            self.places_: dict[str, list[int]] | None = None
            for name in {"n_features_in_", "feature_names_in_"} & set(vars(self)):  # of an earlier fit
                delattr(self, name)
        elif by_name != (self.places_ is None):
            kind = "dict of arrays" if self.places_ is None else "frame or array"
            raise TypeError(f"X: expected a {kind} as in fit, got {type(X).__name__}")
        arrays = self._of_dict(X, reset) if by_name else self._of_table(X, reset)
        return MultimodalDataset.from_arrays(arrays, allow_empty=True)

    def _of_dict(self, X: Mapping[str, Any], reset: bool) -> dict[str, Any]:
        """The arrays in the order of fit; a modality that is left out is missing in every sample."""
        if self.columns is not None:
            raise ValueError("columns: expected None for a dict of arrays, whose keys are the modalities")
        if reset:
            return dict(X)
        check_known("X", X, self.feature_shapes_)
        if not X:
            raise ValueError(f"X: expected arrays of some of {list(self.feature_shapes_)}, got none")
        count = len(next(iter(X.values())))
        gone = lambda shape: np.full((count, *shape), np.nan, dtype=np.float32)
        return {m: X[m] if m in X else gone(shape) for m, shape in self.feature_shapes_.items()}

    def _of_table(self, X: Any, reset: bool) -> dict[str, Any]:
        frame = hasattr(X, "iloc") and self.columns is not None
        if frame:  # its other columns may hold anything
            validate_data(self, X, reset=reset, skip_check_array=True)
        else:
            X = validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan")
        if reset:
            self.places_ = {"x": list(range(X.shape[1]))} if self.columns is None else self._places()
            self.means_ = {}
        assert self.places_ is not None
        arrays = {}
        for m, places in self.places_.items():
            x = X.iloc[:, places] if frame else X[:, places]
            x = check_array(x, dtype=np.float64, ensure_all_finite="allow-nan", input_name=f"X[{m!r}]", estimator=self)
            known = ~np.isnan(x)
            if reset:
                self.means_[m] = np.where(known, x, 0).sum(0) / known.sum(0).clip(1)
            # SimpleImputer would fill modalities that are missing too, so what is partly there is filled here.
            partly = known.any(1, keepdims=True) & ~known
            arrays[m] = np.where(partly, self.means_[m], x).astype(np.float32)
        return arrays

    def _places(self) -> dict[str, list[int]]:
        """Where the columns of each modality stand."""
        names = list(getattr(self, "feature_names_in_", []))
        if not isinstance(self.columns, Mapping) or not self.columns:
            raise TypeError(f"columns: expected None or a dict from modalities to columns, got {self.columns!r}")
        found: dict[str, list[int]] = {}
        for m, given in self.columns.items():
            if isinstance(given, str) or not len(list(given)):
                raise ValueError(f"columns[{m!r}]: expected a list of names or positions, got {given!r}")
            for column in given:
                if isinstance(column, str) and column not in names:
                    raise ValueError(f"columns[{m!r}]: {column!r} is not in X, which has {names or 'no names'}")
                if not isinstance(column, str):
                    Whole(0, below=self.n_features_in_)(f"columns[{m!r}]", column)
            found[m] = [names.index(c) if isinstance(c, str) else int(c) for c in given]
        taken = [place for places in found.values() for place in places]
        if len(set(taken)) < len(taken):
            raise ValueError("columns: expected every column once, got one in two places")
        return found

    # --- training and prediction ---

    def _fit(self, data: MultimodalDataset, target: torch.Tensor, info: dict[str, Any], strata: Any) -> None:
        if not callable(self.method):
            OneOf(*METHODS)("method", self.method)
        RATE("modality_dropout", self.modality_dropout)
        RATE("validation_fraction", self.validation_fraction)
        Flag()("verbose", self.verbose)
        Maybe(Named(Is("an option", object), 0))("method_options", self.method_options)
        try:
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        except ValueError as error:
            raise ValueError(f"random_state: {error}") from error
        self.feature_shapes_ = data.feature_shapes
        data = MultimodalDataset(data.data.replace(target=target), info)
        rows = data.present.any(-1).nonzero()[:, 0].numpy()
        if not len(rows):
            raise ValueError("X: expected something in some sample, everything is missing")
        held = int(self.validation_fraction * len(rows))
        config = TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            patience=self.patience if held else None,
            select="best" if held else "last",
            seed=seed,
            device=self.device,
            progress=self.verbose,
        )
        with random_state(seed):
            train, valid = _split(data, rows, held, strata, seed)
            build: Build = self.method if callable(self.method) else METHODS[self.method]
            net = {"width": self.width, "dropout": self.dropout}
            method = build(train, valid, config, net, dict(self.method_options or {}))
        plan = None
        if self.modality_dropout and len(train.modalities) > 1:
            plan = MissingPlan("bernoulli", rates=self.modality_dropout, seed=seed, resample=True)
        self.history_ = fit(method, train, valid, config, train_plan=plan)
        self.method_ = method.cpu()

    def _predict(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Logits float64 [n, K], and where there was something to predict from, bool [n]."""
        check_is_fitted(self)
        data = self._data(X, reset=False)
        return predict(self.method_, data).double().numpy(), data.present.any(-1).numpy()


_DOC = """

    X is a dict of arrays as `MultimodalDataset.from_arrays` takes them, or a frame or array [n, D]. NaN is missing: a
    modality whose values are all NaN is absent from that sample. A NaN among a modality's values in a frame or array
    becomes the column's mean in training; in a dict it is an error. In ``predict`` a dict may leave a modality out.
    Samples of which nothing is there are left out of the training, and what is predicted for them is {prior} of the
    training targets. Columns are not standardised: put a StandardScaler, which passes NaN through, before it in a
    Pipeline.

    method : "joint", "mce", "dream", "dear", "balm", "cggm" or "mbt-sample", for classes and labels "ogm-ge", for
        classes "pmr"; or a function (train, valid, config, net, options) -> method, where ``net`` holds width and
        dropout, and ``options`` is ``method_options``
    columns : of a frame or array, which columns each modality has, by name or position: ``{{"audio": ["a0", "a1"]}}``.
        None: all are one modality "x"
    method_options : for the method's constructor (its ``for_data``, where it has one)
    width, dropout : of the backbone, a `GenericBackbone`; in "dream" of its evaluator. "dear" and "dream" have sizes of
        their own, in ``method_options``
    modality_dropout : in each epoch each present modality of a sample is dropped with this probability, in [0, 1); a
        sample keeps at least one
    epochs, batch_size, lr, weight_decay : as in `TrainConfig`
    validation_fraction : of the samples, in [0, 1), held out to choose the epoch; 0, or too few samples: the last epoch
    patience : stop after so many epochs without a better one; None: never. Without a validation fraction too
    random_state : an integer makes everything deterministic
    device : "cpu", "cuda" or "auto", for training; predictions are made on the CPU
    verbose : show a progress bar

    Fitted: ``method_`` (the trained method), ``history_``, ``feature_shapes_``, {fitted}. Raises ValueError and
    TypeError naming the argument, in ``fit``.
"""


class MissingModalityClassifier(ClassifierMixin, _MissingModality):
    __doc__ = (
        "A classifier of samples with missing modalities; y has classes of any kind, or is 0/1 [n, K] for K labels."
        + _DOC.format(prior="by the frequencies", fitted="``classes_``, ``prior_``")
    )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def fit(self, X: Any, y: Any) -> MissingModalityClassifier:
        """Train on X with the classes y [n], or the labels y [n, K]."""
        data = self._data(X, reset=True)
        y = check_array(_given(self, y), ensure_2d=False, dtype=None, input_name="y", estimator=self)
        check_consistent_length(data, y)
        check_classification_targets(y)
        self.multilabel_ = type_of_target(y, input_name="y") == "multilabel-indicator"
        if self.multilabel_:
            self.classes_, self.prior_ = np.arange(y.shape[1]), y.mean(0, dtype=np.float64)
            info = {"task": "multilabel", "outputs": y.shape[1]}
            self._fit(data, torch.from_numpy(y.astype(bool)), info, None)
            return self
        self.classes_, codes = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        self.prior_ = np.bincount(codes) / len(codes)
        info = {"task": "classification", "outputs": len(self.classes_)}
        self._fit(data, torch.from_numpy(codes.astype(np.int64)), info, codes)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class in the order of ``classes_``, or of each label: [n, K]."""
        logits, there = self._predict(X)
        values = torch.from_numpy(logits)
        found = (values.sigmoid() if self.multilabel_ else values.softmax(-1)).numpy()
        return np.where(there[:, None], found, self.prior_)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class [n]; for labels 0 or 1 [n, K], 1 where the probability is above one half."""
        found = self.predict_proba(X)
        return (found > 0.5).astype(np.int64) if self.multilabel_ else self.classes_[found.argmax(-1)]


class MissingModalityRegressor(RegressorMixin, _MissingModality):
    __doc__ = (
        "A regressor of samples with missing modalities, on the absolute error; y is standardised inside."
        + _DOC.format(prior="the mean", fitted="``mean_``, ``scale_``")
    )

    def fit(self, X: Any, y: Any) -> MissingModalityRegressor:
        """Train on X with the scores y [n]."""
        data = self._data(X, reset=True)
        y = check_array(_given(self, y), ensure_2d=False, dtype=np.float64, input_name="y", estimator=self)
        y = column_or_1d(y, warn=True)
        check_consistent_length(data, y)
        self.mean_, self.scale_ = float(y.mean()), float(y.std()) or 1.0
        scores = torch.from_numpy(((y - self.mean_) / self.scale_).astype(np.float32))
        self._fit(data, scores, {"task": "regression", "outputs": 1}, None)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The score of each sample [n]."""
        logits, there = self._predict(X)
        return np.where(there, logits[:, 0], 0) * self.scale_ + self.mean_


def _split(
    data: MultimodalDataset, rows: np.ndarray, held: int, strata: np.ndarray | None, seed: int
) -> tuple[MultimodalDataset, MultimodalDataset | None]:
    """The samples at ``rows`` without, and of, the ``held`` ones; with the same classes in both where that can be."""
    if not held:
        return data.subset(torch.from_numpy(rows)), None
    from sklearn.model_selection import train_test_split  # not above: its import draws from Python's random numbers

    if strata is not None:
        counts = np.bincount(strata[rows])
        rare = counts.min() < 2 or len(counts) > min(held, len(rows) - held)
        strata = None if rare else strata[rows]
    kept, others = train_test_split(rows, test_size=held, random_state=seed, stratify=strata)
    return data.subset(torch.from_numpy(kept)), data.subset(torch.from_numpy(others))


def _given(estimator: BaseEstimator, y: Any) -> Any:
    if y is None:
        raise ValueError(
            f"This {type(estimator).__name__} estimator requires y to be passed, but the target y is None."
        )
    return y
