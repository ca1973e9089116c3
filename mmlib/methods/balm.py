"""BALM: gates on the inputs, and encoder gradients rescaled by how fast each modality learns.

"BALM: A Model-Agnostic Framework for Balanced Multimodal Learning under Imbalanced Missing Rates", CVPR 2026. The file
follows the paper: the Feature Calibration Module (FCM, Eqs. 7-10), the Gradient Rebalancing Module (GRM, Eqs. 17-26),
and the plug-in of both (Eq. 27, Algorithm 1). The paper's Eqs. 1-27 are printed in the main paper, of which only the
supplement and the release were at hand: their form is our interpretation; others are in `mmlib.methods.released.balm`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.base import BACKBONE, Backbone
from ..batch import BATCH, MultimodalBatch, Output, frame_axis, per_frame
from ..checks import SHAPES, Array, Flag, Number, OneOf, Several, Whole, check_options, option, shown
from ..gradients import Part, Withheld, only_gradient
from ..layers import SharedBatch, as_frames, frame_shapes, frame_width, sample_mean
from ..losses import sample_losses
from ._plug import CRITERION, Criterion, Plug, Plugged, feature_shapes_of, parts_of
from ._presets import Presets

__all__ = [
    "BALM",
    "BALMConfig",
    "FeatureCalibration",
    "GradientRebalancing",
    "UnimodalHeads",
    "discrepancies",
    "modulation_coefficients",
    "spatial_modulation",
]

SMALL = 1e-8
Observed = dict[str, tuple[Tensor, Tensor]]  # per modality the features and the mask [*N, T]

# --- Feature calibration (Eqs. 7-10) ----------------------------------------------------------------------------------


class FeatureCalibration(nn.Module):
    """FCM: one gate for each feature, in (0, 2), from what the whole sample or dialogue shows of every modality.

    Dialogues [B, U] have one gate for all of their utterances, sequences one for all of their frames; an image's rows
    are its frames. Without weights it is the identity.

    feature_shapes : one sample (or utterance) of each modality: (T, D), (C, H, W) or (C, X, Y, Z)
    width : of z; default a quarter of all feature widths together, at least 1

    Takes a batch and gives it back with calibrated features. Raises ValueError for token ids and for other shapes.
    """

    def __init__(self, feature_shapes: Mapping[str, tuple[int, ...]], width: int | None = None):
        super().__init__()
        self.widths = {name: D for name, (_, D) in frame_shapes(SHAPES("feature_shapes", feature_shapes)).items()}
        total = sum(self.widths.values())
        width = max(total // 4, 1) if width is None else Whole(1)("width", width)
        self.joint = nn.Linear(total, width)  # W_g
        self.excite = nn.Linear(width, total)  # W_m of every modality, one below the other

    def forward(self, batch: MultimodalBatch) -> MultimodalBatch:
        """Eq. 10: the gate times what is observed."""
        observed = self.observed(batch)
        lead, calibrated = len(batch.shape), {}
        for name, gate in self.gates(batch, observed).items():
            x = observed[name][0]
            shape = [len(x), *[1] * (lead - 1), *x.shape[lead:]]
            shape[frame_axis(x, lead)] = 1
            calibrated[name] = x * gate.reshape(shape).to(x.dtype)
        result = copy.copy(batch)  # shapes and masks stay, so nothing is to be checked again
        result.features = calibrated
        return result

    def gates(self, batch: MultimodalBatch, observed: Observed | None = None) -> dict[str, Tensor]:
        """Eqs. 7 to 9: the gates [B, D] of each modality, in (0, 2); W_g and W_m act on all modalities at once."""
        squeezed = []
        for name, (x, mask) in (self.observed(batch) if observed is None else observed).items():
            frames = as_frames(x.flatten(0, len(batch.shape) - 1)).reshape(len(batch), -1, self.widths[name])
            squeezed.append(frames.sum(1) / mask.flatten(1).sum(-1, keepdim=True).clamp_min(1))
        z = torch.relu(self.joint(torch.cat(squeezed, -1)))
        gates = 2 * torch.sigmoid(self.excite(z))
        return dict(zip(self.widths, gates.split(list(self.widths.values()), -1), strict=True))

    def observed(self, batch: MultimodalBatch) -> Observed:
        """Per modality the features, zero where nothing is observed or an utterance is padding, and that mask."""
        if BATCH("batch", batch).modalities != tuple(self.widths):
            raise ValueError(f"batch: expected the modalities {list(self.widths)}, got {list(batch.modalities)}")
        real, found = batch.extras.get("utterance"), {}
        for name, x in batch.features.items():
            if not x.is_floating_point() or frame_width(x, len(batch.shape)) != self.widths[name]:
                expected = f"floats with {self.widths[name]} values a frame"
                raise ValueError(f"features[{name!r}]: expected {expected}, got {shown(x)}")
            mask = batch.observed[name] if real is None else batch.observed[name] & real[..., None]
            found[name] = torch.where(per_frame(mask, x), x, 0), mask
        return found


# --- Gradient rebalancing (Eqs. 17-26) --------------------------------------------------------------------------------


class UnimodalHeads(nn.Module):
    """Eq. 17: a head for each modality, W2 ReLU(W1 z^m), all output layers in one tensor.

    widths : d_m of each modality's encodings
    hidden : the width that the fused output layer reads, so that each W2 has its shape
    outputs : K

    z (M tensors [n, d_m]) -> logits [M, n, K].
    """

    def __init__(self, widths: Sequence[int], hidden: int, outputs: int):
        super().__init__()
        self.widths = tuple(Several(Whole(1), 1)("widths", widths))
        Whole(1)("hidden", hidden)
        Whole(1)("outputs", outputs)
        self.first = nn.ModuleList(nn.Linear(width, hidden) for width in widths)
        bound = 1 / math.sqrt(hidden)  # as torch's linear layers begin
        self.weight = nn.Parameter(torch.empty(len(widths), outputs, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(len(widths), 1, outputs).uniform_(-bound, bound))

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        hidden = torch.relu(torch.stack([layer(x) for layer, x in zip(self.first, z, strict=True)]))
        return torch.baddbmm(self.bias.to(hidden.dtype), hidden, self.weight.to(hidden.dtype).transpose(1, 2))


def discrepancies(fused: Tensor, unimodal: Tensor, target: Tensor, kind: str = "kl") -> Tensor:
    """Eq. 19 for each sample: logits [n, K] and [M, n, K], target [n] or [n, K] -> [M, n], in float32 at least.

    kind : "kl", KL(p_fused || p_m); "mse", the mean squared difference of the probabilities (BALM-M)

    Scores (K = 1 and float targets) are the two-class distribution [sigmoid(-y), sigmoid(y)]. So is each label of bool
    targets [n, K], where the result is the mean over labels.
    """
    OneOf("kl", "mse")("kind", kind)
    Array("float", "[n, K]")("fused", fused)
    Array("float", "[M, n, K]")("unimodal", unimodal)
    Array("bool integer float", "[n, ...]")("target", target)
    if fused.shape != unimodal.shape[1:] or len(target) != len(fused):
        shapes = ", ".join(str([*x.shape]) for x in (fused, unimodal, target))
        raise ValueError(f"fused, unimodal, target: expected [n, K], [M, n, K] and [n], got {shapes}")
    fused, unimodal = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (fused, unimodal))
    if target.dtype == torch.bool:  # each label is a score of its own
        each = discrepancies(fused.reshape(-1, 1), unimodal.flatten(1)[..., None], target.flatten().to(fused), kind)
        return each.unflatten(-1, target.shape).mean(-1)
    if target.is_floating_point():
        fused, unimodal = (F.logsigmoid(torch.cat([-x, x], -1)) for x in (fused, unimodal))
    else:
        fused, unimodal = fused.log_softmax(-1), unimodal.log_softmax(-1)
    p = fused.exp()
    if kind == "mse":
        return (p - unimodal.exp()).square().mean(-1)
    return torch.where(p == 0, 0, p * (fused - unimodal)).sum(-1)


def modulation_coefficients(discrepancy: Tensor, rho: float) -> Tensor:
    """Eq. 21, [M] -> [M]: mu^m is rho times the sum of the other modalities' Delta over (the sum of all + 1e-8).

    Where no Delta is negative, every mu lies in [0, rho], they sum to rho (M - 1), and the modality that learns least
    has the largest. Nothing bounds them where signs differ, and a negative sum turns their order around.

    discrepancy : Delta^m, how much closer the unimodal prediction came to the fused one; rho above 0
    """
    if len(Array("float", "[M]")("discrepancy", discrepancy)) < 2:
        raise ValueError(f"discrepancy: expected [M] with M >= 2, got shape {tuple(discrepancy.shape)}")
    Number(above=0)("rho", rho)
    total = discrepancy.sum()
    below = total + SMALL
    return rho * (total - discrepancy) / torch.where(below == 0, SMALL, below)


def modulation_loss(cosine: Tensor, c: Tensor, form: str = "abs") -> tuple[Tensor, Tensor]:
    """Eq. 26: cosines and mu/rho [M] -> L_mod and its derivative by the cosines [M].

    form : "abs", the mean of ``|c_m cos_m|``, which pulls the cosines to 0 (the release); "cggm",
        ``(sum |c_m| - sum c_m cos_m) / M``, which pulls them to 1 where c_m > 0 (CGGM)
    """
    if OneOf("abs", "cggm")("form", form) == "abs":
        return (c * cosine).abs().mean(), c.abs() * cosine.sign() / len(c)
    return (c.abs() - c * cosine).mean(), -c / len(c)


def spatial_modulation(
    fused: Tensor, unimodal: Tensor, coefficients: Tensor, form: str = "abs"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eqs. 23-26: the output layers' weights [P] and [M, P], mu/rho [M] -> cosines [M], L_mod, its derivatives.

    The derivatives are those by both weights. A weight of norm 0 has cosine 0 and no derivative.
    """
    Array("float", "[P]")("fused", fused)
    Array("float", "[M, P]")("unimodal", unimodal)
    Array("float", "[M]")("coefficients", coefficients)
    if unimodal.shape != (len(coefficients), len(fused)):
        raise ValueError(f"unimodal: expected {[len(coefficients), len(fused)]}, got {list(unimodal.shape)}")
    inverse = lambda x: torch.where(x > 0, 1 / x, 0)
    lengths, length = torch.linalg.vector_norm(unimodal, dim=1), torch.linalg.vector_norm(fused)
    product = inverse(lengths * length)
    cosine = (unimodal @ fused) * product
    value, slope = modulation_loss(cosine, coefficients, form)
    to_fused = (slope * product) @ unimodal - (slope @ cosine) * inverse(length.square()) * fused
    along = cosine * inverse(lengths.square())
    return cosine, value, to_fused, slope[:, None] * (product[:, None] * fused - along[:, None] * unimodal)


