"""What the papers report, with every convention named: sentiment and class scores, robustness, calibration, statistics.

Predictions come first and targets second everywhere, as tensors or arrays. scikit-learn computes what it has; its
functions take ``(y_true, y_pred)``, and turning that round changes a weighted F1 without any error (`weighted_f1`).
Scores are fractions, not percentages. A value that is not defined is NaN; an input that cannot be scored is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .checks import Flag, Maybe, Number, OneOf, Whole, shown

__all__ = [
    "CONVENTIONS",
    "Interval",
    "auilc",
    "brier",
    "calibration_scores",
    "classification_scores",
    "ece",
    "equity",
    "learning_balance",
    "msa_scores",
    "multilabel_scores",
    "one_vs_rest_f1",
    "pattern_average",
    "reliability_bins",
    "risk_coverage",
    "sentiment_classes",
    "t_interval",
    "weighted_f1",
    "worst_pattern",
]

Array = np.ndarray


# --------------------------------------------------------------------------------------------------------- inputs


def _numpy(name: str, values: Any) -> Array:
    """``values`` as a NumPy array of numbers, finite and not empty; floats keep their precision."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    try:
        x = np.asarray(values)
    except ValueError as error:  # rows of unequal lengths
        raise ValueError(f"{name}: expected an array of numbers, got {shown(values)}") from error
    if x.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected integers or floats, got {x.dtype}")
    if x.size == 0:
        raise ValueError(f"{name}: expected at least one value, got an empty array of shape {x.shape}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        raise ValueError(f"{name}: expected finite values, got {bad} NaN or infinite ones among {x.size}")
    return x


def _scores(pred: Any, target: Any) -> tuple[Array, Array]:
    """Two flat arrays of as many scores; [n, 1] and [n] go together, [n, 2] and [2, n] do not."""
    p, t = _numpy("pred", pred), _numpy("target", target)
    if p.squeeze().shape != t.squeeze().shape:
        raise ValueError(f"pred, target: expected the same number of scores, got shapes {p.shape} and {t.shape}")
    floats = lambda x: x.ravel() if x.dtype.kind == "f" else x.ravel().astype(np.float64)
    return floats(p), floats(t)


def _classes(pred: Any, target: Any, classes: int | None) -> tuple[Array, Array, int]:
    """(predicted classes [n], true classes [n], K) from class indices, or logits with the classes last."""
    p, t = _numpy("pred", pred), _numpy("target", target)
    Maybe(Whole(1))("classes", classes)
    if t.dtype.kind == "f":
        raise TypeError(f"target: expected integer classes, got {t.dtype}")
    if p.dtype.kind == "f" and p.ndim == t.ndim + 1 and p.shape[:-1] == t.shape:
        if classes is not None and classes != p.shape[-1]:
            raise ValueError(f"classes: pred has {p.shape[-1]} logits a sample, got classes={classes}")
        classes, p = p.shape[-1], p.argmax(-1)
    if p.dtype.kind == "f" or p.shape != t.shape:
        raise ValueError(
            f"pred, target: expected classes of one shape or logits [*N, K] with classes [*N], got {p.dtype} "
            f"{p.shape} and {t.dtype} {t.shape}"
        )
    p, t = p.ravel(), t.ravel()
    k = int(max(p.max(), t.max())) + 1 if classes is None else classes
    for name, x in (("pred", p), ("target", t)):
        if x.min() < 0 or x.max() >= k:
            raise ValueError(f"{name}: expected classes in [0, {k}), got values from {x.min()} to {x.max()}")
    return p, t, k


def _probabilities(probabilities: Any, target: Any) -> tuple[Array, Array]:
    """(probabilities [n, K], classes [n]), checked: rows are distributions."""
    p, t = _numpy("probabilities", probabilities), _numpy("target", target)
    if p.ndim != t.ndim + 1 or p.shape[:-1] != t.shape or p.shape[-1] < 2:
        raise ValueError(f"probabilities: expected [*N, K] with K >= 2 for targets {t.shape}, got {p.shape}")
    p = p.reshape(-1, p.shape[-1]).astype(np.float64)
    if p.min() < -1e-6 or np.abs(p.sum(-1) - 1).max() > 1e-3:
        raise ValueError(
            "probabilities: expected rows that are non-negative and sum to 1 (a softmax, not logits), got values "
            f"from {p.min():.3g} to {p.max():.3g} and row sums from {p.sum(-1).min():.3g} to {p.sum(-1).max():.3g}"
        )
    _, t, _ = _classes(np.zeros_like(t.ravel()), t.ravel(), p.shape[-1])
    return p, t


# ------------------------------------------------------------------------------------------- sentiment regression


def _round(limit: float) -> Callable[[Array], Array]:
    return lambda x: (np.rint(np.clip(x, -limit, limit)) + limit).astype(np.int64)  # rint: half to even


def _above(*edges: float) -> Callable[[Array], Array]:
    """Bins closed on the right: the class is the number of edges that lie below the score.

    Scores are compared in their own precision: a float32 0.1 is not above 0.1.
    """
    return lambda x: sum((x > edge).astype(np.int64) for edge in edges)  # type: ignore[return-value]


CONVENTIONS: dict[str, Callable[[Array], Array]] = {
    "acc7": _round(3),  # MOSI, MOSEI: clip to +-3 and round half to even
    "acc5": _round(2),  # MOSI, MOSEI: clip to +-2 and round half to even
    "acc3": _round(1),  # computed but not returned by MMSA
    "has0": lambda x: (x >= 0).astype(np.int64),  # negative against non-negative, all samples
    "non0": lambda x: (x > 0).astype(np.int64),  # negative against positive, after dropping the samples with target 0
    "above0": lambda x: (x > 0).astype(np.int64),  # MulT, MPLMM: zero counts as negative, all samples
    "sims2": _above(0),  # SIMS: [-1, 0], (0, 1]
    "sims3": _above(-0.1, 0.1),
    "sims5": _above(-0.7, -0.1, 0.1, 0.7),
}
"""How sentiment scores become classes. "sims" conventions expect scores clipped to [-1, 1] (`msa_scores` does that)."""


def sentiment_classes(scores: Any, convention: str) -> Array:
    """Classes (int64, from 0) of sentiment ``scores`` under one of `CONVENTIONS`, same shape.

    Raises ValueError for an unknown convention, NaN, infinity or no scores.
    """
    OneOf(*CONVENTIONS)("convention", convention)
    return CONVENTIONS[convention](_numpy("scores", scores))


def weighted_f1(pred: Any, target: Any) -> float:
    """F1 of every class that occurs in ``target``, averaged with the classes' counts in ``target`` as weights.

    Classes int [n] each; in [0, 1]. The weights come from the second argument, so ``weighted_f1(target, pred)`` is
    another number: each class's F1 stays (precision and recall swap), but the weights become the prediction's counts.
    Several releases call scikit-learn's ``f1_score(y_true, y_pred)`` with its arguments in that wrong order.
    """
    from sklearn.metrics import f1_score

    p, t, _ = _classes(pred, target, None)
    return float(f1_score(t, p, average="weighted", zero_division=0))


def _accuracy(p: Array, t: Array) -> float:
    return float((p == t).mean()) if len(t) else math.nan


def _mae(p: Array, t: Array) -> float:
    return float(np.abs(p.astype(np.float64) - t.astype(np.float64)).mean())


def _pearson(p: Array, t: Array) -> float:
    """Pearson's correlation in [-1, 1]; NaN where either side is constant."""
    if (p == p[0]).all() or (t == t[0]).all():
        return math.nan
    a, b = p.astype(np.float64), t.astype(np.float64)
    # Scaled first, so that neither tiny nor huge scores under- or overflow in the squares.
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip((a @ b) / math.sqrt((a @ a) * (b @ b)), -1, 1))


