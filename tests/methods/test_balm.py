"""BALM: gates, coefficients, cosines and gradients by hand, by loops and by finite differences; then in the loop."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from baselines.runs import Interrupt, toy, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processes import two_processes
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from book.support.experiments import train_and_score
from mmlib import BALM, MultimodalBatch, MultimodalDataset, Output
from mmlib import data as sources
from mmlib.backbones import AVMNISTBackbone, Backbone, GenericBackbone, GenericConfig
from mmlib.baselines import JointTraining
from mmlib.coalitions import coalition_logits, coalition_masks
from mmlib.gradients import EncoderGradients
from mmlib.methods.balm import (
    PRESETS,
    BALMConfig,
    FeatureCalibration,
    GradientRebalancing,
    UnimodalHeads,
    discrepancies,
    modulation_coefficients,
    spatial_modulation,
)
from mmlib.missing import MissingPlan, imbalanced_mask
from mmlib.training import TrainConfig, fit, load, predict, random_state, save

SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
IEMOCAP = {"language": (1, 1024), "audio": (1, 1582), "vision": (1, 342)}
MOSEI = {"language": (1, 1024), "audio": (1, 512), "vision": (1, 1024)}


# References: loops from the equations that import nothing under test


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(x: list[float]) -> list[float]:
    top = max(x)
    e = [math.exp(v - top) for v in x]
    return [v / sum(e) for v in e]


def calibrate_by_loops(x, seen, joint, joint_bias, excite, excite_bias):
    """x[m] [B, U, T, D], seen[m] bool [B, U, T] -> the calibrated x: Eqs. 7-10, one dialogue at a time."""
    result = {m: np.zeros_like(v) for m, v in x.items()}
    for b in range(len(next(iter(x.values())))):
        squeezed = []
        for m, v in x.items():
            U, T, D = v.shape[1:]
            for d in range(D):
                total = count = 0.0
                for u in range(U):
                    for t in range(T):
                        if seen[m][b, u, t]:
                            total, count = total + v[b, u, t, d], count + 1
                squeezed.append(total / (count + 1e-8))
        layer = lambda W, bias, x: [
            sum(w * s for w, s in zip(row, x, strict=True)) + c for row, c in zip(W, bias, strict=True)
        ]
        z = [max(0.0, v) for v in layer(joint, joint_bias, squeezed)]
        gate = [2 * sigmoid(v) for v in layer(excite, excite_bias, z)]
        start = 0
        for m, v in x.items():
            for u in range(v.shape[1]):
                for t in range(v.shape[2]):
                    for d in range(v.shape[3]):
                        if seen[m][b, u, t]:
                            result[m][b, u, t, d] = gate[start + d] * v[b, u, t, d]
            start += v.shape[3]
    return result


def distribution(logits: list[float], scores: bool) -> list[float]:
    return [sigmoid(-logits[0]), sigmoid(logits[0])] if scores else softmax(logits)


def discrepancy_by_loops(fused, unimodal, target, kind, scores):
    """fused [n, K], unimodal [M, n, K] -> [M, n]."""
    M, n, _ = unimodal.shape
    found = np.zeros((M, n))
    for m in range(M):
        for i in range(n):
            p, q = distribution(list(fused[i]), scores), distribution(list(unimodal[m, i]), scores)
            if kind == "kl":
                found[m, i] = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            else:
                found[m, i] = sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / len(p)
    return found


def coefficients_by_loops(delta, rho):
    return [rho * sum(x for j, x in enumerate(delta) if j != m) / (sum(delta) + 1e-8) for m in range(len(delta))]


def cosine_by_loops(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / norms if norms else 0.0


def lmod_by_loops(fused, unimodal, c, form):
    cos = [cosine_by_loops(fused, u) for u in unimodal]
    M = len(cos)
    if form == "abs":
        return cos, sum(abs(k * x) for k, x in zip(c, cos, strict=True)) / M
    return cos, (sum(abs(k) for k in c) - sum(k * x for k, x in zip(c, cos, strict=True))) / M


# Feature calibration


@pytest.mark.parametrize(("shapes", "width", "count"), [(IEMOCAP, 737, 4_349_037), (MOSEI, 640, 3_280_000)])
def test_calibration_has_the_papers_size(shapes: dict, width: int, count: int) -> None:
    module = FeatureCalibration(shapes)
    assert module.joint.out_features == width
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize(("outputs", "count"), [(6, 558_918), (1, 545_403)])
def test_heads_have_the_papers_size(outputs: int, count: int) -> None:
    assert sum(p.numel() for p in UnimodalHeads([200] * 3, 900, outputs).parameters()) == count


def dialogues(B=3, U=4, seed=0, dtype=torch.float64, frames=2, scores=False) -> MultimodalBatch:
    """Two modalities; dialogue 0 has one utterance, one utterance misses everything, dialogue 1 never has b."""
    g = torch.Generator().manual_seed(seed)
    features = {
        "a": torch.randn(B, U, frames, 3, generator=g, dtype=torch.float64).to(dtype),
        "b": torch.randn(B, U, 1, 5, generator=g, dtype=torch.float64).to(dtype),
    }
    real = torch.ones(B, U, dtype=torch.bool)
    real[0, 1:] = False
    present = torch.rand(B, U, 2, generator=g) < 0.7
    present[0, 0, 0], present[1, :, 1], present[2, 1] = True, False, False
    present &= real[..., None]
    target = torch.randn(B, U, generator=g).to(dtype) if scores else torch.randint(0, 3, (B, U), generator=g)
    batch = MultimodalBatch(features, torch.ones(B, U, 2, dtype=torch.bool), target, extras={"utterance": real})
    return batch.drop(present=present)


def test_calibration_of_dialogues_by_loops() -> None:
    batch = dialogues()
    observed = {"a": batch.observed["a"].clone(), "b": batch.observed["b"]}
    observed["a"][2, 0, 1] = False  # a frame was dropped
    batch = batch.drop(observed=observed)
    torch.manual_seed(0)
    module = FeatureCalibration({"a": (2, 3), "b": (1, 5)}).double()
    found = module(batch)
    number = lambda d: {m: v.numpy() for m, v in d.items()}
    parameters = [p.detach().numpy() for p in (*module.joint.parameters(), *module.excite.parameters())]
    expected = calibrate_by_loops(number(batch.features), number(batch.observed), *parameters)
    for m in batch.modalities:
        np.testing.assert_allclose(found.features[m].detach().numpy(), expected[m], atol=1e-12)
        assert found.features[m].shape == batch.features[m].shape
    assert found.present is batch.present
    assert not torch.equal(found.features["a"], batch.features["a"])
    gates = module.gates(batch)
    assert all(
        g.shape == (3, D) and (g > 0).all() and (g < 2).all() for g, D in zip(gates.values(), (3, 5), strict=True)
    )


@pytest.mark.parametrize("shape", [(1, 4), (6, 4), (2, 5, 4), (2, 5, 3, 2)])
def test_calibration_of_vectors_sequences_images_and_volumes(shape: tuple) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64)
    batch = MultimodalBatch(
        {"x": x, "y": torch.randn(3, 1, 2, dtype=torch.float64)}, torch.ones(3, 2, dtype=torch.bool)
    )
    module = FeatureCalibration({"x": shape, "y": (1, 2)}).double()
    frames = x if len(shape) == 2 else x.movedim(2, 1).flatten(2)  # an image's rows are its frames
    parameters = [p.detach().numpy() for p in (*module.joint.parameters(), *module.excite.parameters())]
    features = {"x": frames[:, None].numpy(), "y": batch.features["y"][:, None].numpy()}
    seen = {m: np.ones(v.shape[:3], dtype=bool) for m, v in features.items()}
    expected = torch.as_tensor(calibrate_by_loops(features, seen, *parameters)["x"][:, 0])
    found = module(batch).features["x"]
    assert found.shape == x.shape
    torch.testing.assert_close(found if len(shape) == 2 else found.movedim(2, 1).flatten(2), expected)


def test_calibration_is_the_identity_without_weights_and_doubles_at_most() -> None:
    batch = dialogues()
    module = FeatureCalibration({"a": (2, 3), "b": (1, 5)}).double()
    nn.init.zeros_(module.excite.weight)
    nn.init.zeros_(module.excite.bias)
    for m, x in module(batch).features.items():
        torch.testing.assert_close(x, batch.features[m])
    nn.init.constant_(module.excite.bias, 100.0)
    torch.testing.assert_close(module(batch).features["a"], 2 * batch.features["a"])


def test_calibration_does_not_see_what_is_not_there() -> None:
    """NaN where nothing was observed or in padding reaches neither a value nor a gradient."""
    batch = dialogues(dtype=torch.float32)
    module = FeatureCalibration({"a": (2, 3), "b": (1, 5)})
    clean = module(batch)
    broken = {m: torch.where(batch.observed[m][..., None], x, torch.nan) for m, x in batch.features.items()}
    found = module(batch.replace(features=broken))
    for m, x in clean.features.items():
        assert torch.equal(found.features[m], x)
    sum(x.square().sum() for x in found.features.values()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in module.parameters())


def test_one_gate_for_a_dialogue_and_none_from_another() -> None:
    batch = dialogues()
    module = FeatureCalibration({"a": (2, 3), "b": (1, 5)}).double()
    whole = module.gates(batch)
    for b in range(3):
        for m, gate in module.gates(batch[b : b + 1]).items():
            torch.testing.assert_close(gate, whole[m][b : b + 1])
    order = torch.tensor([3, 1, 0, 2])  # utterances in another order
    moved = batch.replace(
        features={m: x[:, order] for m, x in batch.features.items()},
        present=batch.present[:, order],
        target=None,
        valid={m: v[:, order] for m, v in batch.valid.items()},
        observed={m: v[:, order] for m, v in batch.observed.items()},
        extras={"utterance": batch.extras["utterance"][:, order]},
    )
    for m, gate in module.gates(moved).items():
        torch.testing.assert_close(gate, whole[m])


def test_what_calibration_refuses() -> None:
    with pytest.raises(ValueError, match="feature_shapes: expected a dict by names"):
        FeatureCalibration({})
    with pytest.raises(ValueError, match=r"token ids in \['words'\]"):
        FeatureCalibration({"words": (9,)})
    with pytest.raises(ValueError, match="width: expected an integer of at least 1, got 0"):
        FeatureCalibration({"a": (1, 3)}, width=0)
    assert FeatureCalibration({"a": (1, 1), "b": (1, 1)}).joint.out_features == 1
    assert FeatureCalibration({"a": (1, 1), "b": (1, 1)}, width=7).joint.out_features == 7
    module = FeatureCalibration({"a": (2, 3), "b": (1, 4)}).double()
    with pytest.raises(ValueError, match=r"features\['b'\]: expected floats with 4 values a frame, got .*5\)"):
        module(dialogues())
    with pytest.raises(ValueError, match=r"batch: expected the modalities \['a', 'b'\], got \['a'\]"):
        module(dialogues().select(["a"]))


# Coefficients


def test_coefficients_by_hand() -> None:
    mu = modulation_coefficients(torch.tensor([0.3, 0.2, 0.1]), 1.0)
    torch.testing.assert_close(mu, torch.tensor([0.5, 2 / 3, 5 / 6]))
    assert mu.sum().item() == pytest.approx(2, abs=1e-6)
    torch.testing.assert_close(modulation_coefficients(torch.tensor([3.0, 1.0]), 1.6), torch.tensor([0.4, 1.2]))
    # no clamp: a sum near zero, and a negative one, which turns the order around
    torch.testing.assert_close(modulation_coefficients(torch.tensor([0.5, -0.4]), 1.0), torch.tensor([-4.0, 5.0]))
    torch.testing.assert_close(modulation_coefficients(torch.tensor([-0.3, -0.1]), 1.0), torch.tensor([0.25, 0.75]))
    assert modulation_coefficients(torch.zeros(3), 1.4).tolist() == [0, 0, 0]
    assert torch.isfinite(modulation_coefficients(torch.tensor([-1e-8, 0.0], dtype=torch.float64), 1.0)).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 5), min_size=2, max_size=6), st.floats(0.1, 3), st.randoms())
def test_coefficients_of_gains_are_bounded_ordered_and_equivariant(delta, rho, random) -> None:
    x = torch.tensor(delta, dtype=torch.float64)
    mu = modulation_coefficients(x, rho)
    np.testing.assert_allclose(mu.numpy(), coefficients_by_loops(delta, rho), rtol=1e-6, atol=1e-12)
    assert (mu >= -1e-9).all()
    assert (mu <= rho + 1e-9).all()
    assert mu.sum().item() <= rho * (len(delta) - 1) + 1e-9
    for i in range(len(delta)):  # who learns less has the larger factor
        for j in range(len(delta)):
            if delta[i] < delta[j]:
                assert mu[i] >= mu[j]
    order = list(range(len(delta)))
    random.shuffle(order)
    torch.testing.assert_close(modulation_coefficients(x[order], rho), mu[order])
    torch.testing.assert_close(modulation_coefficients(x, 2 * rho), 2 * mu)


def test_what_coefficients_refuse() -> None:
    for rho in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rho: expected a number above 0"):
            modulation_coefficients(torch.ones(3), rho)
    for shape in ((1,), (), (2, 2)):
        with pytest.raises(ValueError, match="discrepancy: expected"):
            modulation_coefficients(torch.ones(shape), 1.0)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("scores", [False, True])
def test_discrepancies_by_loops(kind: str, scores: bool) -> None:
    rng = np.random.default_rng(0)
    K = 1 if scores else 4
    fused, unimodal = rng.normal(size=(7, K)), rng.normal(size=(3, 7, K))
    target = rng.normal(size=7) if scores else rng.integers(0, K, 7)
    found = discrepancies(torch.as_tensor(fused), torch.as_tensor(unimodal), torch.as_tensor(target), kind)
    np.testing.assert_allclose(found.numpy(), discrepancy_by_loops(fused, unimodal, target, kind, scores), atol=1e-12)


def test_discrepancies_at_the_edges() -> None:
    z = torch.tensor([[1.0, 2.0]])
    y = torch.tensor([0])
    assert discrepancies(z, z[None], y).abs().item() < 1e-7
    hard = discrepancies(torch.tensor([[200.0, -200.0]]), torch.tensor([[[0.0, 0.0]]]), y)
    assert hard.item() == pytest.approx(math.log(2))
    assert discrepancies(z.bfloat16(), z[None].bfloat16(), y).dtype == torch.float32
    with pytest.raises(ValueError, match="kind: expected 'kl' or 'mse', got 'js'"):
        discrepancies(z, z[None], y, "js")


# Spatial modulation


@pytest.mark.parametrize("form", ["abs", "cggm"])
def test_spatial_modulation_by_loops_and_autograd_and_differences(form: str) -> None:
    rng = np.random.default_rng(1)
    fused, heads, c = rng.normal(size=6), rng.normal(size=(3, 6)), np.array([0.5, -0.7, 1.2])
    cos, value, to_fused, to_heads = spatial_modulation(*(torch.as_tensor(x) for x in (fused, heads, c)), form)
    expected = lmod_by_loops(fused, heads, c, form)
    np.testing.assert_allclose(cos.numpy(), expected[0], rtol=1e-12)
    assert value.item() == pytest.approx(expected[1], rel=1e-12)
    step = 1e-6
    for i in range(6):
        shift = step * np.eye(6)[i]
        up, down = (lmod_by_loops(fused + s * shift, heads, c, form)[1] for s in (1, -1))
        assert to_fused[i].item() == pytest.approx((up - down) / (2 * step), abs=1e-8)
        for m in range(3):
            move = np.zeros((3, 6))
            move[m] = shift
            up, down = (lmod_by_loops(fused, heads + s * move, c, form)[1] for s in (1, -1))
            assert to_heads[m, i].item() == pytest.approx((up - down) / (2 * step), abs=1e-8)
    # and the direction: "abs" pulls to orthogonality, "cggm" to alignment where c > 0
    moved = fused - 0.01 * to_fused.numpy()
    assert lmod_by_loops(moved, heads, c, form)[1] < expected[1]


def test_a_weight_of_norm_zero_has_cosine_zero_and_no_derivative() -> None:
    heads = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for fused in (torch.zeros(2), torch.tensor([1.0, 0.0])):
        cos, value, a, b = spatial_modulation(fused, heads, torch.ones(2))
        assert cos[0] == 0
        assert all(torch.isfinite(x).all() for x in (value, a, b))
        assert b[0].abs().sum() == 0
    assert spatial_modulation(torch.zeros(2), heads, torch.ones(2))[2].abs().sum() == 0


# Rebalancing in a net that mmlib does not know


class Foreign(nn.Module):
    """Two encoders, a fusion of its own, no encode, fuse or decode."""

    def __init__(self, K: int = 3, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.ears = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.eyes = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.mix = nn.Linear(10, 6)
        self.out = nn.Linear(6, K)

    def forward(self, audio: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.mix(torch.cat([self.ears(audio), self.eyes(image)], -1))))


def stream(n: int = 12, steps: int = 4, scores: bool = False, K: int = 3):
    g = torch.Generator().manual_seed(5)
    for _ in range(steps):
        y = torch.randn(n, generator=g).double() if scores else torch.randint(0, K, (n,), generator=g)
        yield torch.randn(n, 4, generator=g).double(), torch.randn(n, 3, generator=g).double(), y


def plugged(net: Foreign, **options) -> GradientRebalancing:
    torch.manual_seed(9)
    return GradientRebalancing(net, {"audio": net.ears, "image": net.eyes}, net.out, widths=5, **options)


def literal_training(options: dict, scores: bool = False, steps: int = 4) -> tuple[list[dict], Foreign]:
    """The release's loop, in its order: two backward passes, two optimizers, its clipping; from Eqs. 17-27 by hand."""
    config = {"rho": 1.3, "tau": 0.2, "lmod": "abs", "discrepancy": "kl", "smoothing": 0.0, **options}
    K = 1 if scores else 3
    net = Foreign(K).double()
    grm = plugged(net)  # only for the same initial heads
    first = [copy.deepcopy(layer) for layer in grm.heads.first]
    second = [nn.Linear(6, K).double() for _ in range(2)]
    for m, layer in enumerate(second):
        layer.weight.data, layer.bias.data = grm.heads.weight.data[m].clone(), grm.heads.bias.data[m, 0].clone()
    main = torch.optim.Adam(net.parameters(), 0.01, weight_decay=0.1)
    heads = [p for layer in (*first, *second) for p in layer.parameters()]
    other = torch.optim.Adam(heads, 0.01, weight_decay=0.1)
    criterion = F.l1_loss if scores else F.cross_entropy
    squeeze = (lambda x: x[:, 0]) if scores else (lambda x: x)
    stored, last, log = None, None, []
    for audio, image, y in stream(scores=scores, K=3, steps=steps):
        main.zero_grad()
        logits = net(audio, image)
        loss = criterion(squeeze(logits), y)
        if stored is not None:
            loss = loss + config["tau"] * stored
        loss.backward(inputs=list(net.parameters()))
        other.zero_grad()
        z = [net.ears(audio).detach(), net.eyes(image).detach()]
        said = [b(torch.relu(a(x))) for a, b, x in zip(first, second, z, strict=True)]
        sum(criterion(squeeze(x), y) for x in said).backward()

        # cosines and discrepancies before any weight moves
        fused = net.out.weight.clone()
        cosine = torch.stack([F.cosine_similarity(b.weight.detach().flatten(), fused.flatten(), 0) for b in second])
        unimodal = np.stack([x.detach().numpy() for x in said])
        now = discrepancy_by_loops(logits.detach().numpy(), unimodal, y.numpy(), config["discrepancy"], scores).mean(1)
        if last is None:
            delta = now
        else:
            now = config["smoothing"] * last + (1 - config["smoothing"]) * now
            delta = last - now
        last = now
        c = np.array(coefficients_by_loops(list(delta), 1.0))
        if (fixed := config.get("mu_constant")) is not None:
            c = np.broadcast_to(np.array(fixed), (2,)) / config["rho"]
        if (bounds := config.get("mu_clip")) is not None:
            c = np.clip(config["rho"] * c, *bounds) / config["rho"]
        paired = cosine if config.get("cosine_columns") is None else cosine[list(config["cosine_columns"])]
        weighted = torch.as_tensor(c) * paired
        stored = (weighted.abs().sum() if config["lmod"] == "abs" else np.abs(c).sum() - weighted.sum()) / 2
        if config.get("scale_gradients", True):
            for part, factor in zip((net.ears, net.eyes), c, strict=True):
                for p in part.parameters():
                    p.grad *= factor * config["rho"]
        other.step()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        main.step()
        log.append({"mu": config["rho"] * c, "kl": now, "cos": cosine.detach().numpy(), "lmod": stored.item()})
    return log, net


