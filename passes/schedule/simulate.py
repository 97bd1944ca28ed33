"""Simulates a step: the instruction lists that ranks run, with durations in place of tensors.

A rank runs one instruction at a time. A send takes no time on its rank; its message then takes its
turn on the link to its peer, which carries one message at a time: bytes over bandwidth, and the
latency on top. Nothing else makes ranks wait, so that walking the lists in an order in which every
message is sent before it is taken gives every event its exact time.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from passes.coarse.spec import OperatorSpec
from passes.errors import RuntimeFault
from passes.plan.schema import Head, Plan, Stage
from passes.schedule.instruction import RECEIVES, SENDS, Instruction, Kind
from passes.schedule.verify import in_order

__all__ = ["Span", "Timeline", "Times", "simulate"]


@dataclass(frozen=True)
class Times:
    """How long computations and messages take; what is not named takes no time.

    Attributes:
        compute: Seconds (or another unit, the same everywhere) by kind and stage.
        bytes: Size of a message by the kind that sends it and stage.
        latency: Seconds that a message takes at least.
        bandwidth: Bytes a second of a link between two ranks, each way.
    """

    compute: Mapping[tuple[Kind, int], float]
    bytes: Mapping[tuple[Kind, int], float] = field(default_factory=dict)
    latency: float = 0.0
    bandwidth: float = math.inf

    @classmethod
    def of(
        cls, plan: Plan, *, latency: float = 0.0, bandwidth: float = math.inf, ratio: float = 2.0
    ) -> Times:
        """What a plan knows, at its example inputs, in the unit of its forecast.

        Args:
            plan: The plan.
            latency: As above, in that unit.
            bandwidth: As above, in bytes per that unit.
            ratio: Backward over forward, of guesses, corrections and head, where the plan does not
                hold measured seconds of both ways; of a fine stage it knows the ratio by FLOPs.

        Raises:
            RuntimeFault: The plan was made with weights that it does not hold.
        """
        return cls(_compute(plan, ratio), _bytes(plan), latency, bandwidth)

    def transfer(self, send: Instruction) -> float:
        """Seconds that a message keeps its link busy."""
        return self.bytes.get((send.kind, send.stage), 0.0) / self.bandwidth


def _compute(plan: Plan, ratio: float) -> dict[tuple[Kind, int], float]:
    known = plan.forecast
    pieces: tuple[Stage | Head, ...] = (*plan.stages, plan.head)
    if known.unit not in ("FLOPs", "seconds"):
        raise RuntimeFault(
            f"the plan was weighed by {plan.cost}, and does not hold what every stage weighs: "
            "compile with cost='flops' or 'measured', or give Times of your own"
        )
    scale = known.sequential / max(1, sum(piece.flops for piece in pieces))
    found: dict[tuple[Kind, int], float] = {}
    weights = [(p.seconds if known.unit == "seconds" else p.flops) or 0.0 for p in pieces]
    measured = [p.backward_seconds for p in pieces if p.backward_seconds is not None]
    both_ways = bool(measured) or plan.cost == "measured"
    if measured and sum(weights) > sum(measured):
        ratio = sum(measured) / (sum(weights) - sum(measured))

    def put(forward: Kind, backward: Kind, stage: int, weight: float, slower: float) -> None:
        """Note what a piece takes each way; seconds of a training step are those of both."""
        once = weight / (1 + slower) if both_ways else weight
        found[forward, stage], found[backward, stage] = once, slower * once

    def slowing(piece: Stage | Head | OperatorSpec, default: float) -> float:
        """Backward over forward of a piece."""
        back, both = piece.backward_seconds, piece.seconds
        return back / (both - back) if back is not None and both and both > back else default

    def small(forward: Kind, backward: Kind, stage: int, spec: OperatorSpec, calls: int) -> None:
        """Note a guess or a correction: by its own seconds, or else by its FLOPs."""
        weight = scale * spec.flops if spec.seconds is None else spec.seconds
        put(forward, backward, stage, calls * weight, slowing(spec, ratio))

    for number, stage in enumerate(plan.stages):
        slower = slowing(stage, stage.backward_flops / stage.flops if stage.flops else ratio)
        put(Kind.FINE, Kind.FINE_BACKWARD, number, weights[number], slower)
        if stage.preprocess is None or stage.coarse is None:
            continue
        # In difference form a coarse network that is not linear is called twice.
        calls = 2 if plan.reads_guess(stage.coarse) else 1
        small(Kind.GUESS, Kind.GUESS_BACKWARD, number, stage.preprocess, 1)
        small(Kind.CORRECT, Kind.COARSE_BACKWARD, number, stage.coarse, calls)
    slower = slowing(plan.head, ratio)
    put(Kind.HEAD, Kind.HEAD_BACKWARD, len(plan.stages) - 1, weights[-1], slower)
    return found


def _bytes(plan: Plan) -> dict[tuple[Kind, int], float]:
    found: dict[tuple[Kind, int], float] = {}
    sizes = {value.name: value.spec.bytes for face in plan.interfaces for value in face.state}
    last = len(plan.stages) - 1
    for number, (stage, face) in enumerate(zip(plan.stages, plan.interfaces, strict=True)):
        found[Kind.SEND, number] = face.bytes
        found[Kind.SEND_GUESS, number] = sum(sizes[name] for name in stage.consumes)
        found[Kind.SEND_OUTPUT, number] = sum(sizes[name] for name in stage.produces)
    found[Kind.SEND_SUM, last] = plan.interfaces[last].bytes
    for (kind, number), size in list(found.items()):
        found[Kind[f"{kind.name}_ADJOINT"], number] = size
    return found


@dataclass(frozen=True)
class Span:
    """When an instruction ran.

    Attributes:
        instruction: The instruction.
        start: When its rank came to it, in seconds from the start of the step.
        end: When its rank went on; of a receive when the message was there.
        cause: Rank and place in its list of the send that a receive really waited for, else None.
    """

    instruction: Instruction
    start: float
    end: float
    cause: tuple[int, int] | None = None

    @property
    def busy(self) -> float:
        """Seconds of computation; a receive only waits."""
        return 0.0 if self.instruction.kind in RECEIVES else self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """When every instruction of a step ran.

    Attributes:
        spans: By rank, in the order of its list.
    """

    spans: tuple[tuple[Span, ...], ...]

    @property
    def time(self) -> float:
        """Seconds of the step: until the last rank is done."""
        return max((own[-1].end for own in self.spans if own), default=0.0)

    @property
    def idle(self) -> tuple[float, ...]:
        """Seconds of the step in which each rank computes nothing."""
        time = self.time
        return tuple(time - sum(span.busy for span in own) for own in self.spans)

    @property
    def critical_path(self) -> tuple[tuple[int, Span], ...]:
        """The instructions that the time of the step is made of, with their ranks, in order.

        Neighbours on it follow each other without a pause, on one rank or over a message.
        """
        ends = [own[-1].end if own else 0.0 for own in self.spans]
        rank = ends.index(max(ends))
        place, found = len(self.spans[rank]) - 1, []
        while place >= 0:
            span = self.spans[rank][place]
            found.append((rank, span))
            rank, place = span.cause or (rank, place - 1)
        return tuple(reversed(found))


def simulate(programs: Sequence[Sequence[Instruction]], times: Times) -> Timeline:
    """Simulate a step.

    Args:
        programs: What every rank does, from `schedule`.
        times: How long it takes.

    Returns:
        When every instruction begins and ends; thousands of ranks take a second.

    Raises:
        RuntimeFault: The programs do not fit together.
    """
    spans: list[list[Span]] = [[] for _ in programs]
    clocks = [0.0] * len(programs)
    free: dict[tuple[int, int], float] = defaultdict(float)
    # On their way between two ranks: when each message is there, and which send it is.
    flying: dict[tuple[int, int], deque[tuple[float, int]]] = defaultdict(deque)
    for rank, instruction in in_order(programs):
        start, peer, cause = clocks[rank], instruction.peer, None
        end = start + times.compute.get((instruction.kind, instruction.stage), 0.0)
        if peer is not None and instruction.kind in SENDS:
            free[rank, peer] = max(free[rank, peer], end) + times.transfer(instruction)
            flying[rank, peer].append((free[rank, peer] + times.latency, len(spans[rank])))
        elif peer is not None and instruction.kind in RECEIVES:
            there, place = flying[peer, rank].popleft()
            cause = (peer, place) if there > start else None
            end = max(start, there)
        spans[rank].append(Span(instruction, start, end, cause))
        clocks[rank] = end
    return Timeline(tuple(map(tuple, spans)))
