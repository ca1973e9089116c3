"""The scikit-learn face: scikit-learn's own checks, its tools on tables with parts missing, and what is documented."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from mmlib.backbones import GenericBackbone
from mmlib.baselines import JointTraining
from mmlib.sklearn import METHODS, MissingModalityClassifier, MissingModalityRegressor

QUICK: dict[str, Any] = {"epochs": 3, "lr": 0.02, "batch_size": 32, "width": 16, "random_state": 0}
SMALL: dict[str, Any] = {**QUICK, "epochs": 12}
COLUMNS = {"audio": ["a0", "a1"], "face": ["f0", "f1", "f2"]}
ROUNDING = "float32: a sample's last digit may depend on the batch that it is predicted in"


@pytest.mark.slow
def test_the_rounding_is_all_that_a_batch_changes() -> None:
    frame, y = table()
    model = MissingModalityClassifier(columns=COLUMNS, **QUICK).fit(frame, y)
    whole = model.predict_proba(frame)
    assert np.allclose(whole[::-1], model.predict_proba(frame.iloc[::-1]), atol=1e-6)
    assert np.allclose(whole[:5], [model.predict_proba(frame.iloc[i : i + 1])[0] for i in range(5)], atol=1e-6)


@pytest.mark.slow
@parametrize_with_checks(
    [MissingModalityClassifier(**QUICK), MissingModalityRegressor(**QUICK)],
    expected_failed_checks=lambda estimator: {
        "check_methods_sample_order_invariance": ROUNDING,
        "check_methods_subset_invariance": ROUNDING,
    },
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def table(n: int = 240, seed: int = 0, missing: float = 0.25) -> tuple[pd.DataFrame, np.ndarray]:
    """Either modality tells the class; a text column beside them is not for the model."""
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 3, n)
    values = rng.normal(size=(n, 5)) + 2 * np.eye(3)[code][:, [0, 1, 0, 1, 2]]
    frame = pd.DataFrame(values, columns=["a0", "a1", "f0", "f1", "f2"])
    gone = rng.random((n, 2)) < missing
    gone[:, 0] &= ~gone[:, 1]
    for m, names in enumerate(COLUMNS.values()):
        frame.loc[gone[:, m], names] = np.nan
    frame["name"] = [f"patient {i}" for i in range(n)]
    return frame, np.array(["calm", "cross", "glad"])[code]


def arrays(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    return {m: frame[names].to_numpy() for m, names in COLUMNS.items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "dream": {"width": 16, "heads": 2, "repeats": 1},
    "dear": {"width": 16, "heads": 2, "head_width": 8, "hidden": 16, "layers": 1},
    "mce": {"hidden": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_a_frame_with_text_labels(method: str) -> None:
    frame, y = table()
    model = MissingModalityClassifier(method, columns=COLUMNS, method_options=OPTIONS.get(method), **SMALL)
    model.fit(frame, y)
    assert model.classes_.tolist() == ["calm", "cross", "glad"]
    test, truth = table(200, seed=1)
    assert model.score(test, truth) > 0.6
    proba = model.predict_proba(test)
    assert proba.shape == (200, 3)
    assert np.allclose(proba.sum(1), 1)
    assert (model.predict(test) == model.classes_[proba.argmax(1)]).all()


@pytest.mark.slow
def test_a_seed_makes_it_deterministic_and_a_pickle_is_the_model() -> None:
    frame, y = table()
    first = MissingModalityClassifier(columns=COLUMNS, **QUICK).fit(frame, y)
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    before = states()
    again = clone(first).fit(frame, y)
    assert states() == before
    assert np.array_equal(first.predict_proba(frame), again.predict_proba(frame))
    assert np.array_equal(first.predict_proba(frame), pickle.loads(pickle.dumps(first)).predict_proba(frame))
    other = clone(first).set_params(random_state=1).fit(frame, y)
    assert not np.allclose(first.predict_proba(frame), other.predict_proba(frame))
    # By positions, or as a dict of arrays, it is the same model.
    by_place = clone(first).set_params(columns={"audio": [0, 1], "face": [2, 3, 4]})
    values = frame.drop(columns="name").to_numpy()
    assert np.array_equal(first.predict_proba(frame), by_place.fit(values, y).predict_proba(values))
    by_name = clone(first).set_params(columns=None).fit(arrays(frame), y)
    assert np.array_equal(first.predict_proba(frame), by_name.predict_proba(arrays(frame)))


@pytest.mark.slow
def test_scikit_learns_tools_run_on_a_frame() -> None:
    frame, y = table(150)
    frame = frame.drop(columns="name")
    scaled = StandardScaler().set_output(transform="pandas")
    model = make_pipeline(scaled, MissingModalityClassifier(columns=COLUMNS, **QUICK))
    assert cross_val_score(model, frame, y, cv=3).mean() > 0.5
    grid = {"missingmodalityclassifier__width": [4, 16], "missingmodalityclassifier__method": ["joint", "balm"]}
    search = GridSearchCV(model, grid, cv=2).fit(frame, y)
    assert len(search.cv_results_["params"]) == 4
    assert search.predict(frame.iloc[:3]).shape == (3,)


@pytest.mark.slow
def test_missing_modalities_missing_values_and_nothing_at_all() -> None:
    frame, y = table()
    model = MissingModalityClassifier(columns=COLUMNS, **SMALL).fit(frame, y)
    empty = frame.iloc[:4].copy()
    empty[[c for names in COLUMNS.values() for c in names]] = np.nan
    frequencies = [(y == c).mean() for c in ("calm", "cross", "glad")]
    assert np.allclose(model.predict_proba(empty), frequencies)
    # A value that is missing beside others is the column's mean, and does not make the modality missing.
    partly = frame[frame.notna().all(axis=1)].iloc[:4].copy()
    filled = partly.copy()
    partly["f1"], filled["f1"] = np.nan, frame["f1"].mean()
    assert np.allclose(model.predict_proba(partly), model.predict_proba(filled), atol=1e-6)
    gone = partly.copy()
    gone[COLUMNS["face"]] = np.nan
    assert not np.allclose(model.predict_proba(partly), model.predict_proba(gone), atol=1e-3)
    # Rows with nothing teach nothing but how frequent the classes are.
    with_empty = pd.concat([frame, empty])
    taught = clone(model).fit(with_empty, np.append(y, ["calm"] * 4))
    assert taught.prior_[0] == pytest.approx(((y == "calm").sum() + 4) / (len(y) + 4))
    by_name = MissingModalityClassifier(**SMALL).fit(arrays(frame), y)
    assert np.allclose(by_name.predict_proba({"face": arrays(gone)["face"]}), model.predict_proba(empty), atol=1e-6)
    audio = arrays(gone)["audio"]
    assert np.allclose(by_name.predict_proba({"audio": audio}), model.predict_proba(gone), atol=1e-6)


@pytest.mark.slow
def test_several_labels() -> None:
    rng = np.random.default_rng(0)
    X = {"a": rng.normal(size=(200, 3)), "b": rng.normal(size=(200, 6, 2))}
    y = np.stack([X["a"][:, 0] > 0, X["b"].mean(1)[:, 0] > 0], 1).astype(int)
    X["b"][::5] = np.nan
    model = MissingModalityClassifier(**{**SMALL, "epochs": 30}).fit(X, y)
    proba, found = model.predict_proba(X), model.predict(X)
    assert proba.shape == found.shape == (200, 2)
    assert np.array_equal(found, (proba > 0.5).astype(int))
    assert (found == y).mean() > 0.75
    assert model.score(X, y) == (found == y).all(1).mean()


@pytest.mark.slow
def test_regression_in_the_units_of_the_target() -> None:
    rng = np.random.default_rng(0)
    frame, _ = table(300)
    frame = frame.drop(columns="name").fillna(0.0)
    y = 150 + 40 * (frame["a0"] + frame["f1"]) + rng.normal(size=300)
    frame.loc[:40, COLUMNS["face"]] = np.nan
    model = MissingModalityRegressor(columns=COLUMNS, **{**SMALL, "epochs": 30}).fit(frame, y)
    assert model.score(frame, y) > 0.7
    empty = frame.iloc[:2] * np.nan
    assert model.predict(empty) == pytest.approx([y.mean()] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*METHODS} - {"joint", "ogm-ge", "pmr"}))
def test_the_methods_that_take_scores_or_labels(method: str) -> None:
    frame, y = table(120)
    scores, labels = (y == "calm") * 3.0 + 20, np.stack([y == "calm", y != "cross"], 1).astype(int)
    options = {"columns": COLUMNS, "method_options": OPTIONS.get(method), **{**SMALL, "epochs": 10}}
    assert MissingModalityRegressor(method, **options).fit(frame, scores).score(frame, scores) > 0
    assert MissingModalityClassifier(method, **options).fit(frame, labels).predict(frame).shape == (120, 2)


@pytest.mark.parametrize("method", ["ogm-ge", "pmr"])
def test_a_method_that_takes_no_scores_says_so(method: str) -> None:
    frame, y = table(40)
    with pytest.raises(ValueError, match="data: expected classes"):
        MissingModalityRegressor(method, columns=COLUMNS, **QUICK).fit(frame, np.arange(40.0))


def test_a_method_of_ones_own() -> None:
    frame, y = table(60)

    def plain(train: Any, valid: Any, config: Any, net: Any, options: Any) -> torch.nn.Module:
        return JointTraining(GenericBackbone.for_data(train, **net), **options)

    model = MissingModalityClassifier(plain, columns=COLUMNS, **QUICK).fit(frame, y)
    named = MissingModalityClassifier("joint", columns=COLUMNS, **QUICK).fit(frame, y)
    assert np.array_equal(model.predict_proba(frame), named.predict_proba(frame))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "jont"}, ValueError, "method: expected one of joint, mce"),
        ({"columns": {"audio": ["a0", "b"]}}, ValueError, r"columns\['audio'\]: 'b' is not in X, which has"),
        ({"columns": {"audio": "a0"}}, ValueError, r"columns\['audio'\]: expected a list"),
        ({"columns": {"audio": [0, 9]}}, ValueError, r"columns\['audio'\]: expected an integer in"),
        ({"columns": {"audio": [0.5]}}, TypeError, r"columns\['audio'\]: expected an integer"),
        ({"columns": {"audio": ["a0"], "face": [0]}}, ValueError, "expected every column once"),
        ({"columns": ["a0"]}, TypeError, "columns: expected None or a dict"),
        ({"columns": {}}, TypeError, "columns: expected None or a dict"),
        ({"modality_dropout": 1.0}, ValueError, "modality_dropout"),
        ({"validation_fraction": "0.1"}, TypeError, "validation_fraction"),
        ({"lr": -1}, ValueError, "lr: expected"),
        ({"epochs": 0}, ValueError, "epochs: expected"),
        ({"width": 0}, ValueError, "width: expected"),
        ({"verbose": 1}, TypeError, "verbose: expected True or False"),
        ({"method_options": {"tau": 1}}, TypeError, "tau"),
        (
            {"method": "balm", "columns": {"audio": ["a0"]}},
            ValueError,
            "encoders: expected a dict by names with at least 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    frame, y = table(40)
    with pytest.raises(error, match=match):
        MissingModalityClassifier(**{"columns": COLUMNS, **QUICK, **options}).fit(frame, y)


def test_tables_and_dicts_are_not_mixed() -> None:
    frame, y = table(40)
    model = MissingModalityClassifier(columns=COLUMNS, **QUICK)
    with pytest.raises(NotFittedError):
        model.predict(frame)
    with pytest.raises(ValueError, match="columns: expected None for a dict"):
        model.fit(arrays(frame), y)
    with pytest.raises(TypeError, match="X: expected a frame or array as in fit, got dict"):
        model.fit(frame, y).predict(arrays(frame))
    by_name = MissingModalityClassifier(**QUICK).fit(arrays(frame), y)
    with pytest.raises(TypeError, match="X: expected a dict of arrays as in fit, got DataFrame"):
        by_name.predict(frame)
    with pytest.raises(ValueError, match="X: .*'smell'"):
        by_name.predict({"smell": np.zeros((2, 2))})
    with pytest.raises(ValueError, match="X: expected something in some sample"):
        clone(by_name).fit({m: x * np.nan for m, x in arrays(frame).items()}, y)
