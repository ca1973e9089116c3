"""The gradients of a model's encoders, one of each modality: found, scaled, disturbed and measured, in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import Is, Maybe, Named, shown
from .layers import processes

__all__ = ["EncoderGradients", "Part", "Withheld", "encoders_of", "only_gradient", "reduce_sums"]

Part = nn.Module | nn.Parameter | tuple[nn.Parameter, Any]
PARTS = Is("modules, parameters or pairs (parameter, index)", object)


class EncoderGradients:
    """The gradients of each modality's encoder, wherever they are in a model.

    model : the model that the encoders are part of
    encoders : per modality its module, or a list of modules, parameters, and pairs (parameter, index) for a part of a
        parameter, such as the columns of a joint layer that read this modality

    Nothing here reads a number from the device. Raises ValueError for fewer than two modalities, an encoder without a
    trainable parameter, one that is not part of the model, and a weight that is in two encoders; TypeError for what is
    no encoder.
    """

    def __init__(self, model: nn.Module, encoders: Mapping[str, Part | Iterable[Part]]):
        Is("an nn.Module", nn.Module)("model", model)
        Named(PARTS, 2)("encoders", encoders)
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
                raise TypeError(f"encoders[{name!r}]: expected {PARTS.expected}, got {type(part).__name__}")
        return found

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def gradients(self) -> list[list[Tensor]]:
        """Per modality the gradients that are there; a batch without a modality may leave it none."""
        return [[p.grad[index] for p, index in parts if p.grad is not None] for parts in self.parts.values()]

    def scale(self, coefficients: Tensor) -> None:
        """Multiply the gradients of modality m by ``coefficients[m]``, [M]."""
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
            g.add_(x * (spread + 1e-8))

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


def encoders_of(
    backbone: Any, encoders: Mapping[str, Part | Iterable[Part]] | None = None
) -> dict[str, Part | Iterable[Part]]:
    """The encoder of each modality in the backbone's order: those given, or its own ``backbone.encoders``.

    A backbone that has none but one recurrent net over all modalities (GCNet) gives the columns of that net's first
    layer that read each modality. Raises ValueError where there is neither, and for other modalities.
    """
    Maybe(Named(PARTS))("encoders", encoders)
    if not hasattr(backbone, "encoders"):
        raise TypeError(f"backbone: expected a backbone, whose `encoders` are known, got {shown(backbone)}")
    if encoders is None and not len(backbone.encoders):
        if not hasattr(backbone, "input_columns") or not hasattr(backbone, "unimodal_states"):
            raise ValueError("encoders: expected the encoder of each modality, the backbone has no `encoders`")
        rnn = backbone.rnn
        weights = [rnn.weight_ih_l0, *([rnn.weight_ih_l0_reverse] if rnn.bidirectional else [])]
        return {name: [(w, (slice(None), part)) for w in weights] for name, part in backbone.input_columns().items()}
    found = dict(backbone.encoders.items()) if encoders is None else encoders
    if set(found) != set(backbone.modalities):
        raise ValueError(f"encoders: expected one for each of {list(backbone.modalities)}, got {sorted(found)}")
    return {name: found[name] for name in backbone.modalities}


def reduce_sums(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if processes() > 1:
        torch.distributed.all_reduce(x)
    return x


def only_gradient(x: Tensor) -> Tensor:
    """Zero, with the gradient of x."""
    return x - x.detach()


class Withheld:
    """The gradients of a module's parameters, put aside while those of the rest of a model are clipped."""

    def __init__(self, module: nn.Module):
        self.module = Is("an nn.Module", nn.Module)("module", module)
        self._held: list[tuple[nn.Parameter, Tensor]] = []

    def hold(self) -> None:
        """Put the gradients aside, so that clipping does not see them, until `give_back`."""
        self._held = [(p, p.grad) for p in self.module.parameters() if p.grad is not None]
        for p, _ in self._held:
            p.grad = None

    def give_back(self, *_: Any) -> None:
        """Undo `hold`; an optimizer's step pre-hook."""
        for p, gradient in self._held:
            p.grad = gradient
        self._held = []
