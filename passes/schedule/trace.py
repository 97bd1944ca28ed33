"""Write a timeline in the Trace Event Format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passes.schedule.instruction import EXPECTS, RECEIVES, SENDS, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Timeline, TimelineSpan, Times, simulate

if TYPE_CHECKING:
    from passes.plan.schema import Plan

_MICROSECONDS = 1e6
_PER_FLOP = 1e-6
"""Microseconds of a FLOP on a device of 10^12 FLOP/s."""


def step_trace(plan: Plan) -> dict[str, Any]:
    """Simulate a training step of a plan, one stage per rank, and describe it for a trace viewer.

    Links take no time. A plan with costs in FLOPs is shown as on devices of 10^12 FLOP/s.

    Raises:
        RuntimeFault: The costs of the plan are those of a callable, which it does not store.
    """
    step = simulate(schedule(range(len(plan.stages)), Sweep.of(plan)), Times.of(plan))
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
