"""Speed of a BALM step, FCM and GRM together, over the same step of the plain backbone.

A step is everything that training does with a batch: forward, backward, what the method does to the gradients,
clipping to norm 2, Adam.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mmlib import BALM, MultimodalBatch
from mmlib.backbones import (
    AVMNISTBackbone,
    GenericBackbone,
    GenericConfig,
    MMGCNBackbone,
    MMGCNConfig,
    MMINBackbone,
    MMINConfig,
)
from mmlib.baselines import CGGM, OGMGE, JointTraining

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
IEMOCAP = {"audio": (1, 1582), "language": (1, 1024), "vision": (1, 342)}
NETS = {  # shapes of a sample, leading shape, classes
    "mmgcn": (IEMOCAP, (16, 50), 6),
    "mmgcn-4": (IEMOCAP, (4, 50), 6),  # so few dialogues that the recurrent net waits for its steps
    "mmgcn-4-padded": (IEMOCAP, (4, 50), 6),
    "dialogues": (IEMOCAP, (16, 50), 6),  # a generic net: two layers a modality, the lightest that FCM can meet
    "digits": ({"left": (8, 4), "right": (8, 4), "projection": (1, 16)}, (64,), 10),
    "sequences": ({"audio": (64, 130), "vision": (50, 342), "language": (22, 1024)}, (128,), 4),  # the MMIN nets
    "avmnist": ({"image": (1, 28, 28), "audio": (1, 20, 20)}, (128,), 10),
}


def make(net: str, device: str) -> tuple[nn.Module, MultimodalBatch]:
    shapes, lead, classes = NETS[net]
    torch.manual_seed(0)
    present = torch.rand(*lead, len(shapes)) < torch.tensor([0.5, 0.3, 0.7])[: len(shapes)]
    present[..., 0] |= ~present.any(-1)
    batch = MultimodalBatch(
        {name: torch.randn(*lead, *shape) for name, shape in shapes.items()},
        torch.ones_like(present),
        target=torch.randint(0, classes, lead),
        extras={"utterance": torch.ones(lead, dtype=torch.bool), "speaker": torch.randint(0, 2, lead)},
    ).drop(present=present)
    if net.startswith("mmgcn"):
        widths = {name: shape[-1] for name, shape in shapes.items()}
        backbone: nn.Module = MMGCNBackbone(MMGCNConfig(widths, packed=not net.endswith("padded")))
    elif net == "avmnist":
        backbone = AVMNISTBackbone()
    elif net == "sequences":
        kinds = {name: "textcnn" if name == "language" else "lstm" for name in shapes}
        backbone = MMINBackbone(MMINConfig({name: shape[-1] for name, shape in shapes.items()}, nets=kinds))
    else:
        backbone = GenericBackbone(GenericConfig(shapes, classes, width=200 if net == "dialogues" else 64))
    return backbone.to(device), batch.to(device)


def step(method: nn.Module, batch: MultimodalBatch, fused: bool | None = None) -> Callable[[], None]:
    method.train()
    optimizer = torch.optim.Adam(method.parameters(), 1e-3, fused=fused)
    rebalance = getattr(method, "rebalance", lambda: None)

    def one() -> None:
        torch.stack(list(method(batch).losses.values())).sum().backward()
        rebalance()
        nn.utils.clip_grad_norm_(method.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()

    return one


@pytest.mark.benchmark(group="BALM step over the plain step")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("net", sorted(NETS))
def test_step_over_the_plain_step(benchmark, best, net, device):
    """FCM and GRM together; the aim is 1.25."""
    backbone, batch = make(net, device)
    plain = step(JointTraining(backbone), batch)
    shapes = NETS[net][0]
    presets = [BALM(make(net, device)[0], shapes, preset=preset).to(device) for preset in ("paper", "+FCM", "+GRM")]
    balm, calibrated, rebalanced = (step(preset, batch) for preset in presets)
    benchmark(balm)
    base, *times = best(plain, balm, calibrated, rebalanced, repeats=30)
    names = "over_plain", "calibration_alone", "rebalancing_alone"
    parts = {name: value / base for name, value in zip(names, times, strict=True)}
    benchmark.extra_info.update({name: round(value, 2) for name, value in parts.items()})
    print(f"\n{net} on {device}: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))


@pytest.mark.benchmark(group="BALM step over the plain step")
def test_gates_and_the_optimizer_in_a_batch_of_four(benchmark, best):
    """FCM has three times the parameters of the network: what it adds in small batches is their optimizer's."""
    shapes, batch = NETS["mmgcn-4"][0], make("mmgcn-4", "cpu")[1]
    methods = [(kind, fused) for fused in (None, True) for kind in ("plain", "+FCM")]
    steps = []
    for kind, fused in methods:
        backbone = make("mmgcn-4", "cpu")[0]
        method = JointTraining(backbone) if kind == "plain" else BALM(backbone, shapes, preset="+FCM")
        steps.append(step(method, batch, fused))
    benchmark(steps[1])
    plain, gates, plain_fused, gates_fused = best(*steps, repeats=30)
    found = {"calibration_over_plain": gates / plain, "with_fused_adam": gates_fused / plain_fused}
    benchmark.extra_info.update({name: round(value, 2) for name, value in found.items()})
    print("\n" + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))


@pytest.mark.benchmark(group="BALM step over the plain step")
@pytest.mark.parametrize("method", [CGGM, OGMGE], ids=["cggm", "ogm_ge"])
def test_baselines_over_the_plain_step(benchmark, best, method):
    backbone, batch = make("sequences", "cpu")
    plain, ours = step(JointTraining(backbone), batch), step(method(make("sequences", "cpu")[0]), batch)
    benchmark(ours)
    taken, base = best(ours, plain, repeats=30)
    value = taken / base
    benchmark.extra_info["over_plain"] = round(value, 2)
    print(f"\n{method.__name__}: {value:.2f} times the plain step")
