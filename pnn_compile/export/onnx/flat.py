"""Pieces of a network as flat graphs: tensors in, tensors out, every node with its origin."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.ir.program import provenance
from passes.ir.run_step import output_leaves
from pnn_compile.export.onnx.observe import Spec, leaves

__all__ = ["CHILD", "Origin", "Piece", "flatten"]

CHILD = "network"
"""Name of a piece that is no graph, inside the flat graph that calls it."""


@dataclass(frozen=True)
class Origin:
    """Where a node came from: path of the module, and `file:line` of the user's code or ""."""

    path: str = ""
    source: str = ""


@dataclass(frozen=True, eq=False)
class Piece:
    """A guess, a fine stage, a correction or the head.

    Attributes:
        name: Its name in the parareal network, such as "fine_0".
        module: The flat graph: one placeholder per tensor, a tuple of tensors as output.
        specs: Types of its values, by node, as far as they are tensors.
        origins: Where its compute nodes came from.
        prefix: What the qualified names of its tensors start with in the ONNX file.
    """

    name: str
    module: fx.GraphModule
    specs: Mapping[fx.Node, Spec]
    origins: Mapping[fx.Node, Origin]
    prefix: str

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders."""
        return self.module.graph.find_nodes(op="placeholder")

    @property
    def nodes(self) -> list[fx.Node]:
        """The compute nodes, in order."""
        skipped = ("placeholder", "get_attr", "output")
        return [node for node in self.module.graph.nodes if node.op not in skipped]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """What it gives."""
        given: Any = self.module.graph.output_node().args[0]
        return tuple(given)

    def key(self, name: str) -> str:
        """Name in the ONNX file of a tensor of the flat graph."""
        return self.prefix + name.removeprefix(f"{CHILD}.")


def flatten(
    name: str, module: nn.Module, arguments: tuple[Any, ...], values: Mapping[str, Any], count: int
) -> Piece:
    """Write a piece as a flat graph over the same modules.

    Args:
        name: Its name in the parareal network.
        module: The piece.
        arguments: What it is called with, tensors replaced by their specs.
        values: What its nodes give, where it is a graph.
        count: Number of tensors that it gives.
    """
    graph = fx.Graph()
    specs: dict[fx.Node, Spec] = {}
    given = [_placeholders(graph, argument, specs) for argument in arguments]
    if isinstance(module, fx.GraphModule):
        output = _copy(module, graph, given, values, specs)
        root: nn.Module = module
    else:
        output = graph.call_module(CHILD, tuple(given))
        root = nn.Module()
        root.add_module(CHILD, module)
    found: Any = pytree.tree_leaves(output)
    if root is not module:
        found = [output] if count == 1 else _items(graph, output, count)
    elif len(found) != count or not all(node in specs for node in found):
        whole = graph.call_function(_tensor_leaves, (output,))
        found = _items(graph, whole, count)
    graph.output(tuple(found))
    flat = fx.GraphModule(root, graph, class_name=name)
    fine = name.startswith(("fine_", "head"))
    origins = {
        node: _origin(node) if fine else Origin("" if node.target == CHILD else str(node.target))
        for node in flat.graph.nodes
    }
    renewed = dict(zip(graph.nodes, flat.graph.nodes, strict=True))
    kept = {renewed[node]: spec for node, spec in specs.items()}
    return Piece(name, flat, kept, origins, "" if fine else f"{name}.")


def _origin(node: fx.Node) -> Origin:
    """Provenance of a node of the program; files are named from the working directory."""
    found = provenance(node)
    file, colon, line = found.source.rpartition(":")
    path = Path(file)
    if path.is_absolute():
        inside = path.is_relative_to(Path.cwd())
        file = str(path.relative_to(Path.cwd())) if inside else path.name
    return Origin(found.path, f"{file}{colon}{line}")


def _placeholders(graph: fx.Graph, argument: Any, specs: dict[fx.Node, Spec]) -> Any:
    """Make one placeholder per tensor; give the argument with these in the tensors' places."""
    structure = pytree.tree_structure(argument, is_leaf=lambda leaf: isinstance(leaf, Spec))
    nodes = []
    for leaf in leaves(argument):
        if isinstance(leaf, Spec):
            node = graph.placeholder(f"given_{len(specs)}")
            specs[node] = leaf
            nodes.append(node)
        else:
            nodes.append(leaf)
    return pytree.tree_unflatten(nodes, structure)


def _copy(
    module: fx.GraphModule,
    graph: fx.Graph,
    given: list[Any],
    values: Mapping[str, Any],
    specs: dict[fx.Node, Spec],
) -> Any:
    """Copy the nodes of a piece behind the placeholders; give its output over the new nodes."""
    mapping: dict[fx.Node, Any] = {}
    rest = iter(given)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            mapping[node] = next(rest)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: mapping[n])
        else:
            copied = graph.node_copy(node, lambda n: mapping[n])
            mapping[node] = copied
            if isinstance(values[node.name], Spec):
                specs[copied] = values[node.name]
    raise AssertionError("a graph ends with its output")


def _tensor_leaves(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in output_leaves(output) if isinstance(leaf, torch.Tensor)]


def _items(graph: fx.Graph, whole: fx.Node, count: int) -> list[fx.Node]:
    return [graph.call_function(operator.getitem, (whole, index)) for index in range(count)]
