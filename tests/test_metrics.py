"""Scores by hand, under every convention; references are loops written from the definitions."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmlib import metrics as mm

QUICK = settings(deadline=None, max_examples=30)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------------------------------------------ references


def bankers(x):
    """Half-to-even rounding, spelled out."""
    low = math.floor(x)
    rest = x - low
    if rest != 0.5:
        return low + (rest > 0.5)
    return low if low % 2 == 0 else low + 1


def loop_f1(pred, true, weights_of):
    """Weighted F1 from counts; classes and weights from ``weights_of``."""
    total = 0.0
    for c in sorted(set(pred) | set(true)):
        tp = sum(p == c and t == c for p, t in zip(pred, true, strict=True))
        fp = sum(p == c and t != c for p, t in zip(pred, true, strict=True))
        fn = sum(p != c and t == c for p, t in zip(pred, true, strict=True))
        f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
        total += f1 * sum(w == c for w in weights_of) / len(weights_of)
    return total


def same(a, b):
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a) if a else math.nan


def clip(x, k):
    return max(-k, min(k, x))


def loop_corr(p, t):
    mp, mt = sum(p) / len(p), sum(t) / len(t)
    cov = sum((a - mp) * (b - mt) for a, b in zip(p, t, strict=True))
    vp, vt = sum((a - mp) ** 2 for a in p), sum((b - mt) ** 2 for b in t)
    return cov / math.sqrt(vp * vt)


def loop_mosi(p, t):
    kept = [(a, b) for a, b in zip(p, t, strict=True) if b != 0]
    pn, tn = [a > 0 for a, _ in kept], [b > 0 for _, b in kept]
    ph, th = [a >= 0 for a in p], [b >= 0 for b in t]
    return {
        "acc7": same([bankers(clip(a, 3)) for a in p], [bankers(clip(b, 3)) for b in t]),
        "acc5": same([bankers(clip(a, 2)) for a in p], [bankers(clip(b, 2)) for b in t]),
        "acc2_has0": same(ph, th),
        "f1_has0": loop_f1(ph, th, th),
        "acc2_non0": same(pn, tn),
        "f1_non0": loop_f1(pn, tn, tn),
        "mae": sum(abs(a - b) for a, b in zip(p, t, strict=True)) / len(p),
        "corr": loop_corr(p, t),
    }


def loop_sims(p, t):
    p, t = [clip(a, 1) for a in p], [clip(b, 1) for b in t]

    def bins(x, edges):
        for i in range(len(edges) - 1):
            if edges[i] < x <= edges[i + 1]:
                return i
        raise AssertionError(x)

    two, three, five = (-1.01, 0, 1.01), (-1.01, -0.1, 0.1, 1.01), (-1.01, -0.7, -0.1, 0.1, 0.7, 1.01)
    cut = lambda edges: ([bins(a, edges) for a in p], [bins(b, edges) for b in t])
    return {
        "acc2": same(*cut(two)),
        "acc3": same(*cut(three)),
        "acc5": same(*cut(five)),
        "f1": loop_f1(*cut(two), cut(two)[1]),
        "mae": sum(abs(a - b) for a, b in zip(p, t, strict=True)) / len(p),
        "corr": loop_corr(p, t),
    }


# -------------------------------------------------------------------------------------------------- sentiment scores


def test_mosi_by_hand():
    target = [-3.0, -0.5, 0.0, 0.0, 0.5, 1.5, 2.5, 3.0]
    pred = [-2.5, 0.0, 0.0, -0.2, 1.0, 2.4, 2.5, 9.0]
    s = mm.msa_scores(pred, target)
    assert list(s) == ["acc7", "acc5", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0", "mae", "corr"]
    # Rounded to even: targets -3 0 0 0 0 2 2 3; predictions -2 0 0 0 1 2 2 3 (9 is clipped to 3).
    assert s["acc7"] == 6 / 8
    # Clipped to 2 first: targets -2 0 0 0 0 2 2 2; predictions -2 0 0 0 1 2 2 2.
    assert s["acc5"] == 7 / 8
    # Has0: targets n n p p p p p p; predictions n p p n p p p p.
    assert s["acc2_has0"] == 6 / 8
    # Negative: tp 1, fp 1, fn 1 -> 1/2; non-negative: tp 5, fp 1, fn 1 -> 5/6; weights 2/8 and 6/8.
    assert s["f1_has0"] == pytest.approx(0.25 * 0.5 + 0.75 * 5 / 6)
    # Non0: six samples are left; targets n n p p p p; predictions n n p p p p (a prediction of 0 is not positive).
    assert s["acc2_non0"] == 1.0
    assert s["f1_non0"] == 1.0
    assert s["mae"] == pytest.approx((0.5 + 0.5 + 0 + 0.2 + 0.5 + 0.9 + 0 + 6) / 8)
    assert s["corr"] == pytest.approx(np.corrcoef(pred, target)[0, 1])


def test_sims_by_hand():
    target = [-1.0, -0.7, -0.1, 0.0, 0.1, 0.2, 0.7, 0.8]
    pred = [-5.0, -0.6, -0.05, 0.0, 0.3, -0.2, 0.7, 1.7]
    s = mm.msa_scores(pred, target, scale="sims")
    assert list(s) == ["acc2", "acc3", "acc5", "f1", "mae", "corr"]
    # Zero is negative: targets n n n n p p p p; predictions n n n n p n p p.
    assert s["acc2"] == 7 / 8
    # Right-closed: targets 0 0 0 1 1 2 2 2; predictions 0 0 1 1 2 0 2 2.
    assert s["acc3"] == 5 / 8
    # Targets 0 0 1 2 2 3 3 4; predictions 0 1 2 2 3 1 3 4.
    assert s["acc5"] == 4 / 8
    # Negative: tp 4, fp 1 -> 8/9; positive: tp 3, fn 1 -> 6/7.
    assert s["f1"] == pytest.approx(0.5 * 8 / 9 + 0.5 * 6 / 7)
    # Both sides are clipped before the error: -5 is -1, 1.7 is 1.
    assert s["mae"] == pytest.approx((0 + 0.1 + 0.05 + 0 + 0.2 + 0.4 + 0 + 0.2) / 8)
    assert s["corr"] == pytest.approx(np.corrcoef(np.clip(pred, -1, 1), target)[0, 1])


def test_rounding_is_half_to_even():
    assert mm.sentiment_classes([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], "acc7").tolist() == [1, 1, 3, 3, 5, 5]
    half_up = [math.floor(x + 0.5) + 3 for x in (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)]
    assert half_up == [1, 2, 3, 4, 5, 6]  # what another rounding would say
    assert mm.msa_scores([0.5, 1.5, 2.5], [0, 2, 2])["acc7"] == 1.0


def test_zero_falls_on_three_sides():
    p, t = [0.0, 1.0], [-1.0, 1.0]
    assert mm.msa_scores(p, t)["acc2_has0"] == 0.5  # 0 is non-negative
    assert mm.msa_scores(p, t)["acc2_non0"] == 1.0  # 0 is not positive
    assert mm.msa_scores(p, t, "sims")["acc2"] == 1.0  # 0 is negative
    assert mm.msa_scores([-0.0, 1.0], t)["acc2_has0"] == 0.5  # and so is -0 not negative


def test_float32_edges_compare_in_their_own_precision():
    x = torch.tensor([0.1, -0.1, 0.7, -0.7], dtype=torch.float32)
    assert (
        mm.sentiment_classes(x, "sims5").tolist()
        == mm.sentiment_classes(x.double().round(decimals=1), "sims5").tolist()
    )
    assert mm.sentiment_classes(x, "sims5").tolist() == [2, 1, 3, 0]


@pytest.mark.slow
@QUICK
@given(st.integers(0, 2**31), st.integers(3, 40))
def test_against_loops(seed, n):
    rng = np.random.default_rng(seed)
    t = np.round(rng.uniform(-3.2, 3.2, n) * 5) / 5
    p = np.where(rng.random(n) < 0.2, np.round(rng.normal(0, 2, n) * 2) / 2, rng.normal(0, 2, n))
    t[0], t[1], p[0] = 1.0, -1.0, p[0] + 0.123
    for scale, loop, q in (("mosi", loop_mosi, 1), ("sims", loop_sims, 3)):
        got, expected = mm.msa_scores(p / q, t / q, scale), loop((p / q).tolist(), (t / q).tolist())
        assert got.keys() == expected.keys()
        for key in got:
            assert got[key] == pytest.approx(expected[key], abs=1e-9), (scale, key)


@pytest.mark.slow
@QUICK
@given(hnp.arrays(np.float64, (2, 12), elements=st.floats(-3, 3, width=32)), st.permutations(range(12)))
def test_bounds_and_permutation_invariance(pair, order):
    p, t = pair
    for scale in ("mosi", "sims"):
        s = mm.msa_scores(p, t, scale)
        again = mm.msa_scores(p[list(order)], t[list(order)], scale)
        for key, value in s.items():
            assert value == pytest.approx(again[key], abs=1e-7, nan_ok=True)
            if not math.isnan(value):
                assert -1 <= value <= 6 if key in ("mae", "corr") else 0 <= value <= 1
        assert mm.msa_scores(t, t, scale)["mae"] == 0


def test_undefined_values_are_nan_without_a_warning():
    s = mm.msa_scores([0.3, 0.3, 0.3], [0.0, 0.0, 0.0])
    assert math.isnan(s["corr"])
    assert math.isnan(s["acc2_non0"])
    assert math.isnan(s["f1_non0"])
    assert s["acc2_has0"] == s["f1_has0"] == 1.0
    # A constant that float64 cannot average exactly is still constant.
    assert math.isnan(mm.msa_scores(np.full(7, 0.1), np.linspace(-1, 1, 7))["corr"])
    assert math.isnan(mm.msa_scores([1.0], [2.0])["corr"])
    assert math.isnan(mm.msa_scores([5.0, 7.0], [0.1, 0.5], "sims")["corr"])  # constant once clipped
    assert mm.msa_scores([1e-200, 2e-200, 4e-200], [1.0, 2.0, 4.0])["corr"] == pytest.approx(1)


def test_accepts_columns_tensors_and_integers():
    p, t = torch.tensor([[0.5], [-1.0], [2.0]], requires_grad=True), torch.tensor([0.0, -1.0, 2.0])
    expected = mm.msa_scores([0.5, -1.0, 2.0], [0.0, -1.0, 2.0])
    assert mm.msa_scores(p, t) == pytest.approx(expected)
    assert mm.msa_scores(p.bfloat16(), t.half()) == pytest.approx(expected)
    assert mm.msa_scores([1, -1, 2], np.array([1, -1, 2]))["acc7"] == 1
    assert mm.msa_scores(np.array([1, 2], np.uint8), [1, 2], "sims")["acc5"] == 1


@pytest.mark.parametrize(
    ("pred", "target", "scale", "error", "match"),
    [
        ([1.0, 2.0], [1.0], "mosi", ValueError, "same number"),
        (np.ones((2, 3)), np.ones((3, 2)), "mosi", ValueError, "same number"),
        ([], [], "mosi", ValueError, "pred: expected at least one"),
        ([1.0, np.nan], [1.0, 1.0], "mosi", ValueError, "pred: expected finite"),
        ([1.0, 1.0], [1.0, np.inf], "sims", ValueError, "target: expected finite"),
        ([1.0], [1.0], "mosei", ValueError, "scale: expected 'mosi' or 'sims', got 'mosei'"),
        (["a"], [1.0], "mosi", TypeError, "pred: expected integers or floats"),
        ([1.0], [True], "mosi", TypeError, "target: expected integers or floats"),
    ],
)
def test_bad_scores(pred, target, scale, error, match):
    with pytest.raises(error, match=match):
        mm.msa_scores(pred, target, scale)


def test_unknown_convention():
    with pytest.raises(ValueError, match="convention: expected one of"):
        mm.sentiment_classes([0.1], "acc9")


# ---------------------------------------------------------------------------------------------------- argument order


def test_the_argument_order_of_f1_changes_the_number():
    """90 negatives, 10 positives; a model that says positive too often. The wrong order costs 17 points here."""
    from sklearn.metrics import f1_score

    target = np.repeat([0, 1], [90, 10])
    pred = np.concatenate([np.repeat([0, 1], [45, 45]), np.repeat([0, 1], [1, 9])])
    # Class 0: tp 45, fp 1, fn 45 -> 90/136; class 1: tp 9, fp 45, fn 1 -> 18/64.
    right = 0.90 * 90 / 136 + 0.10 * 18 / 64
    wrong = 0.46 * 90 / 136 + 0.54 * 18 / 64
    assert mm.weighted_f1(pred, target) == pytest.approx(right)
    assert f1_score(target, pred, average="weighted") == pytest.approx(right)
    assert f1_score(pred, target, average="weighted") == pytest.approx(wrong)
    assert mm.weighted_f1(target, pred) == pytest.approx(wrong)
    assert right - wrong == pytest.approx(0.167, abs=1e-3)
    # Accuracy, macro F1 and each class's F1 do not notice.
    assert mm.classification_scores(pred, target)["macro_f1"] == pytest.approx(
        mm.classification_scores(target, pred)["macro_f1"]
    )


@pytest.mark.slow
@QUICK
@given(hnp.arrays(np.int64, (2, 15), elements=st.integers(0, 3)))
def test_weighted_f1_against_loops_in_both_orders(pair):
    p, t = pair.tolist()
    assert mm.weighted_f1(p, t) == pytest.approx(loop_f1(p, t, t))
    assert mm.weighted_f1(t, p) == pytest.approx(loop_f1(p, t, p))


# ---------------------------------------------------------------------------------------------------- classification


def test_classification_by_hand():
    target = [0, 0, 0, 0, 1, 1, 2, 2]
    pred = [0, 0, 0, 1, 1, 2, 0, 3]
    s = mm.classification_scores(pred, target, classes=5, per_class=True)
    assert s["accuracy"] == 0.5
    assert s["uar"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    f = (2 * 3 / (6 + 1 + 1), 2 / (2 + 1 + 1), 0.0, 0.0)
    assert s["macro_f1"] == pytest.approx(sum(f) / 4)  # class 3 is predicted, class 4 nowhere
    assert s["weighted_f1"] == pytest.approx((4 * f[0] + 2 * f[1]) / 8)
    assert s["recall_0"] == 0.75
    assert s["precision_0"] == 0.75
    assert math.isnan(s["recall_3"])
    assert s["precision_3"] == 0.0
    assert s["f1_3"] == 0.0
    assert all(math.isnan(s[f"{what}_4"]) for what in ("recall", "precision", "f1"))


def test_logits_are_argmaxed():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 0.0]])
    assert mm.classification_scores(logits, torch.tensor([0, 2, 0]))["accuracy"] == 1.0  # the first of equals
    dialogue = torch.stack([logits, logits])
    assert mm.classification_scores(dialogue, torch.tensor([[0, 2, 0], [1, 2, 0]]))["accuracy"] == pytest.approx(5 / 6)


def test_one_class_is_no_crash():
    s = mm.classification_scores([0, 0], [0, 0])
    assert s == {"accuracy": 1.0, "uar": 1.0, "macro_f1": 1.0, "weighted_f1": 1.0}
    assert mm.classification_scores([1, 1], [0, 0])["weighted_f1"] == 0.0


def test_one_vs_rest_by_hand():
    s = mm.one_vs_rest_f1([0, 1, 2, 2], [0, 1, 1, 2])
    assert s["f1_0"] == 1.0
    # Class 1 against the rest: truth 0 1 1 0, answer 0 1 0 0. Yes: 2/3; no: 4/5.
    assert s["f1_1"] == pytest.approx(0.5 * 2 / 3 + 0.5 * 4 / 5)
    # Class 2: truth 0 0 0 1, answer 0 0 1 1. Yes: 2/3; no: 4/5.
    assert s["f1_2"] == pytest.approx(0.25 * 2 / 3 + 0.75 * 4 / 5)
    assert s["f1"] == pytest.approx((s["f1_0"] + s["f1_1"] + s["f1_2"]) / 3)


@pytest.mark.slow
@QUICK
@given(hnp.arrays(np.int64, (2, 15), elements=st.integers(0, 3)), st.permutations(range(15)))
def test_classification_bounds_and_invariance(pair, order):
    p, t = pair
    s = mm.classification_scores(p, t, 4)
    assert all(0 <= v <= 1 for v in s.values())
    assert s == pytest.approx(mm.classification_scores(p[list(order)], t[list(order)], 4))
    relabel = np.array([2, 0, 3, 1])
    assert s == pytest.approx(mm.classification_scores(relabel[p], relabel[t], 4))


@pytest.mark.parametrize(
    ("pred", "target", "classes", "error", "match"),
    [
        ([0, 3], [0, 1], 3, ValueError, r"pred: expected classes in \[0, 3\), got values from 0 to 3"),
        ([0, 1], [0, -1], None, ValueError, r"target: expected classes in \[0, 2\)"),
        ([0, 1], [0.0, 1.0], None, TypeError, "target: expected integer classes"),
        ([0.2, 0.8], [0, 1], None, ValueError, "expected classes of one shape or logits"),
        ([[0.1, 0.9]], [0, 1], None, ValueError, "expected classes of one shape or logits"),
        ([[0.1, 0.9]], [0], 3, ValueError, "classes: pred has 2 logits"),
        ([[0.1, np.nan]], [0], None, ValueError, "pred: expected finite"),
        ([], [], None, ValueError, "empty"),
    ],
)
def test_bad_classes(pred, target, classes, error, match):
    with pytest.raises(error, match=match):
        mm.classification_scores(np.array(pred), np.array(target), classes)


def test_multilabel_by_hand():
    target = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    logits = np.array([[2.0, -1.0, -1.0], [1.0, -2.0, -3.0], [-1.0, 0.5, -2.0], [-2.0, 3.0, -1.0]])
    scores = mm.multilabel_scores(logits, target)
    # Predicted 100, 100, 010, 010: rows 1 and 4 whole; 10 of 12 labels. Hits 2, 1, 0 of 4, 4, 0 that count twice.
    assert scores["subset_accuracy"] == 0.5
    assert scores["hamming_accuracy"] == pytest.approx(10 / 12)
    assert scores["micro_f1"] == pytest.approx(6 / 8)
    assert scores["macro_f1"] == pytest.approx((1 + 0.5) / 2)  # the third label is nowhere
    # Label 1 is ranked perfectly. Label 2: positives -2 and 3 among -1, -2, .5, 3: of four pairs two are right; its
    # precision is 1 at the first positive and 2/4 at the second.
    assert scores["macro_auroc"] == pytest.approx((1 + 0.5) / 2)
    assert scores["macro_ap"] == pytest.approx((1 + 0.75) / 2)


def test_multilabel_is_scikit_learns():
    from sklearn import metrics as sk

    rng = np.random.default_rng(0)
    target, logits = rng.random((40, 5)) < 0.4, rng.normal(size=(40, 5))
    scores = mm.multilabel_scores(torch.tensor(logits), torch.tensor(target))
    found = logits > 0
    wanted = {
        "subset_accuracy": sk.accuracy_score(target, found),
        "hamming_accuracy": 1 - sk.hamming_loss(target, found),
        "micro_f1": sk.f1_score(target, found, average="micro"),
        "macro_f1": sk.f1_score(target, found, average="macro"),
        "macro_auroc": sk.roc_auc_score(target, logits, average="macro"),
        "macro_ap": sk.average_precision_score(target, logits, average="macro"),
    }
    assert scores == pytest.approx(wanted)
    assert mm.multilabel_scores(1 / (1 + np.exp(-logits)), target, threshold=0.5) == pytest.approx(wanted)
    of_dialogues = mm.multilabel_scores(logits.reshape(8, 5, 5), target.reshape(8, 5, 5))
    assert of_dialogues == pytest.approx(wanted)
    decided = mm.multilabel_scores(found, target.astype(int))
    assert {k: v for k, v in decided.items() if not math.isnan(v)} == pytest.approx(
        {k: v for k, v in wanted.items() if k not in ("macro_auroc", "macro_ap")}
    )


def test_undefined_multilabel_scores_are_nan_without_a_warning():
    nothing = mm.multilabel_scores(-np.ones((3, 2)), np.zeros((3, 2), dtype=bool))
    assert nothing["hamming_accuracy"] == nothing["subset_accuracy"] == 1
    assert all(math.isnan(nothing[k]) for k in ("micro_f1", "macro_f1", "macro_auroc", "macro_ap"))
    # One label with both sides: the means are its own.
    one = mm.multilabel_scores(np.array([[1.0, 1.0], [-1.0, 1.0]]), np.array([[True, True], [False, True]]))
    assert one["macro_auroc"] == one["macro_ap"] == one["macro_f1"] == 1


@pytest.mark.parametrize(
    ("pred", "target", "error", "match"),
    [
        (np.zeros((3, 2)), np.zeros((2, 3), bool), ValueError, "pred, target: expected both"),
        (np.zeros(3), np.zeros(3, bool), ValueError, "pred, target: expected both"),
        (np.zeros((3, 2)), np.zeros((3, 2)), TypeError, "target: expected bool"),
        (np.zeros((3, 2)), np.full((3, 2), 2), ValueError, "target: expected integers 0 and 1"),
        (np.full((3, 2), np.nan), np.zeros((3, 2), bool), ValueError, "pred: expected finite"),
        (np.full((3, 2), "a"), np.zeros((3, 2), bool), TypeError, "pred: expected integers or floats"),
        (np.zeros((0, 2), bool), np.zeros((0, 2), bool), ValueError, "pred: expected at least one"),
    ],
)
def test_bad_multilabel_scores(pred, target, error, match):
    with pytest.raises(error, match=match):
        mm.multilabel_scores(pred, target)
    with pytest.raises(TypeError, match="threshold"):
        mm.multilabel_scores(np.zeros((3, 2)), np.zeros((3, 2), bool), threshold="0.5")


# -------------------------------------------------------------------------------------------------------- robustness


def test_auilc_by_hand():
    # Trapezoids: 0.5 * (1 + 0.6) / 2 + 0.5 * (0.6 + 0) / 2 = 0.4 + 0.15.
    assert mm.auilc([0, 0.5, 1], [1.0, 0.6, 0.0]) == pytest.approx(0.55)
    assert mm.auilc([0, 0.9], [1.0, 1.0]) == pytest.approx(0.9)  # a perfect line is not 1 ...
    assert mm.auilc([0, 0.9], [1.0, 1.0], normalise=True) == pytest.approx(1.0)  # ... unless normalised
    assert mm.auilc([0, 0.1, 1], [1.0, 0.0, 0.0]) == pytest.approx(0.05)  # unequal steps weigh as they should
    for bad in ([0, 0], [0.5, 0.2], [-0.1, 0.5], [0, 1.1]):
        with pytest.raises(ValueError, match="rates: expected strictly increasing"):
            mm.auilc(bad, [1, 1])
    with pytest.raises(ValueError, match="at least 2"):
        mm.auilc([0.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        mm.auilc([0.0, 1.0], [1.0, np.nan])


def test_worst_pattern():
    scores = {"image": 0.8, "audio": 0.5, "both": 0.9, "tie": 0.5}
    assert mm.worst_pattern(scores) == ("audio", 0.5)
    assert mm.worst_pattern({0.1: 0.3, 0.9: 1.4}, higher_is_better=False) == (0.9, 1.4)
    with pytest.raises(ValueError, match=r"got none for \['audio'\]"):
        mm.worst_pattern({"image": 0.8, "audio": math.nan})
    with pytest.raises(ValueError, match="at least one pattern"):
        mm.worst_pattern({})


def test_pattern_average():
    assert mm.pattern_average({"a": 1.0, "b": 0.0}) == 0.5
    assert mm.pattern_average({"a": 1.0, "b": 0.0}, {"a": 3, "b": 1}) == 0.75
    assert np.allclose(mm.pattern_average({"a": [1.0, math.nan], "b": [0.0, 1.0]}), [0.5, math.nan], equal_nan=True)
    with pytest.raises(ValueError, match="weights"):
        mm.pattern_average({"a": 1.0}, {"a": 0.0})


# Tables 15 to 17 of the DEAR paper: rates 0.0 to 0.9, then the row "Avg." as printed. An entry a/b is two columns.
DEAR_TABLES = {
    "MOSI": (
        "43.81 46.20 85.59/82.41 84.92/83.80 0.751 0.778",
        "42.19 45.35 80.58/80.47 82.52/81.42 0.842 0.724",
        "38.27 44.44 78.62/78.43 80.37/80.18 0.860 0.666",
        "37.54 40.77 77.47/77.41 78.35/77.35 0.924 0.617",
        "35.76 38.69 74.83/74.78 76.08/74.86 1.016 0.576",
        "33.91 36.88 72.93/72.83 74.07/73.83 1.026 0.524",
        "29.83 34.08 67.95/67.98 69.77/68.46 1.163 0.444",
        "27.66 27.45 64.91/64.96 67.10/65.87 1.236 0.379",
        "25.74 25.80 62.38/62.44 63.43/62.11 1.296 0.326",
        "23.27 24.34 59.05/59.06 60.43/59.76 1.380 0.244",
        "33.80 36.40 72.43/72.08 73.70/72.76 1.049 0.528",
        "33.798 36.400 72.431 72.077 73.704 72.764 1.049 0.528",
    ),
    "MOSEI": (
        "50.48 52.41 85.34/84.36 85.69/83.76 0.536 0.767",
        "49.85 51.45 84.31/83.72 84.93/83.37 0.554 0.746",
        "48.87 50.65 83.19/82.84 83.25/82.20 0.578 0.716",
        "47.54 48.81 82.27/81.80 82.89/80.50 0.611 0.680",
        "46.23 47.42 81.43/80.54 80.86/79.65 0.632 0.653",
        "45.26 45.93 79.58/78.67 79.75/78.57 0.669 0.598",
        "44.47 45.43 77.87/77.87 76.78/76.82 0.699 0.554",
        "42.46 43.36 75.46/75.86 74.65/75.83 0.731 0.485",
        "40.58 41.34 73.15/74.93 71.81/73.26 0.763 0.416",
        "38.89 39.66 69.95/72.89 69.64/69.51 0.798 0.298",
        "45.46 46.65 79.26/79.35 79.03/78.35 0.657 0.591",
        "45.463 46.646 79.255 79.348 79.025 78.347 0.657 0.591",
    ),
    "SIMS": (
        "41.35 64.4 79.07 78.67 0.455 0.563",
        "39.96 62.73 78.34 77.57 0.453 0.559",
        "39.67 63.09 76.73 74.75 0.462 0.525",
        "36.91 61.63 76.08 73.79 0.472 0.500",
        "36.32 59.00 75.42 74.01 0.486 0.491",
        "35.29 58.49 78.16 71.50 0.502 0.418",
        "35.04 53.97 72.79 69.19 0.516 0.376",
        "31.75 54.26 71.05 65.45 0.535 0.329",
        "24.72 49.96 69.73 61.94 0.567 0.262",
        "25.38 48.14 69.00 60.99 0.581 0.208",
        "34.64 57.57 74.64 70.79 0.503 0.423",
        "34.639 57.567 74.637 70.786 0.503 0.423",
    ),
}


@pytest.mark.parametrize("name", list(DEAR_TABLES))
def test_the_averages_of_dear(name):
    *rows, printed, exact = [[float(x) for x in r.replace("/", " ").split()] for r in DEAR_TABLES[name]]
    assert len(rows) == 10
    mean = mm.pattern_average({r / 10: row for r, row in enumerate(rows)})
    assert np.abs(mean - exact).max() < 6e-4
    digits = [2] * (len(exact) - 2) + [3, 3]
    for got, shown, d in zip(mean, printed, digits, strict=True):
        assert abs(got - shown) <= 0.5 * 10**-d + 1e-9
    # The area under the same lines weighs the two ends by half, so it is another number.
    rates = [r / 10 for r in range(10)]
    assert mm.auilc(rates, [row[0] for row in rows], normalise=True) != pytest.approx(mean[0], abs=0.01)


# ------------------------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    t = np.array([0, 1, 1, 1])
    # Two bins: (0.5, 1] holds all; accuracy 3/4, mean confidence 0.75.
    assert mm.ece(p, t, bins=2) == pytest.approx(0.0)
    # Ten bins: 0.9 -> (0.8, 0.9], right; 0.8 -> (0.7, 0.8], wrong; 0.7 right; 0.6 right.
    assert mm.ece(p, t, bins=10) == pytest.approx((0.1 + 0.8 + 0.3 + 0.4) / 4)
    assert mm.brier(p, t) == pytest.approx((2 * 0.1**2 + 2 * 0.8**2 + 2 * 0.3**2 + 2 * 0.4**2) / 4)
    rc = mm.risk_coverage(p, t)
    assert rc["coverage"].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert rc["risk"] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert rc["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    s = mm.calibration_scores(p, t)
    assert s["nll"] == pytest.approx(-np.log([0.9, 0.2, 0.7, 0.6]).mean())
    assert mm.calibration_scores([[1.0, 0.0]], [1])["nll"] == math.inf
    b = mm.reliability_bins(p, t, bins=10)
    assert b["count"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert math.isnan(b["accuracy"][0])


def test_equal_confidences_share_their_risk():
    p = np.full((4, 2), 0.5)
    assert mm.risk_coverage(p, np.array([0, 0, 1, 1]))["risk"] == pytest.approx([0.5] * 4)
    assert mm.risk_coverage(p, np.array([1, 0, 1, 0]))["aurc"] == pytest.approx(0.5)


def test_brier_is_scikit_learns():
    from sklearn.metrics import brier_score_loss

    rng = np.random.default_rng(0)
    p, t = rng.dirichlet(np.ones(3), 50), rng.integers(0, 3, 50)
    assert mm.brier(p, t) == pytest.approx(brier_score_loss(t, p, labels=[0, 1, 2]))


@QUICK
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 5), st.integers(1, 20))
def test_calibration_bounds(seed, n, k, bins):
    rng = np.random.default_rng(seed)
    p, t = rng.dirichlet(np.full(k, 0.3), n), rng.integers(0, k, n)
    order = rng.permutation(n)
    s = mm.calibration_scores(p, t, bins)
    assert 0 <= s["ece"] <= 1
    assert 0 <= s["brier"] <= 2
    assert 0 <= s["aurc"] <= 1
    assert s == pytest.approx(mm.calibration_scores(p[order], t[order], bins))
    assert mm.reliability_bins(p, t, bins)["count"].sum() == n


def test_logits_are_refused_as_probabilities():
    with pytest.raises(ValueError, match="a softmax, not logits"):
        mm.ece(np.array([[2.0, -1.0]]), np.array([0]))
    with pytest.raises(ValueError, match="K >= 2"):
        mm.brier(np.array([0.5]), np.array([0]))
    with pytest.raises(ValueError, match=r"target: expected classes in \[0, 2\)"):
        mm.brier(np.array([[0.5, 0.5]]), np.array([2]))
    with pytest.raises(ValueError, match="bins"):
        mm.ece(np.array([[0.5, 0.5]]), np.array([1]), bins=0)


# ------------------------------------------------------------------------------------------------------- diagnostics


def test_equity_by_hand():
    assert mm.equity([[0.2, 0.2, 0.2]]) == pytest.approx(1.0)
    assert mm.equity([[0.6, 0.0, 0.0]]) == pytest.approx(0.0)
    # Shares 3/4 and 1/4 of the means; -0.1 counts as 0.
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(3)
    assert mm.equity([[0.4, 0.1, -0.1], [0.2, 0.1, -0.1]]) == pytest.approx(expected)
    # Two patterns: everything there (equal shares) and two of three (equal shares): 1 and log 2 / log 3.
    phi, here = [[0.1] * 3, [0.3, 0.3, 0.0]], np.array([[True] * 3, [True, True, False]])
    assert mm.equity(phi, here) == pytest.approx((1 + math.log(2) / math.log(3)) / 2)
    assert mm.equity(phi, torch.tensor(here), among="present") == pytest.approx(1.0)
    assert math.isnan(mm.equity([[-1.0, 0.0]]))
    assert math.isnan(mm.equity([[1.0, 0.0]], np.array([[True, False]]), among="present"))
    with pytest.raises(ValueError, match="M >= 2"):
        mm.equity([[1.0]])
    with pytest.raises(ValueError, match="among"):
        mm.equity([[1.0, 1.0]], among="some")
    with pytest.raises(ValueError, match="present: expected bool"):
        mm.equity([[1.0, 1.0]], [[1, 1]])


def test_learning_balance_by_hand():
    assert mm.learning_balance([[1.0, 1.0], [3.0, 3.0]]) == 0.0
    # Step 1: mean 2, sd 1 -> 1/2. Step 2: one encoder alone -> sqrt(M - 1) = 1. Step 3: none, left out.
    assert mm.learning_balance([[1.0, 3.0], [0.0, 5.0], [0.0, 0.0]]) == pytest.approx(0.75)
    assert mm.learning_balance([[0, 0, 0, 2.0]]) == pytest.approx(math.sqrt(3))
    assert mm.learning_balance([[1e-300, 3e-300]]) == pytest.approx(0.5)
    assert math.isnan(mm.learning_balance([[0.0, 0.0]]))
    with pytest.raises(ValueError, match="non-negative"):
        mm.learning_balance([[-1.0, 1.0]])


@QUICK
@given(hnp.arrays(np.float64, (6, 3), elements=st.floats(0, 10)), st.permutations(range(3)))
def test_diagnostics_do_not_depend_on_the_order_or_scale(x, order):
    for f in (mm.equity, mm.learning_balance):
        assert f(x) == pytest.approx(f(x[:, list(order)]), nan_ok=True, abs=1e-9)
        assert f(x) == pytest.approx(f(2 * x), nan_ok=True, abs=1e-9)
    assert math.isnan(mm.equity(x)) or -1e-9 <= mm.equity(x) <= 1 + 1e-9


# -------------------------------------------------------------------------------------------------------- statistics


def test_t_interval_by_hand():
    # Mean 3, sd sqrt(2.5), n 5, t(0.975; 4) = 2.776445.
    i = mm.t_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (i.mean, i.n) == (3.0, 5)
    assert i.low == pytest.approx(3 - half, abs=1e-5)
    assert i.high == pytest.approx(3 + half, abs=1e-5)
    one = mm.t_interval([0.5])
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert "no interval" in str(one)
    assert str(i) == "3.000 (1.037 to 4.963, n = 5)"
    with pytest.raises(ValueError, match="level"):
        mm.t_interval([1, 2], level=95)
    with pytest.raises(ValueError, match="empty"):
        mm.t_interval([])
