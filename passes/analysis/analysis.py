"""Everything known of a program before anything is decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from torch import fx

from passes.analysis.blocks import Block, repeated_blocks
from passes.analysis.cut_points import Frontiers, analyze
from passes.analysis.dependence import input_dependence
from passes.analysis.sources import Source, preprocessing_sources
from passes.cost.device_profile import DeviceProfile
from passes.cost.flops import Cost, measure_costs
from passes.cost.measured import Measure, measure_seconds
from passes.cost.node_facts import Fact
from passes.cost.roofline import roofline
from passes.errors import OptionError
from passes.ir.program import Program

CostSource = (
    Literal["flops", "measured", "measured-forward", "roofline", "roofline-forward"]
    | Callable[[fx.Node, int], float]
)
"""How nodes are weighed; a callable from a node and its forward FLOPs."""
MEASURED = {"measured": True, "measured-forward": False}
"""Costs in measured seconds, and whether backward is measured too."""
ROOFLINE = {"roofline": True, "roofline-forward": False}
"""Costs in seconds of a device profile, and whether the backward pass counts too."""

_SIGNIFICANT = 0.25
"""A block or operator belongs to the trunk if it costs this share of the mean of its kind."""


_HEAD_SHARE = 0.25
"""Largest share of all FLOPs behind the repeated blocks that still counts as a head."""


@dataclass(frozen=True)
class Analysis:
    """Facts, costs and legal cuts of a program.

    Attributes:
        program: The program.
        facts: What was observed of every node.
        costs: What every compute node costs.
        frontiers: The legal cuts.
        blocks: The runs between neighbouring single-tensor module boundaries.
        sources: What the guesses are made from.
        unit: Unit of `Cost.weight`.
        device: Whose seconds these are, of the roofline.
        measured: What networks outside of the program were measured to take, by what they are made
            of: several plans over one analysis use the same ones again and again.
        others: What the nodes cost on other devices, once `on` was asked.
    """

    program: Program
    facts: Mapping[fx.Node, Fact]
    costs: Mapping[fx.Node, Cost]
    frontiers: Frontiers
    blocks: tuple[Block, ...]
    sources: tuple[Source, ...]
    unit: str
    device: DeviceProfile | None = None
    measured: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False)
    others: dict[DeviceProfile, Mapping[fx.Node, Cost]] = field(default_factory=dict, compare=False)

    @cached_property
    def total(self) -> float:
        """Cost of the original network."""
        return sum(cost.weight for cost in self.costs.values())

    @cached_property
    def dependence(self) -> Mapping[str, frozenset[fx.Node]]:
        """The input tensors that every value may depend on, by the name of its node."""
        found = input_dependence(self.program, self.facts)
        return {node.name: leaves for node, leaves in found.items()}

    def may_read(self, value: str, source: str) -> bool:
        """Whether what stands for `value` may read `source`: no input that `value` does not."""
        return self.dependence[source] <= self.dependence[value]

    @cached_property
    def flops(self) -> int:
        """Forward FLOPs of the original network."""
        return sum(cost.flops for cost in self.costs.values())

    def on(self, device: DeviceProfile | None) -> Mapping[fx.Node, Cost]:
        """What every node costs on another device, where costs are those of the roofline."""
        if device is None or self.device is None or device == self.device:
            return self.costs
        if device not in self.others:
            back = bool(self.backward)
            self.others[device] = roofline(self.costs, self.facts, device, backward=back)
        return self.others[device]

    def total_on(self, device: DeviceProfile | None) -> float:
        """Cost of the original network on a device."""
        return sum(cost.weight for cost in self.on(device).values())

    @cached_property
    def backward(self) -> float:
        """The part of the cost that falls on the way back, 0 where the ways are one phase."""
        return sum(cost.backward for cost in self.costs.values())

    @property
    def back_share(self) -> float:
        """The way back's share of the cost."""
        return self.backward / self.total if self.total else 0.0

    @property
    def scale(self) -> float:
        """Cost per FLOP, to price networks that are not in the program."""
        return self.total / self.flops if self.flops else 1.0

    def block_flops(self, block: Block) -> int:
        """Forward FLOPs of a block."""
        nodes = self.frontiers.order[block.start.index : block.stop.index]
        return sum(self.costs[node].flops for node in nodes)

    @cached_property
    def trunk_blocks(self) -> list[Block]:
        """The repeated blocks that carry weight; empty if they are not most of the network."""
        counts = Counter(block.signature for block in self.blocks)
        repeated = [b for b in self.blocks if counts[b.signature] > 1]
        if not repeated:
            return []
        sizes = {id(block): self.block_flops(block) for block in repeated}
        mean = sum(sizes.values()) / len(sizes)
        heavy = [b for b in repeated if sizes[id(b)] >= _SIGNIFICANT * mean]
        covered = sum(sizes[id(block)] for block in heavy)
        return heavy if 2 * covered >= self.flops else []

    @cached_property
    def trunk_flops(self) -> float:
        """Forward FLOPs of a block of the trunk, the mean; 0 if there is none."""
        sizes = [self.block_flops(block) for block in self.trunk_blocks]
        return sum(sizes) / len(sizes) if sizes else 0.0

    def trunk_end(self) -> int:
        """Number of nodes up to the end of the trunk; what follows is fit for a head."""
        order = self.frontiers.order
        if self.trunk_blocks:
            end = self.trunk_blocks[-1].stop.index
            behind = sum(self.costs[node].flops for node in order[end:])
            if behind <= _HEAD_SHARE * self.flops:
                return end
        flops = [self.costs[node].flops for node in order]
        matrix = [f for n, f in zip(order, flops, strict=True) if _is_matrix(self.costs[n])]
        if not matrix:
            return len(order)
        limit = _SIGNIFICANT * sum(matrix) / len(matrix)
        return max(index + 1 for index, f in enumerate(flops) if f >= limit)


