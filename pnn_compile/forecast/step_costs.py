"""Costs of one step of a model on every device, shared by all rows of a forecast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from passes.analysis.analysis import Analysis
from passes.cost.device_profile import DeviceProfile
from passes.cost.memory import Memory
from passes.errors import PartitionError
from passes.options import Options
from passes.schedule.instruction import Instruction, Kind
from passes.schedule.simulate import Timeline, Times

_PART = {
    Kind.FINE: "fine",
    Kind.FINE_BACKWARD: "fine",
    Kind.GUESS: "preprocessing",
    Kind.GUESS_BACKWARD: "preprocessing",
    Kind.CORRECT: "coarse",
    Kind.COARSE_BACKWARD: "coarse",
    Kind.HEAD: "head",
    Kind.HEAD_BACKWARD: "head",
}


@dataclass(frozen=True)
class StepCosts:
    """Times, memory and links of a step of the original on every device.

    Attributes:
        analysis: Costs and legal cuts of the model.
        options: Options of the parareal networks; stages and sweep are set row by row.
        training: Whether a step trains.
        batch: Samples of a step.
        profiles: One device for all, or one per stage; none for free links and unlimited memory.
    """

    analysis: Analysis
    options: Options
    training: bool
    batch: int
    profiles: tuple[DeviceProfile, ...]

    @property
    def linked(self) -> bool:
        """Whether links take time: only where the unit of times is seconds."""
        return bool(self.profiles) and self.analysis.unit == "seconds"

    @property
    def latency(self) -> float:
        """Latency of the slowest link, in seconds."""
        return max(p.link_latency for p in self.profiles) if self.linked else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the slowest link."""
        return min(p.link_bandwidth for p in self.profiles) if self.linked else math.inf

    def device(self, rank: int) -> DeviceProfile | None:
        """Return the device of a rank."""
        if not self.profiles:
            return None
        return self.profiles[rank] if len(self.profiles) > 1 else self.profiles[0]

    def forward(self, node: fx.Node, rank: int = 0) -> float:
        """Return the time of a node, forward."""
        cost = self.analysis.on(self.device(rank))[node]
        return float(cost.flops) if self.analysis.unit == "FLOPs" else cost.forward

    def backward(self, node: fx.Node, rank: int = 0) -> float:
        """Return the time of a node, backward; 0 in inference."""
        cost = self.analysis.on(self.device(rank))[node]
        if not self.training:
            return 0.0
        return float(cost.backward_flops) if self.analysis.unit == "FLOPs" else cost.backward

    def total(self, node: fx.Node, rank: int = 0) -> float:
        """Return the time of a node in a step, forward and backward."""
        return self.forward(node, rank) + self.backward(node, rank)

    def original(self, rank: int) -> float:
        """Return the time of the original on the device of a rank."""
        return sum(self.total(node, rank) for node in self.analysis.frontiers.order)

    @cached_property
    def sequential(self) -> float:
        """Time of the original on one device, the fastest one for it."""
        return min(self.original(rank) for rank in range(max(1, len(self.profiles))))

    @cached_property
    def memory(self) -> Memory:
        """Memory of consecutive nodes."""
        return Memory(self.analysis.program, self.analysis.costs, training=self.training)

    def check_memory(self, memory: Sequence[float]) -> None:
        """Check the bytes of every rank against the memory of its device.

        Raises:
            PartitionError: A device has less memory.
        """
        for rank, size in enumerate(memory):
            device = self.device(rank)
            if device is not None and size > device.memory:
                raise PartitionError(
                    f"device {rank} ({device.name}) needs {size:.3g} bytes and has "
                    f"{device.memory:.3g}"
                )


def free_links(times: Times, *kinds: Kind) -> Times:
    """Return the same times with free links, and without the work of some kinds."""
    return Times({key: value for key, value in times.compute.items() if key[0] not in kinds})


def link_bytes(lists: Sequence[Sequence[Instruction]], times: Times) -> float:
    """Sum the bytes that cross links in one step."""
    instructions = (instruction for by_rank in lists for instruction in by_rank)
    return sum(times.bytes.get((one.kind, one.stage), 0.0) for one in instructions)


def critical_parts(timeline: Timeline) -> dict[str, float]:
    """Split the time of a step by kind of work along its critical path."""
    parts = dict.fromkeys(("fine", "preprocessing", "coarse", "head", "link"), 0.0)
    before = 0.0
    for _, span in timeline.critical_path:
        parts[_PART.get(span.instruction.kind, "link")] += span.end - before
        before = span.end
    return parts
