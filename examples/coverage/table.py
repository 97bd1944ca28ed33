"""The results as Markdown: totals, failures with their causes, and one line per model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from examples.coverage.check import STAGES

__all__ = ["table"]

_LINE = 160
"""Most characters of a cause that are shown."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return three tables: groups, failures, models."""
    parts = [_totals(rows), _failures([row for row in rows if not row["ok"]]), _models(rows)]
    return "\n\n".join(part for part in parts if part)


def _totals(rows: Sequence[dict[str, Any]]) -> str:
    rungs = sorted({row["rung"] for row in rows if "rung" in row})
    lines = []
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for name, chosen in [(g, [r for r in rows if r["group"] == g]) for g in groups] + [
        ("all", list(rows))
    ]:
        good = sum(row["ok"] for row in chosen)
        families = len({row["family"] for row in chosen if "family" in row})
        counts = Counter(row.get("rung", "") for row in chosen)
        share = f"{good / len(chosen):.1%}" if chosen else "–"
        lines.append([name, len(chosen), families, *(counts[rung] for rung in rungs), good, share])
    return _markdown(["group", "models", "families", *rungs, "green at N = 4", "share"], lines)


def _failures(rows: Sequence[dict[str, Any]]) -> str:
    lines = [[row["model"], row["phase"], _short(row["cause"])] for row in rows]
    return _markdown(["fails", "in", "cause"], lines) if lines else ""


def _models(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["model", "captured by", "nodes", "legal cuts"]
    heads += [f"imbalance, N = {stages}" for stages in STAGES]
    heads += ["oracles", "CPU seconds"]
    return _markdown(heads, [_model(row) for row in rows])


def _model(row: dict[str, Any]) -> list[object]:
    balance = row.get("imbalance", {})
    oracles = row.get("oracles", {})
    passed = sum(not reason for reason in oracles.values())
    return [
        row["model"],
        row.get("rung", "–"),
        row.get("nodes", "–"),
        row.get("positions", "–"),
        *(_balance(balance.get(str(stages))) for stages in STAGES),
        f"{passed} of {len(oracles)}" if oracles else "–",
        row["seconds"],
    ]


def _balance(value: float | str | None) -> str:
    """The slowest stage over the mean; a refusal is text."""
    return f"{value:.2f}" if isinstance(value, float) else "–"


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _LINE else f"{text[: _LINE - 1]}…"


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rule = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [heads, rule, *lines])
