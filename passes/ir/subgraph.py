"""Extract consecutive nodes of a program as a separate GraphModule.

Stages, copied blocks and heads are made this way. `side values` are cheap values that are
recomputed from the inputs instead of crossing a cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from passes.errors import PartitionError
from passes.ir.program import Program, graph_module


def nodes_between(program: Program, first: str, last: str) -> list[fx.Node]:
    """Return the compute nodes from `first` to `last`, both included.

    Args:
        program: The program.
        first: Name of the first node.
        last: Name of the last node.

    Raises:
        PartitionError: A name is not in the program, or `last` comes before `first`.
    """
    order = program.order
    names = [node.name for node in order]
    if first not in names or last not in names or names.index(first) > names.index(last):
        raise PartitionError(
            f"the plan does not fit the program {program.name}: no run of nodes from {first!r} "
            f"to {last!r}; compile again without the plan"
        )
    return order[names.index(first) : names.index(last) + 1]


def extract(
    program: Program,
    nodes: Sequence[fx.Node],
    entering: Sequence[str],
    leaving: Sequence[str] | None,
    *,
    inputs: Sequence[str],
    sides: Sequence[str],
    name: str,
) -> fx.GraphModule:
    """Copy consecutive nodes into a GraphModule that shares the modules of the program.

    Args:
        program: The program.
        nodes: The nodes to copy, in order.
        entering: Names of the values that become the first placeholders.
        leaving: Names of the values to return; None for the output of the program.
        inputs: Names of the program's placeholders that become the next placeholders.
        sides: Names of the side values to recompute first, with every node that they need, in
            order.
        name: Class name of the result.

    Returns:
        The module, called with the entering values and then the inputs. It returns one tensor, or a
        tuple if several values leave.

    Raises:
        PartitionError: A node reads a value that neither enters nor is computed inside, or a name
            is not in the program.
    """
    by_name = {node.name: node for node in program.graph.nodes}
    if unknown := [n for n in (*entering, *inputs, *sides, *(leaving or ())) if n not in by_name]:
        raise PartitionError(f"{name} names {unknown[0]!r}, which the program does not have")
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}

    def value(node: fx.Node) -> fx.Node:
        if node not in mapping and node.op == "get_attr":
            mapping[node] = graph.node_copy(node)
        if node not in mapping:
            raise PartitionError(f"{name} reads {node.name!r}, which does not reach it")
        return mapping[node]

    for placeholder in [*entering, *inputs]:
        mapping[by_name[placeholder]] = graph.placeholder(placeholder)
    for node in [by_name[side] for side in sides] + list(nodes):
        if node not in mapping:
            mapping[node] = graph.node_copy(node, value)
    if leaving is None:
        graph.output(fx.node.map_arg(program.output.args[0], value))
    else:
        results = tuple(value(by_name[result]) for result in leaving)
        graph.output(results[0] if len(results) == 1 else results)
    graph.lint()
    return graph_module(program.module, graph, name)
