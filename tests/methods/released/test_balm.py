"""BALM's other interpretations: each option by hand, by the literal loop or by differences; and their classes."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from baselines.runs import toy
from methods.test_balm import (
    Foreign,
    assert_is_the_literal_loop,
    assert_resumes_to_the_bit,
    balm,
    discrepancy_by_loops,
    lmod_by_loops,
    plugged,
    stream,
)
from torch import nn
from torch.nn import functional as F

from mmlib import BALM
from mmlib.methods.balm import BALMConfig, GradientRebalancing, modulation_coefficients
from mmlib.methods.released.balm import ReleasedBALM, ReleasedBALMConfig, ReleasedRebalancing


def test_the_paper_s_class_finds_the_interpretation() -> None:
    data = toy()
    plain, released = balm(data), balm(data, preset="released")
    assert type(plain) is BALM
    assert type(plain.config) is BALMConfig
    assert type(plain.rebalancing) is GradientRebalancing
    assert type(released) is ReleasedBALM
    assert isinstance(released, BALM)
    assert type(released.rebalancing) is ReleasedRebalancing
    assert type(balm(data, preset="+GRM", mu_clip=[0.0, 2.0])) is ReleasedBALM
    assert balm(data, mu_clip=[0.0, 2.0]).config.mu_clip == (0.0, 2.0)
    assert type(copy.deepcopy(released)) is ReleasedBALM
    assert type(plugged(Foreign(), smoothing=0.5)) is ReleasedRebalancing
    assert "epoch_sums" not in plain.rebalancing.state_dict()


@pytest.mark.parametrize("scores", [False, True], ids=["classes", "scores"])
@pytest.mark.parametrize(
    "options",
    [
        {"tau": 3.0, "lmod": "cggm"},
        {"smoothing": 0.7},
        {"mu_clip": (0.0, 1.0)},
        {"mu_constant": 0.6},
        {"mu_constant": (0.2, 1.5)},
        {"cosine_columns": (1, 0), "tau": 2.0},
    ],
    ids=str,
)
def test_training_is_the_literal_loop(options: dict, scores: bool) -> None:
    assert_is_the_literal_loop(options, scores)


def test_cosines_of_gradients_and_their_second_derivative() -> None:
    """``cos_on="grad"``: cosines by hand from the closed form of a softmax layer's gradient; L_mod by differences."""
    (audio, image, y), (audio2, image2, y2) = stream(steps=2)
    net = Foreign().double()
    grm = plugged(net, cos_on="grad", tau=0.5)
    first = grm(net(audio, image), y)
    assert first["modulation"].item() == 0  # there are no coefficients yet
    (F.cross_entropy(net(audio, image), y) + sum(first.values())).backward()
    grm.rebalance()
    c = grm.mu / 1.3
    grm.zero_grad()

    one = F.one_hot(y2, 3).double()
    of = lambda logits, h: ((logits.softmax(-1) - one).T @ h / len(y2)).flatten()
    z = [net.ears(audio2).detach(), net.eyes(image2).detach()]
    hidden, unimodal = [torch.relu(layer(x)) for layer, x in zip(grm.heads.first, z, strict=True)], grm.heads(z)
    own = [of(unimodal[m], hidden[m]).detach() for m in range(2)]  # nothing of L_mod goes back through the heads

    def cosines() -> torch.Tensor:
        h = torch.relu(net.mix(torch.cat([net.ears(audio2), net.eyes(image2)], -1)))
        return torch.stack([F.cosine_similarity(of(net.out(h), h), g, 0) for g in own])

    net.zero_grad()
    term = grm(net(audio2, image2), y2)["modulation"]
    with torch.no_grad():
        assert term.item() == pytest.approx(0.5 * (c * cosines()).abs().mean().item(), rel=1e-9)
    term.backward()
    for p in (net.ears[0].weight, net.mix.weight, net.out.weight):  # it reaches the encoders too
        with torch.no_grad():
            p.view(-1)[1] += 1e-5
            up = 0.5 * (c * cosines()).abs().mean().item()
            p.view(-1)[1] -= 2e-5
            down = 0.5 * (c * cosines()).abs().mean().item()
            p.view(-1)[1] += 1e-5
        assert p.grad.view(-1)[1].item() == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-9)
    assert grm.heads.weight.grad is None  # the heads do not learn from it, unless they are told to
    also_net = Foreign().double()
    also = plugged(also_net, cos_on="grad", tau=0.5, lmod_heads=True)
    also(also_net(audio, image), y)
    also.rebalance()
    also(also_net(audio2, image2), y2)["modulation"].backward()
    assert also.heads.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("lmod_heads", [False, True])
