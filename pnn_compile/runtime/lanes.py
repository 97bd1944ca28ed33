"""Which pieces of a parareal network run beside each other in one process: its lanes.

Every stage has a lane for its guess and its fine network; lane 0 also carries the sweep and the
head. In a collapsed sweep, whose maps wait for nothing but fine networks, each map runs on the lane
of its stage. A lane runs its calls in order; where one reads what another lane made, it waits.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from passes.plan.schema import Plan

__all__ = ["Lanes", "lanes"]


@dataclass(frozen=True)
class Lanes:
    """The lanes of a parareal network.

    Attributes:
        count: Number of lanes, one a stage.
        lane: By node of the graph; what belongs to no stage is on lane 0.
        waits: By node, the nodes of other lanes that it reads; inputs of the network are there from
            the start.
    """

    count: int
    lane: Mapping[fx.Node, int]
    waits: Mapping[fx.Node, tuple[fx.Node, ...]]

    @property
    def awaited(self) -> frozenset[fx.Node]:
        """The nodes that another lane reads."""
        return frozenset(node for nodes in self.waits.values() for node in nodes)


def lanes(graph: fx.Graph, plan: Plan) -> Lanes:
    """Give every node of the graph that `passes.transform.assemble` made of a plan its lane."""
    side_by_side = ("fine_", "preprocess_", *(["coarse_"] if plan.sweep == "collapsed" else []))
    lane: dict[fx.Node, int] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target.startswith(side_by_side):
            lane[node] = int(target.rpartition("_")[2])
        elif node.target is operator.getitem:  # takes no time
            lane[node] = lane[node.all_input_nodes[0]]
        else:
            lane[node] = 0
    for node in graph.nodes:
        if node.target is operator.sub:  # a residual goes where its correction runs
            (lane[node],) = {lane[user] for user in node.users}
    waits = {
        node: tuple(
            source
            for source in node.all_input_nodes
            if source.op != "placeholder" and lane[source] != lane[node]
        )
        for node in graph.nodes
        if node.op != "output"
    }
    return Lanes(len(plan.stages), lane, waits)
