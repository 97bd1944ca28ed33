"""Analyze a program: costs, legal cuts, repeated blocks and sources, before any decision."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from torch import fx

from passes.analysis.blocks import Block, repeated_blocks
from passes.analysis.cut_points import Frontiers, Position, find_frontiers
from passes.analysis.dependence import Dependence, input_dependence
from passes.analysis.loops import Loop, find_loop
from passes.analysis.sources import PreprocessingSource, preprocessing_sources
from passes.cost.device_profile import DeviceProfile, roofline_costs
from passes.cost.flops import NodeCost, measure_costs
from passes.cost.measured import Measure, measure_seconds
from passes.errors import OptionError
from passes.ir.observer import Fact
from passes.ir.program import Program

CostSource = (
    Literal["flops", "measured", "measured-forward", "roofline", "roofline-forward"]
    | Callable[[fx.Node, int], float]
)
"""Source of the cost of nodes: a name, or a function of a node and its forward FLOPs."""

MEASURED = {"measured": True, "measured-forward": False}
"""Costs in measured seconds, and whether they include the backward pass."""

ROOFLINE = {"roofline": True, "roofline-forward": False}
"""Costs in seconds on a device profile, and whether they include the backward pass."""

_MIN_SHARE_OF_MEAN = 0.25
"""A block or matrix operator belongs to the trunk from this share of the mean FLOPs of its kind."""

_MAX_HEAD_SHARE = 0.25
"""Largest share of all FLOPs after the repeated blocks that still counts as a head."""


@dataclass(frozen=True)
class Analysis:
    """Facts, costs and legal cuts of a program.

    Attributes:
        program: The program.
        facts: Observed facts by node.
        costs: Costs by compute node.
        frontiers: The legal cuts.
        blocks: The blocks between consecutive single-tensor module boundaries.
        sources: The values that preprocessing operators may read.
        unit: Unit of `NodeCost.cost`.
        loop: The loop in time that takes most of the work; None if there is none.
        device: The device of the seconds, for costs of the roofline.
        measured: Cache of measured seconds of networks that are not part of the program, by their
            structure: several plans over one analysis use the same ones.
        others: Cache of the costs on other devices (`on`).
    """

    program: Program
    facts: Mapping[fx.Node, Fact]
    costs: Mapping[fx.Node, NodeCost]
    frontiers: Frontiers
    blocks: tuple[Block, ...]
    sources: tuple[PreprocessingSource, ...]
    unit: str
    loop: Loop | None = None
    device: DeviceProfile | None = None
    measured: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False)
    others: dict[DeviceProfile, Mapping[fx.Node, NodeCost]] = field(
        default_factory=dict, compare=False
    )

    @cached_property
    def total(self) -> float:
        """Cost of the original network."""
        return sum(cost.cost for cost in self.costs.values())

    @cached_property
    def dependence(self) -> Mapping[str, Dependence]:
        """Input tensors that every value may depend on, by the name of its node."""
        dependence = input_dependence(self.program, self.facts)
        return {node.name: leaves for node, leaves in dependence.items()}

    def may_read(self, value: str, source: str) -> bool:
        """Whether an approximation of `value` may read `source`.

        It may if `source` depends on no input that `value` does not depend on.
        """
        return self.dependence[source] <= self.dependence[value]

    @cached_property
    def flops(self) -> int:
        """Forward FLOPs of the original network."""
        return sum(cost.flops for cost in self.costs.values())

    def on(self, device: DeviceProfile | None) -> Mapping[fx.Node, NodeCost]:
        """Return the costs by node on another device, if costs are those of the roofline."""
        if device is None or self.device is None or device == self.device:
            return self.costs
        if device not in self.others:
            backward = bool(self.backward)
            self.others[device] = roofline_costs(self.costs, self.facts, device, backward=backward)
        return self.others[device]

    @cached_property
    def backward(self) -> float:
        """Part of the cost that belongs to the backward pass; 0 if costs have no such part."""
        return sum(cost.backward for cost in self.costs.values())

    @property
    def scale(self) -> float:
        """Cost per FLOP, to estimate the cost of networks that are not part of the program."""
        return self.total / self.flops if self.flops else 1.0

    @cached_property
    def _flops_before(self) -> list[int]:
        flops = (self.costs[node].flops for node in self.frontiers.order)
        return [*itertools.accumulate(flops, initial=0)]

    def flops_between(self, start: int, stop: int) -> int:
        """Return the forward FLOPs of the nodes of a range of the order."""
        return self._flops_before[stop] - self._flops_before[start]

    def block_flops(self, block: Block) -> int:
        """Return the forward FLOPs of a block."""
        return self.flops_between(block.start.index, block.stop.index)

    @cached_property
    def loop_obstacle(self) -> str:
        """Why the steps of the loop cannot be computed repeatedly; "" if they can."""
        if self.loop is None:
            return (
                "the model has no loop in time: no part of half its work repeats with the same "
                "weights"
            )
        for node in self.frontiers.order[self.loop.start : self.loop.positions[-1].index]:
            if self.facts[node].random:
                return f"a step draws random numbers ({node.name}): pass the noise as an input"
            if self.facts[node].writes and not node.users:
                return f"a step writes in place ({node.name})"
        return ""

    @cached_property
    def trunk_blocks(self) -> list[Block]:
        """Repeated blocks of significant cost; empty if they are not half of the network."""
        counts = Counter(block.signature for block in self.blocks)
        repeated = [block for block in self.blocks if counts[block.signature] > 1]
        if not repeated:
            return []
        flops = [self.block_flops(block) for block in repeated]
        limit = _MIN_SHARE_OF_MEAN * sum(flops) / len(flops)
        trunk = [block for block, size in zip(repeated, flops, strict=True) if size >= limit]
        trunk_flops = sum(size for size in flops if size >= limit)
        return trunk if 2 * trunk_flops >= self.flops else []

    def is_significant(self, block: Block) -> bool:
        """Return whether a block takes a quarter of the FLOPs of a mean block of the trunk."""
        return self.block_flops(block) >= _MIN_SHARE_OF_MEAN * self.trunk_flops

    @cached_property
    def trunk_flops(self) -> float:
        """Mean forward FLOPs of a block of the trunk; 0 if there is none."""
        sizes = [self.block_flops(block) for block in self.trunk_blocks]
        return sum(sizes) / len(sizes) if sizes else 0.0

    def down_sampling(self, position: Position) -> int:
        """Return the FLOPs of the trunk's blocks after a cut that change the shape of the state."""
        end = self.trunk_end
        return sum(
            self.block_flops(block)
            for block in self.blocks
            if block.start.index >= position.index and block.stop.index <= end
            if block.entering.shape != block.leaving.shape
        )

    @cached_property
    def trunk_end(self) -> int:
        """Return the number of nodes up to the end of the trunk; the others may be the head."""
        order = self.frontiers.order
        if self.trunk_blocks:
            end = self.trunk_blocks[-1].stop.index
            if self.flops_between(end, len(order)) <= _MAX_HEAD_SHARE * self.flops:
                return end
        flops = [self.costs[node].flops for node in order]
        # Matrix products and convolutions have twice the FLOPs in the backward pass.
        matrix_flops = [c.flops for n in order if (c := self.costs[n]).backward_flops > c.flops]
        if not matrix_flops:
            return len(order)
        limit = _MIN_SHARE_OF_MEAN * sum(matrix_flops) / len(matrix_flops)
        return max(index + 1 for index, size in enumerate(flops) if size >= limit)


