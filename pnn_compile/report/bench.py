"""A benchmark as a table."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pnn_compile.bench.measurements import DIRECT
from pnn_compile.report.tables import figures_table

if TYPE_CHECKING:
    from pnn_compile.bench import Bench, Timing

__all__ = ["bench_table"]


def bench_table(found: Bench) -> RenderableType:
    """One row per contender and batch size, then what the measured parts allow."""
    step = "training step" if found.training else "forward pass"
    table = figures_table(
        f"{found.model}: {step} on {found.ranks} processes with {_threads(found.threads)}, "
        f"{found.device}",
        ("batch", "contender", "median", "from .. to", "times as fast", "from .. to", "sent"),
        names=("contender",),
    )
    for timing in found.timings:
        if not timing.problem:
            table.add_row(str(timing.batch), timing.contender, *_cells(found, timing))
    lines = [line for line in (_bound(found, parts.batch) for parts in found.parts) if line]
    lines += [
        Text(f"batch {timing.batch}: {timing.contender}, {timing.choice}")
        for timing in found.timings
        if timing.choice and not timing.problem
    ]
    lines += [
        Text(f"batch {timing.batch}: {timing.contender} could not run: {timing.problem}")
        for timing in found.timings
        if timing.problem
    ]
    rounds = max((len(timing.seconds) for timing in found.timings), default=0)
    legend = Text(
        f"{rounds} rounds, all contenders in turns; times as fast: as the original on one process "
        "in the same round (median); sent: by all processes in a step; gpipe, 1f1b: "
        "torch.distributed.pipelining over the same cuts; direct: the original on one process, its "
        "layers called by their functions, as parareal and its parts call them; copies: the "
        "original on every process at once, what the machine has to give",
        style="dim",
    )
    return Group(table, *lines, legend)


def _threads(count: int) -> str:
    return "one thread each" if count == 1 else f"{count} threads each"


def _cells(found: Bench, timing: Timing) -> tuple[str, ...]:
    ratios = found.ratios(timing)
    return (
        _milliseconds(timing.median),
        f"{_milliseconds(min(timing.seconds))} .. {_milliseconds(max(timing.seconds))}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} .. {max(ratios):.2f}",
        _bytes(timing.sent),
    )


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count else "-"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _bound(found: Bench, batch: int) -> Text | None:
    bound = found.bound(batch)
    timing = next((t for t in found.timings if (t.contender, t.batch) == ("parareal", batch)), None)
    if bound is None or timing is None or timing.problem:
        return None
    reached = statistics.median(found.ratios(timing))
    line = (
        f"batch {batch}: the parts, timed one by one in one process, allow {bound:.2f}; "
        f"{reached / bound:.0%} of it is reached"
    )
    together = found.bound(batch, together=True)
    if together is not None:
        line += (
            f"; timed on the ranks, in the steps themselves, they allow {together:.2f}; "
            f"{reached / together:.0%} of it is reached"
        )
    direct = found.ratios(timing, DIRECT)
    if direct:
        line += f"; parareal is {statistics.median(direct):.2f} times as fast as direct"
    machine = found.machine(batch)
    if machine is not None:
        line += f"; {found.ranks} independent copies at once do the work of {machine:.2f}"
    return Text(line)
