"""Simulate a step: run the instruction lists of all ranks with durations in place of tensors.

`simulate` returns a timeline; `chrome_trace` describes it in the Trace Event Format, which Perfetto
and chrome://tracing open.

A rank runs one instruction at a time. A send takes no time on its rank; its message then waits for
its turn on the link to the peer, which carries one message at a time: bytes over bandwidth, and
latency on top. Nothing else makes ranks wait, so walking the lists in an order in which every
message is sent before it is received gives every event its exact time.

Two ranks, of which the second preprocesses for 1 s and corrects for 2 s; the fine stages take 3 s
and 5 s, the link 1 s:

    rank 0   f f f *
    rank 1   g f f f f f c c        the state is there at 4, and waits for the fine stage

>>> compute = {(Kind.FINE, 0): 3, (Kind.GUESS, 1): 1, (Kind.FINE, 1): 5, (Kind.CORRECT, 1): 2}
>>> simulate(schedule((0, 1), backward=False), Times(compute, latency=1)).time
8.0

The forecast of a plan is the closed form of this model: makespan plus sweep plus head, here
6 + (2 + 1) = 9. It is an upper bound that ignores what overlaps: the link, in this example.
`passes.plan.estimate` lists the differences.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from passes.coarse.spec import OperatorSpec
from passes.errors import RuntimeFault
from passes.plan.schema import Head, Plan, Stage
from passes.schedule.instruction import EXPECTS, RECEIVES, SENDS, Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.verify import execution_order

_MICROSECONDS = 1e6
_PER_FLOP = 1e-6
"""Microseconds of a FLOP on a device of 10^12 FLOP/s."""


@dataclass(frozen=True)
class Times:
    """Durations of computations and messages; what is not listed takes no time.

    Attributes:
        compute: Seconds (or another unit, the same everywhere) by kind and stage.
        bytes: Size of a message by the kind that sends it and stage.
        latency: Seconds of a message beyond its bytes.
        bandwidth: Bytes per second of a link between two ranks, in each direction.
        node: Ranks of one node, among which links are as above; 0 if all are in one.
        network_latency: As `latency`, between ranks of two nodes.
        network_bandwidth: As `bandwidth`, between ranks of two nodes.
    """

    compute: Mapping[tuple[Kind, int], float]
    bytes: Mapping[tuple[Kind, int], float] = field(default_factory=dict)
    latency: float = 0.0
    bandwidth: float = math.inf
    node: int = 0
    network_latency: float = 0.0
    network_bandwidth: float = math.inf

    @classmethod
    def of(cls, plan: Plan, *, ratio: float = 2.0, **links: Any) -> Times:
        """Return the durations of a plan, at its example inputs, in the unit of its forecast.

        Args:
            plan: The plan.
            ratio: Backward over forward, for operators and the head, if the plan does not store
                measured seconds of both phases. Of a fine stage it stores the FLOPs of both.
            links: Latencies and bandwidths, as above, in that unit, and `node`.

        Raises:
            RuntimeFault: The costs of the plan are those of a callable, which it does not store.
        """
        return cls(_compute(plan, ratio), _bytes(plan), **links)

    def transfer(self, send: Instruction, rank: int) -> tuple[float, float]:
        """Return the seconds that a message of a rank occupies its link, and the latency."""
        size = self.bytes.get((send.kind, send.stage), 0.0)
        if self.node and send.peer is not None and rank // self.node != send.peer // self.node:
            return size / self.network_bandwidth, self.network_latency
        return size / self.bandwidth, self.latency


def _compute(plan: Plan, ratio: float) -> dict[tuple[Kind, int], float]:
    """Return the duration of every computation, by kind and stage."""
    forecast = plan.forecast
    pieces: tuple[Stage | Head, ...] = (*plan.stages, plan.head)
    if forecast.unit not in ("FLOPs", "seconds"):
        raise RuntimeFault(
            f"the costs of the plan are those of {plan.cost}, which it does not store: "
            "compile with cost='flops' or 'measured', or give Times of your own"
        )
    per_flop = forecast.sequential / max(1, sum(piece.flops for piece in pieces))
    durations: dict[tuple[Kind, int], float] = {}
    costs = [(p.seconds if forecast.unit == "seconds" else p.flops) or 0.0 for p in pieces]
    backward = [p.backward_seconds for p in pieces if p.backward_seconds is not None]
    both_phases = bool(backward) or plan.cost == "measured"
    if backward and sum(costs) > sum(backward):
        ratio = sum(backward) / (sum(costs) - sum(backward))

    def put(kinds: tuple[Kind, Kind], stage: int, cost: float, ratio: float) -> None:
        """Split a cost into forward and backward; costs of a training step include both."""
        forward = cost / (1 + ratio) if both_phases else cost
        durations[kinds[0], stage], durations[kinds[1], stage] = forward, ratio * forward

    def put_operator(kinds: tuple[Kind, Kind], stage: int, spec: OperatorSpec, calls: int) -> None:
        cost = per_flop * spec.flops if spec.seconds is None else spec.seconds
        put(kinds, stage, calls * cost, _backward_ratio(spec, ratio))

    for number, stage in enumerate(plan.stages):
        by_flops = stage.backward_flops / stage.flops if stage.flops else ratio
        put(_FINE, number, costs[number], _backward_ratio(stage, by_flops))
        if stage.preprocess is None or stage.coarse is None:
            continue
        # In difference form a coarse network that is not linear is called twice.
        calls = 2 if plan.reads_guess(stage.coarse) else 1
        put_operator(_PREPROCESS, number, stage.preprocess, 1)
        put_operator(_COARSE, number, stage.coarse, calls)
        if plan.predicts:
            durations[Kind.PREDICT, number] = durations[Kind.CORRECT, number]
    put(_HEAD, len(plan.stages) - 1, costs[-1], _backward_ratio(plan.head, ratio))
    return durations


_FINE = Kind.FINE, Kind.FINE_BACKWARD
_PREPROCESS = Kind.GUESS, Kind.GUESS_BACKWARD
_COARSE = Kind.CORRECT, Kind.COARSE_BACKWARD
_HEAD = Kind.HEAD, Kind.HEAD_BACKWARD


def _backward_ratio(piece: Stage | Head | OperatorSpec, default: float) -> float:
    """Return backward over forward seconds of a piece."""
    backward, both = piece.backward_seconds, piece.seconds
    if backward is not None and both and both > backward:
        return backward / (both - backward)
    return default


def _bytes(plan: Plan) -> dict[tuple[Kind, int], float]:
    """Return the size of every message, by the kind that sends it and stage."""
    message_bytes: dict[tuple[Kind, int], float] = {}
    sizes = {value.name: value.spec.bytes for face in plan.interfaces for value in face.state}
    last = len(plan.stages) - 1
    for number, (stage, face) in enumerate(zip(plan.stages, plan.interfaces, strict=True)):
        message_bytes[Kind.SEND, number] = face.bytes
        message_bytes[Kind.SEND_GUESS, number] = sum(sizes[name] for name in stage.consumes)
        message_bytes[Kind.SEND_OUTPUT, number] = sum(sizes[name] for name in stage.produces)
    message_bytes[Kind.SEND_SUM, last] = plan.interfaces[last].bytes
    for (kind, number), size in list(message_bytes.items()):
        message_bytes[Kind[f"{kind.name}_ADJOINT"], number] = size
    return message_bytes


@dataclass(frozen=True)
class TimelineSpan:
    """Start and end of an instruction.

    Attributes:
        instruction: The instruction.
        start: When its rank reached it, in seconds from the start of the step.
        end: When its rank continued; for a receive, at the earliest when the message arrived.
        cause: If a receive had to wait, rank and list index of the send, else None.
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
    """Start and end of every instruction of a step.

    Attributes:
        spans: By rank, in the order of its list.
    """

    spans: tuple[tuple[TimelineSpan, ...], ...]

    @property
    def time(self) -> float:
        """Seconds until the last rank is done."""
        return max((spans[-1].end for spans in self.spans if spans), default=0.0)

    @property
    def idle(self) -> tuple[float, ...]:
        """Seconds of the step in which each rank computes nothing."""
        time = self.time
        return tuple(time - sum(span.busy for span in spans) for spans in self.spans)

    @property
    def critical_path(self) -> tuple[tuple[int, TimelineSpan], ...]:
        """The instructions that determine the time of the step, with their ranks, in order.

        Neighbors follow each other without a pause, on one rank or over a message.
        """
        ends = [spans[-1].end if spans else 0.0 for spans in self.spans]
        rank = ends.index(max(ends))
        index, path = len(self.spans[rank]) - 1, []
        while index >= 0:
            span = self.spans[rank][index]
            path.append((rank, span))
            rank, index = span.cause or (rank, index - 1)
        return tuple(reversed(path))


