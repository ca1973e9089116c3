"""DEAR against its equations, written here as loops over samples and frames that import nothing under test."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmlib import DEAR
from mmlib.batch import MultimodalBatch, MultimodalDataset
from mmlib.losses import mmd, sinkhorn
from mmlib.methods.dear import READINGS, DEARConfig, TransformerLayer, reliability_weights, weight_entropy
from mmlib.metrics import msa_scores
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, load, predict, random_state, save

SHAPES = {"language": (4, 3), "audio": (2, 5), "vision": (3, 2), "touch": (1, 4)}
SMALL = {"width": 6, "heads": 2, "head_width": 3, "hidden": 5}
LAMBDAS = {"lambda1": 0.3, "lambda2": 0.7, "alpha": 0.8, "beta": 0.3}


def make_batch(n=6, M=3, *, seed=0, dtype=torch.float64, drop=True, natural=False, classes=0, shapes=SHAPES):
    """Samples of unequal lengths, of which frames and whole modalities are dropped, the complete ones kept."""
    g = torch.Generator().manual_seed(seed)
    features, valid = {}, {}
    for m, (T, D) in itertools.islice(shapes.items(), M):
        lengths = torch.randint(1, T + 1, (n,), generator=g)
        valid[m] = torch.arange(T) < lengths[:, None]
        features[m] = torch.where(valid[m][..., None], torch.randn(n, T, D, generator=g, dtype=torch.float64), 0)
    features = {m: x.to(dtype) for m, x in features.items()}
    present = torch.ones(n, M, dtype=torch.bool)
    if natural:
        present[torch.arange(n), torch.arange(n) % M] = False
        present[: n // 2] = True
    target = torch.randint(classes, (n,), generator=g) if classes else torch.randn(n, generator=g).to(dtype)
    batch = MultimodalBatch(features, torch.ones(n, M, dtype=torch.bool), target, valid, ids=torch.arange(n))
    batch = batch.drop(present=present)
    if not drop:
        return batch
    keep = {m: torch.rand(v.shape, generator=g) < 0.6 for m, v in valid.items()}
    there = torch.rand(n, M, generator=g) < 0.8
    return batch.drop(there, keep, keep_complete=True)


def make(batch, *, seed=0, train=True, text_encoder=None, **options):
    torch.manual_seed(seed)
    shapes = {m: tuple(x.shape[1:]) for m, x in batch.features.items()}
    outputs = {} if batch.target is None or batch.target.is_floating_point() else {"outputs": 3, "regression": False}
    model = DEAR(text_encoder, **{"feature_shapes": shapes, **SMALL, **outputs, **options}).to(
        next(x.dtype for x in batch.features.values() if x.is_floating_point())
    )
    for p in model.parameters():  # also the norms' and the biases', so that no term hides behind a one or a zero
        nn.init.normal_(p, std=0.4)
    return model.train(train)


# --- the reference ----------------------------------------------------------------------------------------------------


def softmax(v):
    e = np.exp(np.array(v) - max(v))
    return e / e.sum()


def layer_norm(x, weight=1.0, bias=0.0):
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * weight + bias


class Loop:
    """One sample, one frame at a time, from the equations; parameters by their names."""

    def __init__(self, model, batch):
        self.c, self.names, self.query = model.config, model.modalities, model.query
        self.p = {k: v.detach().numpy() for k, v in model.state_dict().items()}
        complete = batch.complete if batch.complete is not None else batch
        n, M, c = len(batch), len(self.names), self.c
        out = {k: [] for k in ("y", "syn", "rob", "uni", "d", "w", "H", "g")}
        X, Y, kept = [], [], []  # per sample and modality {frame: vector}
        for b in range(n):
            h, rep, shown = {}, {}, {}
            x, frames = {}, {}
            for m in self.names:
                where = self.frames(batch, m, b)
                h[m] = self.encode(m, {t: self.value(batch, m, b, t) for t in where})
                rep[m] = self.hdcr(m, h[m])
                if c.space == "raw":
                    shown[m] = {t: self.linear(f"hdcr.{m}.raw", v) for t, v in rep[m].items()}
                    x[m] = {t: self.value(complete, m, b, t) for t in where}
                else:
                    shown[m] = rep[m]
                    x[m] = self.encode(m, {t: self.value(complete, m, b, t) for t in where})
                there = [t for t in where if complete.observed[m][b, t]]
                frames[m] = list(x[m]) if c.encoder == "tokens" else there
            found = self.assess(h, rep if c.stream_input == "reconstructed" else h)
            for key, value in found.items():
                out[key].append(value)
            X.append(x)
            Y.append(shown)
            kept.append(frames)
        self.out = {k: np.array(v) for k, v in out.items() if v[0] is not None}
        there = complete.present.numpy()
        if batch.target is None:
            return
        y = batch.target.numpy()
        self.losses = {"task": np.mean([self.task(o, t) for o, t in zip(self.out["y"], y, strict=True)])}
        each = [[self.task(self.out["uni"][b][m], y[b]) for b in range(n)] for m in range(M)]
        if c.aux == "all":
            each += [[self.task(self.out[s][b], y[b]) for b in range(n)] for s in ("syn", "rob") if s in self.out]
        self.losses["aux"] = c.alpha * np.mean([np.mean(one) for one in each])
        uni = sum(
            self.distance([m], [b for b in range(n) if there[b, i]], X, Y, kept) for i, m in enumerate(self.names)
        )
        joint = self.distance(self.names, [b for b in range(n) if there[b].all()], X, Y, kept)
        self.losses["unimodal"] = c.lambda1 * uni
        self.losses["joint"] = c.lambda2 * joint * (M if c.joint_sum == "literal" else 1)
        self.error = np.full((n, M), np.nan)
        for b, (i, m) in itertools.product(range(n), enumerate(self.names)):
            if there[b, i]:
                squares = [((X[b][m][t] - Y[b][m][t]) ** 2) for t in kept[b][m]]
                self.error[b, i] = np.mean(squares) if c.error == "mean" else np.sum(squares)
        if c.sure:
            scale = np.ones(M)
            if c.error_scale == "variance":
                for i, m in enumerate(self.names):
                    rows = np.array([X[b][m][t] for b in range(n) if there[b, i] for t in kept[b][m]])
                    scale[i] = ((rows - rows.mean(0)) ** 2).mean()
            gaps = [
                (self.error[b, i] / scale[i] - self.out["d"][b][i]) ** 2
                for b in range(n)
                for i in range(M)
                if there[b, i]
            ]
            self.losses["calibration"] = c.beta * np.mean(gaps)

    def frames(self, batch, m, b):
        T = batch.valid[m].shape[1]
        where = [t for t in range(T) if batch.valid[m][b, t]]
        return where or list(range(T))

    def value(self, batch, m, b, t):
        return batch.features[m][b, t].numpy() if batch.valid[m][b, t] else 0 * batch.features[m][b, t].numpy()

    def linear(self, name, x):
        W = self.p[f"{name}.weight"]
        return W @ x + self.p.get(f"{name}.bias", 0.0)

    def normed(self, name, x):
        return layer_norm(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def mlp(self, name, x):
        return self.linear(f"{name}.3", np.maximum(self.linear(f"{name}.0", x), 0))

    def encode(self, m, x):  # Eq. 5
        deep = m == self.query and self.c.text_layers
        name = f"encoder.{m}.first" if deep else f"encoder.{m}"
        if self.c.encoder == "tokens":
            count = self.c.summary_tokens
            h = {i: self.p[f"{name}.tokens"][i] for i in range(count)}
            h |= {count + t: self.linear(f"{name}.project", v) for t, v in x.items()}
            h = self.transformer(f"{name}.transformer", h, self.c.token_layers)
            h = {i: h[i] for i in range(count)}
        else:
            normed = {t: self.normed(f"{name}.norm", v) if len(v) > 1 else v for t, v in x.items()}
            h = {t: self.linear(f"{name}.project", v) for t, v in normed.items()}
        return self.transformer(f"encoder.{m}.rest", h, self.c.text_layers) if deep else h

    def hdcr(self, m, h):
        return self.transformer(f"hdcr.{m}", h, self.c.layers)

    def transformer(self, name, h, layers):
        x = {t: v + self.p[f"{name}.position"][t] for t, v in h.items()}
        for i in range(layers):
            x = self.layer(f"{name}.layers.{i}", x)
        return x

    def layer(self, name, x):
        size = self.c.head_width
        q, k, v = (
            {t: self.linear(f"{name}.{s}", self.normed(f"{name}.norm_{s}", y)) for t, y in x.items()} for s in "qkv"
        )
        after = {}
        for t in x:
            heads = []
            for a in range(self.c.heads):
                part = slice(a * size, (a + 1) * size)
                weight = softmax([q[t][part] @ k[s][part] / math.sqrt(size) for s in x])
                heads.append(sum(w * v[s][part] for w, s in zip(weight, x, strict=True)))
            y = x[t] + self.linear(f"{name}.out", np.concatenate(heads))
            hidden = self.linear(f"{name}.feed.0", self.normed(f"{name}.norm", y))
            hidden = np.array([0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in hidden])
            after[t] = y + self.linear(f"{name}.feed.3", hidden)
        return after

    def assess(self, h, s):
        c, names = self.c, self.names
        mean = lambda frames: sum(frames.values()) / len(frames)
        d = None
        w = [1 / len(names)] * len(names)
        if c.sure:
            z = []
            for m in names:
                p = mean(h[m])
                z.append(p / math.sqrt((p**2).sum()) if c.norm == "l2" else layer_norm(p))  # Eq. 6
            d = np.array([math.log1p(math.exp(u)) for u in self.mlp("difficulty", np.concatenate(z))])  # Eq. 7
            w = softmax([-u / self.tau() for u in d])  # Eq. 8
        H = -sum(u * math.log(u) for u in w)
        pooled = [mean(s[m]) for m in names]
        uni = [self.mlp(f"unimodal.{m}", p) for m, p in zip(names, pooled, strict=True)]
        rob = sum(a * u for a, u in zip(w, uni, strict=True))  # Eq. 10
        found = {"uni": uni, "rob": rob, "d": d, "w": w, "H": H}
        if c.streams == "robust":
            return {**found, "syn": None, "y": rob, "g": 0.0}
        if c.streams == "single":
            syn = self.mlp("single", np.concatenate(pooled))
        elif c.fusion == "gated":
            fused = 0
            for m, p in zip(names, pooled, strict=True):
                gate = 1 / (1 + np.exp(-self.linear(f"fusion.gate.{m}", np.concatenate(pooled))))
                fused = fused + gate * np.tanh(self.linear(f"fusion.value.{m}", p))
            syn = self.mlp("synergistic", fused)
        elif c.fusion == "self":
            row = {(m, t): v for m in names for t, v in s[m].items()}
            syn = self.mlp("synergistic", mean(self.layer("fusion.layer", row)))
        else:
            syn = self.mlp("synergistic", mean(self.attend(s, dict(zip(names, w, strict=True)))))
        if c.streams != "both":
            return {**found, "syn": syn, "y": syn, "g": 1.0}
        told = np.zeros(len(names)) if d is None else d
        g = 1 / (1 + math.exp(-self.mlp("gate", np.concatenate([mean(h[self.query]), told, [H]]))[0]))  # Eq. 11
        return {**found, "syn": syn, "y": g * syn + (1 - g) * rob, "g": g}

    def attend(self, s, w):  # Eq. 9
        K, V, bias = [], [], []
        for m in self.names:
            if m == self.query:
                continue
            for x in s[m].values():
                k = self.linear("fusion.W_K", x)
                K.append(k if self.c.k_scale == "logbias" else w[m] * k)
                V.append(w[m] * self.linear("fusion.W_V", x))
                bias.append(math.log(w[m]) if self.c.k_scale == "logbias" else 0)
        out = {}
        for t, x in s[self.query].items():
            q = self.linear("fusion.W_Q", x)
            a = softmax([q @ k / math.sqrt(len(q)) + u for k, u in zip(K, bias, strict=True)])
            out[t] = sum(u * v for u, v in zip(a, V, strict=True)) + (x if self.c.residual else 0)
        return out

    def tau(self):
        return math.exp(self.p["log_tau"]) if "log_tau" in self.p else self.c.tau

    def task(self, out, y):
        if self.c.regression:
            return (out[0] - y) ** 2 if self.c.main == "mse" else abs(out[0] - y)
        return -math.log(softmax(out)[y])

    def distance(self, names, rows, X, Y, kept):
        if self.c.alignment == "mse":
            squares = [(X[b][m][t] - Y[b][m][t]) ** 2 for b in rows for m in names for t in kept[b][m]]
            return np.concatenate(squares).mean() if squares else 0.0
        if self.c.samples == "mean":
            side = lambda Z: np.array(
                [np.concatenate([np.mean([Z[b][m][t] for t in kept[b][m]], 0) for m in names]) for b in rows]
            )
        else:
            side = lambda Z: np.array([Z[b][m][t] for m in names for b in rows for t in kept[b][m]])
        if len(rows) < 2:
            return 0.0
        x, y = side(X), side(Y)
        if self.c.alignment == "sinkhorn":  # its own loop is in test_losses
            return sinkhorn(torch.tensor(x), torch.tensor(y), self.c.epsilon, self.c.iterations).item()
        z = np.concatenate([x, y])
        total = sum(((p - q) ** 2).sum() for p in z for q in z) / (len(z) * (len(z) - 1))
        scales = self.c.bandwidths or [total * f for f in (0.25, 0.5, 1, 2, 4)]
        k = lambda A, B: np.mean([[sum(math.exp(-((p - q) ** 2).sum() / s) for s in scales) for q in B] for p in A])
        return k(x, x) + k(y, y) - 2 * k(x, y)


OPTIONS = [
    {},
    {"stream_input": "encoded"},
    {"space": "raw"},
    {"alignment": "mse"},
    {"alignment": "mse", "space": "raw"},
    {"alignment": "sinkhorn", "epsilon": 0.5, "iterations": 30},
    {"samples": "tokens"},
    {"samples": "subsampled", "token_samples": 10**6},
    {"bandwidths": (0.5, 3.0)},
    {"joint_sum": "literal"},
    {"norm": "layer"},
    {"tau": 0.5},
    {"tau": 2.0, "learn_tau": True},
    {"query": "audio"},
    {"query": "vision", "k_scale": "logbias"},
    {"residual": True},
    {"fusion": "self"},
    {"fusion": "gated"},
    {"streams": "robust"},
    {"streams": "synergistic"},
    {"streams": "single"},
    {"sure": False},
    {"sure": False, "streams": "single", "alignment": "mse"},
    {"main": "l1"},
    {"aux": "all"},
    {"aux": "all", "streams": "robust"},
    {"error": "sum"},
    {"error_scale": "variance"},
    {"layers": 1},
    {"reading": "table8"},
    {"encoder": "tokens", "summary_tokens": 3, "token_layers": 1, "samples": "tokens"},  # as many as vision has frames
    {"text_layers": 1, "query": "audio"},
]


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_forward_losses_and_diagnosis_against_the_loop(options, natural):
    batch = make_batch(natural=natural)
    model = make(batch, **options)
    out, ref = model(batch), Loop(model, batch)
    np.testing.assert_allclose(out.logits.detach(), ref.out["y"], rtol=1e-7, atol=1e-9)
    assert set(out.losses) == set(ref.losses)
    for name, value in ref.losses.items():
        assert out.losses[name].item() == pytest.approx(value, rel=1e-6, abs=1e-9), name
    if options.get("error_scale") == "variance":
        return
    seen = model.diagnose(batch, batch_size=4)
    for ours, theirs in {
        "prediction": "y", "synergistic": "syn", "robust": "rob", "unimodal": "uni", "difficulty": "d", "weights": "w",
        "entropy": "H", "gate": "g",
    }.items():  # fmt: skip
        assert (getattr(seen, ours) is None) == (theirs not in ref.out), ours
        if theirs in ref.out:
            np.testing.assert_allclose(getattr(seen, ours), ref.out[theirs], rtol=1e-6, atol=1e-8, err_msg=ours)
    np.testing.assert_allclose(seen.error, ref.error, rtol=1e-6, atol=1e-8)
    assert model.training


@pytest.mark.parametrize("M", [2, 4])
@pytest.mark.parametrize("classes", [0, 3])
def test_other_numbers_of_modalities_and_classes(M, classes):
    batch = make_batch(M=M, classes=classes)
    model = make(batch)
    out, ref = model(batch), Loop(model, batch)
    assert out.logits.shape == (6, 3 if classes else 1)
    np.testing.assert_allclose(out.logits.detach(), ref.out["y"], rtol=1e-7, atol=1e-9)
    for name, value in ref.losses.items():
        assert out.losses[name].item() == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_one_value_frames_are_not_normalised_away():
    batch = make_batch(shapes={"a": (3, 1), "b": (2, 4)}, M=2)
    model = make(batch)
    np.testing.assert_allclose(model(batch).logits.detach(), Loop(model, batch).out["y"], rtol=1e-7, atol=1e-9)
    assert len(set(model.diagnose(batch).weights[:, 0].tolist())) == len(batch)
    assert model.query == "a"  # no text: the first


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_weights_and_entropy_by_hand():
    w = reliability_weights(torch.tensor([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(w, [0.6652, 0.2447, 0.0900], atol=5e-5)
    assert weight_entropy(w).item() == pytest.approx(0.8324, abs=5e-5)
    assert weight_entropy(torch.full((3,), 1 / 3)).item() == pytest.approx(1.0986, abs=5e-5)
    assert weight_entropy(torch.tensor([1.0, 0, 0])).item() == 0


@pytest.mark.slow
def test_a_weight_that_underflows_leaves_finite_gradients() -> None:
    d = torch.tensor([[0.5, 400.0, 1.0], [300.0, 0.0, 900.0]], requires_grad=True)
    w = reliability_weights(d)
    assert bool((w == 0).any())
    weight_entropy(w).sum().backward()
    assert d.grad is not None
    assert bool(torch.isfinite(d.grad).all())
    p = w[0, [0, 2]].detach()  # what is left are two weights: dH/dd = w (log w + H) by hand
    slope = p * (p.log() - (p * p.log()).sum())
    torch.testing.assert_close(d.grad[0], torch.tensor([slope[0], 0, slope[1]]))
    assert d.grad[1].tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=6), st.floats(0.5, 20), st.integers(0, 5), st.floats(0.01, 10))
def test_weights_fall_in_difficulty(d, tau, place, more):
    before = torch.tensor(d, dtype=torch.float64)
    after = before.clone()
    after[place % len(d)] += more
    a, b = reliability_weights(before, tau), reliability_weights(after, tau)
    assert a.sum().item() == pytest.approx(1)
    assert b[place % len(d)] < a[place % len(d)]
    others = torch.arange(len(d)) != place % len(d)
    assert (b[others] >= a[others]).all()
    assert a.argmax() == before.argmin() or a.max() == a[before.argmin()]
    assert 0 <= weight_entropy(a) <= math.log(len(d)) + 1e-12


def test_a_scaled_key_is_flat_attention_and_a_bias_is_none():
    """Eq. 9 with w = 0 for one modality: its keys score 0, they are not switched off."""
    batch = make_batch(drop=False)
    h = {m: torch.randn(6, T, 6, dtype=torch.float64) * 5 for m, (T, _) in list(SHAPES.items())[:3]}
    valid = {m: torch.ones(x.shape[:2], dtype=torch.bool) for m, x in h.items()}
    w = {"language": torch.zeros(6).double(), "audio": torch.zeros(6).double(), "vision": torch.ones(6).double()}
    printed, biased = make(batch).fusion, make(batch, k_scale="logbias").fusion
    alone = torch.softmax(
        biased.W_Q(h["language"]) @ biased.W_K(h["vision"]).transpose(1, 2) / math.sqrt(6), -1
    ) @ biased.W_V(h["vision"])
    torch.testing.assert_close(biased(h, valid, w), alone)
    assert not torch.allclose(printed(h, valid, w), alone)


# --- each part counts -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_loss_term_is_there_weighted_and_reaches_parameters():
    batch = make_batch()
    base = make(batch)(batch).losses
    assert list(base) == ["task", "aux", "unimodal", "joint", "calibration"]
    for weight, term in zip(LAMBDAS, ("unimodal", "joint", "aux", "calibration"), strict=True):
        doubled = make(batch, **{weight: 2 * LAMBDAS[weight]})(batch).losses
        for name in base:
            torch.testing.assert_close(doubled[name], base[name] * (2 if name == term else 1))
        assert term not in make(batch, **{weight: 0.0})(batch).losses
    reached = {
        "task": ["encoder", "hdcr", "difficulty", "unimodal", "fusion", "synergistic", "gate"],
        "aux": ["encoder", "hdcr", "unimodal"],
        "unimodal": ["encoder", "hdcr"],
        "joint": ["encoder", "hdcr"],
        "calibration": ["encoder", "difficulty"],
    }
    for term, parts in reached.items():
        model = make(batch)
        model(batch).losses[term].backward()
        got = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert got == set(parts), term


def test_gradients_to_the_originals_and_the_error():
    batch = make_batch()

    def gradient(term, **options):
        model = make(batch, **options)
        model(batch).losses[term].backward()
        return {n: p.grad for n, p in model.named_parameters()}

    held, free = gradient("unimodal"), gradient("unimodal", stop_complete=False)
    assert not torch.allclose(held["encoder.audio.project.weight"], free["encoder.audio.project.weight"])
    torch.testing.assert_close(held["hdcr.audio.layers.1.out.weight"], free["hdcr.audio.layers.1.out.weight"])
    held, free = gradient("calibration"), gradient("calibration", error_grad=True)
    assert held["hdcr.audio.layers.1.out.weight"] is None
    assert free["hdcr.audio.layers.1.out.weight"].any()


def test_gradcheck_of_the_objective():
    batch = make_batch(n=3, M=2, drop=False)
    model = make(batch, layers=1)
    x = batch.features["audio"].clone().requires_grad_()

    def objective(x):
        return model(batch.replace(features={**batch.features, "audio": x})).losses["task"]

    assert torch.autograd.gradcheck(objective, (x,), eps=1e-6, atol=1e-5)


def test_what_is_missing_by_nature_has_no_part_in_alignment_and_calibration():
    batch = make_batch(natural=True)
    model = make(batch)
    out = model(batch).losses
    complete = batch.complete
    junk = {m: x.clone() for m, x in complete.features.items()}
    for i, m in enumerate(junk):
        junk[m][~complete.present[:, i]] = 1e3
    other = model(batch.replace(complete=complete.replace(features=junk))).losses
    for name, value in out.items():
        torch.testing.assert_close(other[name], value)
    # One sample is no distribution: the term is 0, and said to be.
    alone = complete.present.clone()
    alone[1:, 1] = False
    few = batch.replace(complete=complete.replace(present=alone, observed={}))
    model.skipped.zero_()
    with_audio = model(few).losses
    assert model.skipped.tolist() == [0, 1, 0, 1]
    assert with_audio["joint"] == 0
    assert with_audio["unimodal"] > 0
    nothing = batch.replace(complete=complete.replace(present=torch.zeros_like(alone), observed={}))
    losses = model(nothing).losses
    assert losses["unimodal"] == losses["joint"] == losses["calibration"] == 0
    assert sum(losses.values()).isfinite()


@pytest.mark.slow
def test_skipped_terms_are_in_the_history():
    data = MultimodalDataset(make_batch(n=8, dtype=torch.float32, drop=False))
    present = torch.ones(8, 3, dtype=torch.bool)
    present[:, 2] = False
    present[0, 2] = True
    history = fit(
        make(data.data), data.drop(present), None, TrainConfig(epochs=2, batch_size=4, select="last", device="cpu")
    )
    assert [row["skipped_vision"] for row in history.epochs] == [2, 2]
    assert [row["skipped_joint"] for row in history.epochs] == [2, 2]
    assert "skipped_audio" not in history.epochs[0]


def test_dropout_is_for_training():
    batch = make_batch()
    model = make(batch, dropout=0.5)
    assert not torch.equal(model(batch).logits, model(batch).logits)
    model.eval()
    assert torch.equal(model(batch).logits, model(batch).logits)
    torch.testing.assert_close(model.diagnose(batch).prediction, model(batch).logits)


def test_subsampled_tokens():
    batch = make_batch(n=12)
    model = make(batch, samples="subsampled", token_samples=8)
    torch.manual_seed(0)
    a = model(batch).losses["joint"]
    torch.manual_seed(0)
    assert model(batch).losses["joint"] == a
    assert model(batch).losses["joint"] != a
    assert a > 0


# --- what it may see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", list(READINGS))
def test_predictions_need_neither_presence_nor_what_was_dropped(reading):
    batch = make_batch()
    model = make(batch, reading=reading, train=False)
    expected = model(batch).logits
    shuffled = batch.present[torch.randperm(6, generator=torch.Generator().manual_seed(0))].logical_not()
    blind = batch.replace(
        present=shuffled, observed={m: torch.zeros_like(v) for m, v in batch.valid.items()}, complete=None, target=None
    )
    torch.testing.assert_close(model(blind).logits, expected, rtol=0, atol=0)
    assert model(batch).losses == {}
    assert model.diagnose(blind).error is None
    # In training, only the complete samples' own presence is read.
    model.train()
    torch.manual_seed(0)
    a = model(batch).losses
    torch.manual_seed(0)
    b = model(blind.replace(complete=batch.complete, target=batch.target)).losses
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("reading", list(READINGS))
def test_padding_and_the_company_of_a_sample_change_nothing(reading):
    batch = make_batch()
    model = make(batch, reading=reading, train=False)
    expected = model(batch).logits
    torch.testing.assert_close(torch.cat([model(batch[i]).logits for i in range(6)]), expected)
    junk = {m: torch.where(batch.valid[m][..., None], x, 99.0) for m, x in batch.features.items()}
    torch.testing.assert_close(model(batch.replace(features=junk)).logits, expected)


def test_shorter_sequences_than_it_was_made_for():
    batch = make_batch()
    model = make(batch, train=False)
    shorter = batch.drop().replace(complete=None)
    keep = {m: int(v.sum(1).max()) for m, v in batch.valid.items()}
    cut = MultimodalBatch(
        {m: x[:, : keep[m]] for m, x in shorter.features.items()},
        shorter.present,
        valid={m: v[:, : keep[m]] for m, v in shorter.valid.items()},
    )
    torch.testing.assert_close(model(cut).logits, model(batch).logits)


def test_a_sample_of_nothing_and_images():
    shapes = {"image": (1, 4, 3), "sound": (5, 2)}
    batch = MultimodalBatch(
        {m: torch.randn(3, *s) for m, s in shapes.items()}, torch.ones(3, 2, dtype=torch.bool), torch.randn(3)
    )
    valid = {"image": torch.ones(3, 4, dtype=torch.bool), "sound": torch.zeros(3, 5, dtype=torch.bool)}
    batch = batch.replace(valid=valid, observed={})
    model = make(batch)
    assert all(loss.isfinite() for loss in model(batch).losses.values())
    assert model.eval()(batch).logits.isfinite().all()


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_the_layer_has_lnlns_parameters():
    assert sum(p.numel() for p in TransformerLayer(128, 8, 64).parameters()) == 296_320


@pytest.mark.slow
def test_parameters_with_bert_base():
    """Table 8 says 114 M with BERT; 112 M as printed, 114.0 M with LNLN's encoders. No weights are made."""
    transformers = pytest.importorskip("transformers", reason="BERT's configuration is in transformers")
    shapes = {"language": (50,), "audio": (375, 5), "vision": (500, 20)}
    count = lambda part: sum(p.numel() for p in part.parameters())
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
        assert count(bert) == 109_482_240
        models = {r: DEAR(bert, reading=r, feature_shapes=shapes) for r in READINGS}
    assert count(models["paper"]) == 111_664_570
    assert count(models["table8"]) == 114_043_784
    assert 4.0e6 < count(models["table8"]) - count(bert) < 5.0e6
    parts = {name: count(part) for name, part in models["table8"].named_children()}
    assert parts["encoder"] == 2_004_352 + 593_664  # LNLN's three and two more layers for text
    assert parts["hdcr"] == 1_780_992
    assert parts["difficulty"] == 49_667