def msa_scores(pred: Any, target: Any, scale: str = "mosi") -> dict[str, float]:
    """The scores of multimodal sentiment regression, as MMSA and its descendants define them.

    pred, target : as many scores each, any shape (flattened); ``scale`` "mosi" ([-3, 3], also MOSEI) or "sims"
    ([-1, 1], also SIMS v2).

    ``scale="mosi"`` returns

    * ``acc7``, ``acc5``: both sides clipped to [-3, 3] or [-2, 2] and rounded *half to even* (0.5 -> 0, 1.5 -> 2,
      2.5 -> 2), equal or not;
    * ``acc2_has0``, ``f1_has0``: negative (< 0) against non-negative (>= 0), all samples;
    * ``acc2_non0``, ``f1_non0``: samples with ``target == 0`` dropped, then positive (> 0) against the rest, so a
      prediction of exactly 0 counts as negative;
    * ``mae``, ``corr``: mean absolute error and Pearson's correlation of the scores as they are.

    ``scale="sims"`` first clips both sides to [-1, 1], for every score, and returns

    * ``acc2``, ``f1``: [-1, 0] against (0, 1]: *zero counts as negative*, on the other side than Has0;
    * ``acc3``: [-1, -0.1], (-0.1, 0.1], (0.1, 1]; ``acc5``: edges -0.7, -0.1, 0.1, 0.7; bins closed on the right;
    * ``mae``, ``corr``: after the clipping.

    Every F1 is the weighted F1 with the weights of the target (`weighted_f1`). The papers' "a/b" is Has0/Non0. Values
    are fractions and not rounded (MMSA rounds to four decimals). NaN: ``corr`` where a side is constant, ``acc2_non0``
    and ``f1_non0`` where every target is 0. Targets beyond the scale are clipped like predictions.

    Raises ValueError for an unknown scale, unequal lengths, NaN, infinity or no scores; TypeError for non-numbers.
    """
    OneOf("mosi", "sims")("scale", scale)
    p, t = _scores(pred, target)
    both = lambda convention: (CONVENTIONS[convention](p), CONVENTIONS[convention](t))
    if scale == "mosi":
        keep = t != 0
        non0 = both("non0")[0][keep], both("non0")[1][keep]
        return {
            "acc7": _accuracy(*both("acc7")),
            "acc5": _accuracy(*both("acc5")),
            "acc2_has0": _accuracy(*both("has0")),
            "f1_has0": weighted_f1(*both("has0")),
            "acc2_non0": _accuracy(*non0),
            "f1_non0": weighted_f1(*non0) if keep.any() else math.nan,
            "mae": _mae(p, t),
            "corr": _pearson(p, t),
        }
    if scale == "sims":
        p, t = np.clip(p, -1, 1), np.clip(t, -1, 1)
        return {
            "acc2": _accuracy(*both("sims2")),
            "acc3": _accuracy(*both("sims3")),
            "acc5": _accuracy(*both("sims5")),
            "f1": weighted_f1(*both("sims2")),
            "mae": _mae(p, t),
            "corr": _pearson(p, t),
        }
    raise ValueError(f"scale: expected 'mosi' or 'sims', got {scale!r}")


