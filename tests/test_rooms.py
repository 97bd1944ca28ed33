"""Imports between rooms run one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDERS: dict[str, tuple[str, ...]] = {
    "passes": (
        "interrupt", "errors", "ir", "capture", "cost", "analysis", "coarse", "options",
        "partition", "plan", "transform", "schedule", "pipeline",
    ),
    "pnn_compile": (
        "atomic", "compiled", "inputs", "fit", "evaluate", "forecast", "artifact", "runtime",
        "export", "bench", "report", "sources", "cli",
    ),
}  # fmt: skip
"""The rooms of each package, from the lowest; a room imports from itself and from lower ones."""

ALONE = {"capture": ("errors", "ir")}
"""Rooms that import from these alone."""


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports when it is run; not those of functions and of type checks."""
    pending: list[ast.stmt] = list(ast.parse(file.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]


def room_of(file: Path, package: str) -> str:
    return file.relative_to(ROOT / package).with_suffix("").parts[0]


@pytest.mark.parametrize("package", ORDERS)
def test_imports_between_rooms_run_one_way(package: str) -> None:
    order = ORDERS[package]
    wrong = []
    for file in sorted((ROOT / package).rglob("*.py")):
        room = room_of(file, package)
        if room in ("__init__", "__main__"):
            continue
        assert room in order, f"{file} is in no room of the list above"
        allowed = {room, *ALONE.get(room, order[: order.index(room)])}
        for name in imports(file):
            parts = name.split(".")
            if (
                parts[0] == package
                and len(parts) > 1
                and parts[1] in order
                and parts[1] not in allowed
            ):
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ORDERS)
def test_a_package_has_few_entries_at_its_root(package: str) -> None:
    ignored = ("__pycache__", "py.typed")
    entries = [e for e in (ROOT / package).iterdir() if e.name not in ignored]
    assert len(entries) <= 15
