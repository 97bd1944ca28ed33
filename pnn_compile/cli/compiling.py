"""`pnn-compile MODEL`: compile, calibrate, verify, save."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passes.errors import OptionError, VerificationError
from pnn_compile.cli.command import Command, read_config, save_config
from pnn_compile.cli.common import (
    ARG,
    CACHE,
    CALIBRATION_BATCH,
    DEBUG,
    INPUT,
    JSON,
    Progress,
    build_source,
    checks_data,
    compile_source,
    compiler_options,
    console,
    read_plan,
    stages_option,
)
from pnn_compile.cli.exporting import export_to, exported_data

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled
    from pnn_compile.evaluate.assess import Verdict
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.export.onnx import Exported

FORMATS = ("graph", "onnx", "onnx-stages")
"""Formats that can be written into the directory."""


def _read_formats(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    formats = _read_names(_, __, value)
    unknown = [part for part in formats if part not in FORMATS]
    if unknown:
        raise OptionError(f"--emit takes {', '.join(FORMATS)} (got {', '.join(unknown)})")
    return formats


def _read_names(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


@click.command(
    name="compile",
    cls=Command,
    examples=[
        ("model.py -n 4 -o build/model", "4 stages, saved"),
        ("timm:resnet50 -n 3 --coarse linear --save-config options.toml", "options for again"),
        ("model.py -n 3 --calibrate samples.safetensors -o build/model", "a trained model"),
    ],
)
@click.argument("model")
@stages_option("auto", "Number of stages, or auto: the smallest one that is about the fastest.")
@INPUT
@ARG
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to save to.")
@click.option(
    "--emit",
    default="graph",
    callback=_read_formats,
    metavar="FORMAT,...",
    help="Formats to write into the directory: graph, onnx (model.onnx), onnx-stages (a model per "
    "stage, and manifest.json).",
)
@click.option(
    "--cost",
    default="flops",
    type=click.Choice(["flops", "measured", "measured-forward", "roofline", "roofline-forward"]),
    help="Unit of costs: FLOPs, or seconds of a training step or of the forward pass, measured on "
    "this machine or by the profile of a device.",
)
@click.option(
    "--devices",
    metavar="NAME,...",
    help="Profile of all devices, or one per stage: built in (h100) or a .toml file.",
)
@compiler_options(
    "coarse", "coarse_budget", "coarse_width", "units", "rank", "preprocess", "prologue",
    "correction", "sweep", "iterations", "tolerance", "windows", "cut_inside_blocks",
    "seed",
)  # fmt: skip
@click.option(
    "--cut-at",
    metavar="NAME,...",
    help="Modules that start stages 1 to N - 1.",
    show_default="search",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="Plan to replay; its cuts may have been moved.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Samples (.safetensors or .npz) to fit preprocessing operators and coarse propagators on.",
)
@click.option(
    "--dynamic",
    default="batch",
    metavar="NAME,...",
    callback=_read_names,
    help="Free dimensions: batch, sequence (dimension 1 of the first input, and others of its "
    "length), or both; '' for the shapes of the example alone.",
)
@click.option(
    "--validate",
    default="full",
    type=click.Choice(["full", "fast", "off"]),
    help="How the captured graph is compared with the model: full, outputs, buffers and "
    "gradients in both modes on two inputs; fast, without gradients and on one input, about half "
    "the time; off, in evaluation mode alone. The report says what it took.",
)
@click.option(
    "--verify/--no-verify", "check", default=True, help="Check the network against the original."
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="TOML file of options, which the command line overrides.",
)
@click.option(
    "--save-config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the options of this call to a TOML file.",
)
@click.option("-q", "--quiet", is_flag=True, help="Show no report.")
@CACHE
@JSON
@DEBUG
def compile_command(
    model: str,
    output: Path | None,
    emit: tuple[str, ...],
    calibrate: Path | None,
    check: bool,
    quiet: bool,
    config_file: Path | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Compile MODEL into a parareal neural network.

    \b
    MODEL is one of
      file.py, file.py:name, package.module:name
      timm:NAME, torchvision:NAME    random weights
      hf:NAME                        a model type or class of transformers, small and random,
                                     or a folder with a config.json
      file.pt2                       written by torch.export.save; no code in it is run
    """  # noqa: D301  # click reads the backspace
    if output is None and emit != ("graph",):
        raise OptionError(f"--emit {','.join(emit)} needs a directory to write to: add -o DIR")
    if config_file is not None:
        save_config(click.get_current_context(), config_file)
    from pnn_compile.artifact.directory import check_replaceable
    from pnn_compile.inputs import read_batches

    if output is not None:
        check_replaceable(output)
    progress = Progress(quiet or as_json)
    if calibrate is not None:
        options["calibration"] = partial(read_batches, calibrate, size=CALIBRATION_BATCH, least=5)
    with progress("building the model") as begin:
        compiled = _compile(model, options, debug, begin)
    checked: VerifyReport | None = None
    exported: list[Exported] = []
    if check:
        with progress("verifying"):
            checked = compiled.verify()
    if output is not None:
        _save(compiled, output, progress)
        exported = export_to(compiled, output, emit, check, progress)
    verdict = None
    if calibrate is not None:
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


def _compile(
    model: str, options: dict[str, Any], debug: bool, begin: Callable[[str], object]
) -> Compiled:
    from pnn_compile.forecast.forecast import load_profile

    source = build_source(model, options.pop("inputs"), options.pop("arguments"))
    cuts = options.pop("cut_at")
    devices = options.pop("devices")
    plan_file = options.pop("plan_file")
    return compile_source(
        source,
        cuts=[name.strip() for name in cuts.split(",")] if cuts else None,
        plan=read_plan(plan_file) if plan_file else None,
        devices=[load_profile(name.strip()) for name in devices.split(",")] if devices else None,
        debug=debug,
        progress=begin,
        **options,
    )


def _show(
    compiled: Compiled,
    checked: VerifyReport | None,
    verdict: Verdict | None,
    output: Path | None,
    exported: Sequence[Exported],
    quiet: bool,
    as_json: bool,
) -> None:
    """Show the result as tables or as one JSON document."""
    if as_json:
        document = {
            "plan": json.loads(compiled.plan.to_json()),
            "capture": asdict(compiled.program.capture),
            "passes": [asdict(result) for result in compiled.passes],
            "verify": checks_data(checked) if checked else None,
            "calibration": asdict(compiled.calibration) if compiled.calibration else None,
            "verdict": asdict(verdict) if verdict else None,
            "output": str(output) if output else None,
            "onnx": [exported_data(export) for export in exported],
        }
        click.echo(json.dumps(document, indent=2))
        return
    if quiet:
        return
    from pnn_compile.report.tables import verdict_table
    from pnn_compile.report.terminal import checks_table, report

    screen = console()
    screen.print(report(compiled, screen.width))
    if verdict is not None:
        screen.print(verdict_table(verdict))
    if checked is not None:
        screen.print(checks_table(checked))
    if output is not None:
        screen.print(f"saved to {output}")
    for export in exported:
        screen.print(str(export))