# ------------------------------------------------------------------------------------------------- classification


def classification_scores(
    pred: Any, target: Any, classes: int | None = None, per_class: bool = False
) -> dict[str, float]:
    """Accuracy, unweighted average recall, macro and weighted F1, as fractions.

    pred : classes int [*N], or logits [*N, K], of which the largest counts (the first of equals)
    target : classes int [*N]; ``classes`` K, default what the logits or the labels show

    * ``accuracy``: also called weighted accuracy (WA) in emotion recognition;
    * ``uar``: the mean recall of the classes that occur in the target (UAR, balanced accuracy);
    * ``macro_f1``: the plain mean of the F1 of every class that occurs in target or prediction;
    * ``weighted_f1``: see `weighted_f1`.

    ``per_class`` adds ``recall_k``, ``precision_k`` and ``f1_k`` for k in [0, K): recall is NaN for a class without a
    sample, precision for one that is never predicted, F1 for one that is neither.

    Raises ValueError for unequal shapes, NaN logits, no samples, classes outside [0, K); TypeError for float targets.
    """
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    p, t, k = _classes(pred, target, classes)
    Flag()("per_class", per_class)
    precision, recall, f1, count = precision_recall_fscore_support(t, p, labels=range(k), zero_division=0)
    predicted = np.bincount(p, minlength=k)
    scores = {
        "accuracy": _accuracy(p, t),
        "uar": float(recall[count > 0].mean()),
        "macro_f1": float(f1_score(t, p, average="macro", zero_division=0)),
        "weighted_f1": float(f1_score(t, p, average="weighted", zero_division=0)),
    }
    if per_class:
        for c in range(k):
            scores[f"recall_{c}"] = float(recall[c]) if count[c] else math.nan
            scores[f"precision_{c}"] = float(precision[c]) if predicted[c] else math.nan
            scores[f"f1_{c}"] = float(f1[c]) if count[c] or predicted[c] else math.nan
    return scores


def one_vs_rest_f1(pred: Any, target: Any, classes: int | None = None) -> dict[str, float]:
    """The "4 x 2" reading of IEMOCAP: each class against the rest as a binary task, scored by its weighted F1.

    Input as for `classification_scores`. Returns ``f1_k`` for k in [0, K) and their mean ``f1``. The rest is usually
    the larger side of a task, so these numbers lie above a macro F1. Its source (MulT) trains two outputs a class;
    here the binary answers are read off one prediction, so exactly one of them is yes.
    """
    p, t, k = _classes(pred, target, classes)
    scores = {f"f1_{c}": weighted_f1((p == c).astype(int), (t == c).astype(int)) for c in range(k)}
    return {"f1": float(np.mean(list(scores.values()))), **scores}


