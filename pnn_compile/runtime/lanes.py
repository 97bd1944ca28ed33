"""Which pieces of a parareal network run beside each other in one process: its lanes.

Every stage has a lane for its guess and its fine network; lane 0 also carries the sweep and the
head. In a collapsed sweep, whose maps wait for nothing but fine networks, each map runs on the lane
of its stage. A lane runs its calls in order; where one reads what another lane made, it waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from passes.plan.schema import Plan
from passes.transform.assemble import step_of
from passes.transform.sweep import Role

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
    side_by_side = {Role.PREPROCESS, Role.FINE}
    if plan.sweep == "collapsed":  # a residual goes where its correction runs
        side_by_side |= {Role.RESIDUAL, Role.COARSE}
    lane: dict[fx.Node, int] = {}
    for node in graph.nodes:
        step = step_of(node)
        lane[node] = step.stage if step and step.role in side_by_side else 0
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
