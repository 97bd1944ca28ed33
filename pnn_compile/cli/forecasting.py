"""`pnn-compile forecast` and `profile`: predict steps on many devices, and measure this device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from passes.errors import OptionError
from pnn_compile.cli.command import Command
from pnn_compile.cli.common import (
    ARG,
    CACHE,
    CALIBRATION_BATCH,
    DEBUG,
    INPUT,
    JSON,
    THREADS,
    Progress,
    build_source,
    compiler_options,
    is_artifact,
    read_numbers,
    show,
    write_text,
)


def device_counts(text: str) -> list[int]:
    """Read numbers of devices.

    >>> device_counts("2..4,8")
    [2, 3, 4, 8]

    Raises:
        OptionError: The text cannot be read, or a range is empty.
    """
    numbers: list[int] = []
    for word in text.split(","):
        first, dots, last = word.partition("..")
        if not dots:
            numbers += read_numbers(word, "-n")
            continue
        low, high = read_numbers(first, "-n")[0], read_numbers(last, "-n")[0]
        if high < low:
            raise OptionError(f"-n {word} is empty: name the smaller number first")
        numbers += range(low, high + 1)
    return numbers


@click.command(
    name="forecast",
    cls=Command,
    examples=[
        ("model.py --devices h100", "2 to 64 devices"),
        ("timm:resnet50 -n 2,4,8 --devices here.toml", "a profile of yours"),
        ("build/model -n 2..8 --inference", "the forward pass"),
        ("model.py -n 2..8 --windows 4", "the trunk as four runs"),
        ("build/model noise.npz --tolerance 0.01", "iterations of a tolerance"),
    ],
)
@click.argument("target")
@click.argument("samples", required=False, type=click.Path(path_type=Path))
@click.option(
    "--tolerance",
    type=float,
    help="Estimated relative error of SAMPLES, at most.",
    show_default="that of the artifact",
)
@click.option(
    "-n",
    "--stages",
    default="2..64",
    metavar="N..N",
    help="Numbers of devices, such as 2..8 or 2,4,8.",
)
@INPUT
@ARG
@click.option(
    "--devices",
    metavar="NAME,...",
    help="Profile of all devices, or one per device: built in (h100) or a .toml file.",
)
@click.option(
    "--cost",
    type=click.Choice(["flops", "roofline", "measured"]),
    help="Unit of costs.",
    show_default="roofline with --devices, else measured on this machine",
)
@click.option("--inference", is_flag=True, help="Predict the forward pass, not training steps.")
@compiler_options("windows", "coarse", "coarse_budget")
@click.option(
    "--micro-batches",
    default="4",
    metavar="M,...",
    help='Micro-batches of the pipelines to compare with; "" for no pipelines.',
)
@CACHE
@JSON
@DEBUG
@click.pass_context
def forecast_command(
    context: click.Context,
    target: str,
    samples: Path | None,
    tolerance: float | None,
    stages: str,
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    devices: str | None,
    cost: str | None,
    inference: bool,
    windows: int,
    coarse: str,
    coarse_budget: float | None,
    micro_batches: str,
    cache: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Predict a step of TARGET on N devices, beside other methods.

    TARGET is the directory of an artifact, or a model as in `pnn-compile compile`. With SAMPLES (a
    .safetensors or .npz file with an array per argument): how many iterations a tolerance takes on
    them, and the speed at these, for the stages of the artifact.
    """
    from pnn_compile.forecast.forecast import forecast, load_profile
    from pnn_compile.report.tables import forecast_tables

    if samples is not None:
        _count(context, samples)
        return
    if tolerance is not None:
        raise OptionError("--tolerance needs samples: pnn-compile forecast ARTIFACT SAMPLES")
    counts = device_counts(stages)
    profiles = [load_profile(name.strip()) for name in devices.split(",")] if devices else []
    model, examples = _open_model(target, inputs, arguments)
    progress = Progress(as_json)
    with progress("forecasting") as begin:
        table = forecast(
            model,
            stages=counts,
            devices=profiles[0] if len(profiles) == 1 else profiles,
            cost=cost,
            training=not inference,
            micro_batches=read_numbers(micro_batches, "--micro-batches") if micro_batches else [],
            windows=windows,
            coarse=coarse,
            coarse_budget=coarse_budget,
            cache=cache,
            progress=begin,
            **examples,
        )
    show(as_json, table.as_data(), forecast_tables(table))


def _count(context: click.Context, samples: Path) -> None:
    """Show how many iterations a tolerance takes on samples."""
    from pnn_compile.compiled import load
    from pnn_compile.forecast.count_iterations import count_iterations
    from pnn_compile.inputs import read_batches
    from pnn_compile.report.tables import count_table

    chosen = context.params
    target, as_json = chosen["target"], chosen["as_json"]
    kept = {"target", "samples", "tolerance", "as_json", "debug"}
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if option.name not in kept and source is not click.core.ParameterSource.DEFAULT:
            raise OptionError(f"{option.opts[0]} does not go with samples: leave one of them out")
    if not is_artifact(target):
        raise OptionError(
            f"iterations are counted for an artifact (got {target}): save one with "
            "`pnn-compile MODEL -n N -o DIR`"
        )
    compiled = load(target)
    batches = read_batches(samples, compiled.program, CALIBRATION_BATCH)
    with Progress(as_json)("iterating"):
        counted = count_iterations(compiled, batches, chosen["tolerance"])
    show(as_json, counted, count_table(compiled.plan.model, counted))


def _open_model(
    target: str, inputs: tuple[str, ...], arguments: tuple[str, ...]
) -> tuple[Any, dict[str, Any]]:
    """Load an artifact, or build a model; return it, and the example inputs of a model."""
    from pnn_compile.compiled import load

    if is_artifact(target):
        return load(target), {}
    source = build_source(target, inputs, arguments)
    return source.model, {"args": source.args, "kwargs": source.kwargs}


@click.command(
    name="profile",
    cls=Command,
    examples=[
        ("-o here.toml", "this device"),
        ("--device cpu --threads 4 -o cpu-4.toml", "4 threads"),
        ("--json", "as one JSON document"),
    ],
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write (.toml).")
@click.option(
    "--device",
    "kind",
    type=click.Choice(["cpu", "cuda"]),
    help="Device to measure.",
    show_default="cuda if there is one",
)
@THREADS
@click.option("--name", help="Name of the profile.", show_default="that of the device")
@JSON
@DEBUG
def profile_command(
    output: Path | None,
    kind: str | None,
    threads: int,
    name: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Measure this device, and the link between two local processes.

    Without -o the profile goes to stdout. Use it by `pnn-compile forecast MODEL --devices FILE`.
    """
    from passes.cost.device_profile import write_profile
    from pnn_compile.bench.measure_device import measure_device

    with Progress(as_json)("measuring") as begin:
        profile = measure_device(kind, threads=threads, name=name, progress=begin)
    text = write_profile(profile)
    if output is not None:
        write_text(output, text)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(profile), indent=2))
    else:
        click.echo(text if output is None else f"{text}\nwritten to {output}")