def multilabel_scores(pred: Any, target: Any, threshold: float = 0.0) -> dict[str, float]:
    """The scores of samples with any number of K yes-or-no labels, as fractions.

    pred : logits [*N, K], or what is predicted, bool or integers 0 and 1 [*N, K]
    target : bool, or integers 0 and 1 [*N, K]
    threshold : a label is predicted where its logit lies above; for probabilities in place of logits 0.5

    * ``subset_accuracy``: samples of which all labels are right; ``hamming_accuracy``: right labels among all;
    * ``micro_f1``: F1 of all labels of all samples counted together; ``macro_f1``: the mean of the F1 of each label,
      without those that are neither in the target nor predicted;
    * ``macro_auroc``, ``macro_ap``: the mean over labels of the area under the ROC curve and of the average precision,
      without those of which the target has one side only.

    NaN where nothing is left of a mean, ``macro_auroc`` and ``macro_ap`` also for ``pred`` without logits, and
    ``micro_f1`` where no label is in the target or predicted. Raises ValueError for other shapes and values, TypeError
    for float targets.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    Number()("threshold", threshold)
    p, t = _yes_or_no("pred", pred), _yes_or_no("target", target)
    if t.dtype.kind == "f":
        raise TypeError(f"target: expected bool, or integers 0 and 1, got {t.dtype}")
    if p.shape != t.shape or p.ndim < 2:
        raise ValueError(f"pred, target: expected both [*N, K], got shapes {p.shape} and {t.shape}")
    p, t = p.reshape(-1, p.shape[-1]), t.reshape(-1, t.shape[-1])
    found = p > threshold if p.dtype.kind == "f" else p
    hits, counts = (found & t).sum(0), found.sum(0) + t.sum(0)  # of each label: F1 is 2 hits / counts
    mean = lambda values: float(np.mean(values)) if len(values) else math.nan
    scores = {
        "subset_accuracy": float((found == t).all(-1).mean()),
        "hamming_accuracy": float((found == t).mean()),
        "micro_f1": float(2 * hits.sum() / counts.sum()) if counts.any() else math.nan,
        "macro_f1": mean(2 * hits[counts > 0] / counts[counts > 0]),
        "macro_auroc": math.nan,
        "macro_ap": math.nan,
    }
    both = t.any(0) & ~t.all(0)
    if p.dtype.kind == "f" and both.any():
        scores["macro_auroc"] = float(roc_auc_score(t[:, both], p[:, both], average="macro"))
        scores["macro_ap"] = float(average_precision_score(t[:, both], p[:, both], average="macro"))
    return scores


def _yes_or_no(name: str, values: Any) -> Array:
    """Bools as they are, integers 0 and 1 as bools, floats as floats."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.numpy() if str(values.dtype) == "torch.bool" else values
    x = np.asarray(values) if str(getattr(values, "dtype", "")) == "bool" else _numpy(name, values)
    if x.size == 0:
        raise ValueError(f"{name}: expected at least one value, got an empty array of shape {x.shape}")
    if x.dtype.kind in "iu":
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"{name}: expected integers 0 and 1, got values from {x.min()} to {x.max()}")
        x = x.astype(bool)
    return x


# ------------------------------------------------------------------------------------- robustness over patterns


def auilc(rates: Any, scores: Any, *, normalise: bool = False) -> float:
    """Area under the line of ``scores`` over missing ``rates`` (AUILC, TFR-Net), by the trapezoid rule.

    rates : at least two, strictly increasing, in [0, 1]; scores : one a rate

    ``normalise=False`` (TFR-Net) is the area itself, which depends on the range: over 0 to 0.9 a constant score of 1
    gives 0.9. ``normalise=True`` divides by the range, which makes it a mean score.
    """
    Flag()("normalise", normalise)
    r, s = _numpy("rates", rates).astype(np.float64), _numpy("scores", scores).astype(np.float64)
    if r.ndim != 1 or r.shape != s.shape or len(r) < 2:
        raise ValueError(f"rates, scores: expected two flat arrays of at least 2, got shapes {r.shape} and {s.shape}")
    if (np.diff(r) <= 0).any() or r[0] < 0 or r[-1] > 1:
        raise ValueError(f"rates: expected strictly increasing rates in [0, 1], got {r.tolist()}")
    area = float(np.trapezoid(s, r))
    return area / float(r[-1] - r[0]) if normalise else area


