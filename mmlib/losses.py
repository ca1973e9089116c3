"""Losses that several methods share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import Array, Is, Maybe, Number, Several, Whole

__all__ = ["check_target", "mmd", "sample_losses", "sinkhorn", "task_loss"]

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the mean squared distance, where `mmd` is given none


def sample_losses(logits: Tensor, target: Tensor, lead: int | None = None) -> Tensor:
    """Each sample's cross-entropy for integer classes, absolute error for float scores -> [*N].

    A bool target [*N, K] says which of K labels a sample has, any number of them: the mean over labels of the binary
    cross-entropy of logits [*N, K].

    lead : how many axes N has; default all of the target's (but for the labels of a bool one). An integer target
        [*N, ...] with further axes is a segmentation: logits [*N, K, ...] with the classes after N, and the mean over
        all places (for K = 1, binary cross-entropy)

    Logits are [*N, K] otherwise, K = 1 for scores. Raises ValueError where shapes do not fit.
    """
    Array("float", "[..., K]")("logits", logits)
    Array("bool integer float", "[*N]")("target", target)
    Maybe(Whole(1))("lead", lead)
    if lead is not None and lead > target.ndim:
        raise ValueError(f"lead: expected at most the {target.ndim} axes of target, got {lead}")
    if target.dtype == torch.bool:
        if target.ndim != (max(target.ndim, 2) if lead is None else lead + 1) or logits.shape != target.shape:
            raise ValueError(
                f"logits, target: expected both [*N, K] for bool labels, got {tuple(logits.shape)} and "
                f"{tuple(target.shape)}"
            )
        return F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none").mean(-1)
    lead = target.ndim if lead is None else lead
    if not target.is_floating_point() and target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 classes, float scores or bool labels, got {target.dtype}")
    if target.ndim > lead:
        if logits.ndim != target.ndim + 1 or (*logits.shape[:lead], *logits.shape[lead + 1 :]) != target.shape:
            expected = (*target.shape[:lead], "K", *target.shape[lead:])
            raise ValueError(f"logits: expected {expected} for a segmentation, got {tuple(logits.shape)}")
        if logits.shape[lead] == 1:
            each = F.binary_cross_entropy_with_logits(logits.select(lead, 0), target.to(logits), reduction="none")
        else:
            each = _cross_entropy(logits.flatten(0, lead - 1), target.flatten(0, lead - 1))
        return each.reshape(*target.shape[:lead], -1).mean(-1)
    if target.is_floating_point():
        if logits.shape != (*target.shape, 1):
            raise ValueError(f"logits: expected {(*target.shape, 1)} for scores, got {tuple(logits.shape)}")
        return (logits[..., 0] - target).abs()
    if logits.shape[:-1] != target.shape:
        raise ValueError(f"logits: expected {(*target.shape, 'K')} for classes, got {tuple(logits.shape)}")
    return _cross_entropy(logits.flatten(0, -2), target.flatten()).reshape(target.shape)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    try:
        return F.cross_entropy(logits, target, reduction="none")
    except IndexError as error:  # of a CPU, where looking at the target first would cost what this does not
        raise ValueError(f"target: expected classes in [0, {logits.shape[1]}) ({error})") from error


def check_target(target: Tensor, regression: bool) -> None:
    """Raise ValueError unless a target of samples is float scores [B] or, without regression, classes or labels."""
    labels = Is("a tensor", Tensor)("target", target).dtype == torch.bool
    if target.is_floating_point() != regression or target.ndim != 1 + labels:
        expected = "float scores [B]" if regression else "int64 classes [B] or bool labels [B, K]"
        raise ValueError(f"target: expected {expected}, got {target.dtype} {tuple(target.shape)}")


def task_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None, lead: int | None = None) -> Tensor:
    """The mean of `sample_losses`. ``weight`` [*N] weights the samples: a weighted mean, zero when all weights are."""
    each = sample_losses(logits, target, lead)
    if weight is None:
        return each.mean()
    if Array("bool integer float", "[*N]")("weight", weight).shape != each.shape:
        raise ValueError(f"weight: expected one number a sample {tuple(each.shape)}, got {tuple(weight.shape)}")
    return (each * weight).sum() / weight.sum().clamp_min(torch.finfo(each.dtype).tiny)


def mmd(
    x: Tensor,
    y: Tensor,
    bandwidths: Sequence[float] | None = None,
    *,
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
) -> Tensor:
    """The squared maximum mean discrepancy between the rows of x [n, D] and y [m, D], a scalar >= 0 (DEAR Eq. 1).

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), each mean over all pairs with i = j among them (the biased
    V-statistic), where k(x, y) = sum over bandwidths s of exp(-|x - y|^2 / s).

    bandwidths : positive numbers in units of the squared distance. None: the mean squared distance between two
        different rows of [x; y], without gradient, times 1/4, 1/2, 1, 2, 4; where that is 0, so is the result
    x_weight, y_weight : [n] and [m], bool (which rows count) or non-negative: weighted means. Rows of weight 0 may hold
        anything; where x or y has no other row, the result is 0

    At least float32 whatever the autocast; one distance matrix serves all bandwidths; nothing waits for a device.
    A NaN in a row that counts gives NaN. Raises ValueError for shapes and bandwidths, TypeError for no floats.
    """
    z, a, b, some = _rows(x, y, x_weight, y_weight)
    scales = Maybe(Several(Number(above=0), 1))("bandwidths", bandwidths)
    with torch.autocast(z.device.type, enabled=False):
        squared = _squared_distances(z, z).fill_diagonal_(0)
        sign = torch.cat([a / a.sum(), -b / b.sum()])
        if scales is not None:
            value = torch.stack([sign @ torch.exp(squared / -s) @ sign for s in scales]).sum()
            return torch.where(some, value.clamp_min(0), 0)
        with torch.no_grad():
            u = torch.cat([a, b])
            pairs = u.sum() ** 2 - u.square().sum()  # i != j
            base = u @ squared @ u / torch.where(pairs > 0, pairs, 1)
            some = some & (base != 0)
            base = torch.where(base != 0, base, 1)
        value = torch.stack([sign @ torch.exp(squared / (-s * base)) @ sign for s in BANDWIDTHS]).sum()
        return torch.where(some, value.clamp_min(0), 0)


def sinkhorn(
    x: Tensor,
    y: Tensor,
    epsilon: float = 0.05,
    iterations: int = 50,
    *,
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
) -> Tensor:
    """The debiased Sinkhorn divergence between the rows of x [n, D] and y [m, D], a scalar >= 0.

    OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, where OT is the entropic optimal transport cost
    min_P <P, C> + epsilon KL(P | a b^T) for the squared distances C and uniform (or the given) weights a and b; see
    Feydy et al. 2019. It tends to the squared Wasserstein-2 distance as ``epsilon`` -> 0.

    epsilon : > 0, in units of the squared distance
    iterations : of Sinkhorn's algorithm in the log domain, >= 1. The regularisation falls geometrically from the
        largest distance to ``epsilon`` over the first four fifths, without which a small one would need thousands
    x_weight, y_weight : as `mmd` takes them

    Symmetric in x and y, and differentiable: the gradient is that of the cost at the plan found (the potentials are
    held, which is exact where the iterations have converged). Too few iterations give too small a value, never a
    negative one. At least float32 whatever the autocast; nothing waits for a device. Raises ValueError for shapes and
    out-of-range arguments, TypeError for no floats.
    """
    Number(above=0)("epsilon", epsilon)
    Whole(1)("iterations", iterations)
    z, a, b, some = _rows(x, y, x_weight, y_weight)
    n = len(x)
    with torch.autocast(z.device.type, enabled=False):
        whole = _squared_distances(z, z).fill_diagonal_(0)
        a, b = a / a.sum(), b / b.sum()
        log_a, log_b = a.log(), b.log()
        xx, yy, xy = whole[:n, :n], whole[n:, n:], whole[:n, n:]
        with torch.no_grad():
            largest = torch.where((torch.cat([a, b]) > 0) & (torch.cat([a, b]) > 0)[:, None], whole, 0).amax()
            ratio = (largest / epsilon).clamp_min(1)
            f, q = torch.zeros_like(a), torch.zeros_like(b)  # from each side once, so that x and y may change places
            p, g = torch.zeros_like(a), torch.zeros_like(b)
            u, v = torch.zeros_like(a), torch.zeros_like(b)
            for k in range(iterations):
                now = epsilon * ratio ** max(0.0, 1 - k / (0.8 * iterations))
                f, q = _soft_min(xy, g, log_b, now), _soft_min(xy.t(), p, log_a, now)
                g, p = _soft_min(xy.t(), f, log_a, now), _soft_min(xy, q, log_b, now)
                u = (u + _soft_min(xx, u, log_a, now)) / 2  # against itself the two potentials are one
                v = (v + _soft_min(yy, v, log_b, now)) / 2
        across = whole.new_zeros(())
        for left, right in ((f, g), (p, q)):
            first, second = _soft_min(xy, right, log_b, epsilon), _soft_min(xy.t(), left, log_a, epsilon)
            across = across + (a @ first + b @ second) / 2
        within = a @ _soft_min(xx, u, log_a, epsilon) + b @ _soft_min(yy, v, log_b, epsilon)
        value = across - within
        # A cost's derivative is its plan; both potentials of a pair carry it, so it is there twice.
        value = (value + value.detach()) / 2
        return torch.where(some, value.clamp_min(0), 0)


def _soft_min(cost: Tensor, potential: Tensor, log_weight: Tensor, epsilon: Tensor | float) -> Tensor:
    """-epsilon log sum_j weight_j exp((potential_j - cost_ij) / epsilon) -> [i]."""
    return -epsilon * torch.logsumexp(log_weight + (potential - cost) / epsilon, -1)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 [n, m] by one matrix product, never negative."""
    gram = x @ y.t()
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * gram).clamp_min(0)


