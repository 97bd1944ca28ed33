"""The terminal report: what was decided per stage, and what the whole promises."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape as _escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pnn_compile.export import format as units
from pnn_compile.export.partition_graph import partition_graph
from pnn_compile.report.tables import figures_table

if TYPE_CHECKING:
    from passes.coarse.spec import OperatorSpec
    from passes.plan.schema import Interface, Plan, Stage
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.fit.calibrate import CalibrationReport
    from pnn_compile.fit.train import FitReport

__all__ = [
    "calibration_table", "checks_table", "interfaces_table", "render", "report", "stage_tree",
    "to_text",
]  # fmt: skip


def render(compiled: Compiled, width: int = 100) -> str:
    """Return the report as plain text of at most `width` columns."""
    return to_text(report(compiled, width), width)


def to_text(content: RenderableType, width: int = 100) -> str:
    """Render rich content as plain text without colour."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(content)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def report(compiled: Compiled, width: int = 100) -> RenderableType:
    """The stages as a table, then the forecast, the notes and the seconds per pass."""
    plan = compiled.plan
    parts: list[RenderableType] = [_stages(plan, width), _summary(compiled)]
    parts += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    taken = ", ".join(f"{p.name} {units.seconds(p.seconds)}" for p in compiled.passes)
    parts.append(Text(f"passes: {taken}", style="dim"))
    return Group(*parts)


