"""The tables of the studies: mean and spread over seeds, as Markdown."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

__all__ = ["Row", "summary", "table"]

Row = dict[str, object]
_KEYS = ("preset", "task", "study", "network", "stages")
_FIGURES = (
    "accuracy", "perplexity", "uncorrected", "iterated", "sequential", "calibrated", "fitted",
    "agreement", "speedup", "serial",
)  # fmt: skip


def table(path: Path) -> str:
    """Every figure: mean and standard deviation over runs."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row, _ in _rows(path):
        groups.setdefault(tuple(row.get(key) for key in _KEYS), []).append(row)
    lines = [
        f"| preset | task | study | network | N | runs | {' | '.join(_FIGURES)} |",
        f"|{'---|' * (6 + len(_FIGURES))}",
    ]
    for key, found in groups.items():
        cells = [_spread([float(str(r[f])) for r in found if f in r]) for f in _FIGURES]
        lines.append(f"| {' | '.join(map(str, key))} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(path: Path) -> str:
    """How the accuracy changes against the original of the same seed, in points, for every N."""
    changes: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    for row, original in _rows(path):
        if row["network"] != "original" and row["study"] != "iterations" and original is not None:
            key = tuple(row.get(key) for key in _KEYS[:4])
            by_size = changes.setdefault(key, {})
            by_size.setdefault(int(str(row["stages"])), []).append(_reached(row) - original)
    sizes = sorted({size for by_size in changes.values() for size in by_size})
    lines = [
        f"| preset | task | study | network | {' | '.join(f'N = {size}' for size in sizes)} |",
        f"|{'---|' * (4 + len(sizes))}",
    ]
    for key, by_size in changes.items():
        cells = [_spread(by_size.get(size, []), signed=True) for size in sizes]
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(path: Path) -> list[tuple[Row, float | None]]:
    """Read the rows of a file, each with what its original reached, if that is there.

    A row belongs to the original before it, or to the first one. Of a network that was run again
    the later row counts, and both if the original was trained anew in between: the same seed gives
    other weights on another machine.
    """
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
    originals = {
        _place(row): _reached(row) for row in reversed(rows) if row["network"] == "original"
    }
    found: dict[tuple[Any, ...], tuple[Row, float | None]] = {}
    for row in rows:
        if row["network"] == "original":
            originals[_place(row)] = _reached(row)
        original = originals.get(_place(row))
        found[(*(row.get(key) for key in (*_KEYS, "seed")), original)] = row, original
    return [*found.values()]


def _place(row: Row) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("preset", "task", "study", "seed"))


def _reached(row: Row) -> float:
    """Accuracy of a network in the end."""
    return float(str(row.get("fitted", row.get("accuracy", "nan"))))


def _spread(numbers: list[float], *, signed: bool = False) -> str:
    if not numbers:
        return ""
    mean = statistics.mean(numbers)
    digits = 3 if abs(mean) < 1 and not signed else 2
    plus = "+" if signed else ""
    if len(numbers) == 1:
        return f"{mean:{plus}.{digits}f}"
    return f"{mean:{plus}.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"
