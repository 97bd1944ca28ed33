"""Show a compiled network, its verification and its fit in the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from passes.errors import amount, printable
from pnn_compile.export.graph_formats import format_count, format_seconds, format_size
from pnn_compile.export.partition_graph import partition_graph
from pnn_compile.inputs import batch_size
from pnn_compile.report.tables import Titled, figures_table

if TYPE_CHECKING:
    from passes.coarse.spec import OperatorSpec
    from passes.plan.schema import Interface, Plan, Stage
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.fit.calibrate import CalibrationReport
    from pnn_compile.fit.train import FitReport


class PlainConsole(Console):
    """A console that shows text as it is: names of a model or a file are no markup and no codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render anything; control characters are written out."""
        for segment in super().render(renderable, options):
            plain = segment.control or segment.text.isprintable()
            yield segment if plain else Segment(printable(segment.text), segment.style)


def render(compiled: Compiled, width: int = 100) -> str:
    """Return the report as plain text of at most `width` columns."""
    return to_text(report(compiled, width), width)


def to_text(content: RenderableType, width: int = 100) -> str:
    """Render rich content as plain text without colors."""
    console = PlainConsole(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(content)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def report(compiled: Compiled, width: int = 100) -> RenderableType:
    """Show the stages as a table, a summary, notes, seconds of each pass, and the calibration.

    Args:
        compiled: The network.
        width: Columns of the terminal; fewer than 84 leave out columns of the table.
    """
    plan = compiled.plan
    parts: list[RenderableType] = [_stages_table(plan, width), _summary(compiled)]
    parts += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    passes = ", ".join(f"{p.name} {format_seconds(p.seconds)}" for p in compiled.passes)
    parts.append(Text(f"passes: {passes}", style="dim"))
    if compiled.calibration is not None:
        parts.append(calibration_table(compiled.calibration))
    return Group(*parts)


def _stages_table(plan: Plan, width: int) -> Table:
    """Make a table with one row per stage and one for the head."""
    table = Titled(f"{plan.model}: {plan.form}", padding=(0, 1, 0, 0))
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
            "modules": module_span(stage),
            "FLOPs": format_count(stage.flops),
            "share": f"{stage.flops / total:.1%}",
            "time": format_seconds(stage.seconds or 0.0),
            "params": format_count(stage.parameters),
            "device": stage.device or "",
            "memory": format_size(stage.memory or 0),
            "guess": operator_summary(stage.preprocess) or "-",
            "coarse": operator_summary(stage.coarse) or "-",
            "state out": _state_summary(interface),
        }
        table.add_row(*(cells[name] for name in columns))
    head = plan.head
    cells = {
        "stage": "head",
        "modules": head.first_module or "(output)",
        "FLOPs": format_count(head.flops),
        "share": f"{head.flops / total:.1%}",
        "time": format_seconds(head.seconds or 0.0),
    }
    table.add_row(*(cells.get(name, "") for name in columns))
    return table


_WIDE = 84
"""Smallest number of columns for the whole table."""


def _columns(plan: Plan, width: int) -> list[str]:
    columns = ["stage", "modules", "FLOPs", "share"]
    if any(stage.seconds is not None for stage in plan.stages):
        columns.append("time")
    if any(stage.device is not None for stage in plan.stages):
        columns += ["device", "memory"]
    if width < _WIDE:
        return [*columns, "coarse"]
    return [*columns, "params", "guess", "coarse", "state out"]


def module_span(stage: Stage) -> str:
    """Return the first and the last module of a stage, or its nodes where it has no modules."""
    first, last = stage.first_module or stage.first, stage.last_module or stage.last
    return first if first == last else f"{first} .. {last}"


def operator_summary(spec: OperatorSpec | None) -> str | None:
    """Return family and FLOPs of an operator; None without one."""
    return f"{spec.family} {format_count(spec.flops)}" if spec else None


def _state(interface: Interface) -> str:
    types = " + ".join(str(value.spec) for value in interface.state)
    return f"{types} ({format_size(interface.bytes)})"


def _state_summary(interface: Interface) -> str:
    """Return the shape of one sample, or the number of tensors if they are several, and bytes."""
    if len(interface.state) > 1:
        return f"{len(interface.state)} tensors, {format_size(interface.bytes)}"
    spec = interface.state[0].spec
    sizes = [str(n) for axis, n in enumerate(spec.shape) if axis != spec.batch_axis]
    return f"{'x'.join(sizes)}, {format_size(interface.bytes)}"


def _summary(compiled: Compiled) -> Table:
    plan, forecast = compiled.plan, compiled.plan.forecast
    table = Table.grid(padding=(0, 2))
    links = f"take {format_seconds(forecast.link)}" if forecast.link else "not counted"
    rows = [
        ("captured by", compiled.program.capture.rung),
        ("validated", compiled.program.capture.compared),
        (
            "batch size",
            f"{'free' if 'batch' in compiled.program.dynamic else 'fixed'}; FLOPs and bytes are of "
            f"{amount(batch_size(compiled.program.args), 'sample')}",
        ),
        ("sequence", "free" if "sequence" in compiled.program.dynamic else ""),
        (
            "imbalance",
            f"{forecast.imbalance:.3f} (slowest stage over mean); "
            f"the cut is within {forecast.gap:.2%} of the best",
        ),
        ("other cuts", _other_cuts(plan)),
        ("coarse", _coarse_choices(plan)),
        (
            "serial share",
            f"{forecast.serial_share:.1%} of the original (coarse sweep and head)",
        ),
        (
            "speed-up",
            f"{forecast.speedup:.2f} predicted by {forecast.unit}, links {links}; "
            f"bound {forecast.bound:.2f} on {amount(plan.devices, 'device')}",
        ),
    ]
    if plan.ties:
        shared = [f"{name} ({_which(at, plan)})" for name, at in plan.ties.items()]
        rows.append(("shared", _shortened(shared)))
    if compiled.timings is not None:
        rows.append(("timings", f"stored in {compiled.timings}; delete it to measure again"))
    for name, text in filter(lambda row: row[1], rows):
        table.add_row(Text(name, style="bold"), text)
    return table


def _coarse_choices(plan: Plan) -> str:
    """Return why the family of each coarse propagator was chosen, each reason once."""
    stages: dict[str, list[int]] = {}
    for number, stage in enumerate(plan.stages):
        if stage.coarse is not None:
            stages.setdefault(f"{stage.coarse.family}: {stage.coarse.why}", []).append(number)
    return "; ".join(
        reason if len(stages) == 1 else f"{_which(numbers, plan)}, {reason}"
        for reason, numbers in stages.items()
    )


def _other_cuts(plan: Plan) -> str:
    """Return the second-best position of each cut, by the stage that begins there."""
    reasons = [
        f"stage {number}: {interface.why}"
        for number, interface in enumerate(plan.interfaces[:-1], 1)
        if interface.why
    ]
    return _shortened(reasons, limit=3)


def _which(stages: Sequence[int], plan: Plan) -> str:
    return f"{'stage' if len(stages) == 1 else 'stages'} {_numbers(stages, plan)}"


def _numbers(stages: Iterable[int], plan: Plan) -> str:
    return ", ".join("head" if n == len(plan.stages) else str(n) for n in stages)


def _shortened(items: list[str], limit: int = 4) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def checks_table(report: VerifyReport) -> Table:
    """Show the checks of a verification, failed ones with their reason."""
    table = Titled("verification")
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


_CONVERTED = (
    "a fit keeps more: calibrated and fitted for a tenth of their training, well trained networks "
    "lost 5.2 and 4.1 points in one window (VGG-16 / 8 and a residual network, N = 3), and 0.8 in "
    "six (a ResNet of 18 units; 0.5 with preprocess='identity', coarse='identity')"
)
"""What the studies of conversion measured at convergence, with one to four trainings."""


def calibration_table(report: CalibrationReport) -> RenderableType:
    """Show the errors of every stage before and after calibration, then those of the outputs."""
    table = figures_table(
        f"calibration on {report.fitted} samples, errors on {report.held_out} held-out samples",
        ("stage", "guess", "fine alone", "corrected"),
    )
    for interface in report.interfaces:
        table.add_row(
            str(interface.stage),
            f"{interface.guess_before:.3f} -> {interface.guess_after:.3f}",
            f"{interface.uncorrected:.3f}",
            f"{interface.corrected_before:.3f} -> {interface.corrected_after:.3f}",
        )
    summary = Text(
        "relative errors of the states; "
        + _agreement(report.agreement_before, report.agreement_after)
        + "relative error of the outputs "
        f"{report.output_error_before:.3f} -> {report.output_error_after:.3f}"
    )
    if report.recalibrated:
        summary.append(f"; BatchNorm statistics re-estimated: {', '.join(report.recalibrated)}")
    return Group(table, summary, Text(_CONVERTED))


def interfaces_table(report: FitReport) -> Table:
    """Show the losses of a fit at every interface, before the training end to end."""
    table = figures_table(
        f"losses by interface, {report.interface_steps} steps", ("stage", "guess", "correction")
    )
    for interface in report.interfaces:
        table.add_row(
            str(interface.stage),
            f"{interface.guess_first:.3g} -> {interface.guess_last:.3g}",
            f"{interface.correction_first:.3g} -> {interface.correction_last:.3g}",
        )
    return table


def _agreement(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return f"agreement of the outputs with the original {before:.1%} -> {after:.1%}; "


def stage_tree(compiled: Compiled, depth: int = 2) -> Tree:
    """Show the stages as a tree of their modules, with FLOPs.

    Args:
        compiled: The network.
        depth: Number of levels of the module path to show.
    """
    plan = compiled.plan
    root = Tree(Text(plan.model, style="bold"))
    total = sum(stage.flops for stage in plan.stages) + plan.head.flops or 1
    module_flops = _flops_by_module(compiled, depth)
    for number, (stage, interface) in enumerate(zip(plan.stages, plan.interfaces, strict=True)):
        measured = f", {format_seconds(stage.seconds)}" if stage.seconds is not None else ""
        branch = root.add(
            _labeled(
                f"stage {number}", "bold",
                f": {format_count(stage.flops)} FLOPs ({stage.flops / total:.1%}){measured}, "
                f"{format_count(stage.parameters)} parameters, {stage.nodes} nodes",
            )
        )  # fmt: skip
        if stage.preprocess:
            summary = f" {operator_summary(stage.preprocess)}"
            branch.add(_labeled(f"preprocess_{number}", "cyan", summary))
        fine = branch.add(_labeled(f"fine_{number}", "blue", f" {module_span(stage)}"))
        _add_modules(fine, module_flops[number])
        if stage.coarse:
            label = _labeled(f"coarse_{number}", "green", f" {operator_summary(stage.coarse)}")
            branch.add(label.append(f" {stage.coarse.why}".rstrip(), style="dim"))
        branch.add(_labeled("state out", "dim", f" {_state(interface)}"))
    head = root.add(_labeled("head", "magenta", f": {format_count(plan.head.flops)} FLOPs"))
    _add_modules(head, module_flops[-1])
    return root


def _labeled(label: str, style: str, rest: str) -> Text:
    return Text.assemble((label, style), rest)


_MAX_MODULES = 6


def _add_modules(branch: Tree, module_flops: dict[str, int]) -> None:
    """Add modules in the order of the graph, of a long list the first and the last ones."""
    lines = [Text(f"{name} {format_count(flops)}") for name, flops in module_flops.items()]
    if len(lines) > _MAX_MODULES:
        half = _MAX_MODULES // 2
        more = Text(f"... {len(lines) - _MAX_MODULES} more", style="dim")
        lines = [*lines[:half], more, *lines[-half:]]
    for line in lines:
        branch.add(line)


def _flops_by_module(compiled: Compiled, depth: int) -> dict[int, dict[str, int]]:
    """Sum FLOPs by stage (-1 for the head), then by the first names of the module path."""
    totals: dict[int, dict[str, int]] = {n: {} for n in range(-1, len(compiled.plan.stages))}
    for _, data in partition_graph(compiled).nodes(data=True):
        if data["role"] in ("fine", "head"):
            name = ".".join(data["path"].split(".")[:depth]) or "(model)"
            modules = totals[data["stage"]]
            modules[name] = modules.get(name, 0) + data["flops"]
    return totals