@pytest.mark.parametrize("scores", [False, True], ids=["classes", "scores"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rho": 1.6, "tau": 2.0},
        {"discrepancy": "mse"},
        {"scale_gradients": False, "tau": 1.0},
        {"tau": 0.0},
    ],
    ids=str,
)
def test_training_is_the_literal_loop(options: dict, scores: bool) -> None:
    assert_is_the_literal_loop(options, scores)


def assert_is_the_literal_loop(options: dict, scores: bool) -> None:
    """One backward pass, one optimizer, stored derivatives: the weights of the release's loop, to rounding."""
    log, expected = literal_training(options, scores)
    net = Foreign(1 if scores else 3).double()
    grm = plugged(net, **options)
    optimizer = torch.optim.Adam([*net.parameters(), *grm.parameters()], 0.01, weight_decay=0.1)
    criterion = F.l1_loss if scores else F.cross_entropy
    for (audio, image, y), said in zip(stream(scores=scores), log, strict=True):
        logits = net(audio, image)
        losses = grm(logits, y)
        optimizer.zero_grad()
        (criterion(logits[:, 0] if scores else logits, y) + sum(losses.values())).backward()
        grm.rebalance()
        grm.withheld.hold()
        nn.utils.clip_grad_norm_([*net.parameters(), *grm.parameters()], 0.05)
        grm.withheld.give_back()
        optimizer.step()
        np.testing.assert_allclose(grm.last["mu"], said["mu"], rtol=1e-6)
        np.testing.assert_allclose(grm.level, said["kl"], rtol=1e-7)
        np.testing.assert_allclose(grm.last["cosine"], said["cos"], rtol=1e-6)
        assert grm.lmod_value.item() == pytest.approx(said["lmod"], rel=1e-6)
    torch.testing.assert_close(weights(net), weights(expected), rtol=1e-7, atol=1e-9)
    default = literal_training({}, scores)[1]
    assert (options == {}) == torch.allclose(weights(net), weights(default), atol=1e-7)  # every option matters


