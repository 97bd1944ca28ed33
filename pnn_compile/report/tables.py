"""Show the results of commands as tables in the terminal, one function per kind of result.

    forecast_tables  `pnn-compile forecast`         the step time on N devices
    bench_table      `pnn-compile bench`            contenders on several processes
    streams_table    `pnn-compile bench --streams`  contenders on one GPU
    first_run_table  `pnn-compile run`              ranks of an artifact
    count_table      `pnn-compile forecast`         iterations of a tolerance
    dial_table       `pnn-compile dial`             error and speed-up of K iterations
    verdict_table    `pnn-compile assess`           parareal networks against early exits
    probe_table      `pnn-compile probe`            networks that were trained side by side
    onnx_table       `pnn-compile inspect x.onnx`   stages and roles of ONNX files

All of them are made of `figures_table`, as are those of the report (`terminal.py`, `compare.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from passes.errors import amount
from pnn_compile.export.graph_formats import format_count, format_seconds, format_size
from pnn_compile.forecast.table import PARAREAL, ForecastRow, ForecastTable

if TYPE_CHECKING:
    from pnn_compile.bench import Bench, Timing
    from pnn_compile.bench.first_run import FirstRun
    from pnn_compile.bench.gpu_streams import StreamBench
    from pnn_compile.evaluate.assess import Fidelity, Verdict
    from pnn_compile.evaluate.iterate import DialRow
    from pnn_compile.evaluate.probe import Probe
    from pnn_compile.export.onnx.read import OnnxSummary, RoleSummary
    from pnn_compile.forecast.count_iterations import IterationCount


class Titled(Table):
    """A table below a title that may be wider than the table."""

    def __init__(self, title: str, **settings: Any) -> None:
        super().__init__(box=box.SIMPLE, **settings)
        self._heading = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Show the title, then the table."""
        if self._heading:
            yield Text(self._heading, style="table.title")
        yield from super().__rich_console__(console, options)