# --- text -------------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A text encoder in small: embeddings, and every token sees the mean of the attended ones."""

    def __init__(self, vocabulary=20, width=4, longest=6, says=True):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(0.5)
        if says:
            self.config = SimpleNamespace(vocab_size=vocabulary, hidden_size=width, max_position_embeddings=longest)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        weight = attention_mask[..., None].to(x)
        seen = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return SimpleNamespace(last_hidden_state=self.dropout(x + seen))


def texts(n=6, longest=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n,), generator=g)  # an empty text is its two ends
    lengths[0] = 2
    ids = torch.randint(5, 20, (n, longest), generator=g)
    valid = torch.arange(longest) < lengths[:, None]
    ids[:, 0] = 2
    ids[torch.arange(n), lengths - 1] = 3
    batch = MultimodalBatch(
        {"language": torch.where(valid, ids, 0), "audio": torch.randn(n, 2, 5, generator=g)},
        torch.ones(n, 2, dtype=torch.bool),
        torch.randn(n, generator=g),
        {"language": valid},
        ids=torch.arange(n),
        fill={"language": 1},
    )
    return MultimodalDataset(batch)


def test_text_is_read_with_unknown_words_in_place_of_dropped_ones():
    data = texts()
    encoder = Reader()
    model = make(data.data, text_encoder=encoder).eval()
    for p in encoder.parameters():
        nn.init.normal_(p)
    masked = data.drop(observed={"language": torch.zeros(6, 6, dtype=torch.bool)}, keep_complete=True).data
    inner = masked.features["language"][:, 1:-1]
    assert (masked.features["language"][:, 0] == 2).all()  # the ends stay
    assert (inner[data.data.valid["language"][:, 2:]] == 1).all()
    seen = []
    encoder.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(masked)
    torch.testing.assert_close(seen[0]["input_ids"], masked.features["language"])
    torch.testing.assert_close(seen[0]["attention_mask"].bool(), data.data.valid["language"])  # unknowns are attended
    # It is the model on the encoder's tokens.
    stored = masked.replace(
        features={
            "language": encoder(masked.features["language"], data.data.valid["language"].long()).last_hidden_state,
            "audio": masked.features["audio"],
        },
        fill={},
        complete=None,
        observed={},
    )
    twin = DEAR(feature_shapes={"language": (6, 4), "audio": (2, 5)}, **SMALL).eval()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("text_encoder")})
    torch.testing.assert_close(twin(stored).logits, model(masked).logits)


