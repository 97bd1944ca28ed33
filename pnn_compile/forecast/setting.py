"""What a forecast starts from: one analysis of the model, and the devices asked about."""

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

__all__ = ["Setting", "free", "parts_of", "sent"]

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
class Setting:
    """What every row of a forecast is made from.

    Attributes:
        analysis: Costs and legal cuts of the model.
        options: What networks are compiled with; stages and sweep are set row by row.
        training: Whether a step trains.
        batch: Samples of a step.
        profiles: One device for all, or one per stage; none for free links and any memory.
    """

    analysis: Analysis
    options: Options
    training: bool
    batch: int
    profiles: tuple[DeviceProfile, ...]

    @property
    def linked(self) -> bool:
        """Whether links take time: not where times are no seconds."""
        return bool(self.profiles) and self.analysis.unit == "seconds"

    @property
    def latency(self) -> float:
        """Seconds that a message takes at least, over the slowest link."""
        return max(p.link_latency for p in self.profiles) if self.linked else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the slowest link."""
        return min(p.link_bandwidth for p in self.profiles) if self.linked else math.inf

    def device(self, rank: int) -> DeviceProfile | None:
        """The device of a rank."""
        if not self.profiles:
            return None
        return self.profiles[rank] if len(self.profiles) > 1 else self.profiles[0]

    def forward(self, node: fx.Node, rank: int = 0) -> float:
        """What a node takes on the way forward."""
        cost = self.analysis.on(self.device(rank))[node]
        return float(cost.flops) if self.analysis.unit == "FLOPs" else cost.forward

    def backward(self, node: fx.Node, rank: int = 0) -> float:
        """What a node takes on the way back; nothing in inference."""
        cost = self.analysis.on(self.device(rank))[node]
        if not self.training:
            return 0.0
        return float(cost.backward_flops) if self.analysis.unit == "FLOPs" else cost.backward

    def whole(self, node: fx.Node, rank: int = 0) -> float:
        """What a node takes in a step."""
        return self.forward(node, rank) + self.backward(node, rank)

    def alone(self, rank: int) -> float:
        """What the original takes on the device of a rank."""
        return sum(self.whole(node, rank) for node in self.analysis.frontiers.order)

    @cached_property
    def sequential(self) -> float:
        """What the original takes on one device, the fastest for it."""
        return min(self.alone(rank) for rank in range(max(1, len(self.profiles))))

    @cached_property
    def memory(self) -> Memory:
        """What runs of nodes hold."""
        return Memory(self.analysis.program, self.analysis.costs, training=self.training)

    def check_memory(self, held: Sequence[float]) -> None:
        """Refuse what the devices cannot hold.

        Raises:
            PartitionError: A device holds more than it can.
        """
        for rank, size in enumerate(held):
            device = self.device(rank)
            if device is not None and size > device.memory:
                raise PartitionError(
                    f"device {rank} ({device.name}) would hold {size:.3g} bytes of "
                    f"{device.memory:.3g}"
                )


def free(times: Times, *kinds: Kind) -> Times:
    """The same times with free links, and with some kinds of work that take no time."""
    left = {key: value for key, value in times.compute.items() if key[0] not in kinds}
    return Times(left)


def sent(lists: Sequence[Sequence[Instruction]], times: Times) -> float:
    """Bytes that cross links in one step."""
    return sum(times.bytes.get((each.kind, each.stage), 0.0) for own in lists for each in own)


def parts_of(timeline: Timeline) -> dict[str, float]:
    """What the time of a step is made of, along its critical path; the parts add up to it."""
    found = dict.fromkeys(("fine", "preprocessing", "coarse", "head", "link"), 0.0)
    before = 0.0
    for _, span in timeline.critical_path:
        found[_PART.get(span.instruction.kind, "link")] += span.end - before
        before = span.end
    return found
