"""A first run on several ranks as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pnn_compile.report.tables import figures_table

if TYPE_CHECKING:
    from pnn_compile.bench.first_run import FirstRun

__all__ = ["first_run_table"]


def first_run_table(found: FirstRun) -> RenderableType:
    """One row a rank, then whether the outputs are those of one process."""
    step = "training step" if found.training else "forward pass"
    table = figures_table(
        f"{found.model}: {step} of {found.batch} on {len(found.ranks)} processes",
        ("rank", "stages", "modules", "parameters", "MB", f"{step}, ms"),
        names=("stages", "modules"),
    )
    for rank in found.ranks:
        first, last = rank.modules
        table.add_row(
            str(rank.rank),
            ", ".join(map(str, rank.stages)),
            first if first == last else f"{first} .. {last}",
            f"{rank.parameters:,}",
            f"{rank.bytes / 1e6:.1f}",
            f"{rank.seconds * 1e3:.1f}",
        )
    word = "equal" if found.equal else "NOT equal"
    return Group(
        table,
        Text(
            f"outputs {word} to those of one process (relative error {found.error:.1e}); "
            f"{found.parameters:,} parameters in all"
        ),
    )
