"""Compare two plans: which cuts moved, and how costs and forecast change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from pnn_compile.export.graph_formats import format_count, format_seconds, format_size
from pnn_compile.report.tables import figures_table
from pnn_compile.report.terminal import module_span, operator_summary

if TYPE_CHECKING:
    from passes.plan.schema import Plan, Stage

_T = TypeVar("_T")


@dataclass(frozen=True)
class Change:
    """A number or an option in both plans.

    Attributes:
        name: Its name.
        before: Its value in the plan compared with, as plain data for JSON.
        after: Its value in this plan.
    """

    name: str
    before: str | float | int | None
    after: str | float | int | None


@dataclass(frozen=True)
class StageChange:
    """A stage in both plans, values before and after; None in a plan that has fewer stages.

    Attributes:
        stage: Number of the stage.
        moved: Whether it begins or ends at another node.
        spans: First and last module.
        flops: FLOPs of the fine stage.
        bytes: Bytes of the state that leaves it.
        guess: Family and FLOPs of the preprocessing operator.
        coarse: Family and FLOPs of the coarse propagator.
    """

    stage: int
    moved: bool
    spans: tuple[str | None, str | None]
    flops: tuple[int | None, int | None]
    bytes: tuple[int | None, int | None]
    guess: tuple[str | None, str | None]
    coarse: tuple[str | None, str | None]

    @property
    def changed(self) -> bool:
        """Whether anything about it differs."""
        pairs = (self.flops, self.bytes, self.guess, self.coarse)
        return self.moved or any(before != after for before, after in pairs)


@dataclass(frozen=True)
class Comparison:
    """Changes from one plan to another.

    Attributes:
        same_program: Whether both plans belong to the same program.
        decisions: Options of the whole plan that differ.
        stages: All stages, by number.
        forecast: The numbers of both forecasts, equal ones included.
    """

    same_program: bool
    decisions: tuple[Change, ...]
    stages: tuple[StageChange, ...]
    forecast: tuple[Change, ...]


def compare(before: Plan, after: Plan) -> Comparison:
    """Compare the plan `after` with the plan `before`."""
    options = (
        "model", "windows", "correction", "sweep", "iterations", "tolerance", "cost", "seed",
    )  # fmt: skip
    decisions = [Change(key, getattr(before, key), getattr(after, key)) for key in options]
    decisions.insert(0, Change("stages", len(before.stages), len(after.stages)))
    count = max(len(before.stages), len(after.stages))
    figures = ("sequential", "makespan", "serial", "time", "speedup", "bound", "imbalance")
    forecasts = before.forecast, after.forecast
    forecast = [Change("unit", *(f.unit for f in forecasts))]
    forecast += [Change(key, *(getattr(f, key) for f in forecasts)) for key in figures]
    return Comparison(
        same_program=before.fingerprint == after.fingerprint,
        decisions=tuple(change for change in decisions if change.before != change.after),
        stages=tuple(_stage(before, after, number) for number in range(count)),
        forecast=tuple(forecast),
    )


def _stage(before: Plan, after: Plan, number: int) -> StageChange:
    def both(read: Callable[[Plan, Stage], _T]) -> tuple[_T | None, _T | None]:
        values = [
            read(plan, plan.stages[number]) if number < len(plan.stages) else None
            for plan in (before, after)
        ]
        return values[0], values[1]

    ends = both(lambda _, stage: (stage.first, stage.last))
    return StageChange(
        stage=number,
        moved=ends[0] != ends[1],
        spans=both(lambda _, stage: module_span(stage)),
        flops=both(lambda _, stage: stage.flops),
        bytes=both(lambda plan, _: plan.interfaces[number].bytes),
        guess=both(lambda _, stage: operator_summary(stage.preprocess)),
        coarse=both(lambda _, stage: operator_summary(stage.coarse)),
    )


def comparison_table(
    comparison: Comparison, names: tuple[str, str] = ("before", "after")
) -> RenderableType:
    """Show the options that differ, then the stages and the forecasts side by side.

    Args:
        comparison: The comparison.
        names: Names of the two plans, for the title.
    """
    head = Text(f"{names[0]} -> {names[1]}", style="bold")
    parts: list[RenderableType] = [head]
    if not comparison.same_program:
        parts.append(
            Text(
                "plans of different programs: equal node names may mean other nodes", style="yellow"
            )
        )
    parts += [
        Text(f"{change.name}: {change.before} -> {change.after}") for change in comparison.decisions
    ]
    parts.append(_stages_table(comparison))
    parts.append(_forecast_table(comparison.forecast))
    return Group(*parts)


def _stages_table(comparison: Comparison) -> RenderableType:
    moved = sum(stage.moved for stage in comparison.stages)
    title = f"{moved} of {len(comparison.stages)} stages begin or end elsewhere"
    table = figures_table(
        title, ("stage", "modules", "FLOPs", "state out", "guess", "coarse"),
        words=("modules", "guess", "coarse"),
    )  # fmt: skip
    for stage in comparison.stages:
        style = None if stage.changed else "dim"
        cells = (
            _arrow(stage.spans), _arrow(stage.flops, format_count),
            _arrow(stage.bytes, format_size), _arrow(stage.guess), _arrow(stage.coarse),
        )  # fmt: skip
        table.add_row(str(stage.stage), *map(Text, cells), style=style)
    return table


def _arrow(pair: tuple[_T | None, _T | None], format_value: Callable[[_T], str] = str) -> str:
    before, after = ("-" if value is None else format_value(value) for value in pair)
    return after if before == after else f"{before} -> {after}"


_RATIOS = ("speedup", "bound", "imbalance")
"""Numbers without a unit."""


def _forecast_table(changes: tuple[Change, ...]) -> RenderableType:
    table = figures_table("forecast", ("", "before", "after", "change"), words=("",))
    unit_before, unit_after = changes[0].before, changes[0].after
    for change in changes:
        if isinstance(change.before, str) or isinstance(change.after, str):
            table.add_row(change.name, str(change.before), str(change.after), "")
            continue
        assert change.before is not None
        assert change.after is not None
        comparable = change.name in _RATIOS or unit_before == unit_after
        share = f"{change.after / change.before - 1:+.1%}" if comparable and change.before else ""
        cells = [_forecast_cell(change.name, value) for value in (change.before, change.after)]
        table.add_row(change.name, *cells, share)
    return table


def _forecast_cell(name: str, value: float) -> str:
    if name in _RATIOS:
        return f"{value:.3f}"
    # The plan's costs are either seconds, far below 1, or counts.
    return format_count(value) if value >= 1 or not value else format_seconds(value)
