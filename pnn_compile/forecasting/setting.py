"""What a forecast starts from: one analysis of the model, and the devices asked about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from passes.analysis import Analysis
from passes.device import DeviceProfile
from passes.options import Options
from passes.plan import CoarseSpec
from pnn_compile.runtime.instruction import Instruction, Kind
from pnn_compile.runtime.simulator import Timeline, Times

__all__ = ["OPTIMIZER_COPIES", "Setting", "extra_bytes", "free", "parts_of", "sent"]

OPTIMIZER_COPIES = 4
"""Copies of every parameter in training: weight, gradient and the two moments of Adam."""

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
        profile: The device whose link and memory count; None for free links.
    """

    analysis: Analysis
    options: Options
    training: bool
    batch: int
    profile: DeviceProfile | None

    @property
    def linked(self) -> DeviceProfile | None:
        """The device whose links take time: none where times are no seconds."""
        return self.profile if self.analysis.unit == "seconds" else None

    @property
    def latency(self) -> float:
        """Seconds that a message takes at least."""
        return self.linked.link_latency if self.linked else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a link."""
        return self.linked.link_bandwidth if self.linked else math.inf

    def forward(self, node: fx.Node) -> float:
        """What a node takes on the way forward."""
        cost = self.analysis.costs[node]
        return float(cost.flops) if self.analysis.unit == "FLOPs" else cost.forward

    def backward(self, node: fx.Node) -> float:
        """What a node takes on the way back; nothing in inference."""
        cost = self.analysis.costs[node]
        if not self.training:
            return 0.0
        return float(cost.backward_flops) if self.analysis.unit == "FLOPs" else cost.backward

    def whole(self, node: fx.Node) -> float:
        """What a node takes in a step."""
        return self.forward(node) + self.backward(node)

    @cached_property
    def sequential(self) -> float:
        """What the original takes on one device."""
        return sum(map(self.whole, self.analysis.frontiers.order))

    def held(self, nodes: Sequence[fx.Node], parameters: float, states: float) -> float:
        """Bytes that a device holds for some nodes.

        Args:
            nodes: The nodes that it runs.
            parameters: Bytes of its parameters, those of guesses and corrections included.
            states: Bytes of the states that it reads and gives.
        """
        written = [self.analysis.costs[node].activation_bytes for node in nodes]
        if self.training:
            return OPTIMIZER_COPIES * parameters + sum(written) + states
        return parameters + 2 * max(written, default=0) + states


def extra_bytes(spec: CoarseSpec | None, item: int = 4) -> float:
    """Bytes of the parameters of a guess or a correction."""
    return float(spec.parameters * item) if spec else 0.0


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
