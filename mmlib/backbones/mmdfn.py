"""MM-DFN: MMGCN's graph with a net per speaker before it, more layers, and a memory between them.

Hu, Hou, Wei, Jiang, Mo (ICASSP 2022), as BALM builds on it. One recurrent net, shared by speakers and modalities, reads
each speaker's utterances by themselves; what it says is added to the encodings, three times for the audio, once for the
language, not for the vision. BALM leaves the memory and the speaker embeddings out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import MultimodalBatch, MultimodalDataset
from ..checks import Flag, Is, Maybe, Named, Number, OneOf, Several, Text, Whole, check_known, option
from .dialogue import DialogueBackbone, dialogue_options, run_packed, speaker_numbers
from .mmgcn import Encoder, MMGCNBackbone, MMGCNConfig

__all__ = ["MMDFNBackbone", "MMDFNConfig", "PRESETS"]

PARTY = {"audio": 3.0, "language": 1.0, "vision": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "balm": {},  # the defaults
    "original": {"reasoning": True},
}


@dataclass(frozen=True)
class MMDFNConfig(MMGCNConfig):
    """Modalities and sizes. The defaults are BALM's for IEMOCAP."""

    embedded: tuple[str, ...] | None = option((), Maybe(Several(Text)))
    layers: int = option(16, Whole(1))
    alpha: float = option(0.2, Number(0, 1))
    # weight of the net per speaker for each modality; None: audio 3, vision 0, others 1.
    # What a mapping leaves out has 0
    party: Mapping[str, float] | None = option(None, Maybe(Named(Number(), 0)))
    cross_weight: float = option(1.0, Number(0))  # of edges between modalities
    reasoning: bool = option(False, Flag())  # the memory between the graph net's layers

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("party", self.party or (), self.input_widths)

    def party_weight(self, modality: str) -> float:
        """How much the net per speaker adds to a modality."""
        return PARTY.get(modality, 1.0) if self.party is None else self.party.get(modality, 0.0)


class MMDFNBackbone(MMGCNBackbone):
    """A linear map a modality (the language through a BiGRU besides), a shared BiGRU per speaker, the graph net.

    Shapes as in `MMGCNBackbone`; the encoders are the linear maps and the language's BiGRU, the net per speaker is
    shared and belongs to none of them.
    """

    config: MMDFNConfig

    def __init__(self, config: MMDFNConfig | None = None):
        config = Maybe(Is("an MMDFNConfig", MMDFNConfig))("config", config) or MMDFNConfig()
        DialogueBackbone.__init__(self, config.input_widths, config.speakers, config.encode_absent)
        self.config, self.cross_weight = config, config.cross_weight
        for name, input_width in config.input_widths.items():
            rnn = nn.GRU if config.in_context(name) else None
            self.encoders[name] = Encoder(input_width, config.width, rnn, config.dropout, config.packed)
        self.width = config.width
        self.party: nn.GRU | None = None
        if any(config.party_weight(name) for name in config.input_widths):
            self.party = nn.GRU(
                config.width, config.width // 2, 2, batch_first=True, bidirectional=True, dropout=config.dropout
            )
        self._build_graph(config, config.reasoning)

    @classmethod
    def for_data(cls, data: MultimodalDataset, preset: str = "balm", **options: Any) -> MMDFNBackbone:
        """The backbone that fits a data set's modalities, widths, speakers and outputs.

        preset : "balm" or "original" (with the memory), over the options of `MMDFNConfig`
        """
        OneOf(*PRESETS)("preset", preset)
        return cls(MMDFNConfig(**{**dialogue_options(data), **PRESETS[preset], **options}))

    def encode_dialogue(self, name: str, x: Tensor, real: Tensor, batch: MultimodalBatch) -> Tensor:
        encoder, weight = self.encoders[name], self.config.party_weight(name)
        assert isinstance(encoder, Encoder)
        x = encoder.linear(x)
        h = encoder.context(x, real)
        if self.party is None or not weight:
            return h
        # One row per dialogue and speaker: who does not speak keeps no step of it.
        number = speaker_numbers(batch, self.speakers)
        says = real[:, None] & (number[:, None] == torch.arange(self.speakers, device=x.device)[:, None])  # [B, S, U]
        rows = x[:, None].expand(-1, self.speakers, -1, -1).flatten(0, 1)
        said = run_packed(self.party, rows, says.flatten(0, 1)).unflatten(0, says.shape[:2]).sum(1)
        return h + weight * said
