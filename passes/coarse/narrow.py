"""Narrow copies of layers, each at a share of its channels.

A coarse propagator of copied blocks works between a reduction and an expansion. With a share of a
quarter, for a residual of [B, 64, 8, 8] and a last state of [B, 256, 4, 4]:

    [B, 64, 8, 8] -> reduce -> [B, 16, 8, 8] -> blocks -> [B, 64, 4, 4] -> expand -> [B, 256, 4, 4]
    [B, 64, 8, 8] --------------------- shortcut --------------------------------+

Reduction, expansion and shortcut are channel maps (1 x 1 convolutions of images, linear layers of
tokens); where the state keeps its type, the shortcut is the identity. Without it, every channel of
a residual would have to pass through the few of the body.
Every layer keeps its kernel, stride and so on, reads as many channels as reach it, and returns the
share of its own, so that a convolution at a share s takes s^2 of the FLOPs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from passes.coarse.linear import LinearMap
from passes.errors import SynthesisError, first_line
from passes.ir.isolation import seeded
from passes.ir.program import Interpreter
from passes.ir.tensor_spec import TensorSpec


class Bottleneck(nn.Module):
    """A narrow body between a reduction and an expansion, beside a shortcut.

    Reduction and shortcut are drawn orthogonal. The expansion starts at zero, so that at first the
    network is its shortcut.

    Args:
        body: From a state of a share of the entering channels to one of a share of the leaving.
        entering: Type of the state.
        leaving: Type of the state that it returns.
        width: The share.
    """

    def __init__(
        self, body: nn.Module, entering: TensorSpec, leaving: TensorSpec, width: float
    ) -> None:
        super().__init__()
        self.reduce = LinearMap(entering, narrow_spec(entering, width))
        self.body = body
        self.expand = LinearMap(narrow_spec(leaving, width), leaving, gain=0.0)
        unchanged = entering == leaving
        self.shortcut = nn.Identity() if unchanged else LinearMap(entering, leaving)

    def forward(self, state: torch.Tensor, *inputs: Any) -> torch.Tensor:
        """Propagate the state, with the inputs of the program that the body reads."""
        narrow = self.expand(self.body(self.reduce(state), *inputs))
        result: torch.Tensor = self.shortcut(state) + narrow
        return result


def narrow_spec(spec: TensorSpec, width: float) -> TensorSpec:
    """Return the type of a state at a share of its channels.

    >>> spec = TensorSpec((2, 8, 4, 4), "float32", batch_axis=0, channel_axis=1)
    >>> str(narrow_spec(spec, 0.25))
    '[B, 2, 4, 4] float32'
    """
    shape = list(spec.shape)
    shape[spec.channel_axis] = _share(shape[spec.channel_axis], width)
    return dataclasses.replace(spec, shape=tuple(shape))


def _share(count: int, width: float) -> int:
    return max(1, round(count * width))


def narrow(unit: fx.GraphModule, width: float, arguments: Sequence[Any]) -> Any:
    """Replace every layer of a graph by one of a share of its channels, with fresh weights.

    Args:
        unit: The graph, which is changed.
        width: The share.
        arguments: Values of its placeholders, whose channels the first layers read.

    Returns:
        What the graph returns for them in evaluation mode.

    Raises:
        SynthesisError: A layer has parameters, but no number of channels that is known here, or
            the code between the layers counts on all channels.
    """
    training = {path: module.training for path, module in unit.named_modules()}
    weights = _weights_of(unit)
    try:
        with torch.no_grad():
            outputs = _Narrowing(unit, width).run(*arguments)
            _run_in_training(unit, arguments)
    except RuntimeError as error:
        raise SynthesisError(
            f"the code of a block counts on all channels ({first_line(error)}), at a share of "
            f"{width:.3g}: choose another share by coarse_width (guesses: prologue), {_OTHERWISE}"
        ) from error
    for path, module in unit.named_modules():
        module.training = training.get(path, unit.training)
    redraw(unit, weights)
    return outputs


def _run_in_training(unit: fx.GraphModule, arguments: Sequence[Any]) -> None:
    """Run a copy as in training, where code may write buffers of all channels.

    Raises:
        RuntimeError: The sizes do not fit.
    """
    # A BatchNorm refuses a single value a channel, which says nothing about the sizes.
    with seeded(0), contextlib.suppress(ValueError):
        copy.deepcopy(unit).train()(*arguments)


def _weights_of(unit: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in unit.named_parameters()}


def redraw(unit: fx.GraphModule, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Draw fresh weights with the standard deviations that a block's own weights have.

    In a narrower copy an output of a layer sums fewer products, so that its weights are larger: by
    the root of the ratio of their numbers. What is looked up or added, such as an embedding, is not
    summed.

    Args:
        unit: The copy, which is changed.
        weights: The block's own weights, by name; those of `unit` if None.
    """
    weights = _weights_of(unit) if weights is None else weights
    for module in unit.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    with torch.no_grad():
        for name, parameter in unit.named_parameters():
            if parameter.is_meta:
                continue  # drawn when it is materialized
            old = weights[name]
            target = old.std().item() if old.numel() > 1 else 0.0
            if parameter.dim() > 1:
                owner = unit.get_submodule(name.rpartition(".")[0])
                if hasattr(owner, "reset_parameters") and not isinstance(owner, nn.Embedding):
                    target *= (old[0].numel() / parameter[0].numel()) ** 0.5
                if torch.equal(parameter, old):
                    parameter.normal_()  # no module resets it: a parameter of the graph itself
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            if spread > 0 and target > 0:
                parameter.mul_(target / spread)
            else:
                parameter.copy_(old[tuple(slice(size) for size in parameter.shape)])