@pytest.mark.slow
def test_the_plug_in_takes_ten_lines() -> None:
    audio, image, y = next(stream(60, 1))
    y = (audio[:, 0] > 0).long() + (image[:, 0] > 0).long()
    net = Foreign().double()
    grm = GradientRebalancing(net, {"audio": net.ears, "image": net.eyes}, net.out, widths=5, rho=1.3, tau=0.2)
    optimizer = torch.optim.Adam([*net.parameters(), *grm.parameters()], 0.02)
    for _ in range(150):
        logits = net(audio, image)
        loss = F.cross_entropy(logits, y) + sum(grm(logits, y).values())
        optimizer.zero_grad()
        loss.backward()
        grm.rebalance()
        optimizer.step()
    assert (logits.argmax(-1) == y).double().mean() > 0.9
    assert set(grm.last) == {"discrepancy", "change", "mu", "cosine", "rms_before", "rms_after"}
    net.eval()
    net(audio, image)
    assert not grm._caught  # nothing is kept of a pass that is only looked at


def test_the_heads_leave_the_encoders_alone() -> None:
    audio, image, y = next(stream())
    net = Foreign().double()
    grm = plugged(net)
    grm(net(audio, image), y)["unimodal"].backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in grm.parameters())


def test_a_scaled_gradient_is_the_derivative_of_a_scaled_step() -> None:
    """Eq. 22 by finite differences: the encoders' gradients are mu times those of the task loss, others untouched."""
    audio, image, y = next(stream())
    net = Foreign().double()
    grm = plugged(net, tau=0.0)
    task = lambda: F.cross_entropy(net(audio, image), y)
    (task() + grm(net(audio, image), y)["unimodal"]).backward()
    grm.rebalance()
    mu = dict(zip(("ears", "eyes"), grm.last["mu"].tolist(), strict=True))
    assert abs(mu["ears"] - mu["eyes"]) > 0.05
    for name, p in net.named_parameters():
        with torch.no_grad():
            p.view(-1)[0] += 1e-6
            up = task().item()
            p.view(-1)[0] -= 2e-6
            down = task().item()
            p.view(-1)[0] += 1e-6
        factor = mu.get(name.split(".")[0], 1.0)
        assert p.grad.view(-1)[0].item() == pytest.approx(factor * (up - down) / 2e-6, abs=1e-7)


