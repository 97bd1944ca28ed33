"""Gather what the HTML page shows, as plain data for JSON."""

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
    from pnn_compile.report.pictures import PictureRow


def page_data(
    compiled: Compiled,
    dial: Sequence[DialRow] = (),
    forecast: ForecastTable | None = None,
    pictures: Sequence[PictureRow] = (),
) -> dict[str, Any]:
    """Gather what the page shows of a compiled network.

    Args:
        compiled: The network.
        dial: Errors by number of iterations, from `pnn.dial`; empty leaves them out.
        forecast: Forecast of other numbers of devices.
        pictures: Samples of the original and its iterates.

    Returns:
        One entry per section of the page; those without data are None or empty.
    """
    plan = compiled.plan
    calibration = compiled.calibration
    capture = compiled.program.capture
    return {
        "plan": _plan(plan),
        "capture": {
            "rung": capture.rung,
            "compared": capture.compared,
            "rejected": list(capture.rejected),
            "dynamic": list(compiled.program.dynamic),
        },
        "passes": [[result.name, result.seconds] for result in compiled.passes],
        "graph": graph_data(partition_graph(compiled), len(plan.stages)),
        "forecast": forecast_data(forecast) if forecast else None,
        "timeline": timeline_data(plan),
        "calibration": dataclasses.asdict(calibration) if calibration else None,
        "dial": [dataclasses.asdict(row) for row in dial],
        "pictures": [dataclasses.asdict(row) for row in pictures],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    """Describe the plan, without the options that only rebuilding a network needs."""
    data = dataclasses.asdict(plan)
    for stage_data, stage in zip(data["stages"], plan.stages, strict=True):
        stage_data["preprocess"] = _operator(stage.preprocess)
        stage_data["coarse"] = _operator(stage.coarse)
    for interface_data, interface in zip(data["interfaces"], plan.interfaces, strict=True):
        interface_data["bytes"] = interface.bytes
        interface_data["state"] = [[value.name, str(value.spec)] for value in interface.state]
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
    """Describe the rows of all methods with at least two, which can be drawn as lines.

    The "knee" is the row that the forecast recommends, if more devices were looked at.
    """
    rows = [
        row for method in table.methods for row in table.of(method) if len(table.of(method)) > 1
    ]
    best = table.best if set(table.methods) & set(PARAREAL) else None
    most = max((row.stages for row in rows), default=0)
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
                "knee": row is best and row.stages < most,
            }
            for row in rows
        ],
    }


def timeline_data(plan: Plan) -> dict[str, Any]:
    """Simulate one training step of a plan, one stage per rank, with free links.

    Returns:
        The unit, the times of the original network forward and backward, and under "steps", for
        one micro-batch and for four, the time of the step and its spans: rank, kind, stage,
        micro-batch, iteration, start, end, whether it is on the critical path. Only "reason" where
        the plan does not store the costs of stages.
    """
    try:
        times = Times.of(plan)
    except RuntimeFault as error:
        return {"reason": str(error)}
    sweep, placement = Sweep.of(plan), plan.placement
    original = {key: time for key, time in times.compute.items() if key[0] in _ORIGINAL}
    forward = sum(time for (kind, _), time in original.items() if kind in (Kind.FINE, Kind.HEAD))
    return {
        "unit": plan.forecast.unit,
        "forward": forward,
        "backward": sum(original.values()) - forward,
        "steps": [
            {"batches": batches}
            | _spans(simulate(schedule(placement, sweep, batches=batches), times))
            for batches in (1, 4)
        ],
    }


_ORIGINAL = (Kind.FINE, Kind.HEAD, Kind.FINE_BACKWARD, Kind.HEAD_BACKWARD)
"""Instructions of the original network on one device."""


def _spans(timeline: Timeline) -> dict[str, Any]:
    critical = {id(span) for _, span in timeline.critical_path}
    spans = [
        [
            rank, span.instruction.kind.value, *span.instruction.key, span.start, span.end,
            int(id(span) in critical),
        ]
        for rank, rank_spans in enumerate(timeline.spans)
        for span in rank_spans
        if span.end > span.start and span.instruction.kind not in (*SENDS, *RECEIVES)
    ]  # fmt: skip
    return {"time": timeline.time, "idle": list(timeline.idle), "spans": spans}
