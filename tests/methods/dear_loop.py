"""DEAR's equations as loops over samples and frames that import nothing under test but the model to be compared."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mmlib import DEAR
from mmlib.batch import MultimodalBatch
from mmlib.losses import sinkhorn
from mmlib.methods.released.dear import OtherDEARConfig

SHAPES = {"language": (4, 3), "audio": (2, 5), "vision": (3, 2), "touch": (1, 4)}
SMALL = {"width": 6, "heads": 2, "head_width": 3, "hidden": 5}


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
        usual = {field.name: field.default for field in fields(OtherDEARConfig)}
        self.c = SimpleNamespace(**{**usual, **vars(model.config)})
        self.names, self.query = model.modalities, model.query
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
            rep = self.repair(h)
            for m in self.names:
                where = self.frames(batch, m, b)
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
                norms = [one.sum() for one in squares]  # of a frame
                self.error[b, i] = {
                    "token_norm": np.mean(norms),
                    "mean": np.mean(squares),
                    "sum": np.sum(norms),
                }[c.error]
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
        text = next((known for known in ("language", "text") if known in self.names), None)
        deep = m == (text or self.query) and self.c.encoder == "tokens" and self.c.text_layers > 0
        name = f"encoder.{m}.first" if deep else f"encoder.{m}"
        if self.c.encoder == "tokens":
            count = 8
            h = {i: self.p[f"{name}.tokens"][i] for i in range(count)}
            h |= {count + t: self.project(name, m == text, v) for t, v in x.items()}
            h = self.transformer(f"{name}.transformer", h, 2)
            h = {i: h[i] for i in range(count)}
        else:
            h = {t: self.project(name, m == text, v) for t, v in x.items()}
        return self.transformer(f"encoder.{m}.rest", h, self.c.text_layers) if deep else h

    def project(self, name, is_text, v):
        """phi: all but the text normalised, or all, or none; a frame of one value is not."""
        normed = {"others": not is_text, "all": True, "none": False}[self.c.normed] and len(v) > 1
        return self.linear(f"{name}.project", self.normed(f"{name}.norm", v) if normed else v)

    def repair(self, h):
        """HDCR: a Transformer for each modality, or one in which the frames of all attend to one another."""
        if self.c.hdcr == "each":
            return {m: self.transformer(f"hdcr.{m}", h[m], self.c.layers) for m in self.names}
        x = {(m, t): v + self.p[f"hdcr.{m}.position"][t] for m in self.names for t, v in h[m].items()}
        for i in range(self.c.layers):
            x = self.layer(f"across.{i}", x)
        return {m: {t: x[m, t] for t in h[m]} for m in self.names}

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
            return sinkhorn(torch.tensor(x), torch.tensor(y)).item()
        z = np.concatenate([x, y])
        total = sum(((p - q) ** 2).sum() for p in z for q in z) / (len(z) * (len(z) - 1))
        scales = [total * f for f in (0.25, 0.5, 1, 2, 4)]
        k = lambda A, B: np.mean([[sum(math.exp(-((p - q) ** 2).sum() / s) for s in scales) for q in B] for p in A])
        return k(x, x) + k(y, y) - 2 * k(x, y)


def compare(natural=False, **options):
    """A model's logits, losses and diagnosis of a batch are those of the loop."""
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