def test_lmod_reaches_the_heads_on_request(lmod_heads: bool) -> None:
    (audio, image, y), (audio2, image2, y2) = stream(steps=2)
    net = Foreign().double()
    grm = plugged(net, lmod_heads=lmod_heads, tau=1.0)
    grm(net(audio, image), y)
    grm.rebalance()
    head, fused = grm.heads.weight.detach().clone(), net.out.weight.detach().clone()
    c = (grm.mu / 1.3).tolist()
    term = grm(net(audio2, image2), y2)["modulation"]
    value = lmod_by_loops(fused.flatten().tolist(), head.flatten(1).tolist(), c, "abs")[1]
    assert term.item() == pytest.approx(value, rel=1e-9)
    term.backward()
    for p, base in ((net.out.weight, fused), (grm.heads.weight, head)):
        if p is grm.heads.weight and not lmod_heads:
            assert p.grad is None
            continue
        values = []
        for shift in (1e-6, -1e-6):
            moved = base.clone()
            moved.view(-1)[2] += shift
            a, b = (moved, head) if p is net.out.weight else (fused, moved)
            values.append(lmod_by_loops(a.flatten().tolist(), b.flatten(1).tolist(), c, "abs")[1])
        assert p.grad.view(-1)[2].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)
    assert all(p.grad is None for p in net.ears.parameters())


def test_noise_has_the_spread_of_the_scaled_gradient() -> None:
    audio, image, y = next(stream())
    runs = []
    for noise in (False, True):
        net = Foreign().double()
        net.ears = nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 5)).double()
        grm = plugged(net, grad_noise=noise)
        assert grm.config.grad_noise is noise
        (F.cross_entropy(net(audio, image), y) + grm(net(audio, image), y)["unimodal"]).backward()
        grm.rebalance()
        runs.append([net.ears[0].weight.grad, net.eyes[0].bias.grad, net.mix.weight.grad])
    for (plain, noisy), differs in zip(zip(*runs, strict=True), (True, True, False), strict=True):
        assert torch.equal(plain, noisy) is not differs
    ratio = (runs[1][0] - runs[0][0]).std() / runs[0][0].std()
    assert 0.9 < ratio < 1.1
    assert plugged(Foreign(), preset="released").config.grad_noise


