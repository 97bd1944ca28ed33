"""Find the inputs that every value of a program depends on, in-place writes included.

A preprocessing operator or coarse propagator may read no input that the state it approximates does
not depend on: otherwise a prediction could depend on the labels.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from passes.cost.node_facts import Fact
from passes.ir.program import Program


def input_leaves(program: Program, facts: Mapping[fx.Node, Fact]) -> list[fx.Node]:
    """Return the input tensors: placeholders, or elements of placeholders that hold several."""
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

    Example: in `a = f(x); b = g(y); a.add_(b); c = h(a)` the value of `c` depends on x and y,
    although `h` reads `a` and not the result of `add_`.

    Args:
        program: The program.
        facts: Observed facts by node.
    """
    leaves = frozenset(input_leaves(program, facts))
    depends: dict[fx.Node, frozenset[fx.Node]] = {}
    written: dict[int, frozenset[fx.Node]] = {}  # by memory: inputs that writes to it depend on
    for node in program.graph.nodes:
        inputs = frozenset({node}) if node in leaves else frozenset[fx.Node]()
        nodes = [node, *node.all_input_nodes]
        memory = {storage for n in nodes if n in facts for storage in facts[n].storages}
        inputs = inputs.union(*(depends[source] for source in node.all_input_nodes))
        inputs = inputs.union(*(written.get(storage, frozenset()) for storage in memory))
        depends[node] = inputs
        for storage in facts[node].writes if node in facts else ():
            written[storage] = written.get(storage, frozenset()) | inputs
    return depends