@dataclass(frozen=True)
class BALMConfig:
    """The strengths of Eqs. 21 and 27, and the paper's ablations."""

    rho: float = option(1.3, Number(above=0))  # of Eq. 21; the paper: in (1.1, 1.6]
    tau: float = option(0.2, Number(0))  # of Eq. 27; the paper: in (0.2, 0.8]; 0 leaves L_mod out
    calibration: bool = option(True, Flag())  # FCM
    rebalancing: bool = option(True, Flag())  # GRM
    scale_gradients: bool = option(True, Flag())  # Eq. 22; False: the encoders' gradients stay (BALM-S)
    discrepancy: str = option("kl", OneOf("kl", "mse"))  # Eq. 19; "mse": BALM-M
    measure: bool = option(False, Flag())  # keep the encoders' RMS gradients before and after Eq. 22

    @property
    def losses(self) -> Criterion:
        """Of task and heads, where the caller has none of its own."""
        return sample_losses

    def __post_init__(self) -> None:
        check_options(self)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "BALM-D": {"tau": 0.0},  # FCM and distribution-driven modulation
    "BALM-S": {"scale_gradients": False},  # FCM and spatial modulation
    "BALM-M": {"discrepancy": "mse"},
    "+FCM": {"rebalancing": False},
    "+GRM": {"calibration": False},
    "monitor": {"calibration": False, "tau": 0.0, "scale_gradients": False},  # heads that only watch
}


