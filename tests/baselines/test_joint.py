"""The task loss by hand, and joint training with modality dropout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmlib import MultimodalBatch, Output
from mmlib.baselines import JointTraining
from mmlib.losses import task_loss


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    target = torch.tensor([1, 1])
    each = [-math.log(3 / 4), -math.log(1 / 5)]
    assert task_loss(logits, target).item() == pytest.approx(sum(each) / 2)
    weight = torch.tensor([3.0, 1.0])
    assert task_loss(logits, target, weight).item() == pytest.approx((3 * each[0] + each[1]) / 4)
    assert task_loss(logits, target, torch.tensor([0.0, 1.0])).item() == pytest.approx(each[1])
    assert task_loss(logits, target, torch.zeros(2)).item() == 0


def test_absolute_error_by_hand() -> None:
    logits, target = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([3.0, -2.5, 0.5])
    assert task_loss(logits, target).item() == pytest.approx((2 + 0.5 + 0) / 3)
    assert task_loss(logits, target, torch.tensor([1.0, 2.0, 0.0])).item() == pytest.approx((2 + 2 * 0.5) / 3)


def test_dialogues_have_one_loss_per_utterance() -> None:
    logits, target = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).float()
    expected = 0.0
    for i in range(3):
        for u in range(4):
            if real[i, u]:
                row = logits[i, u].double()
                expected += (row.exp().sum().log() - row[target[i, u]]).item() / 6
    assert task_loss(logits, target, real).item() == pytest.approx(expected, rel=1e-5)


def test_a_weight_of_zero_takes_no_gradient_even_where_all_are() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    task_loss(logits, torch.tensor([0, 1, 2, 0]), torch.zeros(4)).backward()
    assert torch.equal(logits.grad, torch.zeros(4, 3))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits: expected \(4, 1\) for scores, got \(4, 3\)"):
        task_loss(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"logits: expected \(4, 'K'\) for classes, got \(3, 2\)"):
        task_loss(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 9), k=st.integers(2, 6), seed=st.integers(0, 10_000), shift=st.floats(-50, 50))
def test_cross_entropy_does_not_move_with_a_constant_and_is_not_negative(
    n: int, k: int, seed: int, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator, dtype=torch.float64)
    target = torch.randint(0, k, (n,), generator=generator)
    assert task_loss(logits, target).item() >= 0
    assert task_loss(logits + shift, target).item() == pytest.approx(task_loss(logits, target).item(), abs=1e-9)


class Reads(nn.Module):
    """A stand-in for a backbone: notes what it is given, answers with the number of present modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batch: MultimodalBatch | None = None

    def forward(self, batch: MultimodalBatch) -> torch.Tensor:
        self.batch = batch
        count = batch.present.sum(-1, keepdim=True).float() * self.scale
        return torch.cat([count, torch.zeros_like(count)], -1)


def batch_of(present: torch.Tensor, target: bool = True) -> MultimodalBatch:
    n, modalities = present.shape
    features = {f"m{m}": torch.ones(n, 2, 3) for m in range(modalities)}
    batch = MultimodalBatch(features, torch.ones_like(present), torch.zeros(n, dtype=torch.int64) if target else None)
    return batch.drop(present=present)


def test_losses_come_in_training_with_a_target_alone() -> None:
    method = JointTraining(Reads())
    batch = batch_of(torch.ones(5, 2, dtype=torch.bool))
    output = method(batch)
    assert isinstance(output, Output)
    assert set(output.losses) == {"task"}
    assert output.losses["task"].item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert method(batch_of(torch.ones(5, 2, dtype=torch.bool), target=False)).losses == {}
    assert method.eval()(batch).losses == {}


def test_without_dropout_the_batch_is_passed_on_as_it_is() -> None:
    backbone = Reads()
    batch = batch_of(torch.rand(9, 3) < 0.5)
    JointTraining(backbone)(batch)
    assert backbone.batch is batch
    dropping = JointTraining(backbone, 0.9).eval()
    dropping(batch)
    assert backbone.batch is batch


def test_dropout_switches_off_at_its_rate_and_never_all() -> None:
    """With M = 2 and rate p: none off (1-p)^2 + p^2 (all lost, hence all kept), one off 2 p (1-p)."""
    torch.manual_seed(0)
    p, n, backbone = 0.4, 20_000, Reads()
    method = JointTraining(backbone, p)
    batch = batch_of(torch.ones(n, 2, dtype=torch.bool))
    method(batch)
    seen = backbone.batch.present
    count = seen.sum(-1)
    assert (count >= 1).all()
    expected = 2 * p * (1 - p)
    deviation = math.sqrt(expected * (1 - expected) / n)
    assert (count == 1).double().mean().item() == pytest.approx(expected, abs=4 * deviation)
    for m, name in enumerate(("m0", "m1")):
        assert seen[:, m].double().mean().item() == pytest.approx(1 - p * (1 - p), abs=4 * deviation)
        x = backbone.batch.features[name]
        assert torch.equal(x, seen[:, m, None, None].expand_as(x).float())  # what is off is zero as well as masked
    first = seen.clone()
    method(batch)
    assert not torch.equal(first, backbone.batch.present)  # drawn anew for every batch


def test_dropout_adds_nothing_and_a_sample_with_one_modality_keeps_it() -> None:
    torch.manual_seed(0)
    backbone = Reads()
    present = torch.tensor([[True, False, False], [False, True, True], [True, True, True]]).repeat(500, 1)
    JointTraining(backbone, 0.8)(batch_of(present))
    seen = backbone.batch.present
    assert not (seen & ~present).any()
    assert seen.any(-1).all()
    assert seen[::3, 0].all()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_rates_out_of_range_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"modality_dropout: expected a number in \[0, 1\)"):
        JointTraining(Reads(), rate)