def test_text_encoder_is_fine_tuned_or_frozen():
    data = texts()
    masked = data.drop(observed={"language": torch.rand(6, 6) < 0.5}, keep_complete=True).data
    model = make(masked, text_encoder=Reader())
    sum(model(masked).losses.values()).backward()
    assert model.text_encoder.table.weight.grad.any()
    assert model.text_encoder.training
    model = make(masked, text_encoder=Reader(), freeze_text=True)
    assert not model.text_encoder.training
    sum(model(masked).losses.values()).backward()
    assert model.text_encoder.table.weight.grad is None
    assert model.train().training


def test_bad_texts_and_encoders():
    data = texts()
    shapes = {"language": (6,), "audio": (2, 5)}
    with pytest.raises(ValueError, match="text_encoder: expected one for the token ids"):
        DEAR.for_data(data, **SMALL)
    with pytest.raises(ValueError, match="text_encoder: none of"):
        DEAR(Reader(), feature_shapes={"a": (2, 3), "b": (2, 3)})
    with pytest.raises(ValueError, match="expected at most 5 tokens, which the text encoder reads, got 6"):
        DEAR.for_data(data, Reader(longest=5), **SMALL)
    with pytest.raises(ValueError, match=r"expected ids in \[0, 10\), the text encoder's vocabulary"):
        DEAR.for_data(data, Reader(vocabulary=10), **SMALL)
    with pytest.raises(ValueError, match="text_width: the text encoder's config says no hidden_size"):
        DEAR(Reader(says=False), feature_shapes=shapes)
    silent = DEAR(Reader(says=False), feature_shapes=shapes, text_width=4, **SMALL)
    assert silent.eval()(data.data).logits.shape == (6, 1)
    with pytest.raises(ValueError, match="text_encoder: expected tokens .*see text_width"):
        DEAR(Reader(says=False), feature_shapes=shapes, text_width=5, **SMALL)(data.data)
    model = DEAR.for_data(data, Reader(), **SMALL)
    bad = data.data.replace(features={**data.data.features, "language": data.data.features["language"] + 15})
    for part in (model.train(), model.eval()):
        with pytest.raises(ValueError, match=r"expected ids in \[0, 20\)"):
            part(bad)
    with pytest.raises(ValueError, match=r"expected ids in \[0, 20\)"):
        model.train()(data.data.replace(complete=bad))
    with pytest.raises(ValueError, match=r"expected ids in \[0, 20\)"):
        fit(model, MultimodalDataset(bad), None, TrainConfig(epochs=1, select="last", device="cpu"))


