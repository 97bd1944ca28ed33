"""Stand-in operator for modules and autograd functions that torch.export must not enter.

torch.export runs the Python code of every module on tensors without values, and stops where the
code asks for a value. Such a module is opaque: while the model is exported, its forward is replaced
by an operator without code, whose results have the shapes that the module returned on two inputs.
In the exported graph the operator becomes a call of the module again:

    exported:  results = pnn_compile.opaque_call([x], [], key=0);  y = results[0]
    copied:    y = gate(x)

Calls of custom autograd functions are replaced likewise, where the backward of one is not that of
its forward: torch.export keeps the operators of the forward alone.

Two inputs with different batch sizes tell which sizes of the results depend on sizes of the
arguments: sizes (2, 10) in the results for (2, 10) in an argument are that size, and (5, 21) for
(2, 10) are 2 n + 1. Wrong conclusions do no harm, because every graph is validated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.capture.fx_trace import as_callable, functions_replaced
from passes.errors import CaptureError
from passes.ir.example_inputs import AttributeKey, ExampleInputs
from passes.ir.isolation import preserved, with_plain_transformers
from passes.ir.program import Provenance, set_provenance, tensor_leaves

_LITERALS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
"""Arguments of an opaque module besides tensors: the graph holds them as they are."""


@torch.library.custom_op("pnn_compile::opaque_call", mutates_args=())
def _opaque_call(
    tensors: Sequence[torch.Tensor], sizes: Sequence[int], key: int
) -> list[torch.Tensor]:
    """Stand for the call of a module; never run."""
    raise RuntimeError("an opaque call stands for a module in an exported graph and is never run")


OPERATOR: Any = torch.ops.pnn_compile.opaque_call.default

_active_calls: dict[int, OpaqueCall] = {}
"""Calls of the export that is running, by their key in the graph."""


@_opaque_call.register_fake
def _fake(tensors: Sequence[torch.Tensor], sizes: Sequence[int], key: int) -> list[torch.Tensor]:
    return _active_calls[key].make_results(tensors)


OpaqueTarget = str | type[torch.autograd.Function]
"""Qualified name of a module, or a custom autograd function."""


@dataclass(frozen=True)
class _Observation:
    """Tensors of one call: shapes of the arguments, results, and the whole output."""

    argument_shapes: list[torch.Size]
    results: list[torch.Tensor]
    output: Any


@dataclass
class OpaqueCall:
    """One call of an opaque module or function.

    Attributes:
        target: Qualified name of the module, or the autograd function.
        observations: The call on the example inputs, and on others with one more sample.
        arguments: Its flat arguments; a `_Slot` for every tensor and symbolic size.
        structure: Nesting of the arguments.
    """

    target: OpaqueTarget
    observations: tuple[_Observation, _Observation]
    arguments: list[Any] = field(default_factory=list)
    structure: pytree.TreeSpec | None = None

    def make_results(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Make results without values, whose sizes depend on those of the arguments.

        Args:
            tensors: The tensor arguments, with symbolic sizes.
        """
        first, second = self.observations
        results = []
        for small, large in zip(first.results, second.results, strict=True):
            sizes = [
                a if a == b else self._symbolic_size(a, b, tensors)
                for a, b in zip(small.shape, large.shape, strict=True)
            ]
            results.append(torch.empty(sizes, dtype=small.dtype, device=small.device))
        return results

    def _symbolic_size(self, small: int, large: int, tensors: Sequence[torch.Tensor]) -> Any:
        """Express a size as a linear function of a size of the arguments.

        Args:
            small: The size in the first observation.
            large: The size in the second observation.
            tensors: The tensor arguments, with symbolic sizes.
        """
        first, second = self.observations
        shapes = zip(tensors, first.argument_shapes, second.argument_shapes, strict=True)
        for tensor, small_shape, large_shape in shapes:
            for size, a, b in zip(tensor.shape, small_shape, large_shape, strict=True):
                if a != b and (large - small) % (b - a) == 0:
                    slope = (large - small) // (b - a)
                    return small - slope * a + slope * size
        raise CaptureError(
            f"a size in the output of {_label(self.target)} depends on no size of its arguments"
        )

    def insert(self, graph: fx.Graph, values: Mapping[type, Sequence[Any]]) -> list[Any]:
        """Insert the call into a graph and return the nodes of its tensors.

        Args:
            graph: The graph.
            values: Tensors and symbolic sizes of the call, by the class of their slots.
        """
        assert self.structure is not None
        flat = [
            argument.read(graph, values[type(argument)])
            if isinstance(argument, _Slot)
            else argument
            for argument in self.arguments
        ]
        args, kwargs = pytree.tree_unflatten(flat, self.structure)
        if isinstance(self.target, str):
            call = graph.call_module(self.target, args, kwargs)
            set_provenance(call, Provenance(self.target))
        else:
            call = graph.call_function(as_callable(self.target), args, kwargs)
        leaves, _ = pytree.tree_flatten_with_path(self.observations[0].output)
        return [
            self._element(graph, call, path)
            for path, leaf in leaves
            if isinstance(leaf, torch.Tensor)
        ]

    def _element(self, graph: fx.Graph, value: fx.Node, path: pytree.KeyPath) -> fx.Node:
        """Insert the reads that lead to one tensor of a nested output."""
        for entry in path:
            if isinstance(entry, pytree.SequenceKey):
                value = graph.call_function(operator.getitem, (value, entry.idx))
            elif isinstance(entry, pytree.MappingKey):
                value = graph.call_function(operator.getitem, (value, entry.key))
            else:
                name = cast("pytree.GetAttrKey", entry).name
                value = graph.call_function(getattr, (value, AttributeKey(name)))
            if isinstance(self.target, str):
                set_provenance(value, Provenance(self.target))
        return value