def simulate(programs: Sequence[Sequence[Instruction]], times: Times) -> Timeline:
    """Simulate a step.

    Args:
        programs: Instructions of every rank, from `schedule`.
        times: Their durations.

    Returns:
        Start and end of every instruction; thousands of ranks take a second to simulate.

    Raises:
        RuntimeFault: The lists do not match, or deadlock.
    """
    spans: list[list[TimelineSpan]] = [[] for _ in programs]
    clocks = [0.0] * len(programs)
    link_free: dict[tuple[int, int], float] = defaultdict(float)
    # Messages in flight between two ranks: arrival, and list index of the send.
    in_flight: dict[tuple[int, int], deque[tuple[float, int]]] = defaultdict(deque)
    for rank, instruction in execution_order(programs):
        start, peer, cause = clocks[rank], instruction.peer, None
        # Stage k of iteration k is exact: it has no correction, and no coarse propagator runs.
        exact = instruction.kind is Kind.CORRECT and instruction.stage == instruction.iteration
        duration = times.compute.get((instruction.kind, instruction.stage), 0.0)
        end = start + (0.0 if exact else duration)
        if peer is not None and instruction.kind in SENDS:
            occupied, latency = times.transfer(instruction, rank)
            sent = max(link_free[rank, peer], end) + occupied
            link_free[rank, peer] = sent
            in_flight[rank, peer].append((sent + latency, len(spans[rank])))
        elif peer is not None and instruction.kind in RECEIVES:
            arrival, index = in_flight[peer, rank].popleft()
            cause = (peer, index) if arrival > start else None
            end = max(start, arrival)
        spans[rank].append(TimelineSpan(instruction, start, end, cause))
        clocks[rank] = end
    return Timeline(tuple(map(tuple, spans)))


