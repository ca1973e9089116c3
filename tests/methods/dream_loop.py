"""DREAM's equations as NumPy loops over samples and subsets, without the library's own functions."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mmlib import DREAM, MultimodalBatch
from mmlib.backbones import Backbone

# What the paper leaves open, as `DREAM` takes it; the options of its subclass say otherwise.
LEFT_OPEN = {
    "discretize": "sign_ge",
    "empty": "forward",
    "tie_enhance": True,
    "enhance_order": "parallel",
    "concat": "time",
    "keys": "all",
    "affine": False,
    "mask_mode": "mul",
    "pas_target": "softmax",
    "distill_on": "w",
}
SHAPES = {"a": (4, 3), "b": (2, 5), "c": (3, 2), "d": (1, 4)}


class Toy(Backbone):
    """An evaluator that NumPy can follow: per modality tanh(mean over valid frames @ W + b), summed."""

    def __init__(self, shapes, outputs, labels=0, seed=0):
        super().__init__(encode_absent=True)
        g = torch.Generator().manual_seed(seed)
        self.labels = labels
        for m, (_, D) in shapes.items():
            self.encoders[m] = nn.Linear(D, outputs)
            with torch.no_grad():
                self.encoders[m].weight.copy_(torch.randn(outputs, D, generator=g) * 2)
                self.encoders[m].bias.copy_(torch.randn(outputs, generator=g))

    def encode_modality(self, name, x, valid):
        kept = torch.where(valid[..., None], x, 0).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)
        return torch.where(valid.any(-1)[:, None], torch.tanh(self.encoders[name](kept)), 0)

    def fuse(self, h, present, batch):
        return sum(h.values())

    def decode(self, z):
        return z.unflatten(-1, (self.labels, 2)).transpose(-1, -2) if self.labels else z


def make_batch(M=3, n=7, kind="classes", seed=0, ragged=True, equal=False):
    """Samples that miss modalities and frames; "ragged" ones have padding, and sequences without a frame."""
    g = torch.Generator().manual_seed(seed)
    shapes = {m: (4 if equal else T, D) for m, (T, D) in list(SHAPES.items())[:M]}
    valid = {}
    for m, (T, _) in shapes.items():
        lengths = torch.randint(0 if ragged else T, T + 1, (n,), generator=g)
        valid[m] = torch.arange(T) < lengths[:, None]
    features = {
        m: torch.where(valid[m][..., None], torch.randn(n, *s, generator=g, dtype=torch.float64), 0)
        for m, s in shapes.items()
    }
    if kind == "classes":
        target = torch.randint(0, 3, (n,), generator=g)
    elif kind == "labels":
        target = torch.randint(0, 2, (n, 4), generator=g)
    else:
        target = torch.randn(n, generator=g, dtype=torch.float64)
    present = torch.rand(n, M, generator=g) < 0.7
    batch = MultimodalBatch(
        features,
        torch.stack([v.any(-1) for v in valid.values()], -1),
        target,
        valid,
        ids=torch.arange(50, 50 + n),
    )
    return batch.drop(present=present)


KINDS = {"classes": (3, 0), "labels": (8, 4), "scores": (1, 0)}


def make_dream(batch, kind="classes", seed=0, evaluator=None, **options):
    outputs, labels = KINDS[kind]
    shapes = {m: tuple(x.shape[1:]) for m, x in batch.features.items()}
    evaluator = evaluator or Toy(shapes, outputs, labels, seed).to(batch.features["a"].dtype).eval()
    torch.manual_seed(seed)
    sizes = {"width": 8, "heads": 2, "dropout": 0.0, "positions": 6, "weight_hidden": 5}
    model = DREAM(
        evaluator,
        feature_shapes=shapes,
        outputs=outputs,
        labels=labels,
        regression=kind == "scores",
        **{**sizes, **options},
    ).to(batch.features["a"].dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("evaluator"):
                p.normal_(std=0.7)
    return model.train()


class Reference:
    """Sections 3.3 to 3.5, one sample, one subset and one attention head at a time."""

    def __init__(self, model, batch, majority=None):
        self.c = SimpleNamespace(**{**LEFT_OPEN, **vars(model.config)})
        self.p = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
        self.names = list(batch.modalities)
        self.x = {m: v.double().numpy() for m, v in batch.features.items()}
        self.valid = {m: v.numpy() for m, v in batch.valid.items()}
        self.y = batch.target.numpy()
        self.n, self.M, self.majority = len(batch), len(self.names), majority

    # 3.3

    def prediction(self, i, S):
        c = self.c
        if not S and c.empty == "majority":
            return self.majority
        z = 0
        for m in self.names:
            kept = [self.x[m][i, t] if m in S else 0 * self.x[m][i, t] for t in np.flatnonzero(self.valid[m][i])]
            if kept:
                w, b = self.p[f"evaluator.encoders.{m}.weight"], self.p[f"evaluator.encoders.{m}.bias"]
                z = z + np.tanh(w @ np.mean(kept, 0) + b)
        z = z + np.zeros(c.outputs)
        if c.labels:
            return tuple(int(z[2 * e + 1] > z[2 * e]) for e in range(c.labels))
        return (int(np.argmax(z)),) if not c.regression else (self.cut(z[0]),)

    def cut(self, score):
        if self.c.discretize == "round7":
            return int(np.round(np.clip(score, -3, 3)))
        return int(score >= 0) if self.c.discretize == "sign_ge" else int(score > 0)

    def truth(self, i):
        if self.c.labels:
            return tuple(int(v) for v in self.y[i])
        return (self.cut(self.y[i]),) if self.c.regression else (int(self.y[i]),)

    def shapley(self, marginal):
        phi = np.zeros(self.M)
        for k, m in enumerate(self.names):
            rest = [o for o in self.names if o != m]
            for size in range(self.M):
                weight = math.factorial(size) * math.factorial(self.M - size - 1) / math.factorial(self.M)
                phi[k] += weight * sum(marginal(S, m) for S in itertools.combinations(rest, size))
        return phi

    def scores(self, i):
        value = lambda S: len(S) * (self.prediction(i, S) == self.truth(i))
        pss = self.shapley(lambda S, m: float(self.prediction(i, (*S, m)) != self.prediction(i, S)))
        return pss, self.shapley(lambda S, m: float(value((*S, m)) - value(S)))

    # 3.4

    def norm(self, x, key=None):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y if key is None else y * self.p[f"{key}.weight"] + self.p[f"{key}.bias"]

    def attend(self, key, q, parts, masks):
        d, by_feature = self.c.width, self.c.concat == "feature"
        q = self.norm(q, f"{key}.norm")
        parts = [self.norm(z, f"{key}.norm") for z in parts]
        z = np.concatenate(parts, 1 if by_feature else 0)
        keep = np.any(masks, 0) if by_feature else np.concatenate(masks)
        a, b = f"{key}.attention", self.p[f"{key}.attention.in_proj_bias"]
        if f"{a}.in_proj_weight" in self.p:
            w = self.p[f"{a}.in_proj_weight"].reshape(3, d, d)
        else:
            w = [self.p[f"{a}.{k}_proj_weight"] for k in "qkv"]
        Q, K, V = (s @ w[j].T + b[j * d : (j + 1) * d] for j, s in enumerate((q, z, z)))
        out, each = np.zeros((len(q), d)), d // self.c.heads
        for head in range(self.c.heads):
            cols = slice(head * each, (head + 1) * each)
            for t in range(len(q)):
                score = np.exp(K[:, cols] @ Q[t, cols] / np.sqrt(each)) * keep
                out[t, cols] = score @ V[:, cols] / score.sum()
        return out @ self.p[f"{a}.out_proj.weight"].T + self.p[f"{a}.out_proj.bias"]

    def block(self, key, t, x, valid):
        others = [m for m in self.names if m != t]
        total = x[t] + self.attend(
            f"{key}.{t}.whole", x[t], [x[t], *(x[m] for m in others)], [valid[t], *(valid[m] for m in others)]
        )
        for m in others:
            total = total + self.attend(f"{key}.{t}.partial.{m}", x[t], [x[t], x[m]], [valid[t], valid[m]])
        return self.norm(total, f"{key}.{t}.norm" if self.c.affine else None)

    def enhanced(self, x, valid, pss):
        c = self.c
        for r in range(c.repeats if c.enhance != "none" else 0):
            after = dict(x)
            for k, t in enumerate(self.names):
                if c.enhance == "all" or pss[k] == 0:
                    source = x if c.enhance_order == "parallel" else after
                    keys = {m: v & (c.keys == "all" or m == t or pss[j] > 0) for j, (m, v) in enumerate(valid.items())}
                    after[t] = self.block(f"enhancement.{0 if c.tie_enhance else r}", t, source, keys)
            x = after
        return x

    # 3.5

    def run(self):
        c, softmax = self.c, lambda v: np.exp(v - v.max()) / np.exp(v - v.max()).sum()
        logits, weights, tasks, kls, PSS, PAS = [], [], [], [], [], []
        for i in range(self.n):
            pss, pas = self.scores(i)
            PSS.append(pss)
            PAS.append(pas)
            x, valid = {}, {}
            for m in self.names:
                valid[m] = self.valid[m][i] if self.valid[m][i].any() else np.ones_like(self.valid[m][i])
                kept = self.x[m][i] * self.valid[m][i][:, None]
                x[m] = kept @ self.p[f"project.{m}.weight"][:, :, 0].T + self.p["position"][: len(kept)]
            x = self.enhanced(x, valid, pss)
            h = [self.block("fusion", m, x, valid)[valid[m]].mean(0) for m in self.names]
            w = np.concatenate(h) @ self.p["weigh.0.weight"].T + self.p["weigh.0.bias"]
            if c.weight_hidden is not None:
                w = np.maximum(w, 0) @ self.p["weigh.3.weight"].T + self.p["weigh.3.bias"]
            masked = w
            if c.masked_fusion:
                masked = w * (pss + 1) if c.mask_mode == "mul" else w + np.log(pss + 1)
            weights.append(softmax(masked))
            H = sum(a * b for a, b in zip(softmax(masked), h, strict=True))
            z = H @ self.p["out.weight"].T + self.p["out.bias"]
            logits.append(z)
            cross = lambda z, k: math.log(np.exp(z).sum()) - z[k]
            if c.regression:
                tasks.append(abs(z[0] - self.y[i]))
            elif c.labels:
                tasks.append(np.mean([cross(z[2 * e : 2 * e + 2], self.y[i][e]) for e in range(c.labels)]))
            else:
                tasks.append(cross(z, self.y[i]))
            q = softmax(pas)
            if c.pas_target == "clipped":
                kept = np.maximum(pas, 0)
                q = kept / kept.sum() if kept.sum() > 0 else np.full(self.M, 1 / self.M)
            log_p = np.log(softmax(w if c.distill_on == "w" else masked))
            kls.append(sum(a * (math.log(a) - b) for a, b in zip(q, log_p, strict=True) if a > 0))
        self.pss, self.pas = np.array(PSS), np.array(PAS)
        self.logits, self.weights = np.array(logits), np.array(weights)
        self.losses = {"task": np.mean(tasks)}
        if c.lambda_distill and c.masked_fusion:
            self.losses["distillation"] = c.lambda_distill * np.mean(kls)
        return self


def check_against_loop(model, batch, kind="classes", **facts):
    ref = Reference(model, batch, **facts).run()
    found = model.contributions(batch)
    np.testing.assert_allclose(found.pss, ref.pss, atol=1e-6)
    np.testing.assert_allclose(found.pas, ref.pas, atol=1e-6)
    out = model(batch)
    logits = out.logits.detach()
    if kind == "labels":
        assert logits.shape == (len(batch), 2, 4)
        logits = logits.transpose(1, 2).flatten(1)
    np.testing.assert_allclose(logits, ref.logits, atol=1e-6)
    np.testing.assert_allclose(model.weights(batch).detach(), ref.weights, atol=1e-6)
    assert set(out.losses) == set(ref.losses)
    for name, value in ref.losses.items():
        assert out.losses[name].item() == pytest.approx(value, abs=1e-6), name
    return ref


def check_gradients(model, batch):
    """A gradient reaches every parameter but the evaluator's."""
    sum(model(batch).losses.values()).backward()
    for name, p in model.named_parameters():
        if name.startswith("evaluator"):
            assert p.grad is None, name
        elif "in_proj_bias" in name:  # a bias of the keys shifts all scores alike
            d = len(p) // 3
            assert p.grad[:d].abs().sum() > 0, name
            assert p.grad[2 * d :].abs().sum() > 0, name
        else:
            assert p.grad.abs().sum() > 0, name
