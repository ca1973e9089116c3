"""What a plug-in is told of a model that it did not make: encoders, encodings, the prediction's layer; and its loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones.base import BACKBONE, Backbone, OnBackbone
from ..batch import MultimodalDataset
from ..checks import SHAPES, Either, Flag, Function, Is, Maybe, Named, Whole
from ..gradients import EncoderGradients, Part, encoders_of, reduce_sums

if TYPE_CHECKING:
    from ..training import State

__all__ = ["CRITERION", "Criterion", "Plug", "Plugged", "feature_shapes_of", "parts_of"]

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits [n, K], target [n] (or labels) -> each sample's loss [n]
CRITERION = Maybe(Function("a function (logits, target) -> losses"))


class Plug(nn.Module):
    """A module with ``encoders`` (`EncoderGradients`), ``widths`` of the encodings [M] and ``output``, a weight [K, P].

    None of them is a parameter of this module. Arguments are those of
    :class:`mmlib.methods.balm.GradientRebalancing`; raises ValueError where they do not fit together.

    watched : names of what ``last`` has of the last step, each [M], from the buffer ``last_values``
    """

    last_values: Tensor

    def __init__(
        self,
        model: nn.Module,
        encoders: Mapping[str, Part | Iterable[Part]],
        output: nn.Module,
        widths: int | Mapping[str, int],
        catch: bool,
        watched: Sequence[str],
    ):
        super().__init__()
        self.encoders = EncoderGradients(model, encoders)
        weight = getattr(output, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"output: expected the fused linear layer, got {type(output).__name__}")
        if id(weight) not in {id(p) for p in model.parameters()}:
            raise ValueError(f"output: expected a layer of {type(model).__name__}, it is not")
        Either(Whole(1), Named(Whole(1)))("widths", widths)
        each = widths if isinstance(widths, Mapping) else {name: widths for name in self.modalities}
        if set(each) != set(self.modalities):
            raise ValueError(f"widths: expected one for each of {list(self.modalities)}, got {sorted(each)}")
        self.widths = tuple(each[name] for name in self.modalities)
        self.scaled = self.encoders.names
        self._output = [weight]  # in a list, so that it is no parameter of this module
        self._caught: dict[str, Tensor] = {}
        self._watched = tuple(watched)
        self._pending: Tensor | None = None
        self.counts = True  # False where the batch is only there to keep other processes company
        self.remember("last_values", len(watched), len(self.modalities))
        for name, part in encoders.items() if Flag()("catch", catch) else ():
            if not isinstance(part, nn.Module):
                raise ValueError(f"encoders[{name!r}]: expected one module to catch from, or catch=False")
            part.register_forward_hook(functools.partial(self._catch, name))

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.encoders.modalities

    @property
    def last(self) -> dict[str, Tensor]:
        return dict(zip(self._watched, self.last_values, strict=True))

    @property
    def output(self) -> Tensor:
        """The weight [K, P] of the fused prediction."""
        return self._output[0]

    def remember(self, name: str, *shape: int, value: float = 0.0) -> None:
        """A buffer of this shape, beside the output layer."""
        self.register_buffer(name, torch.full(shape, value, dtype=self.output.dtype, device=self.output.device))

    def _catch(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            self._caught[name] = output

    def collect(self, sums: Tensor) -> None:
        """Add what a forward pass summed over its samples, of which there are several where gradients accumulate."""
        new = sums if self.counts else torch.zeros_like(sums)
        self._pending = new if self._pending is None else self._pending + new

    def collected(self) -> Tensor:
        """The sums since the last call, of all processes."""
        if self._pending is None:
            raise RuntimeError("rebalance: expected the losses of a forward pass and their backward pass before it")
        found, self._pending = reduce_sums(self._pending), None
        return found

    def flat(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """Logits [*N, K] and target [*N], or bool labels [*N, K], as [n, K] and [n, ...]; and N."""
        labels = target.dtype == torch.bool
        N = target.shape[:-1] if labels else target.shape
        if logits.shape != (*N, len(self.output)) or (labels and target.shape != logits.shape):
            raise ValueError(
                f"logits: expected {(*N, len(self.output))}, got {tuple(logits.shape)} for a target "
                f"{tuple(target.shape)}"
            )
        return logits.reshape(N.numel(), -1), target.reshape(N.numel(), *target.shape[len(N) :]), N

    def encodings(self, given: Mapping[str, Tensor] | None, N: torch.Size) -> list[Tensor]:
        """The detached encodings, those given or else caught, one [n, d_m] a modality."""
        found = self._caught if given is None else given
        self._caught = {}
        if set(found) != set(self.modalities):
            where = "from their encoders in training mode" if given is None else "as encodings"
            raise ValueError(f"encodings: expected those of {list(self.modalities)} {where}, got {sorted(found)}")
        flat, n = [], N.numel()
        for name, width in zip(self.modalities, self.widths, strict=True):
            z = found[name]
            if not isinstance(z, Tensor) or z.shape[len(N) :] != (width,) or z.shape[: len(N)].numel() != n:
                shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"encodings[{name!r}]: expected {n} vectors [*N, {width}], got {shape}")
            flat.append(z.detach().reshape(n, width))
        return flat


class Plugged(OnBackbone):
    """The loop of a method that has a plug, or none, as ``rebalancing``; for `training.fit`."""

    rebalancing: Any

    @classmethod
    def _from_data(cls, data: MultimodalDataset, backbone: Any) -> dict[str, Any]:
        if data.modalities != BACKBONE("backbone", backbone).modalities:
            raise ValueError(f"data: expected the modalities {list(backbone.modalities)}, got {list(data.modalities)}")
        return {"feature_shapes": data.feature_shapes}

    @property
    def last(self) -> dict[str, Tensor]:
        if self.rebalancing is None:
            raise ValueError("last: expected a preset with rebalancing")
        found: dict[str, Tensor] = self.rebalancing.last
        return found

    def rebalance(self) -> None:
        """What the plug does between the backward pass and the optimizer's step; nothing without one."""
        if self.rebalancing is not None:
            self.rebalancing.rebalance()

    def on_start(self, state: State) -> None:
        if self.rebalancing is not None and state.config.clip is not None:
            state.optimizer.register_step_pre_hook(self.rebalancing.withheld.give_back)

    def on_batch(self, state: State) -> None:
        if self.rebalancing is not None:
            self.rebalancing.counts = state.weight > 0

    def on_backward(self, state: State) -> None:
        self.rebalance()
        if self.rebalancing is not None and state.config.clip is not None:
            self.rebalancing.withheld.hold()

    def on_end(self, state: State) -> None:
        if self.rebalancing is not None:
            self.rebalancing.counts = True


