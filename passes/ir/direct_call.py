"""Remove Python overhead from small calls: call plain layers by function, with frame headroom.

A deep network at a small batch size spends much of its time in Python before its kernels start.

- The `forward` that torch.fx generates looks every layer up by its path, goes through
  `nn.Module.__call__`, and the layer then looks its parameters up one by one. `DirectCaller` binds
  the functional form of each layer once (`examples/studies/overhead.py` measures the gain).
- CPython keeps the frames of Python functions in chunks of 16 KiB. It maps a new chunk when a call
  does not fit into the current one, and unmaps it when that call returns. If the frame of a long
  generated `forward` ends near the end of a chunk, every layer call maps and unmaps memory: a stage
  of ResNet-1001 took twice as long, and the same code was fast a few frames up or down the stack.
  `with_frame_headroom` calls from a frame that needs a large chunk of its own, so that every frame
  after it fits into what is left of that chunk.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn

P = ParamSpec("P")
T = TypeVar("T")

_LayerCall = Callable[[torch.Tensor], torch.Tensor]

_FRAME_WORDS = 16_000
"""Stack size of the headroom frame, in words of 8 bytes. With the 1,000 words that CPython adds it
takes 136,000 bytes, a little over 2**17; CPython rounds the chunk up to 2**18 bytes, which leaves
more than 130,000 bytes for the frames after it."""


def with_frame_headroom(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function at the start of a large, nearly empty chunk of CPython's frame stack.

    Returns:
        What the function returns.
    """
    return function(*args, **kwargs)


with_frame_headroom.__code__ = with_frame_headroom.__code__.replace(co_stacksize=_FRAME_WORDS)


