"""Which inputs every value of a program depends on, through memory that is written in place too.

A guess or a correction may read no input that the state it stands for does not depend on: a
prediction would move with the labels otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from passes.cost.node_facts import Fact
from passes.ir.program import Program

__all__ = ["input_dependence", "input_leaves"]


def input_leaves(program: Program, facts: Mapping[fx.Node, Fact]) -> list[fx.Node]:
    """Input tensors: placeholders, and elements of placeholders that hold several."""
    leaves, pending = [], list(program.inputs)
    while pending:
        node = pending.pop(0)
        if facts[node].spec is not None:
            leaves.append(node)
        else:
            pending += node.users
    return leaves


def input_dependence(
    program: Program, facts: Mapping[fx.Node, Fact]
) -> Mapping[fx.Node, frozenset[fx.Node]]:
    """Return, for every node, the input tensors that its value may depend on.

    Example: in `a = f(x); b = g(y); a.add_(b); c = h(a)` the value of `c` depends on x and y.
    """
    leaves = frozenset(input_leaves(program, facts))
    depends: dict[fx.Node, frozenset[fx.Node]] = {}
    written: dict[int, frozenset[fx.Node]] = {}  # by memory: what writes put into it so far
    for node in program.graph.nodes:
        own = frozenset({node}) if node in leaves else frozenset[fx.Node]()
        sources = [node, *node.all_input_nodes]
        memory = {m for n in sources if n in facts for m in facts[n].storages}
        own = own.union(*(depends[n] for n in node.all_input_nodes))
        own = own.union(*(written.get(m, frozenset()) for m in memory))
        depends[node] = own
        for m in facts[node].writes if node in facts else ():
            written[m] = written.get(m, frozenset()) | own
    return depends
