"""The distances between distributions against their definitions, as loops that import nothing under test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlib.losses import mmd, sample_losses, sinkhorn, task_loss

QUICK = settings(deadline=None, max_examples=30)


def _clouds(n: int = 7, m: int = 5, width: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randn(k, width, generator=generator, dtype=torch.float64).to(dtype)
    return draw(n), draw(m) * 1.5 + 0.7


def _kernel(p, q, bandwidths) -> float:
    return sum(math.exp(-sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / s) for s in bandwidths)


def _base(rows) -> float:
    pairs = [(p, q) for i, p in enumerate(rows) for j, q in enumerate(rows) if i != j]
    return sum(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for p, q in pairs) / len(pairs)


def mmd_by_loops(x, y, bandwidths=None) -> float:
    x, y = np.asarray(x, float).tolist(), np.asarray(y, float).tolist()
    if bandwidths is None:
        bandwidths = [_base(x + y) * f for f in (0.25, 0.5, 1, 2, 4)]
    mean = lambda P, Q: sum(_kernel(p, q, bandwidths) for p in P for q in Q) / (len(P) * len(Q))
    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


# --- MMD ---


@pytest.mark.parametrize("bandwidths", [None, [1.0], [0.3, 2.0, 50.0]])
@pytest.mark.parametrize(("n", "m", "width"), [(7, 5, 3), (1, 1, 1), (1, 6, 2), (4, 4, 1)])
def test_mmd_against_the_double_loop(n, m, width, bandwidths):
    x, y = _clouds(n, m, width)
    assert mmd(x, y, bandwidths).item() == pytest.approx(mmd_by_loops(x, y, bandwidths), rel=1e-9, abs=1e-12)


def test_mmd_by_hand():
    # One point each at distance 2, one kernel of bandwidth 4: 1 + 1 - 2 exp(-4/4).
    x, y = torch.tensor([[0.0]]), torch.tensor([[2.0]])
    assert mmd(x, y, [4.0]).item() == pytest.approx(2 - 2 * math.exp(-1), rel=1e-6)
    # By default the base is the one distance 4, so the exponents are -4, -2, -1, -1/2, -1/4.
    assert mmd(x, y).item() == pytest.approx(10 - 2 * sum(math.exp(-t) for t in (4, 2, 1, 0.5, 0.25)), rel=1e-6)
    # {0, 2} against {1}: mean k(x,x') = (1 + e^-4)/2, k(y,y) = 1, mean k(x,y) = e^-1.
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    assert mmd(x, y, [1.0]).item() == pytest.approx((1 + math.exp(-4)) / 2 + 1 - 2 * math.exp(-1), rel=1e-6)


def test_mmd_sees_what_means_do_not():
    """Equal means, different spread."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    x, y = x - x.mean(0), 3 * (x - x.mean(0))
    assert (x.mean(0) - y.mean(0)).norm() < 1e-5
    assert mmd(x, y) > 0.1


@pytest.mark.slow
@QUICK
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6), st.floats(1e-3, 1e3), st.booleans()
)
def test_mmd_properties(n, m, width, seed, scale, single):
    x, y = (scale * c for c in _clouds(n, m, width, seed, torch.float32 if single else torch.float64))
    tolerance = 2e-5 if single else 1e-10
    value = mmd(x, y)
    assert 0 <= value <= 10
    assert mmd(y, x).item() == pytest.approx(value.item(), abs=tolerance)
    assert mmd(x, x).item() == pytest.approx(0, abs=tolerance)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert mmd(x, x[order]).item() == pytest.approx(0, abs=tolerance)
    assert mmd(x[order], y).item() == pytest.approx(value.item(), abs=tolerance)
    # The default bandwidths go with the data, and a translation changes nothing.
    assert mmd(7 * x, 7 * y).item() == pytest.approx(value.item(), abs=tolerance)
    assert mmd(x + 3 * scale, y + 3 * scale).item() == pytest.approx(value.item(), abs=10 * tolerance)


