"""MCE as its release computes it, and other interpretations of what the paper leaves open; R marks the release's.

The release (github.com/byzhaoAI/MCE) has code for AV-MNIST, IEMOCAP and nuScenes, which differ. Each option changes one
step of `mmlib.methods.mce.MCE`; ``preset="avmnist"``, ``"iemocap"`` and ``"nuscenes"`` are the three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...backbones.completed import ShowsCompleted
from ...batch import MultimodalBatch
from ...checks import Array, Flag, Maybe, OneOf, Several, Whole, option
from ...coalitions import Pairs, coalition_masks, coalition_rows, shapley_weights
from ...layers import same_draw, scoring
from ...losses import sample_losses
from ..mce import MCE, MCEConfig, Step, inverse_rate, learning_state_factor

__all__ = ["ReleasedMCE", "ReleasedMCEConfig", "released_shapley"]


def released_shapley(counts: Tensor, players: int | None = None) -> Tensor:
    """The release's "Shapley value": counts c_T [..., 2**M], summed over a batch -> [..., M].

    phi_i = c_i / n + sum over T with i, |T| >= 2, of (|T| - 1)! (n - |T|)! / n! (c_T - c_i). The marginal is taken
    against {i}, not against T without i, so phi_i *falls* in the modality's own score; and c_T counts only the samples
    that have all of T.

    players : n; default M. The AV-MNIST release uses 3 for two modalities, the nuScenes one 7 for three
    """
    M = Array("float", "[..., 2**M]")("counts", counts).shape[-1].bit_length() - 1
    if M < 1 or counts.shape[-1] != 2**M:
        raise ValueError(f"counts: expected [..., 2**M], one entry a coalition, got {tuple(counts.shape)}")
    masks = coalition_masks(M, counts.device)
    n = M if players is None else Whole(1)("players", players)
    if n < M:
        raise ValueError(f"players: expected at least the {M} modalities, got {players}")
    weights = torch.tensor([0.0, *shapley_weights(n)], dtype=counts.dtype, device=counts.device)[masks.sum(-1)]
    alone = counts[..., 2 ** torch.arange(M, device=counts.device)]  # c_i
    joint = (masks & (masks.sum(-1, keepdim=True) > 1)) * weights[:, None]  # [2**M, M]
    return alone / n + counts @ joint - alone * joint.sum(0)


@dataclass(frozen=True)
class ReleasedMCEConfig(MCEConfig):
    """The paper's options and those that change a step; the defaults leave every step as the paper has it."""

    train_position: bool = option(True, Flag())  # E_pos is trained; R (IEMOCAP): False, it stays 0

    # values from the training pass (as R), or from one of their own in "eval" mode
    value_pass: str = option("shared", OneOf("shared", "eval"))
    shapley: str = option("exact", OneOf("exact", "released"))  # Eq. 5; R: "released", see released_shapley
    players: int | None = option(None, Maybe(Whole(1)))  # n of released_shapley; R: 3, 3, 7
    subsets: int | None = option(None, Maybe(Whole(1)))  # subsets drawn a step; None: all

    rate_norm: str = option("mean", OneOf("mean", "none"))  # A divided by its mean; R: "none"
    mask_negative: bool = option(True, Flag())  # B is 0 where a modality does better than alone
    state_norm: bool = option(True, Flag())  # B is per sample; R (nuScenes): False
    # U from frozen models; R (nuScenes): "current", the heads as they are
    upper_source: str = option("frozen", OneOf("frozen", "current"))

    # mean over the samples that have m; "completed": so, after f_rec; R: over all samples after f_rec, where those
    # without m add a constant ("released", IEMOCAP), or count, times the fraction with m ("released_whole", AV-MNIST)
    single_loss: str = option("present", OneOf("present", "completed", "released", "released_whole"))
    single_mean: bool = option(False, Flag())  # Eq. 9 over the number of modalities; R (AV-MNIST, IEMOCAP): True
    # Eq. 11; R: "strict", without the full set, sum over a sample's subsets / (2^M_n - 1)
    subset_loss: str = option("mean", OneOf("mean", "strict"))
    # encodings are dropped, then completed; R: "reconstructed", completed, dropped, and completed again
    subset_features: str = option("encoded", OneOf("encoded", "reconstructed"))
    # "scaled": Eq. 13 over sqrt(d), a root mean square; "completed": to features after f_rec. R: "released", mean L1 to
    # these, which are not held still; "released_last" (AV-MNIST), of the last subset alone
    completion_loss: str = option("eq13", OneOf("eq13", "scaled", "completed", "released", "released_last"))
    # what f_rec gets of absent modalities: zeros; R (AV-MNIST, IEMOCAP): True, the encoding of zeros, in the first pass
    complete_absent: bool = option(False, Flag())
    # released losses of subsets: means over all samples of a batch; R (IEMOCAP): True, over those that have something
    over_some: bool = option(False, Flag())
    # samples with nothing count in no loss; R: "keep", in the task loss
    all_missing: str = option("exclude", OneOf("exclude", "keep"))
    # the column of present that the losses read for each modality; R (IEMOCAP): (0, 2, 1)
    columns: tuple[int, ...] | None = option(None, Maybe(Several(Whole(0))))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shapley == "released" and (self.permutations or self.subsets):
            raise ValueError("shapley: 'released' needs every coalition; leave permutations and subsets out")
        if self.subsets and (self.subset_loss, self.completion_loss) != ("mean", "eq13"):
            raise ValueError("subsets: only Eqs. 11 and 13 are means over coalitions that drawing some leaves unbiased")
        if self.complete_absent and self.subset_features == "encoded":
            raise ValueError("complete_absent: True needs subset_features='reconstructed', where subsets get zeros")
        if self.columns is not None:
            object.__setattr__(self, "columns", tuple(self.columns))


