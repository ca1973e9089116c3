"""The preset "released" against numbers of BALM's release, from equal weights and inputs.

`fixtures/balm_release.npz` is cut from two files of the release's first steps on MMGCN (4 dialogues of 7 utterances,
modalities audio, vision, language, rho 1.4, tau .3, no noise): the weights of the output layers at the first step, and
the release's KL, Delta, mu, cosines and L_mod of every step. Where the whole files are at hand, in `shared/fixtures`
beside the repository, whole steps are compared: losses, gradients, clipping and the weights afterwards.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmlib import BALM, MultimodalBatch
from mmlib.backbones.mmgcn import MMGCNBackbone, MMGCNConfig
from mmlib.methods.balm import GradientRebalancing
from mmlib.methods.released.balm import MEETS, ReleasedBALM, ReleasedRebalancing

SMALL = Path(__file__).parents[1] / "fixtures" / "balm_release.npz"
WHOLE = Path(__file__).parents[4] / "shared" / "fixtures"
WIDTHS = {"audio": 12, "vision": 8, "language": 16}
STEPS = {"classes": (6, 2), "scores": (1, 3)}  # K, steps
OURS = {"audio": "vision", "vision": "language", "language": "audio"}  # whose mu each cosine meets


def rebalancing(kind: str, names: list[str], found: dict[str, np.ndarray]) -> ReleasedRebalancing:
    """GRM of the release with the stored output layers, its modalities in this order."""
    net = nn.ModuleDict({**{m: nn.Linear(2, 2) for m in names}, "output": nn.Linear(900, STEPS[kind][0])})
    encoders, options = {m: net[m] for m in names}, {"rho": 1.4, "tau": 0.3, "grad_noise": False}
    grm = GradientRebalancing(net, encoders, net["output"], 2, preset="released", **options)
    assert type(grm) is ReleasedRebalancing
    with torch.no_grad():
        net["output"].weight.copy_(torch.tensor(found[f"{kind}:fused"]))
        grm.heads.weight.copy_(torch.tensor(found[f"{kind}:heads"])[[list(WIDTHS).index(m) for m in names]])
    return grm


@pytest.mark.parametrize("names", [["audio", "vision", "language"], ["audio", "language", "vision"]], ids="-".join)
@pytest.mark.parametrize("kind", STEPS)
def test_coefficients_and_cosines_in_any_order_of_the_modalities(kind: str, names: list[str]) -> None:
    found = dict(np.load(SMALL, allow_pickle=False))
    grm, order = rebalancing(kind, names, found), [list(WIDTHS).index(m) for m in names]
    for step in range(1, STEPS[kind][1] + 1):
        release = {n: found[f"{kind}:release{step}:{n}"] for n in ("kl", "delta", "mu", "cosine", "lmod")}
        change = grm.advance(torch.tensor(release["kl"])[order].float(), torch.ones(3))
        assert change.numpy() == pytest.approx(release["delta"][order], rel=1e-4, abs=1e-7)  # of two float32 numbers
        assert grm.mu.numpy() == pytest.approx(release["mu"][order], rel=1e-3)
        if step == 1:  # the weights are those before the first update
            with torch.no_grad():
                cosine = grm.compare(grm.mu / 1.4)
            assert cosine.numpy() == pytest.approx(release["cosine"][order], rel=1e-5)
            assert grm.lmod_value.item() == pytest.approx(float(release["lmod"]), rel=1e-5)


def test_whose_coefficient_meets_whose_cosine() -> None:
    """By hand: mu/rho = (1, 10, 100) for audio, vision, language meet the cosines of language, audio, vision."""
    c = dict(zip(WIDTHS, (1.0, 10.0, 100.0), strict=True))
    assert {cosine: mu for mu, cosine in MEETS.items()} == OURS
    for names in (["audio", "vision", "language"], ["language", "vision", "audio"]):
        net = nn.ModuleDict({**{m: nn.Linear(2, 2) for m in names}, "output": nn.Linear(2, 1)})
        grm = GradientRebalancing(net, {m: net[m] for m in names}, net["output"], 2, preset="released")
        assert grm._paired(torch.tensor([c[m] for m in names])).tolist() == [c[OURS[m]] for m in names]
    net = nn.ModuleDict({**{m: nn.Linear(2, 2) for m in "abc"}, "output": nn.Linear(2, 1)})
    other = GradientRebalancing(net, {m: net[m] for m in "abc"}, net["output"], 2, preset="released")
    assert other._paired(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0, 2.0, 3.0]


def test_scores_have_squared_errors_in_the_preset_alone() -> None:
    logits, scores = torch.tensor([[1.5], [-2.0]]), torch.tensor([0.5, 1.0])
    net = MMGCNBackbone(MMGCNConfig(input_widths={"a": 2, "b": 2}, outputs=1, width=4, hidden=2, layers=1))
    shapes = {"a": (1, 2), "b": (1, 2)}
    paper, released = BALM(net, shapes), BALM(net, shapes, preset="released")
    assert paper.criterion(logits, scores).tolist() == [1.0, 3.0]
    assert released.criterion(logits, scores).tolist() == [1.0, 9.0]
    assert released.rebalancing.criterion is released.criterion
    classes = torch.tensor([0, 1])
    two = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert released.criterion(two, classes).tolist() == pytest.approx([np.log(2)] * 2)
    mine = lambda logits, target: logits[:, 0]
    assert BALM(net, shapes, preset="released", criterion=mine).criterion is mine
    with pytest.raises(ValueError, match="score_loss: expected 'absolute' or 'squared', got 'mse'"):
        BALM(net, shapes, score_loss="mse")
    with pytest.raises(ValueError, match="cosine_columns: expected .*'released'"):
        BALM(net, shapes, cosine_columns="paper")


@pytest.mark.parametrize("kind", STEPS)
def test_whole_steps_are_those_of_the_release(kind: str) -> None:
    path = WHOLE / f"balm_mmgcn_release_{kind}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    found = dict(np.load(path, allow_pickle=False))
    K, steps = STEPS[kind]
    net = MMGCNBackbone(MMGCNConfig(input_widths=WIDTHS, outputs=K, dropout=0.0))
    options = {"rho": 1.4, "tau": 0.3, "grad_noise": False}
    method = BALM(net, {m: (1, width) for m, width in WIDTHS.items()}, preset="released", **options)
    assert type(method) is ReleasedBALM
    weights = {name[7:]: torch.tensor(x) for name, x in found.items() if name.startswith("weight:")}
    assert set(weights) == {name for name, _ in method.named_parameters()}
    method.load_state_dict(weights, strict=False)
    method.train()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3, weight_decay=3e-5)
    encoders = [p for m in WIDTHS for p in net.encoders[m].linear.parameters()]
    encoders += list(net.encoders["language"].rnn.parameters())
    for step in range(1, steps + 1):
        given = {name.split(":")[1]: torch.tensor(x) for name, x in found.items() if name.startswith(f"step{step}:")}
        features, speaker = {m: given[m] for m in WIDTHS}, {"speaker": given["speaker"]}
        out = method(MultimodalBatch(features, given["present"], target=given["target"], extras=speaker))
        sum(out.losses.values()).backward()
        method.rebalance()
        last = method.last
        ours = {
            "task": out.losses["task"].detach(), "kl": last["discrepancy"], "delta": last["change"], "mu": last["mu"],
            "cosine": last["cosine"], "lmod": method.rebalancing.lmod_value,
            "scaled_gradients": torch.cat([p.grad.flatten() for p in encoders]),
            "fused_gradient": net.decoder[-1].weight.grad.clone(),
        }  # fmt: skip
        method.rebalancing.withheld.hold()
        ours["clip_norm"] = nn.utils.clip_grad_norm_(method.parameters(), 2.0)
        method.rebalancing.withheld.give_back()
        optimizer.step()
        optimizer.zero_grad()
        ours["fused_weight_after"] = net.decoder[-1].weight.detach()
        for name, x in ours.items():
            theirs = found[f"release{step}:{name}"]
            furthest = np.abs(x.double().numpy() - theirs).max() / np.abs(theirs).max()
            assert furthest < 1e-5, f"step {step}, {name}: {furthest:.1e}"
