"""Speed of an MCE step at the MMIN shapes: over its baseline, against a literal loop, and with more modalities.

The baseline is the backbone with the reconstruction module and the task loss alone. Frozen models do not run in a step:
their bounds are a table.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmlib import MultimodalBatch
from mmlib.backbones import MMINBackbone, MMINConfig
from mmlib.coalitions import coalition_rows
from mmlib.losses import sample_losses, task_loss
from mmlib.methods.mce import MCE, UpperBounds

B = 128
SHAPES = {"audio": (64, 130), "vision": (50, 342), "language": (22, 1024)}
PRESENT = {"audio": 0.8, "vision": 0.2, "language": 0.5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def make(copies: int = 1, device: str = "cpu", **options) -> tuple[MCE, MultimodalBatch]:
    """MCE on the MMIN nets and a batch with imbalanced presence; ``copies`` of the three modalities make M = 6, ..."""
    torch.manual_seed(0)
    names = [f"{name}{i or ''}" for i in range(copies) for name in SHAPES]
    shapes = [SHAPES[name] for _ in range(copies) for name in SHAPES]
    rates = torch.tensor([PRESENT[name] for _ in range(copies) for name in SHAPES])
    present = torch.rand(B, len(names)) < rates
    present[~present.any(-1), 0] = True
    batch = MultimodalBatch(
        {name: torch.randn(B, *shape) for name, shape in zip(names, shapes, strict=True)},
        torch.ones(B, len(names), dtype=torch.bool),
        target=torch.randint(0, 4, (B,)),
        ids=torch.arange(B),
    ).drop(present=present)
    kinds = {name: "textcnn" if name.startswith("language") else "lstm" for name in names}
    widths = {name: shape[-1] for name, shape in zip(names, shapes, strict=True)}
    backbone = MMINBackbone(MMINConfig(widths, nets=kinds))
    upper = UpperBounds((torch.rand(B, len(names)) < 0.7).float(), batch.ids, tuple(names))
    model = MCE(backbone, upper, hidden=2048, present=present, **options).to(device).train()
    return model, batch.to(device)


def baseline(model: MCE, batch: MultimodalBatch) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        task_loss(model.evaluator(batch), batch.target).backward()

    return step


def full(model: MCE, batch: MultimodalBatch) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        torch.stack(list(model(batch).losses.values())).sum().backward()

    return step


@pytest.mark.benchmark(group="MCE step, MMIN shapes, B = 128")
@pytest.mark.parametrize("device", DEVICES)
def test_step_over_baseline(benchmark, best, device):
    """All coalitions, exact values. The paper prints 12.7 for this ratio."""
    model, batch = make(device=device)
    ours, base = full(model, batch), baseline(model, batch)
    benchmark(ours)
    time_ours, time_base = best(ours, base)
    benchmark.extra_info["over_baseline"] = round(time_ours / time_base, 2)
    print(f"\nMCE step on {device}: {time_ours / time_base:.2f} times the baseline step")


@pytest.mark.benchmark(group="MCE step, MMIN shapes, B = 128")
@pytest.mark.parametrize("start", ["inputs", "encodings"])
def test_coalitions_against_the_loop(benchmark, best, start):
    """The subset losses of a batch and their gradients: batched, and a sample and a subset at a time.

    From the inputs, the loop runs the model on each sample with each subset of what it has. From the encodings, both
    have them for nothing: reconstruction, fusion and decoder remain, which one thread computes near its peak.
    """
    model, batch = make()
    model.eval()  # one sample has no batch statistics
    with torch.no_grad():
        known = model.backbone.encode(batch)
    pairs = model._pairs(batch.present)
    rows, sets = pairs.row.tolist(), [m.nonzero()[:, 0].tolist() for m in pairs.members]

    def one_pass() -> Tensor:
        model.zero_grad()
        h = known if start == "encodings" else model.backbone.encode(batch)
        logits = coalition_rows(model.evaluator, batch, pairs.row, pairs.members, encodings=h)
        loss = sample_losses(logits, batch.target[pairs.row]).sum()
        loss.backward()
        return loss.detach()

    def loop() -> Tensor:
        model.zero_grad()
        total = torch.zeros(())
        for n, members in zip(rows, sets, strict=True):
            if start == "inputs":
                kept = torch.zeros(1, len(known), dtype=torch.bool)
                kept[0, members] = True
                logits = model.evaluator(batch[n : n + 1].drop(present=kept))
            else:
                there = [x[n] if m in members else torch.zeros_like(x[n]) for m, x in enumerate(known.values())]
                logits = model.backbone.decoder(model.reconstruction(torch.stack(there)[None]).flatten(1))
            total = total + sample_losses(logits, batch.target[n : n + 1]).sum()
        total.backward()
        return total.detach()

    torch.testing.assert_close(one_pass(), loop(), rtol=1e-4, atol=1e-3)
    benchmark(one_pass)
    time_ours, time_loop = best(one_pass, loop, repeats=3)
    benchmark.extra_info["ratio"] = round(time_loop / time_ours, 1)
    benchmark.extra_info["pairs"] = len(rows)
    print(f"\n{len(rows)} pairs from the {start}: {time_loop / time_ours:.1f} times the loop")


@pytest.mark.benchmark(group="MCE step, MMIN shapes, B = 128")
@pytest.mark.parametrize("device", DEVICES)
def test_six_modalities_with_drawn_coalitions(benchmark, best, device):
    """Seven coalitions a step, M = 6, over all coalitions, M = 3."""
    six, many = make(2, device, subsets=7)
    three, few = make(1, device)
    drawn = full(six, many)
    benchmark(drawn)
    time_six, time_three = best(drawn, full(three, few))
    benchmark.extra_info["over_three_modalities"] = round(time_six / time_three, 2)
    print(f"\nM = 6 with subsets = 7 on {device}: {time_six / time_three:.2f} times M = 3")
