r"""Digests of graph structure: operators, options and shapes, but no values of weights.

Two questions need such a digest: whether a plan was made for this program (`program_digest`, which
plans and artifacts store, so that its text must never change), and whether two runs of nodes
compute the same function, such as the blocks of a trunk (`node_lines`, in which numbers take the
place of node names):

>>> graph = fx.symbolic_trace(lambda x, y: (x + y).relu() + y).graph
>>> print(*graph_lines(graph), sep="\n")
placeholder  ((), {})
placeholder  ((), {})
call_function operator.add (('%0', '%1'), {})
call_method relu (('%2',), {})
call_function operator.add (('%3', '%1'), {})
output output (('%4',), {})
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import fx

from passes.ir.module_walk import submodule


def digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 digest of lines of text, in hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def program_digest(module: fx.GraphModule) -> str:
    """Digest the structure of a whole program, names of nodes and of weights included.

    Args:
        module: The graph. Modules that it calls enter by their `repr`.

    Returns:
        A digest of the nodes with their operators and options, and of the shapes and dtypes in the
        state dict.
    """
    lines = [f"{n.op} {_target(module, n)} {n.args} {n.kwargs}" for n in module.graph.nodes]
    shapes = [
        f"{key} {tuple(value.shape)} {value.dtype}"
        for key, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    ]
    return digest([*lines, *sorted(shapes)])


def _target(module: fx.GraphModule, node: fx.Node) -> str:
    name = node._pretty_print_target(node.target)
    if node.op == "call_module":
        return f"{name} {submodule(module, str(node.target))!r}"
    return name


def graph_lines(graph: fx.Graph) -> list[str]:
    """Describe a graph in one line per node that does not depend on the names of nodes.

    Part of the `repr` of modules that hold graphs, and so of stored digests.
    """
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}

    def target(node: fx.Node) -> str:
        return "" if node.op == "placeholder" else node._pretty_print_target(node.target)

    return node_lines(graph.nodes, target, number.__getitem__)


def node_lines(
    nodes: Iterable[fx.Node],
    describe_target: Callable[[fx.Node], str],
    describe_source: Callable[[fx.Node], str],
) -> list[str]:
    """Describe nodes in one line each: operation, target and arguments.

    Args:
        nodes: The nodes.
        describe_target: Returns the text for what a node calls.
        describe_source: Returns the text for a node that another one reads.
    """
    return [
        f"{node.op} {describe_target(node)} {arguments_text(node, describe_source)}"
        for node in nodes
    ]


def arguments_text(node: fx.Node, describe_source: Callable[[fx.Node], str]) -> str:
    """Return the arguments of a node as text, with a text for every node among them."""
    return repr(fx.node.map_arg((node.args, node.kwargs), describe_source))