def test_parts_of_a_joint_layer_are_encoders_too() -> None:
    """A backbone without encoders of its own: the columns of its first layer that read a modality."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    encoders = {"audio": (net[0].weight, (slice(None), slice(0, 4))), "image": [(net[0].weight, (..., slice(4, 7)))]}
    grm = GradientRebalancing(net, encoders, net[2], {"audio": 6, "image": 6}, catch=False, tau=0.0)
    x, y = torch.randn(9, 7), torch.randint(0, 3, (9,))
    alone = {"audio": torch.cat([x[:, :4], 0 * x[:, 4:]], 1), "image": torch.cat([0 * x[:, :4], x[:, 4:]], 1)}
    z = {m: torch.relu(net[0](v)) for m, v in alone.items()}
    logits = net(x)
    (F.cross_entropy(logits, y) + grm(logits, y, z)["unimodal"]).backward()
    before = net[0].weight.grad.clone()
    grm.rebalance()
    a, b = grm.last["mu"]
    torch.testing.assert_close(net[0].weight.grad, torch.cat([a * before[:, :4], b * before[:, 4:]], 1))
    torch.testing.assert_close(
        EncoderGradients(net, encoders).rms(),
        torch.stack([(a * before[:, :4]).square().mean().sqrt(), (b * before[:, 4:]).square().mean().sqrt()]),
    )


def test_the_order_of_calls_is_checked() -> None:
    grm = plugged(Foreign())
    with pytest.raises(RuntimeError, match="rebalance: expected the losses of a forward pass"):
        grm.rebalance()
    audio, image, y = next(stream())
    with pytest.raises(ValueError, match=r"encodings: expected those of \['audio', 'image'\] from their encoders in"):
        grm(torch.zeros(12, 3), y)


# What is refused


def test_what_encoders_may_not_be() -> None:
    net = Foreign()
    make = lambda encoders, **given: GradientRebalancing(
        net, encoders, given.pop("output", net.out), given.pop("widths", 5), **given
    )
    both = {"audio": net.ears, "image": net.eyes}
    with pytest.raises(ValueError, match=r"encoders: expected a dict by names with at least 2"):
        make({"audio": net.ears})
    with pytest.raises(ValueError, match=r"encoders\['image'\]: expected a part of Foreign, it is not"):
        make({"audio": net.ears, "image": Foreign().eyes})
    with pytest.raises(ValueError, match=r"encoders\['image'\]: expected an encoder with trainable parameters"):
        make({"audio": net.ears, "image": nn.ReLU()})
    with pytest.raises(ValueError, match=r"encoders\['image'\]: expected an encoder with trainable parameters"):
        make({"audio": net.ears, "image": []})
    with pytest.raises(TypeError, match=r"encoders\['image'\]: expected modules, parameters or pairs .* got NoneType"):
        make({"audio": net.ears, "image": None})
    with pytest.raises(TypeError, match=r"encoders\['image'\]: expected modules, .* got str"):
        make({"audio": net.ears, "image": ["eyes.0.weight"]})
    with pytest.raises(ValueError, match=r"encoders\['image'\]: expected weights of its own"):
        make({"audio": net.ears, "image": [net.eyes, net.ears[0]]})
    columns = lambda a, b: (net.mix.weight, (slice(None), slice(a, b)))
    with pytest.raises(ValueError, match=r"encoders\['image'\]: expected weights of its own"):
        make({"audio": columns(0, 6), "image": columns(5, 10)}, catch=False)
    with pytest.raises(ValueError, match=r"encoders\['audio'\]: expected one module to catch from, or catch=False"):
        make({"audio": [net.ears], "image": net.eyes})
    with pytest.raises(ValueError, match="output: expected the fused linear layer, got ReLU"):
        make(both, output=nn.ReLU())
    with pytest.raises(ValueError, match="output: expected a layer of Foreign, it is not"):
        make(both, output=nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"widths: expected one for each of \['audio', 'image'\], got \['audio'\]"):
        make(both, widths={"audio": 5})
    grm = make(both, catch=False)
    y, z = torch.zeros(4, dtype=torch.long), {"audio": torch.zeros(4, 5), "image": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match=r"logits: expected \(4, 3\), got \(4, 2\)"):
        grm(torch.zeros(4, 2), y, z)
    with pytest.raises(ValueError, match=r"encodings: expected those of .* as encodings, got \['audio'\]"):
        grm(torch.zeros(4, 3), y, {"audio": z["audio"]})
    with pytest.raises(ValueError, match=r"encodings\['image'\]: expected 4 vectors \[\*N, 5\], got \(3, 5\)"):
        grm(torch.zeros(4, 3), y, {**z, "image": torch.zeros(3, 5)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho: expected a number above 0, got 0.0"),
        ({"rho": math.nan}, "rho: expected a number above 0"),
        ({"tau": -0.1}, "tau: expected a number of at least 0"),
        ({"tau": math.inf}, "tau: expected"),
        ({"discrepancy": "js"}, "discrepancy: expected 'kl' or 'mse'"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BALMConfig(**options)


# BALM on backbones


def backbone(data: MultimodalDataset, dropout: float = 0.0, seed: int = 0, **options) -> GenericBackbone:
    with random_state(seed):
        return GenericBackbone.for_data(data, width=8, dropout=dropout, **options)


def balm(data: MultimodalDataset, dropout: float = 0.0, seed: int = 0, **options) -> BALM:
    with random_state(seed):
        return BALM(backbone(data, dropout, seed), **options)


PLAN = MissingPlan("imbalanced", rates=[0.4, 0.6], seed=1)


def test_what_balm_is_made_of() -> None:
    data = toy()
    method = balm(data)
    batch = data[:]
    assert method.train()(batch).losses.keys() == {"task", "unimodal", "modulation"}
    assert method.eval()(batch).losses == {}
    calibrated = method.calibration(batch)
    torch.testing.assert_close(method(batch).logits, method.backbone(calibrated))
    h = method.backbone.encode(calibrated)
    method.train()
    losses = method(batch).losses
    torch.testing.assert_close(losses["task"], F.cross_entropy(method.backbone(calibrated), data.target))
    said = method.rebalancing.heads([x.detach() for x in h.values()])
    torch.testing.assert_close(losses["unimodal"], sum(F.cross_entropy(x, data.target) for x in said))
    sum(losses.values()).backward()
    raw = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.rebalance()
    for name, p in method.named_parameters():
        factor = 1.0
        for m, mu in zip(data.modalities, method.last["mu"], strict=True):
            factor = mu if name.startswith(f"backbone.encoders.{m}.") else factor
        torch.testing.assert_close(p.grad, factor * raw[name])
    assert raw["calibration.joint.weight"].abs().sum() > 0
    assert not any("encoder" in name or "output" in name for name, _ in method.rebalancing.named_parameters())
    assert method.rebalancing.heads.weight.shape == (2, 3, 8)  # each head's output layer is shaped as the fused one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "calibration", "mu", "terms"),
    [
        ("paper", True, True, {"task", "unimodal", "modulation"}),
        ("BALM-D", True, True, {"task", "unimodal"}),
        ("BALM-S", True, False, {"task", "unimodal", "modulation"}),
        ("BALM-M", True, True, {"task", "unimodal", "modulation"}),
        ("+FCM", True, False, {"task"}),
        ("+GRM", False, True, {"task", "unimodal", "modulation"}),
        ("monitor", False, False, {"task", "unimodal"}),
    ],
)
def test_presets(preset: str, calibration: bool, mu: bool, terms: set) -> None:
    data = toy()
    method = balm(data, preset=preset).train()
    output = method(data[:])
    assert set(output.losses) == terms
    assert (method.calibration is not None) is calibration
    sum(output.losses.values()).backward()
    before = method.backbone.encoders["m0"].net[0].weight.grad.clone()
    method.rebalance()
    assert torch.equal(method.backbone.encoders["m0"].net[0].weight.grad, before) is not mu
    if preset == "BALM-M":
        assert method.config.discrepancy == "mse"
    if preset == "+FCM":
        with pytest.raises(ValueError, match="last: expected a preset with rebalancing"):
            _ = method.last
    assert type(method) is BALM
    assert set(PRESETS) == {"paper", "BALM-D", "BALM-S", "BALM-M", "+FCM", "+GRM", "monitor"}


@pytest.mark.slow
def test_monitoring_changes_nothing_of_the_plain_training() -> None:
    data = toy()
    config = TrainConfig(epochs=3, batch_size=16, lr=1e-2, select="last", clip=0.5)
    plain = JointTraining(backbone(data))
    fit(plain, data, config=config, train_plan=PLAN)
    watched = balm(data, preset="monitor")
    curve = []

    class Log:
        def on_step(self, state):
            curve.append(state.method.last["discrepancy"].clone())

    fit(watched, data, config=config, train_plan=PLAN, callbacks=[Log()])
    torch.testing.assert_close(weights(plain.backbone), weights(watched.backbone), rtol=1e-6, atol=1e-7)
    assert len(curve) == 12
    assert torch.stack(curve).std() > 0


def test_dialogues_are_their_real_utterances() -> None:
    """Padded utterances count in no loss and no discrepancy; a batch is its utterances, one by one."""
    batch = dialogues(dtype=torch.float32)
    shapes = {"a": (2, 3), "b": (1, 5)}
    with random_state(0):
        method = BALM(GenericBackbone(GenericConfig(shapes, 3, width=8, dropout=0.0)), preset="+GRM").train()
    losses = method(batch).losses
    method.rebalance()
    level, real = method.rebalancing.level.clone(), batch.extras["utterance"]
    with random_state(0):
        flat = BALM(GenericBackbone(GenericConfig(shapes, 3, width=8, dropout=0.0)), preset="+GRM").train()
    one = MultimodalBatch({m: x[real] for m, x in batch.features.items()}, batch.present[real], batch.target[real])
    for name, value in flat(one).losses.items():
        torch.testing.assert_close(losses[name], value)
    flat.rebalance()
    torch.testing.assert_close(level, flat.rebalancing.level)
    wrong = batch.replace(target=torch.where(real, batch.target, 1 - batch.target.clamp(max=1)))
    torch.testing.assert_close(method(wrong).losses["task"], losses["task"])
    with random_state(0):
        whole = BALM(GenericBackbone(GenericConfig(shapes, 3, width=8))).train()
    output = whole(batch)
    assert output.logits.shape == (3, 4, 3)
    sum(output.losses.values()).backward()
    whole.rebalance()
    assert all(torch.isfinite(p.grad).all() for p in whole.parameters() if p.grad is not None)
    data = MultimodalDataset(batch, {"outputs": 3, "name": "d"})
    fit(whole, data, config=TrainConfig(epochs=2, batch_size=2, select="last"))
    assert predict(whole, data).shape == (3, 4, 3)


def test_scores_with_the_absolute_and_the_squared_error() -> None:
    data = toy()
    scores = MultimodalDataset(data.data.replace(target=torch.randn(60)), {"outputs": 1, "task": "regression"})
    squared = lambda logits, y: (logits[..., 0] - y).square()  # as on CMU-MOSEI
    for options, expected in (({}, F.l1_loss), ({"criterion": squared}, F.mse_loss)):
        method = balm(scores, **options).train()
        output = method(scores[:])
        torch.testing.assert_close(output.losses["task"], expected(output.logits[:, 0], scores.target))
        fit(method, scores, config=TrainConfig(epochs=1, select="last"))


def test_it_takes_any_backbone() -> None:
    """Images and sequences; encoders, output and encodings given by hand; the coalition engine on the result."""
    images = MultimodalDataset.from_arrays(
        {"image": torch.randn(8, 1, 28, 28), "audio": torch.randn(8, 1, 20, 20)}, torch.arange(8) % 3, classes=10
    )
    method = BALM.for_data(images, AVMNISTBackbone())
    fit(method, images, config=TrainConfig(epochs=1, batch_size=4, select="last"))
    assert method.rebalancing.heads.weight.shape == (2, 10, 64)
    values = coalition_logits(method, images[:], coalition_masks(2))
    assert values.shape == (4, 8, 10)

    data = toy()
    net = backbone(data)
    own = BALM(
        net,
        preset="+GRM",
        encoders={m: [net.encoders[m].net[0]] for m in net.modalities},
        output=net.decoder[-1],
        widths=8,
    ).train()
    sum(own(data[:]).losses.values()).backward()
    kept, scaled = (net.encoders["m0"].net[i].weight.grad.clone() for i in (3, 0))
    own.rebalance()
    assert torch.equal(net.encoders["m0"].net[3].weight.grad, kept)
    torch.testing.assert_close(net.encoders["m0"].net[0].weight.grad, own.last["mu"][0] * scaled)


class Joint(Backbone):
    """As GCNet: no encoders, one recurrent net over the concatenated features of a dialogue."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(11, 4, 2, batch_first=True, bidirectional=True)
        self.decoder = nn.Linear(8, 3)

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("a", "b")

    def input_columns(self) -> dict[str, slice]:
        return {"a": slice(0, 6), "b": slice(6, 11)}

    def encode(self, batch: MultimodalBatch) -> dict[str, torch.Tensor]:
        return {m: x.flatten(2) for m, x in batch.features.items()}

    def unimodal_states(self, batch: MultimodalBatch) -> dict[str, torch.Tensor]:
        h = self.encode(batch)
        return {m: self.rnn(torch.cat([x * (m == k) for k, x in h.items()], -1))[0] for m in h}

    def fuse(self, h, present, batch):
        return self.rnn(torch.cat(list(h.values()), -1))[0]

    def decode(self, z):
        return self.decoder(z)


