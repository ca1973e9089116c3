"""DREAM where the paper leaves a choice and another one is taken. It has no public code, so no preset is a release's.

Each option of `OtherDREAMConfig` overrides one step of `DREAM`, which takes them by name: a DREAM that is made with
``enhance_order="sequential"`` is an `OtherDREAM`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset
from ...checks import Array, Either, Flag, Maybe, OneOf, Whole, option
from ...coalitions import arrival_codes, arrival_credit, discrete_predictions
from .._data_checks import check_alike, check_target
from ..dream import DREAM, Contributions, CrossAttention, CrossModalBlock, DREAMConfig, distillation_loss

__all__ = [
    "OtherDREAM",
    "OtherDREAMConfig",
    "SideBySideAttention",
    "add_log_weights",
    "clipped_distillation_loss",
    "permutation_coalitions",
    "permutation_scores",
]


@dataclass(frozen=True)
class OtherDREAMConfig(DREAMConfig):
    """What else the paper's words may mean; each default is what `DREAM` does."""

    # 3.3
    # what a predicted score says: "sign_ge" (score >= 0), "sign_gt", or "round7"
    discretize: str = option("sign_ge", OneOf("sign_ge", "sign_gt", "round7"))
    # the prediction from nothing: the evaluator's on zeros, or the training split's "majority"
    empty: str = option("forward", OneOf("forward", "majority"))
    # Monte-Carlo orders of arrival, the same for all samples; None: every subset
    permutations: int | None = option(None, Maybe(Whole(1)))

    # 3.4
    # what becomes d wide: the frames ("linear"), or the evaluator's "encodings" of them
    input: str = option("linear", OneOf("linear", "encodings"))
    # Z: of "all" modalities, or of the target and the "available" others, whose PSS is above 0
    keys: str = option("all", OneOf("all", "available"))
    enhance: str = option("zero_pss", OneOf("zero_pss", "all", "none"))
    tie_enhance: bool = option(True, Flag())  # the repeats share their parameters
    # all targets from the features before the repeat, or one after another
    enhance_order: str = option("parallel", OneOf("parallel", "sequential"))
    # Z: key and value frames one after another, or side by side along the "feature" axis
    concat: str = option("time", OneOf("time", "feature"))
    affine: bool = option(False, Flag())  # whether the normalisation of Eq. 9 has parameters

    # 3.5
    weight_hidden: int | None = option(128, Maybe(Whole(1)))  # type: ignore[assignment]  # None: a linear projection
    mask_mode: str = option("mul", OneOf("mul", "add_log"))  # Eq. 10 as printed, or softmax(w + log(PSS + 1))
    # what Eq. 12 compares with: softmax(PAS), or PAS "clipped" at 0 / sum
    pas_target: str = option("softmax", OneOf("softmax", "clipped"))
    distill_on: str = option("w", OneOf("w", "masked"))  # Eq. 12 acts on softmax(w), or on the "masked" w' of Eq. 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modality_dropout and (self.permutations is not None or self.empty == "majority"):
            raise ValueError(
                "modality_dropout: expected 0 with permutations or empty='majority'; what a dropped sample scores is "
                "read from the evaluator's predictions of every subset"
            )


# --- 3.3: scores from drawn orders ------------------------------------------------------------------------------------


def permutation_coalitions(orders: Tensor) -> tuple[Tensor, Tensor]:
    """The coalitions that grow along orders of arrival int64 [R, M]: masks bool [S, M], path int64 [R, M + 1].

    ``masks`` are distinct, and ``path[r, k]`` is the place among them of the first k arrivals of order r.
    """
    M = Array("integer", "[R, M]")("orders", orders).shape[1]
    codes, path = torch.unique(arrival_codes(orders), return_inverse=True)
    return (codes[:, None] >> torch.arange(M, device=codes.device)) & 1 == 1, path


