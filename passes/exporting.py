"""Second rung of the capture ladder: torch.export, with the torch.nn modules restored."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.arguments import Arguments, placeholders
from passes.errors import CaptureError
from passes.program import Provenance, set_provenance
from passes.restore import CALL_KEY, outline
from passes.tracing import Entry, strip

__all__ = ["export"]

_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_guards_fn")
"""Operators that only assert what held at the example inputs; they read and change nothing."""


def export(
    model: nn.Module, arguments: Arguments, *, dynamic_batch: bool
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Export a model in the mode that it is in and fold operators back into module calls.

    Returns:
        The graph, with targets relative to the model, and the tensors that it holds as constants.

    Raises:
        Exception: Whatever torch.export raises.
    """
    entry = Entry(model, arguments)
    dynamic = torch.export.Dim.AUTO if dynamic_batch else None
    shapes = tuple(
        {0: dynamic} if leaf.value.dim() and leaf.value.shape[0] == arguments.batch else None
        for leaf in arguments.leaves
    )
    with _quiet():
        exported = torch.export.export(
            entry, tuple(arguments.tensors()), dynamic_shapes=(shapes,), strict=False
        )
        module = exported.module(check_guards=False)
    spec = exported.call_spec.out_spec
    if not isinstance(module, fx.GraphModule) or spec is None:
        raise CaptureError("torch.export returned no graph")
    graph, constants = _convert(module, arguments, spec)
    outline(model, graph)
    return graph, constants


def _convert(
    module: fx.GraphModule, arguments: Arguments, spec: pytree.TreeSpec
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Copy the exported graph, with the model's own arguments and output structure."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    old = [node for node in module.graph.nodes if node.op == "placeholder"]
    new = {name: graph.placeholder(name) for name in placeholders(arguments)}
    for node, leaf in zip(old, arguments.leaves, strict=True):
        value = new[leaf.argument]
        for key in leaf.path:
            value = graph.call_function(operator.getitem, (value, key))
        mapping[node] = value
    constants: dict[str, torch.Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            leaves = pytree.tree_leaves(node.args[0])
            result = pytree.tree_unflatten(leaves, spec)
            graph.output(fx.node.map_arg(result, lambda n: mapping[n]))
            continue
        if any(check in str(node.target) for check in _CHECKS):
            continue
        copied = mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        copied.meta.clear()
        if node.op == "get_attr":
            name = str(node.target)
            if name.startswith("model."):
                copied.target = strip(name)
            else:
                constants[name] = getattr(module, name)
        _note_origin(copied, node)
    graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    return graph, constants


def _note_origin(copied: fx.Node, node: fx.Node) -> None:
    stack = node.meta.get("nn_module_stack", {})
    entries = [(key, path) for key, (path, _) in stack.items() if path.startswith("model")]
    path = ""
    if entries:
        key, path = entries[-1]
        copied.meta[CALL_KEY] = key
    set_provenance(copied, Provenance(strip(path), _source(node.stack_trace)))


def _source(trace: str | None) -> str:
    """Innermost `file:line` of a stack trace that is not torch's own."""
    for line in reversed((trace or "").splitlines()):
        text = line.strip()
        if text.startswith('File "') and "/torch/" not in text:
            filename, _, rest = text.removeprefix('File "').partition('", line ')
            return f"{filename}:{rest.split(',')[0]}"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's own logging of errors that end in an exception anyway."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
