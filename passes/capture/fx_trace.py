"""First rung of the capture ladder: a torch.fx trace that keeps torch.nn modules whole.

Custom autograd functions stay one call as well: operators inside their forward would be
differentiated as what they compute, and the function's own backward would be lost.

Every front end calls the model through `Entry`, which takes the tensors of the example inputs one
by one. The qualified names that it records therefore begin with `model.`, which `strip` removes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree

from passes.errors import CaptureError
from passes.ir.example_inputs import AttributeKey, ExampleInputs, placeholder_names
from passes.ir.isolation import DispatchMode, exclusive, for_this_thread
from passes.ir.module_walk import named_tensors
from passes.ir.output_types import plain
from passes.ir.program import Provenance, is_user_code, set_provenance, storage_id

_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)


_NORMS = (parametrizations._WeightNorm, parametrizations._SpectralNorm)
"""Parametrizations that artifacts store together with their module."""


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one call in the graph: modules of torch.nn other than containers."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, _CONTAINERS)


class Entry(nn.Module):
    """Call a model from its flat tensors, so that every front end sees the same signature.

    Args:
        model: The model.
        inputs: Its example inputs, which say where each tensor belongs.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs

    def forward(self, *leaves: Any) -> Any:
        """Call the model with `leaves` in place of the tensors of its example inputs.

        Of the output, containers become dicts, lists and tuples.
        """
        args, kwargs = self._inputs.with_leaves(leaves)
        return plain(self.model(*args, **kwargs))