def test_mmd_gradients():
    x, y = (c.requires_grad_() for c in _clouds(4, 3, 2))
    assert torch.autograd.gradcheck(lambda x, y: mmd(x, y, [0.5, 2.0]), (x, y))
    # The default base carries no gradient: it is that of fixed bandwidths of the same numbers.
    base = _base(torch.cat([x, y]).detach().tolist())
    ours = torch.autograd.grad(mmd(x, y), (x, y))
    fixed = torch.autograd.grad(mmd(x, y, [base * f for f in (0.25, 0.5, 1, 2, 4)]), (x, y))
    for a, b in zip(ours, fixed, strict=True):
        torch.testing.assert_close(a, b)


def test_mmd_of_identical_rows_is_zero_with_a_zero_gradient():
    for value in (1.0, 1e6, 0.1):
        x, y = (torch.full((k, 3), value, requires_grad=True) for k in (4, 2))
        found = mmd(x, y)
        found.backward()
        assert found == 0
        assert not x.grad.any()
        assert not y.grad.any()
    found = mmd(torch.ones(3, 2), torch.ones(3, 2), [1.0])
    assert found.item() == pytest.approx(0, abs=1e-6)


def test_mmd_far_from_the_origin_keeps_its_digits():
    x, y = _clouds(dtype=torch.float32)
    assert mmd(x + 1000, y + 1000).item() == pytest.approx(mmd(x, y).item(), rel=1e-3)


@pytest.mark.parametrize("distance", [mmd, sinkhorn])
def test_rows_of_weight_zero_do_not_count(distance):
    x, y = _clouds()
    keep_x, keep_y = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool(), torch.tensor([0, 1, 1, 1, 0]).bool()
    expected = distance(x[keep_x], y[keep_y])
    for junk in (0.0, float("nan"), float("inf")):
        a, b = x.clone(), y.clone()
        a[~keep_x], b[~keep_y] = junk, junk
        a.requires_grad_()
        found = distance(a, b, x_weight=keep_x, y_weight=keep_y)
        torch.testing.assert_close(found, expected)
        found.backward()
        assert not a.grad[~keep_x].any()
        assert a.grad[keep_x].isfinite().all()
    nothing = torch.zeros(7, dtype=torch.bool)
    x.requires_grad_()
    found = distance(x, y, x_weight=nothing)
    found.backward()
    assert found == 0
    assert not x.grad.any()


