"""Token ids and the module that reads them, such as a pre-trained BERT, inside a network of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import MultimodalBatch
from ..checks import Flag, Is, Maybe, Whole
from ..layers import check_fits, frame_shapes

__all__ = ["ReadsText"]


class ReadsText(nn.Module):
    """A base of networks for modalities of token ids; its text encoder is fine-tuned, or frozen and in eval mode.

    text_encoder : takes ``input_ids`` and ``attention_mask`` [B, T] and gives ``last_hidden_state`` (or is)
        [B, T, D]; what its ``config`` says of vocab_size, max_position_embeddings and hidden_size is checked
    feature_shapes : one sample of each modality; those of shape (T,) are token ids
    text_width : D, where the encoder's config does not say it

    Raises ValueError for ids without an encoder, an encoder without ids, and texts longer than it reads.
    """

    def read_with(
        self,
        text_encoder: nn.Module | None,
        feature_shapes: Mapping[str, tuple[int, ...]],
        text_width: int | None = None,
        frozen: bool = False,
    ) -> None:
        Maybe(Is("an nn.Module", nn.Module))("text_encoder", text_encoder)
        self.feature_shapes = dict(feature_shapes)
        self.token_ids = [m for m, shape in feature_shapes.items() if len(shape) == 1]
        if bool(self.token_ids) != (text_encoder is not None):
            raise ValueError(
                f"text_encoder: expected one for the token ids in {self.token_ids}, got none"
                if self.token_ids
                else f"text_encoder: none of {list(feature_shapes)} has token ids, of shape (T,), that it could read"
            )
        about = getattr(text_encoder, "config", None)
        self.vocabulary: int | None = getattr(about, "vocab_size", None)
        self.longest: int | None = getattr(about, "max_position_embeddings", None)
        self.text_width: int | None = Maybe(Whole(1))("text_width", text_width) or getattr(about, "hidden_size", None)
        self.frozen = Flag()("frozen", frozen)
        if text_encoder is not None and self.text_width is None:
            raise ValueError("text_width: the text encoder's config says no hidden_size; pass the width of its tokens")
        if text_encoder is not None and frozen:
            text_encoder.requires_grad_(False).eval()
        self.text_encoder = text_encoder

    def frames_read(self, m: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """(T, D) of a modality as sequences, of token ids once they are read."""
        if m not in self.token_ids:
            return frame_shapes({m: shape})[m]
        if self.longest is not None and shape[0] > self.longest:
            raise ValueError(
                f"features[{m!r}]: expected at most {self.longest} tokens, which the text encoder reads, got {shape[0]}"
            )
        assert self.text_width is not None
        return shape[0], self.text_width

    def read(self, ids: Tensor, attended: Tensor) -> Tensor:
        """ids [B, T], attended bool [B, T] -> tokens [B, T, D]."""
        assert self.text_encoder is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out: Any = self.text_encoder(input_ids=ids, attention_mask=attended.long())
        out = getattr(out, "last_hidden_state", out)
        if tuple(out.shape) != (*ids.shape, self.text_width):
            raise ValueError(
                f"text_encoder: expected tokens {(*ids.shape, self.text_width)}, got {tuple(out.shape)}; see text_width"
            )
        return out

    def check(self, batch: MultimodalBatch, wait: bool = True) -> None:
        """Raise ValueError for other modalities or shapes, and for ids outside the vocabulary, also in ``complete``.

        wait : also look at ids on a GPU, whose answer has to be waited for
        """
        check_fits(batch, self.feature_shapes)
        for m in self.token_ids if wait or batch.device.type == "cpu" else ():
            ids = batch.features[m]
            if self.vocabulary is not None and ids.numel() and not ids.is_meta:  # a streamed data set has none yet
                low, high = int(ids.min()), int(ids.max())
                if low < 0 or high >= self.vocabulary:
                    raise ValueError(
                        f"features[{m!r}]: expected ids in [0, {self.vocabulary}), the text encoder's vocabulary, got "
                        f"values from {low} to {high}"
                    )
        if batch.complete is not None:
            self.check(batch.complete, wait)

    def train(self, mode: bool = True) -> Any:
        """As usual, but a frozen text encoder stays in eval mode."""
        super().train(mode)
        if self.text_encoder is not None and self.frozen:
            self.text_encoder.eval()
        return self
