"""The table of the studies: mean and spread over seeds, as Markdown."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

__all__ = ["Row", "table"]

Row = dict[str, object]
_KEYS = ("preset", "task", "study", "network", "stages")
_FIGURES = ("accuracy", "uncorrected", "calibrated", "fitted", "agreement", "speedup", "serial")


def table(path: Path) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    latest = {tuple(row.get(key) for key in (*_KEYS, "seed")): row for row in rows}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in latest.values():  # of a network that was run again the later row counts
        groups.setdefault(tuple(row.get(key) for key in _KEYS), []).append(row)
    lines = [
        f"| preset | task | study | network | N | seeds | {' | '.join(_FIGURES)} |",
        f"|{'---|' * (6 + len(_FIGURES))}",
    ]
    for key, found in groups.items():
        cells = [_spread([r[f] for r in found if f in r]) for f in _FIGURES]
        lines.append(f"| {' | '.join(map(str, key))} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[object]) -> str:
    numbers = [float(str(value)) for value in values]
    if not numbers:
        return ""
    mean = statistics.mean(numbers)
    digits = 3 if abs(mean) < 1 else 2
    if len(numbers) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"