@pytest.mark.parametrize("distance", [lambda *a, **k: mmd(*a, [0.5, 3.0], **k), sinkhorn])
def test_integer_weights_are_repeated_rows(distance):
    x, y = _clouds(3, 4)
    often = torch.tensor([2, 1, 3])
    torch.testing.assert_close(
        distance(x, y, x_weight=often), distance(x.repeat_interleave(often, 0), y), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("distance", [mmd, sinkhorn])
def test_bad_input_of_the_distances(distance):
    x, y = _clouds()
    for a, b, word in [(x[0], y, "x"), (x, y[:, :2], "y"), (x[:0], y, "x"), (x, y[None], "y")]:
        with pytest.raises(ValueError, match=f"^{word}: expected"):
            distance(a, b)
    with pytest.raises(TypeError, match="^x: expected a tensor of floats"):
        distance(x.long(), y)
    with pytest.raises(ValueError, match="x_weight: expected one number a row"):
        distance(x, y, x_weight=torch.ones(5))
    x[2, 1] = float("nan")
    assert distance(x, y).isnan()  # not hidden


@pytest.mark.parametrize("bandwidths", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_bad_bandwidths(bandwidths):
    with pytest.raises(ValueError, match=r"bandwidths(\[.\])?: expected None or"):
        mmd(*_clouds(), bandwidths)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [mmd, sinkhorn])
def test_half_precision_and_compilation(distance):
    x, y = _clouds(dtype=torch.float32)
    expected = distance(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(distance(x, y), expected)
    assert distance(x.half(), y.half()).item() == pytest.approx(expected.item(), rel=1e-2)
    assert distance(x.half(), y.half()).dtype == torch.float32
    # One graph without a break: nothing looks at a value on the host.
    compiled = torch.compile(distance, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x, y, x_weight=torch.arange(7) > 2), distance(x, y, x_weight=torch.arange(7) > 2)
    )


# --- Sinkhorn ---


def sinkhorn_by_loops(x, y, epsilon, sweeps) -> float:
    """The divergence from converged potentials in float64: plain alternating updates, loops over rows."""

    def transport(P, Q):
        C = np.array([[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in Q] for p in P])
        f, g = np.zeros(len(P)), np.zeros(len(Q))
        for _ in range(sweeps):
            f = np.array([-epsilon * _log_mean_exp((g - C[i]) / epsilon) for i in range(len(P))])
            g = np.array([-epsilon * _log_mean_exp((f - C[:, j]) / epsilon) for j in range(len(Q))])
        return f.mean() + g.mean()

    return transport(x, y) - transport(x, x) / 2 - transport(y, y) / 2


def _log_mean_exp(v) -> float:
    return v.max() + math.log(np.exp(v - v.max()).mean())


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 5.0])
def test_sinkhorn_against_the_loop(epsilon):
    x, y = _clouds(5, 4, 2)
    expected = sinkhorn_by_loops(x.numpy(), y.numpy(), epsilon, 400)
    assert sinkhorn(x, y, epsilon, 500).item() == pytest.approx(expected, rel=1e-6)
    assert sinkhorn(x, y, epsilon).item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_sinkhorn_against_pot():
    """The primal value of the plan that POT finds, its entropy as a relative entropy to the product."""
    ot = pytest.importorskip("ot", reason="the oracle is POT")
    x, y = _clouds(12, 9, 2, seed=3)
    epsilon = 0.6

    def transport(P, Q):
        a, b = np.full(len(P), 1 / len(P)), np.full(len(Q), 1 / len(Q))
        C = ot.dist(P, Q)
        plan = ot.sinkhorn(a, b, C, epsilon, numItermax=5000, stopThr=1e-9)
        kl = np.where(plan > 0, plan * np.log(np.maximum(plan, 1e-300) / np.outer(a, b)), 0).sum()
        return (plan * C).sum() + epsilon * kl

    P, Q = x.numpy(), y.numpy()
    expected = transport(P, Q) - transport(P, P) / 2 - transport(Q, Q) / 2
    assert sinkhorn(x, y, epsilon, 1000).item() == pytest.approx(expected, rel=1e-5)
    assert sinkhorn(x, y, epsilon).item() == pytest.approx(expected, rel=5e-3)
    # A small regularisation: near the exact squared Wasserstein-2 distance, within the default fifty iterations.
    exact = ot.emd2(np.full(12, 1 / 12), np.full(9, 1 / 9), ot.dist(P, Q))
    assert sinkhorn(x, y).item() == pytest.approx(exact, rel=0.03)


@pytest.mark.slow
def test_sinkhorn_by_hand():
    """One point each: the only plan; OT(x, x) = 0."""
    assert sinkhorn(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])).item() == pytest.approx(25.0)
    # A translation by t of a cloud moves it by |t|^2 exactly, whatever epsilon.
    x = _clouds(6, 6)[0]
    shift = torch.tensor([0.3, 0.0, 0.4])
    assert sinkhorn(x, x + shift, 0.5, 2000).item() == pytest.approx(0.25, abs=1e-4)


