"""Find the blocks that a trunk repeats."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from passes.analysis.cut_points import Frontiers, Position
from passes.cost.node_facts import Fact
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec

__all__ = ["Block", "repeated_blocks"]


@dataclass(frozen=True)
class Block:
    """A run of nodes between two legal cuts through one tensor.

    Attributes:
        start: Index of the cut that it begins at.
        stop: Index of the cut that it ends at.
        entering: Type of the tensor that enters.
        leaving: Type of the tensor that leaves.
        signature: Digest of its operators, options and shapes; equal for isomorphic blocks.
    """

    start: Position
    stop: Position
    entering: TensorSpec
    leaving: TensorSpec
    signature: str


def repeated_blocks(
    program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
) -> list[Block]:
    """Find the blocks that the trunk repeats: equal neighbours between module boundaries.

    Returns:
        Every run between two neighbouring single-tensor module boundaries, in order.
    """
    single = [p for p in frontiers.positions if len(p.state) == 1 and p.boundary]
    blocks = []
    for start, stop in itertools.pairwise(single):
        nodes = frontiers.order[start.index : stop.index]
        blocks.append(
            Block(start, stop, start.specs[0], stop.specs[0], _signature(program, nodes, facts))
        )
    return blocks


def _signature(program: Program, nodes: Sequence[fx.Node], facts: Mapping[fx.Node, Fact]) -> str:
    """Digest of a run of nodes that does not depend on names."""
    number = {node: index for index, node in enumerate(nodes)}

    def reference(node: fx.Node) -> str:
        return f"%{number[node]}" if node in number else f"<{facts[node].spec}>"

    lines = []
    for node in nodes:
        if node.op == "call_module":
            operator = repr(program.module.get_submodule(str(node.target)))
        else:
            operator = f"{node.op} {node.target}"
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: reference(n))
        lines.append(f"{operator} {arguments} {facts[node].spec}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
