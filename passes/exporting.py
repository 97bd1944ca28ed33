"""Second and third rung of the capture ladder: torch.export, with the torch.nn modules restored."""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.arguments import Arguments, placeholders
from passes.errors import CaptureError
from passes.program import Provenance, is_user_code, resolve, set_provenance
from passes.restore import CALL_KEY, outline
from passes.tracing import Entry, strip

__all__ = ["export"]

_log = logging.getLogger(__name__)

_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_guards_fn")
"""Operators that only assert what held at the example inputs; they read and change nothing."""


def export(
    model: nn.Module, arguments: Arguments, *, dynamic_batch: bool, strict: bool = False
) -> tuple[fx.Graph, Mapping[str, torch.Tensor]]:
    """Export a model in the mode that it is in and fold operators back into module calls.

    Args:
        model: The model.
        arguments: Its example inputs.
        dynamic_batch: Whether to leave the batch size free.
        strict: Whether to read the model's bytecode (TorchDynamo) instead of running its Python.

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
    with _quiet():
        exported = torch.export.export(
            entry, tuple(arguments.tensors()), dynamic_shapes=(shapes,), strict=strict
        )
        module = exported.module(check_guards=False)
    spec = exported.call_spec.out_spec
    if spec is None:
        raise CaptureError("torch.export returned no graph")
    graph, constants = _convert(model, module, arguments, spec)
    outline(model, graph)
    graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    return graph, constants


def _convert(
    model: nn.Module, module: fx.GraphModule, arguments: Arguments, spec: pytree.TreeSpec
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
    owned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    owned |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
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
        copied = graph.node_copy(node, lambda n: mapping[n])
        copied.meta.clear()
        mapping[node] = _alias(copied)
        if node.op == "get_attr":
            name = str(node.target)
            if strip(name) in owned:
                copied.target = strip(name)
            else:
                constants[name] = resolve(module, name)
        _note_origin(copied, node)
    return graph, constants


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