# --- in use -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reading", list(READINGS))
def test_it_learns_and_comes_back_from_disk(reading, tmp_path):
    g = torch.Generator().manual_seed(0)
    score = torch.randn(96, generator=g)
    ramp = torch.tensor([1.0, 0.0, 0.0])  # beside constants: Eq. 5's normalisation hides what all features share
    noisy = lambda T, D: score[:, None, None] * ramp + ramp.flip(0) + 0.3 * torch.randn(96, T, D, generator=g)
    data = MultimodalDataset.from_arrays({"text": noisy(4, 3), "audio": noisy(2, 3)}, score)
    plan = MissingPlan("lnln", seed=1, resample=True)
    with random_state(0):
        model = DEAR.for_data(data, reading=reading, **{**SMALL, "width": 16, "hidden": 16})
    assert model.query == "text"
    config = TrainConfig(
        epochs=15, batch_size=16, lr=1e-2, device="cpu", optimizer="adamw", schedule="linear-warmup-cosine"
    )
    history = fit(model, data, data, config, train_plan=plan)
    assert {"train_task", "train_aux", "train_unimodal", "train_joint", "train_calibration"} <= set(history.epochs[0])
    assert history.epochs[-1]["valid_mae"] < 0.75 * history.epochs[0]["valid_mae"]
    save(model, tmp_path / "dear.pt")
    with random_state(1):
        again = DEAR.for_data(data, reading=reading, **{**SMALL, "width": 16, "hidden": 16})
    load(again, tmp_path / "dear.pt")
    present = torch.rand(96, 2, generator=g) < 0.5
    torch.testing.assert_close(predict(again, data, present=present), predict(model, data, present=present))


