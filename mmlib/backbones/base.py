"""What every backbone offers: one encoder a modality, a fusion, a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, per_frame
from ..checks import Flag, Whole
from ..layers import scoring

__all__ = ["BACKBONE", "Backbone", "outputs_of"]


class _Plug:
    """An nn.Module with the parts of a backbone, whether or not it is a `Backbone`."""

    expected = "a backbone (an nn.Module with modalities, encode, fuse and decode)"

    def __call__(self, name: str, value: Any) -> Any:
        parts = ("modalities", "encode", "fuse", "decode")
        if not isinstance(value, nn.Module) or not all(hasattr(value, part) for part in parts):
            raise TypeError(f"{name}: expected {self.expected}, got {type(value).__name__}")
        return value


BACKBONE = _Plug()


def outputs_of(data: MultimodalDataset) -> int:
    """K of a data set; TypeError for anything else, ValueError for one without a target that does not say it."""
    if "outputs" not in DATASET("data", data).info:
        raise ValueError("data: expected a target, or info['outputs'], the number of outputs, got neither")
    return Whole(1)("data.info['outputs']", data.info["outputs"])


class Backbone(nn.Module):
    """Encode, fuse, decode. A subclass defines `encoders`, `encode_modality`, `fuse` and `decode`.

    ``encode(batch) -> {m: h[m]}``, row i of ``h[m]`` depends on row i of modality m alone (in eval mode; batch
    statistics are taken over the rows that are encoded). A row whose modality is absent encodes to zeros and its
    encoder does not run on it, so batch statistics never see placeholders; with ``encode_absent=True`` it runs on the
    placeholder, as in several releases.

    ``independent_encoders`` says whether the first sentence holds. The coalition engine relies on it.
    """

    independent_encoders: bool = True
    width: int  # of every encoding h[m]; a subclass whose encodings differ in width leaves it out

    def __init__(self, encode_absent: bool = False):
        super().__init__()
        self.encode_absent = Flag()("encode_absent", encode_absent)
        self.encoders = nn.ModuleDict()

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.encoders)

    def encode_modality(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        """x [n, ...], valid bool [n, T] -> h [n, d] (or more axes); a row without a valid frame encodes to zeros."""
        raise NotImplementedError

    def encode(self, batch: MultimodalBatch) -> dict[str, Tensor]:
        """Per modality h[m] [*N, d]; zeros where the modality is absent."""
        if BATCH("batch", batch).modalities != self.modalities:
            raise ValueError(f"batch: expected the modalities {list(self.modalities)}, got {list(batch.modalities)}")
        lead = len(batch.shape)
        encodings = {}
        for m, (name, x) in enumerate(batch.features.items()):
            flat, valid = x.flatten(0, lead - 1), batch.valid[name].flatten(0, lead - 1)
            there = batch.present[..., m].flatten()
            if self.encode_absent:
                if flat.is_floating_point():  # whatever stands there, the placeholder is zero
                    flat = torch.where(per_frame(there[:, None].expand(valid.shape), flat), flat, 0)
                h = self.encode_modality(name, flat, valid)
            else:
                h = self._encode_rows(name, flat, valid, there)
            encodings[name] = h.unflatten(0, batch.shape)
        return encodings

    def _encode_rows(self, name: str, x: Tensor, valid: Tensor, there: Tensor) -> Tensor:
        """The encoding of the rows that are there, zeros elsewhere."""
        rows = there.nonzero()[:, 0]
        if len(rows) == len(x):
            return self.encode_modality(name, x, valid)
        if len(rows) == 0:
            # The encoder's output shape is known only from a run: one placeholder row, without touching any statistics.
            with scoring(self):
                like = self.encode_modality(name, torch.zeros_like(x[:1]), torch.ones_like(valid[:1]))
            return like.new_zeros(len(x), *like.shape[1:])
        h = self.encode_modality(name, x[rows], valid[rows])
        return h.new_zeros(len(x), *h.shape[1:]).index_copy(0, rows, h)

    def fuse(self, h: dict[str, Tensor], present: Tensor, batch: MultimodalBatch) -> Tensor:
        """h[m] [*N, d_m], present bool [*N, M] -> z [*N, d]."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """z [*N, d] -> logits [*N, K]."""
        raise NotImplementedError

    def make_decoder(self, width: int) -> nn.Module:
        """A new decoder like the backbone's own for encodings of another width, [*N, width] -> [*N, K].

        Methods that supervise a modality alone take their heads from here.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define make_decoder; give the method its heads")

    def forward(self, batch: MultimodalBatch) -> Tensor:
        """Logits [*N, K] of a batch, with what it has present."""
        return self.decode(self.fuse(self.encode(batch), batch.present, batch))
