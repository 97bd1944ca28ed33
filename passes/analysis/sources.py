"""Find the values that guesses are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from passes.analysis.cut_points import _FLOATS, Frontiers
from passes.analysis.dependence import input_leaves
from passes.cost.node_facts import Fact
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec

__all__ = ["Source", "preprocessing_sources"]


@dataclass(frozen=True)
class Source:
    """A value that preprocessing operators read.

    Attributes:
        node: A floating-point input, or a learned value that follows from inputs at once (an
            embedding).
        spec: Its type.
    """

    node: fx.Node
    spec: TensorSpec


def preprocessing_sources(
    program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
) -> list[Source]:
    """Find what the guesses of the interfaces are made from.

    Every floating-point input that follows the batch; for other inputs (token ids) the first
    learned value that the trunk reads, if recomputing it in every stage is cheap.
    """
    sources: list[Source] = []
    for leaf in input_leaves(program, facts):
        spec = facts[leaf].spec
        if spec is None or spec.batch_axis is None:
            continue
        if spec.dtype in _FLOATS:
            sources.append(Source(leaf, spec))
        else:
            sources += _learned(leaf, program, frontiers, facts)
    return list({source.node: source for source in sources}.values())


def _learned(
    leaf: fx.Node, program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
) -> list[Source]:
    found: list[Source] = []
    for node, cone in frontiers.cones.items():
        spec = facts[node].spec
        if spec is None or spec.batch_axis is None or spec.dtype not in _FLOATS:
            continue
        learned = any(_looks_up(leaf, member, frontiers) for member in cone)
        leads_on = any(user not in frontiers.cones for user in node.users)
        known = any(source.node in cone for source in found)
        if learned and leads_on and not known:
            found.append(Source(node, spec))
    return found


def _looks_up(leaf: fx.Node, member: fx.Node, frontiers: Frontiers) -> bool:
    """Whether a node reads parameters and the values of a leaf, as an embedding does.

    A table of positions that only meets a mask of the leaf says nothing of what the leaf holds.
    """
    if member.op != "call_module" and all(n.op != "get_attr" for n in member.all_input_nodes):
        return False
    return any(leaf in each.all_input_nodes for each in frontiers.cones.get(member, (member,)))