COMMON = {"shapley": "released", "rate_norm": "none", "all_missing": "keep"}
TWICE = {
    "players": 3,
    "subset_loss": "strict",
    "subset_features": "reconstructed",
    "complete_absent": True,
    "single_mean": True,
}
AVMNIST = {
    **COMMON,
    **TWICE,
    "single_loss": "released_whole",
    "completion_loss": "released_last",
    "lambda_aux": 0.5,  # the release halves L_aux besides
}
IEMOCAP = {
    **COMMON,
    **TWICE,
    "single_loss": "released",
    "completion_loss": "released",
    "over_some": True,
    "train_position": False,
    "columns": (0, 2, 1),  # of sound, words, face
}
NUSCENES = {
    **COMMON,
    "players": 7,
    "single_loss": "released_whole",  # of the release's batches of one sample: its loss, or 0
    "completion_loss": "released",
    "upper_source": "current",
    "state_norm": False,
}


class ReleasedMCE(
    MCE, config=ReleasedMCEConfig, presets={"avmnist": AVMNIST, "iemocap": IEMOCAP, "nuscenes": NUSCENES}
):
    """MCE with the options of `ReleasedMCEConfig`, such as ``MCE(preset="avmnist")``.

    ``avmnist`` and ``iemocap`` are meant for a backbone with ``encode_absent=True``, as the release's are: only then
    is what the reconstruction module gets of an absent modality the encoding of zeros, and not zeros.
    """

    config: ReleasedMCEConfig

    def __init__(self, backbone: Any, upper: Any = None, *, present: Tensor | None = None, **options: Any):
        super().__init__(backbone, upper, **options)
        names, columns = self.evaluator.modalities, self.config.columns
        self.reconstruction.position.requires_grad_(self.config.train_position)
        if columns is not None and sorted(columns) != list(range(len(names))):
            raise ValueError(f"columns: expected an order of 0 to {len(names) - 1}, got {columns}")
        if self.config.players is not None and self.config.players < len(names):
            raise ValueError(f"players: expected at least the {len(names)} modalities, got {self.config.players}")
        if present is not None:
            self.observe(present)

    @staticmethod
    def needs_bounds(config: Any) -> bool:
        return MCE.needs_bounds(config) and config.upper_source == "frozen"

    def _columns(self, present: Tensor) -> Tensor:
        return present if self.config.columns is None else present[..., list(self.config.columns)]

    def _counted(self, step: Step) -> Tensor:
        return super()._counted(step) if self.config.all_missing == "exclude" else torch.ones_like(step.present[:, 0])

    # --- the pass ---

    def _sees_all(self) -> bool:
        return self.config.subsets is None and super()._sees_all()

    def _chosen(self, occurring: Tensor) -> Tensor | None:
        """As many of the subsets that occur as the option says, drawn anew."""
        config = self.config
        if config.subsets is None or not (config.lambda_sub or config.lambda_aux):
            return super()._chosen(occurring)
        count = min(config.subsets, int(occurring.sum()))
        if not count:
            return torch.zeros_like(occurring)
        drawn = same_draw(torch.multinomial(occurring.float(), count))
        return torch.zeros_like(occurring).index_fill(0, drawn, True)

    def _pass(self, batch: MultimodalBatch, h: dict[str, Tensor], pairs: Pairs) -> tuple[Any, ...]:
        """Two passes where completed features are dropped and completed again, or the losses look at other columns."""
        if self.config.subset_features == "encoded" and self.config.columns is None:
            return super()._pass(batch, h, pairs)
        seen = torch.ones_like(batch.present) if self.config.complete_absent else batch.present
        first = self.evaluator.complete(h, seen)
        main = self.evaluator.decode(self.evaluator.fuse_completed(first, batch))
        dropped = h
        if self.config.subset_features == "reconstructed":  # by now there is something of every modality
            dropped, batch = first, batch.replace(present=torch.ones_like(batch.present))
        shows = ShowsCompleted(self.evaluator)
        logits, completed = coalition_rows(shows, batch, pairs.row, pairs.members, encodings=dropped)
        return torch.where(_like(pairs.is_full, logits), main[pairs.row], logits), completed, main, first

    # --- the factors ---

    def _rate(self, present: Tensor) -> Tensor:
        present = self._columns(present)
        return super()._rate(present) if self.config.rate_norm == "mean" else inverse_rate(present)

    def _bounds(self, step: Step) -> Tensor:
        if self.config.upper_source == "frozen":
            return super()._bounds(step)
        return torch.stack([self._value(self._head(m, x), step.y) for m, x in step.h.items()], -1)

    def _state(self, upper: Tensor, shapley: Tensor, present: Tensor) -> Tensor:
        state = learning_state_factor(upper, shapley, present, self.config.mask_negative)
        return state if self.config.state_norm else state * present.sum(0)

    def _shapley(self, step: Step) -> Tensor:
        if self.config.value_pass == "shared":
            return self._values_of(step)
        with scoring(self):
            step = replace(step, h=self.evaluator.encode(step.batch))
            if self._sees_all():
                step = replace(step, logits=self._pass(step.batch, step.h, step.pairs)[0])
            return self._values_of(step)

    def _values_of(self, step: Step) -> Tensor:
        if self.config.shapley == "exact":
            return super()._shapley(step)
        values = step.pairs.table(self._value(step.logits, step.y[step.pairs.row]))
        return released_shapley(values.sum(0), self.config.players)

    # --- the losses ---

    def _single_losses(self, step: Step) -> Tensor:
        how, scale = self.config.single_loss, len(step.h) if self.config.single_mean else 1
        if how == "present":
            return super()._single_losses(step) / scale
        if how == "completed":
            return super()._single_losses(replace(step, h=step.full)) / scale
        if how == "released" and step.y.dtype == torch.bool:
            raise ValueError(
                "single_loss: 'released' gives missing samples the class 0, of which labels have none; use 'present'"
            )
        losses = []
        fraction = step.pairs.shared.rows(step.present).float().mean(0)
        for m, (name, x) in enumerate(step.full.items()):
            there, logits, y = step.present[:, m], self._head(name, x), step.y
            if how == "released":  # logits and labels of missing samples are zeroed: a constant loss
                logits, y = torch.where(_like(there, logits), logits, 0), torch.where(_like(there, y), y, 0)
            each = sample_losses(logits, y, lead=1).mean()
            losses.append(each if how == "released" else each * fraction[m])
        return torch.stack(losses) / scale

    def _subset_weights(self, pairs: Pairs) -> Tensor:
        return super()._subset_weights(pairs) if self.config.subset_loss == "mean" else self._strict_weights(pairs)

    def _completion_loss(self, step: Step, weights: Tensor) -> Tensor:
        """The mean absolute difference to the completed features, which are not held still."""
        pairs, how = step.pairs, self.config.completion_loss
        if how in ("eq13", "scaled", "completed"):
            width = next(iter(step.h.values())).shape[1] if how == "scaled" else 1
            return (
                super()._completion_loss(replace(step, h=step.full) if how == "completed" else step, weights)
                / width**0.5
            )
        gaps = [(x - step.full[m][pairs.row]).abs().flatten(1).mean(-1) for m, x in step.completed.items()]
        each = torch.stack(gaps, -1) * pairs.dropped * weights  # [R, M]
        return (each.sum(-1) * self._strict_weights(pairs, how == "released_last")).sum()

    def _strict_weights(self, pairs: Pairs, last: bool = False) -> Tensor:
        """Without the full sets, over the 2^|M_n| - 1 subsets of a sample [R]; ``last``: its last subset alone counts.

        The release lists subsets with the first modality as the high bit: {image} is the last of image and audio.
        """
        B, _ = pairs.size
        strict = pairs.counted & ~pairs.is_full
        if last:
            order = pairs.code_of(pairs.members.flip(-1))
            highest = torch.zeros(B, dtype=torch.int64, device=pairs.row.device)
            highest = highest.scatter_reduce(0, pairs.row, torch.where(strict, order, 0), "amax")
            strict = strict & (order == highest[pairs.row])
        subsets = 2.0 ** pairs.members[pairs.full].sum(-1)[pairs.row] - 1
        samples = pairs.shared.count((pairs.own > 0).sum()) if self.config.over_some else B
        return strict / (samples * subsets.clamp_min(1))


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """mask [n] with as many axes as x [n, ...]."""
    return mask.reshape(len(mask), *[1] * (x.ndim - 1))