def test_a_backbone_with_one_net_over_all_modalities() -> None:
    batch = dialogues(dtype=torch.float32)
    net = Joint()
    method = BALM(net, {"a": (2, 3), "b": (1, 5)}).train()
    assert method.rebalancing.heads.widths == (8, 8)
    losses = method(batch).losses
    calibrated = method.calibration(batch)
    z = [x.detach().reshape(12, 8) for x in net.unimodal_states(calibrated).values()]
    real = batch.extras["utterance"].flatten()
    said = method.rebalancing.heads(z)
    expected = sum(F.cross_entropy(x[real], batch.target.flatten()[real]) for x in said)
    torch.testing.assert_close(losses["unimodal"], expected)
    sum(losses.values()).backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    method.rebalance()
    a, b = method.last["mu"]
    for name, p in net.named_parameters():
        scaled = before[name].clone()
        if name in ("rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse"):
            scaled[:, :6] *= a
            scaled[:, 6:] *= b
        torch.testing.assert_close(p.grad, scaled)


def test_a_backbone_that_has_neither_encoders_nor_columns_is_refused() -> None:
    net = GenericBackbone(GenericConfig({"a": (1, 3), "b": (1, 5)}, 3))
    net.encoders = nn.ModuleDict()
    with pytest.raises(ValueError, match="encoders: expected the encoder of each modality, the backbone has no"):
        BALM(net, calibration=False)


