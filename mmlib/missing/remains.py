"""What is left of a data set while plans are applied to it: the samples as rows, their presence, their frames."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch import MultimodalBatch, frame_axis
from .operators import GOLDEN, mix_

if TYPE_CHECKING:
    from .mask import MissingMask
    from .plan import MissingPlan


class Remains:
    """What is left of a data set while plans are applied to it, one row per real sample."""

    def __init__(self, data: MultimodalBatch, device: torch.device):
        if len(data) == 0:
            raise ValueError("dataset: expected at least one sample, got an empty one")
        self.device = device
        if data.ids is None:
            raise ValueError("dataset: expected samples with ids, got a batch without")
        self.data, self.names = data, data.modalities
        self.rows: Tensor | None = None
        ids = data.ids.to(device)
        if len(data.shape) > 1:  # dialogues: every real utterance is a sample, keyed by dialogue and place
            if ids.ndim < len(data.shape):
                place = torch.arange(math.prod(data.shape[1:]), device=device).reshape(1, *data.shape[1:]) + 1
                ids = mix_(ids.reshape(-1, *[1] * (len(data.shape) - 1)) * GOLDEN + place)
            real = data.extras.get("utterance")
            if real is not None:
                self.rows = real.to(device).reshape(-1).nonzero()[:, 0]
        self.ids = self.take(ids)
        if len(self.ids.unique()) != len(self.ids):
            raise ValueError("ids: expected every id once, got samples that share one; masks are keyed by id")
        self.available = self.take(data.present).clone()
        self.present = self.available.clone()
        self.observed: dict[str, Tensor] = {}
        self.restored = 0

    def take(self, x: Tensor) -> Tensor:
        """``x`` [*N, ...] with one row per real sample, where the mask is drawn."""
        x = x.to(self.device)
        flat = x.flatten(0, len(self.data.shape) - 1) if len(self.data.shape) > 1 else x
        return flat if self.rows is None else flat[self.rows]

    def put(self, x: Tensor) -> Tensor:
        """The inverse of `take`: back to [*N, ...], False where there is no sample."""
        if self.rows is not None:
            full = x.new_zeros(math.prod(self.data.shape), *x.shape[1:])
            full[self.rows] = x
            x = full
        return x.reshape(*self.data.shape, *x.shape[1:])

    def frames(self, name: str) -> Tensor:
        """bool [n, T]: the frames of modality ``name`` that are left (before its presence is applied)."""
        return self.observed[name] if name in self.observed else self.take(self.data.observed[name])

    def target(self) -> Tensor:
        y = self.data.target
        if y is None or y.is_floating_point() or tuple(y.shape) != self.data.shape:
            got = "none" if y is None else f"{y.dtype} {tuple(y.shape)}"
            raise ValueError(f"target: this plan needs integer classes {self.data.shape}, got {got}")
        return self.take(y)

    def tokens(self) -> tuple[str, ...]:
        """The names of the modalities of token ids."""
        return tuple(name for name in self.names if not self.data.features[name].is_floating_point())

    def ascending(self) -> Tensor:
        """int64 [n]: the samples by ascending id; utterances dialogue by dialogue, in their order."""
        data = self.data
        assert data.ids is not None
        if len(data.shape) == 1 or data.ids.ndim > 1:
            return self.ids.argsort()
        dialogues = data.ids.cpu().reshape(-1, *[1] * (len(data.shape) - 1)).expand(data.shape)
        return self.take(dialogues).argsort(stable=True)

    def summary(self, name: str, statistic: str) -> Tensor:
        """float64 [n]: mean or Euclidean norm of the observed values of a modality, or its number of frames."""
        seen = self.frames(name)
        if statistic == "length":
            return seen.sum(-1).to(torch.float64)
        x = self.data.features[name]
        if not x.is_floating_point():
            raise ValueError(
                f'statistic: {statistic!r} says nothing about the token ids of {name!r}; expected "length"'
            )
        if x.is_meta:
            raise ValueError(
                f"dataset: this plan looks at the values of {name!r}, which a streamed data set does not keep; draw it "
                f'from dataset.to("cpu"), and apply the mask to the streamed one'
            )
        values = self.take(x)
        axis = frame_axis(values, 1)
        per = values.movedim(axis, 1).flatten(2).to(torch.float64)
        per = torch.where(seen[..., None], per, 0.0)
        if statistic == "norm":
            return per.square().sum((1, 2)).sqrt()
        return per.sum((1, 2)) / (seen.sum(-1) * per.shape[-1]).clamp_min(1)

    def extra_rate(self, name: str) -> Tensor:
        """float64 [n]: the missing rates in an entry of ``extras``."""
        given = self.data.extras.get(name)
        if given is None:
            raise ValueError(f"rates: {name!r} names no entry of extras, which has {sorted(self.data.extras)}")
        if tuple(given.shape) != self.data.shape:
            raise ValueError(
                f"extras[{name!r}]: expected one rate per sample {self.data.shape}, got {tuple(given.shape)}"
            )
        rate = self.take(given).to(torch.float64)
        if not bool(((rate >= 0) & (rate <= 1)).all()):
            raise ValueError(f"extras[{name!r}]: expected missing rates in [0, 1]")
        return rate

    def mask(self, plan: MissingPlan, epoch: int | None) -> MissingMask:
        """The result as a mask."""
        from .mask import MissingMask  # which knows plans, and so comes after this module

        frames = {}
        for name, keep in self.observed.items():
            there = self.present[:, self.names.index(name)]
            if not there.all():
                self.observed[name] = keep & there[:, None]
            frames[name] = int(self.take(self.data.observed[name]).count_nonzero())
        assert self.data.ids is not None
        return MissingMask(
            self.put(self.present),
            {name: self.put(keep) for name, keep in self.observed.items()},
            self.data.ids.to(self.device),
            self.names,
            plan=plan,
            epoch=epoch,
            available=self.put(self.available),
            frames=frames,
            restored=self.restored,
        )