def _stages(plan: Plan, width: int) -> Table:
    """One row a stage; a narrow terminal gets the columns that matter most."""
    table = Table(
        title=f"{plan.model}: {len(plan.stages)} stages, {plan.correction} form, "
        f"{plan.sweep} sweep, K = {plan.iterations}",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    columns = _columns(plan, width)
    for name in columns:
        if name in ("modules", "guess", "coarse", "state out"):
            table.add_column(name, overflow="fold", min_width=16 if name == "modules" else None)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    total = sum(stage.flops for stage in plan.stages) + plan.head.flops or 1
    for number, (stage, interface) in enumerate(zip(plan.stages, plan.interfaces, strict=True)):
        cells = {
            "stage": str(number),
            "modules": _span(stage),
            "FLOPs": units.count(stage.flops),
            "share": f"{stage.flops / total:.1%}",
            "time": units.seconds(stage.seconds or 0.0),
            "params": units.count(stage.parameters),
            "device": stage.device or "",
            "memory": units.size(stage.memory or 0),
            "guess": _operator(stage.preprocess),
            "coarse": _operator(stage.coarse),
            "state out": _brief_state(interface),
        }
        table.add_row(*(cells[name] for name in columns))
    head = plan.head
    cells = {
        "stage": "head",
        "modules": head.first_module or "(output)",
        "FLOPs": units.count(head.flops),
        "share": f"{head.flops / total:.1%}",
        "time": units.seconds(head.seconds or 0.0),
    }
    table.add_row(*(cells.get(name, "") for name in columns))
    return table


_NARROW = 84


def _columns(plan: Plan, width: int) -> list[str]:
    columns = ["stage", "modules", "FLOPs", "share"]
    if any(stage.seconds is not None for stage in plan.stages):
        columns.append("time")
    if any(stage.device is not None for stage in plan.stages):
        columns += ["device", "memory"]
    if width < _NARROW:
        return [*columns, "coarse"]
    return [*columns, "params", "guess", "coarse", "state out"]


def _span(stage: Stage) -> str:
    first, last = stage.first_module or stage.first, stage.last_module or stage.last
    return first if first == last else f"{first} .. {last}"


def _operator(spec: OperatorSpec | None) -> str:
    return f"{spec.family} {units.count(spec.flops)}" if spec else "-"


def _state(interface: Interface) -> str:
    types = " + ".join(str(value.spec) for value in interface.state)
    return f"{types} ({units.size(interface.bytes)})"


def _brief_state(interface: Interface) -> str:
    """Sizes of one sample, without the batch and the type; only the number of several tensors."""
    if len(interface.state) > 1:
        return f"{len(interface.state)} tensors, {units.size(interface.bytes)}"
    spec = interface.state[0].spec
    sizes = [str(n) for axis, n in enumerate(spec.shape) if axis != spec.batch_axis]
    return f"{'x'.join(sizes)}, {units.size(interface.bytes)}"


def _summary(compiled: Compiled) -> Table:
    plan, forecast = compiled.plan, compiled.plan.forecast
    table = Table.grid(padding=(0, 2))
    links = f"take {units.seconds(forecast.link)} of it" if forecast.link else "not counted"
    rows = [
        ("captured by", compiled.program.capture.rung),
        ("batch size", "free" if compiled.program.dynamic_batch else "fixed"),
        (
            "imbalance",
            f"{forecast.imbalance:.3f} (slowest stage over mean); "
            f"the cut is within {forecast.gap:.2%} of the best",
        ),
        ("other cuts", _other_cuts(plan)),
        (
            "serial share",
            f"{forecast.serial_share:.1%} of the original (coarse sweep and head)",
        ),
        (
            "speed-up",
            f"{forecast.speedup:.2f} predicted by {forecast.unit}, links {links}; "
            f"bound {forecast.bound:.2f} on {len(plan.stages)} devices",
        ),
    ]
    if plan.ties:
        shared = [f"{name} (stages {_numbers(where, plan)})" for name, where in plan.ties.items()]
        rows.append(("shared", _shortened(shared)))
    if compiled.timings is not None:
        rows.append(("timings", f"kept in {compiled.timings}; without it they are measured anew"))
    for name, text in filter(lambda row: row[1], rows):
        table.add_row(Text(name, style="bold"), text)
    return table


def _other_cuts(plan: Plan) -> str:
    """Where each cut would go next, by the stage that begins there."""
    known = [(n, f.why) for n, f in enumerate(plan.interfaces[:-1], 1) if f.why]
    return _shortened([f"stage {n}: {why}" for n, why in known], most=3)


def _numbers(stages: Iterable[int], plan: Plan) -> str:
    return ", ".join("head" if n == len(plan.stages) else str(n) for n in stages)


def _shortened(items: list[str], most: int = 4) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def checks_table(report: VerifyReport) -> Table:
    """The checks of a verification as a table."""
    table = Table(title="verification", title_justify="left", box=box.SIMPLE)
    table.add_column("check", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for check in report.checks:
        verdict = Text("passed", style="green") if check.passed else Text("FAILED", style="red")
        table.add_row(
            check.name if check.passed else f"{check.name}\n{check.reason}",
            "" if check.error is None else f"{check.error:.1e}",
            "" if check.limit is None else f"{check.limit:.0e}",
            verdict,
        )
    return table


def calibration_table(report: CalibrationReport) -> RenderableType:
    """What calibration did per stage, and what that means for the outputs."""
    table = figures_table(
        f"calibration on {report.fitted} samples, judged on {report.held_out} others",
        ("stage", "guess", "fine alone", "corrected"),
    )
    for face in report.interfaces:
        table.add_row(
            str(face.stage),
            f"{face.guess_before:.3f} -> {face.guess_after:.3f}",
            f"{face.uncorrected:.3f}",
            f"{face.corrected_before:.3f} -> {face.corrected_after:.3f}",
        )
    found = Text(
        "relative errors of the states; "
        + _agreed(report.agreement_before, report.agreement_after)
        + "relative error of the outputs "
        f"{report.output_error_before:.3f} -> {report.output_error_after:.3f}"
    )
    if report.recalibrated:
        found.append(f"; BatchNorm statistics measured anew: {', '.join(report.recalibrated)}")
    return Group(table, found)


def interfaces_table(report: FitReport) -> Table:
    """What the fit did at every interface before it went end to end."""
    table = figures_table(
        f"losses by interface, {report.interface_steps} steps", ("stage", "guess", "correction")
    )
    for face in report.interfaces:
        table.add_row(
            str(face.stage),
            f"{face.guess_first:.3g} -> {face.guess_last:.3g}",
            f"{face.correction_first:.3g} -> {face.correction_last:.3g}",
        )
    return table


def _agreed(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return f"agreement of the outputs with the original {before:.1%} -> {after:.1%}; "


def stage_tree(compiled: Compiled, depth: int = 2) -> Tree:
    """The stages as a tree of the modules inside them, with what each costs.

    Args:
        compiled: The network.
        depth: How many levels of the module path to show.
    """
    plan = compiled.plan
    root = Tree(f"[bold]{_escape(plan.model)}[/bold]")
    total = sum(stage.flops for stage in plan.stages) + plan.head.flops or 1
    costs = _costs_by_module(compiled, depth)
    for number, (stage, interface) in enumerate(zip(plan.stages, plan.interfaces, strict=True)):
        measured = f", {units.seconds(stage.seconds)}" if stage.seconds is not None else ""
        branch = root.add(
            f"[bold]stage {number}[/bold]: {units.count(stage.flops)} FLOPs "
            f"({stage.flops / total:.1%}){measured}, {units.count(stage.parameters)} parameters, "
            f"{stage.nodes} nodes"
        )
        if stage.preprocess:
            branch.add(f"[cyan]preprocess_{number}[/cyan] {_operator(stage.preprocess)}")
        fine = branch.add(f"[blue]fine_{number}[/blue] {_escape(_span(stage))}")
        _add_modules(fine, costs[number])
        if stage.coarse:
            why = f" [dim]{_escape(stage.coarse.why)}[/dim]" if stage.coarse.why else ""
            branch.add(f"[green]coarse_{number}[/green] {_operator(stage.coarse)}{why}")
        branch.add(f"[dim]state out[/dim] {_escape(_state(interface))}")
    head = root.add(f"[magenta]head[/magenta]: {units.count(plan.head.flops)} FLOPs")
    _add_modules(head, costs[-1])
    return root


_MOST_MODULES = 6


def _add_modules(branch: Tree, costs: dict[str, int]) -> None:
    """Add modules in the order of the graph; a long list keeps its ends."""
    items = list(costs.items())
    shown = items
    if len(items) > _MOST_MODULES:
        half = _MOST_MODULES // 2
        shown = [*items[:half], ("", 0), *items[-half:]]
    for name, flops in shown:
        if name:
            branch.add(f"{_escape(name)} {units.count(flops)}")
        else:
            branch.add(f"[dim]... {len(items) - _MOST_MODULES} more[/dim]")


def _costs_by_module(compiled: Compiled, depth: int) -> dict[int, dict[str, int]]:
    """FLOPs by stage (-1 for the head) and by the first atoms of the module path."""
    found: dict[int, dict[str, int]] = {n: {} for n in range(-1, len(compiled.plan.stages))}
    for _, data in partition_graph(compiled).nodes(data=True):
        if data["role"] in ("fine", "head"):
            name = ".".join(data["path"].split(".")[:depth]) or "(model)"
            modules = found[data["stage"]]
            modules[name] = modules.get(name, 0) + data["flops"]
    return found
