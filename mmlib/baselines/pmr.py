"""PMR: prototypes of the classes tell which modality lags behind, and pull its encodings towards them.

Fan et al., "PMR: Prototypical Modal Rebalance for Multimodal Learning" (CVPR 2023), a baseline of MCE's tables, for any
number of modalities of which any may be missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.base import BACKBONE, Backbone, OnBackbone
from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, Output
from ..checks import Array, Either, Number, OneOf, Whole
from ..layers import SharesBatches, processes, scoring
from ..losses import task_loss

if TYPE_CHECKING:
    from ..training import State

__all__ = ["PMR", "prototype_log_probabilities"]


def prototype_log_probabilities(h: Tensor, prototypes: Tensor, seen: Tensor) -> Tensor:
    """Log-softmax over classes of the negative Euclidean distance to their prototypes, in float32 at least.

    h [..., n, d], prototypes [..., K, d], seen bool [..., K] -> [..., n, K]. A class without a prototype takes no part:
    its entry is about -3e38, its probability 0. Where no class has one, all are alike.
    """
    Array("float", "[..., n, d]")("h", h)
    Array("float", "[..., K, d]")("prototypes", prototypes)
    Array("bool", "[..., K]")("seen", seen)
    if h.shape[-1] != prototypes.shape[-1] or seen.shape != prototypes.shape[:-1]:
        raise ValueError(
            f"h, prototypes, seen: expected [..., n, d], [..., K, d] and [..., K], got {tuple(h.shape)}, "
            f"{tuple(prototypes.shape)} and {tuple(seen.shape)}"
        )
    h, prototypes = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (h, prototypes))
    # cdist's gradient at distance 0 is 0, where that of a square root is infinite.
    logits = -torch.cdist(h, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    return logits.masked_fill(~seen[..., None, :], torch.finfo(logits.dtype).min).log_softmax(-1)


class PMR(OnBackbone, SharesBatches, nn.Module):
    """A backbone with the task loss and a prototype loss of the modalities that lag behind.

    At the start of each epoch the class means of every modality's encodings, over the samples that have it, in eval
    mode, move the prototypes: new = momentum * old + (1 - momentum) * mean. A class without a sample keeps its
    prototype; one that never had any has none, and its samples do not count in that modality's terms.

    In each mini-batch, s_m is the sum over the present samples of the probability that the prototypes of m give to
    their class. The modality with the largest s_m is the dominant one. Every weaker one with a sample in the batch adds
    alpha * c_m * CE_m, the mean cross-entropy of its prototype probabilities over its present samples. With two
    modalities this is the paper's pair; for more, all weaker ones are helped, our interpretation. The paper's early
    entropy regulariser, which the release lacks, is left out.

    classes : K
    momentum : weight of the old prototypes, in [0, 1). The release discards those of the untrained net, we blend them
    fraction : of the training split that the means are taken over, a new random part every epoch (released: a tenth)
    coefficient : c_m is 1 ("one", as released) or min(s_dominant / s_m - 1, 1) ("ratio", the paper's)
    batch_size : samples that are encoded at once for the means

    Losses are "task" and "prototype". ``last`` holds ``score`` [M] and ``coefficient`` [M] of the last training step.
    The prototypes are buffers: ``prototypes`` [M, K, d] and ``seen`` bool [M, K].

    Raises ValueError for options out of range, a backbone whose encodings have no common ``width``, and targets that
    are no classes: a sample with several labels has no one prototype to be pulled to.
    """

    prototypes: Tensor
    seen: Tensor

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        alpha: float = 1.0,
        momentum: float = 0.2,
        fraction: float = 1.0,
        coefficient: str = "one",
        batch_size: int = 512,
    ):
        super().__init__()
        self.backbone: Backbone = BACKBONE("backbone", backbone)
        self.classes = Whole(2)("classes", classes)
        self.alpha = Number(0)("alpha", alpha)
        self.momentum = Number(0, below=1)("momentum", momentum)
        self.fraction = Number(above=0, high=1)("fraction", fraction)
        self.coefficient = OneOf("one", "ratio")("coefficient", coefficient)
        self.batch_size = Whole(1)("batch_size", batch_size)
        width = getattr(backbone, "width", None)
        if not isinstance(width, int):
            raise ValueError(f"backbone: expected encodings of a common width, got {type(backbone).__name__}")
        self.last: dict[str, Tensor] = {}
        modalities = len(backbone.modalities)
        self.register_buffer("prototypes", torch.zeros(modalities, classes, width))
        self.register_buffer("seen", torch.zeros(modalities, classes, dtype=torch.bool))

    @classmethod
    def _from_data(cls, data: MultimodalDataset, backbone: Any) -> dict[str, Any]:
        if data.info.get("task") != "classification":
            raise ValueError("data: expected classes, whose means are PMR's prototypes, got scores or labels")
        return {"classes": data.info["outputs"]}

    def forward(self, batch: MultimodalBatch) -> Output:
        h = self.backbone.encode(BATCH("batch", batch))
        logits = self.backbone.decode(self.backbone.fuse(h, batch.present, batch))
        if not self.training or batch.target is None:
            return Output(logits, {})
        self._check_classes(batch)
        return Output(logits, {"task": task_loss(logits, batch.target), **self._prototype_losses(h, batch)})

    def _prototype_losses(self, h: dict[str, Tensor], batch: MultimodalBatch) -> dict[str, Tensor]:
        assert batch.target is not None
        target = batch.target.flatten()
        there = batch.present.flatten(0, -2).T  # [M, n]
        log_p = prototype_log_probabilities(self._stack(h, batch), self.prototypes, self.seen)
        of_class = log_p[:, torch.arange(len(target), device=target.device), target]  # [M, n]
        counted = there & self.seen[:, target]
        shared = self.shared(batch)
        count = shared.count(counted.sum(-1))
        mean = lambda x: torch.where(counted, x, 0).sum(-1) / count

        with torch.no_grad():
            score = shared.sum(torch.where(counted, of_class.exp(), 0).sum(-1))
            judged = shared.sum(counted.sum(-1)) > 0
            dominant = torch.where(judged, score, 0).amax()
            weaker = judged & (score < dominant)
            if self.coefficient == "one":
                coefficient = weaker.to(score.dtype)
            else:
                tiny = torch.finfo(score.dtype).tiny
                coefficient = torch.where(weaker, dominant / score.clamp_min(tiny) - 1, 0).clamp(max=1)
        self.last = {"score": score, "coefficient": coefficient}
        return {"prototype": self.alpha * (coefficient * mean(-of_class)).sum()}

    def _stack(self, h: dict[str, Tensor], batch: MultimodalBatch) -> Tensor:
        """The encodings as one tensor [M, n, d]."""
        lead, width = len(batch.shape), self.prototypes.shape[-1]
        for name, x in h.items():
            if x.shape[lead:] != (width,):
                raise ValueError(f"h[{name!r}]: expected encodings {(*batch.shape, width)}, got {tuple(x.shape)}")
        return torch.stack([x.flatten(0, lead - 1) for x in h.values()])

    @torch.no_grad()
    def update_prototypes(self, data: MultimodalDataset | MultimodalBatch, samples: Tensor | None = None) -> None:
        """Move the prototypes towards the class means of ``data``, or of its samples at ``samples`` int64 [r]."""
        Either(DATASET, BATCH)("data", data)
        samples = torch.arange(len(data)) if samples is None else Array("integer", "[r]")("samples", samples)
        if len(samples) and not -len(data) <= int(samples.min()) <= int(samples.max()) < len(data):
            raise ValueError(
                f"samples: expected places below {len(data)}, got {int(samples.min())} to {int(samples.max())}"
            )
        sums = torch.zeros_like(self.prototypes)
        counts = sums.new_zeros(self.seen.shape)
        with scoring(self.backbone):
            for part in samples.to(data.device).split(self.batch_size):
                batch = data[part].replace(complete=None).to(self.prototypes.device)
                self._check_classes(batch)
                assert batch.target is not None
                h = self._stack(self.backbone.encode(batch), batch).to(sums)
                there = batch.present.flatten(0, -2).T
                member = F.one_hot(batch.target.flatten(), self.classes).T * there[:, None]  # [M, K, n]
                sums += member.to(sums) @ torch.where(there[..., None], h, 0)
                counts += member.sum(-1)
        mean = sums / counts.clamp_min(1)[..., None]
        blended = torch.where(self.seen[..., None], self.momentum * self.prototypes + (1 - self.momentum) * mean, mean)
        fresh = counts > 0
        self.prototypes.copy_(torch.where(fresh[..., None], blended, self.prototypes))
        self.seen.logical_or_(fresh)

    def _check_classes(self, batch: MultimodalBatch) -> None:
        target = batch.target
        if target is None or target.is_floating_point() or target.ndim != len(batch.shape):
            found = "none" if target is None else f"{target.dtype} {tuple(target.shape)}"
            raise ValueError(f"target: PMR expects integer classes {batch.shape}, one a sample, got {found}")

    def on_start(self, state: State) -> None:
        if "utterance" in state.train.data.extras and processes() > 1:
            raise ValueError("method: PMR runs dialogues in one process: its means are over padding too")
        self._check_classes(state.train.data)
        if state.train.info["outputs"] != self.classes:
            raise ValueError(f"classes: expected {state.train.info['outputs']} as in the data, got {self.classes}")

    def on_epoch_start(self, state: State) -> None:
        n, samples = len(state.train), None
        if self.fraction < 1:  # of its own generator: the same in every process and in a resumed run
            generator = torch.Generator().manual_seed((state.config.seed * 1_000_003 + state.epoch) % 2**63)
            samples = torch.randperm(n, generator=generator)[: max(round(self.fraction * n), 1)]
        self.update_prototypes(state.train, samples)