def test_what_balm_refuses() -> None:
    data = toy()
    net = backbone(data)
    with pytest.raises(ValueError, match="preset: expected one of .*BALM-D.* got 'BALM-X'"):
        BALM(net, preset="BALM-X")
    with pytest.raises(ValueError, match=r"options: unknown options \['rhoo'\]; known are"):
        BALM(net, rhoo=1.0)
    with pytest.raises(ValueError, match=r"encoders: expected one for each of \['m0', 'm1'\], got \['m0'\]"):
        BALM(net, encoders={"m0": net.encoders["m0"]})
    with pytest.raises(ValueError, match=r"encoders\['m1'\]: expected a part of GenericBackbone, it is not"):
        BALM(net, encoders={"m0": net.encoders["m0"], "m1": backbone(data).encoders["m1"]})
    with pytest.raises(ValueError, match=r"feature_shapes: expected those of \['m0', 'm1'\], got \['m0'\]"):
        BALM(net, {"m0": (1, 6)})
    with pytest.raises(ValueError, match="feature_shapes: expected the shapes of the data"):
        BALM(AVMNISTBackbone())

    class Headless(Backbone):
        def __init__(self):
            super().__init__()
            self.encoders = nn.ModuleDict({"m0": nn.Linear(1, 1), "m1": nn.Linear(1, 1)})

    with pytest.raises(ValueError, match="output: expected the fused linear layer, the backbone has no `decoder`"):
        BALM(Headless(), calibration=False)  # whose encoders are linear, so that their widths are known
    unknown = Headless()
    unknown.encoders["m0"] = nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="widths: expected the widths of the encodings"):
        BALM(unknown, output=nn.Linear(1, 1), calibration=False)
    single = toy(M=2).select(["m0"])
    with pytest.raises(ValueError, match="encoders: expected a dict by names with at least 2"):
        balm(single)
    assert balm(single, preset="+FCM")(single[:]).logits.shape == (60, 3)
    maps = data.data.replace(target=torch.zeros(60, 2))
    with pytest.raises(ValueError, match=r"target: expected one a sample \(60,\), got \(60, 2\)"):
        balm(data).train()(maps)


