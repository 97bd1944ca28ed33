"""Side values: cheap values that can be recomputed from the inputs, and the nodes that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from passes.cost.flops import Cost
from passes.cost.node_facts import Fact

__all__ = ["find_cones"]

_Cone = frozenset[fx.Node]


def find_cones(
    order: Sequence[fx.Node],
    facts: Mapping[fx.Node, Fact],
    costs: Mapping[fx.Node, Cost],
    kept: frozenset[int],
    share: float,
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Find every value that depends on the inputs alone, with the nodes to recompute it.

    A value may live in memory that is written in place (an embedding scaled by `mul_`, a mask
    filled by `fill_`) once the last write is done: its cone then holds every one of the writes.

    Args:
        order: The compute nodes in topological order.
        facts: What was observed of every node.
        costs: What every node costs.
        kept: Memory that outlives the run; what is written there cannot be recomputed.
        share: Largest share of all FLOPs that one cone may take.

    Returns:
        For each such value its cone, itself included, in order.
    """
    limit = share * sum(cost.flops for cost in costs.values())
    number = {node: index for index, node in enumerate(order)}
    last_write = {s: index for index, node in enumerate(order) for s in facts[node].writes}
    settled: dict[fx.Node, _Cone] = {}
    unsettled: dict[fx.Node, _Cone] = {}  # in memory that is still to be written
    writers: dict[int, _Cone] = {}
    spoilt = set(kept & last_write.keys())
    for index, node in enumerate(order):
        own = facts[node].storages | facts[node].writes
        memory = own.union(*(facts[n].storages for n in node.all_input_nodes))
        written = memory & last_write.keys()
        parts = [_part(n, settled, unsettled) for n in node.all_input_nodes if n in number]
        parts += [writers[storage] for storage in written if storage in writers]
        known = [part for part in parts if part is not None]
        cone = _Cone((node,)).union(*known)
        sound = len(known) == len(parts) and not facts[node].random and not written & spoilt
        if not sound or sum(costs[member].flops for member in cone) > limit:
            spoilt |= facts[node].writes
            continue
        writers.update(dict.fromkeys(facts[node].writes, cone))
        if all(last_write[storage] <= index for storage in written):
            settled[node] = cone
        elif own & written:
            unsettled[node] = cone
    for node, cone in unsettled.items():  # who reads it later sees what was written
        memory = facts[node].storages & last_write.keys()
        if not memory & spoilt:
            settled[node] = cone.union(*(writers[storage] for storage in memory))
    found = sorted(settled, key=number.__getitem__)
    return {node: tuple(sorted(settled[node], key=number.__getitem__)) for node in found}


def _part(
    source: fx.Node, settled: Mapping[fx.Node, _Cone], unsettled: Mapping[fx.Node, _Cone]
) -> _Cone | None:
    return settled.get(source) or unsettled.get(source)
