"""Predictions of a trained method with parts missing: a data set, a batch, one sample or one record.

Callers import these from `mmlib.training`; the loop validates with `predict` too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import DATASET, MultimodalBatch, MultimodalDataset, tensor
from .checks import Array, Device, Is, Maybe, Named, Several, Whole, shown
from .layers import scoring

__all__ = ["class_names", "predict"]


def modalities_of(method: Any) -> tuple[str, ...] | None:
    """The modalities that the method expects, None where it does not say them."""
    known = getattr(method, "modalities", getattr(getattr(method, "backbone", None), "modalities", None))
    return None if known is None else tuple(known)


def predict(
    method: nn.Module,
    dataset: MultimodalDataset | MultimodalBatch | Mapping[str, Any],
    *,
    present: Tensor | Sequence[bool] | Sequence[str] | None = None,
    batch_size: int = 1024,
    device: str | torch.device | None = None,
    like: MultimodalDataset | None = None,
) -> Tensor:
    """Logits [n, *N[1:], K] on the CPU, in eval mode; a data set, a batch, one sample (``dataset[3]``) or one record.

    dataset : modalities that are left out of it are absent. A record is a dict of one sample's arrays, without the
        axis of the samples: vectors [D], sequences [T, D], images [C, H, W], token ids [T]
    present : bool [M], [n, M] or [*N, M]; False switches a modality off where it is there. Or the names of the
        modalities that stay on, such as ``["audio"]``
    device : default the one where the method is
    like : a data set of the kind that the method was trained on, which says the shape of what is left out; needed only
        where ``config.feature_shapes`` of the method or its backbone does not

    The method sees neither the target nor what the data set keeps as ``complete``. Its modules' modes are restored.
    """
    Is("an nn.Module", nn.Module)("method", method)
    Maybe(DATASET)("like", like)
    given: Any = _record(method, dataset, like) if isinstance(dataset, Mapping) else dataset
    data = given.data if isinstance(given, MultimodalDataset) else given
    if not isinstance(data, MultimodalBatch):
        raise TypeError(f"dataset: expected a MultimodalDataset, a MultimodalBatch or a dict, got {shown(dataset)}")
    if not isinstance(given, MultimodalDataset) and any(x.is_meta for x in data.features.values()):
        raise ValueError("dataset: expected features with values, got the data of a streamed data set; pass it itself")
    known = modalities_of(method)
    if known is not None and not set(known) <= set(data.modalities):
        given = data = given[:].widened(_shapes(method, like), {} if like is None else like.data.fill)
    Whole(1)("batch_size", batch_size)
    keep: Tensor | None = None
    if present is not None:
        present = data.named(present)
        keep = tensor("present", present).to(data.device)
        if keep.dtype != torch.bool:
            raise TypeError(f"present: expected bool, got {keep.dtype}")
        modalities, lead = len(data.modalities), len(data.shape)
        if keep.shape == (len(data), modalities) and lead > 1:
            keep = keep.reshape(len(data), *[1] * (lead - 1), modalities)
        elif keep.shape not in ((modalities,), (len(data), modalities), tuple(data.present.shape)):
            raise ValueError(
                f"present: expected shape {(modalities,)} or {(len(data), modalities)}, got {tuple(keep.shape)}"
            )
        keep = keep.expand(data.present.shape)
    if device is None:
        held = next((t for t in [*method.parameters(), *method.buffers()]), None)
        device = data.device if held is None else held.device
    else:
        device = Device()("device", device)
        method.to(device)
    parts = []
    with scoring(method):
        for rows in torch.arange(len(data), device=data.device).split(batch_size):
            batch = given[rows].replace(target=None, complete=None)
            if keep is not None:
                batch = batch.drop(present=keep[rows])
            parts.append(method(batch.to(device)).logits)
    return torch.cat(parts).float().cpu()


def _shapes(method: nn.Module, like: MultimodalDataset | None) -> Mapping[str, tuple[int, ...]]:
    """The shape of one sample of each modality that the method expects."""
    if like is not None:
        return like.feature_shapes
    for module in method.modules():
        if shapes := getattr(getattr(module, "config", None), "feature_shapes", None):
            return shapes
    raise ValueError(
        f"like: expected a data set of the kind that the method was trained on, since {type(method).__name__} does not "
        f"say the shapes of modalities that are left out, got None"
    )


def _record(method: nn.Module, record: Mapping[str, Any], like: MultimodalDataset | None) -> MultimodalBatch:
    """One sample as a batch, with the modalities that the record leaves out absent."""
    shapes = _shapes(method, like)
    features = {}
    for name, values in record.items():
        if name not in shapes:
            raise ValueError(f"dataset: unknown modality {name!r}; known are {list(shapes)}")
        if values is None:
            continue
        x, shape = tensor(f"dataset[{name!r}]", values), shapes[name]
        came = tuple(x.shape)
        if x.ndim == len(shape) - 1 and shape[0] == 1:
            x = x[None]  # a vector [D] is a sequence of one frame
        if x.ndim == len(shape) + 1 and len(x) == 1:
            x = x[0]  # with its axis of samples
        # Frames may be more or fewer than the training data had; the axes after them may not.
        if (
            x.ndim != len(shape)
            or (len(shape) == 2 and x.shape[1:] != shape[1:])
            or (len(shape) > 2 and x.shape != shape)
        ):
            expected = shape if shape[0] > 1 or len(shape) != 2 else shape[1:]
            raise ValueError(f"dataset[{name!r}]: expected one sample of shape {expected}, got {came}")
        features[name] = x[None]
    if not features:
        raise ValueError(f"dataset: expected at least one modality of {list(shapes)}, got a record without any")
    fill = {} if like is None else like.data.fill
    tokens = [name for name in features if len(shapes[name]) == 1]
    known = {name: value for name, value in fill.items() if name in features}
    data = MultimodalDataset.from_arrays(features, tokens=tokens, fill=known, allow_empty=True).data
    return data.widened(shapes, fill)


def class_names(logits: Tensor, info: Mapping[str, Any]) -> list[Any]:
    """The name of each sample's likeliest class, or a list of the names of its labels, whose logit is above 0.

    logits [*N, K], as `predict` gives them; the lists are nested as N is
    info : that of the training split, with ``classes`` and ``task``

    Raises ValueError for a data set without names, or with another number of them.
    """
    names = Named(Is("anything", object), 0)("info", info).get("classes")
    Maybe(Several(Is("a name", object)))("info['classes']", names)
    if names is None or Array("float", "[*N, K]")("logits", logits).shape[-1] != len(names):
        got = "none" if names is None else f"{len(names)} for logits {tuple(logits.shape)}"
        raise ValueError(f"info: expected the names of K classes in info['classes'], got {got}")
    if info.get("task") == "multilabel":
        name: Any = lambda row: [names[k] for k in range(len(names)) if row[k]]
        found = logits > 0
    else:
        name, found = lambda k: names[k], logits.argmax(-1)
    depth = logits.ndim - 1
    nested: Any = lambda part, level: name(part) if level == depth else [nested(p, level + 1) for p in part]
    return nested(found.tolist(), 0)
