"""Two plans side by side: which cuts moved, and what that does to costs and forecast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from pnn_compile.export import format as units
from pnn_compile.report.tables import figures_table

if TYPE_CHECKING:
    from passes.coarse.spec import OperatorSpec
    from passes.plan.schema import Plan, Stage

__all__ = ["Change", "Comparison", "StageChange", "compare", "comparison_table"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Change:
    """One figure or decision of both plans.

    Attributes:
        name: What it is.
        before: Its value in the other plan, as JSON can hold it.
        after: Its value in this one.
    """

    name: str
    before: str | float | int | None
    after: str | float | int | None


@dataclass(frozen=True)
class StageChange:
    """A stage of both plans; None in the plan that has fewer.

    Attributes:
        stage: Number of the stage.
        moved: Whether it begins or ends at another node.
        spans: First and last module, before and after.
        flops: Of the fine stage, before and after.
        bytes: That leave it, before and after.
        guess: Family of the guess, before and after.
        coarse: Family of the coarse propagator, before and after.
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
        """Whether anything of it differs."""
        pairs = (self.flops, self.bytes, self.guess, self.coarse)
        return self.moved or any(before != after for before, after in pairs)


@dataclass(frozen=True)
class Comparison:
    """What changed from one plan to another.

    Attributes:
        same_program: Whether both were made for the same program.
        decisions: Options of the whole plan that differ.
        stages: All stages, by number.
        forecast: The figures of both forecasts.
    """

    same_program: bool
    decisions: tuple[Change, ...]
    stages: tuple[StageChange, ...]
    forecast: tuple[Change, ...]


def compare(before: Plan, after: Plan) -> Comparison:
    """Compare two plans.

    Args:
        before: The plan to compare with.
        after: The plan to look at.
    """
    kept = ("model", "correction", "sweep", "iterations", "cost", "seed")
    decisions = [Change(key, getattr(before, key), getattr(after, key)) for key in kept]
    decisions.insert(0, Change("stages", len(before.stages), len(after.stages)))
    count = max(len(before.stages), len(after.stages))
    figures = ("sequential", "makespan", "serial", "time", "speedup", "bound", "imbalance")
    known = before.forecast, after.forecast
    forecast = [Change("unit", *(f.unit for f in known))]
    forecast += [Change(key, *(getattr(f, key) for f in known)) for key in figures]
    return Comparison(
        same_program=before.fingerprint == after.fingerprint,
        decisions=tuple(change for change in decisions if change.before != change.after),
        stages=tuple(_stage(before, after, number) for number in range(count)),
        forecast=tuple(forecast),
    )


def _stage(before: Plan, after: Plan, number: int) -> StageChange:
    def both(read: Callable[[Plan, Stage], _T]) -> tuple[_T | None, _T | None]:
        found = [
            read(plan, plan.stages[number]) if number < len(plan.stages) else None
            for plan in (before, after)
        ]
        return found[0], found[1]

    ends = both(lambda _, stage: (stage.first, stage.last))
    return StageChange(
        stage=number,
        moved=ends[0] != ends[1],
        spans=both(lambda _, stage: _span(stage)),
        flops=both(lambda _, stage: stage.flops),
        bytes=both(lambda plan, _: plan.interfaces[number].bytes),
        guess=both(lambda _, stage: _family(stage.preprocess)),
        coarse=both(lambda _, stage: _family(stage.coarse)),
    )


def _span(stage: Stage) -> str:
    first, last = stage.first_module or stage.first, stage.last_module or stage.last
    return first if first == last else f"{first} .. {last}"


def _family(spec: OperatorSpec | None) -> str | None:
    return f"{spec.family} {units.count(spec.flops)}" if spec else None


def comparison_table(
    found: Comparison, names: tuple[str, str] = ("before", "after")
) -> RenderableType:
    """Show what changed.

    Args:
        found: The comparison.
        names: What to call the two plans.
    """
    head = Text(f"{names[0]} -> {names[1]}", style="bold")
    parts: list[RenderableType] = [head]
    if not found.same_program:
        parts.append(
            Text("made for different programs: nodes cannot be told apart by name", style="yellow")
        )
    parts += [
        Text(f"{change.name}: {change.before} -> {change.after}") for change in found.decisions
    ]
    parts.append(_stages_table(found))
    parts.append(_forecast_table(found.forecast))
    return Group(*parts)


def _stages_table(found: Comparison) -> RenderableType:
    moved = sum(stage.moved for stage in found.stages)
    title = f"{moved} of {len(found.stages)} stages begin or end elsewhere"
    table = figures_table(
        title, ("stage", "modules", "FLOPs", "state out", "guess", "coarse"),
        names=("modules", "guess", "coarse"),
    )  # fmt: skip
    for stage in found.stages:
        style = None if stage.changed else "dim"
        cells = (
            _arrow(stage.spans), _arrow(stage.flops, units.count),
            _arrow(stage.bytes, units.size), _arrow(stage.guess), _arrow(stage.coarse),
        )  # fmt: skip
        table.add_row(str(stage.stage), *map(Text, cells), style=style)
    return table


def _arrow(pair: tuple[_T | None, _T | None], write: Callable[[_T], str] = str) -> str:
    before, after = ("-" if value is None else write(value) for value in pair)
    return after if before == after else f"{before} -> {after}"


def _forecast_table(changes: tuple[Change, ...]) -> RenderableType:
    table = figures_table("forecast", ("", "before", "after", "change"), names=("",))
    unit_before, unit_after = changes[0].before, changes[0].after
    for change in changes:
        if isinstance(change.before, str) or isinstance(change.after, str):
            table.add_row(change.name, str(change.before), str(change.after), "")
            continue
        assert change.before is not None
        assert change.after is not None
        alike = change.name in ("speedup", "bound", "imbalance") or unit_before == unit_after
        share = f"{change.after / change.before - 1:+.1%}" if alike and change.before else ""
        written = [_figure(change.name, value) for value in (change.before, change.after)]
        table.add_row(change.name, *written, share)
    return table


def _figure(name: str, value: float) -> str:
    return f"{value:.3f}" if name in ("speedup", "bound", "imbalance") else _cost(value)


def _cost(value: float) -> str:
    return units.count(value) if value >= 1 or not value else units.seconds(value)
