"""What may be wrong with what a method is given: an error that names it, in place of one from deep inside a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..batch import BATCH, MultimodalBatch
from ..checks import Array, Is
from ..layers import frame_shapes

__all__ = ["check_alike", "check_logits", "check_outputs", "check_samples", "check_target", "frozen"]


def check_alike(name: str, x: Tensor, w: Tensor) -> None:
    """Raise TypeError or ValueError unless both are floats [..., M] of one shape."""
    Array("float", "[..., M]")("w", w)
    if Array("float", "[..., M]")(name, x).shape != w.shape:
        raise ValueError(f"{name}: expected the shape {list(w.shape)} of w, got {list(x.shape)}")


def check_samples(batch: MultimodalBatch, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a batch is of samples [B] with the modalities of ``shapes``, floats of those widths."""
    if BATCH("batch", batch).modalities != tuple(shapes):
        raise ValueError(f"batch: expected the modalities {list(shapes)}, got {list(batch.modalities)}")
    if len(batch.shape) != 1:
        raise ValueError(f"batch: expected samples [B], got the leading shape {batch.shape}")
    for m, x in batch.features.items():
        width = lambda shape, m=m: frame_shapes({m: tuple(shape)})[m][1]
        if not x.is_floating_point() or width(x.shape[1:]) != width(shapes[m]):
            raise ValueError(
                f"features[{m!r}]: expected float samples of shape {tuple(shapes[m])}, got {x.dtype} "
                f"{tuple(x.shape[1:])}"
            )


def check_outputs(outputs: int, *, regression: bool, labels: int, multilabel: bool) -> None:
    """Raise ValueError for a number of outputs that does not fit the kind of targets."""
    if regression and (outputs != 1 or labels):
        raise ValueError(f"outputs: expected 1 and no labels for regression, got {outputs} and {labels}")
    if multilabel and (regression or labels):
        raise ValueError("multilabel: expected neither regression nor labels with two logits each beside it")
    if labels and outputs != 2 * labels:
        raise ValueError(f"outputs: expected {2 * labels}, two for each of {labels} labels, got {outputs}")


def check_logits(logits: Tensor, tail: tuple[int, ...]) -> None:
    """Raise ValueError unless an evaluator's logits of subsets are [S, B, *tail] and finite."""
    if tuple(logits.shape[2:]) != tail:
        raise ValueError(f"evaluator: expected logits {['B', *tail]}, got {['B', *logits.shape[2:]]}")
    if not bool((finite := torch.isfinite(logits).flatten(2).all(-1).all(0)).all()):
        wrong = (~finite).nonzero()[:, 0].tolist()
        raise ValueError(
            f"features: expected finite values; the evaluator's predictions of {len(wrong)} samples are NaN or "
            f"infinite, the first at {wrong[:5]}"
        )


def check_target(
    y: Tensor | None, outputs: int, *, regression: bool, labels: int, multilabel: bool, limit: float = float("inf")
) -> None:
    """Raise ValueError for targets of another kind or shape, or that are not finite, or outside their range.

    outputs : K. A class is below it
    regression : scores, in size at most ``limit``
    labels : yes-or-no labels int64 [B, L], where it is not 0
    multilabel : bool [B, K]
    """
    if y is None:
        raise ValueError("target: expected one, from which PAS and the losses are computed, got none")
    if multilabel:
        if y.dtype != torch.bool or y.ndim != 2 or y.shape[1] != outputs:
            raise ValueError(f"target: expected bool labels [B, {outputs}], got {y.dtype} {tuple(y.shape)}")
        return
    kind = "float scores [B]" if regression else "int64 labels [B, L]" if labels else "int64 classes [B]"
    wrong = y.is_floating_point() != regression or y.dtype == torch.bool
    if wrong or y.ndim != 1 + bool(labels):
        raise ValueError(f"target: expected {kind}, got {y.dtype} {tuple(y.shape)}")
    if labels and y.shape[1] != labels:
        raise ValueError(f"target: expected {labels} labels a sample, got {y.shape[1]}")
    low, high = (-limit, limit) if regression else (0, (2 if labels else outputs) - 1)
    if not bool(((y >= low) & (y <= high) & torch.isfinite(y)).all()):
        found = f"values from {y.min().item()} to {y.max().item()}"
        raise ValueError(f"target: expected {kind}, finite and in [{low}, {high}], got {found}")


def frozen(evaluator: nn.Module, modalities: tuple[str, ...]) -> nn.Module:
    """The evaluator without gradients; ValueError for one in train mode or of other modalities."""
    Is("an nn.Module", nn.Module)("evaluator", evaluator)
    has = getattr(evaluator, "modalities", None)
    if has is None:
        inner = hasattr(getattr(evaluator, "backbone", None), "modalities")
        raise ValueError(
            f"evaluator: expected a backbone, which says its modalities, got {type(evaluator).__name__}"
            + ("; pass its .backbone" if inner else "")
        )
    if tuple(has) != modalities:
        raise ValueError(f"evaluator: expected one of the data's modalities {list(modalities)}, got {list(has)}")
    if any(part.training for part in evaluator.modules()):
        raise ValueError("evaluator: expected a trained one in eval mode, got train mode; call evaluator.eval()")
    return evaluator.requires_grad_(False)
