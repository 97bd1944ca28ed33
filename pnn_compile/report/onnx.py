"""Stages and roles of an ONNX file as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pnn_compile.export.format import size
from pnn_compile.report.tables import figures_table

if TYPE_CHECKING:
    from pnn_compile.export.onnx.read import OnnxSummary, RoleSummary

__all__ = ["onnx_table"]

_OPERATORS = 4


def onnx_table(found: OnnxSummary) -> RenderableType:
    """One row a stage and role, then what the file says of itself."""
    table = figures_table(
        found.path,
        ("stage", "role", "modules", "nodes", "weights", "operators"),
        names=("role", "modules", "operators"),
    )
    for part in found.parts:
        weights = size(part.weight_bytes) if part.weight_bytes else ""
        modules = " .. ".join(dict.fromkeys(part.modules))
        table.add_row(
            str(part.stage), part.role, modules, f"{part.nodes:,}", weights, _operators(part)
        )
    facts = found.metadata
    lines = [
        f"{facts.get('pnn.correction')} form, {facts.get('pnn.sweep')} sweep, "
        f"K = {facts.get('pnn.iterations')}; opset {found.opset}, IR version {found.ir_version}, "
        f"{len(found.files)} {'file' if len(found.files) == 1 else 'files'}",
        f"takes {'; '.join(found.inputs)}; gives {'; '.join(found.outputs)}",
        f"{found.placed} of {found.nodes} nodes have a device and a pipeline stage",
    ]
    return Group(table, *map(Text, lines))


def _operators(part: RoleSummary) -> str:
    shown = [f"{count} {name}" for name, count in part.operators[:_OPERATORS]]
    return ", ".join([*shown, *(["..."] if len(part.operators) > _OPERATORS else [])])
