"""DREAM against its equations, written here as NumPy loops over samples and subsets that import nothing under test."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmlib import DREAM, MultimodalBatch, MultimodalDataset
from mmlib.backbones import Backbone, EvaluatorConfig, GenericBackbone, MLPEvaluator, SelfMMEvaluator, Table3Evaluator
from mmlib.baselines import JointTraining
from mmlib.coalitions import coalition_masks, prediction_accuracy_score, prediction_shift_score
from mmlib.methods.dream import (
    READINGS,
    DREAMConfig,
    distillation_loss,
    mask_weights,
    permutation_coalitions,
    permutation_scores,
)
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, load, predict, save

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


def _batch(M=3, n=7, kind="classes", seed=0, ragged=True, equal=False):
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


def _dream(batch, kind="classes", seed=0, evaluator=None, **options):
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
        self.c = model.config
        self.p = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
        self.names = list(batch.modalities)
        self.x = {m: v.double().numpy() for m, v in batch.features.items()}
        self.valid = {m: v.numpy() for m, v in batch.valid.items()}
        self.y = batch.target.numpy()
        self.n, self.M, self.majority = len(batch), len(self.names), majority

    # 3.3

    def said(self, i, S):
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
        each = self.c.labels and self.c.iemocap_agg == "mean_per_emotion"
        pss, pas = [], []
        for view in range(self.c.labels) if each else [slice(None)]:
            says = lambda S, view=view: self.said(i, S)[view]
            worth = lambda S, view=view: len(S) * (self.said(i, S)[view] == self.truth(i)[view])
            pss.append(self.shapley(lambda S, m, says=says: float(says((*S, m)) != says(S))))
            pas.append(self.shapley(lambda S, m, worth=worth: float(worth((*S, m)) - worth(S))))
        return np.mean(pss, 0), np.mean(pas, 0)

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
                    after[t] = self.block(f"enhancement.{0 if c.tie_enhance else r}", t, source, valid)
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
            q = softmax(pas / c.temperature)
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


def _close(model, batch, kind="classes", **facts):
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


OPTIONS = [
    {},
    {"reading": "text"},
    {"enhance": "all"},
    {"enhance": "none"},
    {"repeats": 1},
    {"repeats": 3, "tie_enhance": False},
    {"enhance_order": "sequential"},
    {"masked_fusion": False},
    {"mask_mode": "add_log"},
    {"pas_target": "clipped"},
    {"temperature": 0.3},
    {"distill_on": "masked"},
    {"lambda_distill": 0.7},
    {"lambda_distill": 0.0},
    {"max_rows": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_losses_against_the_loop(options):
    batch = _batch()
    ref = _close(_dream(batch, **options), batch)
    assert (ref.pss == 0).any()
    assert (ref.pss > 0).any()


@pytest.mark.parametrize("M", [1, 2, 4])
def test_any_number_of_modalities(M):
    batch = _batch(M, n=5, seed=M)
    _close(_dream(batch), batch)


@pytest.mark.parametrize("options", [{}, {"discretize": "sign_gt"}, {"discretize": "round7"}], ids=str)
def test_scores_are_cut_and_trained_by_l1(options):
    batch = _batch(kind="scores", n=9)
    _close(_dream(batch, "scores", **options), batch)


@pytest.mark.parametrize("agg", ["any", "mean_per_emotion"])
def test_four_yes_or_no_labels(agg):
    batch = _batch(kind="labels")
    _close(_dream(batch, "labels", iemocap_agg=agg), batch, "labels")


def test_keys_side_by_side_need_equal_lengths():
    batch = _batch(equal=True)
    _close(_dream(batch, concat="feature"), batch)
    uneven = _batch()
    with pytest.raises(ValueError, match="equal lengths"):
        _dream(uneven, concat="feature")(uneven)


@pytest.mark.parametrize("kind", ["classes", "labels", "scores"])
def test_the_majority_may_stand_for_the_prediction_from_nothing(kind):
    batch = _batch(kind=kind, n=9)
    model = _dream(batch, kind, empty="majority")
    with pytest.raises(ValueError, match="majority"):
        model(batch)
    model.observe(batch)
    y = batch.target.numpy()
    y = (y >= 0).astype(int) if kind == "scores" else y
    columns = y.reshape(len(y), -1).T
    majority = tuple(int(np.bincount(c).argmax()) for c in columns)
    _close(model, batch, kind, majority=majority)


# --- worked examples -------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """An evaluator that says what a table says of the modalities that are not zero."""

    modalities = ("a", "b", "c")

    def __init__(self, table):
        super().__init__()
        self.register_buffer("said", torch.tensor(table))

    def forward(self, batch):
        code = sum((x.flatten(1) != 0).any(-1).long() << m for m, x in enumerate(batch.features.values()))
        return nn.functional.one_hot(self.said[code], 2).float()


#        {}, a, b, ab, c, ac, bc, abc
WORKED = [
    ([0, 1, 0, 1, 0, 1, 0, 1], (1, 0, 0), (2, 0.5, 0.5)),
    ([0, 1, 0, 1, 1, 1, 0, 1], (5 / 6, 1 / 6, 1 / 3), (11 / 6, 1 / 3, 5 / 6)),
    ([1] * 8, (0, 0, 0), (1, 1, 1)),
]


@pytest.mark.parametrize(("table", "pss", "pas"), WORKED)
def test_the_worked_shapley_examples(table, pss, pas):
    batch = MultimodalBatch(
        {m: torch.ones(1, 2, 1) for m in "abc"}, torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])
    )
    model = DREAM(Table(table).eval(), feature_shapes=dict.fromkeys("abc", (2, 1)), outputs=2, width=8, heads=2)
    found = model.contributions(batch)
    np.testing.assert_allclose(found.pss[0], pss, atol=1e-6)
    np.testing.assert_allclose(found.pas[0], pas, atol=1e-6)
    w = torch.log_softmax(torch.tensor([[0.3, -0.2, 0.1]]), -1)
    q = np.exp(pas) / np.exp(pas).sum()
    assert distillation_loss(w, found.pas).item() == pytest.approx((q * (np.log(q) - w[0].numpy())).sum(), abs=1e-6)


def test_the_worked_fusion_weights():
    w, pss = torch.ones(3), torch.tensor([1, 0, 0.5])
    assert mask_weights(w, pss).tolist() == [2, 1, 1.5]
    found = torch.softmax(mask_weights(w, pss), -1)
    torch.testing.assert_close(found, torch.tensor([0.5065, 0.1863, 0.3072]), atol=5e-5, rtol=0)
    added = torch.softmax(mask_weights(w, pss, "add_log"), -1)
    torch.testing.assert_close(added, torch.tensor([2, 1, 1.5]) / 4.5)
    with pytest.raises(ValueError, match="mul"):
        mask_weights(w, pss, "none")


def test_the_printed_mask_is_not_monotone():
    low = torch.softmax(mask_weights(torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 0.0])), -1)
    high = torch.softmax(mask_weights(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0])), -1)
    assert high[0] < low[0]
    high = torch.softmax(mask_weights(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0]), "add_log"), -1)
    assert high[0] > low[0]


def test_clipped_pas():
    w = torch.zeros(2, 3)
    pas = torch.tensor([[-1.0, 3.0, 1.0], [-1.0, 0.0, -2.0]])
    expected = (0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3)) / 2  # the second row is uniform, as w is
    assert distillation_loss(w, pas, "clipped").item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="clipped"):
        distillation_loss(w, pas, "hard")


# --- Table 3 ---------------------------------------------------------------------------------------------------------

DATASETS = {"mosi": (5, 20, 1, 0), "mosei": (74, 35, 1, 0), "iemocap": (74, 35, 8, 4)}


def _count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "expected"), [("mosi", 3_054_116), ("mosei", 3_070_916), ("iemocap", 3_072_323)])
def test_the_parameters_of_table_3(name, expected):
    audio, vision, outputs, labels = DATASETS[name]
    shapes = {"language": (50, 300), "audio": (50, audio), "vision": (50, vision)}
    evaluator = Table3Evaluator(EvaluatorConfig(shapes, outputs, labels)).eval()
    model = DREAM(evaluator, feature_shapes=shapes, outputs=outputs, labels=labels, regression=outputs == 1)
    assert _count(model) == expected
    assert _count(model.evaluator) == 0
    parts = {
        "project": 200 * (300 + audio + vision),
        "position": 50 * 200,
        "enhancement": 9 * (160_800 + 400),
        "fusion": 9 * (160_800 + 400),
        "weigh": 77_315,
        "out": 201 * outputs,
    }
    assert sum(parts.values()) == expected
    for part, count in parts.items():
        found = getattr(model, part)
        assert (found.numel() if isinstance(found, nn.Parameter) else _count(found)) == count, part
    attention = model.fusion["language"].whole
    assert _count(attention.attention) == 160_800
    text = DREAM(evaluator, reading="text", feature_shapes=shapes, outputs=outputs, labels=labels)
    assert _count(text) == expected - 77_315 + 600 * 3 + 3 + 6 * 400


# --- what DREAM may know ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_presence_is_not_read(training):
    batch = _batch(n=8)
    model = _dream(batch).train(training)
    g = torch.Generator().manual_seed(1)
    rows = torch.randperm(8, generator=g)
    noise = {m: torch.rand(v.shape, generator=g) < 0.5 for m, v in batch.observed.items()}
    other = batch.replace(present=batch.present[rows], observed=noise)
    for changed in (other, batch.replace(present=torch.zeros_like(batch.present))):
        a, b = model(batch), model(changed)
        assert torch.equal(a.logits, b.logits)
        assert a.losses.keys() == b.losses.keys()
        assert all(torch.equal(a.losses[k], b.losses[k]) for k in a.losses)
        assert torch.equal(model.contributions(batch).pss, model.contributions(changed).pss)


def test_padding_is_not_read():
    batch = _batch(n=6)
    model = _dream(batch).eval()
    junk = {m: torch.where(batch.valid[m][..., None], x, torch.nan) for m, x in batch.features.items()}
    assert torch.equal(model(batch.replace(features=junk)).logits, model(batch).logits)


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), M=st.integers(1, 4))
def test_a_missing_modality_never_shifts_the_prediction(seed, M):
    """It emerges: a missing modality is zeros, and leaving zeros out changes nothing."""
    batch = _batch(M, n=6, seed=seed)
    found = _dream(batch, seed=seed).contributions(batch)
    assert (found.pss[~batch.present] == 0).all()
    assert ((found.pss >= 0) & (found.pss <= 1 + 1e-6)).all()
    right = found.pas.sum(-1)  # M where everything together is right, 0 where it is wrong
    assert torch.isclose(right, torch.where(right > M / 2, float(M), 0.0), atol=1e-5).all()


def test_the_majority_breaks_that():
    """What the data lack is not a dummy any more where the prediction from nothing is another than that from zeros."""
    batch = _batch(n=30, seed=3)
    model = _dream(batch, empty="majority")
    model.majority.fill_((int(model.evaluator(batch[:1].drop(present=torch.zeros(3).bool())).argmax()) + 1) % 3)
    assert (model.contributions(batch).pss[~batch.present] > 0).any()


def test_samples_without_anything():
    batch = _batch(n=4).drop(present=torch.zeros(3, dtype=torch.bool))
    model = _dream(batch)
    assert (model.contributions(batch).pss == 0).all()
    out = model(batch)
    sum(out.losses.values()).backward()
    assert torch.isfinite(out.logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    never = {m: torch.zeros_like(v) for m, v in batch.valid.items()}
    bare = MultimodalBatch(batch.features, batch.present, batch.target, never, ids=batch.ids)
    assert torch.isfinite(model(bare).logits).all()


def test_one_sample():
    batch = _batch(n=5)
    model = _dream(batch)
    alone = [model(batch[i]) for i in range(5)]
    torch.testing.assert_close(torch.cat([o.logits for o in alone]), model(batch).logits)
    loss = torch.stack([sum(o.losses.values()) for o in alone]).mean()
    torch.testing.assert_close(loss, sum(model(batch).losses.values()))


def test_images_and_vectors():
    g = torch.Generator().manual_seed(0)
    data = MultimodalDataset.from_arrays(
        {"image": torch.randn(6, 2, 5, 4, generator=g), "vector": torch.randn(6, 3, generator=g)},
        torch.arange(6) % 3,
    )
    model = DREAM.for_data(MLPEvaluator.for_data(data).eval(), data, width=8, heads=2)
    assert model.config.positions == 50
    assert model.project["image"].in_channels == 8  # 2 channels x 4 columns, rows are frames
    assert model(data.data).losses.keys() == {"task", "distillation"}
    long = DREAM.for_data(model.evaluator, data, width=8, heads=2, positions=5)
    taller = data.data.replace(features={**data.data.features, "image": torch.randn(6, 2, 7, 4)}, valid={}, observed={})
    with pytest.raises(ValueError, match="at most 5 frames"):
        long(taller)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie_enhance": False}, {"reading": "text"}, {"concat": "feature"}], ids=str)
def test_gradient_reaches_every_parameter_but_the_evaluator(options):
    batch = _batch(n=12, ragged=False, equal=True)
    model = _dream(batch, **{"enhance": "all", **options})
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


@pytest.mark.slow
def test_each_loss_term_does_its_own():
    batch = _batch(n=12)
    model = _dream(batch)
    grads = {}
    for term in ("task", "distillation"):
        model.zero_grad()
        model(batch).losses[term].backward()
        grads[term] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "out.weight" in grads["task"]
    assert "out.weight" not in grads["distillation"]  # Eq. 12 is about w alone
    assert "weigh.3.weight" in grads["distillation"]
    before = model(batch).losses["distillation"].item()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        model(batch).losses["distillation"].backward()
        optimiser.step()
    assert model(batch).losses["distillation"].item() < before / 3


def test_masks_only_touch_what_contributes_nothing():
    """A sample with PSS > 0 everywhere goes past the enhancement."""
    batch = _batch(n=40, ragged=False)
    model = _dream(batch).eval()
    pss = model.contributions(batch).pss
    whole = (pss > 0).all(-1)
    assert whole.any()
    before = model(batch).logits
    with torch.no_grad():
        for p in model.enhancement.parameters():
            p.add_(1)
    after = model(batch).logits
    torch.testing.assert_close(before[whole], after[whole], rtol=0, atol=1e-12)
    assert (before[~whole] != after[~whole]).any(-1).all()


# --- the evaluator ---------------------------------------------------------------------------------------------------


def test_the_evaluator_stays_frozen_and_in_eval_mode():
    batch = _batch()
    model = _dream(batch)
    assert model.training
    assert not any(part.training for part in model.evaluator.modules())
    assert not any(p.requires_grad for p in model.evaluator.parameters())
    model.eval().train()
    assert not model.evaluator.training
    before = copy.deepcopy(model.evaluator.state_dict())
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    sum(model(batch).losses.values()).backward()
    optimiser.step()
    assert all(torch.equal(before[k], v) for k, v in model.evaluator.state_dict().items())


def test_dropout_and_batch_statistics_of_an_evaluator_do_not_matter():
    data = MultimodalDataset(_float(_batch(n=10)))
    evaluator = GenericBackbone.for_data(data, width=8, dropout=0.5).eval()
    model = _dream(data.data, evaluator=evaluator)
    assert torch.equal(model.contributions(data.data).pas, model.contributions(data.data).pas)


def _float(batch):
    y = batch.target.float() if batch.target.is_floating_point() else batch.target
    return batch.replace(features={m: x.float() for m, x in batch.features.items()}, target=y)


def test_evaluators_that_do_not_fit():
    batch = _batch()
    shapes = {m: tuple(x.shape[1:]) for m, x in batch.features.items()}
    good = Toy(shapes, 3).double()
    with pytest.raises(ValueError, match="train mode"):
        _dream(batch, evaluator=good.train())
    part = good.eval()
    part.encoders["b"].train()
    with pytest.raises(ValueError, match="train mode"):
        _dream(batch, evaluator=part)
    fewer = Toy({m: shapes[m] for m in "ab"}, 3).eval()
    with pytest.raises(ValueError, match=r"modalities \['a', 'b', 'c'\], got \['a', 'b'\]"):
        _dream(batch, evaluator=fewer)
    swapped = Toy({m: shapes[m] for m in "bac"}, 3).eval()
    with pytest.raises(ValueError, match="evaluator"):
        _dream(batch, evaluator=swapped)
    with pytest.raises(ValueError, match=r"pass its \.backbone"):
        _dream(batch, evaluator=JointTraining(good).eval())
    with pytest.raises(ValueError, match="says its modalities, got Linear"):
        _dream(batch, evaluator=nn.Linear(1, 1).eval())
    with pytest.raises(ValueError, match=r"evaluator: expected logits \['B', 3\], got \['B', 2\]"):
        _dream(batch, evaluator=Toy(shapes, 2).double().eval())(batch)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_batches():
    batch = _batch(ragged=False)
    model = _dream(batch)
    with pytest.raises(ValueError, match=r"modalities \['a', 'b', 'c'\], got \['a', 'c'\]"):
        model(batch.select(["a", "c"]))
    with pytest.raises(ValueError, match=r"features\['b'\]: expected float samples of shape \(2, 5\)"):
        model(batch.replace(features={**batch.features, "b": batch.features["b"][..., :3]}))
    nan = batch.features["a"].clone()
    nan[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"finite values.*1 samples.*\[2\]"):
        model(batch.replace(features={**batch.features, "a": nan}))
    with pytest.raises(ValueError, match=r"samples \[B\]"):
        model(batch._map(lambda x: x[:, None] if x.ndim else x))


def test_targets_outside_the_scale():
    batch = _batch()
    with pytest.raises(ValueError, match=r"in \[0, 2\], got values from"):
        _dream(batch)(batch.replace(target=batch.target + 1))
    with pytest.raises(ValueError, match="classes"):
        _dream(batch)(batch.replace(target=batch.target.double()))
    labels = _batch(kind="labels")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        _dream(labels, "labels")(labels.replace(target=labels.target + 1))
    with pytest.raises(ValueError, match="4 labels"):
        _dream(labels, "labels")(labels.replace(target=labels.target[:, :3]))
    scores = _batch(kind="scores")
    far = scores.replace(target=scores.target + 9)
    assert _dream(scores, "scores")(far).losses
    with pytest.raises(ValueError, match=r"\[-3.0, 3.0\]"):
        _dream(scores, "scores", discretize="round7")(far)
    with pytest.raises(ValueError, match="finite"):
        _dream(scores, "scores")(scores.replace(target=scores.target * torch.nan))
    with pytest.raises(ValueError, match="float scores"):
        _dream(scores, "scores")(scores.replace(target=scores.target.long()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"outputs": 0},
        {"heads": 3},
        {"repeats": 0},
        {"positions": 3},
        {"dropout": 1.0},
        {"temperature": 0.0},
        {"lambda_distill": -1.0},
        {"permutations": 0},
        {"weight_hidden": 0},
        {"feature_shapes": {}},
        {"feature_shapes": {"a": (7,)}},
        {"labels": 2},
        {"regression": True},
        {"discretize": "floor"},
        {"iemocap_agg": "all"},
        {"empty": "zero"},
        {"enhance": "some"},
        {"enhance_order": "random"},
        {"concat": "both"},
        {"mask_mode": "none"},
        {"pas_target": "hard"},
        {"distill_on": "both"},
    ],
    ids=str,
)
def test_bad_options(wrong):
    given = {"feature_shapes": {"a": (4, 3)}, "outputs": 3, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong)) if "labels" not in wrong else "outputs"):
        DREAMConfig(**given)


def test_unknown_options_and_readings():
    batch = _batch()
    with pytest.raises(ValueError, match="unknown.*lambda_distil'"):
        _dream(batch, lambda_distil=1)
    with pytest.raises(ValueError, match=r"reading: expected 'paper' or 'text'"):
        _dream(batch, reading="released")
    assert READINGS["paper"] == {}


# --- more than four modalities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_all_orders_give_the_exact_scores(M):
    g = torch.Generator().manual_seed(M)
    table = torch.randint(0, 3, (50, 2**M), generator=g)
    y = torch.randint(0, 3, (50,), generator=g)
    orders = torch.tensor(list(itertools.permutations(range(M))))
    masks, path = permutation_coalitions(orders)
    assert len(masks) == 2**M
    codes = (masks.long() << torch.arange(M)).sum(-1)
    found = permutation_scores(table[:, codes], path, orders, y)
    torch.testing.assert_close(found.pss, prediction_shift_score(table))
    torch.testing.assert_close(found.pas, prediction_accuracy_score(table, y))
    assert permutation_scores(table[:, codes], path, orders).pas is None


def test_one_order_by_hand():
    masks, path = permutation_coalitions(torch.tensor([[2, 0, 1]]))  # nothing, c, ac, abc
    assert masks[path[0]].tolist() == [[False] * 3, [False, False, True], [True, False, True], [True] * 3]
    said = torch.zeros(4, dtype=torch.int64)
    said[path[0]] = torch.tensor([0, 1, 1, 2])
    found = permutation_scores(said, path, torch.tensor([[2, 0, 1]]), torch.tensor(1))
    assert found.pss.tolist() == [0, 1, 1]
    assert found.pas.tolist() == [1, -2, 1]  # V along the way: 0, 1, 2, 0


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), M=st.integers(2, 6), K=st.integers(1, 7))
def test_drawn_orders_keep_what_is_exact(seed, M, K):
    g = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 2, (20, 2**M), generator=g)
    lone = seed % M
    without = torch.arange(2**M) & ~(1 << lone)
    table = table[:, without]  # modality `lone` changes nothing
    y = torch.randint(0, 2, (20,), generator=g)
    orders = torch.rand(K, M, generator=g).argsort(-1)
    masks, path = permutation_coalitions(orders)
    assert len(masks) <= min(K * (M - 1) + 2, 2**M)
    codes = (masks.long() << torch.arange(M)).sum(-1)
    found = permutation_scores(table[:, codes], path, orders, y)
    exact = prediction_shift_score(table)
    assert (found.pss[:, lone] == 0).all()
    assert (found.pss[exact == 0] == 0).all()
    torch.testing.assert_close(found.pas.sum(-1), M * (table[:, -1] == y).float(), atol=1e-5, rtol=0)


def test_drawn_orders_are_unbiased():
    g = torch.Generator().manual_seed(0)
    table, y = torch.randint(0, 3, (10, 32), generator=g), torch.randint(0, 3, (10,), generator=g)
    orders = torch.rand(4000, 5, generator=g).argsort(-1)
    masks, path = permutation_coalitions(orders)
    found = permutation_scores(table[:, (masks.long() << torch.arange(5)).sum(-1)], path, orders, y)
    assert (found.pss - prediction_shift_score(table)).abs().max() < 0.04  # 5 standard errors of a half
    assert (found.pas - prediction_accuracy_score(table, y)).abs().max() < 0.2


@pytest.mark.parametrize("kind", ["classes", "labels", "scores"])
def test_a_model_with_drawn_orders(kind):
    batch = _batch(kind=kind, n=9)
    model = _dream(batch, kind, permutations=6)
    exact = _dream(batch, kind)
    again = _dream(batch, kind, permutations=6)
    assert torch.equal(model.orders, again.orders)
    assert not torch.equal(model.orders, _dream(batch, kind, permutations=6, permutation_seed=1).orders)
    assert torch.equal(model.contributions(batch).pss, again.contributions(batch).pss)
    model.orders = torch.tensor(list(itertools.permutations(range(3))))
    for a, b in zip(model.contributions(batch), exact.contributions(batch), strict=True):
        torch.testing.assert_close(a, b)
    assert model(batch).losses.keys() == {"task", "distillation"}


@pytest.mark.slow
def test_more_modalities_than_any_table_holds():
    names = [f"m{i}" for i in range(20)]
    g = torch.Generator().manual_seed(0)
    data = MultimodalDataset.from_arrays({m: torch.randn(4, 2, generator=g) for m in names}, torch.arange(4) % 2)
    evaluator = MLPEvaluator.for_data(data, width=4).eval()
    model = DREAM.for_data(evaluator, data, width=4, heads=1, permutations=3, weight_hidden=4)
    assert model(data.data).logits.shape == (4, 2)
    with pytest.raises(ValueError, match="16"):
        DREAM.for_data(evaluator, data, width=4, heads=1).contributions(data.data)


# --- scores of a training split, once --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"permutations": 4}, {"empty": "majority"}], ids=str)
def test_precomputed_scores_equal_live_ones(options):
    data = MultimodalDataset(_batch(n=25))
    live, stored = _dream(data.data, **options), _dream(data.data, **options)
    live.observe(data)
    stored.precompute(data, batch_size=7)
    rows = torch.tensor([3, 24, 0, 11])
    batch = data[rows]
    a, b = live(batch), stored(batch)
    assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(a.losses[k], b.losses[k]) for k in a.losses)
    stored.evaluator.forward = stored.evaluator.encode = None  # a training step does not ask it
    assert torch.equal(stored(batch).logits, a.logits)
    with pytest.raises(TypeError):
        stored.eval()(batch)  # in eval mode the scores are live


def test_precomputed_scores_are_checked():
    data = MultimodalDataset(_batch(n=12))
    model = _dream(data.data)
    model.precompute(data)
    state = lambda split: type("State", (), {"train": split})
    model.on_epoch_start(state(data))
    model.on_epoch_start(state(data.subset([5, 2, 7])))
    with pytest.raises(ValueError, match="12 training samples are not as they were"):
        model.on_epoch_start(state(data.drop(present=torch.tensor([False, False, False]))))
    one = data.data.features["a"].clone()
    row = int(data.data.valid["a"].sum(-1).argmax())
    one[row, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="1 of 12 training samples are not as they were"):
        model.on_epoch_start(state(MultimodalDataset(data.data.replace(features={**data.data.features, "a": one}))))
    other = MultimodalDataset(data.data.replace(ids=data.ids + 6))
    with pytest.raises(ValueError, match="6 of 12 training samples have no precomputed"):
        model.on_epoch_start(state(other))
    with pytest.raises(ValueError, match="no precomputed"):
        model(other[:])
    with pytest.raises(ValueError, match="expected ids"):
        model(data.data.replace(ids=None))
    with pytest.raises(ValueError, match="some occur twice"):
        model.precompute(MultimodalDataset(data.data.replace(ids=data.ids * 0)))
    with pytest.raises(ValueError, match="modalities"):
        model.precompute(data.select(["a", "b"]))
    with pytest.raises(ValueError, match="target"):
        model.precompute(MultimodalDataset(data.data.replace(target=None)))


# --- in the loop -----------------------------------------------------------------------------------------------------


def _learnable(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    code = torch.eye(3)[y]
    features = {m: torch.randn(n, T, D, generator=g) * 0.5 for m, (T, D) in list(SHAPES.items())[:3]}
    for x in features.values():
        k = min(3, x.shape[-1])
        x[..., :k] += code[:, None, :k] * 2
    return MultimodalDataset.from_arrays(features, y)


@pytest.mark.slow
def test_fit_save_load_predict(tmp_path):
    plan = MissingPlan("bernoulli", rates=[0.3, 0.3, 0.3], seed=0)
    data = plan.draw(_learnable()).apply(_learnable())
    first = MLPEvaluator.for_data(data, width=16)
    fit(JointTraining(first), data, config=TrainConfig(epochs=15, lr=1e-2, select="last", device="cpu"))
    build = lambda evaluator: DREAM.for_data(evaluator, data, width=16, heads=2, weight_hidden=8, dropout=0.0)
    config = TrainConfig(epochs=12, lr=5e-3, select="last", device="cpu")
    live, stored = build(first.eval()), build(copy.deepcopy(first))
    stored.load_state_dict(live.state_dict())
    stored.precompute(data)
    fit(live, data, config=config)
    history = fit(stored, data, data, config=config)
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]
    assert {"train_task", "train_distillation", "valid_accuracy"} <= set(history.epochs[-1])
    assert (predict(live, data) - predict(stored, data)).abs().max() < 1e-5
    assert (predict(stored, data).argmax(-1) == data.target).double().mean() > 0.8
    save(stored, tmp_path / "dream.pt")
    fresh = build(MLPEvaluator.for_data(data, width=16).eval())
    load(fresh, tmp_path / "dream.pt")
    assert torch.equal(predict(fresh, data), predict(stored, data))
    other = predict(fresh, data, present=[True, False, False])
    assert not torch.equal(other, predict(fresh, data))
    resampled = MissingPlan("bernoulli", rates=[0.3, 0.3, 0.3], seed=1, resample=True)
    with pytest.raises(ValueError, match="resamples"):
        fit(stored, _learnable(), config=config, train_plan=resampled)


def test_for_data_trains_the_evaluator_where_it_is_told_how():
    data, config = _learnable(), TrainConfig(epochs=15, lr=1e-2, device="cpu")
    evaluator = MLPEvaluator.for_data(data, width=16)
    with pytest.raises(ValueError, match="evaluator: expected a trained one in eval mode"):
        DREAM.for_data(evaluator, data, width=8, heads=2)
    with pytest.raises(ValueError, match="pass its .backbone"):
        DREAM.for_data(JointTraining(evaluator), data, data, config, width=8, heads=2)
    model = DREAM.for_data(evaluator, data, data, config, width=8, heads=2)
    assert model.evaluator is evaluator
    assert not any(p.requires_grad for p in evaluator.parameters())
    assert (evaluator(data[:]).argmax(-1) == data.target).double().mean() > 0.8
    same = DREAM.for_data(evaluator, data, width=8, heads=2)  # a trained one stays as it is
    assert same.evaluator is evaluator


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mixed_precision_does_not_touch_the_scores(precision):
    data = _learnable(12)
    model = DREAM.for_data(MLPEvaluator.for_data(data).eval(), data, width=8, heads=2)
    alone = model.contributions(data.data)
    config = TrainConfig(epochs=1, select="last", mixed_precision=precision, device="cpu")
    fit(model, data, config=config)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.contributions(data.data)
    assert torch.equal(alone.pss, inside.pss)
    assert torch.equal(alone.pas, inside.pas)


@pytest.mark.slow
def test_the_runner_trains_the_evaluator_first(monkeypatch):
    from book.support import experiments

    asked = []
    fitted = experiments.fit
    monkeypatch.setattr(
        experiments, "fit", lambda m, *a, **k: asked.append((type(m).__name__, a[2].epochs)) or fitted(m, *a, **k)
    )
    options = {"width": 8, "heads": 2, "weight_hidden": 8, "repeats": 1}
    config = {
        "data": "synthetic",
        "method": "dream",
        "method_options": {**options, "evaluator": "mlp", "evaluator_epochs": 4},
        "train_plan": {"kind": "exact_count", "rates": [0.2, 0.3, 0.4]},
        "test": "subsets",
        "train": {"epochs": 1},
    }
    rows = {row["test"]: row["value"] for row in experiments.train_and_score(config)}
    assert len(rows) == 1 + 7
    assert {row["test"]: row["value"] for row in experiments.train_and_score(config)} == rows
    assert asked == [("JointTraining", 4), ("DREAM", 1), ("DREAM", 1)]  # the variants of DREAM share their evaluator
    own = {**config, "backbone": "table3", "backbone_options": {"width": 8}, "method_options": options}
    assert len(experiments.train_and_score({**own, "test": "complete"})) == 2
    assert asked[3:] == [("JointTraining", 1), ("DREAM", 1)]
    with pytest.raises(ValueError, match="evaluator: expected one of"):
        experiments.train_and_score({**config, "method_options": {"evaluator": "bert"}})


@pytest.mark.slow
def test_the_runner_with_a_resampling_plan_on_scores():
    from book.support.experiments import train_and_score

    config = {
        "data": "synthetic",
        "data_options": {"task": "regression"},
        "method": "dream",
        "method_options": {"width": 8, "heads": 2, "weight_hidden": 8, "evaluator": "selfmm", "evaluator_epochs": 2},
        "train_plan": {"kind": "bernoulli", "rates": [0.3, 0.3, 0.3], "resample": True},
        "train": {"epochs": 1},
    }
    assert {"mae", "corr"} <= {row["metric"] for row in train_and_score(config)}


def test_every_subset_of_a_self_mm_evaluator_equals_a_forward_on_zeros():
    batch = _float(_batch(kind="scores", n=6))
    shapes = {m: tuple(x.shape[1:]) for m, x in batch.features.items()}
    net = SelfMMEvaluator(SelfMMEvaluator.Config(shapes, 1)).eval()
    model = _dream(batch, "scores", evaluator=net)
    said = torch.stack([net(batch.drop(present=S)) for S in coalition_masks(3)])[..., 0].detach() >= 0
    torch.testing.assert_close(model.contributions(batch).pss, prediction_shift_score(said.long().t()))