# In the loop


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"preset": "BALM-M", "measure": True}],
    ids=str,
)
def test_an_interrupted_run_resumes_to_the_bit(tmp_path: Path, options: dict) -> None:
    assert_resumes_to_the_bit(tmp_path, options)


def assert_resumes_to_the_bit(tmp_path: Path, options: dict) -> None:
    data, valid = toy(), toy(30, 1)
    config = TrainConfig(epochs=5, batch_size=16, lr=1e-2, schedule="onecycle", clip=1.0, seed=5)
    whole = balm(data, 0.2, **options)
    expected = fit(whole, data, valid, config, train_plan=PLAN)
    with pytest.raises(KeyboardInterrupt):
        fit(
            balm(data, 0.2, **options),
            data,
            valid,
            config,
            train_plan=PLAN,
            callbacks=[Interrupt(11)],
            checkpoint=tmp_path / "r",
        )
    torch.manual_seed(99)
    again = balm(data, 0.2, seed=3, **options)
    history = fit(again, data, valid, config, train_plan=PLAN, callbacks=[Interrupt(-1)], checkpoint=tmp_path / "r")
    assert torch.equal(weights(whole), weights(again))
    for name, value in whole.rebalancing.state_dict().items():
        torch.testing.assert_close(again.rebalancing.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    forget = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert forget(history.epochs) == forget(expected.epochs)


def test_weights_go_to_a_file_and_back(tmp_path: Path) -> None:
    data = toy()
    method, other = balm(data), balm(data, seed=4)
    fit(method, data, config=TrainConfig(epochs=1, select="last"))
    save(method, tmp_path / "balm.pt", preset="paper")
    assert load(other, tmp_path / "balm.pt") == {"preset": "paper"}
    assert torch.equal(predict(method, data), predict(other, data))
    torch.testing.assert_close(other.rebalancing.level, method.rebalancing.level)
    alike = copy.deepcopy(method).train()  # hooks and encoders of a copy are its own
    sum(alike(data[:]).losses.values()).backward()
    alike.rebalance()
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.slow
def test_accumulation_is_the_big_batch() -> None:
    data = toy(64)
    results = []
    for size, accumulation in ((32, 1), (8, 4)):
        method = balm(data, mu_clip=(0.0, 2.6), tau=1.0)
        config = TrainConfig(
            epochs=3, batch_size=size, accumulation=accumulation, optimizer=SGD, select="last", clip=1.0
        )
        history = fit(method, data, config=config, train_plan=PLAN)
        results.append((weights(method), method.rebalancing.level, method.last["mu"], history.epochs[-1]["train_task"]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_trains_in_bf16_and_the_state_stays_in_full_precision() -> None:
    data = toy()
    losses = []
    for precision in ("no", "bf16"):
        method = balm(data, mu_clip=(0.0, 2.6))
        config = TrainConfig(epochs=3, lr=1e-2, batch_size=16, select="last", mixed_precision=precision, clip=1.0)
        losses.append(fit(method, data, config=config, train_plan=PLAN).epochs[-1]["train_task"])
        assert method.rebalancing.level.dtype == torch.float32
        assert torch.isfinite(weights(method)).all()
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.slow
def test_it_compiles() -> None:
    data = toy()
    config = TrainConfig(epochs=2, lr=1e-2, batch_size=16, select="last", compile="eager")
    plain, compiled = balm(data, mu_clip=(0.0, 2.6)), balm(data, mu_clip=(0.0, 2.6))
    fit(compiled, data, config=config)
    fit(plain, data, config=TrainConfig(epochs=2, lr=1e-2, batch_size=16, select="last"))
    torch.testing.assert_close(weights(plain), weights(compiled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"measure": True}, {"cos_on": "grad"}, {"grad_noise": True, "measure": True, "lmod_heads": True}]
)
def test_no_step_waits_for_the_device(options: dict) -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    data = toy()
    batch = MultimodalBatch(data.data.features, data.present, data.target)
    with random_state(0):
        net = GenericBackbone.for_data(data, width=8, encode_absent=True)  # whose rows are not gathered
        method = BALM(net, **options).train()
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    with Reads():
        for _ in range(3):
            sum(method(batch).losses.values()).backward()
            method.rebalance()
            method.rebalancing.withheld.hold()
            nn.utils.clip_grad_norm_(method.parameters(), 1.0)
            method.rebalancing.withheld.give_back()
            optimizer.step()
            optimizer.zero_grad()
    assert Reads.count == 0


def parallel_run() -> dict[str, torch.Tensor]:
    """What processes must agree on with one: uneven and empty shards, accumulation, cosines, clipping."""
    found = {}
    for name, n, accumulation in (("uneven", 41, 1), ("accumulated", 41, 2)):
        data = toy(n)
        method = balm(data, mu_clip=(0.0, 2.6), tau=1.0)
        config = TrainConfig(epochs=3, batch_size=10, accumulation=accumulation, optimizer=SGD, clip=1.0, select="last")
        fit(method, data, config=config, train_plan=PLAN)
        found[f"{name}.weights"] = weights(method)
        for key, value in method.rebalancing.state_dict().items():
            found[f"{name}.{key}"] = value
    noisy = balm(toy(41), grad_noise=True)
    fit(noisy, toy(41), config=TrainConfig(epochs=1, batch_size=10, optimizer=SGD, select="last"))
    found["noisy"] = weights(noisy)
    return found


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    one = parallel_run()
    first, second = two_processes(tmp_path, "methods.test_balm")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, equal_nan=True)
        if name != "noisy":  # whose noise is drawn between other random numbers
            torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-4, equal_nan=True)


