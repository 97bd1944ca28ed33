"""The one form of all tables of figures: a title on the left, figures on the right."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

__all__ = ["figures_table"]


def figures_table(title: str, columns: Sequence[str], *, names: Sequence[str] = ()) -> Table:
    """An empty table with these columns; those in `names` hold words instead of figures."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False
    )
    for name in columns:
        table.add_column(name, justify="left" if name in names else "right")
    return table
