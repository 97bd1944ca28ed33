"""A forecast for the terminal: a table of what parareal networks give, one of what else would."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pnn_compile.export import format as units
from pnn_compile.forecast.table import PARAREAL, ForecastRow, ForecastTable
from pnn_compile.report.tables import figures_table

__all__ = ["forecast_tables"]

_MOST_ROWS = 16


def forecast_tables(found: ForecastTable) -> RenderableType:
    """The rows by number of devices, thinned out where they are many, then the verdict."""
    counts = _shown(found)
    parts: list[RenderableType] = [Text(_title(found), style="bold")]
    for method in found.methods:
        if method in PARAREAL:
            parts.append(_parareal(found, method, counts))
    rivals = [method for method in found.methods if method not in PARAREAL]
    if rivals:
        parts += [Text("the original, run in other ways"), _beside(found, rivals, counts)]
    every = {row.stages for row in found.rows}
    if len(counts) < len(every):
        parts.append(Text(f"{len(counts)} of {len(every)} rows; --json has all", style="dim"))
    parts += [Text(f"note: {note}", style="yellow") for note in (*found.notes, *found.problems)]
    parts.append(Text(found.verdict))
    return Group(*parts)


def _title(found: ForecastTable) -> str:
    step = "training step" if found.training else "forward pass"
    where = " and ".join(found.devices) if found.devices else "this machine"
    cost = {"flops": "by FLOPs", "roofline": f"on {where} by roofline"}.get(
        found.cost, "measured on this machine"
    )
    alone = _time(found, found.sequential)
    return f"{found.model}, {step} of {found.batch} samples, {cost}: {alone} on one device"


def _shown(found: ForecastTable) -> list[int]:
    """Numbers of devices to print: all, or about evenly spread by ratio, with those of the best."""
    every = sorted({row.stages for row in found.rows})
    if len(every) <= _MOST_ROWS:
        return every
    ratio = (every[-1] / every[0]) ** (1 / (_MOST_ROWS - 4))
    kept, wanted = {every[0], every[-1]}, float(every[0])
    kept |= {found.enough(method).stages for method in found.methods if method in PARAREAL}
    while wanted < every[-1]:
        kept.add(min(every, key=lambda n: abs(n - wanted)))
        wanted = max(wanted * ratio, wanted + 1)
    return sorted(kept)


def _parareal(found: ForecastTable, method: str, counts: list[int]) -> Table:
    columns = ("N", "time", "speed-up", "bound", "efficiency", "most memory", "link", "limited by")
    table = figures_table(f"parareal, {method} sweep", columns, names=("limited by",))
    enough = found.enough(method)
    for row in found.of(method):
        if row.stages in counts:
            table.add_row(*_cells(found, row), style="bold" if row is enough else None)
    return table


def _cells(found: ForecastTable, row: ForecastRow) -> tuple[str, ...]:
    share = row.parts.get(row.limit)
    limit = row.limit if share is None else f"{row.limit} ({share / row.time:.0%})"
    return (
        str(row.stages),
        _time(found, row.time),
        f"{row.speedup:.2f}",
        f"{row.bound:.2f}",
        f"{row.efficiency:.0%}",
        units.size(row.most_memory),
        units.size(row.link_bytes),
        limit,
    )


def _beside(found: ForecastTable, rivals: list[str], counts: list[int]) -> Table:
    table = figures_table("", ("N", *(f"speed-up {method}" for method in rivals)))
    by = {(row.stages, row.method): row for row in found.rows}
    for count in counts:
        rows = [by.get((count, method)) for method in rivals]
        if any(rows):
            table.add_row(str(count), *(f"{row.speedup:.2f}" if row else "-" for row in rows))
    return table


def _time(found: ForecastTable, time: float) -> str:
    return units.seconds(time) if found.unit == "seconds" else f"{units.count(time)} {found.unit}"