def analyze(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    source: CostSource,
    device: DeviceProfile | None = None,
    measure: Measure = measure_seconds,
) -> Analysis:
    """Find the costs of all nodes, the legal cuts, the repeated blocks and the sources.

    Args:
        program: The program.
        facts: Observed facts by node.
        source: Source of the costs.
        device: The device of the seconds, for costs of the roofline.
        measure: Measures the seconds of segments, for measured costs.

    Raises:
        OptionError: Costs of the roofline need a device, or a callable returned a negative or
            non-finite number.
    """
    costs = measure_costs(program, facts, source if callable(source) else None)
    frontiers = find_frontiers(program, facts, costs)
    unit = "FLOPs"
    if callable(source):
        unit = "cost"
    elif source in MEASURED:
        unit = "seconds"
        costs = _measured_costs(program, frontiers, costs, measure, backward=MEASURED[source])
    elif source in ROOFLINE:
        if device is None:
            raise OptionError(
                f"cost={source!r} needs a device profile: devices=pnn.load_profile('h100'), or a "
                "file that `pnn-compile profile -o FILE` writes"
            )
        unit = "seconds"
        costs = roofline_costs(costs, facts, device, backward=ROOFLINE[source])
    loop = find_loop(program, frontiers, facts, costs)
    return Analysis(
        program=program,
        facts=facts,
        costs=costs,
        frontiers=frontiers,
        blocks=tuple(repeated_blocks(program, frontiers, facts, loop)),
        sources=tuple(
            preprocessing_sources(program, facts, frontiers.recomputable, frontiers.guessable)
        ),
        unit=unit,
        loop=loop,
        device=device if not callable(source) and source in ROOFLINE else None,
    )


def _measured_costs(
    program: Program,
    frontiers: Frontiers,
    costs: Mapping[fx.Node, NodeCost],
    measure: Measure,
    *,
    backward: bool,
) -> dict[fx.Node, NodeCost]:
    """Replace costs by measured seconds; nodes between two legal cuts share theirs by FLOPs."""
    order = frontiers.order
    ends = sorted({position.index for position in frontiers.positions} | {len(order)})
    starts = [0, *ends[:-1]]
    segments = [order[a:b] for a, b in zip(starts, ends, strict=True)]
    measured: dict[fx.Node, NodeCost] = {}
    times = measure(program, segments, backward=backward)
    for segment, seconds in zip(segments, times, strict=True):
        flops = sum(costs[node].flops for node in segment)
        for node in segment:
            share = costs[node].flops / flops if flops else 1 / len(segment)
            measured[node] = replace(
                costs[node],
                cost=seconds.total * share,
                backward=(seconds.backward + seconds.optimizer) * share,
                optimizer=seconds.optimizer * share,
            )
    return measured