@dataclass(frozen=True)
class _Slot:
    """Position of an argument among the operator's arguments of its class."""

    index: int

    def read(self, graph: fx.Graph, values: Sequence[Any]) -> Any:
        """Return the value in the graph that the module is called with."""
        return values[self.index]


class _TensorSlot(_Slot):
    """A tensor."""


class _SizeSlot(_Slot):
    """A symbolic integer, such as a size."""


class _FlagSlot(_SizeSlot):
    """A symbolic truth value, which the operator takes as 0 or 1."""

    def read(self, graph: fx.Graph, values: Sequence[Any]) -> Any:
        """Convert the number back to a truth value."""
        return graph.call_function(bool, (super().read(graph, values),))


def _label(target: OpaqueTarget) -> str:
    return target if isinstance(target, str) else target.__qualname__


class OpaqueCalls:
    """Opaque calls of one export."""

    def __init__(self, calls: Mapping[int, OpaqueCall]) -> None:
        self._calls = calls

    def insert(self, graph: fx.Graph, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Insert the call that an operator stands for into a graph.

        Args:
            graph: The graph.
            node: The call of the operator in the exported graph.
            values: Nodes of `graph` by those of the exported graph.

        Returns:
            The nodes of its tensors.
        """
        tensors, sizes, key = cast("tuple[Sequence[Any], Sequence[Any], int]", node.args)
        mapped = fx.node.map_arg((list(tensors), list(sizes)), values.__getitem__)
        tensor_nodes, size_nodes = mapped
        slots: dict[type, Sequence[Any]] = {
            _TensorSlot: tensor_nodes,
            _SizeSlot: size_nodes,
            _FlagSlot: size_nodes,
        }
        return tuple(self._calls[key].insert(graph, slots))


@contextmanager
def replace_by_operators(
    model: nn.Module,
    inputs: ExampleInputs,
    opaque: Collection[type[nn.Module]],
    *,
    functions: bool = False,
) -> Iterator[OpaqueCalls]:
    """Replace the forward of opaque modules by the operator while a model is exported.

    Args:
        model: The model, in the mode in which it is exported.
        inputs: Its example inputs.
        opaque: Classes of the opaque modules.
        functions: Whether calls of custom autograd functions are replaced as well; not together
            with opaque modules, inside which they are not seen again.

    Raises:
        CaptureError: An opaque call takes or returns what no graph can hold.
    """
    paths = [path for path, module in model.named_modules() if path and type(module) in opaque]
    first = _observe_calls(model, paths, inputs, functions)
    try:
        second = _observe_calls(model, paths, inputs.varied(grow=True), functions)
    except Exception:  # the model takes no other batch size
        second = first
    calls: dict[int, OpaqueCall] = {}
    forwards = {
        target: _make_forward(target, list(zip(first[target], second[target], strict=True)), calls)
        for target in first
    }

    def apply(original: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
        return forwards.get(cls, original)(*args, **kwargs)

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            module.forward = forwards[path]
            stack.callback(delattr, module, "forward")
        if functions:
            stack.enter_context(functions_replaced(apply))
        stack.callback(_active_calls.clear)
        yield OpaqueCalls(calls)


def _observe_calls(
    model: nn.Module, paths: Sequence[str], inputs: ExampleInputs, functions: bool
) -> Mapping[OpaqueTarget, list[_Observation]]:
    """Run the model and record the shapes of every call of some modules, or of all functions."""
    observations: dict[OpaqueTarget, list[_Observation]] = {path: [] for path in paths}
    depth = 0

    def record(target: OpaqueTarget, args: Any, kwargs: Any, output: Any) -> None:
        shapes = [tensor.shape for tensor in tensor_leaves((args, kwargs))]
        observation = _Observation(shapes, tensor_leaves(output), output)
        observations.setdefault(target, []).append(observation)

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: record(path, args, kwargs, output)

    def apply(original: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth  # functions inside of functions are not seen again
        depth += 1
        output = original(*args, **kwargs)
        depth -= 1
        if not depth and cls.__module__.partition(".")[0] != "torch":
            record(cls, args, kwargs, output)
        return output

    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
            stack.callback(handle.remove)
        if functions:
            stack.enter_context(functions_replaced(apply))
        stack.enter_context(preserved(model))
        stack.enter_context(with_plain_transformers())
        stack.enter_context(torch.no_grad())
        args, kwargs = inputs.copied()
        model(*args, **kwargs)
    return observations


def calls_functions(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a model calls custom autograd functions, in either mode."""
    functions: list[OpaqueTarget] = []
    for train in (True, False):
        model.train(train)
        with suppress(Exception):  # one mode is enough
            functions += _observe_calls(model, [], inputs, functions=True)
    return bool(functions)


def _make_forward(
    target: OpaqueTarget,
    observations: Sequence[tuple[_Observation, _Observation]],
    calls: dict[int, OpaqueCall],
) -> Callable[..., Any]:
    """Make a forward that calls the operator and nests its results like the original's output.

    Args:
        target: The module or function.
        observations: Its calls in one run of the model, in order. torch.export may run the model
            several times.
        calls: Gets every call that is recorded, by its key.
    """
    count = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        flat, structure = pytree.tree_flatten((args, kwargs))
        tensors: list[torch.Tensor] = []
        sizes: list[Any] = []
        arguments = [_add_argument(_label(target), leaf, tensors, sizes) for leaf in flat]
        if not tensors:
            raise CaptureError(f"{_label(target)} is called without a tensor")
        key = len(_active_calls)
        call = OpaqueCall(target, observations[count % len(observations)], arguments, structure)
        calls[key] = _active_calls[key] = call
        count += 1
        results = iter(OPERATOR(tensors, sizes, key))

        def replace(leaf: Any) -> Any:
            return next(results) if isinstance(leaf, torch.Tensor) else leaf

        return pytree.tree_map(replace, call.observations[0].output)

    return forward


def _add_argument(label: str, leaf: Any, tensors: list[torch.Tensor], sizes: list[Any]) -> Any:
    """Add a flat argument to those of the operator; return its slot, or a literal as it is."""
    if isinstance(leaf, torch.Tensor):
        tensors.append(leaf)
        return _TensorSlot(len(tensors) - 1)
    if isinstance(leaf, torch.SymInt):
        sizes.append(leaf)
        return _SizeSlot(len(sizes) - 1)
    if isinstance(leaf, torch.SymBool):
        sizes.append(torch.sym_ite(leaf, 1, 0))  # type: ignore[no-untyped-call]
        return _FlagSlot(len(sizes) - 1)
    if isinstance(leaf, _LITERALS):
        return leaf
    raise CaptureError(f"{label} is called with a {type(leaf).__name__}, which no graph can hold")
