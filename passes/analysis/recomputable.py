"""Find side values: values that are cheap to recompute from the inputs of the program.

A stage that reads such a value (an attention mask, a position embedding) recomputes it with its
recomputable subgraph, and the value need not cross a cut:

    a = embed(tokens)         subgraph of a: {a, b}, because b writes the memory of a
    b = a.mul_(scale)         subgraph of b: {a, b}
    m = dropout(b)            none: it draws random numbers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from passes.cost.flops import NodeCost
from passes.cost.node_facts import Fact

_Subgraph = frozenset[fx.Node]


def find_recomputable(
    order: Sequence[fx.Node],
    facts: Mapping[fx.Node, Fact],
    costs: Mapping[fx.Node, NodeCost],
    persistent: frozenset[int],
    max_share: float,
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Find every value that can be recomputed from the inputs, and the nodes that this takes.

    A value may be in memory that is written in place (an embedding scaled by `mul_`, a mask filled
    by `fill_`): its subgraph then contains every write, and it counts as a side value if all of
    them are recomputable.

    Args:
        order: The compute nodes in topological order.
        facts: Observed facts by node.
        costs: Costs by node.
        persistent: Memory that outlives a run; values written there cannot be recomputed.
        max_share: Largest share of all FLOPs in one subgraph.

    Returns:
        For each such value its subgraph, itself included, in order.
    """
    limit = max_share * sum(cost.flops for cost in costs.values())
    number = {node: index for index, node in enumerate(order)}
    last_write = {s: index for index, node in enumerate(order) for s in facts[node].writes}
    final: dict[fx.Node, _Subgraph] = {}
    unfinished: dict[fx.Node, _Subgraph] = {}  # values in memory with writes still to come
    writers: dict[int, _Subgraph] = {}  # by memory: the subgraph of all writes so far
    tainted = set(persistent & last_write.keys())  # memory with a write that is not recomputable
    for index, node in enumerate(order):
        result_memory = facts[node].storages | facts[node].writes
        memory = result_memory.union(*(facts[n].storages for n in node.all_input_nodes))
        written = memory & last_write.keys()
        sources = [n for n in node.all_input_nodes if n in number]
        parts = [final.get(source) or unfinished.get(source) for source in sources]
        parts += [writers[storage] for storage in written if storage in writers]
        recomputable = [part for part in parts if part is not None]
        subgraph = _Subgraph((node,)).union(*recomputable)
        pure = not facts[node].random and not written & tainted
        if (
            len(recomputable) < len(parts)
            or not pure
            or sum(costs[member].flops for member in subgraph) > limit
        ):
            tainted |= facts[node].writes
            continue
        writers.update(dict.fromkeys(facts[node].writes, subgraph))
        if all(last_write[storage] <= index for storage in written):
            final[node] = subgraph
        elif result_memory & written:
            unfinished[node] = subgraph
    # A later reader of an unfinished value sees all writes: they become part of its subgraph.
    for node, subgraph in unfinished.items():
        memory = facts[node].storages & last_write.keys()
        if not memory & tainted:
            final[node] = subgraph.union(*(writers[storage] for storage in memory))
    values = sorted(final, key=number.__getitem__)
    return {node: tuple(sorted(final[node], key=number.__getitem__)) for node in values}