def step_trace(plan: Plan) -> dict[str, Any]:
    """Simulate a training step of a plan, one stage per rank, and describe it for a trace viewer.

    Links take no time. A plan with costs in FLOPs is shown as on devices of 10^12 FLOP/s.

    Raises:
        RuntimeFault: The costs of the plan are those of a callable, which it does not store.
    """
    step = simulate(schedule(plan.placement, Sweep.of(plan)), Times.of(plan))
    return chrome_trace(step, scale=_MICROSECONDS if plan.forecast.unit == "seconds" else _PER_FLOP)


def chrome_trace(timeline: Timeline, *, scale: float = _MICROSECONDS) -> dict[str, Any]:
    """Describe a timeline for a trace viewer: one thread per rank, one arrow per message.

    Instructions of the critical path carry the argument "critical".

    Args:
        timeline: A timeline from `simulate`.
        scale: Microseconds per unit of its times.

    Returns:
        The trace, to write with `json.dump` and open at https://ui.perfetto.dev.
    """
    critical = {id(span) for _, span in timeline.critical_path}
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(timeline.spans):
        thread = {"pid": 0, "tid": rank}
        events.append(thread | {"ph": "M", "name": "thread_name", "args": {"name": f"rank {rank}"}})
        for span in spans:
            kind, peer = span.instruction.kind, span.instruction.peer
            moment = thread | {"ts": span.start * scale, "cat": _category(span)}
            arguments = _arguments(span) | {"critical": id(span) in critical}
            name = f"{kind.value} {span.instruction.stage}"
            length = (span.end - span.start) * scale
            events.append(moment | {"ph": "X", "name": name, "dur": length, "args": arguments})
            if peer is None or kind in EXPECTS:
                continue
            ends = (rank, peer) if kind in SENDS else (peer, rank)
            arrow = {"name": "message", "id": _message(span, *ends), "cat": "message"}
            if kind in SENDS:
                events.append(moment | arrow | {"ph": "s"})
            else:
                events.append(moment | arrow | {"ph": "f", "bp": "e", "ts": span.end * scale})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _category(span: TimelineSpan) -> str:
    kind = span.instruction.kind
    if kind in RECEIVES or kind in EXPECTS:
        return "wait"
    if kind in SENDS:
        return "send"
    return "backward" if kind.name.endswith("BACKWARD") else "forward"


def _arguments(span: TimelineSpan) -> dict[str, Any]:
    it = span.instruction
    arguments = {"stage": it.stage, "micro-batch": it.batch, "iteration": it.iteration}
    return arguments if it.peer is None else arguments | {"peer": it.peer}


def _message(span: TimelineSpan, sender: int, receiver: int) -> str:
    """Return an identifier that both sides of a message share."""
    it = span.instruction
    received: Kind = SENDS.get(it.kind, it.kind)
    return f"{received.name} {it.stage} {it.batch} {it.iteration} {sender} {receiver}"
