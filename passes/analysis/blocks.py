"""Find the repeated blocks of a trunk by the digests of their structure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from passes.analysis.cut_points import Frontiers, Position
from passes.analysis.loops import Loop
from passes.ir.module_walk import submodule
from passes.ir.observer import Fact
from passes.ir.program import Program
from passes.ir.structure_hash import digest, node_lines
from passes.ir.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Block:
    """Nodes between two legal cuts through a single tensor.

    Attributes:
        start: The cut where the block begins.
        stop: The cut where it ends.
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
    program: Program,
    frontiers: Frontiers,
    facts: Mapping[fx.Node, Fact],
    loop: Loop | None = None,
) -> list[Block]:
    """Divide a program at the boundaries of repeated modules through which one tensor passes.

    Args:
        program: The program.
        frontiers: Its legal cuts.
        facts: Observed facts by node.
        loop: The loop in time, whose steps are blocks of one signature, whatever their constants.

    Returns:
        The blocks between consecutive boundaries, in order; those that repeat have one signature.
        Nodes that only compute side values (`t = steps[3]`) are no block; they belong to the one
        that follows, and its signature leaves them out.
    """
    single = [p for p in frontiers.positions if len(p.state) == 1 and p.boundary]
    blocks = []
    first = {position.state: position for position in reversed(single)}
    steps = _steps(frontiers, loop)
    if loop is not None and steps:
        begin, end = loop.start, loop.positions[-1].index
        outside = [p for p in first.values() if not begin <= p.index <= end]
        first = {p.state: p for p in (*outside, *steps)}
    for start, stop in itertools.pairwise(sorted(first.values(), key=lambda p: p.index)):
        inside = frontiers.order[start.index : stop.index]
        if start in steps and stop in steps:
            signature = "step of the loop"
        else:
            nodes = [node for node in inside if node not in frontiers.recomputable]
            signature = _signature(program, nodes, facts)
        blocks.append(Block(start, stop, start.specs[0], stop.specs[0], signature))
    return blocks


def _steps(frontiers: Frontiers, loop: Loop | None) -> list[Position]:
    """Return the cuts around the steps of a loop through which one tensor passes."""
    if loop is None or len(loop.positions[0].state) != 1:
        return []
    before = [p for p in frontiers.positions if p.index == loop.start and len(p.state) == 1]
    return [*before, *loop.positions]


def _signature(program: Program, nodes: Sequence[fx.Node], facts: Mapping[fx.Node, Fact]) -> str:
    """Digest consecutive nodes; names of nodes and modules do not matter, types of values do."""
    number = {node: index for index, node in enumerate(nodes)}

    def describe_target(node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{submodule(program.module, str(node.target))!r} {facts[node].spec}"
        return f"{node.target} {facts[node].spec}"

    def describe_source(node: fx.Node) -> str:
        return f"%{number[node]}" if node in number else f"<{facts[node].spec}>"

    return digest(node_lines(nodes, describe_target, describe_source))