# Masks of Eq. 36


def test_masks_of_the_papers_settings() -> None:
    """Shared 0.7 is really 0.586; the bound prod r / M; whole dialogues share a pattern when blocks are asked for."""
    achieved = 1 - imbalanced_mask(5810, (0.7, 0.7, 0.7), torch.Generator().manual_seed(0)).double().mean(0)
    assert achieved.tolist() == pytest.approx([0.5857] * 3, abs=5e-4)
    achieved = 1 - imbalanced_mask(5810, (0.5, 0.7, 0.3), torch.Generator().manual_seed(0)).double().mean(0)
    assert achieved.tolist() == pytest.approx([0.4651, 0.6651, 0.2651], abs=1e-4)
    assert all(abs(r - a) <= 0.105 / 3 + 1e-3 for r, a in zip((0.5, 0.7, 0.3), achieved.tolist(), strict=True))
    g = torch.Generator().manual_seed(0)
    features = {m: torch.randn(30, 20, 1, 2, generator=g) for m in "alv"}
    talks = MultimodalDataset(MultimodalBatch(features, torch.ones(30, 20, 3, dtype=torch.bool), ids=torch.arange(30)))
    share = {}
    for assign in ("shuffled", "blocked"):
        mask = MissingPlan("imbalanced", rates=[0.5, 0.7, 0.3], assign=assign, seed=3).draw(talks)
        assert list(mask.realised()["rates"].values()) == pytest.approx([0.465, 0.665, 0.265], abs=5e-3)
        assert mask.realised()["empty"] == 0
        code = (mask.present.long() * torch.tensor([4, 2, 1])).sum(-1)
        share[assign] = (code == code[:, :1]).all(-1).double().mean().item()
    assert share["shuffled"] == 0
    assert share["blocked"] > 0.7


# It learns, and the runner knows it


@pytest.mark.slow
def test_it_learns_digits_with_parts_missing() -> None:
    splits = sources.load("digits")
    plan = MissingPlan("imbalanced", rates=[0.5, 0.3, 0.7], seed=0)
    with random_state(0):
        method = BALM.for_data(splits["train"], GenericBackbone.for_data(splits["train"]))
    fit(method, splits["train"], splits["valid"], TrainConfig(epochs=12, lr=3e-3, clip=2.0), train_plan=plan)
    accuracy = (predict(method, splits["test"]).argmax(-1) == splits["test"].target).double().mean()
    assert accuracy > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BALM", "CGGM", "OGMGE"])
def test_the_runner_knows_it(name: str) -> None:
    config = {
        "data": "digits",
        "method": name,
        "method_options": {"preset": "BALM-D", "mu_clip": [0.0, 3.9]} if name == "BALM" else {},
        "backbone_options": {"width": 16},
        "train_plan": {"kind": "imbalanced", "rates": [0.5, 0.3, 0.7]},
        "train": {"epochs": 2, "lr": 1e-2, "clip": 2.0},
        "profile": "tiny",
    }
    rows = train_and_score(config)
    assert [row["value"] for row in rows] == [row["value"] for row in train_and_score(config)]
    assert rows[-1]["value"] > 0.3


@pytest.mark.slow
def test_a_foreign_net_trains_in_the_loop() -> None:
    """The plug-in inside a method of one's own, with `fit` doing the rest."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Foreign()
            self.grm = GradientRebalancing(self.net, {"a": self.net.ears, "b": self.net.eyes}, self.net.out, 5)

        def forward(self, batch: MultimodalBatch) -> Output:
            logits = self.net(*(x[:, 0] for x in batch.features.values()))
            if not self.training:
                return Output(logits, {})
            task = F.cross_entropy(logits, batch.target)
            return Output(logits, {"task": task, **self.grm(logits, batch.target)})

        def on_backward(self, state) -> None:
            self.grm.rebalance()

    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (90,), generator=g)
    x = {m: torch.randn(90, w, generator=g) + 2 * F.one_hot(y, w) for m, w in (("a", 4), ("b", 3))}
    data = MultimodalDataset.from_arrays(x, y)
    method = Mine()
    history = fit(method, data, config=TrainConfig(epochs=20, lr=1e-2, batch_size=30, select="last"))
    assert (predict(method, data).argmax(-1) == y).double().mean() > 0.85
    assert history.epochs[-1]["train_modulation"] >= 0


def test_calibration_ignores_what_stands_in_padding() -> None:
    plain = dialogues().features
    real = dialogues().extras["utterance"]
    present = torch.ones(3, 4, 2, dtype=torch.bool)
    module = FeatureCalibration({"a": (2, 3), "b": (1, 5)}).double()
    found = []
    for value in (0.0, 7.0):
        features = {m: torch.where(real[..., None, None], x, value) for m, x in plain.items()}
        found.append(module(MultimodalBatch(features, present, extras={"utterance": real})).features)
    for m in plain:
        assert torch.equal(found[0][m], found[1][m])
        assert found[1][m][0, 1:].abs().sum() == 0