# --- What a backbone says of itself -----------------------------------------------------------------------------------


def feature_shapes_of(
    backbone: Backbone, given: Mapping[str, tuple[int, ...]] | None = None
) -> Mapping[str, tuple[int, ...]]:
    """One sample's shape of each modality: as ``given``, or as the backbone's configuration has it."""
    shapes = given or getattr(getattr(backbone, "config", None), "feature_shapes", None)
    if shapes is None:
        raise ValueError("feature_shapes: expected the shapes of the data, such as train.feature_shapes")
    if tuple(SHAPES("feature_shapes", shapes)) != backbone.modalities:
        raise ValueError(f"feature_shapes: expected those of {list(backbone.modalities)}, got {list(shapes)}")
    found: Mapping[str, tuple[int, ...]] = shapes
    return found


def parts_of(
    backbone: Any,
    encoders: Mapping[str, Part | Iterable[Part]] | None,
    output: nn.Module | None,
    widths: int | Mapping[str, int] | None,
) -> tuple[dict[str, Part | Iterable[Part]], nn.Module, int | Mapping[str, int]]:
    """What a `Plug` is told of a backbone: encoders, output layer and widths, as given or as the backbone has them."""
    parts = encoders_of(backbone, encoders)
    layer = _last_linear(backbone) if output is None else Is("an nn.Module", nn.Module)("output", output)
    if widths is None:
        widths = _widths(backbone, parts, states=encoders is None and not len(backbone.encoders))
    return parts, layer, widths


def _last_linear(backbone: nn.Module) -> nn.Module:
    """The layer of the fused prediction: the last linear one of the decoder."""
    decoder = getattr(backbone, "decoder", nn.Module())
    layers = [part for part in decoder.modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise ValueError("output: expected the fused linear layer, the backbone has no `decoder` that ends in one")
    return layers[-1]


def _widths(backbone: Any, encoders: Mapping[str, Part | Iterable[Part]], states: bool) -> int | dict[str, int]:
    """The widths of the encodings: ``backbone.width``, those of linear encoders, or of a joint net's ``states``."""
    if states:
        return int(backbone.rnn.hidden_size * (1 + backbone.rnn.bidirectional))
    if (width := getattr(backbone, "width", None)) is not None:
        return int(width)
    linear = {name: part.out_features for name, part in encoders.items() if isinstance(part, nn.Linear)}
    if len(linear) != len(encoders):
        raise ValueError("widths: expected the widths of the encodings, the backbone has no common one")
    return linear
