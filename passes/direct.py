"""Calls plain layers by their functions, without the way through `nn.Module`.

A deep network at a small batch spends much of its time in front of its kernels. The code that
torch.fx generates finds every layer anew by its path, calls it, and has it find its parameters one
by one; BatchNorm at batch 1 takes half of its time so. Parameters, buffers and options are still
read at every call, so that whatever replaces them is seen.
"""

from __future__ import annotations

import copy
import linecache
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["Direct"]

_Call = Callable[[torch.Tensor], torch.Tensor]


class _Layer(NamedTuple):
    """A layer that is called by its function, and where it was found."""

    owner: dict[str, nn.Module | None]
    name: str
    layer: nn.Module
    kind: type[nn.Module]


class Direct:
    """Runs a GraphModule, with plain layers called by their functions.

    It computes the same to the bit. Where the module or a layer has a hook, or a layer was replaced
    or parametrized since, the module runs as it is.

    Args:
        module: The module, which stays as it is.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._layers: list[_Layer] = []
        graph = copy.deepcopy(module.graph)
        for node in graph.nodes:
            if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
                self._replace(node)
        self._run = types.MethodType(_compiled(graph, type(module).__name__), module)

    def _replace(self, node: fx.Node) -> None:
        path, _, name = str(node.target).rpartition(".")
        owner = self._module.get_submodule(path)._modules
        layer = owner[name]
        assert layer is not None
        call = _call_of(layer)
        if call is None:
            return
        call.__name__ = str(node.target).replace(".", "_")
        node.op, node.target = "call_function", call
        self._layers.append(_Layer(owner, name, layer, type(layer)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on what the module takes."""
        run = self._run if self._as_it_was() else self._module
        return run(*args, **kwargs)

    def _as_it_was(self) -> bool:
        """Whether every layer is still there, and nobody wants to know of calls."""
        every = nn.modules.module
        if (
            every._global_forward_hooks
            or every._global_forward_pre_hooks
            or every._global_backward_hooks
            or every._global_backward_pre_hooks
            or _hooked(self._module)
        ):
            return False
        for owner, name, layer, kind in self._layers:
            if owner.get(name) is not layer or type(layer) is not kind or _hooked(layer):
                return False
        return True


def _compiled(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The forward method that a graph says, with its source for tracebacks."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    file = f"<{name} at {id(graph):#x}, layers called directly>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    exec(compile(code.src, file, "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _call_of(layer: nn.Module) -> _Call | None:
    """What the forward of a layer calls, or None if it is no plain layer."""
    maker = _MAKERS.get(type(layer))
    if maker is None or "forward" in vars(layer) or layer._compiled_call_impl is not None:
        return None
    return maker(layer)


def _convolution(function: Callable[..., torch.Tensor]) -> Callable[[Any], _Call | None]:
    def make(layer: Any) -> _Call | None:
        own = layer._parameters

        def call(x: torch.Tensor) -> torch.Tensor:
            return function(
                x, own["weight"], own["bias"],
                layer.stride, layer.padding, layer.dilation, layer.groups,
            )  # fmt: skip

        return call if layer.padding_mode == "zeros" else None

    return make


def _batch_norm(layer: Any) -> _Call | None:
    own, state = layer._parameters, layer._buffers

    def call(x: torch.Tensor) -> torch.Tensor:
        if layer.training:
            state["num_batches_tracked"].add_(1)
        return F.batch_norm(
            x, state["running_mean"], state["running_var"], own["weight"], own["bias"],
            layer.training, layer.momentum, layer.eps,
        )  # fmt: skip

    return call if layer.track_running_stats and layer.momentum is not None else None


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


_MAKERS: dict[type[nn.Module], Callable[[Any], _Call | None]] = {
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
"""By the exact type of a layer: a subclass may do anything."""
