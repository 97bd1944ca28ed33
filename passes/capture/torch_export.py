"""Second rung of the capture ladder: torch.export, with the torch.nn modules restored.

The exported graph is copied operator by operator: nested graphs of regions (`torch.no_grad`,
autocast) go in the place of their calls, opaque modules become calls again, and `refold.outline`
folds the operators of torch.nn modules back into calls. Under autocast, the conversions that torch
makes by itself become nodes, so that the graph needs no context:

    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)         y = aten.linear(to(x, bfloat16), to(w, bfloat16), to(b, bfloat16))
"""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.capture.fx_trace import Entry, strip
from passes.capture.library_operators import Entering
from passes.capture.opaque_operator import OPERATOR, OpaqueCalls, replace_by_operators
from passes.capture.refold import CALL_KEY, outline
from passes.errors import CaptureError
from passes.ir.example_inputs import AttributeKey, ExampleInputs, placeholder_names
from passes.ir.isolation import DispatchMode, exclusive
from passes.ir.module_walk import named_tensors
from passes.ir.program import (
    Provenance,
    is_user_code,
    operator_name,
    provenance,
    resolve,
    set_provenance,
)

_log = logging.getLogger(__name__)

_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_guards_fn")
"""Operators that only assert what held at the example inputs; they read and change nothing."""

_CONVERSIONS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
SIZES_KEY = "batch sizes"
"""Key in the meta of an output node: batch sizes at which the model may take another branch."""

_REGIONS: Mapping[Any, int] = {torch.ops.higher_order.wrap_with_set_grad_enabled: 1, _AUTOCAST: 4}
"""Operators that call a nested graph, and the number of their arguments before it."""


