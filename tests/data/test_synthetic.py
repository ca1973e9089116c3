"""Synthetic data and their Bayes predictor, against loops written from the definition, closed forms and models."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier

from mmlib import data
from mmlib.data import synthetic as syn

TWO = {
    "modalities": ("x", "y"),
    "noise": {"x": 1.2, "y": 1.8},
    "frames": {"x": 5, "y": 4},
    "widths": 3,
    "xor": ("x", "y"),
}
FOUR = {
    "modalities": ("a", "b", "c", "d"),
    "unique": {"a": 2, "b": 1, "c": 0, "d": 1},
    "noise": {"a": 1.0, "b": 1.5, "c": 2.0, "d": 0.8},
    "xor": ("a", "c"),
    "weights": {"xor": 2.0, "a_1": 0.5},
    "varied_lengths": True,
}


def phi(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def losses(d, metric):
    """Per-sample accuracy, absolute or squared error of the Bayes predictor."""
    p = syn.bayes(d, None if metric == "accuracy" else metric)
    if metric == "accuracy":
        return (p.argmax(-1) == d.target).double()
    error = p[:, 0] - d.target.double()
    return error.abs() if metric == "mae" else error.square()


def standard_error(x: torch.Tensor) -> float:
    return float(x.std() / math.sqrt(len(x)))


class TestWorld:
    def test_shapes_and_truth(self):
        splits = data.load("synthetic", sizes=(30, 10, 20))
        assert [len(d) for d in splits.values()] == [30, 10, 20]
        d = splits["train"]
        assert d.feature_shapes == {"language": (8, 6), "audio": (12, 4), "vision": (6, 5)}
        made = syn.truth(d)
        assert made.bits == ("shared_0", "language_0", "audio_0", "vision_0", "xor_audio", "xor_vision")
        assert made.carriers == {
            "shared_0": ("language", "audio", "vision"),
            "language_0": ("language",),
            "audio_0": ("audio",),
            "vision_0": ("vision",),
            "xor": ("audio", "vision"),
        }
        assert made.weights == (0.6,) * 5
        assert made.values == (-3, -1.8, -0.6, 0.6, 1.8, 3)
        assert made.class_of == (0, 0, 1, 2, 3, 3)
        assert d.data.extras["bits"].shape == (30, 6)
        # through JSON, as a results file keeps it
        assert syn.truth(json.loads(json.dumps(d.info))) == made

    def test_the_score_by_hand(self):
        d = data.load("synthetic", task="regression", weights={"xor": 2, "audio_0": -1}, sizes=(40, 5, 5))["train"]
        assert d.target.dtype == torch.float32
        for bits, y in zip(d.data.extras["bits"].tolist(), d.target.tolist(), strict=True):
            shared, language, audio, vision, xa, xv = (2 * b - 1 for b in bits)
            differ = 1 if xa != xv else -1
            assert y == pytest.approx(3 / 6 * (shared + language - audio + vision + 2 * differ), abs=1e-6)
            assert -3 <= y <= 3

    def test_bits_stand_in_their_frames(self):
        d = data.load("synthetic", noise=0.01, sizes=(8, 4, 4))["train"]
        # audio carries shared_0 in frames 0, 3, ... (column 0), audio_0 in 1, 4, ... (column 1), then xor_audio
        x, bits = d.data.features["audio"], 2 * d.data.extras["bits"] - 1
        for frame in range(12):
            for column in range(4):
                expected = bits[:, [0, 2, 4][frame % 3]] if column == frame % 3 else torch.zeros(8)
                assert torch.allclose(x[:, frame, column], expected.float(), atol=0.06)

    def test_classes_cut_the_score(self):
        options = {"sizes": (4000, 10, 10)}
        y = data.load("synthetic", task="regression", **options)["train"].target
        for classes in (2, 3, 4, 6):
            d = data.load("synthetic", classes=classes, **options)["train"]
            assert d.info["outputs"] == classes
            order = [y[d.target == k] for k in range(classes)]
            assert all(len(v) for v in order)
            assert all(a.max() < b.min() for a, b in itertools.pairwise(order))
        two = data.load("synthetic", classes=2, **options)["train"].target
        assert abs(float(two.float().mean()) - 0.5) < 3 * 0.5 / math.sqrt(4000)

    def test_the_cut_is_the_best(self):
        shares = np.array([1, 3, 9, 2, 2, 4, 1]) / 22
        for classes in (2, 3, 4):
            cuts = itertools.combinations(range(1, 7), classes - 1)
            cost = lambda cut: sum(part.sum() ** 2 for part in np.split(shares, cut))
            expected = min(cost(cut) for cut in cuts)
            labels = np.array(syn._cut(shares, classes))
            assert (np.diff(labels) >= 0).all()
            assert set(labels) == set(range(classes))
            assert sum(shares[labels == k].sum() ** 2 for k in range(classes)) == pytest.approx(expected)

    def test_seeds_and_splits(self):
        a, b, c = (data.load("synthetic", split_seed=s, sizes=(20, 20, 20)) for s in (0, 0, 1))
        prints = lambda s: [d.info["fingerprint"] for d in s.values()]
        assert prints(a) == prints(b)
        assert not set(prints(a)) & set(prints(c))
        assert not torch.equal(a["train"].data.features["audio"], a["test"].data.features["audio"])

    def test_varied_lengths(self):
        d = data.load("synthetic", varied_lengths=True, sizes=(500, 5, 5))["train"]
        for m, (frames, _) in d.feature_shapes.items():
            n = d.data.valid[m].sum(-1)
            assert n.min() == (frames + 1) // 2
            assert n.max() == frames

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"modalities": ("a",)}, "modalities: expected (a list or tuple of )?at least (two|2)"),
            ({"modalities": "ab"}, "modalities: expected (a list or tuple of )?at least (two|2)"),
            ({"modalities": ("a", "a")}, "modalities: expected (a list or tuple of )?at least (two|2) different"),
            ({"task": "ranking"}, "task: expected 'classification' or 'regression'"),
            ({"classes": 1}, "classes: expected (2 to 6|an integer of at least 2)"),
            ({"classes": 7}, "classes: expected (2 to 6|an integer of at least 2), the score's distinct values, got 7"),
            ({"shared": -1}, "shared: expected"),
            ({"unique": {"audio": 1}}, "unique: expected a value for each"),
            ({"unique": 1.5}, "unique: expected an integer of at least 0"),
            ({"unique": True}, "unique: expected an integer of at least 0"),
            ({"noise": 0.0}, "noise: expected a number of at least 0.001"),
            ({"noise": float("nan")}, "noise: expected"),
            ({"frames": 0}, "frames: expected an integer of at least 1"),
            ({"frames": 1, "widths": 2}, "frames, widths: 'audio' has 1 frames of width 2, too few for its 3 bits"),
            ({"xor": ("audio", "smell")}, "xor: expected (two of|None or a list or tuple of 2)"),
            ({"xor": ("audio", "audio")}, "xor: expected (two of|None or a list or tuple of 2)"),
            ({"xor": ("audio",)}, "xor: expected (two of|None or a list or tuple of 2)"),
            ({"weights": {"smell_0": 1.0}}, r"weights: unknown components \['smell_0'\]"),
            ({"weights": dict.fromkeys(["shared_0", "language_0", "audio_0", "vision_0", "xor"], 0)}, "not all zero"),
            ({"weights": {"xor": float("inf")}}, r"weights\['xor'\]: expected None or a finite number"),
            ({"shared": 0, "unique": 0, "xor": None}, "expected 1 to 12 components of the score, got 0"),
            ({"shared": 20, "frames": 30}, "got 24"),
            ({"sizes": (10, 10)}, r"sizes(\[1\])?: expected (an integer of at least 1|a list or tuple of 3)"),
            ({"sizes": (10, 0, 10)}, r"sizes(\[1\])?: expected (an integer of at least 1|a list or tuple of 3)"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            data.load("synthetic", **options)

    def test_truth_of_other_data(self):
        with pytest.raises(ValueError, match="expected synthetic data, got 'digits'"):
            syn.bayes(data.load("digits")["test"])
        made = syn.truth(data.load("synthetic", sizes=(5, 5, 5))["test"])
        with pytest.raises(ValueError, match="data: unknown modalities"):
            syn.bit_log_odds(made, data.load("digits")["test"])
        with pytest.raises(ValueError, match="modalities: unknown"):
            syn.bayes_score(made, ["smell"])
        with pytest.raises(ValueError, match="metric: expected one of"):
            syn.bayes_score(made, metric="mae")
        with pytest.raises(ValueError, match="loss: expected"):
            syn.bayes(data.load("synthetic", task="regression", sizes=(5, 5, 5))["test"], "accuracy")


def loop_posterior(made, d, i):
    """P(y) of sample i: every combination of the coins, every observed cell, one at a time."""
    weight = {}
    for bits in itertools.product((0, 1), repeat=len(made.bits)):
        log = 0.0
        for m, name in enumerate(made.modalities):
            if name not in d.modalities:
                continue
            x, seen = d.data.features[name][i].numpy(), d.data.observed[name][i].numpy()
            places = made.carried[m]
            for t in range(made.frames[m]):
                if not seen[t]:
                    continue
                for column in range(made.widths[m]):
                    mean = 0.0
                    for k, place in enumerate(places):
                        if t % min(len(places), made.frames[m]) == k % min(len(places), made.frames[m]) and (
                            column == k % made.widths[m]
                        ):
                            mean += 2 * bits[place] - 1
                    log -= (float(x[t, column]) - mean) ** 2 / (2 * made.noise[m] ** 2)
        y = 0.0
        for w, c in zip(made.weights, made.components, strict=True):
            bit = (bits[made.xor[0]] != bits[made.xor[1]]) if c == "xor" else bits[made.bits.index(c)]
            y += w * (2 * int(bit) - 1)
        weight.setdefault(round(y, 6), []).append(log)
    top = max(max(v) for v in weight.values())
    mass = {y: sum(math.exp(v - top) for v in logs) for y, logs in weight.items()}
    total = sum(mass.values())
    return {y: m / total for y, m in mass.items()}


class TestPosterior:
    @pytest.mark.slow
    @pytest.mark.parametrize("options", [TWO, FOUR, {"modalities": ("x", "y"), "frames": 1, "shared": 2, "xor": None}])
    def test_against_the_definition(self, options):
        splits = data.load("synthetic", task="regression", **options, sizes=(5, 5, 12))
        d = splits["test"]
        g = torch.Generator().manual_seed(3)
        present = torch.rand(12, len(d.modalities), generator=g) > 0.3
        present[0] = False  # nothing observed: the prior
        observed = {m: torch.rand(x.shape, generator=g) > 0.3 for m, x in d.data.valid.items()}
        made = syn.truth(d)
        for part in (d, d.drop(present, observed), d.select(d.modalities[:1])):
            p = syn.score_posterior(made, syn.bit_log_odds(made, part))
            assert torch.allclose(p.sum(-1), torch.ones(12, dtype=torch.float64))
            for i in range(12):
                expected = loop_posterior(made, part, i)
                assert p[i].tolist() == pytest.approx([expected[round(v, 6)] for v in made.values], abs=1e-9)

    def test_decisions(self):
        d = data.load("synthetic", task="regression", sizes=(5, 5, 50))["test"]
        made = syn.truth(d)
        p = syn.score_posterior(made, syn.bit_log_odds(made, d))
        values = torch.tensor(made.values, dtype=torch.float64)
        assert torch.allclose(syn.bayes(d, "mse")[:, 0], p @ values)
        median = syn.bayes(d)[:, 0]
        risk = (p[:, None] * (values[:, None] - values).abs()).sum(-1)  # of every value as the answer
        at = (median[:, None] - values).abs().argmin(-1)
        assert torch.allclose(risk.gather(1, at[:, None])[:, 0], risk.amin(-1))
        c = data.load("synthetic", sizes=(5, 5, 50))["test"]
        logits = syn.bayes(c)
        assert logits.shape == (50, 4)
        assert torch.allclose(logits.exp().sum(-1), torch.ones(50, dtype=torch.float64))

    def test_nothing_observed_is_the_prior(self):
        d = data.load("synthetic", sizes=(5, 5, 5))["test"]
        nothing = d.drop(torch.tensor([False] * 3))
        assert torch.allclose(syn.bayes(nothing).exp()[0], torch.tensor([6, 10, 10, 6], dtype=torch.float64) / 32)


class TestScores:
    def test_closed_forms(self):
        """One bit: accuracy Phi(sqrt(r) / sigma) for r cells; XOR: p q + (1 - p)(1 - q), and 1/2 from one side."""
        alone = {"shared_0": 0.0, "x_0": 0.0, "y_0": 0.0, "xor": 0.0}
        d = data.load("synthetic", **TWO, classes=2, weights={**alone, "x_0": 1.0}, sizes=(5, 5, 5))["test"]
        cells = {m: syn.truth(d).cells(m).sum((1, 2)) for m in ("x", "y")}
        assert cells["x"].tolist() == [2, 2, 0, 1, 0]  # 5 frames shared out among 3 bits
        assert cells["y"].tolist() == [2, 0, 1, 0, 1]
        score, error = syn.bayes_score(d)
        assert score == pytest.approx(phi(math.sqrt(2) / 1.2), abs=5 * error)
        assert syn.bayes_score(d, ["y"])[0] == pytest.approx(0.5)

        d = data.load("synthetic", **TWO, classes=2, weights={**alone, "shared_0": 1.0}, sizes=(5, 5, 5))["test"]
        score, error = syn.bayes_score(d)
        assert score == pytest.approx(phi(math.sqrt(2 / 1.44 + 2 / 3.24)), abs=5 * error)

        d = data.load("synthetic", **TWO, classes=2, weights={**alone, "xor": 1.0}, sizes=(5, 5, 5))["test"]
        p, q = phi(1 / 1.2), phi(1 / 1.8)
        score, error = syn.bayes_score(d)
        assert score == pytest.approx(p * q + (1 - p) * (1 - q), abs=5 * error)
        game = syn.bayes_scores(d, samples=2000)
        assert list(game) == [(), ("x",), ("y",), ("x", "y")]
        assert game[()] == game[("x",)] == game[("y",)] == pytest.approx(0.5)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, TWO, {**FOUR, "varied_lengths": False}])
    def test_squared_error_by_quadrature(self, options):
        """E (s - E[s | x])^2 = 1 - E tanh(L / 2)^2, with L Gaussian given s: an integral in one dimension per bit."""
        d = data.load("synthetic", task="regression", **options, sizes=(5, 5, 5))["test"]
        made = syn.truth(d)
        nodes, weights = np.polynomial.hermite_e.hermegauss(120)
        for k in range(len(made.modalities) + 1):
            for names in itertools.combinations(made.modalities, k):
                square = []  # E tanh^2 per bit
                for b in range(len(made.bits)):
                    info = sum(
                        made.cells(m)[b].sum() / s**2
                        for m, s in zip(made.modalities, made.noise, strict=True)
                        if m in names
                    )
                    tanh = np.tanh(info + np.sqrt(info) * nodes)
                    square.append(float((weights * tanh**2).sum() / weights.sum()))
                expected = 0.0
                for w, c in zip(made.weights, made.components, strict=True):
                    e = square[made.xor[0]] * square[made.xor[1]] if c == "xor" else square[made.bits.index(c)]
                    expected += w**2 * (1 - e)
                score, error = syn.bayes_score(made, names, "mse", samples=40_000)
                assert score == pytest.approx(expected, abs=5 * error + 1e-9)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, TWO, {**FOUR, "varied_lengths": False}])
    @pytest.mark.parametrize("metric", ["accuracy", "mae", "mse"])
    def test_the_predictor_reaches_the_stated_score(self, options, metric):
        task = "classification" if metric == "accuracy" else "regression"
        d = data.load("synthetic", task=task, **options, sizes=(5, 5, 20_000))["test"]
        stated, numerical = syn.bayes_score(d, metric=metric, samples=60_000)
        reached = losses(d, metric)
        assert numerical < 0.5 * standard_error(reached)
        assert abs(float(reached.mean()) - stated) <= 2 * math.hypot(standard_error(reached), numerical)
        for names in itertools.combinations(d.modalities, 2):  # and on subsets
            stated, numerical = syn.bayes_score(d, names, metric, samples=60_000)
            reached = losses(d.select(names), metric)
            assert abs(float(reached.mean()) - stated) <= 3 * math.hypot(standard_error(reached), numerical)

    def test_more_is_better_and_two_sides_of_the_xor_are_synergistic(self):
        d = data.load("synthetic", sizes=(5, 5, 5))["test"]
        v = syn.bayes_scores(d, samples=20_000)
        assert len(v) == 8
        for small, large in itertools.product(v, repeat=2):
            if set(small) < set(large):
                assert v[small] <= v[large] + 0.003
        full, language = v[("language", "audio", "vision")], v[("language",)]
        gain = lambda m: v[tuple(x for x in ("language", "audio", "vision") if x in ("language", m))] - language
        assert full - language > gain("audio") + gain("vision") + 0.1


class TestNothingBeatsBayes:
    """Models on the true generative features (the bits' log odds, and their product for the XOR), not on raw frames."""

    def features(self, d):
        made = syn.truth(d)
        odds = syn.bit_log_odds(made, d).numpy()
        tanh = np.tanh(odds / 2)
        return np.column_stack([odds, tanh, tanh[:, made.xor[0]] * tanh[:, made.xor[1]]])

    @pytest.mark.slow
    def test_classification(self):
        splits = data.load("synthetic", **TWO, sizes=(8000, 5, 20_000))
        train, test = splits["train"], splits["test"]
        stated, numerical = syn.bayes_score(test, samples=60_000)
        x, z, y, t = self.features(train), self.features(test), train.target.numpy(), test.target.numpy()
        models = {
            "logistic": LogisticRegression(max_iter=1000),
            "boosting": HistGradientBoostingClassifier(max_iter=60, learning_rate=0.1),
            "forest": RandomForestClassifier(60, min_samples_leaf=20, random_state=0),
            "mlp": MLPClassifier((32,), max_iter=40, early_stopping=True, random_state=0),
        }
        scores = {name: model.fit(x, y).score(z, t) for name, model in models.items()}
        print(stated, scores)
        error = math.hypot(math.sqrt(stated * (1 - stated) / len(t)), numerical)
        assert max(scores.values()) <= stated + 3 * error
        assert max(scores.values()) >= stated - 0.03  # and they come close: the features hold all there is

    @pytest.mark.slow
    def test_regression(self):
        splits = data.load("synthetic", task="regression", **TWO, sizes=(8000, 5, 20_000))
        train, test = splits["train"], splits["test"]
        x, z, y, t = self.features(train), self.features(test), train.target.numpy(), test.target.numpy()
        for metric, loss in (("mse", "squared_error"), ("mae", "absolute_error")):
            stated, numerical = syn.bayes_score(test, metric=metric, samples=60_000)
            best = math.inf
            for model in (LinearRegression(), HistGradientBoostingRegressor(loss=loss, max_iter=60)):
                error = np.abs(model.fit(x, y).predict(z) - t)
                error = error**2 if metric == "mse" else error
                spread = math.hypot(error.std() / math.sqrt(len(t)), numerical)
                assert error.mean() >= stated - 3 * spread
                best = min(best, error.mean())
            assert best <= 1.1 * stated

    @pytest.mark.slow
    def test_no_single_modality_sees_the_xor(self):
        splits = data.load("synthetic", noise=0.7, sizes=(8000, 5, 8000))
        made = syn.truth(splits["train"])
        xor = {k: (d.data.extras["bits"][:, list(made.xor)].sum(-1) == 1).numpy() for k, d in splits.items()}
        chance = 3 * 0.5 / math.sqrt(8000)

        def accuracy(names):
            x, z = (
                np.concatenate([splits[k].data.features[m].flatten(1).numpy() for m in names], 1)
                for k in ("train", "test")
            )
            odds = [syn.bit_log_odds(made, splits[k].select(names)).numpy() for k in ("train", "test")]
            model = HistGradientBoostingClassifier(max_iter=30)
            return [
                model.fit(x, xor["train"]).score(z, xor["test"]),
                model.fit(odds[0], xor["train"]).score(odds[1], xor["test"]),
            ]

        for m in made.modalities:
            for score in accuracy([m]):
                assert abs(score - 0.5) <= chance, m
        for score in accuracy(["language", "audio"]):
            assert abs(score - 0.5) <= chance
        assert accuracy(["audio", "vision"])[1] > 0.9
