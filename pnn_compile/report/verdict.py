"""The verdict as a table with its sentence and advice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pnn_compile.report.tables import figures_table

if TYPE_CHECKING:
    from pnn_compile.evaluate.assess import Fidelity, Verdict

__all__ = ["verdict_table"]


def verdict_table(verdict: Verdict) -> RenderableType:
    """One row per number of stages and iterations, the early exit beside."""
    table = figures_table(
        f"verdict on {verdict.held_out} held-out samples, without training",
        ("N", "K", "speed-up", "serial", "agreement", "output error", "early exit"),
    )
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
