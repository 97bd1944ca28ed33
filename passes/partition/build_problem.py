"""The analysis as prices: what every position costs on every device, in time and in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

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
from passes.partition.problem import CutProblem, Prices

__all__ = ["Pricing", "transfer"]

_BOUNDARY = 0.01
"""Share of a stage by which a cut inside a block must be cheaper to be taken."""


def transfer(size: float, one: DeviceProfile | None, other: DeviceProfile | None) -> float:
    """Seconds of a message between two devices, over the slower of their links."""
    if one is None or other is None:
        return 0.0
    latency = max(one.link_latency, other.link_latency)
    return latency + size / min(one.link_bandwidth, other.link_bandwidth)


class Pricing:
    """Prices of candidate positions, the last of which is the head's, for numbers of stages."""

    def __init__(
        self, analysis: Analysis, options: Options, candidates: Sequence[Position], head: Position
    ) -> None:
        self.analysis = analysis
        self.options = options
        self.ends = [*candidates, head]
        self.head = head
        self.guesses = [preprocess_estimate(analysis, options, p) for p in self.ends]
        self.training = options.training
        self._memory: Memory | None = None
        self._room: dict[DeviceProfile, tuple[list[int], int, list[int]]] = {}

    def devices(self, stages: int) -> tuple[DeviceProfile | None, ...]:
        """The device of every stage, in the order that they are listed."""
        listed = self.options.devices
        if 1 < len(listed) < stages:
            raise PartitionError(
                f"{stages} stages need a device each (devices={len(listed)}): list more devices, "
                "one profile for all, or ask for fewer stages"
            )
        return listed[:stages] if len(listed) > 1 else (*listed, None)[:1] * stages

    def problem(self, devices: Sequence[DeviceProfile | None], extra: float = 0.0) -> CutProblem:
        """The problem of cutting for these devices, one stage each.

        Args:
            devices: By stage.
            extra: Bytes that every device is taken to have beyond its own.
        """
        known: dict[tuple[DeviceProfile | None, DeviceProfile | None], Prices] = {}
        found = []
        for number, device in enumerate(devices):
            key = device, devices[number - 1] if number else device
            if key not in known:
                known[key] = self.prices(*key, len(devices), extra)
            found.append(known[key])
        return CutProblem(devices=tuple(found))

    def prices(
        self,
        device: DeviceProfile | None,
        before: DeviceProfile | None,
        stages: int,
        extra: float = 0.0,
    ) -> Prices:
        """Prices on one device, that gets its states from another one."""
        analysis, options = self.analysis, self.options
        costs = analysis.on(device)
        order = [costs[node] for node in analysis.frontiers.order]
        ways = [[0.0, *itertools.accumulate(cost.forward for cost in order)]]
        if analysis.backward:
            ways.append([0.0, *itertools.accumulate(cost.backward for cost in order)])
        totals = [way[-1] for way in ways]
        flops = analysis.flops or 1
        scale = sum(totals) / flops if analysis.flops else 1.0
        budget = stage_budget(analysis, options, stages)
        preference = _BOUNDARY * sum(totals) / stages
        coarse = [coarse_estimate(analysis, options, p, budget) * scale for p in self.ends]
        guesses = [guess * scale for guess in self.guesses]
        if options.sweep == "collapsed":  # every device applies its own map, at the same time
            guesses = [guess + own for guess, own in zip(guesses, coarse, strict=True)]
            coarse = [0.0] * len(coarse)
        trips = len(ways)
        hops = [
            own
            + trips * transfer(p.bytes, before, device)
            # One FLOP per byte breaks ties in favour of the smaller state.
            + p.bytes * scale
            + (0.0 if p.boundary else preference)
            for own, p in zip(coarse, self.ends, strict=True)
        ]
        shares = [total / sum(totals) if sum(totals) else 1.0 for total in totals]
        works = [[way[p.index] for p in self.ends] for way in ways]
        entries = [[share * guess for guess in guesses] for share in shares]
        reach, first_reach, last_reach = self._reach(device, extra)
        rest = sum(way[-1] - way[self.head.index] for way in ways)
        return Prices(
            work=works[0],
            entry=entries[0],
            hop=hops,
            tail=[math.inf] * (len(self.ends) - 1) + [rest],
            back_work=works[1] if len(ways) > 1 else (),
            back_entry=entries[1] if len(ways) > 1 else (),
            reach=reach,
            first_reach=first_reach if stages > 1 else last_reach[0] if last_reach else None,
            last_reach=last_reach[1:],
        )

    @property
    def memory(self) -> Memory:
        """What runs of nodes hold."""
        if self._memory is None:
            self._memory = Memory(
                self.analysis.program, self.analysis.costs, training=self.training
            )
        return self._memory

    def entry_bytes(self) -> list[float]:
        """About what the guess and the correction of a stage from each position hold."""
        return [self.memory.entry(self._parameters(p), p.bytes) for p in self.ends]

    def _parameters(self, position: Position) -> int:
        """About how many parameters guess and correction have."""
        pairs = itertools.product(position.specs, position.specs)
        maps = sum(a.channels * b.channels for a, b in itertools.starmap(layouts, pairs))
        origin = origin_of(self.analysis, self.options, position)
        maps += sum(self.analysis.costs[node].parameter_bytes for node in origin.copied) // 4
        if copies_blocks(self.options.coarse) and (blocks := self.analysis.trunk_blocks):
            order = self.analysis.frontiers.order
            read = sum(
                self.analysis.costs[node].parameter_bytes
                for block in blocks
                for node in order[block.start.index : block.stop.index]
            )
            return maps + self.options.units * read // (4 * len(blocks))
        return 2 * maps

    def _reach(
        self, device: DeviceProfile | None, extra: float
    ) -> tuple[list[int], int | None, list[int]]:
        """How far stages from each position fit, a first stage, and last stages with the head."""
        if device is None or device.memory == math.inf:
            return [], None, []
        limit = device.memory + extra
        begins = [p.index for p in self.ends]
        entry, last = self.entry_bytes(), len(self.ends) - 1
        reach = last_fitting_ends(self.memory, begins, entry, begins, limit)
        first = last_fitting_ends(self.memory, [0], [0.0], begins, limit)[0]
        whole = [len(self.analysis.frontiers.order)]
        behind = last_fitting_ends(self.memory, [0, *begins], [0.0, *entry], whole, limit)
        return reach, first, [last if fits == 0 else -1 for fits in behind]
