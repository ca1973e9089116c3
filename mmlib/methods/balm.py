"""BALM: gates on the inputs, and encoder gradients rescaled by how fast each modality learns.

"BALM: A Model-Agnostic Framework for Balanced Multimodal Learning under Imbalanced Missing Rates", CVPR 2026. The file
follows the paper: the Feature Calibration Module (FCM, Eqs. 7-10), the Gradient Rebalancing Module (GRM, Eqs. 17-26),
and the plug-in of both (Algorithm 1, Eq. 27). `GradientRebalancing` is given the encoders of any model and serves
CGGM, its parent, too; `EncoderGradients` is all that OGM-GE needs. The paper's Eqs. 1-27 are printed in the main paper,
of which only the supplement and the release were at hand: they are our interpretation, and where the two differ
`BALMConfig` has an option.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.base import BACKBONE, Backbone
from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, Output, frame_axis, per_frame
from ..checks import (
    SHAPES,
    Array,
    Either,
    Flag,
    Function,
    Is,
    Maybe,
    Named,
    Number,
    OneOf,
    Several,
    Whole,
    check_options,
    from_preset,
    option,
)
from ..layers import SharedBatch, as_frames, frame_shapes, processes
from ..losses import sample_losses

if TYPE_CHECKING:
    from ..training import State

__all__ = [
    "BALM",
    "PRESETS",
    "BALMConfig",
    "EncoderGradients",
    "FeatureCalibration",
    "GradientRebalancing",
    "UnimodalHeads",
    "discrepancies",
    "modulation_coefficients",
    "spatial_modulation",
]

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits [n, K], target [n] (or labels) -> each sample's loss [n]
Encodings = Callable[[MultimodalBatch, dict[str, Tensor]], Mapping[str, Tensor]]
SMALL = 1e-8

# --- Feature calibration (Eqs. 7-10) ----------------------------------------------------------------------------------


class FeatureCalibration(nn.Module):
    """FCM: one gate for each feature, in (0, 2), from what the whole sample or dialogue shows of every modality.

    squeeze s^m, the mean over what is observed; z = ReLU(W_g [s^1; ...; s^M] + b); gate 2 sigmoid(W_m z + b_m);
    the calibrated x is the gate times x where x was observed, else 0. Dialogues [B, U] have one gate for all of their
    utterances, sequences one for all of their frames; an image's rows are its frames. Without weights it is the
    identity.

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

    def gates(self, batch: MultimodalBatch) -> dict[str, Tensor]:
        """The gates [B, D] of each modality, in (0, 2)."""
        return self._gates(batch, self._seen(batch))

    def _seen(self, batch: MultimodalBatch) -> dict[str, Tensor]:
        """The features with zeros for what is not observed, and for utterances that are padding."""
        if BATCH("batch", batch).modalities != tuple(self.widths):
            raise ValueError(f"batch: expected the modalities {list(self.widths)}, got {list(batch.modalities)}")
        lead = len(batch.shape)
        for name, x in batch.features.items():
            axis = frame_axis(x, lead)
            width = x.shape[lead:axis].numel() * x.shape[axis + 1 :].numel()
            if not x.is_floating_point() or width != self.widths[name]:
                raise ValueError(
                    f"features[{name!r}]: expected floats with {self.widths[name]} values a frame, got {x.dtype} "
                    f"{tuple(x.shape)}"
                )
        return {name: torch.where(per_frame(self._mask(batch, name), x), x, 0) for name, x in batch.features.items()}

    @staticmethod
    def _mask(batch: MultimodalBatch, name: str) -> Tensor:
        real = batch.extras.get("utterance")
        return batch.observed[name] if real is None else batch.observed[name] & real[..., None]

    def _gates(self, batch: MultimodalBatch, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        B, lead, squeezed = len(batch), len(batch.shape), []
        for name, x in seen.items():
            frames = as_frames(x.flatten(0, lead - 1)).reshape(B, -1, self.widths[name])
            count = self._mask(batch, name).flatten(1).sum(-1, keepdim=True)
            squeezed.append(frames.sum(1) / count.clamp_min(1))
        z = torch.relu(self.joint(torch.cat(squeezed, -1)))
        gates = 2 * torch.sigmoid(self.excite(z))
        return dict(zip(self.widths, gates.split(list(self.widths.values()), -1), strict=True))

    def forward(self, batch: MultimodalBatch) -> MultimodalBatch:
        BATCH("batch", batch)
        lead, calibrated, seen = len(batch.shape), {}, self._seen(batch)
        for name, gate in self._gates(batch, seen).items():
            x = seen[name]
            shape = [len(x), *[1] * (lead - 1), *x.shape[lead:]]
            shape[frame_axis(x, lead)] = 1
            calibrated[name] = x * gate.reshape(shape).to(x.dtype)
        result = copy.copy(batch)  # shapes and masks stay, so nothing is to be checked again
        result.features = calibrated
        return result


# --- Distribution-driven modulation (Eqs. 17-22) ----------------------------------------------------------------------


class UnimodalHeads(nn.Module):
    """Eq. 17: a head for each modality, W2 ReLU(W1 z^m), all output layers in one tensor.

    widths : d_m of each modality's encodings
    hidden : the width that the fused output layer reads, so that each W2 has its shape
    outputs : K

    z (M tensors [n, d_m]) -> hidden [M, n, hidden], logits [M, n, K].
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

    def forward(self, z: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(torch.stack([layer(x) for layer, x in zip(self.first, z, strict=True)]))
        return hidden, torch.baddbmm(self.bias.to(hidden.dtype), hidden, self.weight.to(hidden.dtype).transpose(1, 2))


def discrepancies(fused: Tensor, unimodal: Tensor, target: Tensor, kind: str = "kl") -> Tensor:
    """Eq. 19 for each sample: logits [n, K] and [M, n, K], target [n] or [n, K] -> [M, n], in float32 at least.

    kind : "kl", KL(p_fused || p_m); "mse", the mean squared difference of the probabilities (BALM-M); "accuracy",
        whether the unimodal prediction is right, of scores whether its sign is (CGGM)

    Scores (K = 1 and float targets) are the two-class distribution [sigmoid(-y), sigmoid(y)]. So is each label of bool
    targets [n, K], where the result is the mean over labels.
    """
    OneOf("kl", "mse", "accuracy")("kind", kind)
    Array("float", "[n, K]")("fused", fused)
    Array("float", "[M, n, K]")("unimodal", unimodal)
    n = Array("bool integer float", "[n, ...]")("target", target).shape[0]
    if fused.shape != unimodal.shape[1:] or n != len(fused):
        raise ValueError(
            f"fused, unimodal, target: expected [n, K], [M, n, K] and [n], got {[*fused.shape]}, {[*unimodal.shape]} "
            f"and {[*target.shape]}"
        )
    fused, unimodal = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (fused, unimodal))
    if target.dtype == torch.bool:  # each label is a score of its own
        each = discrepancies(fused.reshape(-1, 1), unimodal.flatten(1)[..., None], target.flatten().to(fused), kind)
        return each.unflatten(-1, target.shape).mean(-1)
    scores = target.is_floating_point()
    if kind == "accuracy":
        right = (unimodal[..., 0] > 0) == (target > 0) if scores else unimodal.argmax(-1) == target
        return right.to(unimodal.dtype)
    if scores:
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
    (small Delta) has the largest. Nothing bounds them where signs differ, and a negative sum turns their order around.
    Zeros give zeros. (The release has 1e-8 in the numerator too.)

    discrepancy : Delta^m, how much closer the unimodal prediction came to the fused one
    rho : strength, above 0

    Raises ValueError for another shape or rho.
    """
    if len(Array("float", "[M]")("discrepancy", discrepancy)) < 2:
        raise ValueError(f"discrepancy: expected [M] with M >= 2, got shape {tuple(discrepancy.shape)}")
    Number(above=0)("rho", rho)
    total = discrepancy.sum()
    below = total + SMALL
    return rho * (total - discrepancy) / torch.where(below == 0, SMALL, below)


# --- Spatial modulation (Eqs. 23-26) ----------------------------------------------------------------------------------


def spatial_modulation(
    fused: Tensor, unimodal: Tensor, coefficients: Tensor, form: str = "abs", heads: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Eqs. 23-26 and their derivatives: weights [P] and [M, P], mu/rho [M] -> cosines [M], L_mod, and dL_mod/dweights.

    form : "abs", the mean of ``|c_m cos_m|``, which pulls the cosines to 0 (the release); "cggm",
        ``(sum |c_m| - sum c_m cos_m) / M``, which pulls them to 1 where c_m > 0 (CGGM)
    heads : also the derivative by the unimodal weights; else None

    A weight of norm 0 has cosine 0 and no derivative.
    """
    Array("float", "[P]")("fused", fused)
    Array("float", "[M, P]")("unimodal", unimodal)
    Array("float", "[M]")("coefficients", coefficients)
    OneOf("abs", "cggm")("form", form)
    Flag()("heads", heads)
    if unimodal.shape != (len(coefficients), len(fused)):
        raise ValueError(f"unimodal: expected {[len(coefficients), len(fused)]}, got {list(unimodal.shape)}")
    lengths, length = torch.linalg.vector_norm(unimodal, dim=1), torch.linalg.vector_norm(fused)
    inverse = _inverse(lengths * length)
    cosine = (unimodal @ fused) * inverse
    value, slope = _spatial(cosine, coefficients, form)
    to_fused = (slope * inverse) @ unimodal - (slope @ cosine) * _inverse(length.square()) * fused
    if not heads:
        return cosine, value, to_fused, None
    along = cosine * _inverse(lengths.square())
    return cosine, value, to_fused, slope[:, None] * (inverse[:, None] * fused - along[:, None] * unimodal)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0)


def _spatial(cosine: Tensor, c: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """L_mod and its derivative by the cosines."""
    if form == "abs":
        return (c * cosine).abs().mean(), c.abs() * cosine.sign() / len(c)
    return (c.abs() - c * cosine).mean(), -c / len(c)


# --- What is rescaled -------------------------------------------------------------------------------------------------

Part = nn.Module | nn.Parameter | tuple[nn.Parameter, Any]


class EncoderGradients:
    """The gradients of each modality's encoder, wherever they are in a model: scaled, disturbed, measured, in place.

    model : the model that the encoders are part of
    encoders : per modality its module, or a list of modules, parameters, and pairs (parameter, index) for a part of a
        parameter, such as the columns of a joint layer that read this modality

    Nothing here reads a number from the device. Raises ValueError for fewer than two modalities, an encoder without a
    trainable parameter, one that is not part of the model, and a weight that is in two encoders; TypeError for what is
    no encoder.
    """

    def __init__(self, model: nn.Module, encoders: Mapping[str, Part | Iterable[Part]]):
        Is("an nn.Module", nn.Module)("model", model)
        Named(Is("modules, parameters or pairs (parameter, index)", object), 2)("encoders", encoders)
        known = {id(p): name for name, p in model.named_parameters()}
        taken: dict[int, Tensor] = {}
        self.parts: dict[str, list[tuple[nn.Parameter, Any]]] = {}
        for name, given in encoders.items():
            self.parts[name] = parts = [
                (p, index) for p, index in self._parameters(name, given) if p.requires_grad and p.numel()
            ]
            if not parts:
                raise ValueError(f"encoders[{name!r}]: expected an encoder with trainable parameters, it has none")
            for p, index in parts:
                if id(p) not in known:
                    raise ValueError(f"encoders[{name!r}]: expected a part of {type(model).__name__}, it is not")
                used = taken.setdefault(id(p), torch.zeros(p.shape, dtype=torch.bool))
                if bool(used[index].any()):
                    raise ValueError(f"encoders[{name!r}]: expected weights of its own, some are in another encoder")
                used[index] = True
        # By names, as a checkpoint says what is rescaled.
        self.names = {m: [known[id(p)] + ("" if i is ... else f"[{i}]") for p, i in self.parts[m]] for m in self.parts}

    @staticmethod
    def _parameters(name: str, given: Any) -> list[tuple[nn.Parameter, Any]]:
        pair = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], nn.Parameter)
        whole = lambda x: isinstance(x, (nn.Module, nn.Parameter))
        single = whole(given) or (pair(given) and not whole(given[1]) and not pair(given[1]))
        found: list[tuple[nn.Parameter, Any]] = []
        for part in given if isinstance(given, Iterable) and not single else [given]:
            if isinstance(part, nn.Module):
                found += [(p, ...) for p in part.parameters()]
            elif isinstance(part, nn.Parameter):
                found.append((part, ...))
            elif pair(part):
                found.append(part)
            else:
                raise TypeError(
                    f"encoders[{name!r}]: expected modules, parameters or pairs (parameter, index), got "
                    f"{type(part).__name__}"
                )
        return found

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def gradients(self) -> list[list[Tensor]]:
        """Per modality the gradients that are there; a batch without a modality may leave it none."""
        return [[p.grad[index] for p, index in parts if p.grad is not None] for parts in self.parts.values()]

    def scale(self, coefficients: Tensor) -> None:
        """Eq. 22: multiply the gradients of modality m by ``coefficients[m]``."""
        for gradients, factor in zip(self.gradients(), coefficients.unbind(), strict=True):
            if gradients:
                torch._foreach_mul_(gradients, factor)

    def spreads(self) -> list[list[Tensor]]:
        """The standard deviation of each gradient over its values; 0 for a single one."""
        one = lambda g: g.std() if g.numel() > 1 else g.new_zeros(())
        return [[one(g) for g in gradients] for gradients in self.gradients()]

    def disturb(self, spreads: list[list[Tensor]]) -> None:
        """Add Gaussian noise of these standard deviations, the same in every process."""
        flat = [g for gradients in self.gradients() for g in gradients]
        noise = [torch.randn_like(g) for g in flat]
        if processes() > 1 and noise:
            joined = torch.cat([x.flatten() for x in noise])
            torch.distributed.broadcast(joined, 0)
            noise = [x.reshape(g.shape) for x, g in zip(joined.split([g.numel() for g in flat]), flat, strict=True)]
        for g, x, spread in zip(flat, noise, [s for each in spreads for s in each], strict=True):
            g.add_(x * (spread + SMALL))

    def rms(self) -> Tensor:
        """The root mean square of the gradient of each encoder, [M]; a gradient that is not there counts as zeros."""
        values = []
        for gradients, parts in zip(self.gradients(), self.parts.values(), strict=True):
            count = sum(p[index].numel() for p, index in parts)
            if gradients:
                norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
                values.append(torch.linalg.vector_norm(norms) / math.sqrt(count))
            else:
                values.append(torch.zeros((), device=parts[0][0].device))
        return torch.stack(values)


def reduce_sums(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if processes() > 1:
        torch.distributed.all_reduce(x)
    return x


# --- Options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BALMConfig:
    """The strengths of Eqs. 21 and 27, and every interpretation; an alternative marked R is what the release does."""

    rho: float = option(1.3, Number(above=0))  # of Eq. 21; the paper: in (1.1, 1.6]
    tau: float = option(0.2, Number(0))  # of Eq. 27; the paper: in (0.2, 0.8]; 0 leaves L_mod out
    calibration: bool = option(True, Flag())  # FCM
    calibration_width: int | None = option(None, Maybe(Whole(1)))  # d_global; None: a quarter of all feature widths
    rebalancing: bool = option(True, Flag())  # GRM
    scale_gradients: bool = option(True, Flag())  # Eq. 22; False: the encoders' gradients stay (BALM-S)

    # cross-entropy, for scores the absolute error; "mse": for scores the squared error, as on MOSEI
    loss: str = option("task", OneOf("task", "mse"))
    # Eq. 19; "mse" (BALM-M) or "accuracy" (CGGM), see `discrepancies`
    discrepancy: str = option("kl", OneOf("kl", "mse", "accuracy"))
    # heads and Eq. 19 read every sample; "present": those that have the modality
    samples: str = option("all", OneOf("all", "present"))
    smoothing: float = option(0.0, Number(0, below=1))  # weight of the past in a moving average of Eq. 19
    # Eqs. 19-21 once a step; "epoch": over each epoch, for the next, none in the first
    interval: str = option("step", OneOf("step", "epoch"))
    # bounds of mu, such as (0, rho M)
    mu_clip: tuple[float, float] | None = option(None, Maybe(Several(Number(), 2, 2)))
    # in place of Eq. 21; 2 rho / 3 is its mean for M = 3
    mu_constant: float | tuple[float, ...] | None = option(None, Maybe(Either(Number(0), Several(Number(0), 1))))
    # R: True, Gaussian noise with the standard deviation of each scaled encoder gradient
    grad_noise: bool = option(False, Flag())

    # Eqs. 23-25 of the output layers' weights (as R); "grad": of their gradients (the text)
    cos_on: str = option("weight", OneOf("weight", "grad"))
    lmod: str = option("abs", OneOf("abs", "cggm"))  # Eq. 26 (as R); "cggm", see `spatial_modulation`
    lmod_heads: bool = option(False, Flag())  # L_mod moves the heads too
    # whose cosine each mu meets in Eq. 26; R (audio, vision, language): (2, 0, 1), since its heads are listed in
    # another order than its coefficients
    cosine_columns: tuple[int, ...] | None = option(None, Maybe(Several(Whole(0))))
    clip_heads: bool = option(False, Flag())  # True: the heads count in the loop's gradient norm
    # first and last epoch that is modulated; None: all
    active_epochs: tuple[int, int] | None = option(None, Maybe(Several(Whole(0), 2, 2)))
    # keep the encoders' RMS gradients before and after, for metrics.learning_balance
    measure: bool = option(False, Flag())

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("mu_clip", "mu_constant", "cosine_columns", "active_epochs"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name in ("mu_clip", "active_epochs"):
            pair = getattr(self, name)
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"{name}: expected None or a pair (low, high), got {pair}")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"grad_noise": True},
    "BALM-D": {"tau": 0.0},  # FCM and distribution-driven modulation
    "BALM-S": {"scale_gradients": False},  # FCM and spatial modulation
    "BALM-M": {"discrepancy": "mse"},
    "+FCM": {"rebalancing": False},
    "+GRM": {"calibration": False},
    "monitor": {"calibration": False, "tau": 0.0, "scale_gradients": False},  # heads that only watch
}


def squared_error(logits: Tensor, target: Tensor) -> Tensor:
    """(logits - target)^2 of scores, [n, 1] and [n] -> [n]."""
    if not target.is_floating_point() or logits.shape != (*target.shape, 1):
        raise ValueError(
            f"loss: 'mse' expects float scores [n] and logits [n, 1], got {target.dtype} {tuple(logits.shape)}"
        )
    return (logits[..., 0] - target).square()


# --- The plug-in ------------------------------------------------------------------------------------------------------


class GradientRebalancing(nn.Module):
    """GRM: unimodal heads watch the encoders and rescale their gradients. It plugs into any model and any loop::

        grm = GradientRebalancing(net, {"audio": net.ears, "image": net.eyes}, net.out, widths=64, rho=1.3, tau=0.2)
        optimizer = torch.optim.Adam([*net.parameters(), *grm.parameters()])
        for audio, image, y in loader:
            logits = net(audio, image)
            loss = F.cross_entropy(logits, y) + sum(grm(logits, y).values())
            optimizer.zero_grad()
            loss.backward()
            grm.rebalance()
            optimizer.step()

    Its losses are "unimodal" (Eq. 18, the heads on detached encodings, which move the heads alone) and "modulation"
    (tau L_mod of the previous step, Eq. 27). `rebalance`, between the backward pass and clipping, does Eqs. 19-26 in
    the release's order: cosines and KL before any weight moves, then the encoders' gradients. Gradients must be
    unscaled there. It waits for nothing on the device. What it remembers from step to step is in buffers.

    model, encoders : as in `EncoderGradients`
    output : the linear layer of the fused prediction
    widths : d_m of the encodings, one number for all modalities or one each
    catch : take the encodings from what the encoder modules gave in this forward pass; they must be one module each.
        Without it, they are given with every call
    criterion : logits [n, K], target [n] -> each sample's loss [n]; default by the option ``loss``
    options : fields of `BALMConfig`, those of the calibration without effect

    With ``cos_on="grad"`` the cosines are those of the gradients of this step and L_mod is differentiated through them
    (a second derivative), with the coefficients of the previous step; a stored value would have no gradient. Several
    mini-batches, or processes, before one `rebalance` count as one batch, but for these cosines, which are averaged.

    ``last`` has of the last step, each [M]: discrepancy, change (Delta), mu, cosine, and where ``measure`` asks for it
    rms_before and rms_after. Raises ValueError for what does not fit together, RuntimeError where the order is wrong.
    """

    level: Tensor
    mu: Tensor
    epoch_sums: Tensor
    lmod_value: Tensor
    lmod_fused: Tensor
    lmod_unimodal: Tensor
    last_values: Tensor
    pairs: Tensor
    constant: Tensor

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
        super().__init__()
        self.config = config = from_preset(BALMConfig, PRESETS, preset, options)
        self.encoders = EncoderGradients(model, encoders)
        names = self.encoders.modalities
        weight = getattr(output, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"output: expected the fused linear layer, got {type(output).__name__}")
        if id(weight) not in {id(p) for p in model.parameters()}:
            raise ValueError(f"output: expected a layer of {type(model).__name__}, it is not")
        Flag()("catch", catch)
        Maybe(Function("a function (logits, target) -> losses"))("criterion", criterion)
        Either(Whole(1), Named(Whole(1)))("widths", widths)
        each = widths if isinstance(widths, Mapping) else {name: widths for name in names}
        if set(each) != set(names):
            raise ValueError(f"widths: expected one for each of {list(names)}, got {sorted(each)}")
        M = len(names)
        if config.cosine_columns is not None and sorted(config.cosine_columns) != list(range(M)):
            raise ValueError(f"cosine_columns: expected an order of 0 to {M - 1}, got {config.cosine_columns}")
        if isinstance(config.mu_constant, tuple) and len(config.mu_constant) != M:
            raise ValueError(f"mu_constant: expected one number or {M}, got {config.mu_constant}")
        self._output = [weight]  # in a list, so that it is no parameter of this module
        self.scaled = self.encoders.names
        self.heads = UnimodalHeads([each[name] for name in names], weight.shape[1], weight.shape[0])
        self.heads.to(weight)
        self.criterion = criterion or (squared_error if config.loss == "mse" else sample_losses)
        self.active = True  # False outside active_epochs
        self.counts = True  # False where the batch is only there to keep other processes company
        self._pending: Tensor | None = None
        self._caught: dict[str, Tensor] = {}
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        if catch:
            for name, part in encoders.items():
                if not isinstance(part, nn.Module):
                    raise ValueError(f"encoders[{name!r}]: expected one module to catch from, or catch=False")
                part.register_forward_hook(functools.partial(self._catch, name))
        buffer = lambda *shape, value=0.0: torch.full(shape, value, dtype=weight.dtype, device=weight.device)
        self.register_buffer("level", buffer(M, value=torch.nan))  # Eq. 19 of the last step
        self.register_buffer("mu", buffer(M, value=torch.nan))
        self.register_buffer("epoch_sums", buffer(2, M))
        self.register_buffer("lmod_value", buffer())
        self.register_buffer("lmod_fused", torch.zeros_like(weight, requires_grad=False))
        self.register_buffer("lmod_unimodal", torch.zeros_like(self.heads.weight, requires_grad=False))
        self.register_buffer("last_values", buffer(len(_LAST), M))
        columns = config.cosine_columns or tuple(range(M))
        self.register_buffer("pairs", torch.tensor([columns.index(m) for m in range(M)]).to(weight.device), False)
        constant = torch.tensor(0.0 if config.mu_constant is None else config.mu_constant)
        self.register_buffer("constant", constant.to(weight).expand(M).clone(), False)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.encoders.modalities

    @property
    def last(self) -> dict[str, Tensor]:
        return dict(zip(_LAST, self.last_values, strict=True))

    def _catch(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            self._caught[name] = output

    def _encodings(self, given: Mapping[str, Tensor] | None, count: int, lead: int) -> list[Tensor]:
        """The detached encodings, one [n, d_m] a modality."""
        found = self._caught if given is None else given
        self._caught = {}
        if set(found) != set(self.modalities):
            where = "from their encoders in training mode" if given is None else "as encodings"
            raise ValueError(f"encodings: expected those of {list(self.modalities)} {where}, got {sorted(found)}")
        flat = []
        for name, width in zip(self.modalities, self.heads.widths, strict=True):
            z = found[name]
            if not isinstance(z, Tensor) or z.shape[lead:] != (width,) or z.shape[:lead].numel() != count:
                shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"encodings[{name!r}]: expected {count} vectors [*N, {width}], got {shape}")
            flat.append(z.detach().reshape(count, width))
        return flat

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
        present : bool [*N, M], needed for ``samples="present"``
        counted : bool [*N], False for padding
        """
        config, K = self.config, self._output[0].shape[0]
        labels = target.dtype == torch.bool
        N = target.shape[:-1] if labels else target.shape
        if logits.shape != (*N, K) or (labels and target.shape != logits.shape):
            raise ValueError(
                f"logits: expected {(*N, K)}, got {tuple(logits.shape)} for a target {tuple(target.shape)}"
            )
        n, M = N.numel(), len(self.modalities)
        z = self._encodings(encodings, n, len(N))
        y, fused = target.reshape(n, *target.shape[len(N) :]), logits.reshape(n, K)
        real = None if counted is None else counted.reshape(n)
        mask = None if real is None else real.expand(M, n)
        if config.samples == "present":
            if present is None or present.shape != (*N, M):
                shape = None if present is None else tuple(present.shape)
                raise ValueError(f"present: expected bool {(*N, M)} for samples='present', got {shape}")
            mask = present.reshape(n, M).T if mask is None else mask & present.reshape(n, M).T

        _, said = self.heads(z)
        each = self.criterion(said.reshape(M * n, K), y.repeat(M, *[1] * (y.ndim - 1))).reshape(M, n)
        shared = None if mask is None else SharedBatch(n if real is None else real.sum(), y, self.counts)
        unimodal = _mean(each, mask, shared).sum()  # Eq. 18
        losses = {"unimodal": unimodal}
        with torch.no_grad():
            apart = discrepancies(fused.detach(), said.detach(), y, config.discrepancy)
            if mask is None:
                rows = [apart.sum(-1), apart.new_full((M,), n)]
            else:
                rows = [torch.where(mask, apart, 0).sum(-1), mask.sum(-1).to(apart)]
        if config.cos_on == "grad":
            cosine, term = self._gradient_cosines(_mean(self.criterion(fused, y), real), unimodal)
            rows += [cosine.detach().to(apart), apart.new_ones(M)]
        else:
            term = self.lmod_value + _only_gradient((self._output[0] * self.lmod_fused).sum())
            if config.lmod_heads:
                term = term + _only_gradient((self.heads.weight * self.lmod_unimodal).sum())
        if config.tau:
            losses["modulation"] = config.tau * term
        new = torch.stack(rows) if self.counts else torch.zeros_like(torch.stack(rows))
        self._pending = new if self._pending is None else self._pending + new
        return losses

    def _gradient_cosines(self, task: Tensor, unimodal: Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. 23-26 on the gradients of the output layers, differentiable."""
        more = bool(self.config.tau)
        of = lambda loss, x, keep: torch.autograd.grad(loss, x, create_graph=keep, retain_graph=True, allow_unused=True)
        (fused,) = of(task, self._output[0], more)
        (own,) = of(unimodal, self.heads.weight, more and self.config.lmod_heads)
        if fused is None:
            raise ValueError("output: expected the layer that the logits come from, they do not depend on it")
        own, fused = own.flatten(1), fused.flatten()
        product = torch.linalg.vector_norm(own, dim=1) * torch.linalg.vector_norm(fused)
        cosine = torch.where(product > 0, (own @ fused) / torch.where(product > 0, product, 1), 0)
        active = self.config.active_epochs is None or self.active
        c = self._paired(torch.nan_to_num(self.mu) / self.config.rho) * active
        return cosine, _spatial(cosine, c, self.config.lmod)[0]

    def _paired(self, c: Tensor) -> Tensor:
        """The coefficient that meets the cosine of each modality."""
        return c if self.config.cosine_columns is None else c.index_select(0, self.pairs)

    @torch.no_grad()
    def rebalance(self) -> None:
        """After the backward pass: new coefficients, the next step's L_mod, and the encoders' gradients scaled."""
        if self._pending is None:
            raise RuntimeError("rebalance: expected the losses of a forward pass and their backward pass before it")
        config = self.config
        stats, self._pending = reduce_sums(self._pending).to(self.level), None
        if config.interval == "step":
            change = self._advance(stats[0], stats[1])
        else:
            self.epoch_sums += stats[:2]
            change = self.last["change"].clone()
        c = self._paired(torch.nan_to_num(self.mu) / config.rho)
        if config.cos_on == "weight":
            cosine, value, fused, unimodal = spatial_modulation(
                self._output[0].flatten(), self.heads.weight.flatten(1), c, config.lmod, config.lmod_heads
            )
            self.lmod_value.copy_(value * self.active)
            self.lmod_fused.copy_(fused.view_as(self.lmod_fused) * self.active)
            if unimodal is not None:
                self.lmod_unimodal.copy_(unimodal.view_as(self.lmod_unimodal) * self.active)
        else:
            cosine = stats[2] / stats[3].clamp_min(1)
        rms = [self.encoders.rms()] if config.measure else []
        if self.active and config.scale_gradients:
            self.encoders.scale(torch.where(self.mu.isnan(), 1, self.mu))
            if config.grad_noise:
                self.encoders.disturb(self.encoders.spreads())
        rms += [self.encoders.rms()] if config.measure else []
        mean = stats[0] / stats[1].clamp_min(1)
        self.last_values[:4].copy_(torch.stack([mean, change, self.mu, cosine]))
        if rms:
            self.last_values[4:].copy_(torch.stack(rms))

    def _advance(self, total: Tensor, count: Tensor) -> Tensor:
        """Eqs. 20 and 21, from the sum of Eq. 19 over ``count`` samples; gives Delta.

        A modality without a sample, or with a value that is not finite, stays where it was: its Delta is 0.
        """
        config = self.config
        first = self.level.isnan()
        now = torch.where((count > 0) & torch.isfinite(total), total / count.clamp_min(1), self.level)
        now = torch.where(first, now, config.smoothing * self.level + (1 - config.smoothing) * now)
        gain = self.level - now if config.discrepancy != "accuracy" else now - self.level
        change = torch.nan_to_num(torch.where(first, now, gain))
        self.level.copy_(now)
        mu = modulation_coefficients(change, config.rho) if config.mu_constant is None else self.constant
        self.mu.copy_(mu if config.mu_clip is None else mu.clamp(*config.mu_clip))
        return change

    @torch.no_grad()
    def finish_epoch(self) -> None:
        """With ``interval="epoch"``: the coefficients of the next epoch, from what was summed over this one."""
        if self.config.interval == "epoch":
            self.last_values[1].copy_(self._advance(self.epoch_sums[0], self.epoch_sums[1]))
            self.epoch_sums.zero_()

    def hold(self) -> None:
        """Put the heads' gradients aside, so that clipping does not see them, until `give_back`."""
        self._held = [(p, p.grad) for p in self.heads.parameters() if p.grad is not None]
        for p, _ in self._held:
            p.grad = None

    def give_back(self, *_: Any) -> None:
        """Undo `hold`; an optimizer's step pre-hook."""
        for p, gradient in self._held:
            p.grad = gradient
        self._held = []


_LAST = ("discrepancy", "change", "mu", "cosine", "rms_before", "rms_after")


def _mean(each: Tensor, mask: Tensor | None, shared: SharedBatch | None = None) -> Tensor:
    """Mean over the last axis where the mask is True; 0 where it never is."""
    if mask is None:
        return each.mean(-1)
    count = mask.sum(-1)
    return torch.where(mask, each, 0).sum(-1) / (count.clamp_min(1) if shared is None else shared.count(count))


def _only_gradient(x: Tensor) -> Tensor:
    """Zero, with the gradient of x."""
    return x - x.detach()


class BALM(nn.Module):
    """A backbone with calibrated inputs and rebalanced encoder gradients (Algorithm 1), a method for ``training.fit``.

    backbone : any backbone
    feature_shapes : of the data, for FCM; default ``backbone.config.feature_shapes``
    preset : "paper"; "released", with noise on the gradients; "BALM-D" without L_mod; "BALM-S" without scaled
        gradients; "BALM-M" with squared error for KL; "+FCM" or "+GRM" alone; "monitor", the plain backbone with heads
        that only watch (`PRESETS`)
    encoders, output, widths : as in `GradientRebalancing`; default ``backbone.encoders``, the last linear layer of
        ``backbone.decoder``, ``backbone.width``. Of a backbone with one recurrent net over all modalities and no
        encoders (GCNet) the columns of its first layer are scaled, and the heads read its states with the other
        modalities zeroed; the paper does not say how, this is our interpretation
    encodings : (batch, h) -> what the heads read, z[m] [*N, d_m], where that is not ``h = backbone.encode(batch)``
    criterion : logits [n, K], target [n] -> each sample's loss [n], for the task and the heads; default by ``loss``
    options : fields of `BALMConfig`, over those of the preset

    ``forward(batch)`` gives logits and, in training, the losses "task", "unimodal" and "modulation", means over samples
    (in dialogues over real utterances, ``extras["utterance"]``). ``last`` is that of `GradientRebalancing`. In the loop
    everything happens by itself; without it, call ``method.rebalance()`` between backward pass and optimizer step.
    Gradient clipping does not count the heads, unless ``clip_heads``. Raises ValueError for what does not fit together.
    """

    def __init__(
        self,
        backbone: Backbone,
        feature_shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        preset: str = "paper",
        encoders: Mapping[str, Part | Iterable[Part]] | None = None,
        output: nn.Module | None = None,
        widths: int | Mapping[str, int] | None = None,
        encodings: Encodings | None = None,
        criterion: Criterion | None = None,
        **options: Any,
    ):
        super().__init__()
        self.config = config = from_preset(BALMConfig, PRESETS, preset, options)
        self.backbone: Backbone = BACKBONE("backbone", backbone)
        self.encodings = Maybe(Function("a function (batch, h) -> encodings"))("encodings", encodings)
        Maybe(Function("a function (logits, target) -> losses"))("criterion", criterion)
        Maybe(Is("an nn.Module", nn.Module))("output", output)
        Maybe(SHAPES)("feature_shapes", feature_shapes)
        Maybe(Named(Is("modules, parameters or pairs (parameter, index)", object)))("encoders", encoders)
        self.calibration: FeatureCalibration | None = None
        self.rebalancing: GradientRebalancing | None = None
        self.criterion = criterion or (squared_error if config.loss == "mse" else sample_losses)
        if config.calibration:
            shapes = feature_shapes or getattr(getattr(backbone, "config", None), "feature_shapes", None)
            if shapes is None:
                raise ValueError("feature_shapes: expected the shapes of the data, such as train.feature_shapes")
            if tuple(shapes) != backbone.modalities:
                raise ValueError(f"feature_shapes: expected those of {list(backbone.modalities)}, got {list(shapes)}")
            self.calibration = FeatureCalibration(shapes, config.calibration_width)
        self.states = False
        if config.rebalancing:
            self.states = encoders is None and encodings is None and not len(backbone.encoders)
            encoders = encoders_of(backbone) if encoders is None else encoders
            if widths is None and self.states:
                rnn: Any = backbone.rnn
                widths = int(rnn.hidden_size * (1 + rnn.bidirectional))
            if set(encoders) != set(backbone.modalities):
                raise ValueError(
                    f"encoders: expected one for each of {list(backbone.modalities)}, got {sorted(encoders)}"
                )
            widths = getattr(backbone, "width", None) if widths is None else widths
            linear = {name: part.out_features for name, part in encoders.items() if isinstance(part, nn.Linear)}
            widths = linear if widths is None and len(linear) == len(encoders) else widths
            if widths is None:
                raise ValueError("widths: expected the widths of the encodings, the backbone has no common one")
            self.rebalancing = GradientRebalancing(
                backbone,
                {m: encoders[m] for m in backbone.modalities},
                _last_linear(backbone) if output is None else output,
                widths,
                catch=False,
                criterion=self.criterion,
                **{name: getattr(config, name) for name in BALMConfig.__dataclass_fields__},
            )

    @classmethod
    def for_data(
        cls,
        data: MultimodalDataset,
        backbone: Any = None,
        valid: MultimodalDataset | None = None,
        config: Any = None,
        **options: Any,
    ) -> BALM:
        """BALM on a backbone for this data set. It has no first stage: ``valid`` and ``config`` are every method's."""
        if DATASET("data", data).modalities != BACKBONE("backbone", backbone).modalities:
            raise ValueError(f"data: expected the modalities {list(backbone.modalities)}, got {list(data.modalities)}")
        return cls(backbone, feature_shapes=data.feature_shapes, **options)

    @property
    def last(self) -> dict[str, Tensor]:
        if self.rebalancing is None:
            raise ValueError("last: expected a preset with rebalancing")
        return self.rebalancing.last

    def forward(self, batch: MultimodalBatch) -> Output:
        if self.calibration is not None:
            batch = self.calibration(batch)
        BATCH("batch", batch)
        if not self.training or batch.target is None:
            return Output(self.backbone(batch), {})
        lead, target = len(batch.shape), batch.target
        if target.ndim != lead + (target.dtype == torch.bool):
            raise ValueError(f"target: expected one a sample {batch.shape}, got {tuple(target.shape)}")
        h = self.backbone.encode(batch)
        logits = self.backbone.decode(self.backbone.fuse(h, batch.present, batch))
        y, real = target.flatten(0, lead - 1), batch.extras.get("utterance")
        each = self.criterion(logits.flatten(0, -2), y)
        losses = {"task": _mean(each, None if real is None else real.flatten())}
        if self.rebalancing is not None:
            z: Mapping[str, Tensor] = h
            if self.encodings is not None:
                z = self.encodings(batch, h)
            elif self.states:
                with torch.no_grad():
                    z = self.backbone.unimodal_states(batch)  # type: ignore[operator]
            losses.update(self.rebalancing(logits, batch.target, z, batch.present, real))
        return Output(logits, losses)

    def rebalance(self) -> None:
        """As `GradientRebalancing.rebalance`; nothing in a preset without it."""
        if self.rebalancing is not None:
            self.rebalancing.rebalance()

    # --- in the loop ---

    def on_start(self, state: State) -> None:
        if self.rebalancing is not None and self.config.cos_on == "grad" and processes() > 1:
            raise ValueError(
                "cos_on: 'grad' supports one process: its cosines are those of the gradients of a whole mini-batch; "
                "run with one, or with cos_on='weight'"
            )
        if self.rebalancing is not None and state.config.clip is not None and not self.config.clip_heads:
            state.optimizer.register_step_pre_hook(self.rebalancing.give_back)

    def on_epoch_start(self, state: State) -> None:
        if self.rebalancing is not None and self.config.active_epochs is not None:
            first, last = self.config.active_epochs
            self.rebalancing.active = first <= state.epoch <= last

    def on_batch(self, state: State) -> None:
        if self.rebalancing is not None:
            self.rebalancing.counts = state.weight > 0

    def on_backward(self, state: State) -> None:
        self.rebalance()
        if self.rebalancing is not None and state.config.clip is not None and not self.config.clip_heads:
            self.rebalancing.hold()

    def on_epoch_end(self, state: State) -> None:
        if self.rebalancing is not None:
            self.rebalancing.finish_epoch()

    def on_end(self, state: State) -> None:
        if self.rebalancing is not None:
            self.rebalancing.active = self.rebalancing.counts = True


def encoders_of(backbone: Any) -> dict[str, Part | Iterable[Part]]:
    """A backbone's encoders; of one that has none but a joint recurrent net, the columns that read each modality."""
    if len(backbone.encoders):
        return dict(backbone.encoders.items())
    if not hasattr(backbone, "input_columns") or not hasattr(backbone, "unimodal_states"):
        raise ValueError("encoders: expected the encoder of each modality, the backbone has no `encoders`")
    rnn = backbone.rnn
    weights = [rnn.weight_ih_l0, *([rnn.weight_ih_l0_reverse] if rnn.bidirectional else [])]
    return {name: [(w, (slice(None), part)) for w in weights] for name, part in backbone.input_columns().items()}


def _last_linear(backbone: nn.Module) -> nn.Module:
    """The layer of the fused prediction."""
    decoder = getattr(backbone, "decoder", nn.Module())
    layers = [part for part in decoder.modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise ValueError("output: expected the fused linear layer, the backbone has no `decoder` that ends in one")
    return layers[-1]
