"""What the backbones of emotion recognition in conversation share: dialogues padded to [B, U], and who speaks in them.

``batch.extras["utterance"]`` bool [B, U] says which utterances are real (all, where it is not there), and
``batch.extras["speaker"]`` int64 [B, U] who speaks (one speaker, where it is not there). Padding never changes a
result, wherever it is and however long. Nothing here loops over dialogues or utterances.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset
from ..checks import Array, Is, Named, Whole
from ..layers import masked_mean
from .base import Backbone, outputs_of

__all__ = ["WIDTHS", "DialogueBackbone", "real_utterances", "run_packed", "speaker_numbers"]


WIDTHS = Named(Whole(1))  # of each modality's vectors


def real_utterances(batch: MultimodalBatch) -> Tensor:
    """bool [B, U]: which utterances are not padding."""
    real = BATCH("batch", batch).extras.get("utterance")
    if real is None:
        return torch.ones(batch.shape, dtype=torch.bool, device=batch.device)
    if real.dtype != torch.bool or tuple(real.shape) != batch.shape:
        raise ValueError(f"extras['utterance']: expected bool {batch.shape}, got {real.dtype} {tuple(real.shape)}")
    return real


def speaker_numbers(batch: MultimodalBatch, speakers: int) -> Tensor:
    """int64 [B, U]: who speaks, 0 in the padding. On a CPU, ValueError for a speaker beyond ``speakers``."""
    Whole(1)("speakers", speakers)
    number = BATCH("batch", batch).extras.get("speaker")
    if number is None:
        return torch.zeros(batch.shape, dtype=torch.int64, device=batch.device)
    if number.dtype != torch.int64 or tuple(number.shape) != batch.shape:
        raise ValueError(f"extras['speaker']: expected int64 {batch.shape}, got {number.dtype} {tuple(number.shape)}")
    number = torch.where(real_utterances(batch), number, 0)
    if number.device.type == "cpu" and number.numel() and not torch.compiler.is_compiling():
        low, high = int(number.min()), int(number.max())
        if low < 0 or high >= speakers:
            raise ValueError(
                f"extras['speaker']: unknown speaker {low if low < 0 else high}; expected 0 to {speakers - 1}"
            )
    return number


def run_packed(rnn: nn.RNNBase, x: Tensor, keep: Tensor) -> Tensor:
    """A recurrent net over the kept steps of each row alone, as if there were no others; zeros elsewhere.

    rnn : batch first; x [n, U, D], keep bool [n, U] -> [n, U, width of the net's output]
    """
    Is("an nn.RNNBase", nn.RNNBase)("rnn", rnn)
    Array("bool", "[n, U]")("keep", keep)
    if Array("float", "[n, U, D]")("x", x).shape != (*keep.shape, rnn.input_size):
        raise ValueError(f"x, keep: expected [n, U, {rnn.input_size}] and [n, U], got {[*x.shape]} and {[*keep.shape]}")
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)  # the kept steps first, in their order
    steps = x.gather(1, order[..., None].expand(x.shape))
    lengths = keep.sum(1).clamp_min(1).cpu()
    packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
    h, _ = nn.utils.rnn.pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=x.shape[1])
    back = order.argsort(1)
    return torch.where(keep[..., None], h.gather(1, back[..., None].expand(h.shape)), 0)


class DialogueBackbone(Backbone):
    """Encodes dialogues utterance by utterance or in context. A subclass defines `encode_dialogue`, `fuse`, `decode`.

    features[m] [B, U, T, D_m] (frames are averaged, usually T = 1); h[m] [B, U, d], z [B, U, d'], logits [B, U, K].
    A row of `encode` is a whole dialogue: h[m] of an utterance may depend on modality m of the others.

    encode_absent : what an absent modality contributes. True, as in the releases: its zeros pass through the encoder,
        which leaves the encoder's bias and, in nets with context, what the neighbours say. Then the fusion cannot tell
        what is missing, and the coalition engine runs whole forward passes (``independent_encoders`` is False). False:
        the encoding is zero where the modality is absent, and coalitions are selections between encodings.

    Raises ValueError for batches that are not dialogues, features of another width and speakers beyond ``speakers``.
    """

    def __init__(self, input_widths: Mapping[str, int], speakers: int, encode_absent: bool):
        super().__init__(encode_absent)
        self.input_widths = dict(WIDTHS("input_widths", input_widths))
        self.speakers = Whole(1)("speakers", speakers)
        self.independent_encoders = not encode_absent

    def encode_dialogue(self, name: str, x: Tensor, real: Tensor, batch: MultimodalBatch) -> Tensor:
        """x [B, U, D] (zeros where absent), real bool [B, U] -> h [B, U, d]; what stands in the padding is dropped."""
        raise NotImplementedError

    def vectors(self, batch: MultimodalBatch) -> dict[str, Tensor]:
        """Per modality one vector an utterance, [B, U, D]: zeros where the modality is absent and in the padding."""
        if BATCH("batch", batch).modalities != tuple(self.input_widths):
            raise ValueError(f"batch: expected the modalities {list(self.input_widths)}, got {list(batch.modalities)}")
        if len(batch.shape) != 2:
            raise ValueError(f"batch: expected dialogues [B, U], got the leading shape {batch.shape}")
        real = real_utterances(batch)
        found = {}
        for m, (name, x) in enumerate(batch.features.items()):
            expected = self.input_widths[name]
            self.check_numbers(name, x)
            if x.ndim != 4 or x.shape[-1] != expected:
                raise ValueError(f"features[{name!r}]: expected [B, U, T, {expected}], got {x.dtype} {tuple(x.shape)}")
            there = (real & batch.present[..., m])[..., None]
            found[name] = masked_mean(x, batch.valid[name] & there)
        return found

    def encode(self, batch: MultimodalBatch) -> dict[str, Tensor]:
        """Per modality h[m] [B, U, d]; zeros in the padding and, unless ``encode_absent``, where it is absent."""
        real = real_utterances(batch)
        encodings = {}
        for m, (name, x) in enumerate(self.vectors(batch).items()):
            keep = real if self.encode_absent else real & batch.present[..., m]
            h = self.encode_dialogue(name, x, real, batch)
            encodings[name] = torch.where(keep[..., None], h, 0)
        return encodings

    def present_only(self, h: dict[str, Tensor], present: Tensor, real: Tensor) -> dict[str, Tensor]:
        """The encodings as the fusion takes them: without padding and, unless ``encode_absent``, what is absent."""
        keep = [real if self.encode_absent else real & present[..., m] for m in range(len(h))]
        return {name: torch.where(k[..., None], h[name], 0) for name, k in zip(self.input_widths, keep, strict=True)}


def used_steps(real: Tensor) -> int:
    """One past the last step that any dialogue uses, at least 1; all steps while a graph is compiled."""
    if torch.compiler.is_compiling():
        return real.shape[1]
    steps = real.any(0).nonzero()
    return int(steps[-1]) + 1 if len(steps) else 1


def dialogue_options(data: MultimodalDataset) -> dict[str, Any]:
    """The options of a dialogue backbone that follow from the data; ValueError for data that are not dialogues."""
    shapes = DATASET("data", data).feature_shapes
    if len(data.data.shape) != 2 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(
            f"data: expected dialogues [B, U] of vectors or sequences (T, D), got the leading shape {data.data.shape} "
            f"and {shapes}"
        )
    speakers = data.info.get("speakers")
    if speakers is None:
        speakers = 1 + int(speaker_numbers(data.data, 1 << 62).max())
    return {
        "input_widths": {name: shape[-1] for name, shape in shapes.items()},
        "outputs": outputs_of(data),
        "speakers": speakers,
    }
