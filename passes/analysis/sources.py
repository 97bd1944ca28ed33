"""Find the values that preprocessing operators read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from passes.analysis.cut_points import FLOAT_DTYPES, Frontiers
from passes.analysis.dependence import input_leaves
from passes.cost.node_facts import Fact
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec


@dataclass(frozen=True)
class PreprocessingSource:
    """A value that preprocessing operators read.

    Attributes:
        node: A floating-point input, or a learned value computed directly from inputs (an
            embedding).
        spec: Its type.
    """

    node: fx.Node
    spec: TensorSpec


def preprocessing_sources(
    program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
) -> list[PreprocessingSource]:
    """Find the values that the preprocessing operators of all interfaces may read.

    These are the floating-point inputs with a batch axis and, in place of other inputs (token ids),
    the first learned values that the trunk reads, if recomputing them in every stage is cheap.

    Args:
        program: The program.
        frontiers: Its legal cuts.
        facts: Observed facts by node.
    """
    sources: list[PreprocessingSource] = []
    for leaf in input_leaves(program, facts):
        spec = facts[leaf].spec
        if spec is None or spec.batch_axis is None:
            continue
        if spec.dtype in FLOAT_DTYPES:
            sources.append(PreprocessingSource(leaf, spec))
        else:
            sources += _learned_values(leaf, program, frontiers, facts)
    return list({source.node: source for source in sources}.values())


def _learned_values(
    leaf: fx.Node, program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
) -> list[PreprocessingSource]:
    """Return the side values that look up parameters by an input, and that the trunk reads."""
    sources: list[PreprocessingSource] = []
    for node, subgraph in frontiers.recomputable.items():
        spec = facts[node].spec
        if spec is None or spec.batch_axis is None or spec.dtype not in FLOAT_DTYPES:
            continue
        learned = any(_looks_up(leaf, member, frontiers) for member in subgraph)
        feeds_trunk = any(user not in frontiers.recomputable for user in node.users)
        covered = any(source.node in subgraph for source in sources)
        if learned and feeds_trunk and not covered:
            sources.append(PreprocessingSource(node, spec))
    return sources


def _looks_up(leaf: fx.Node, member: fx.Node, frontiers: Frontiers) -> bool:
    """Whether a node reads parameters and the values of an input, as an embedding does.

    A table of positions that is only combined with a mask of the input does not count: it carries
    no information on the values of the input.
    """
    if member.op != "call_module" and all(n.op != "get_attr" for n in member.all_input_nodes):
        return False
    subgraph = frontiers.recomputable.get(member, (member,))
    return any(leaf in node.all_input_nodes for node in subgraph)