def test_diagnosis_of_a_data_set():
    batch = make_batch(n=7, natural=True)
    model = make(batch, train=False)
    whole, parts = model.diagnose(MultimodalDataset(batch)), model.diagnose(batch, batch_size=2)
    for a, b in zip(whole[:9], parts[:9], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    for m in model.modalities:
        torch.testing.assert_close(whole.original[m], parts.original[m])
        assert whole.original[m].shape == whole.reconstructed[m].shape == (7, 6)
    assert torch.equal(whole.error.isnan(), ~batch.complete.present)
    # The training loss is a distance between just these vectors.
    model.train()
    there = batch.complete.present
    each = sum(
        mmd(whole.original[m][k], whole.reconstructed[m][k]) for m, k in zip(model.modalities, there.T, strict=True)
    )
    torch.testing.assert_close(0.3 * each, model(batch).losses["unimodal"])


def test_running_variance_scales_the_diagnosis():
    batch = make_batch()
    plain, scaled = make(batch), make(batch, error_scale="variance")
    scaled(batch)
    assert (scaled.variance != 1).all()
    torch.testing.assert_close(scaled.diagnose(batch).error, plain.diagnose(batch).error / scaled.variance)
    before = scaled.variance.clone()
    none = batch.complete.replace(present=torch.zeros(6, 3, dtype=torch.bool), observed={})
    scaled(batch.replace(complete=none))
    torch.testing.assert_close(scaled.variance, before)  # nothing seen, nothing learnt


@pytest.mark.slow
def test_one_sample_identical_samples_and_a_constant_prediction():
    batch = make_batch(n=1)
    model = make(batch)
    losses = model(batch).losses
    assert losses["unimodal"] == losses["joint"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    same = make_batch(n=1, drop=False)[[0, 0, 0, 0]]
    for alignment in ("mmd", "sinkhorn", "mse"):
        model = make(same, alignment=alignment)
        sum(model(same).losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    batch = make_batch()
    model = make(batch, train=False)
    for name, p in model.named_parameters():
        if name.startswith(("unimodal", "synergistic")):
            nn.init.zeros_(p)
    constant = model(batch).logits[:, 0]
    assert constant.unique().numel() == 1
    assert math.isnan(msa_scores(constant.detach().numpy(), batch.target.numpy())["corr"])  # undefined, and said so


def test_nan_is_found():
    batch = make_batch(dtype=torch.float32)
    batch.features["audio"][2, 0] = float("nan")
    assert batch.valid["audio"][2, 0]
    model = make(batch)
    assert model(batch).losses["task"].isnan()
    with pytest.raises(FloatingPointError, match="task"):
        fit(model, MultimodalDataset(batch), None, TrainConfig(epochs=1, select="last", device="cpu"))
    model = make(batch, train=False)
    for look in (model, model.diagnose):
        with pytest.raises(ValueError, match=r"the predictions of 1 samples are NaN or infinite, the first at \[2\]"):
            look(batch)


@pytest.mark.slow
@pytest.mark.parametrize("alignment", ["mmd", "sinkhorn", "mse"])
def test_mixed_precision_and_compilation(alignment):
    batch = make_batch(dtype=torch.float32)
    model = make(batch, alignment=alignment)
    expected = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch)
    for name, value in expected.losses.items():
        assert low.losses[name].item() == pytest.approx(value.item(), rel=0.2, abs=0.05), name
    compiled = torch.compile(lambda e: model.reconstruct(e), fullgraph=True, backend="eager")
    encoded = model.encode(batch)
    for m, (hidden, _) in compiled(encoded).items():
        torch.testing.assert_close(hidden, model.reconstruct(encoded)[m][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_shapes": {"a": (2, 3)}}, "feature_shapes: expected at least two modalities"),
        ({"outputs": 2}, "outputs: expected 1 for regression"),
        ({"query": "touch"}, "query: unknown modalities"),
        ({"tau": 0.0}, "tau: expected a number above 0"),
        ({"epsilon": -1.0}, "epsilon: expected a number above 0"),
        ({"lambda1": -0.1}, "lambda1: expected a number"),
        ({"beta": float("nan")}, "beta: expected a number"),
        ({"layers": 0}, "layers: expected an integer"),
        ({"text_layers": -1}, "text_layers: expected an integer"),
        ({"dropout": 1.0}, "dropout: expected a number in"),
        ({"bandwidths": (0.0,)}, r"bandwidths\[0\]: expected None or a number above 0"),
        ({"space": "raw", "encoder": "tokens"}, "space: 'raw' features have a frame each"),
        ({"space": "raw", "samples": "tokens"}, "samples: expected 'mean'"),
        ({"reading": "wild"}, "reading: expected \'.* or \'"),
        ({"lambda3": 1.0}, "options: unknown"),
        *(
            ({name: "wild"}, f"{name}: expected ")
            for name in (
                "encoder", "space", "alignment", "samples", "joint_sum", "norm", "stream_input", "fusion", "k_scale",
                "streams", "main", "aux", "error", "error_scale",
            )
        ),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DEAR(**{"feature_shapes": {"a": (2, 3), "b": (1, 2)}, **options})


def test_bad_batches():
    batch = make_batch()
    model = make(batch)
    with pytest.raises(ValueError, match="batch: expected the modalities"):
        model(batch.select(["audio", "language"]))
    wide = make_batch(shapes={"language": (4, 3), "audio": (2, 5), "vision": (3, 4)})
    with pytest.raises(ValueError, match=r"features\['vision'\]: expected float samples of shape \(3, 2\)"):
        model(wide)
    long = make_batch(shapes={"language": (9, 3), "audio": (2, 5), "vision": (3, 2)})
    with pytest.raises(ValueError, match=r"features\['language'\]: expected float samples"):
        model(long)
    with pytest.raises(ValueError, match=r"target: expected float scores \[B\]"):
        model(batch.replace(target=torch.zeros(6, dtype=torch.int64)))
    dialogue = MultimodalBatch({m: x[None] for m, x in batch.features.items()}, batch.present[None])
    with pytest.raises(ValueError, match="expected samples"):
        model(dialogue)


def test_configuration_is_frozen_and_reported():
    config = DEARConfig(feature_shapes={"a": (1, 2), "b": (1, 2)})
    assert (config.lambda1, config.lambda2, config.alpha, config.beta, config.layers) == (0.3, 0.7, 0.8, 0.3, 2)
    assert replace(config, tau=2.0).tau == 2.0
    with pytest.raises(AttributeError):
        config.tau = 3.0
