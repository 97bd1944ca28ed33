"""First rung of the capture ladder: a torch.fx trace that keeps torch.nn modules whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.ir.example_inputs import Arguments, Field, as_plain, placeholders
from passes.ir.isolation import exclusive
from passes.ir.program import Provenance, is_user_code, set_provenance

__all__ = ["Entry", "is_leaf", "trace"]

_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one call in the graph: torch.nn's own, containers excepted."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, _CONTAINERS)


class Entry(nn.Module):
    """Calls a model from its flat tensors, so that every front end sees the same signature."""

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.model = model
        self._arguments = arguments

    def forward(self, *leaves: Any) -> Any:
        """Call the model with `leaves` in place of the tensors of its example inputs.

        Containers that torch does not know become dicts of their fields in the output.
        """
        args, kwargs = self._arguments.with_leaves(leaves)
        return pytree.tree_map(_plain, self.model(*args, **kwargs))


def _plain(value: Any) -> Any:
    plain = as_plain(value)
    return value if plain is value else pytree.tree_map(_plain, plain)


class ModuleTracer(fx.Tracer):
    """Records module calls as they are, and where in the user's code each node was made."""

    # Else what is computed from a buffer alone would be frozen at its value of today.
    proxy_buffer_attributes = True

    def __init__(self, arguments: Arguments, whole: Collection[type[nn.Module]]) -> None:
        super().__init__()
        self._arguments = arguments
        self._whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep torch.nn modules whole, except the traced model itself and containers."""
        return module_qualified_name != "model" and (is_leaf(m) or type(m) in self._whole)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make one placeholder per tensor argument and one proxy per tensor inside it."""
        proxies = {
            name: self.create_proxy("placeholder", name, (), {})
            for name in placeholders(self._arguments)
        }
        leaves = []
        for leaf in self._arguments.leaves:
            proxy: Any = proxies[leaf.argument]
            for key in leaf.path:
                proxy = getattr(proxy, key) if isinstance(key, Field) else proxy[key]
            leaves.append(proxy)
        return root_fn, [self.root, *leaves]

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Create the node and note its module path and source line."""
        if kind in ("call_module", "get_attr"):
            name = strip(str(target)).replace(".", "_") or name
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        path = next(reversed(self.module_stack), "").partition("@")[0]
        set_provenance(node, Provenance(strip(path), _user_line(sys._getframe(1))))
        return node


def strip(path: str) -> str:
    """Remove the entry's own prefix from a qualified name."""
    return path.removeprefix("model").removeprefix(".")


def _user_line(frame: FrameType | None) -> str:
    """Innermost line of the model's own code; what called the compiler is not the model's."""
    while frame is not None and frame.f_code is not trace.__code__:
        if is_user_code(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def trace(
    model: nn.Module, arguments: Arguments, *, whole: Collection[type[nn.Module]] = ()
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Trace a model symbolically; torch.nn modules stay calls.

    Args:
        model: The model.
        arguments: Its example inputs.
        whole: Further classes of modules that stay calls.

    Returns:
        The graph, with targets relative to the model, and the tensors that it holds as constants.

    Raises:
        Exception: Whatever the model's own code raises on symbolic values.
    """
    entry = Entry(model, arguments)
    with exclusive():
        graph = ModuleTracer(arguments, whole).trace(entry)
    constants: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and not str(node.target).startswith("model."):
            constants[str(node.target)] = getattr(entry, str(node.target))
        elif node.op in ("call_module", "get_attr"):
            node.target = strip(str(node.target))
    return graph, constants