def _is_matrix(cost: Cost) -> bool:
    return cost.backward_flops > cost.flops


def weigh(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    source: CostSource,
    device: DeviceProfile | None = None,
    measure: Measure = measure_seconds,
) -> Analysis:
    """Cost every node, find the legal cuts, the repeated blocks and the sources of guesses.

    Args:
        program: The program.
        facts: What was observed of it.
        source: How nodes are weighed.
        device: Whose seconds count, for costs of the roofline.
        measure: Gives the seconds of segments, for measured costs.

    Raises:
        OptionError: Costs of the roofline need a device, or a callable gave no fit number.
    """
    costs = measure_costs(program, facts, source if callable(source) else None)
    frontiers = analyze(program, facts, costs)
    unit = "FLOPs"
    if callable(source):
        unit = "cost"
    elif source in MEASURED:
        unit = "seconds"
        costs = _measured(program, frontiers, costs, measure, backward=MEASURED[source])
    elif source in ROOFLINE:
        if device is None:
            raise OptionError(
                f"cost={source!r} needs a device profile: devices=pnn.load_profile('h100'), or a "
                "file that `pnn-compile profile -o FILE` writes"
            )
        unit = "seconds"
        costs = roofline(costs, facts, device, backward=ROOFLINE[source])
    return Analysis(
        program=program,
        facts=facts,
        costs=costs,
        frontiers=frontiers,
        blocks=tuple(repeated_blocks(program, frontiers, facts)),
        sources=tuple(preprocessing_sources(program, frontiers, facts)),
        unit=unit,
        device=device if not callable(source) and source in ROOFLINE else None,
    )


def _measured(
    program: Program,
    frontiers: Frontiers,
    costs: Mapping[fx.Node, Cost],
    measure: Measure,
    *,
    backward: bool,
) -> dict[fx.Node, Cost]:
    """Replace weights by measured seconds, shared out inside a segment by FLOPs."""
    order = frontiers.order
    ends = sorted({position.index for position in frontiers.positions} | {len(order)})
    starts = [0, *ends[:-1]]
    segments = [order[a:b] for a, b in zip(starts, ends, strict=True)]
    weighed: dict[fx.Node, Cost] = {}
    measured = measure(program, segments, backward=backward)
    for segment, seconds in zip(segments, measured, strict=True):
        flops = sum(costs[node].flops for node in segment)
        for node in segment:
            share = costs[node].flops / flops if flops else 1 / len(segment)
            weighed[node] = replace(
                costs[node], weight=seconds.total * share, backward=seconds.backward * share
            )
    return weighed