def _patterns(scores: Mapping[Hashable, Any]) -> Array:
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores: expected a mapping from patterns to scores, got {shown(scores)}")
    if not scores:
        raise ValueError("scores: expected a mapping from at least one pattern to its score, got none")
    try:
        if None in scores.values():
            raise TypeError
        return np.stack([np.asarray(v, dtype=np.float64) for v in scores.values()])
    except TypeError as error:
        raise TypeError(f"scores: expected numbers, got {shown(scores)}") from error
    except ValueError as error:
        raise ValueError(f"scores: expected numbers, or rows of one length, got {shown(scores)}") from error


def worst_pattern(scores: Mapping[Hashable, float], higher_is_better: bool = True) -> tuple[Hashable, float]:
    """The pattern (or rate) with the worst score, and that score; the first of equals.

    Raises ValueError where a score is NaN: the worst of an incomplete table is not known.
    """
    values = _patterns(scores)
    Flag()("higher_is_better", higher_is_better)
    if values.ndim != 1 or np.isnan(values).any():
        missing = [k for k, v in scores.items() if np.ndim(v) or math.isnan(v)]
        raise ValueError(f"scores: expected one number a pattern, got none for {missing}")
    place = int(values.argmin() if higher_is_better else values.argmax())
    return list(scores)[place], float(values[place])


def pattern_average(scores: Mapping[Hashable, Any], weights: Mapping[Hashable, float] | None = None) -> Any:
    """The mean score over patterns (or rates), every pattern counting once, or by ``weights``.

    ``scores[pattern]`` is a number or a row of numbers (all of one length); returns a float or a row. NaN anywhere
    makes that column NaN: a mean over fewer patterns is not comparable.
    """
    values = _patterns(scores)
    if weights is None:
        mean = values.mean(0)
    else:
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights: expected a mapping from patterns to weights, got {shown(weights)}")
        for pattern, weight in weights.items():
            Number(0)(f"weights[{pattern!r}]", weight)
        if set(weights) != set(scores) or sum(weights.values()) <= 0:
            raise ValueError(f"weights: expected non-negative weights, not all 0, for {list(scores)}, got {weights}")
        mean = np.average(values, axis=0, weights=[weights[k] for k in scores])
    return float(mean) if mean.ndim == 0 else mean


# ---------------------------------------------------------------------------------------------------- calibration


def reliability_bins(probabilities: Any, target: Any, bins: int = 15) -> dict[str, Array]:
    """Accuracy and mean confidence of the samples in equal-width bins of their top probability.

    probabilities [*N, K], rows sum to 1; target int [*N]. Bins are closed on the right, the first also on the left.
    Returns ``confidence``, ``accuracy`` (NaN for an empty bin), ``count`` and ``edges`` (bins + 1).
    """
    p, t = _probabilities(probabilities, target)
    Whole(1)("bins", bins)
    confidence, correct = p.max(-1), (p.argmax(-1) == t).astype(np.float64)
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = lambda x: np.bincount(place, weights=x, minlength=bins) / count
        return {"confidence": mean(confidence), "accuracy": mean(correct), "count": count, "edges": edges}