def permutation_scores(
    predictions: Tensor, path: Tensor, orders: Tensor, target: Tensor | None = None
) -> Contributions:
    """PSS and PAS averaged over orders of arrival: predictions int [..., S] of the coalitions -> [..., M] each.

    A modality is credited with what its arrival changes: the prediction (Eq. 1), or V (Eq. 4). Unbiased for orders
    drawn evenly, exact for all M!. PSS is never positive where the exact one is 0; it may be 0 where that is positive.

    path, orders : of `permutation_coalitions`. target : [...]
    """
    Array("integer bool", "[..., S]")("predictions", predictions)
    Array("integer", "[R, M + 1]")("path", path)
    if path.shape != (*Array("integer", "[R, M]")("orders", orders).shape[:1], orders.shape[1] + 1):
        raise ValueError(f"path: expected {[len(orders), orders.shape[1] + 1]}, got {list(path.shape)}")
    if path.device.type == "cpu" and path.numel() and int(path.amax()) >= predictions.shape[-1]:
        raise ValueError(f"path: expected places below {predictions.shape[-1]}, as predictions has, got {path.amax()}")
    if target is not None and Array("integer bool", "[...]")("target", target).shape != predictions.shape[:-1]:
        raise ValueError(f"target: expected {list(predictions.shape[:-1])}, got {list(target.shape)}")
    along = predictions[..., path]  # [..., R, M + 1]
    credit = lambda gains: arrival_credit(gains.to(torch.get_default_dtype()), orders)
    pss = credit(along[..., 1:] != along[..., :-1])
    if target is None:
        return Contributions(pss, None)
    value = (along == target[..., None, None]) * torch.arange(along.shape[-1], device=along.device)  # |S| where right
    return Contributions(pss, credit(value.diff(dim=-1)))


# --- 3.4: other attention ---------------------------------------------------------------------------------------------


class SideBySideAttention(CrossAttention):
    """CA whose Z is the parts side by side along the feature axis; they must be equally long."""

    axis = 2

    def forward(self, q: Tensor, parts: list[Tensor], valid: list[Tensor] | None) -> Tensor:
        if len({x.shape[1] for x in parts}) > 1:
            raise ValueError(
                f"concat: 'feature' expects equal lengths in all modalities, got {[x.shape[1] for x in parts]}"
            )
        return super().forward(q, parts, valid)

    def _frames(self, valid: list[Tensor]) -> Tensor:
        return torch.stack(valid).any(0)


class _Block(CrossModalBlock):
    def __init__(self, target: str, modalities: tuple[str, ...], config: OtherDREAMConfig):
        super().__init__(target, modalities, config)
        self.norm = nn.LayerNorm(config.width, elementwise_affine=config.affine)

    def _attention(self, config: Any, parts: int) -> CrossAttention:
        return SideBySideAttention(config, parts) if config.concat == "feature" else CrossAttention(config, parts)


# --- 3.5: other fusion ------------------------------------------------------------------------------------------------


def add_log_weights(w: Tensor, pss: Tensor) -> Tensor:
    """In place of Eq. 10's product: w + log(PSS + 1), [..., M], which grows with PSS whatever the sign of w."""
    check_alike("pss", pss, w)
    return w + torch.log1p(pss)


def clipped_distillation_loss(w: Tensor, pas: Tensor) -> Tensor:
    """Eq. 12 with PAS without its negative part over its sum (uniform where nothing is left): w, pas [B, M] -> []."""
    check_alike("pas", pas, w)
    w = w.to(torch.promote_types(w.dtype, pas.dtype))
    kept = pas.detach().to(w).clamp_min(0)
    total = kept.sum(-1, keepdim=True)
    q = torch.where(total > 0, kept / total.clamp_min(torch.finfo(kept.dtype).tiny), 1 / pas.shape[-1])
    return F.kl_div(torch.log_softmax(w, -1), q, reduction="batchmean")


