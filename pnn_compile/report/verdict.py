"""The verdict as a table with its sentence and advice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pnn_compile.verdict import Fidelity, Verdict

__all__ = ["verdict_table"]


def verdict_table(verdict: Verdict) -> RenderableType:
    """One row per number of stages and iterations, the early exit beside."""
    table = Table(
        title=f"verdict on {verdict.held_out} held-out samples, without training",
        title_justify="left",
        box=box.SIMPLE,
    )
    columns = ("N", "K", "speed-up", "serial", "agreement", "output error", "early exit")
    for name in columns:
        table.add_column(name, justify="right")
    for row in verdict.rows:
        control = "none so quick"
        if row.exit is not None and row.exit_share is not None:
            control = f"{_share(row.exit)} ({row.exit_share:.0%} of the layers)"
        table.add_row(
            str(row.stages),
            str(row.iterations),
            f"{row.speedup:.2f}",
            f"{row.serial_share:.1%}",
            _share(row.fidelity),
            f"{row.fidelity.error:.3f}",
            control,
        )
    lines = [Text(verdict.sentence), *(Text(f"- {line}") for line in verdict.advice)]
    return Group(table, *lines)


def _share(fidelity: Fidelity) -> str:
    if fidelity.agreement is None:
        return f"error {fidelity.error:.3f}"
    return f"{fidelity.agreement:.1%}"
