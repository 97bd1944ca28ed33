"""Turn an analysis into a `CutProblem`: the time and memory costs of every position and device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position
from passes.coarse.family import copies_blocks
from passes.coarse.prologue import origin_of
from passes.coarse.select import coarse_estimate, preprocess_estimate, stage_budget
from passes.coarse.tensor_layout import layouts
from passes.cost.device_profile import DeviceProfile
from passes.cost.memory import Memory, last_fitting_ends
from passes.errors import PartitionError
from passes.options import Options
from passes.partition.problem import CutProblem, PositionCosts

_INSIDE_BLOCK = 0.01
"""Share of a stage by which a cut inside a block must be cheaper than one between blocks."""


class ProblemBuilder:
    """Builder of cut problems for any number of stages over the same candidate positions.

    Args:
        analysis: Costs of nodes, and legal cuts.
        options: Options of the compilation.
        candidates: Positions of cuts, in order.
        head: Position at which the last stage ends.

    Attributes:
        positions: The candidates and the head; a cut of the problem is an index into them.
    """

    def __init__(
        self, analysis: Analysis, options: Options, candidates: Sequence[Position], head: Position
    ) -> None:
        self.analysis = analysis
        self.options = options
        self.positions = [*candidates, head]
        self.head = head
        self._preprocess = [preprocess_estimate(analysis, options, p) for p in self.positions]

    def devices(self, stages: int) -> tuple[DeviceProfile | None, ...]:
        """Return the device of every stage, in the order of the options.

        Raises:
            PartitionError: The options list several devices, but fewer than stages.
        """
        listed = self.options.devices
        if 1 < len(listed) < stages:
            raise PartitionError(
                f"{stages} stages need a device each (devices={len(listed)}): list more devices, "
                "one profile for all, or ask for fewer stages"
            )
        return listed[:stages] if len(listed) > 1 else (*listed, None)[:1] * stages

    def build(
        self, devices: Sequence[DeviceProfile | None], extra_memory: float = 0.0
    ) -> CutProblem:
        """Build the problem for these devices, one stage each.

        Args:
            devices: By stage.
            extra_memory: Bytes to add to the memory of every device.
        """
        # Stages with equal devices and links share one object, which the solver relies on.
        cache: dict[tuple[DeviceProfile | None, DeviceProfile | None], PositionCosts] = {}
        costs = []
        for number, device in enumerate(devices):
            key = device, devices[number - 1] if number else device
            if key not in cache:
                cache[key] = self._costs(*key, len(devices), extra_memory)
            costs.append(cache[key])
        return CutProblem(devices=tuple(costs))

    def _costs(
        self,
        device: DeviceProfile | None,
        before: DeviceProfile | None,
        stages: int,
        extra_memory: float,
    ) -> PositionCosts:
        """Return the costs on one device, which receives its states from the device `before`."""
        analysis, options = self.analysis, self.options
        node_costs = analysis.on(device)
        order = [node_costs[node] for node in analysis.frontiers.order]
        phases = [[0.0, *itertools.accumulate(cost.forward for cost in order)]]
        if analysis.backward:
            phases.append([0.0, *itertools.accumulate(cost.backward for cost in order)])
        totals = [work[-1] for work in phases]
        flops = analysis.flops or 1
        scale = sum(totals) / flops if analysis.flops else 1.0  # cost of a FLOP
        budget = stage_budget(analysis, options, stages)
        preference = _INSIDE_BLOCK * sum(totals) / stages
        coarse = [
            coarse_estimate(analysis, options, p, self.head, budget) * scale for p in self.positions
        ]
        preprocess = [estimate * scale for estimate in self._preprocess]
        if options.sweep == "collapsed":  # every device applies its own map, at the same time
            preprocess = [c + f for c, f in zip(preprocess, coarse, strict=True)]
            coarse = [0.0] * len(coarse)
        hops = [
            cost
            + (len(phases) * device.transfer(p.bytes, before) if before and device else 0.0)
            # One FLOP per byte breaks ties in favor of the smaller state.
            + p.bytes * scale
            + (0.0 if p.boundary else preference)
            for cost, p in zip(coarse, self.positions, strict=True)
        ]
        shares = [total / sum(totals) if sum(totals) else 1.0 for total in totals]
        works = [[work[p.index] for p in self.positions] for work in phases]
        entries = [[share * cost for cost in preprocess] for share in shares]
        reach, first_reach, last_reach = self._reach(device, extra_memory)
        head = sum(work[-1] - work[self.head.index] for work in phases)
        return PositionCosts(
            work=works[0],
            entry=entries[0],
            hop=hops,
            tail=[math.inf] * (len(self.positions) - 1) + [head],
            backward_work=works[1] if len(phases) > 1 else (),
            backward_entry=entries[1] if len(phases) > 1 else (),
            reach=reach,
            first_reach=first_reach if stages > 1 else last_reach[0] if last_reach else None,
            last_reach=last_reach[1:],
        )

    @cached_property
    def memory(self) -> Memory:
        """Memory of spans of nodes."""
        analysis = self.analysis
        return Memory(analysis.program, analysis.costs, training=self.options.training)

    def entry_bytes(self) -> list[float]:
        """Estimate the memory of the operators of a stage that begins at each position."""
        return [self.memory.entry(self._parameters(p), p.bytes) for p in self.positions]

    def _parameters(self, position: Position) -> int:
        """Estimate the parameters of the preprocessing operator and the coarse propagator."""
        pairs = itertools.product(position.specs, position.specs)
        maps = sum(a.channels * b.channels for a, b in itertools.starmap(layouts, pairs))
        origin = origin_of(self.analysis, self.options, position)
        maps += sum(self.analysis.costs[node].parameter_bytes for node in origin.copied) // 4
        if copies_blocks(self.options.coarse) and (blocks := self.analysis.trunk_blocks):
            order = self.analysis.frontiers.order
            parameter_bytes = sum(
                self.analysis.costs[node].parameter_bytes
                for block in blocks
                for node in order[block.start.index : block.stop.index]
            )
            return maps + self.options.units * parameter_bytes // (4 * len(blocks))
        return 2 * maps

    def _reach(
        self, device: DeviceProfile | None, extra_memory: float
    ) -> tuple[list[int], int | None, list[int]]:
        """Return the last candidates at which stages may end, by the memory of the device.

        Returns:
            For stages from each position, for a first stage, and for last stages with the head:
            from the beginning, then from each position.
        """
        if device is None or device.memory == math.inf:
            return [], None, []
        limit = device.memory + extra_memory
        begins = [p.index for p in self.positions]
        entry, last = self.entry_bytes(), len(self.positions) - 1
        reach = last_fitting_ends(self.memory, begins, entry, begins, limit)
        first = last_fitting_ends(self.memory, [0], [0.0], begins, limit)[0]
        whole = [len(self.analysis.frontiers.order)]
        with_head = last_fitting_ends(self.memory, [0, *begins], [0.0, *entry], whole, limit)
        return reach, first, [last if stop == 0 else -1 for stop in with_head]