def ece(probabilities: Any, target: Any, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: mean gap between accuracy and top probability over `reliability_bins`."""
    b = reliability_bins(probabilities, target, bins)
    there = b["count"] > 0
    gap = np.abs(b["accuracy"][there] - b["confidence"][there])
    return float((b["count"][there] * gap).sum() / b["count"].sum())


def brier(probabilities: Any, target: Any) -> float:
    """Brier's score in [0, 2]: the squared distance to the one-hot target, summed over classes, mean over samples.

    For two classes it is twice the value of the binary form.
    """
    p, t = _probabilities(probabilities, target)
    return float(((p - np.eye(p.shape[-1])[t]) ** 2).sum(-1).mean())


def risk_coverage(probabilities: Any, target: Any) -> dict[str, Any]:
    """Error among the most confident samples, over how many of them one answers.

    Returns ``coverage`` [n] (1/n to 1), ``risk`` [n] (the error rate among the most confident) and ``aurc``, the mean
    risk over coverages. Samples of equal confidence share their risk (its expectation over their orders).
    """
    p, t = _probabilities(probabilities, target)
    confidence, wrong = p.max(-1), (p.argmax(-1) != t).astype(np.float64)
    values, group = np.unique(-confidence, return_inverse=True)
    expected = np.bincount(group, weights=wrong) / np.bincount(group)  # the mean error among equals
    ordered = expected[np.sort(group)]
    n = np.arange(1, len(t) + 1)
    risk = ordered.cumsum() / n
    return {"coverage": n / len(t), "risk": risk, "aurc": float(risk.mean())}


def calibration_scores(probabilities: Any, target: Any, bins: int = 15) -> dict[str, float]:
    """``ece``, ``brier``, ``nll`` (mean negative log-likelihood, nats; infinite where a true class got 0), ``aurc``."""
    p, t = _probabilities(probabilities, target)
    with np.errstate(divide="ignore"):
        nll = float(-np.log(p[np.arange(len(t)), t]).mean())
    return {"ece": ece(p, t, bins), "brier": brier(p, t), "nll": nll, "aurc": risk_coverage(p, t)["aurc"]}


# ---------------------------------------------------------------------------------- two diagnostics of our own


def equity(shapley: Any, present: Any = None, among: str = "all") -> float:
    """How evenly the modalities contribute: 1 equally, 0 where one does everything. A diagnostic of ours.

    shapley [n, M], M >= 2; present bool [n, M] groups the samples by what they have (default: one group). In each
    group the mean Shapley values, negative ones set to 0, become shares q; the result is the mean over groups of
    ``-sum_m q_m log q_m / log M``.

    among : "all" divides by log M, so a group with an absent modality (a dummy, value 0) stays below 1; "present"
        divides by the log of the number of present ones and leaves out groups with only one

    Groups in which no modality has a positive mean have no shares and are left out; NaN if none is left.
    """
    phi = _numpy("shapley", shapley).astype(np.float64)
    if phi.ndim != 2 or phi.shape[1] < 2:
        raise ValueError(f"shapley: expected [n, M] with M >= 2, got shape {phi.shape}")
    OneOf("all", "present")("among", among)
    there = np.ones(phi.shape, bool)
    if present is not None:
        there = np.asarray(present.cpu() if hasattr(present, "cpu") else present)
        if there.dtype != bool or there.shape != phi.shape:
            raise ValueError(f"present: expected bool {phi.shape}, got {there.dtype} {there.shape}")
    patterns, group = np.unique(there, axis=0, return_inverse=True)
    values = []
    for g, pattern in enumerate(patterns):
        mean = np.maximum(phi[group.ravel() == g].mean(0), 0)
        most = phi.shape[1] if among == "all" else int(pattern.sum())
        if mean.sum() > 0 and most > 1:
            q = mean[mean > 0] / mean.sum()
            values.append(float(-(q * np.log(q)).sum() / math.log(most)))
    return float(np.mean(values)) if values else math.nan


def learning_balance(rms_gradients: Any) -> float:
    """How unevenly the encoders learn: 0 balanced, at most ``sqrt(M - 1)``. A diagnostic of ours.

    rms_gradients [steps, M]: the root mean square of the gradient of each modality's encoder at each step, >= 0. The
    result is the mean over steps of the coefficient of variation over modalities (population standard deviation over
    mean). Steps in which no encoder has a gradient are left out; NaN if none is left.
    """
    g = _numpy("rms_gradients", rms_gradients).astype(np.float64)
    if g.ndim != 2 or g.shape[1] < 2 or g.min() < 0:
        raise ValueError(f"rms_gradients: expected non-negative [steps, M] with M >= 2, got shape {g.shape}")
    g = g[g.max(1) > 0]
    g = g / g.max(1, keepdims=True)  # a coefficient of variation has no unit; this keeps tiny gradients from underflow
    return float((g.std(1) / g.mean(1)).mean()) if len(g) else math.nan


# ----------------------------------------------------------------------------------------------------- statistics


class Interval(NamedTuple):
    """A mean with its interval and how many values (seeds) and samples it rests on; ends are NaN where undefined."""

    mean: float
    low: float
    high: float
    n: int
    samples: int = 0

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "not run"
        ends = "no interval" if math.isnan(self.low) else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.mean:.3f} ({ends}, n = {self.n})"


def t_interval(values: Any, level: float = 0.95) -> Interval:
    """The mean of a few runs and Student's t-interval with as many values as there are: mean +- t * s / sqrt(n).

    One value has no interval (NaN ends). It is about the mean over *seeds* on this test set, nothing else.
    """
    from scipy import stats

    x = _numpy("values", values).astype(np.float64).ravel()
    Number(above=0, below=1)("level", level)
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)
