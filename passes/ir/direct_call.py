"""Calls plain layers by their functions, without the way through `nn.Module`.

A deep network at a small batch spends much of its time in front of its kernels. The code that
torch.fx generates finds every layer anew by its path, calls it, and has it find its parameters one
by one (`examples/studies/overhead.py` measures what that costs).
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["Direct"]

_Call = Callable[[torch.Tensor], torch.Tensor]


class Direct:
    """Runs a GraphModule, with plain layers called by their functions.

    It computes the same to the bit. Parameters, buffers and options are read at every call; where a
    layer is no longer there or no longer plain (a hook, a patched forward, a parametrization, a
    weight that is a buffer), or the module itself was hooked or changed, the module runs as it is.

    Args:
        module: The module, which stays as it is.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._forward = type(module).forward
        self._layers: dict[nn.Module, _Call] = {}
        self._places: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        graph = copy.deepcopy(module.graph)
        for node in graph.nodes:
            if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
                self._replace(node)
        self._run = types.MethodType(type(fx.GraphModule(module, graph)).forward, module)
        # What `_as_it_was` looks at before every run, laid out for it: a thousand layers are many.
        self._types = [*map(type, self._layers)]
        self._hooks = [hooks for layer in self._layers for hooks in _hooks(layer)]
        self._dicts = [layer.__dict__ for layer in self._layers]
        self._weights = [each._parameters for each in self._layers if type(each) not in _BARE]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on what the module takes."""
        run = self._run if self._as_it_was() else self._module
        return run(*args, **kwargs)

    def __reduce__(self) -> tuple[type[Direct], tuple[fx.GraphModule]]:
        """A copy calls the layers of its own module."""
        return Direct, (self._module,)

    def _replace(self, node: fx.Node) -> None:
        """Call a layer by its function if it is plain; remember every module on the way to it."""
        target = str(node.target)
        layer = self._module.get_submodule(target)
        if not _is_plain(layer):
            return
        if layer not in self._layers:
            self._layers[layer] = call = _MAKERS[type(layer)](layer)
            call.__name__ = target.replace(".", "_")
        node.op, node.target = "call_function", self._layers[layer]
        owner: nn.Module = self._module
        path = ""
        for name in target.split("."):
            path, child = f"{path}.{name}", owner.get_submodule(name)
            self._places[path] = owner._modules, name, child
            owner = child

    def _as_it_was(self) -> bool:
        """Whether every layer is still there and plain, and nobody wants to know of calls."""
        return (
            type(self._module).forward is self._forward
            and not any(_hooks(self._module))
            and not _patched(self._module.__dict__)
            and not _every_module_changed()
            and not any(self._hooks)
            and [*map(type, self._layers)] == self._types
            and all(owner.get(name) is child for owner, name, child in self._places.values())
            and not any(map(_patched, self._dicts))
            and all("weight" in own and "bias" in own for own in self._weights)
        )


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer is calling its function, and nothing else."""
    return (
        type(layer) in _MAKERS
        and not any(_hooks(layer))
        and not _patched(layer.__dict__)
        and (type(layer) in _BARE or {"weight", "bias"} <= layer._parameters.keys())
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """The dicts of a module that hold its hooks."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def _patched(attributes: dict[str, Any]) -> bool:
    """Whether a module, known by its own attributes, has a forward of its own or was compiled."""
    return (
        "forward" in attributes
        or "_conv_forward" in attributes
        or "_compiled_call_impl" in attributes
    )


def _every_module_changed() -> bool:
    """Whether there are hooks for all modules, or the forward of a class was patched."""
    every = nn.modules.module
    return bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
        or any(kind.forward.__module__ != kind.__module__ for kind in _MAKERS)
    )


def _convolution(function: Callable[..., torch.Tensor]) -> Callable[[Any], _Call]:
    def make(layer: Any) -> _Call:
        own = layer._parameters

        def call(x: torch.Tensor) -> torch.Tensor:
            if layer.padding_mode != "zeros":
                padded: torch.Tensor = layer(x)
                return padded
            return function(
                x, own["weight"], own["bias"],
                layer.stride, layer.padding, layer.dilation, layer.groups,
            )  # fmt: skip

        return call

    return make


def _batch_norm(layer: Any) -> _Call:
    own, state = layer._parameters, layer._buffers

    def call(x: torch.Tensor) -> torch.Tensor:
        mean, var = state["running_mean"], state["running_var"]
        count = state["num_batches_tracked"]
        kept = layer.track_running_stats and layer.momentum is not None
        if not kept or mean is None or var is None or count is None:
            normed: torch.Tensor = layer(x)
            return normed
        layer._check_input_dim(x)
        if layer.training:
            count.add_(1)
        return F.batch_norm(
            x, mean, var, own["weight"], own["bias"], layer.training, layer.momentum, layer.eps
        )

    return call


def _linear(layer: Any) -> _Call:
    own = layer._parameters
    return lambda x: F.linear(x, own["weight"], own["bias"])


def _layer_norm(layer: Any) -> _Call:
    own = layer._parameters
    return lambda x: F.layer_norm(
        x, layer.normalized_shape, own["weight"], own["bias"], layer.eps
    )  # fmt: skip


def _group_norm(layer: Any) -> _Call:
    own = layer._parameters
    return lambda x: F.group_norm(x, layer.num_groups, own["weight"], own["bias"], layer.eps)


def _relu(layer: Any) -> _Call:
    return lambda x: F.relu(x, inplace=layer.inplace)


def _gelu(layer: Any) -> _Call:
    return lambda x: F.gelu(x, approximate=layer.approximate)


_BARE = (nn.ReLU, nn.GELU)
"""Layers without weights."""

_MAKERS: dict[type[nn.Module], Callable[[Any], _Call]] = {
    nn.Conv1d: _convolution(F.conv1d),
    nn.Conv2d: _convolution(F.conv2d),
    nn.Conv3d: _convolution(F.conv3d),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.ReLU: _relu,
    nn.GELU: _gelu,
}
"""What makes the call of a layer, by its exact class: a subclass may do anything."""
