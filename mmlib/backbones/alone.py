"""Models of one modality alone, frozen after a training of their own, and which samples they get right."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import DATASET, MultimodalBatch, MultimodalDataset, find_ids
from ..checks import Array, Is, Maybe, Named, Number, Several, Text, Whole
from ..coalitions import VALUE, prediction_value
from ..layers import scoring
from .base import Backbone, check_splits, pretrain

__all__ = ["Alone", "UpperBounds", "values_alone"]


class Alone(nn.Module):
    """The frozen model of one modality: a copy of a backbone's encoder, and a decoder of its own."""

    def __init__(self, backbone: Backbone, name: str, head: nn.Module):
        super().__init__()
        self.backbone, self.head, self.name = copy.deepcopy(backbone), copy.deepcopy(head), name

    def forward(self, batch: MultimodalBatch) -> Tensor:
        """Logits of samples that all have the modality."""
        return self.head(self.backbone.encode_modality(self.name, batch.features[self.name], batch.valid[self.name]))


def values_alone(
    model: nn.Module, data: MultimodalDataset, name: str, value: str | None, tolerance: float, batch_size: int = 1024
) -> Tensor:
    """The value of each sample to the model of one modality, [n]; 0 for the samples that do not have it."""
    own, device = data.select([name]), next(model.parameters()).device
    column = torch.zeros(len(data))
    with scoring(model):
        for rows in data.present[:, data.modalities.index(name)].nonzero()[:, 0].split(batch_size):
            batch = own[rows].to(device)
            output = model(batch)
            logits = getattr(output, "logits", output)
            values = prediction_value(logits, batch.target, value, tolerance)  # type: ignore[arg-type]
            column[rows.cpu()] = values.float().cpu()
    return column


def having(data: MultimodalDataset, name: str) -> Tensor:
    """The places of the samples that have a modality, int64 [k]; ValueError where there is none."""
    rows = data.present[:, data.modalities.index(name)].nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"data: expected every modality in some sample, {name!r} is in none")
    return rows


def fold_places(rows: Tensor, folds: int | None, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(places to learn from, places to be valued) of each fold: every one of ``rows`` is valued once, unseen.

    None: one fold, valued on what it has learnt from.
    """
    Maybe(Whole(2))("folds", folds)
    if folds is None:
        return [(rows, rows)]
    if folds > len(rows):
        raise ValueError(f"folds: expected at most the {len(rows)} samples that have the modality, got {folds}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
    fold = torch.empty_like(order).index_copy_(0, order, torch.arange(len(rows), device=rows.device) % folds)
    return [(rows[fold != k], rows[fold == k]) for k in range(folds)]


class UpperBounds(nn.Module):
    """U of MCE Eq. 6, as a table: which training sample the frozen model of each modality alone gets right.

    The models are frozen, so their predictions for a training sample never change: they run once, before the training,
    and a step only looks rows up.

    table : float [n, M] in [0, 1]
    ids : int64 [n], all different
    modalities : the names of the columns
    """

    table: Tensor
    ids: Tensor

    def __init__(self, table: Tensor, ids: Tensor, modalities: tuple[str, ...]):
        super().__init__()
        Array("float", "[n, M]")("table", table)
        Array("integer", "[n]")("ids", ids)
        Several(Text, 1)("modalities", modalities)
        if table.shape != (len(ids), len(modalities)) or not len(ids):
            raise ValueError(
                f"table: expected [{len(ids)}, {len(modalities)}], a row a sample and a column a modality, "
                f"got {tuple(table.shape)}"
            )
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError("table: expected values in [0, 1]")
        order = ids.argsort()
        if len(ids) > 1 and bool((ids[order][1:] == ids[order][:-1]).any()):
            raise ValueError("ids: expected different ids, some occur twice")
        self.modalities = tuple(modalities)
        self.register_buffer("table", table[order].to(torch.get_default_dtype()))
        self.register_buffer("ids", ids[order].long())

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, nn.Module],
        data: MultimodalDataset,
        *,
        value: str | None = None,
        tolerance: float = 0.5,
        batch_size: int = 1024,
    ) -> UpperBounds:
        """The table of ``data`` (the training split) from one trained model a modality.

        models : name -> a method or backbone of that modality alone; left in the mode they were in
        value, tolerance : as in `prediction_value`

        Raises ValueError for models of other modalities than the data's, or data without target.
        """
        Named(Is("an nn.Module", nn.Module))("models", models)
        VALUE("value", value)
        Number(0)("tolerance", tolerance)
        Whole(1)("batch_size", batch_size)
        if set(models) != set(DATASET("data", data).modalities):
            raise ValueError(f"models: expected one for each of {list(data.modalities)}, got {sorted(models)}")
        target = data.data.target
        if target is None:
            raise ValueError("data: expected a split with a target")
        columns = [values_alone(models[name], data, name, value, tolerance, batch_size) for name in data.modalities]
        table = torch.stack(columns, -1)
        return cls(table, data.ids.cpu(), data.modalities)

    @classmethod
    def trained(
        cls,
        backbone: Backbone,
        data: MultimodalDataset,
        valid: MultimodalDataset | None = None,
        config: Any = None,
        *,
        heads: Mapping[str, nn.Module] | None = None,
        value: str | None = None,
        tolerance: float = 0.5,
        folds: int | None = None,
    ) -> UpperBounds:
        """The table of ``data``, the training split, from models trained here, one a modality, on who has it.

        heads : per modality the decoder that is copied; default ``backbone.make_decoder(backbone.width)``
        config : see `pretrain`
        folds : cross-fitting: a model for each of so many parts of the samples, trained on the other parts. None: one
            model, asked for what it has learnt from, as the release does; of that it is right nearly always

        Raises ValueError for a modality that no sample of ``data`` has, and what `pretrain` raises.
        """
        check_splits(Is("a Backbone", Backbone)("backbone", backbone), data, valid, "data")
        Maybe(Named(Is("an nn.Module", nn.Module)))("heads", heads)
        VALUE("value", value)
        if heads is not None and set(heads) != set(data.modalities):
            raise ValueError(f"heads: expected one for each of {list(data.modalities)}, got {sorted(heads)}")
        table = torch.zeros(len(data), len(data.modalities))
        for m, name in enumerate(data.modalities):
            held = None
            if valid is not None and bool((there := valid.present[:, m]).any()):
                held = valid.select([name]).subset(there.nonzero()[:, 0])
            for learnt, valued in fold_places(having(data, name), folds, getattr(config, "seed", 0)):
                model = Alone(backbone, name, heads[name] if heads else backbone.make_decoder(backbone.width))
                pretrain(model, data.select([name]).subset(learnt), held, config)
                table[valued.cpu(), m] = values_alone(model, data.subset(valued), name, value, tolerance)
        return cls(table, data.ids.cpu(), data.modalities)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table: int64 [B] -> [B, M]. An id that is not there gets some other row; see `check`."""
        return self.table[find_ids(self.ids, ids)[0]]

    def check(self, ids: Tensor | None) -> None:
        """Raise ValueError unless every id is in the table."""
        if ids is None:
            raise ValueError("ids: expected samples with ids, by which the upper bounds are looked up")
        Array("integer", "[n]")("ids", ids)
        if not bool((known := find_ids(self.ids, ids.to(self.ids))[1]).all()):
            raise ValueError(
                f"ids: {int((~known).sum())} of {len(ids)} training samples have no upper bound; compute them with "
                f"UpperBounds.from_models on this very split"
            )
