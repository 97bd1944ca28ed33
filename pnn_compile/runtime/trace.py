"""A timeline in the Trace Event Format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from typing import Any

from pnn_compile.runtime.instruction import RECEIVES, SENDS, Kind
from pnn_compile.runtime.simulator import Span, Timeline

__all__ = ["chrome_trace"]

_MICROSECONDS = 1e6


def chrome_trace(timeline: Timeline, *, scale: float = _MICROSECONDS) -> dict[str, Any]:
    """Describe a timeline for a trace viewer: a thread per rank, and an arrow per message.

    Instructions of the critical path carry the argument "critical".

    Args:
        timeline: What `simulate` gives.
        scale: Microseconds per unit of its times.

    Returns:
        What `json.dump` writes to a file that https://ui.perfetto.dev opens.
    """
    critical = {id(span) for _, span in timeline.critical_path}
    events: list[dict[str, Any]] = []
    for rank, own in enumerate(timeline.spans):
        thread = {"pid": 0, "tid": rank}
        events.append(thread | {"ph": "M", "name": "thread_name", "args": {"name": f"rank {rank}"}})
        for span in own:
            kind, peer = span.instruction.kind, span.instruction.peer
            moment = thread | {"ts": span.start * scale, "cat": _category(span)}
            arguments = _arguments(span) | {"critical": id(span) in critical}
            name = f"{kind.value} {span.instruction.stage}"
            length = (span.end - span.start) * scale
            events.append(moment | {"ph": "X", "name": name, "dur": length, "args": arguments})
            if peer is None:
                continue
            ends = (rank, peer) if kind in SENDS else (peer, rank)
            arrow = {"name": "message", "id": _message(span, *ends), "cat": "message"}
            if kind in SENDS:
                events.append(moment | arrow | {"ph": "s"})
            else:
                events.append(moment | arrow | {"ph": "f", "bp": "e", "ts": span.end * scale})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _category(span: Span) -> str:
    kind = span.instruction.kind
    if kind in RECEIVES:
        return "wait"
    if kind in SENDS:
        return "send"
    return "backward" if kind.name.endswith("BACKWARD") else "forward"


def _arguments(span: Span) -> dict[str, Any]:
    it = span.instruction
    found = {"stage": it.stage, "micro-batch": it.batch, "iteration": it.iteration}
    return found if it.peer is None else found | {"peer": it.peer}


def _message(span: Span, sender: int, receiver: int) -> str:
    it = span.instruction
    taken: Kind = SENDS.get(it.kind, it.kind)
    return f"{taken.name} {it.stage} {it.batch} {it.iteration} {sender} {receiver}"
