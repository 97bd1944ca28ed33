"""The error dial as a table: what every number of iterations gives, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pnn_compile.report.tables import figures_table

if TYPE_CHECKING:
    from pnn_compile.evaluate.iterate import DialRow

__all__ = ["dial_table"]

_COLUMNS = ("K", "estimate", "95 %", "output error", "agreement", "speed-up", "serial share")


def dial_table(model: str, rows: Sequence[DialRow]) -> RenderableType:
    """One row per number of iterations."""
    table = figures_table(
        f"{model}: iterations against the original, on {rows[0].samples} samples", _COLUMNS
    )
    for row in rows:
        table.add_row(
            str(row.iterations),
            f"{row.estimate_mean:.3g}",
            f"{row.estimate_p95:.3g}",
            f"{row.output_error:.3g}",
            "-" if row.agreement is None else f"{row.agreement:.1%}",
            f"{row.speedup:.2f}",
            f"{row.serial_share:.1%}",
        )
    legend = Text(
        "estimate: relative error of the last state, from the increments (mean, and 95th "
        "percentile of the samples); output error, agreement: measured against the stages one "
        "after another, as they are now; speed-up: predicted, links not counted",
        style="dim",
    )
    return Group(table, legend)
