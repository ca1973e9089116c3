"""What DREAM's contribution evaluation costs, at the shapes of CMU-MOSEI: M = 3, B = 32, T = 50.

The evaluation is all 2^M predictions, PSS and PAS of a batch. It is set against a training step of DREAM (that has it
inside), against 2^M plain forward passes of the evaluator, and, at test time, against the evaluator's own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmlib import DREAM, MultimodalBatch, MultimodalDataset
from mmlib.backbones import CorrKDEvaluator, MLPEvaluator, Table3Evaluator
from mmlib.coalitions import coalition_masks, prediction_accuracy_score, prediction_shift_score

B, SHAPES = 32, {"language": (50, 300), "audio": (50, 74), "vision": (50, 35)}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
NETS = {"table3": Table3Evaluator, "corrkd": CorrKDEvaluator, "mlp": MLPEvaluator}


def make(net: str = "table3", device: str = "cpu", copies: int = 1, **options) -> tuple[DREAM, MultimodalBatch]:
    """DREAM in the sizes of Table 3 and a batch of which a third of the modalities is missing."""
    torch.manual_seed(0)
    shapes = {f"{m}{i or ''}": shape for i in range(copies) for m, shape in SHAPES.items()}
    batch = MultimodalBatch(
        {m: torch.randn(B, *shape) for m, shape in shapes.items()},
        torch.ones(B, len(shapes), dtype=torch.bool),
        target=torch.randn(B),
        ids=torch.arange(B),
    ).drop(present=torch.rand(B, len(shapes)) < 0.67)
    data = MultimodalDataset(batch)
    evaluator = NETS[net].for_data(data).eval()
    return DREAM.for_data(data, evaluator, **options).to(device).train(), batch.to(device)


def step(model: DREAM, batch: MultimodalBatch) -> Callable[[], None]:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-4)

    def run() -> None:
        optimiser.zero_grad()
        torch.stack(list(model(batch).losses.values())).sum().backward()
        optimiser.step()

    return run


def naive(model: DREAM, batch: MultimodalBatch) -> Callable[[], torch.Tensor]:
    """2^M forward passes on zeroed inputs, then the same scores."""
    masks = coalition_masks(len(batch.modalities))

    def run() -> torch.Tensor:
        with torch.no_grad():
            logits = torch.stack([model.evaluator(batch.drop(present=S.to(batch.device))) for S in masks])
            said, true = (logits[..., 0] >= 0).long().t(), (batch.target >= 0).long()
            return torch.stack([prediction_shift_score(said), prediction_accuracy_score(said, true)])

    return run


@pytest.mark.benchmark(group="DREAM, MOSEI shapes, B = 32")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("net", list(NETS))
def test_contributions_in_a_training_step(benchmark, best, net, device):
    """The share of a step that goes into contributions, and the step when they are looked up."""
    model, batch = make(net, device)
    stored, _ = make(net, device)
    stored.precompute(MultimodalDataset(batch))
    scores = lambda: model.contributions(batch)
    benchmark(scores)
    whole, alone, looked_up = best(step(model, batch), scores, step(stored, batch), repeats=6)
    benchmark.extra_info["share_of_step"] = round(alone / whole, 4)
    benchmark.extra_info["step_with_table_over_live"] = round(looked_up / whole, 3)
    print(f"\n{net} on {device}: {100 * alone / whole:.1f} % of a step of {1000 * whole:.1f} ms; "
          f"with the table {looked_up / whole:.3f} of it")  # fmt: skip


@pytest.mark.benchmark(group="DREAM, MOSEI shapes, B = 32")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("net", "copies"), [("table3", 1), ("corrkd", 1), ("mlp", 1), ("table3", 2)])
def test_engine_against_naive_forwards(benchmark, best, net, copies, device):
    """``copies`` of the three modalities make M = 6."""
    model, batch = make(net, device, copies)
    scores, loop = (lambda: model.contributions(batch)), naive(model, batch)
    torch.testing.assert_close(torch.stack([*scores()]), loop())
    benchmark(scores)
    ours, theirs = best(scores, loop, repeats=15 if copies == 1 else 4)
    benchmark.extra_info["ratio"] = round(theirs / ours, 2)
    benchmark.extra_info["modalities"] = 3 * copies
    print(f"\n{net}, M = {3 * copies}, on {device}: {theirs / ours:.1f} times the naive forwards")


@pytest.mark.benchmark(group="DREAM, MOSEI shapes, B = 32")
@pytest.mark.parametrize("device", DEVICES)
def test_time_of_a_prediction(benchmark, best, device):
    """DREAM's whole test time over one forward pass of its evaluator, and over its contributions."""
    model, batch = make(device=device)
    model.eval()

    @torch.no_grad()
    def whole() -> torch.Tensor:
        return model(batch).logits

    benchmark(whole)
    with torch.no_grad():
        ours, evaluator, scores = best(whole, lambda: model.evaluator(batch), lambda: model.contributions(batch))
    benchmark.extra_info["over_evaluator"] = round(ours / evaluator, 1)
    benchmark.extra_info["over_contributions"] = round(ours / scores, 1)
    print(f"\nprediction on {device}: {ours / evaluator:.1f} times the evaluator's forward pass, "
          f"{ours / scores:.1f} times the contributions")  # fmt: skip


@pytest.mark.benchmark(group="DREAM, MOSEI shapes, B = 32")
@pytest.mark.parametrize("device", DEVICES)
def test_drawn_orders_with_six_modalities(benchmark, best, device):
    """Eight orders over all 64 coalitions."""
    drawn, batch = make(device=device, copies=2, permutations=8)
    exact, _ = make(device=device, copies=2)
    scores = lambda: drawn.contributions(batch)
    benchmark(scores)
    few, all_of_them = best(scores, lambda: exact.contributions(batch), repeats=4)
    benchmark.extra_info["over_exact"] = round(few / all_of_them, 2)
    print(f"\nM = 6, 8 orders on {device}: {few / all_of_them:.2f} of the exact evaluation")
