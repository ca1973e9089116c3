"""What every backbone offers: one encoder a modality, a fusion, a decoder; and a loop for a method's first stage."""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, per_frame
from ..checks import Flag, Is, Maybe, Whole, shown
from ..layers import scoring
from ..losses import sample_losses

__all__ = ["BACKBONE", "Backbone", "outputs_of", "pretrain"]


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
            self.check_numbers(name, x)
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

    def check_numbers(self, name: str, x: Tensor) -> None:
        """Raise TypeError for floats of another precision than the modality's encoder has, but under autocast."""
        if x.is_floating_point() and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type):
            encoder: nn.Module = self.encoders[name] if name in self.encoders else self  # noqa: SIM401  no dict
            known = {p.dtype for p in encoder.parameters()} or {p.dtype for p in self.parameters()}
            if known and x.dtype not in known:
                raise TypeError(
                    f"batch: features[{name!r}] are {x.dtype}, expected {known} as the encoder has; convert"
                )

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


_USUAL: dict[str, Any] = {  # as `TrainConfig` has them
    "optimizer": "adam",
    "schedule": None,
    "epochs": 30,
    "steps": None,
    "batch_size": 64,
    "accumulation": 1,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "clip": None,
    "select": "best",
    "seed": 0,
    "device": "auto",
}


class OnBackbone:
    """The one constructor of methods on a backbone that need no first stage: what such a method adds to its bases."""

    @classmethod
    def _from_data(cls, data: MultimodalDataset, backbone: Any) -> dict[str, Any]:
        """What the data set tells the constructor. Raises ValueError for one that the method cannot take."""
        return {}

    @classmethod
    def for_data(
        cls,
        data: MultimodalDataset,
        backbone: Any = None,
        valid: MultimodalDataset | None = None,
        config: Any = None,
        **options: Any,
    ) -> Self:
        """The method on a backbone for this data set; ``valid`` and ``config``, of a first stage, are not used."""
        made: Any = cls
        return made(backbone, **cls._from_data(DATASET("data", data), backbone), **options)


def check_splits(model: Any, train: Any, valid: Any, called: str = "train") -> None:
    """Raise TypeError for what is no split, ValueError for modalities other than the model's, where it says them."""
    known = tuple(getattr(model, "modalities", DATASET(called, train).modalities))
    for name, split in ((called, DATASET(called, train)), ("valid", Maybe(DATASET)("valid", valid))):
        if split is not None and split.modalities != known:
            raise ValueError(f"{name}: expected the modalities {list(known)}, got {list(split.modalities)}")


def pretrain(
    model: nn.Module, train: MultimodalDataset, valid: MultimodalDataset | None = None, config: Any = None
) -> None:
    """Train ``model``, which maps a batch to logits, on the task loss; it is left on the training device in eval mode.

    The first stage of a method that needs a trained network before its own training: Adam, mini-batches in a seeded
    order, and in the end the weights of the epoch with the smallest loss on ``valid``, or those of the last one without
    it. The core knows no other loop, so this one is plain.

    config : how to train, such as a `TrainConfig`: its ``epochs`` (or ``steps``), ``batch_size`` (times
        ``accumulation``), ``lr``, ``weight_decay``, ``clip``, ``select``, ``seed`` and ``device`` are followed; None
        means the defaults of `TrainConfig`. What changes neither the loss nor the steps (precision, trackers, patience)
        does not apply

    Raises TypeError for a config without epochs, ValueError for another optimizer than "adam" or a schedule,
    FloatingPointError for a loss that is not finite. The caller's random state stays as it was.
    """
    if not any(p.requires_grad for p in Is("an nn.Module", nn.Module)("model", model).parameters()):
        raise ValueError("model: expected at least one parameter that requires a gradient, got none")
    check_splits(model, train, valid)
    if config is not None and not hasattr(config, "epochs"):
        raise TypeError(f"config: expected None or how to train, such as a TrainConfig, got {shown(config)}")
    given = {name: getattr(config, name, usual) for name, usual in _USUAL.items()}
    if other := [f"{name}={given[name]!r}" for name in ("optimizer", "schedule") if given[name] != _USUAL[name]]:
        raise ValueError(
            f"config: expected the optimizer 'adam' and no schedule, which is all that the loop of a first stage has, "
            f"got {', '.join(other)}; give this stage a plainer one, or train its networks yourself"
        )
    device = given["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), given["lr"], weight_decay=given["weight_decay"])
    size = given["batch_size"] * given["accumulation"]
    left = given["steps"] or given["epochs"] * math.ceil(len(train) / size)
    order, best, kept = torch.Generator().manual_seed(given["seed"]), math.inf, None
    with torch.random.fork_rng():
        torch.manual_seed(given["seed"])
        while left:
            model.train()
            for rows in torch.randperm(len(train), generator=order).split(size)[:left]:
                loss = _mean_loss(model, train[rows.to(train.device)].to(device))
                if not math.isfinite(loss.item()):
                    raise FloatingPointError("the loss of a first stage is NaN or infinite; a lower lr may help")
                optimizer.zero_grad()
                loss.backward()
                if given["clip"] is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), given["clip"])
                optimizer.step()
                left -= 1
            if valid is not None and given["select"] == "best":
                places = torch.arange(len(valid), device=valid.device).split(1024)
                with scoring(model):
                    parts = [(len(p), _mean_loss(model, valid[p].to(device)).item()) for p in places]
                if (found := sum(n * loss for n, loss in parts) / len(valid)) < best:
                    best, kept = found, copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)
    model.eval()


def _mean_loss(model: nn.Module, batch: MultimodalBatch) -> Tensor:
    if batch.target is None:
        raise ValueError("train, valid: expected splits with a target")
    return sample_losses(model(batch), batch.target, lead=len(batch.shape)).mean()