def _rows(
    x: Tensor, y: Tensor, x_weight: Tensor | None, y_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[x; y] around its centre, the two weights (ones where all are 0), and whether both have a row that counts."""
    for name, rows in (("x", x), ("y", y)):
        if not len(Array("float", "[n, D]")(name, rows)):
            raise ValueError(f"{name}: expected at least one row [n, D], got {tuple(rows.shape)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected the width {x.shape[1]} of x, got {y.shape[1]}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    z = torch.cat([x.to(dtype), y.to(dtype)])
    weights = []
    for name, rows, weight in (("x_weight", x, x_weight), ("y_weight", y, y_weight)):
        if weight is None:
            weights.append(z.new_ones(len(rows)))
            continue
        if Array("bool integer float", "[n]")(name, weight).shape != (len(rows),):
            raise ValueError(f"{name}: expected one number a row [{len(rows)}], got {tuple(weight.shape)}")
        weights.append(weight.detach().to(z))
    counts = torch.cat(weights) > 0
    some = (weights[0] > 0).any() & (weights[1] > 0).any()
    # A translation changes no distance. From a row first, so that identical rows become exactly 0, then to the mean, so
    # that the products below lose no digits.
    with torch.no_grad():
        first = z.index_select(0, counts.to(torch.uint8).argmax(0, keepdim=True))
        rest = torch.where(counts[:, None], z - first, 0)
        second = rest.sum(0) / counts.sum().clamp_min(1)
    z = torch.where(counts[:, None], z - first - second, 0)
    a, b = (torch.where(some, weight, 1) for weight in weights)
    return z, a, b, some