class OtherDREAM(
    DREAM,
    config=OtherDREAMConfig,
    # what the text says where the counts of Table 3 say otherwise: a linear w, Eq. 9's LN with parameters
    presets={"text": {"weight_hidden": None, "affine": True}},
):
    """DREAM with other answers to what the paper leaves open (`OtherDREAMConfig`)."""

    majority: Tensor  # int64, of each label; -100: not known yet
    orders: Tensor

    def __init__(self, evaluator: nn.Module, *, preset: str = "paper", **options: Any):
        super().__init__(evaluator, preset=preset, **options)
        M, config = len(self.modalities), self.config
        if config.permutations is not None:
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("orders", torch.rand(config.permutations, M, generator=generator).argsort(-1))
        if config.empty == "majority":
            answers = config.outputs if config.multilabel else max(config.labels, 1)
            self.register_buffer("majority", torch.full((answers,), -100))

    def _projections(self, widths: dict[str, int]) -> nn.ModuleDict:
        net: Any = self.evaluator
        if self.config.input == "linear":
            return super()._projections(widths)
        if not hasattr(net, "encode_frames"):
            raise ValueError(
                f"input: 'encodings' expects an evaluator that encodes frames, such as Table3Evaluator, got "
                f"{type(net).__name__}"
            )
        return super()._projections(dict.fromkeys(widths, net.width))

    # 3.3

    def _subsets(self, device: torch.device) -> Tensor:
        if self.config.permutations is None:
            return super()._subsets(device)
        return permutation_coalitions(self.orders)[0]

    def _scores(self, predictions: Tensor, target: Tensor | None) -> Contributions:
        if self.config.permutations is None:
            return super()._scores(predictions, target)
        return permutation_scores(predictions, permutation_coalitions(self.orders)[1], self.orders, target)

    def _sides(self, scores: Tensor) -> Tensor:
        return discrete_predictions(scores, True, self.config.discretize)

    def _check_target(self, y: Tensor | None) -> None:
        c, limit = self.config, 3.0 if self.config.discretize == "round7" else float("inf")
        check_target(y, c.outputs, regression=c.regression, labels=c.labels, multilabel=c.multilabel, limit=limit)

    def _predicted(self, logits: Tensor, masks: Tensor) -> Tensor:
        found = super()._predicted(logits, masks)
        if self.config.empty == "forward":
            return found
        if bool((self.majority == -100).any()):
            raise ValueError("empty: the majority is not known yet; call observe(train) before training without fit")
        return torch.where(masks.any(-1), found, self.majority[:, None])

    def observe(self, data: MultimodalDataset | MultimodalBatch) -> None:
        """Learn the majority prediction of the training split's targets, where ``empty="majority"`` needs it."""
        y = Either(DATASET, BATCH)("data", data).target
        self._check_target(y)
        assert y is not None
        if self.config.empty == "majority":
            self.majority.copy_(self._classes(y).mode(0).values)

    def precompute(self, data: MultimodalDataset, batch_size: int = 1024) -> None:
        self.observe(data)
        super().precompute(data, batch_size)

    def on_epoch_start(self, state: Any) -> None:
        self.observe(state.train)
        super().on_epoch_start(state)

    # 3.4

    def _blocks(self) -> nn.ModuleDict:
        return nn.ModuleDict({m: _Block(m, self.modalities, self.config) for m in self.modalities})

    def _enhancers(self) -> nn.ModuleList:
        rounds = 0 if self.config.enhance == "none" else 1 if self.config.tie_enhance else self.config.repeats
        return nn.ModuleList(self._blocks() for _ in range(rounds))

    def _enhanced(self, x: dict[str, Tensor], valid: dict[str, Tensor] | None, pss: Tensor) -> dict[str, Tensor]:
        return x if self.config.enhance == "none" else super()._enhanced(x, valid, pss)

    def _frames(self, frames: Tensor, name: str) -> Tensor:
        if self.config.input != "encodings":
            return frames
        net: Any = self.evaluator
        with torch.no_grad():
            return net.encode_frames(name, frames)

    def _seen(
        self,
        target: str,
        before: dict[str, Tensor],
        after: dict[str, Tensor],
        valid: dict[str, Tensor] | None,
        pss: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        x = before if self.config.enhance_order == "parallel" else after
        if self.config.keys == "all":
            return x, valid
        seen = {m: torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) for m, h in x.items()}
        seen = seen if valid is None else valid
        there = {m: pss[:, i, None] > 0 for i, m in enumerate(self.modalities)}
        return x, {m: mask if m == target else mask & there[m] for m, mask in seen.items()}

    # 3.5

    def _hidden_widths(self) -> list[int]:
        return [] if self.config.weight_hidden is None else [self.config.weight_hidden]

    def _masked(self, w: Tensor, pss: Tensor) -> Tensor:
        return add_log_weights(w, pss) if self.config.mask_mode == "add_log" else super()._masked(w, pss)

    def _distillation(self, w: Tensor, masked: Tensor, pas: Tensor) -> Tensor:
        on = w if self.config.distill_on == "w" else masked
        return distillation_loss(on, pas) if self.config.pas_target == "softmax" else clipped_distillation_loss(on, pas)