class GradientRebalancing(Presets, Plug, config=BALMConfig, presets={"paper": {}}):
    """GRM: unimodal heads watch the encoders and rescale their gradients, in any model and any loop (Algorithm 1)::

        loss = F.cross_entropy(logits, y) + sum(grm(logits, y).values())
        loss.backward()
        grm.rebalance()  # before clipping and the optimizer's step

    The losses are "unimodal" (Eq. 18, of the heads alone, whose encodings are detached) and "modulation" (tau L_mod of
    the previous step, Eq. 27). `rebalance` does Eqs. 19-26 in the release's order: cosines and KL before any weight
    moves, then the encoders' gradients, which must be unscaled. Nothing waits for the device. What is remembered from
    step to step is in buffers; several mini-batches, or processes, before one `rebalance` count as one batch.

    model, encoders : as in `EncoderGradients`
    output : the linear layer of the fused prediction
    widths : d_m of the encodings, one number for all modalities or one each
    catch : the encodings are what the encoders, one module each, gave in this forward pass; else calls are given them
    criterion, preset, options : as in `BALM`; what concerns the calibration has no effect

    ``last`` has of the last step, each [M]: discrepancy, change (Delta), mu, cosine, and with ``measure`` rms_before
    and rms_after. Raises ValueError for what does not fit together, RuntimeError where the order is wrong.
    """

    level: Tensor  # Eq. 19 of the last step
    mu: Tensor
    lmod_value: Tensor
    lmod_fused: Tensor

    def __init__(
        self,
        model: nn.Module,
        encoders: Mapping[str, Part | Iterable[Part]],
        output: nn.Module,
        widths: int | Mapping[str, int],
        *,
        catch: bool = True,
        criterion: Criterion | None = None,
        preset: str = "paper",
        **options: Any,
    ):
        watched = ("discrepancy", "change", "mu", "cosine", "rms_before", "rms_after")
        super().__init__(model, encoders, output, widths, catch, watched)
        self.config = self.configured(preset, options)
        self.form = "abs"  # of Eq. 26
        K, hidden = self.output.shape
        self.heads = UnimodalHeads(self.widths, hidden, K).to(self.output)
        self.withheld = Withheld(self.heads)
        self.criterion = CRITERION("criterion", criterion) or self.config.losses
        self.remember("level", len(self.modalities), value=torch.nan)
        self.remember("mu", len(self.modalities), value=torch.nan)
        self.remember("lmod_value")
        self.remember("lmod_fused", K, hidden)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        encodings: Mapping[str, Tensor] | None = None,
        present: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses, of the fused logits [*N, K] and the target [*N], or bool labels [*N, K].

        encodings : z[m] [*N, d_m]; default what was caught
        present : bool [*N, M], for interpretations that ask for it
        counted : bool [*N], False for padding
        """
        fused, y, N = self.flat(logits, target)
        z, real = self.encodings(encodings, N), None if counted is None else counted.flatten()
        n, M, mask = len(y), len(z), self.mask(real, present, N)
        unimodal = self.heads(z)  # Eq. 17
        each = self.criterion(unimodal.flatten(0, 1), y.repeat(M, *[1] * (y.ndim - 1))).reshape(M, n)
        shared = None if mask is None else SharedBatch(n if real is None else real.sum(), y, self.counts)
        losses = {"unimodal": sample_mean(each, mask, shared).sum()}  # Eq. 18
        with torch.no_grad():
            divergence = self.discrepancies(fused.detach(), unimodal.detach(), y)
            mask = torch.ones_like(divergence, dtype=torch.bool) if mask is None else mask
            self.collect(torch.stack([torch.where(mask, divergence, 0).sum(-1), mask.sum(-1).to(divergence)]))
        term = self.modulation(fused, y, real, losses["unimodal"])
        if self.config.tau:
            losses["modulation"] = self.config.tau * term  # Eq. 27
        return losses

    @torch.no_grad()
    def rebalance(self) -> None:
        """After the backward pass: new coefficients, the next step's L_mod, and the encoders' gradients scaled."""
        total, count = self.collected().to(self.level)
        change = self.advance(total, count)
        cosine = self.compare(torch.nan_to_num(self.mu) / self.config.rho)
        rms = [self.encoders.rms()] if self.config.measure else []
        if self.config.scale_gradients:
            self.scale()
        rms += [self.encoders.rms()] if self.config.measure else []
        values = torch.stack([x.to(self.level) for x in (total / count.clamp_min(1), change, self.mu, cosine, *rms)])
        self.last_values[: len(values)].copy_(values)

    # --- the steps, each of which another interpretation may take differently ---

    def mask(self, counted: Tensor | None, present: Tensor | None, N: torch.Size) -> Tensor | None:
        """The samples that heads and Eq. 19 read, bool [M, n]; here all that are no padding. None for every one."""
        return None if counted is None else counted.expand(len(self.modalities), -1)

    def discrepancies(self, fused: Tensor, unimodal: Tensor, y: Tensor) -> Tensor:
        """Eq. 19, [M, n]."""
        return discrepancies(fused, unimodal, y, self.config.discrepancy)

    def advance(self, total: Tensor, count: Tensor) -> Tensor:
        """Eqs. 20 and 21, from the sum of Eq. 19 over ``count`` samples; gives Delta, which is Eq. 19 at first."""
        now = self.average(total, count)
        change = torch.nan_to_num(torch.where(self.level.isnan(), now, self.gain(now)))
        self.level.copy_(now)
        self.mu.copy_(self.coefficients(change))
        return change

    def average(self, total: Tensor, count: Tensor) -> Tensor:
        """Eq. 19 of this step, [M]; where there is no sample, or no finite value, that of the last one."""
        return torch.where((count > 0) & torch.isfinite(total), total / count.clamp_min(1), self.level)

    def gain(self, now: Tensor) -> Tensor:
        """Eq. 20, [M]: how much closer the heads came."""
        return self.level - now

    def coefficients(self, change: Tensor) -> Tensor:
        """Eq. 21, [M]."""
        return modulation_coefficients(change, self.config.rho)

    def scale(self) -> None:
        """Eq. 22."""
        self.encoders.scale(torch.where(self.mu.isnan(), 1, self.mu))

    def compare(self, c: Tensor) -> Tensor:
        """Eqs. 23-26 with mu/rho [M]: the cosines [M]; the next step's L_mod and its derivative are stored."""
        cosine, value, slope, _ = spatial_modulation(self.output.flatten(), self.heads.weight.flatten(1), c, self.form)
        self.lmod_value.copy_(value)
        self.lmod_fused.copy_(slope.view_as(self.lmod_fused))
        return cosine

    def modulation(self, fused: Tensor, y: Tensor, counted: Tensor | None, unimodal: Tensor) -> Tensor:
        """L_mod of the previous step, with its gradient by the weight of the fused prediction."""
        return self.lmod_value + only_gradient((self.output * self.lmod_fused).sum())


