"""A benchmark of streams on one GPU as a table."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pnn_compile.report.tables import figures_table

if TYPE_CHECKING:
    from pnn_compile.bench.gpu_streams import StreamBench

__all__ = ["streams_table"]


def streams_table(found: StreamBench) -> RenderableType:
    """One row per contender and batch size."""
    step = "training step" if found.training else "forward pass"
    table = figures_table(
        f"{found.model}: {step} on one {found.device}",
        ("batch", "contender", "median", "from .. to", "times as fast", "from .. to", "error"),
        names=("contender",),
    )
    for timing in found.timings:
        ratios = found.ratios(timing)
        table.add_row(
            str(timing.batch),
            timing.contender,
            f"{timing.median * 1e3:.2f} ms",
            f"{min(timing.seconds) * 1e3:.2f} .. {max(timing.seconds) * 1e3:.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} .. {max(ratios):.2f}",
            "" if timing.error is None else f"{timing.error:.0e}",
        )
    predicted = ", ".join(f"{bound:.2f} at N = {n}" for n, bound in found.bounds.items())
    rounds = max(len(timing.seconds) for timing in found.timings)
    legend = (
        f"{rounds} rounds, all contenders in turns; times as fast: as the original under a CUDA "
        "graph in the same round (median); parareal: one CUDA graph, its stages on one stream or "
        "on one each; error: of the outputs, against the same network run plainly; predicted with "
        f"a device a stage: {predicted}"
    )
    return Group(table, Text(legend, style="dim"))