def test_samples_that_are_padding_or_miss_the_modality() -> None:
    """Heads and discrepancies over all real samples, or over those that have the modality."""
    audio, image, y = next(stream())
    real = torch.arange(12) < 9
    present = torch.stack([torch.arange(12) % 2 == 0, torch.arange(12) % 3 == 0], -1)
    found = {}
    for samples in ("all", "present"):
        net = Foreign().double()
        grm = plugged(net, samples=samples)
        logits = net(audio, image)
        z = [net.ears(audio).detach(), net.eyes(image).detach()]
        loss = grm(logits, y, dict(zip(("audio", "image"), z, strict=True)), present, real)["unimodal"]
        grm.rebalance()
        unimodal = grm.heads(z)
        for m in range(2):
            keep = real & present[:, m] if samples == "present" else real
            kl = discrepancy_by_loops(logits.detach()[keep], unimodal.detach()[m : m + 1, keep], y[keep], "kl", False)
            assert grm.level[m].item() == pytest.approx(kl.mean(), rel=1e-9)
        expected = sum(
            F.cross_entropy(
                unimodal[m][real & present[:, m] if samples == "present" else real],
                y[real & present[:, m] if samples == "present" else real],
            )
            for m in range(2)
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        found[samples] = grm.level
    assert not torch.allclose(found["all"], found["present"])
    with pytest.raises(ValueError, match="present: expected bool .* for samples='present', got None"):
        grm(net(audio, image), y)


def test_a_modality_without_a_sample_and_values_that_are_not_finite_change_nothing() -> None:
    net = Foreign().double()
    grm = plugged(net, samples="present")
    (audio, image, y), (audio2, image2, y2), (audio3, image3, y3) = stream(steps=3)
    everything = torch.ones(12, 2, dtype=torch.bool)
    grm(net(audio, image), y, present=everything)
    grm.rebalance()
    level = grm.level.clone()
    grm(net(audio2, image2), y2, present=torch.stack([everything[:, 0], ~everything[:, 1]], -1))
    grm.rebalance()
    assert grm.level[1] == level[1]
    assert grm.last["change"][1] == 0
    assert grm.last["mu"].tolist() == pytest.approx([0, 1.3], abs=1e-5)
    level = grm.level.clone()
    logits = net(audio3, image3)
    grm(logits * math.nan, y3, present=everything)
    grm.rebalance()
    assert torch.equal(grm.level, level)
    assert torch.isfinite(grm.mu).all()
    assert torch.isfinite(grm.lmod_fused).all()


def test_an_epoch_s_mean_rules_the_next_epoch() -> None:
    net = Foreign().double()
    grm = plugged(net, interval="epoch")
    batches = list(stream(steps=6))
    means, seen = [], []
    for epoch in range(3):
        each = []
        for audio, image, y in batches[2 * epoch : 2 * epoch + 2]:
            net.zero_grad()
            logits = net(audio, image)
            (F.cross_entropy(logits, y) + grm(logits, y)["unimodal"]).backward()
            raw = net.ears[0].weight.grad.clone()
            grm.rebalance()
            each.append(grm.last["discrepancy"].clone())
            seen.append((net.ears[0].weight.grad / raw).mean().item())
            with torch.no_grad():
                for p in [*net.parameters(), *grm.parameters()]:
                    p -= 0.1 * (p.grad if p.grad is not None else 0)
        grm.finish_epoch()
        means.append(torch.stack(each).mean(0))
    one = modulation_coefficients(means[0], 1.3)[0].item()
    two = modulation_coefficients(means[0] - means[1], 1.3)[0].item()
    assert seen == pytest.approx([1, 1, one, one, two, two], rel=1e-6)
    assert grm.epoch_sums.abs().sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": "some"}, "samples: expected 'all' or 'present'"),
        ({"smoothing": 1.0}, r"smoothing: expected a number in \[0, 1\)"),
        ({"interval": "batch"}, "interval: expected 'step' or 'epoch'"),
        ({"cos_on": "bias"}, "cos_on: expected 'weight' or 'grad'"),
        ({"lmod": "square"}, "lmod: expected 'abs' or 'cggm'"),
        ({"mu_clip": (1.0, 0.0)}, r"mu_clip: expected None or a pair \(low, high\)"),
        ({"mu_clip": [0.0]}, "mu_clip: expected None or "),
        ({"mu_constant": -1.0}, "mu_constant: expected None or a number of at least 0"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReleasedBALMConfig(**options)


def test_options_that_do_not_fit_the_modalities() -> None:
    net = Foreign()
    with pytest.raises(ValueError, match=r"cosine_columns: expected an order of 0 to 1, got \(0, 2\)"):
        plugged(net, cosine_columns=(0, 2))
    with pytest.raises(ValueError, match="mu_constant: expected one number or 2"):
        plugged(net, mu_constant=(1.0, 1.0, 1.0))
    y, z = torch.zeros(4, dtype=torch.long), {"audio": torch.zeros(4, 5), "image": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match="output: expected the layer that the logits come from"):
        plugged(net, catch=False, cos_on="grad")(torch.zeros(4, 3, requires_grad=True), y, z)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"cos_on": "grad"}, {"interval": "epoch", "smoothing": 0.5}, {"preset": "released", "measure": True}],
    ids=str,
)
def test_an_interrupted_run_resumes_to_the_bit(tmp_path: Path, options: dict) -> None:
    assert_resumes_to_the_bit(tmp_path, options)
