"""BALM as its release has it, and other interpretations of its text: each option changes one step of GRM.

The release adds noise to the scaled gradients, which the supplement does not mention; it lists its heads in another
order than its coefficients, so that each mu meets another modality's cosine (`MEETS`); and scores have squared errors.
The text speaks of cosines of gradients, where the release has weights, and leaves open what tames coefficients that
mini-batch noise drives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...checks import Either, Flag, Maybe, Number, OneOf, Several, Whole, option
from ...gradients import only_gradient, reduce_sums
from ...layers import processes, sample_mean
from ...losses import sample_losses
from .._plug import Criterion
from ..balm import BALM, BALMConfig, GradientRebalancing, modulation_loss, spatial_modulation

if TYPE_CHECKING:
    from ...training import State

__all__ = ["ReleasedBALM", "ReleasedBALMConfig", "ReleasedRebalancing"]

RELEASED = {"grad_noise": True, "cosine_columns": "released", "score_loss": "squared"}
# The modality whose cosine the mu of each one meets in the release: coefficients are listed audio, vision, language,
# heads language, audio, vision.
MEETS = {"audio": "language", "vision": "audio", "language": "vision"}


def squared_losses(logits: Tensor, target: Tensor) -> Tensor:
    """`sample_losses`, but squared errors of scores."""
    losses = sample_losses(logits, target)
    return losses.square() if target.is_floating_point() else losses


@dataclass(frozen=True)
class ReleasedBALMConfig(BALMConfig):
    """What another interpretation of BALM may change; the defaults are those of `BALMConfig`."""

    grad_noise: bool = option(False, Flag())  # True: noise with the standard deviation of each scaled encoder gradient
    # the number of the modality whose cosine each mu meets in Eq. 26, None for its own; "released": by name as `MEETS`
    # has it, which is (2, 0, 1) for audio, vision, language and nothing for modalities of other names
    cosine_columns: tuple[int, ...] | str | None = option(None, Maybe(Either(OneOf("released"), Several(Whole(0)))))
    score_loss: str = option("absolute", OneOf("absolute", "squared"))  # of task and heads where targets are scores
    # heads and Eq. 19 read every sample; "present": those that have the modality
    samples: str = option("all", OneOf("all", "present"))
    smoothing: float = option(0.0, Number(0, below=1))  # weight of the past in a moving average of Eq. 19
    # Eqs. 19-21 once a step; "epoch": over each epoch, for the next, none in the first
    interval: str = option("step", OneOf("step", "epoch"))
    # bounds of mu, such as (0, rho M)
    mu_clip: tuple[float, float] | None = option(None, Maybe(Several(Number(), 2, 2)))
    # in place of Eq. 21; 2 rho / 3 is its mean for M = 3
    mu_constant: float | tuple[float, ...] | None = option(None, Maybe(Either(Number(0), Several(Number(0), 1))))
    cos_on: str = option("weight", OneOf("weight", "grad"))  # Eqs. 23-25 of weights; "grad": of gradients, as the text
    lmod: str = option("abs", OneOf("abs", "cggm"))  # Eq. 26, see `modulation_loss`
    lmod_heads: bool = option(False, Flag())  # L_mod moves the heads too

    @property
    def losses(self) -> Criterion:
        return squared_losses if self.score_loss == "squared" else sample_losses

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mu_clip", "mu_constant", "cosine_columns"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if self.mu_clip is not None and self.mu_clip[0] > self.mu_clip[1]:
            raise ValueError(f"mu_clip: expected None or a pair (low, high), got {self.mu_clip}")


class ReleasedRebalancing(GradientRebalancing, config=ReleasedBALMConfig, presets={"released": RELEASED}):
    """GRM with other steps: each option of `ReleasedBALMConfig` is one of them.

    With ``cos_on="grad"`` the cosines are those of the gradients of this step and L_mod is differentiated through them
    (a second derivative), with the coefficients of the previous step; a stored value would have no gradient. Several
    mini-batches before one `rebalance` have the mean of their cosines.
    """

    config: ReleasedBALMConfig
    epoch_sums: Tensor
    lmod_unimodal: Tensor
    pairs: Tensor
    constant: Tensor

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        M, columns, constant = len(self.modalities), self.config.cosine_columns, self.config.mu_constant
        if isinstance(columns, str):
            names = self.modalities
            columns = tuple(names.index(MEETS[m]) for m in names) if {*names} == {*MEETS} else None
        if columns is not None and sorted(columns) != list(range(M)):
            raise ValueError(f"cosine_columns: expected an order of 0 to {M - 1}, got {columns}")
        if isinstance(constant, tuple) and len(constant) != M:
            raise ValueError(f"mu_constant: expected one number or {M}, got {constant}")
        self.form = self.config.lmod
        self._cosines: Tensor | None = None
        self.remember("epoch_sums", 2, M)
        self.remember("lmod_unimodal", *self.heads.weight.shape)
        columns = columns or tuple(range(M))
        self.register_buffer("pairs", torch.tensor([columns.index(m) for m in range(M)]).to(self.output.device), False)
        given = torch.tensor(0.0 if constant is None else constant).to(self.output)
        self.register_buffer("constant", given.expand(M).clone(), False)

    def mask(self, counted: Tensor | None, present: Tensor | None, N: torch.Size) -> Tensor | None:
        mask, M = super().mask(counted, present, N), len(self.modalities)
        if self.config.samples == "all":
            return mask
        if present is None or present.shape != (*N, M):
            shape = None if present is None else tuple(present.shape)
            raise ValueError(f"present: expected bool {(*N, M)} for samples='present', got {shape}")
        there = present.reshape(-1, M).T
        return there if mask is None else mask & there

    def average(self, total: Tensor, count: Tensor) -> Tensor:
        now, past = super().average(total, count), self.config.smoothing
        return torch.where(self.level.isnan(), now, past * self.level + (1 - past) * now)

    def advance(self, total: Tensor, count: Tensor) -> Tensor:
        if self.config.interval == "step":
            return super().advance(total, count)
        self.epoch_sums += torch.stack([total, count])
        return self.last["change"].clone()

    @torch.no_grad()
    def finish_epoch(self) -> None:
        """With ``interval="epoch"``: the coefficients of the next epoch, from what was summed over this one."""
        if self.config.interval == "epoch":
            self.last_values[1].copy_(super().advance(self.epoch_sums[0], self.epoch_sums[1]))
            self.epoch_sums.zero_()

    def coefficients(self, change: Tensor) -> Tensor:
        mu = super().coefficients(change) if self.config.mu_constant is None else self.constant
        return mu if self.config.mu_clip is None else mu.clamp(*self.config.mu_clip)

    def scale(self) -> None:
        super().scale()
        if self.config.grad_noise:
            self.encoders.disturb(self.encoders.spreads())

    def compare(self, c: Tensor) -> Tensor:
        if self.config.cos_on == "grad":
            if self._cosines is None:
                raise RuntimeError("compare: expected the losses of a forward pass before it")
            (total, count), self._cosines = reduce_sums(self._cosines).to(self.level), None
            return total / count.clamp_min(1)
        weights = self.output.flatten(), self.heads.weight.flatten(1)
        cosine, value, fused, unimodal = spatial_modulation(*weights, self._paired(c), self.form)
        self.lmod_value.copy_(value)
        self.lmod_fused.copy_(fused.view_as(self.lmod_fused))
        if self.config.lmod_heads:
            self.lmod_unimodal.copy_(unimodal.view_as(self.lmod_unimodal))
        return cosine

    def modulation(self, fused: Tensor, y: Tensor, counted: Tensor | None, unimodal: Tensor) -> Tensor:
        if self.config.cos_on == "grad":
            return self._gradient_modulation(sample_mean(self.criterion(fused, y), counted), unimodal)
        term = super().modulation(fused, y, counted, unimodal)
        if self.config.lmod_heads:
            term = term + only_gradient((self.heads.weight * self.lmod_unimodal).sum())
        return term

    def _gradient_modulation(self, task: Tensor, unimodal: Tensor) -> Tensor:
        """Eqs. 23-26 on the gradients of the output layers, differentiable."""
        more = bool(self.config.tau)
        of = lambda loss, x, keep: torch.autograd.grad(loss, x, create_graph=keep, retain_graph=True, allow_unused=True)
        (fused,) = of(task, self.output, more)
        (own,) = of(unimodal, self.heads.weight, more and self.config.lmod_heads)
        if fused is None:
            raise ValueError("output: expected the layer that the logits come from, they do not depend on it")
        own, fused = own.flatten(1), fused.flatten()
        product = torch.linalg.vector_norm(own, dim=1) * torch.linalg.vector_norm(fused)
        cosine = torch.where(product > 0, (own @ fused) / torch.where(product > 0, product, 1), 0)
        new = torch.stack([cosine.detach(), torch.ones_like(cosine)]) * self.counts
        self._cosines = new if self._cosines is None else self._cosines + new
        return modulation_loss(cosine, self._paired(torch.nan_to_num(self.mu) / self.config.rho), self.form)[0]

    def _paired(self, c: Tensor) -> Tensor:
        """The coefficient that meets the cosine of each modality."""
        return c if self.config.cosine_columns is None else c.index_select(0, self.pairs)


class ReleasedBALM(BALM, config=ReleasedBALMConfig, presets={"released": RELEASED}):
    """BALM around a `ReleasedRebalancing`.

    What of the release is no part of a method is given to the training: masks in blocks of dialogues
    (`MissingPlan("imbalanced", ..., assign="blocked")`), selection by weighted F1 (``TrainConfig(monitor=
    "weighted_f1")``), Adam and ``clip=2.0``.
    """

    config: ReleasedBALMConfig
    rebalancer = ReleasedRebalancing

    def on_start(self, state: State) -> None:
        if self.rebalancing is not None and self.config.cos_on == "grad" and processes() > 1:
            raise ValueError(
                "cos_on: 'grad' supports one process: its cosines are those of the gradients of a whole mini-batch; "
                "run with one, or with cos_on='weight'"
            )
        super().on_start(state)

    def on_epoch_end(self, state: State) -> None:
        if isinstance(self.rebalancing, ReleasedRebalancing):
            self.rebalancing.finish_epoch()