@pytest.mark.slow
@QUICK
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.01, 0.05, 1]))
def test_sinkhorn_properties(n, m, width, seed, epsilon):
    x, y = _clouds(n, m, width, seed)
    value = sinkhorn(x, y, epsilon)
    assert value >= 0
    assert value.isfinite()
    assert sinkhorn(y, x, epsilon).item() == pytest.approx(value.item(), rel=1e-9, abs=1e-9)
    assert sinkhorn(x, x, epsilon).item() == pytest.approx(0, abs=1e-3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert sinkhorn(x[order], y, epsilon).item() == pytest.approx(value.item(), rel=1e-9, abs=1e-9)


@pytest.mark.slow
def test_sinkhorn_gradients():
    x, y = (c.requires_grad_() for c in _clouds(4, 3, 2))
    assert torch.autograd.gradcheck(lambda x, y: sinkhorn(x, y, 2.0, 400), (x, y), atol=1e-5)
    same = torch.ones(3, 2, requires_grad=True)
    found = sinkhorn(same, torch.ones(4, 2))
    found.backward()
    assert found == 0
    assert not same.grad.any()
    # A step down the gradient brings the clouds together.
    x = _clouds(6, 6)[0].requires_grad_()
    y = _clouds(6, 6)[1]
    before = sinkhorn(x, y)
    (gradient,) = torch.autograd.grad(before, x)
    assert sinkhorn(x - 0.5 * gradient, y) < before


def test_bad_arguments_of_sinkhorn():
    x, y = _clouds()
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="epsilon: expected a number above 0"):
            sinkhorn(x, y, epsilon)
    with pytest.raises(ValueError, match="iterations: expected an integer of at least 1"):
        sinkhorn(x, y, iterations=0)


# --- labels, any number of them a sample ---


def test_multilabel_loss_by_hand():
    # -log sigmoid(0) = log 2; -log sigmoid(log 3) = log(4/3), and its complement's -log(1/4) = log 4.
    logits = torch.tensor([[0.0, math.log(3), math.log(3)], [0.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[True, True, False], [False, True, False]])
    each = sample_losses(logits, target)
    first = (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    assert each.tolist() == pytest.approx([first, math.log(2)], rel=1e-6)
    assert task_loss(logits, target).item() == pytest.approx((first + math.log(2)) / 2, rel=1e-6)
    weighted = task_loss(logits, target, torch.tensor([3.0, 1.0]), lead=1)
    assert weighted.item() == pytest.approx((3 * first + math.log(2)) / 4, rel=1e-6)
    task_loss(logits, target).backward()
    wanted = [(p - y) / 6 for p, y in zip([0.5, 0.75, 0.75, 0.5, 0.5, 0.5], [1, 1, 0, 0, 1, 0], strict=True)]
    assert logits.grad.flatten().tolist() == pytest.approx(wanted, rel=1e-6)


def test_multilabel_loss_of_dialogues_and_of_one_label():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 3, 4, generator=generator), torch.rand(2, 3, 4, generator=generator) > 0.5
    each = sample_losses(logits, target, lead=2)
    assert each.shape == (2, 3)
    assert torch.equal(each.flatten(), sample_losses(logits.flatten(0, 1), target.flatten(0, 1)))
    # One label is the two-class problem of the logits 0 and z.
    z, y = logits[0, :, :1], target[0, :, :1]
    two = sample_losses(torch.cat([torch.zeros_like(z), z], -1), y[:, 0].long())
    assert torch.allclose(sample_losses(z, y), two)


@pytest.mark.parametrize(
    ("logits", "target", "lead"),
    [((5, 2), (5, 3), None), ((5, 3), (5,), None), ((5,), (5,), None), ((5, 4, 3), (5, 4, 3), 1), ((5, 3), (5, 3), 2)],
)
def test_multilabel_loss_names_shapes_that_do_not_fit(logits, target, lead):
    with pytest.raises(ValueError, match=r"logits, target: expected both \[\*N, K\] for bool labels"):
        sample_losses(torch.zeros(logits), torch.zeros(target, dtype=torch.bool), lead)
