"""The few blocks that several models share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch import BATCH, MultimodalBatch, frame_axis
from .checks import RATE, SHAPES, Array, Flag, Is, Several, Whole

__all__ = [
    "MLP",
    "SharedBatch",
    "SharesBatches",
    "TransformerLayer",
    "as_frames",
    "check_finite",
    "check_fits",
    "frame_shapes",
    "frame_width",
    "full",
    "joined",
    "kept_modalities",
    "masked_mean",
    "processes",
    "same_draw",
    "sample_mean",
    "scoring",
]


ANY = Array("float integer", "[..., T]")


def as_frames(x: Tensor) -> Tensor:
    """Samples of sequences, images or volumes [n, ...] as sequences [n, T, D]: an image's rows are its frames."""
    return ANY("x", x).movedim(frame_axis(x, 1), 1).flatten(2)


def frame_width(x: Tensor, lead: int) -> int:
    """The width D that `as_frames` gives these features, where ``lead`` axes come before the sample's own."""
    axis = frame_axis(x, lead)
    return x.shape[lead:axis].numel() * x.shape[axis + 1 :].numel()


def frame_shapes(feature_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """The (T, D) of each modality as sequences, from one sample's shape; ValueError for token ids, which have no D."""
    SHAPES("feature_shapes", feature_shapes)
    if tokens := [name for name, shape in feature_shapes.items() if len(shape) < 2]:
        raise ValueError(
            f"feature_shapes: expected sequences, images or volumes, got token ids in {tokens}; embed them"
        )
    views = {m: as_frames(torch.empty(1, *shape, device="meta")) for m, shape in feature_shapes.items()}
    return {m: (x.shape[1], x.shape[2]) for m, x in views.items()}


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [..., T, D] over the frames where mask [..., T] is True -> [..., D]; zeros where there is none."""
    if ANY("x", x).shape[:-1] != Array("bool", "[..., T]")("mask", mask).shape:
        raise ValueError(f"x, mask: expected [..., T, D] and [..., T], got {[*x.shape]} and {[*mask.shape]}")
    kept = torch.where(mask[..., None], x, 0)
    return kept.sum(-2) / mask.sum(-1, keepdim=True).clamp_min(1)


def check_fits(batch: MultimodalBatch, feature_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a batch of samples has these modalities, each of this shape or with fewer frames.

    feature_shapes : one sample of each modality; a shape (T,) is of token ids
    """
    if BATCH("batch", batch).modalities != tuple(feature_shapes):
        raise ValueError(f"batch: expected the modalities {list(feature_shapes)}, got {list(batch.modalities)}")
    if len(batch.shape) != 1:
        raise ValueError(f"batch: expected samples [B], got the leading shape {batch.shape}")
    for m, x in batch.features.items():
        shape = tuple(feature_shapes[m])
        ids = len(shape) == 1
        if right := x.is_floating_point() != ids:
            got, known = ((*one, 0) if ids else frame_shapes({m: one})[m] for one in (tuple(x.shape[1:]), shape))
            right = got[1] == known[1] and got[0] <= known[0]
        if not right:
            raise ValueError(
                f"features[{m!r}]: expected {'token ids' if ids else 'float samples'} of shape {shape}, or fewer "
                f"frames, got {x.dtype} {tuple(x.shape[1:])}"
            )


def check_finite(logits: Tensor) -> None:
    """Raise ValueError where predictions [n, K] are NaN or infinite, which means that the features are."""
    if not bool((finite := torch.isfinite(logits).all(-1)).all()):
        rows = (~finite).nonzero()[:, 0].tolist()
        raise ValueError(
            f"features: expected finite values; the predictions of {len(rows)} samples are NaN or infinite, the first "
            f"at {rows[:5]}"
        )


def full(x: Tensor) -> Tensor:
    """At least float32, whatever the autocast made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def joined(parts: Sequence[Any]) -> Any:
    """Results of several batches (tensors, dicts of them, or None) as one on the CPU."""
    if isinstance(parts[0], dict):
        return {m: joined([part[m] for part in parts]) for m in parts[0]}
    return None if parts[0] is None else torch.cat(list(parts)).cpu()


def kept_modalities(present: Tensor, rate: float) -> Tensor:
    """Modality dropout: what is left of present bool [*N, M] when each is switched off with probability ``rate``.

    A sample that would lose all that it has keeps all of it.
    """
    there = Array("bool", "[*N, M]")("present", present)
    keep = torch.rand(there.shape, device=there.device) >= RATE("rate", rate)
    kept = there & keep
    return torch.where(kept.any(-1, keepdim=True), kept, there)


@contextmanager
def scoring(*modules: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for passes that are only looked at; every submodule's own mode comes back after.

    Also after an exception, and also where some submodules were in another mode than their parent (a frozen part).
    """
    for module in modules:
        Is("an nn.Module", nn.Module)("modules", module)
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


class MLP(nn.Sequential):
    """Linear, ReLU, Dropout, ..., Linear through the given widths, x [..., first] -> [..., last]."""

    def __init__(self, widths: list[int], dropout: float = 0.0):
        Several(Whole(1), 2)("widths", widths)
        RATE("dropout", dropout)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            if i:
                layers += [nn.ReLU(), nn.Dropout(dropout)]
            layers.append(nn.Linear(a, b))
        super().__init__(*layers)


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward net, each behind layer normalisation: x [n, T, d], valid bool [n, T] -> x.

    LNLN's, and so DEAR's: queries, keys and values have a normalisation each and no biases.
    """

    def __init__(self, width: int, heads: int, head_width: int, dropout: float = 0.0):
        super().__init__()
        for name, value in (("width", width), ("heads", heads), ("head_width", head_width)):
            Whole(1)(name, value)
        RATE("dropout", dropout)
        inner = heads * head_width
        self.heads, self.dropout = heads, dropout
        self.norm_q, self.norm_k, self.norm_v, self.norm = (nn.LayerNorm(width) for _ in range(4))
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.feed = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.q(self.norm_q(x))), split(self.k(self.norm_k(x))), split(self.v(self.norm_v(x)))
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=valid[:, None, None], dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm(x))


# --- several processes ------------------------------------------------------------------------------------------------


def processes() -> int:
    """How many processes train together."""
    d = torch.distributed
    return d.get_world_size() if d.is_available() and d.is_initialized() else 1


def same_draw(x: Tensor) -> Tensor:
    """Random numbers as the main process drew them."""
    Is("a tensor", Tensor)("x", x)
    if processes() > 1:
        torch.distributed.broadcast(x, 0)
    return x


class SharedBatch:
    """A mini-batch of which each process has a part: sums, counts and rows of all of it, as one process would see them.

    With one process everything is given back as it is. With several, a process's loss is weighted by its part of the
    batch (as `training.fit` does), which is right for means over samples; what else a loss takes from the batch has to
    come from here. Processes must ask for the same things in the same order.

    size : samples of this process's part, or what else the loop weights the parts by; an integer, also as a tensor []
    like : any tensor on the device
    counts : False where this process only keeps the others company, with samples that are not its own

    Raises TypeError and ValueError for other arguments, also with one process.
    """

    def __init__(self, size: int | Tensor, like: Tensor, counts: bool = True):
        Array("integer", "[...]")("size", size) if isinstance(size, Tensor) else Whole(0)("size", size)
        Is("a tensor", Tensor)("like", like)
        self.world, self.counts = processes(), Flag()("counts", counts)
        if self.world > 1:
            own = torch.as_tensor(size, dtype=torch.int64, device=like.device) * counts
            sizes = [torch.zeros_like(own) for _ in range(self.world)]
            torch.distributed.all_gather(sizes, own)
            self.sizes = torch.stack(sizes)  # of the parts
            self.part = own / self.sizes.sum() if counts else torch.ones((), device=like.device)

    def sum(self, x: Tensor) -> Tensor:
        """x of all processes added up, without gradient."""
        Is("a tensor", Tensor)("x", x)
        if self.world == 1:
            return x
        total = x.detach().contiguous().clone() if self.counts else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        torch.distributed.all_reduce(total)
        return total

    def count(self, n: Tensor) -> Tensor:
        """What a sum over this process's part is divided by, where the mean is over ``n`` (at least 1) of all parts.

        The n of all times this process's part of the batch, since its loss is weighted by that part.
        """
        n = self.sum(Is("a tensor", Tensor)("n", n)).clamp_min(1)
        return n if self.world == 1 else n * self.part

    def rows(self, x: Tensor) -> Tensor:
        """x [n, ...] of all processes, one below the other, in the order of one process.

        A loss of these is the same number in every process, and counts once: the gradient goes to this process's rows
        alone, over its part of the batch.
        """
        Array("bool integer float", "[n, ...]")("x", x)
        if self.world == 1:
            return x
        own = x.detach() if self.counts else x.detach()[:0]
        longest = int(self.sizes.max())
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        plain = padded.to(torch.uint8) if x.dtype == torch.bool else padded
        parts = [torch.zeros_like(plain) for _ in range(self.world)]
        torch.distributed.all_gather(parts, plain)
        # Of k processes the first has the samples 0, k, 2 k, ..., the second 1, k + 1, ...
        there = torch.arange(longest, device=x.device)[:, None] < self.sizes
        every = torch.stack(parts, 1)[there].to(x.dtype)
        if not x.requires_grad or not self.counts:
            return every
        mine = torch.zeros_like(there)
        mine[: len(x), torch.distributed.get_rank()] = True
        carrier = (x - x.detach()) / self.part  # zero, with the gradient of x
        return every.index_add(0, mine[there].nonzero()[:, 0], carrier)


def sample_mean(each: Tensor, mask: Tensor | None = None, shared: SharedBatch | None = None) -> Tensor:
    """Mean over the last axis, where the mask is True; 0 where it never is. ``shared``: over all processes' parts."""
    if mask is None:
        return each.mean(-1)
    count = mask.sum(-1)
    return torch.where(mask, each, 0).sum(-1) / (count.clamp_min(1) if shared is None else shared.count(count))


class SharesBatches:
    """What a method adds to its bases in order to use `SharedBatch` in the loop."""

    _counts = True

    def shared(self, batch: Any) -> SharedBatch:
        """The mini-batch that this one is a part of."""
        return SharedBatch(len(batch), batch.present, self._counts)

    def on_batch(self, state: Any) -> None:
        self._counts = state.weight > 0

    def on_end(self, state: Any) -> None:
        self._counts = True
