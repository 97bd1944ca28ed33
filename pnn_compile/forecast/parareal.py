"""The row of a parareal network: its plan, its instruction lists, and what they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from passes.partition.choose_cuts import choose_cut
from passes.plan.build import make_plan
from passes.plan.estimate import find_bottleneck, slowest_is_block
from passes.plan.schema import Plan
from passes.schedule.instruction import Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Times, simulate
from pnn_compile.forecast.setting import Setting, free, parts_of, sent
from pnn_compile.forecast.table import ForecastRow

__all__ = ["parareal_row", "plan_row"]

_OWN = (Kind.GUESS, Kind.GUESS_BACKWARD, Kind.CORRECT, Kind.COARSE_BACKWARD)
"""What only a parareal network does."""


def parareal_row(setting: Setting, sweep: str, stages: int) -> ForecastRow:
    """Cut and plan for so many stages, and simulate a step.

    Raises:
        PartitionError: The model has too few legal cuts.
        SynthesisError: There is no such network.
    """
    options = dataclasses.replace(setting.options, stages=stages, sweep=sweep)
    plan = make_plan(setting.analysis, choose_cut(setting.analysis, options), options)
    return plan_row(setting, plan)


def plan_row(setting: Setting, plan: Plan) -> ForecastRow:
    """Simulate a step of a plan, one stage a device."""
    count = len(plan.stages)
    times = Times.of(plan, latency=setting.latency, bandwidth=setting.bandwidth)
    lists = schedule(range(count), Sweep.of(plan), backward=setting.training)
    timeline = simulate(lists, times)
    sequential = setting.sequential
    parts = parts_of(timeline)
    speedup = sequential / timeline.time if timeline.time else 1.0
    freely = simulate(lists, free(times, *_OWN)).time
    return ForecastRow(
        stages=count,
        method=plan.sweep,
        time=timeline.time,
        speedup=speedup,
        bound=sequential / freely if freely else 1.0,
        efficiency=speedup / count,
        memory=_memory(setting, plan),
        link_bytes=sent(lists, times),
        parts=parts,
        limit=_limit(setting, plan, parts),
    )


def _memory(setting: Setting, plan: Plan) -> tuple[float, ...]:
    """Bytes that every device holds, the last one with the head."""
    order = setting.analysis.frontiers.order
    place = {node.name: index for index, node in enumerate(order)}
    starts = [place[stage.first] for stage in plan.stages]
    stops = [*starts[1:], len(order)]
    held = [setting.memory.span(*span) for span in zip(starts, stops, strict=True)]
    for number, stage in enumerate(plan.stages[1:], 1):
        entering = plan.interfaces[number - 1].bytes
        held[number] += setting.memory.entry(stage.operator_parameters, entering)
    return tuple(held)


def _limit(setting: Setting, plan: Plan, parts: Mapping[str, float]) -> str:
    found = find_bottleneck(parts, setting.sequential, len(plan.stages))
    if found != "fine":
        return found
    return "block" if slowest_is_block(setting.analysis, plan, setting.whole) else "imbalance"
