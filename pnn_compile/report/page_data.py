"""Everything that the page shows, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from passes.errors import RuntimeFault
from passes.plan.estimate import BOTTLENECKS
from passes.schedule.instruction import RECEIVES, SENDS, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Timeline, Times, simulate
from pnn_compile.export.partition_graph import partition_graph
from pnn_compile.forecast.table import PARAREAL
from pnn_compile.report.graph_data import graph_data

if TYPE_CHECKING:
    from passes.coarse.spec import OperatorSpec
    from passes.plan.schema import Plan
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.iterate import DialRow
    from pnn_compile.forecast.table import ForecastTable

__all__ = ["page_data"]


def page_data(
    compiled: Compiled, dial: Sequence[DialRow] = (), forecast: ForecastTable | None = None
) -> dict[str, Any]:
    """Gather what the page shows of a compiled network.

    Args:
        compiled: The network.
        dial: What every number of iterations gives, where it was measured.
        forecast: What other numbers of devices would give, where it was computed.
    """
    plan = compiled.plan
    calibration = compiled.calibration
    capture = compiled.program.capture
    return {
        "plan": _plan(plan),
        "capture": {
            "rung": capture.rung,
            "rejected": list(capture.rejected),
            "dynamic_batch": compiled.program.dynamic_batch,
        },
        "passes": [[done.name, done.seconds] for done in compiled.passes],
        "graph": graph_data(partition_graph(compiled), len(plan.stages)),
        "forecast": forecast_data(forecast) if forecast else None,
        "timeline": timeline_data(plan),
        "calibration": dataclasses.asdict(calibration) if calibration else None,
        "dial": [dataclasses.asdict(row) for row in dial],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    """The plan without what only rebuilding a network needs."""
    data = dataclasses.asdict(plan)
    for stage, own in zip(data["stages"], plan.stages, strict=True):
        stage["preprocess"] = _operator(own.preprocess)
        stage["coarse"] = _operator(own.coarse)
    for face, seen in zip(data["interfaces"], plan.interfaces, strict=True):
        face["bytes"] = seen.bytes
        face["state"] = [[value.name, str(value.spec)] for value in seen.state]
    return data


def _operator(spec: OperatorSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    data = dataclasses.asdict(spec)
    data["options"] = {key: value for key, value in data["options"].items() if _is_plain(value)}
    return data


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool)) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, (str, int)) for item in value)
    )


def forecast_data(table: ForecastTable) -> dict[str, Any]:
    """The rows of methods that can be drawn as lines, the one that is enough marked as the knee."""
    rows = [
        row for method in table.methods for row in table.of(method) if len(table.of(method)) > 1
    ]
    best = table.best if set(table.methods) & set(PARAREAL) else None
    return {
        "unit": table.unit,
        "training": table.training,
        "batch": table.batch,
        "devices": list(table.devices),
        "sequential": table.sequential,
        "verdict": table.verdict,
        "rows": [
            {
                "stages": row.stages,
                "method": row.method,
                "time": row.time,
                "speedup": row.speedup,
                "bound": row.bound,
                "memory": row.most_memory,
                "limit": BOTTLENECKS[row.limit],
                "knee": row is best,
            }
            for row in rows
        ],
    }


def timeline_data(plan: Plan) -> dict[str, Any]:
    """Simulate one step of a plan, a stage a rank, with messages that take no time.

    Returns:
        The unit, and for one micro-batch and four the time of the step and the spans: rank, kind,
        stage, micro-batch, iteration, start, end, whether it is on the critical path. Or "reason",
        where the plan does not hold what stages cost.
    """
    try:
        times = Times.of(plan)
    except RuntimeFault as error:
        return {"reason": str(error)}
    sweep, placement = Sweep.of(plan), range(len(plan.stages))
    single = {key: time for key, time in times.compute.items() if key[0] in _ORIGINAL}
    forward = sum(time for (kind, _), time in single.items() if kind in (Kind.FINE, Kind.HEAD))
    return {
        "unit": plan.forecast.unit,
        "forward": forward,
        "backward": sum(single.values()) - forward,
        "steps": [
            {"batches": batches}
            | _spans(simulate(schedule(placement, sweep, batches=batches), times))
            for batches in (1, 4)
        ],
    }


_ORIGINAL = (Kind.FINE, Kind.HEAD, Kind.FINE_BACKWARD, Kind.HEAD_BACKWARD)
"""What one device runs that holds the original network."""


def _spans(timeline: Timeline) -> dict[str, Any]:
    critical = {id(span) for _, span in timeline.critical_path}
    spans = [
        [
            rank, span.instruction.kind.value, *span.instruction.key, span.start, span.end,
            int(id(span) in critical),
        ]
        for rank, own in enumerate(timeline.spans)
        for span in own
        if span.end > span.start and span.instruction.kind not in (*SENDS, *RECEIVES)
    ]  # fmt: skip
    return {"time": timeline.time, "idle": list(timeline.idle), "spans": spans}