class ModuleTracer(fx.Tracer):
    """Record module calls as single nodes, with the line of the user's code of each node."""

    # Otherwise values computed from buffers alone would be constants of the graph.
    proxy_buffer_attributes = True

    def __init__(self, inputs: ExampleInputs, opaque: Collection[type[nn.Module]]) -> None:
        super().__init__()
        self._inputs = inputs
        self._opaque = opaque
        self._autocast = _autocasting(inputs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep modules of torch.nn whole, except containers and the traced model itself."""
        return module_qualified_name != "model" and (is_leaf(m) or type(m) in self._opaque)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make one placeholder per tensor argument and one proxy per tensor inside it."""
        proxies = {
            name: self.create_proxy("placeholder", name, (), {})
            for name in placeholder_names(self._inputs)
        }
        leaves = []
        for leaf in self._inputs.leaves:
            proxy: Any = proxies[leaf.argument]
            for key in leaf.path:
                proxy = getattr(proxy, key) if isinstance(key, AttributeKey) else proxy[key]
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
        """Create the node and record its module path and source line."""
        if _autocasting(self._inputs) - self._autocast:
            raise CaptureError("forward turns on torch.autocast, which calls do not record")
        if kind in ("call_module", "get_attr"):
            name = strip(str(target)).replace(".", "_") or name
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        path = next(reversed(self.module_stack), "").partition("@")[0]
        set_provenance(node, Provenance(strip(path), _user_line(sys._getframe(1))))
        return node


@contextmanager
def functions_replaced(apply: Callable[..., Any]) -> Iterator[None]:
    """Replace `torch.autograd.Function.apply` in this thread.

    Args:
        apply: Called with the original, the class, and the arguments.
    """
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def replacement(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        return apply(functools.partial(original, cls), cls, *args, **kwargs)

    method = classmethod(for_this_thread(replacement, original))
    torch.autograd.Function.apply = method  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = classmethod(original)  # type: ignore[assignment]


def _record_function(
    original: Callable[..., Any], cls: type[torch.autograd.Function], *args: Any, **kwargs: Any
) -> Any:
    """Record the call of a custom autograd function on symbolic values as a single node."""
    leaves = pytree.tree_leaves((args, kwargs))
    proxy = next((leaf for leaf in leaves if isinstance(leaf, fx.Proxy)), None)
    if proxy is None:
        return original(*args, **kwargs)
    return proxy.tracer.create_proxy("call_function", as_callable(cls), args, kwargs)


@functools.cache
def as_callable(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return a function that applies a custom autograd function, under the name of its class."""

    @functools.wraps(function, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def call(*args: Any, **kwargs: Any) -> Any:
        return function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    return call


def called_functions(graph: fx.Graph) -> list[str]:
    """Return the names of the custom autograd functions that a graph calls."""
    classes = [getattr(node.target, "__wrapped__", None) for node in graph.nodes]
    return [
        function.__qualname__
        for function in dict.fromkeys(classes)
        if isinstance(function, type) and issubclass(function, torch.autograd.Function)
    ]


def wrapped_functions(graph: fx.Graph) -> list[str]:
    """Return the names of the Python functions outside of torch that a trace does not enter.

    Libraries wrap functions that read shapes (`torch.fx.wrap`), as torchvision's attention.
    """
    targets = [node.target for node in graph.nodes if isinstance(node.target, FunctionType)]
    return [
        target.__qualname__
        for target in dict.fromkeys(targets)
        if target.__module__.partition(".")[0] not in ("torch", "passes", "operator", "math")
        and not hasattr(target, "__wrapped__")  # a custom autograd function
    ]


def parametrizing_code(model: nn.Module) -> list[str]:
    """Return the parametrizations inside modules of torch.nn that no artifact can store."""
    owners = [m for m in model.modules() if is_leaf(m) and parametrize.is_parametrized(m)]
    return [f"parametrization {name}" for name in dict.fromkeys(filter(None, map(_code, owners)))]


def _code(module: Any) -> str:
    """Return the class of the first such parametrization of a module; "" if there is none."""
    parts = [part for chain in module.parametrizations.values() for part in chain]
    return next((type(part).__qualname__ for part in parts if type(part) not in _NORMS), "")


def _autocasting(inputs: ExampleInputs) -> set[str]:
    """Return the types of devices of the inputs, and the CPU, for which autocast is on."""
    devices = {"cpu", *(tensor.device.type for tensor in inputs.tensors())} - {"meta"}
    return {device for device in devices if torch.is_autocast_enabled(device)}


def strip(path: str) -> str:
    """Remove the entry's own prefix from a qualified name."""
    return path.removeprefix("model").removeprefix(".")


def _user_line(frame: FrameType | None) -> str:
    """Return the innermost line of user code, up to the frame of `trace`; "" if there is none."""
    while frame is not None and frame.f_code is not trace.__code__:
        if is_user_code(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _WeightObserver(DispatchMode):
    """Refuse computations with the weights themselves, which a trace keeps the results of.

    What an attribute of a module returns is symbolic; what `parameters()`, `buffers()` and
    `state_dict()` return is not:

        with torch.no_grad():
            norm = sum(weight.norm() for weight in self.parameters())   a constant of the graph
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = named_tensors(model, repeats=True)
        self._names = {storage_id(tensor): name for name, tensor in named}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and (name := self._names.get(storage_id(leaf))):
                raise CaptureError(
                    f"forward reads {name} by other means than an attribute (parameters(), "
                    "buffers(), state_dict()), and a trace would keep its value"
                )
        return func(*args, **(kwargs or {}))


def _write_buffers(entry: nn.Module, graph: fx.Graph) -> None:
    """Write what forward sets buffers to (`self.mean = ...`) into their memory, after all reads."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for path, module in entry.named_modules():
        for name, value in module._buffers.items():
            if not isinstance(value, fx.Proxy):
                continue
            target = f"{path}.{name}"
            reads = [node for node in graph.find_nodes(op="get_attr") if node.target == target]
            users = [user for node in reads for user in node.users if user.op != "output"]
            last = max((value.node, *users), key=order.__getitem__)
            with graph.inserting_after(last):
                buffer = graph.get_attr(target)
            with graph.inserting_after(buffer):
                detached = graph.call_method("detach", (value.node,))
            with graph.inserting_after(detached):
                graph.call_method("copy_", (buffer, detached))


def trace(
    model: nn.Module, inputs: ExampleInputs, *, opaque: Collection[type[nn.Module]] = ()
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Trace a model symbolically; modules of torch.nn stay calls.

    Args:
        model: The model.
        inputs: Its example inputs.
        opaque: Further classes of modules that stay calls.

    Returns:
        The graph, with targets relative to the model, and its constant tensors by the targets of
        the nodes that read them.

    Raises:
        Exception: Whatever the model's own code raises on symbolic values.
    """
    entry = Entry(model, inputs)
    with exclusive(), functions_replaced(_record_function), _WeightObserver(model):
        graph = ModuleTracer(inputs, opaque).trace(entry)
    _write_buffers(entry, graph)
    constants: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.target is getattr and node.args[1] == "data":
            node.op, node.target, node.args = "call_method", "detach", node.args[:1]
        if node.op == "get_attr" and not str(node.target).startswith("model."):
            constants[str(node.target)] = getattr(entry, str(node.target))
        elif node.op in ("call_module", "get_attr"):
            node.target = strip(str(node.target))
    return graph, constants