def figures_table(title: str, columns: Sequence[str], *, words: Sequence[str] = ()) -> Table:
    """Make an empty table: numbers are right-aligned, the columns in `words` left-aligned."""
    table = Titled(title, padding=(0, 1, 0, 0), show_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# --- forecast -------------------------------------------------------------------------------------

_MAX_ROWS = 16


def forecast_tables(forecast: ForecastTable) -> RenderableType:
    """Show a forecast: one table per sweep, one of the other methods, then the verdict.

    Of many numbers of devices a selection is shown.
    """
    counts = _selected_counts(forecast)
    parts: list[RenderableType] = [Text(_forecast_title(forecast), style="bold")]
    parts += [
        _parareal_table(forecast, method, counts)
        for method in forecast.methods
        if method in PARAREAL
    ]
    rivals = [method for method in forecast.methods if method not in PARAREAL]
    if rivals:
        parts += [
            Text("the original network, by other methods"),
            _rivals_table(forecast, rivals, counts),
        ]
    total = len({row.stages for row in forecast.rows})
    if len(counts) < total:
        parts.append(Text(f"{len(counts)} of {total} rows; --json has all", style="dim"))
    notes = (*forecast.notes, *forecast.problems)
    parts += [Text(f"note: {note}", style="yellow") for note in notes]
    parts.append(Text(forecast.verdict))
    return Group(*parts)


def _forecast_title(forecast: ForecastTable) -> str:
    devices = " and ".join(forecast.devices) if forecast.devices else "this machine"
    cost = {"flops": "by FLOPs", "roofline": f"on {devices} by roofline"}.get(
        forecast.cost, "measured on this machine"
    )
    return (
        f"{forecast.model}, {_step_name(forecast.training)} of "
        f"{amount(forecast.batch, 'sample')}, {cost}: "
        f"{_forecast_time(forecast, forecast.sequential)} on one device"
    )


def _step_name(training: bool) -> str:
    return "training step" if training else "forward pass"


def _selected_counts(forecast: ForecastTable) -> list[int]:
    """Select the numbers of devices to show.

    All of them if they are few. Otherwise the smallest, the largest, the recommended ones, and in
    between about the same ratio from each to the next: 1, 2, 4, 8, ... of 1 to 64.
    """
    counts = sorted({row.stages for row in forecast.rows})
    if len(counts) <= _MAX_ROWS:
        return counts
    # The four rows to spare are the ends and the recommended rows of the two sweeps.
    ratio = (counts[-1] / counts[0]) ** (1 / (_MAX_ROWS - 4))
    selected = {counts[0], counts[-1]}
    selected |= {
        forecast.enough(method).stages for method in forecast.methods if method in PARAREAL
    }
    position = float(counts[0])
    while position < counts[-1]:
        selected.add(min(counts, key=lambda count: abs(count - position)))
        position = max(position * ratio, position + 1)
    return sorted(selected)


def _parareal_table(forecast: ForecastTable, method: str, counts: list[int]) -> Table:
    columns = ("N", "time", "speed-up", "bound", "efficiency", "most memory", "link", "limited by")
    windows = f", {forecast.windows} windows" if forecast.windows > 1 else ""
    table = figures_table(f"parareal, {method} sweep{windows}", columns, words=("limited by",))
    recommended = forecast.enough(method)
    for row in forecast.of(method):
        if row.stages in counts:
            style = "bold" if row is recommended else None
            table.add_row(*_forecast_cells(forecast, row), style=style)
    return table


def _forecast_cells(forecast: ForecastTable, row: ForecastRow) -> tuple[str, ...]:
    share = row.parts.get(row.limit)
    limit = row.limit if share is None else f"{row.limit} ({share / row.time:.0%})"
    return (
        str(row.stages),
        _forecast_time(forecast, row.time),
        f"{row.speedup:.2f}",
        f"{row.bound:.2f}",
        f"{row.efficiency:.0%}",
        format_size(row.most_memory),
        format_size(row.link_bytes),
        limit,
    )


def _rivals_table(forecast: ForecastTable, rivals: list[str], counts: list[int]) -> Table:
    table = figures_table("", ("N", *(f"speed-up {method}" for method in rivals)))
    by_key = {(row.stages, row.method): row for row in forecast.rows}
    for count in counts:
        rows = [by_key.get((count, method)) for method in rivals]
        if any(rows):
            table.add_row(str(count), *(f"{row.speedup:.2f}" if row else "-" for row in rows))
    return table


def _forecast_time(forecast: ForecastTable, time: float) -> str:
    if forecast.unit == "seconds":
        return format_seconds(time)
    return f"{format_count(time)} {forecast.unit}"


# --- bench ----------------------------------------------------------------------------------------


def bench_table(bench: Bench) -> RenderableType:
    """Show one row per contender and batch size, then the bounds from the measured parts."""
    threads = "one thread" if bench.threads == 1 else f"{bench.threads} threads"
    table = figures_table(
        f"{bench.model}: {_step_name(bench.training)} on {bench.ranks} processes with {threads} "
        f"each, {bench.device}",
        ("batch", "contender", "median", "from .. to", "times as fast", "from .. to", "sent"),
        words=("contender",),
    )
    for timing in bench.timings:
        if not timing.problem:
            table.add_row(str(timing.batch), timing.contender, *_bench_cells(bench, timing))
    bounds = [_bounds(bench, parts.batch) for parts in bench.parts]
    choices = [
        f"batch {timing.batch}: {timing.contender}, {timing.choice}"
        for timing in bench.timings
        if timing.choice and not timing.problem
    ]
    problems = [
        f"batch {timing.batch}: {timing.contender} could not run: {timing.problem}"
        for timing in bench.timings
        if timing.problem
    ]
    lines = [Text(line) for line in (*bounds, *choices, *problems) if line]
    rounds = max((len(timing.seconds) for timing in bench.timings), default=0)
    legend = Text(
        f"{rounds} rounds, in which all contenders take turns; times as fast: as the original on "
        "one process in the same round (median); sent: by all processes in a step; gpipe, 1f1b: "
        "torch.distributed.pipelining with the same cuts; direct: the original on one process, its "
        "layers called as functions, as parareal and its parts call them; copies: the original on "
        "every process at once, which measures the throughput of the machine",
        style="dim",
    )
    return Group(table, *lines, legend)


def _bench_cells(bench: Bench, timing: Timing) -> tuple[str, ...]:
    ratios = bench.ratios(timing)
    low, high = (_milliseconds(limit(timing.seconds)) for limit in (min, max))
    return (
        _milliseconds(timing.median),
        f"{low} .. {high}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} .. {max(ratios):.2f}",
        f"{timing.sent / 1e6:.2f} MB" if timing.sent else "-",
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _bounds(bench: Bench, batch: int) -> str:
    """Compare the measured speed-up with what its parts allow; "" where it was not measured."""
    from pnn_compile.bench.measurements import DIRECT  # here: most tables need no torch.distributed

    bound = bench.bound(batch)
    timing = next((t for t in bench.timings if (t.contender, t.batch) == ("parareal", batch)), None)
    if bound is None or timing is None or timing.problem:
        return ""
    speedup = statistics.median(bench.ratios(timing))
    line = (
        f"batch {batch}: the parts, timed one by one in one process, allow {bound:.2f}; "
        f"{speedup / bound:.0%} of it is reached"
    )
    together = bench.bound(batch, together=True)
    if together is not None:
        line += (
            f"; timed on the ranks, in the steps themselves, they allow {together:.2f}; "
            f"{speedup / together:.0%} of it is reached"
        )
    direct = bench.ratios(timing, DIRECT)
    if direct:
        line += f"; parareal is {statistics.median(direct):.2f} times as fast as direct"
    throughput = bench.machine(batch)
    if throughput is not None:
        line += (
            f"; {bench.ranks} independent copies reach {throughput:.2f} times the throughput of one"
        )
    return line


def streams_table(bench: StreamBench) -> RenderableType:
    """Show one row per contender and batch size of a benchmark on one GPU."""
    table = figures_table(
        f"{bench.model}: {_step_name(bench.training)} on one {bench.device}",
        ("batch", "contender", "median", "from .. to", "times as fast", "from .. to", "error"),
        words=("contender",),
    )
    for timing in bench.timings:
        ratios = bench.ratios(timing)
        table.add_row(
            str(timing.batch),
            timing.contender,
            f"{timing.median * 1e3:.2f} ms",
            f"{min(timing.seconds) * 1e3:.2f} .. {max(timing.seconds) * 1e3:.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} .. {max(ratios):.2f}",
            "" if timing.error is None else f"{timing.error:.0e}",
        )
    predicted = ", ".join(f"{bound:.2f} at N = {n}" for n, bound in bench.bounds.items())
    rounds = max(len(timing.seconds) for timing in bench.timings)
    legend = Text(
        f"{rounds} rounds, in which all contenders take turns; times as fast: as the original in a "
        "CUDA graph in the same round (median); parareal: one CUDA graph, with all stages on one "
        "stream or on one stream each; error: of the outputs, against the same network without "
        f"streams and CUDA graph; predicted with one device per stage: {predicted}",
        style="dim",
    )
    return Group(table, legend)


def first_run_table(run: FirstRun) -> RenderableType:
    """Show one row per rank, then whether the outputs equal those of one process."""
    step = _step_name(run.training)
    table = figures_table(
        f"{run.model}: {step} of {run.batch} on "
        f"{'one process' if len(run.ranks) == 1 else f'{len(run.ranks)} processes'}",
        ("rank", "stages", "modules", "parameters", "MB", f"{step}, ms"),
        words=("stages", "modules"),
    )
    for rank in run.ranks:
        table.add_row(
            str(rank.rank),
            ", ".join(map(str, rank.stages)),
            " .. ".join(dict.fromkeys(rank.modules)),
            f"{rank.parameters:,}",
            f"{rank.bytes / 1e6:.1f}",
            f"{rank.seconds * 1e3:.1f}",
        )
    result = Text(
        f"outputs {'equal' if run.equal else 'NOT equal'} to those of one process (relative error "
        f"{run.error:.1e}); {run.parameters:,} parameters in total"
    )
    return Group(table, result)


def count_table(model: str, counted: IterationCount) -> RenderableType:
    """Show how many samples take how many iterations, and the speed at these."""
    table = figures_table(
        f"{model}: iterations of tolerance {counted.tolerance:g}, on "
        f"{amount(counted.samples, 'sample')}",
        ("K", "samples", "share", "speed-up", "pipelined"),
    )
    for row in counted.rows:
        table.add_row(
            str(row.iterations),
            str(row.samples),
            f"{row.samples / counted.samples:.1%}",
            f"{row.speedup:.2f}",
            _figure(row.pipelined, ".2f"),
        )
    return Group(table, Text(counted.sentence))


# --- accuracy -------------------------------------------------------------------------------------


def dial_table(model: str, rows: Sequence[DialRow]) -> RenderableType:
    """Show one row per number of iterations.

    Args:
        model: Name of the model, for the title.
        rows: What `pnn.dial` returned.
    """
    table = figures_table(
        f"{model}: iterations against the original, on {amount(rows[0].samples, 'sample')}",
        (
            "K", "estimate", "95 %", "output error", "agreement", "speed-up", "pipelined",
            "serial share",
        ),
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.iterations),
            f"{row.estimate_mean:.3g}",
            f"{row.estimate_p95:.3g}",
            f"{row.output_error:.3g}",
            _figure(row.agreement, ".1%"),
            f"{row.speedup:.2f}",
            _figure(row.pipelined, ".2f"),
            f"{row.serial_share:.1%}",
        )
    legend = Text(
        "estimate: relative error of the last state, from the increments (mean, and 95th "
        "percentile of the samples); output error, agreement: measured against the current fine "
        "stages in sequence; speed-up: predicted, links not counted, one iteration after another; "
        "pipelined: the next iteration starts on the states that are there",
        style="dim",
    )
    return Group(table, legend)


def verdict_table(verdict: Verdict) -> RenderableType:
    """Show each parareal network beside its early exit, then the conclusion and the advice."""
    table = figures_table(
        f"verdict on {verdict.held_out} held-out samples, without training",
        ("N", "W", "K", "speed-up", "serial", "agreement", "output error", "early exit"),
    )
    for row in verdict.rows:
        early_exit = "none as fast"
        if row.exit is not None and row.exit_share is not None:
            early_exit = f"{_agreement(row.exit)} ({row.exit_share:.0%} of the layers)"
        table.add_row(
            str(row.stages),
            str(row.windows),
            str(row.iterations),
            f"{row.speedup:.2f}",
            f"{row.serial_share:.1%}",
            _agreement(row.fidelity),
            f"{row.fidelity.error:.3f}",
            early_exit,
        )
    lines = [Text(verdict.sentence), *(Text(f"- {line}") for line in verdict.advice)]
    return Group(table, *lines)


def probe_table(probe: Probe) -> RenderableType:
    """Show the curve of every network of a probe, then the conclusion."""
    score = "accuracy" if probe.accuracy else "loss"
    table = figures_table(
        f"{score} on {probe.held_out} held-out samples, after each eighth of {probe.steps} steps",
        ("network", "speed-up", "parameters", "s a step", *map(str, range(1, 9))),
        words=("network",),
    )
    for row in probe.rows:
        if row.refused:
            table.add_row(row.network, f"not trained: {row.refused}")
            continue
        curve = [f"{100 * s:.1f}" if probe.accuracy else f"{s:.3g}" for s in row.scores]
        figures = (f"{row.speedup:.2f}", f"{row.parameters:,}", f"{row.seconds:.3f}")
        table.add_row(row.network, *figures, *curve)
    return Group(table, Text(probe.sentence))


def _agreement(fidelity: Fidelity) -> str:
    if fidelity.agreement is None:
        return f"error {fidelity.error:.3f}"
    return f"{fidelity.agreement:.1%}"


# --- ONNX -----------------------------------------------------------------------------------------

_MAX_OPERATORS = 4


def onnx_table(summary: OnnxSummary) -> RenderableType:
    """Show one row per stage and role of an exported network, then its metadata."""
    table = figures_table(
        summary.path,
        ("stage", "role", "modules", "nodes", "weights", "operators"),
        words=("role", "modules", "operators"),
    )
    for part in summary.parts:
        table.add_row(
            str(part.stage),
            part.role,
            " .. ".join(dict.fromkeys(part.modules)),
            f"{part.nodes:,}",
            format_size(part.weight_bytes) if part.weight_bytes else "",
            _frequent_operators(part),
        )
    metadata = summary.metadata
    lines = [
        f"{metadata.get('pnn.correction')} form, {metadata.get('pnn.sweep')} sweep, "
        f"K = {metadata.get('pnn.iterations')}; opset {summary.opset}, "
        f"IR version {summary.ir_version}, {amount(len(summary.files), 'file')}",
        f"inputs {'; '.join(summary.inputs)}; outputs {'; '.join(summary.outputs)}",
        f"{summary.placed} of {summary.nodes} nodes have a device and a pipeline stage",
    ]
    return Group(table, *map(Text, lines))


def _frequent_operators(part: RoleSummary) -> str:
    names = [f"{count} {name}" for name, count in part.operators[:_MAX_OPERATORS]]
    return ", ".join([*names, *(["..."] if len(part.operators) > _MAX_OPERATORS else [])])
