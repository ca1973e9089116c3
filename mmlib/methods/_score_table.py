"""What a frozen model says of training samples, asked once and looked up by the samples' ids in every later step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import DATASET, MultimodalBatch, MultimodalDataset, find_ids
from ..checks import Whole
from ._data_checks import check_samples

__all__ = ["Precomputes", "ScoreTable"]


class ScoreTable(nn.Module):
    """What was said of each training sample, empty before `fill`. It is of one split, so no part of what is saved."""

    scores: Tensor  # [n, ...]
    ids: Tensor  # int64 [n], sorted
    sums: Tensor  # float64 [n, M], by which changed features are noticed

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", torch.zeros(0), persistent=False)
        self.register_buffer("ids", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("sums", torch.zeros(0, 0, dtype=torch.float64), persistent=False)

    def __len__(self) -> int:
        return len(self.ids)

    def fill(self, data: MultimodalDataset, score: Callable[[MultimodalBatch], Tensor], batch_size: int = 1024) -> None:
        """Keep ``score(batch)`` [B, ...] of every sample; ValueError for ids that occur twice."""
        Whole(1)("batch_size", batch_size)
        ids = DATASET("data", data).ids.cpu()
        if len(ids.unique()) < len(ids):
            raise ValueError("data: expected different ids, some occur twice")
        device, order = self.ids.device, ids.argsort()
        scores = torch.cat([score(batch.to(device)) for batch in _parts(data, batch_size)])
        self.scores, self.ids = scores[order.to(device)], ids[order].to(device)
        self.sums = _checksum(data)[order].to(device)

    def forward(self, ids: Tensor | None) -> Tensor:
        """The scores of samples, int64 [B] -> [B, ...]; ValueError for samples that `fill` has not seen."""
        return self.scores[self._place(ids)]

    def check(self, data: MultimodalDataset) -> None:
        """Raise ValueError unless every sample is here and has the features that it had when it was scored."""
        place = self._place(data.ids)
        same = torch.isclose(_checksum(data).to(self.sums.device), self.sums[place], 1e-7, 1e-7)
        if not bool(same.all()):
            raise ValueError(
                f"features: {int((~same.all(-1)).sum())} of {len(place)} training samples are not as they were when "
                f"their contributions were precomputed; a plan that resamples needs live scores, without precompute"
            )

    def _place(self, ids: Tensor | None) -> Tensor:
        if ids is None:
            raise ValueError("batch: expected ids, by which the precomputed contributions are looked up")
        ids = ids.to(self.ids.device)
        place, found = find_ids(self.ids, ids)
        if not found.all():
            raise ValueError(
                f"ids: {int((~found).sum())} of {len(ids)} training samples have no precomputed "
                f"contributions; call precompute on this very split"
            )
        return place


class Precomputes:
    """The base of a method that may ask its frozen model about a static training split once.

    The method has a ``table``, `_predictions` (what goes into it) and `_check_target`.
    """

    table: ScoreTable
    config: Any
    modalities: tuple[str, ...]

    def _predictions(self, batch: MultimodalBatch) -> Tensor:
        """What the frozen model says of a batch, [B, ...]."""
        raise NotImplementedError

    def _check_target(self, y: Tensor | None) -> None:
        """Raise ValueError for targets that do not fit the configuration."""
        raise NotImplementedError

    def precompute(self, data: MultimodalDataset, batch_size: int = 1024) -> None:
        """Ask the frozen model about a static training split once; training steps then look it up by id.

        This equals asking at every step wherever the same samples come with the same features in every epoch, which
        `training.fit` has checked at every epoch; modality dropout cuts what was looked up. In eval mode all is live.
        """
        if DATASET("data", data).modalities != self.modalities:
            raise ValueError(f"data: expected the modalities {list(self.modalities)}, got {list(data.modalities)}")
        self._check_target(data.target)
        self.table.fill(data, self._predictions, batch_size)

    def on_epoch_start(self, state: Any) -> None:
        """The loop's event: check the split as it is trained on in this epoch, and what was precomputed for it."""
        check_samples(state.train.data, self.config.feature_shapes)
        self._check_target(state.train.target)
        if len(self.table):
            self.table.check(state.train)


def _parts(data: MultimodalDataset, size: int) -> Iterator[MultimodalBatch]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _checksum(data: MultimodalDataset) -> Tensor:
    """One number [n, M] for the values and the valid frames of each modality of each sample, on the CPU."""
    columns = []
    for name in data.modalities:
        parts = []
        for batch in _parts(data, 1024):
            values = batch.features[name].flatten(1)
            values = torch.cat([values, batch.valid[name].to(values)], 1)
            wave = torch.sin(torch.arange(1, values.shape[1] + 1, device=values.device, dtype=torch.float64))
            parts.append((values.double() @ wave).cpu())
        columns.append(torch.cat(parts))
    return torch.stack(columns, -1)
