"""Second rung of the capture ladder: torch.export, with the torch.nn modules restored."""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.capture.fx_trace import Entry, strip
from passes.capture.refold import CALL_KEY, outline
from passes.capture.sealed_modules import OPERATOR, Seals, seal
from passes.errors import CaptureError
from passes.ir.example_inputs import Arguments, Field, placeholders
from passes.ir.isolation import exclusive
from passes.ir.program import Provenance, is_user_code, resolve, set_provenance

__all__ = ["export"]

_log = logging.getLogger(__name__)

_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_guards_fn")
"""Operators that only assert what held at the example inputs; they read and change nothing."""

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_REGIONS: Mapping[Any, int] = {torch.ops.higher_order.wrap_with_set_grad_enabled: 1, _AUTOCAST: 4}
"""Calls of a nested graph, and how many arguments stand before it."""


def export(
    model: nn.Module,
    arguments: Arguments,
    *,
    dynamic_batch: bool,
    whole: Collection[type[nn.Module]] = (),
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Export a model in the mode that it is in and fold operators back into module calls.

    Args:
        model: The model.
        arguments: Its example inputs.
        dynamic_batch: Whether to leave the batch size free.
        whole: Classes of modules that stay calls, and are not looked into.

    Returns:
        The graph, with targets relative to the model, and the tensors that it holds as constants.

    Raises:
        Exception: Whatever torch.export raises.
    """
    entry = Entry(model, arguments)
    dynamic = torch.export.Dim.AUTO if dynamic_batch else None
    if dynamic_batch and arguments.batch == 1:
        arguments = arguments.varied(grow=True)  # torch.export never keeps a size of 1 free
    shapes = tuple(
        {0: dynamic} if leaf.value.dim() and leaf.value.shape[0] == arguments.batch else None
        for leaf in arguments.leaves
    )
    with exclusive(), _quiet(), seal(model, arguments, whole) as seals:
        exported = torch.export.export(
            entry, tuple(arguments.tensors()), dynamic_shapes=(shapes,), strict=False
        )
        module = exported.module(check_guards=False)
    spec = exported.call_spec.out_spec
    if spec is None:
        raise CaptureError("torch.export returned no graph")
    graph, constants = _convert(_Copier(model, fx.Graph(), seals), module, arguments, spec)
    outline(model, graph)
    graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    return graph, constants


def _convert(
    copier: _Copier, module: fx.GraphModule, arguments: Arguments, spec: pytree.TreeSpec
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Copy the exported graph, with the model's own arguments and output structure."""
    graph = copier.graph
    mapping: dict[fx.Node, Any] = {}
    old = [node for node in module.graph.nodes if node.op == "placeholder"]
    new = {name: graph.placeholder(name) for name in placeholders(arguments)}
    for node, leaf in zip(old, arguments.leaves, strict=True):
        value = new[leaf.argument]
        for key in leaf.path:
            read = getattr if isinstance(key, Field) else operator.getitem
            value = graph.call_function(read, (value, key))
        mapping[node] = value
    copier.copy(module, mapping)
    leaves = pytree.tree_leaves(module.graph.output_node().args[0])
    result = pytree.tree_unflatten(leaves, spec)
    graph.output(fx.node.map_arg(_constructed(graph, result, mapping), lambda n: mapping.get(n, n)))
    return graph, copier.constants


def _constructed(graph: fx.Graph, value: Any, mapping: Mapping[fx.Node, Any]) -> Any:
    """The output with a call of the class in the place of every dataclass."""

    def inside(part: Any) -> Any:
        return _constructed(graph, part, mapping)

    if is_dataclass(value) and not isinstance(value, Mapping | type):
        parts = {field.name: inside(getattr(value, field.name)) for field in fields(value)}
        parts = fx.node.map_arg(parts, lambda n: mapping.get(n, n))
        return graph.call_function(type(value), (), parts)
    if type(value) in (list, tuple):
        return type(value)(map(inside, value))
    if isinstance(value, Mapping):
        return {key: inside(part) for key, part in value.items()}
    return value


class _Copier:
    """Copies exported graphs into one, those of nested regions in the place of their calls.

    Attributes:
        graph: The graph that grows.
        constants: The tensors that belong to the graph and not to the model, by name.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, seals: Seals) -> None:
        self.graph = graph
        self._seals = seals
        self._owned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._owned |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.constants: dict[str, torch.Tensor] = {}

    def copy(self, module: fx.GraphModule, mapping: dict[fx.Node, Any], prefix: str = "") -> None:
        """Copy the compute nodes of `module`; `mapping` has its placeholders, and gets the rest."""
        for node in module.graph.nodes:
            skipped = node.op in ("placeholder", "output")
            if skipped or any(check in str(node.target) for check in _CHECKS):
                continue
            if node.op == "get_attr" and isinstance(resolve(module, str(node.target)), nn.Module):
                mapping[node] = None  # the graph of a region, which its call copies
            elif node.target in _REGIONS:
                mapping[node] = self._region(module, node, mapping, prefix)
            elif node.target is OPERATOR:
                mapping[node] = self._seals.read(self.graph, node, mapping)
            elif (found := _element(node, mapping)) is not None:
                mapping[node] = found
            else:
                mapping[node] = self._node(module, node, mapping, prefix)

    def _node(
        self, module: fx.GraphModule, node: fx.Node, mapping: Mapping[fx.Node, Any], prefix: str
    ) -> fx.Node:
        copied = self.graph.node_copy(node, mapping.__getitem__)
        copied.meta.clear()
        if node.op == "get_attr":
            name = str(node.target)
            if strip(name) in self._owned:
                copied.target = strip(name)
            else:
                copied.target = f"{prefix}{name}"
                self.constants[f"{prefix}{name}"] = resolve(module, name)
        _note_origin(copied, node)
        return _alias(copied)

    def _region(
        self, module: fx.GraphModule, call: fx.Node, mapping: Mapping[fx.Node, Any], prefix: str
    ) -> tuple[Any, ...]:
        """Copy the graph that a region runs; give its results.

        What is computed without gradients is cut off behind the region instead of inside it.
        """
        given: Any = call.args
        settings = _REGIONS[call.target]
        options, (held, *values) = given[:settings], given[settings:]
        if call.target is _AUTOCAST and options[2]:
            raise CaptureError(
                f"forward turns on torch.autocast ({options[0]}, {options[1]}): turn it on around "
                "the call of the model instead"
            )
        name = str(held.target)
        inside: fx.GraphModule = resolve(module, name)
        starts = [node for node in inside.graph.nodes if node.op == "placeholder"]
        inner = dict(zip(starts, (mapping[value] for value in values), strict=True))
        self.copy(inside, inner, f"{prefix}{name}_")
        ends: Any = inside.graph.output_node().args[0]
        results = [inner[node] for node in ends]
        if call.target is _AUTOCAST or options[0]:
            return tuple(results)
        return tuple(self._cut_off(result, call) for result in results)

    def _cut_off(self, value: Any, call: fx.Node) -> Any:
        if not isinstance(value, fx.Node):
            return value
        detached = self.graph.call_function(torch.ops.aten.detach.default, (value,))
        _note_origin(detached, call)
        return detached


def _element(node: fx.Node, mapping: Mapping[fx.Node, Any]) -> Any:
    """The result of a region, or of a whole module, that a node takes, else None."""
    if node.target is not operator.getitem:
        return None
    source, index = node.args[0], cast("int", node.args[1])
    results = mapping[source] if isinstance(source, fx.Node) else None
    return results[index] if isinstance(results, tuple) else None


def _alias(node: fx.Node) -> fx.Node:
    """The buffer that a node writes in place and returns, else the node itself.

    Calls of one layer that write one buffer would otherwise hang together by what they return.
    """
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node) or written.op != "get_attr":
        return node
    target = node.target
    in_place = isinstance(target, torch._ops.OpOverload) and target._schema.name.endswith("_")
    return written if in_place else node


def _note_origin(copied: fx.Node, node: fx.Node) -> None:
    stack = node.meta.get("nn_module_stack", {})
    entries = [(key, path) for key, (path, _) in stack.items() if path.startswith("model")]
    path = ""
    if entries:
        key, path = entries[-1]
        copied.meta[CALL_KEY] = key
    set_provenance(copied, Provenance(strip(path), _source(node.stack_trace)))


def _source(trace: str | None) -> str:
    """Innermost `file:line` of a stack trace that is in the user's code."""
    for line in reversed((trace or "").splitlines()):
        text = line.strip()
        filename, _, rest = text.removeprefix('File "').partition('", line ')
        if text.startswith('File "') and is_user_code(filename):
            return f"{filename}:{rest.split(',')[0]}"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says of errors that end in an exception anyway, and of its own layers."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()) as said:
        # Recurrent layers put their own list of weights together again in forward; it is the same.
        warnings.filterwarnings("ignore", r"The tensor attributes? self\.([\w.]+\.)?_flat_weights")
        try:
            yield
        finally:
            logger.setLevel(level)
            _log.debug("torch.export: %s", said.getvalue())