class DirectCaller:
    """Run a GraphModule with plain layers replaced by calls of their functions.

    The results are bitwise equal to those of the module. Parameters, buffers and options are read
    at every call. If a layer was replaced or is no longer plain (a hook, a patched forward, a
    parametrization, a weight that is a buffer), or the module itself was hooked or changed, the
    module runs as it is.

    Args:
        module: The module; it is not changed.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._forward = type(module).forward
        self._calls: dict[nn.Module, _LayerCall] = {}
        # By path prefix: the dict that holds a child, its name there, and the child itself.
        self._children: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        graph = copy.deepcopy(module.graph)
        for node in graph.nodes:
            if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
                self._replace(node)
        self._run = types.MethodType(type(fx.GraphModule(module, graph)).forward, module)
        # `_is_unchanged` runs before every call: its data are laid out once, for a thousand layers.
        self._types = [*map(type, self._calls)]
        self._layer_hooks = [hooks for layer in self._calls for hooks in _hooks(layer)]
        self._layer_dicts = [layer.__dict__ for layer in self._calls]
        self._parameters = [
            layer._parameters for layer in self._calls if type(layer) not in _WITHOUT_WEIGHTS
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the arguments of the module and return its output."""
        run = self._run if self._is_unchanged() else self._module
        return run(*args, **kwargs)

    def __reduce__(self) -> tuple[type[DirectCaller], tuple[fx.GraphModule]]:
        """Rebuild from the module, so that a copy calls the layers of the copied module."""
        return DirectCaller, (self._module,)

    def _replace(self, node: fx.Node) -> None:
        """Replace a call of a plain layer by its function; record every module on its path."""
        target = str(node.target)
        layer = self._module.get_submodule(target)
        if not _is_plain(layer):
            return
        if layer not in self._calls:
            self._calls[layer] = call = _CALL_BUILDERS[type(layer)](layer)
            call.__name__ = target.replace(".", "_")
        node.op, node.target = "call_function", self._calls[layer]
        owner: nn.Module = self._module
        path = ""
        for name in target.split("."):
            path, child = f"{path}.{name}", owner.get_submodule(name)
            self._children[path] = owner._modules, name, child
            owner = child

    def _is_unchanged(self) -> bool:
        """Whether every layer is in its place and plain, and no hook observes module calls."""
        return (
            type(self._module).forward is self._forward
            and not any(_hooks(self._module))
            and not _is_patched(self._module.__dict__)
            and not _has_global_changes()
            and not any(self._layer_hooks)
            and [*map(type, self._calls)] == self._types
            and all(owner.get(name) is child for owner, name, child in self._children.values())
            and not any(map(_is_patched, self._layer_dicts))
            and all("weight" in weights and "bias" in weights for weights in self._parameters)
        )


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer does nothing but call its function."""
    return (
        type(layer) in _CALL_BUILDERS
        and not any(_hooks(layer))
        and not _is_patched(layer.__dict__)
        and (type(layer) in _WITHOUT_WEIGHTS or {"weight", "bias"} <= layer._parameters.keys())
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the dicts that hold the hooks of a module."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def _is_patched(attributes: dict[str, Any]) -> bool:
    """Whether the attributes of a module instance override its forward, or it was compiled."""
    return (
        "forward" in attributes
        or "_conv_forward" in attributes
        or "_compiled_call_impl" in attributes
    )


def _has_global_changes() -> bool:
    """Whether global module hooks are registered, or the forward of a layer class was patched."""
    registry = nn.modules.module
    return bool(
        registry._global_forward_hooks
        or registry._global_forward_pre_hooks
        or registry._global_backward_hooks
        or registry._global_backward_pre_hooks
        or any(
            layer_type.forward.__module__ != layer_type.__module__ for layer_type in _CALL_BUILDERS
        )
    )


def _convolution(function: Callable[..., torch.Tensor]) -> Callable[[Any], _LayerCall]:
    def build(layer: Any) -> _LayerCall:
        weights = layer._parameters

        def call(x: torch.Tensor) -> torch.Tensor:
            if layer.padding_mode != "zeros":
                padded: torch.Tensor = layer(x)
                return padded
            return function(
                x, weights["weight"], weights["bias"],
                layer.stride, layer.padding, layer.dilation, layer.groups,
            )  # fmt: skip

        return call

    return build


def _batch_norm(layer: Any) -> _LayerCall:
    weights, statistics = layer._parameters, layer._buffers

    def call(x: torch.Tensor) -> torch.Tensor:
        mean, var = statistics["running_mean"], statistics["running_var"]
        count = statistics["num_batches_tracked"]
        tracked = layer.track_running_stats and layer.momentum is not None
        if not tracked or mean is None or var is None or count is None:
            normed: torch.Tensor = layer(x)
            return normed
        layer._check_input_dim(x)
        if layer.training:
            count.add_(1)
        return F.batch_norm(
            x, mean, var, weights["weight"], weights["bias"],
            layer.training, layer.momentum, layer.eps,
        )  # fmt: skip

    return call


def _linear(layer: Any) -> _LayerCall:
    weights = layer._parameters
    return lambda x: F.linear(x, weights["weight"], weights["bias"])


def _layer_norm(layer: Any) -> _LayerCall:
    weights = layer._parameters
    return lambda x: F.layer_norm(
        x, layer.normalized_shape, weights["weight"], weights["bias"], layer.eps
    )


def _group_norm(layer: Any) -> _LayerCall:
    weights = layer._parameters
    return lambda x: F.group_norm(
        x, layer.num_groups, weights["weight"], weights["bias"], layer.eps
    )


def _relu(layer: Any) -> _LayerCall:
    return lambda x: F.relu(x, inplace=layer.inplace)


def _gelu(layer: Any) -> _LayerCall:
    return lambda x: F.gelu(x, approximate=layer.approximate)


_WITHOUT_WEIGHTS = (nn.ReLU, nn.GELU)

_CALL_BUILDERS: dict[type[nn.Module], Callable[[Any], _LayerCall]] = {
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
"""Builder of the direct call by exact layer class: a subclass may do anything."""