# --- The plug-in (Eq. 27, Algorithm 1) --------------------------------------------------------------------------------


class BALM(Presets, Plugged, nn.Module, config=BALMConfig, presets=PRESETS):
    """A backbone with calibrated inputs and rebalanced encoder gradients (Algorithm 1), a method for ``training.fit``.

    feature_shapes : of the data, for FCM; default ``backbone.config.feature_shapes``
    preset : "paper"; "released", see `mmlib.methods.released.balm.ReleasedBALM`; or one of `PRESETS`
    encoders, output, widths : as in `GradientRebalancing`; default ``backbone.encoders``, the last linear layer of
        ``backbone.decoder``, ``backbone.width``. Of a backbone with one recurrent net over all modalities (GCNet) the
        columns of its first layer are scaled, and the heads read its states with the other modalities zeroed, which is
        our interpretation
    criterion : logits [n, K], target [n] -> each sample's loss [n], of task and heads; default the preset's
    options : fields of `BALMConfig` or `mmlib.methods.released.balm.ReleasedBALMConfig`, over those of the preset

    ``forward(batch)`` gives logits and, in training, the losses "task", "unimodal" and "modulation", means over samples
    (in dialogues over real utterances). ``last`` is that of `GradientRebalancing`. Outside of ``training.fit`` call
    ``rebalance()`` between backward pass and optimizer step; in it, clipping does not count the heads.
    """

    rebalancer = GradientRebalancing

    def __init__(
        self,
        backbone: Backbone,
        feature_shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        preset: str = "paper",
        encoders: Mapping[str, Part | Iterable[Part]] | None = None,
        output: nn.Module | None = None,
        widths: int | Mapping[str, int] | None = None,
        criterion: Criterion | None = None,
        **options: Any,
    ):
        super().__init__()
        self.config = config = self.configured(preset, options)
        self.backbone: Backbone = BACKBONE("backbone", backbone)
        self.criterion = CRITERION("criterion", criterion) or config.losses
        self.calibration: FeatureCalibration | None = None
        self.rebalancing: GradientRebalancing | None = None
        self.states = encoders is None and not len(backbone.encoders)  # the heads read those of a joint net
        if config.calibration:
            self.calibration = FeatureCalibration(feature_shapes_of(backbone, feature_shapes))
        if config.rebalancing:
            parts = parts_of(backbone, encoders, output, widths)
            self.rebalancing = self.rebalancer(backbone, *parts, catch=False, criterion=self.criterion, **vars(config))

    def forward(self, batch: MultimodalBatch) -> Output:
        if self.calibration is not None:
            batch = self.calibration(batch)
        BATCH("batch", batch)
        if not self.training or batch.target is None:
            return Output(self.backbone(batch), {})
        lead, target, real = len(batch.shape), batch.target, batch.extras.get("utterance")
        if target.ndim != lead + (target.dtype == torch.bool):
            raise ValueError(f"target: expected one a sample {batch.shape}, got {tuple(target.shape)}")
        h = self.backbone.encode(batch)
        logits = self.backbone.decode(self.backbone.fuse(h, batch.present, batch))
        each = self.criterion(logits.flatten(0, -2), target.flatten(0, lead - 1))
        losses = {"task": sample_mean(each, None if real is None else real.flatten())}
        if self.rebalancing is not None:
            if self.states:
                with torch.no_grad():
                    h = self.backbone.unimodal_states(batch)  # type: ignore[operator]
            losses.update(self.rebalancing(logits, target, h, batch.present, real))
        return Output(logits, losses)