def export(
    model: nn.Module,
    inputs: ExampleInputs,
    *,
    opaque: Collection[type[nn.Module]] = (),
    functions: bool = False,
    enter: bool = False,
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Export a model in its current mode and fold operators back into module calls.

    Args:
        model: The model.
        inputs: Its example inputs, whose dynamic dimensions stay free.
        opaque: Classes of modules that stay calls; their code is not run.
        functions: Whether custom autograd functions stay calls.
        enter: Whether the code of library operators is entered.

    Returns:
        The graph, with targets relative to the model, and its constant tensors by the targets of
        the nodes that read them.

    Raises:
        Exception: Whatever torch.export raises.
    """
    entry = Entry(model, inputs)
    if "batch" in inputs.dynamic and inputs.batch_size in (1, inputs.sequence):
        # torch.export specializes sizes of 1, and takes equal sizes for one.
        inputs = inputs.varied(grow=True)
    shapes = tuple(
        dict.fromkeys(inputs.free_axes(tensor), torch.export.Dim.AUTO) or None
        for tensor in inputs.tensors()
    )
    replaced = replace_by_operators(model, inputs, opaque, functions=functions)
    entering = Entering() if enter else nullcontext()
    with exclusive(), _quiet(), replaced as opaque_calls, entering:
        exported = torch.export.export(
            entry, tuple(inputs.tensors()), dynamic_shapes=(shapes,), strict=False
        )
        if _levels(exported):
            # Operators that enter a level of vmap for the whole process cannot be cut apart.
            exported = exported.run_decompositions({})
        if names := _levels(exported):
            raise CaptureError(f"forward calls a transform of torch.func ({names[0]})")
        module = exported.module(check_guards=False)
    spec = exported.call_spec.out_spec
    if spec is None:
        raise CaptureError("torch.export returned no graph")
    copier = _Copier(model, fx.Graph(), opaque_calls)
    graph, constants = _convert(copier, module, inputs, spec)
    outline(model, graph)
    graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    graph.output_node().meta[SIZES_KEY] = _sizes_outside(exported)
    _name_operators(graph)
    return graph, constants


def _name_operators(graph: fx.Graph) -> None:
    """Name operators by their module, as a trace names layers: `encoder_layer_3_add`, no `add_7`.

    Plans, drawings and messages show these names.
    """
    names = fx.graph._Namespace()
    for node in graph.nodes:
        name = node.name
        if node.op == "call_function":
            name = "_".join(filter(None, [*provenance(node).path.split("."), operator_name(node)]))
        node.name = names.create_name(name, node)
    graph._graph_namespace = names


def _sizes_outside(exported: torch.export.ExportedProgram) -> tuple[int, ...]:
    """Return the batch sizes next to those that the branches of an export hold for.

    One sample always is outside: torch.export takes no size of 1 for one that may change.
    """
    ranges = [r for size, r in exported.range_constraints.items() if str(size).startswith("s")]
    bounds = [str(bound) for r in ranges for bound in (r.lower - 1, r.upper + 1)]
    return tuple(sorted({int(bound) for bound in bounds if bound.isdigit()} - {0}))


def _levels(exported: torch.export.ExportedProgram) -> list[str]:
    """Return the operators that enter or leave transforms of torch.func: vmap, grad, jvp."""
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes]
    return [
        getattr(target, "__name__", "")
        for target in targets
        if getattr(target, "__module__", None) == "torch._functorch.predispatch"
    ]


def _convert(
    copier: _Copier, module: fx.GraphModule, inputs: ExampleInputs, spec: pytree.TreeSpec
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Copy the exported graph, with the arguments and the output structure of the model.

    Args:
        copier: Copies the nodes.
        module: The exported graph, which takes flat tensors.
        inputs: The example inputs.
        spec: Structure of the output.
    """
    graph = copier.graph
    mapping: dict[fx.Node, Any] = {}
    placeholders = module.graph.find_nodes(op="placeholder")
    arguments = {name: graph.placeholder(name) for name in placeholder_names(inputs)}
    for node, leaf in zip(placeholders, inputs.leaves, strict=True):
        value = arguments[leaf.argument]
        for key in leaf.path:
            read = getattr if isinstance(key, AttributeKey) else operator.getitem
            value = graph.call_function(read, (value, key))
        mapping[node] = value
    copier.copy(module, mapping)
    leaves = pytree.tree_leaves(module.graph.output_node().args[0])
    result = pytree.tree_unflatten(leaves, spec)
    graph.output(fx.node.map_arg(result, lambda n: mapping.get(n, n)))
    return graph, copier.constants


class _Copier:
    """Copy an exported graph, with nested graphs in the place of their calls.

    Attributes:
        graph: The copy.
        constants: Tensors that belong to the graph and not to the model, by name.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, opaque_calls: OpaqueCalls) -> None:
        self.graph = graph
        self._autocast: tuple[str, torch.dtype] | None = None
        self._without_gradients = False
        self._opaque_calls = opaque_calls
        self._model_tensors = {name for name, _ in named_tensors(model, repeats=True)}
        self.constants: dict[str, torch.Tensor] = {}

    def copy(self, module: fx.GraphModule, mapping: dict[fx.Node, Any], prefix: str = "") -> None:
        """Copy the nodes of a graph between its placeholders and its output.

        Args:
            module: The graph.
            mapping: Nodes of the copy by the nodes of `module`: it has the placeholders, and the
                copied nodes are added.
            prefix: Prefix for the names of constants of a nested graph.
        """
        for node in module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if any(check in str(node.target) for check in _CHECKS):
                continue
            if node.op == "get_attr" and isinstance(resolve(module, str(node.target)), nn.Module):
                mapping[node] = None  # a nested graph, which the call that runs it copies
            elif node.target in _REGIONS:
                mapping[node] = self._region(module, node, mapping, prefix)
            elif node.target is OPERATOR:
                mapping[node] = self._opaque_calls.insert(self.graph, node, mapping)
            elif (element := _element(node, mapping)) is not None:
                mapping[node] = element
            elif any(mapping[source] is None for source in node.all_input_nodes):
                raise CaptureError(
                    f"forward calls torch.{operator_name(node)} at {_source(node.stack_trace)}, "
                    "which holds graphs of its own: compute all of them, and let torch.where choose"
                )
            else:
                mapping[node] = self._copy_node(module, node, mapping, prefix)

    def _copy_node(
        self, module: fx.GraphModule, node: fx.Node, mapping: Mapping[fx.Node, Any], prefix: str
    ) -> fx.Node:
        casts = {} if self._autocast is None else _casts(node, *self._autocast)
        converted = {source: self._convert(mapping[source], casts[source]) for source in casts}
        detached = self._detached_operands(node, mapping) if self._without_gradients else {}
        copied = self.graph.node_copy(
            node, lambda n: converted.get(n) or detached.get(n) or mapping[n]
        )
        copied.meta.clear()
        if node.target is torch.ops.aten.view.default:
            # torch.export drops `contiguous()` where it saw no need; another attention kernel, or
            # the state that a copied block is given, may have other strides.
            copied.target = torch.ops.aten.reshape.default
        if node.op == "get_attr":
            name = str(node.target)
            if strip(name) in self._model_tensors:
                copied.target = strip(name)
            else:
                copied.target = f"{prefix}{name}"
                self.constants[f"{prefix}{name}"] = resolve(module, name)
        _set_origin(copied, node)
        if self._autocast is not None:
            copied.meta.pop(CALL_KEY, None)  # a module call would leave out the conversions
        for value in converted.values():
            set_provenance(value, provenance(copied))
        return _alias(copied, mapping[node.all_input_nodes[0]]) if detached else _alias(copied)

    def _detached_operands(
        self, node: fx.Node, mapping: Mapping[fx.Node, Any]
    ) -> dict[fx.Node, fx.Node]:
        """Detach the operands of a write: the memory that it changes takes part in no gradient."""
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable):
            return {}
        operands = [n for n in node.all_input_nodes if isinstance(mapping[n], fx.Node)]
        if any(not n.meta["val"].is_floating_point() for n in operands[:1]):
            return {}  # a counter
        return {n: self._detach(mapping[n], node) for n in operands}

    def _convert(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self.graph.call_function(torch.ops.aten.to.dtype, (value, dtype))

    def _region(
        self, module: fx.GraphModule, call: fx.Node, mapping: Mapping[fx.Node, Any], prefix: str
    ) -> tuple[Any, ...]:
        """Copy the graph that a region runs and return its results.

        Results of a region without gradients are detached after the region, not inside it.
        """
        arguments: Any = call.args
        num_options = _REGIONS[call.target]
        options, (graph, *values) = arguments[:num_options], arguments[num_options:]
        name = str(graph.target)
        nested: fx.GraphModule = resolve(module, name)
        placeholders = nested.graph.find_nodes(op="placeholder")
        inner = dict(zip(placeholders, (mapping[value] for value in values), strict=True))
        outside = self._autocast, self._without_gradients
        if call.target is _AUTOCAST:
            self._autocast = (options[0], options[1]) if options[2] else None
        else:
            self._without_gradients = not options[0]
        self.copy(nested, inner, f"{prefix}{name}_")
        self._autocast, self._without_gradients = outside
        outputs: Any = nested.graph.output_node().args[0]
        results = [inner[node] for node in outputs]
        if call.target is _AUTOCAST or options[0]:
            return tuple(results)
        return tuple(self._detach(result, call) for result in results)

    def _detach(self, value: Any, call: fx.Node) -> Any:
        if not isinstance(value, fx.Node):
            return value
        detached = self.graph.call_function(torch.ops.aten.detach.default, (value,))
        _set_origin(detached, call)
        return detached


class _CastObserver(DispatchMode):
    """Observe to which precision autocast converts the arguments of an operator."""

    def __init__(self, arguments: Mapping[int, fx.Node]) -> None:
        super().__init__()
        self.arguments = arguments
        self.casts: dict[fx.Node, torch.dtype] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self.arguments:
            self.casts.setdefault(self.arguments[id(args[0])], result.dtype)
        return result


def _casts(node: fx.Node, device: str, dtype: torch.dtype) -> dict[fx.Node, torch.dtype]:
    """Return to which precision autocast converts each argument of an operator that it converts.

    Args:
        node: The operator, in an exported graph.
        device: Type of the device of the region.
        dtype: Precision of the region.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _CONVERSIONS:
        return {}
    values = {source: source.meta["val"] for source in node.all_input_nodes}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    observer = _CastObserver({id(value): source for source, value in values.items()})
    with torch.autocast(device, dtype, cache_enabled=False), observer:
        node.target(*args, **kwargs)
    return observer.casts


def _element(node: fx.Node, mapping: Mapping[fx.Node, Any]) -> Any:
    """Return the result of a region or opaque module that a `getitem` selects, else None."""
    if node.target is not operator.getitem:
        return None
    source, index = node.args[0], cast("int", node.args[1])
    results = mapping[source] if isinstance(source, fx.Node) else None
    return results[index] if isinstance(results, tuple) else None


def _alias(node: fx.Node, written: Any = None) -> fx.Node:
    """Return the buffer that a node writes in place and returns, else the node itself.

    Several calls of one layer that write the same buffer would otherwise depend on each other.

    Args:
        node: The node.
        written: What it writes, if its operand is a view of that.
    """
    written = written or (node.args[0] if node.args else None)
    if not isinstance(written, fx.Node) or written.op != "get_attr":
        return node
    target = node.target
    in_place = isinstance(target, torch._ops.OpOverload) and target._schema.name.endswith("_")
    return written if in_place else node


def _set_origin(copied: fx.Node, node: fx.Node) -> None:
    """Record the module call and the line of the user's code that an exported node came from."""
    stack = node.meta.get("nn_module_stack", {})
    entries = [(key, path) for key, (path, _) in stack.items() if path.startswith("model")]
    path = ""
    if entries:
        key, path = entries[-1]
        copied.meta[CALL_KEY] = key
    set_provenance(copied, Provenance(strip(path), _source(node.stack_trace)))


def _source(trace: str | None) -> str:
    """Return the innermost `file:line` of a stack trace in the user's code, "" if none."""
    for line in reversed((trace or "").splitlines()):
        text = line.strip()
        filename, _, position = text.removeprefix('File "').partition('", line ')
        if text.startswith('File "') and is_user_code(filename):
            return f"{filename}:{position.split(',')[0]}"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence logs of errors that end in an exception anyway, and warnings about torch's layers."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()) as stderr:
        # Recurrent layers assign their list of weights again in forward; its contents are the same.
        warnings.filterwarnings("ignore", r"The tensor attributes? self\.([\w.]+\.)?_flat_weights")
        try:
            yield
        finally:
            logger.setLevel(level)
            _log.debug("torch.export: %s", stderr.getvalue())
