"""`pnn-compile export`: write an artifact or a model as ONNX, and look at what was written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pnn_compile.cli.common import Progress, console, open_target
from pnn_compile.cli.options import ARG, DEBUG, JSON, stages_option

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled
    from pnn_compile.export.onnx import Exported

__all__ = ["described", "export_command", "export_to", "is_onnx", "show_onnx"]


@click.command(name="export")
@click.argument("target")
@click.option(
    "--onnx",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write; with --per-stage, directory of manifest.json and stages/.",
)
@click.option("--per-stage", is_flag=True, help="A model per stage, which run side by side.")
@click.option("-n", "--stages", default="auto", callback=stages_option, help="For a model: stages.")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE[:DTYPE]", help="For a model.")
@ARG
@click.option(
    "--verify/--no-verify", "check", default=True, help="Hold it against torch (default)."
)
@JSON
@DEBUG
def export_command(
    target: str,
    onnx: Path,
    per_stage: bool,
    stages: int | Literal["auto"],
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    check: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Write a saved artifact, or a model compiled on the spot, as ONNX."""
    compiled = open_target(target, stages, inputs, arguments, debug)
    with Progress(as_json)("exporting to ONNX"):
        exported = compiled.export_onnx(onnx, per_stage=per_stage, verify=check)
    if as_json:
        click.echo(json.dumps(described(exported), indent=2))
    else:
        console().print(str(exported))


def export_to(
    compiled: Compiled, folder: Path, emit: tuple[str, ...], check: bool, progress: Progress
) -> list[Exported]:
    """Write what --emit names in ONNX into a saved artifact."""
    wanted = {"onnx": folder / "model.onnx", "onnx-stages": folder}
    wanted = {name: path for name, path in wanted.items() if name in emit}
    if not wanted:
        return []
    from pnn_compile.export.onnx import export_onnx, lower_network

    with progress("exporting to ONNX"):
        lowered = lower_network(compiled)
        return [
            export_onnx(
                compiled, path, per_stage=name == "onnx-stages", verify=check, lowered=lowered
            )
            for name, path in wanted.items()
        ]


def described(exported: Exported) -> dict[str, Any]:
    """What was exported, as plain data."""
    data = asdict(exported)
    return data | {"path": str(exported.path), "files": [str(file) for file in exported.files]}


def is_onnx(target: str) -> bool:
    """Whether a word of the command line names an ONNX file or a manifest of stage models."""
    return target.endswith(".onnx") or Path(target).name == "manifest.json"


def show_onnx(target: str, as_json: bool) -> None:
    """Show stages and roles of an ONNX file or of stage models."""
    from pnn_compile.export.onnx import read_summary

    summary = read_summary(Path(target))
    if as_json:
        click.echo(json.dumps(asdict(summary), indent=2))
        return
    from pnn_compile.report.tables import onnx_table

    console().print(onnx_table(summary))