class _Narrowing(Interpreter):
    """Run a graph, and replace every layer when its input is there."""

    def __init__(self, unit: fx.GraphModule, width: float) -> None:
        super().__init__(unit)
        self._unit, self._width = unit, width
        self._replaced = set[str]()

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read a value, after it was replaced if it is a parameter, such as an embedding."""
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, nn.Parameter) and target not in self._replaced:
            self._replaced.add(target)
            path, _, name = target.rpartition(".")
            value = nn.Parameter(_narrow_parameter(value, self._width))
            setattr(self._unit.get_submodule(path), name, value)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer, after it was replaced."""
        if target not in self._replaced:
            layer = self._unit.get_submodule(target)
            self._unit.add_submodule(target, _narrow_layer(layer, self._width, args).eval())
            self._replaced.add(target)
        return super().call_module(target, args, kwargs)


_OTHERWISE = "or leave coarse_width (guesses: preprocess='narrow') out"
_ADVICE = f"so that no narrower copy of it can be built: {_OTHERWISE[3:]}"


def _narrow_parameter(parameter: torch.Tensor, width: float) -> torch.Tensor:
    """Draw a parameter of a share of the channels: its last axis that is none of size 1.

    That is the last one of an embedding of positions `[T, D]`, the first one of a scale
    `[C, 1, 1]`.
    """
    shape = list(parameter.shape)
    axis = max((axis for axis, size in enumerate(shape) if size > 1), default=None)
    if axis is not None:
        shape[axis] = _share(shape[axis], width)
    return torch.randn_like(parameter.new_empty(shape))


def _narrow_layer(layer: nn.Module, width: float, arguments: Sequence[Any]) -> nn.Module:
    tensors = [*layer.parameters(), *layer.buffers()]
    make = next((make for kind, make in _LAYERS.items() if isinstance(layer, kind)), None)
    if make is None and not tensors:
        return layer
    names = [name for name, _ in layer.named_parameters()]
    if make is None or not {*names} <= {"weight", "bias"}:
        has = f" with parameters {', '.join(names)}" if make is not None else ""
        raise SynthesisError(f"a block has a layer of type {type(layer).__name__}{has}, {_ADVICE}")
    # Of a BatchNorm without weights, its statistics say the type and the device.
    place = {"dtype": tensors[0].dtype, "device": tensors[0].device} if tensors else {}
    return make(layer, width, arguments[0].shape, place)


def _convolution(
    layer: Any, width: float, entering: torch.Size, place: dict[str, Any]
) -> nn.Module:
    channels = entering[-len(layer.kernel_size) - 1], _share(layer.out_channels, width)
    groups = 1 if layer.groups == 1 else _share(layer.groups, width)
    if channels[0] % groups or channels[1] % groups:
        raise SynthesisError(
            f"{layer.groups} groups of {layer.in_channels} channels have no share of {width}: "
            f"choose another coarse_width (guesses: prologue), {_OTHERWISE}"
        )
    more = {"output_padding": layer.output_padding} if layer.transposed else {}
    narrower: nn.Module = type(layer)(
        *channels, layer.kernel_size, layer.stride, layer.padding, dilation=layer.dilation,
        groups=groups, bias=layer.bias is not None, padding_mode=layer.padding_mode,
        **more, **place,
    )  # fmt: skip
    return narrower


def _linear(layer: Any, width: float, entering: torch.Size, place: dict[str, Any]) -> nn.Module:
    return nn.Linear(
        entering[-1], _share(layer.out_features, width), layer.bias is not None, **place
    )


def _norm(layer: Any, width: float, entering: torch.Size, place: dict[str, Any]) -> nn.Module:
    narrower: nn.Module = type(layer)(
        entering[1], layer.eps, layer.momentum, layer.affine, layer.track_running_stats, **place
    )
    return narrower


def _embedding(layer: Any, width: float, entering: torch.Size, place: dict[str, Any]) -> nn.Module:
    return nn.Embedding(
        layer.num_embeddings, _share(layer.embedding_dim, width), layer.padding_idx, **place
    )


def _layer_norm(layer: Any, width: float, entering: torch.Size, place: dict[str, Any]) -> nn.Module:
    if len(layer.normalized_shape) > 1:
        raise SynthesisError(f"a block normalizes {len(layer.normalized_shape)} axes, {_ADVICE}")
    biased = layer.bias is not None
    return nn.LayerNorm(entering[-1], layer.eps, layer.elementwise_affine, bias=biased, **place)


def _group_norm(layer: Any, width: float, entering: torch.Size, place: dict[str, Any]) -> nn.Module:
    groups = math.gcd(layer.num_groups, entering[1])
    return nn.GroupNorm(groups, entering[1], layer.eps, layer.affine, **place)


_LAYERS: dict[type[nn.Module], Callable[[Any, float, torch.Size, dict[str, Any]], nn.Module]] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    _NormBase: _norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
"""How to make a layer of a share of the channels for an input of some shape."""
