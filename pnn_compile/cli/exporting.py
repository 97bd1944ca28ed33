"""`pnn-compile export`: write an artifact or a model as ONNX; and show ONNX files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from passes.errors import OptionError
from pnn_compile.cli.command import Command
from pnn_compile.cli.common import DEBUG, JSON, Progress, open_target, show, target_options

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled
    from pnn_compile.export.onnx import Exported


@click.command(
    name="export",
    cls=Command,
    examples=[
        ("build/model --onnx model.onnx", "one file"),
        ("build/model --onnx stages --per-stage", "a model per stage"),
        ("timm:resnet18 -n 2 --onnx model.onnx --fp16 --opset 18", "half precision"),
    ],
)
@click.argument("target")
@click.option(
    "--onnx",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write; with --per-stage, directory of manifest.json and stages/.",
)
@click.option(
    "--per-stage", is_flag=True, help="Write a model per stage, which can run in parallel."
)
@click.option(
    "--opset",
    default=20,
    type=click.IntRange(18, 24),
    metavar="VERSION",
    help="Version of the operator set, 18 to 24.",
)
@click.option("--bf16", is_flag=True, help="Store weights in bfloat16; float32 is computed.")
@click.option("--fp16", is_flag=True, help="Write weights, inputs and outputs in half precision.")
@target_options("auto")
@click.option(
    "--verify/--no-verify",
    "check",
    default=True,
    help="Compare the outputs of ONNX Runtime with those of torch.",
)
@JSON
@DEBUG
def export_command(
    target: str,
    onnx: Path,
    per_stage: bool,
    opset: int,
    fp16: bool,
    bf16: bool,
    stages: int | Literal["auto"],
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    check: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Write TARGET as ONNX.

    TARGET is the directory of an artifact, or a model as in `pnn-compile compile`.
    """
    from pnn_compile.export.onnx import export_onnx, in_half_precision, lower_network

    if fp16 and bf16:
        raise OptionError("--fp16 and --bf16 exclude each other: choose one")

    with Progress(as_json)("opening") as begin:
        compiled = open_target(target, stages, inputs, arguments, debug, begin)
        begin("translating to ONNX")
        if fp16 or bf16:
            compiled = in_half_precision(compiled, bf16=bf16)
        lowered = lower_network(compiled, opset, bf16=bf16)
        begin("writing and checking")
        exported = export_onnx(compiled, onnx, per_stage=per_stage, verify=check, lowered=lowered)
    show(as_json, exported_data(exported), str(exported))


def export_to(
    compiled: Compiled, folder: Path, formats: tuple[str, ...], check: bool, progress: Progress
) -> list[Exported]:
    """Write ONNX models into the directory of an artifact.

    Args:
        compiled: The network.
        folder: The directory.
        formats: Of `--emit`; all but "onnx" and "onnx-stages" are ignored.
        check: Whether to compare ONNX Runtime with torch.
        progress: Shows the progress.
    """
    paths = {"onnx": folder / "model.onnx", "onnx-stages": folder}
    paths = {name: path for name, path in paths.items() if name in formats}
    if not paths:
        return []
    from pnn_compile.export.onnx import export_onnx, lower_network

    with progress("translating to ONNX") as begin:
        lowered = lower_network(compiled)
        begin("writing and checking ONNX")
        return [
            export_onnx(
                compiled, path, per_stage=name == "onnx-stages", verify=check, lowered=lowered
            )
            for name, path in paths.items()
        ]


def exported_data(exported: Exported) -> dict[str, Any]:
    """Return the description of an export as plain data."""
    data = asdict(exported)
    return data | {"path": str(exported.path), "files": [str(file) for file in exported.files]}


def is_onnx(target: str) -> bool:
    """Whether a word of the command line is an ONNX file or a manifest of stage models."""
    return target.endswith(".onnx") or Path(target).name == "manifest.json"


def show_onnx(target: str, as_json: bool) -> None:
    """Show stages and roles of an ONNX file or of stage models."""
    from pnn_compile.export.onnx import read_summary
    from pnn_compile.report.tables import onnx_table

    summary = read_summary(Path(target))
    show(as_json, summary, onnx_table(summary))
