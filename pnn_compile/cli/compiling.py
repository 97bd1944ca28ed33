"""`pnn-compile MODEL`: compile, calibrate, verify, save."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passes.errors import OptionError, VerificationError
from pnn_compile.cli.common import CALIBRATION_BATCH, Progress, checks, console
from pnn_compile.cli.exporting import described, export_to
from pnn_compile.cli.options import ARG, CACHE, DEBUG, JSON, compiler_options, stages_option

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.assess import Verdict
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.export.onnx import Exported

__all__ = ["EMITTED", "compile_command"]

EMITTED = ("graph", "onnx", "onnx-stages")
"""What can be written into the directory."""


def _emitted(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    wanted = tuple(part.strip() for part in value.split(",") if part.strip())
    unknown = [part for part in wanted if part not in EMITTED]
    if unknown:
        raise OptionError(f"--emit knows {', '.join(EMITTED)} (got {', '.join(unknown)})")
    return wanted


@click.command(name="compile")
@click.argument("model")
@click.option(
    "-n", "--stages", default="auto", callback=stages_option, help="Number of stages, or auto."
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SHAPE[:DTYPE]",
    help="Example input, such as 1x3x224x224 or mask=1x128:bool; repeatable.",
)
@ARG
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to save to.")
@click.option(
    "--emit",
    default="graph",
    callback=_emitted,
    metavar="graph,onnx",
    help="What to write into the directory: graph, onnx (model.onnx), onnx-stages (a model per "
    "stage, and manifest.json).",
)
@click.option(
    "--cost",
    default="flops",
    help="flops; measured or roofline, of a training step; either with -forward, of inference.",
)
@click.option(
    "--devices",
    metavar="NAME,...",
    help="Profile of all devices, or of one per stage: built in (h100) or a .toml file.",
)
@compiler_options(
    "coarse", "coarse_budget", "units", "rank", "preprocess", "prologue", "correction", "sweep",
    "iterations", "seed",
)  # fmt: skip
@click.option("--cut-at", metavar="NAMES", help="Modules that come first in stages 1.., by comma.")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="Replay it; its cuts may be moved.",
)
@click.option(
    "--calibrate",
    "samples",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Fit guesses and corrections to the weights, on samples (.safetensors or .npz).",
)
@click.option("--verify/--no-verify", "check", default=True, help="Run the oracles (default).")
@click.option("-q", "--quiet", is_flag=True, help="No report.")
@CACHE
@JSON
@DEBUG
def compile_command(
    model: str,
    output: Path | None,
    emit: tuple[str, ...],
    samples: Path | None,
    check: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Compile MODEL.

    \b
    MODEL is one of
      file.py, file.py:name, package.module:name
      timm:NAME, torchvision:NAME    random weights
      hf:NAME                        a model type or class of transformers, small and random,
                                     or a folder with a config.json
      file.pt2                       written by torch.export.save; nothing in it runs
    """  # noqa: D301  # click reads the backspace
    if output is None and emit != ("graph",):
        raise OptionError(f"--emit {','.join(emit)} needs a directory to write to: add -o DIR")
    from pnn_compile.artifact.directory import check_replaceable
    from pnn_compile.inputs import read_batches

    if output is not None:
        check_replaceable(output)
    progress = Progress(quiet or as_json)
    if samples is not None:
        options["calibration"] = partial(read_batches, samples, size=CALIBRATION_BATCH, least=5)
    with progress("compiling" if samples is None else "compiling and calibrating"):
        compiled = _compile(model, options, debug)
    checked: VerifyReport | None = None
    exported: list[Exported] = []
    if check:
        with progress("verifying"):
            checked = compiled.verify()
    if output is not None:
        _save(compiled, output, progress)
        exported = export_to(compiled, output, emit, check, progress)
    verdict = None
    if samples is not None:
        with progress("judging"):
            verdict = compiled.assess(options["calibration"](compiled.program))
    _show(compiled, checked, verdict, output, exported, quiet, as_json)
    if checked is not None and not checked.ok:
        raise VerificationError(f"{compiled.plan.model} failed verification; see the table")


def _save(compiled: Compiled, output: Path, progress: Progress) -> None:
    from pnn_compile.artifact.directory import save
    from pnn_compile.report.html import quick_forecast

    with progress("forecasting"):
        forecast = quick_forecast(compiled)
    with progress("saving"):
        save(compiled, output, forecast)


def _compile(model: str, options: dict[str, Any], debug: bool) -> Compiled:
    from pnn_compile.compiled import compile as compile_model
    from pnn_compile.forecast.device_profiles import load_profile
    from pnn_compile.sources import load_source

    # What the user's own file prints belongs to stderr: stdout is the report's, or the JSON's.
    with redirect_stdout(sys.stderr):
        source = load_source(model, options.pop("inputs"), options.pop("arguments"))
    cuts = options.pop("cut_at")
    devices = options.pop("devices")
    plan_file = options.pop("plan_file")
    return compile_model(
        source.model,
        args=source.args,
        kwargs=source.kwargs,
        cuts=[name.strip() for name in cuts.split(",")] if cuts else None,
        plan=_read_plan(plan_file) if plan_file else None,
        devices=[load_profile(name.strip()) for name in devices.split(",")] if devices else None,
        debug=debug,
        **options,
    )


def _read_plan(path: Path) -> Any:
    from passes.plan.schema import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"the plan {path} cannot be read: {error.strerror}") from error


def _show(
    compiled: Compiled,
    checked: VerifyReport | None,
    verdict: Verdict | None,
    output: Path | None,
    exported: Sequence[Exported],
    quiet: bool,
    as_json: bool,
) -> None:
    if as_json:
        document = {
            "plan": json.loads(compiled.plan.to_json()),
            "capture": asdict(compiled.program.capture),
            "passes": [asdict(result) for result in compiled.passes],
            "verify": checks(checked) if checked else None,
            "calibration": asdict(compiled.calibration) if compiled.calibration else None,
            "verdict": asdict(verdict) if verdict else None,
            "output": str(output) if output else None,
            "onnx": [described(each) for each in exported],
        }
        click.echo(json.dumps(document, indent=2))
        return
    if quiet:
        return
    calibrated = compiled.calibration
    from pnn_compile.report.tables import verdict_table
    from pnn_compile.report.terminal import calibration_table, checks_table, report

    screen = console()
    screen.print(report(compiled, screen.width))
    if calibrated is not None:
        screen.print(calibration_table(calibrated))
    if verdict is not None:
        screen.print(verdict_table(verdict))
    if checked is not None:
        screen.print(checks_table(checked))
    if output is not None:
        screen.print(f"saved to {output}")
    for each in exported:
        screen.print(str(each))
