"""`pnn-compile forecast` and `profile`: what devices would give, and what the one at hand is."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from passes.errors import OptionError
from pnn_compile.cli.common import Progress, console, numbers, write_file
from pnn_compile.cli.options import ARG, CACHE, DEBUG, JSON, compiler_options

__all__ = ["counts", "forecast_command", "profile_command"]


def counts(text: str) -> list[int]:
    """Read numbers of devices: 2..64, 2,4,8, or both mixed."""
    found: list[int] = []
    for word in text.split(","):
        first, dots, last = word.partition("..")
        if not dots:
            found += numbers(word, "-n")
            continue
        low, high = numbers(first, "-n")[0], numbers(last, "-n")[0]
        if high < low:
            raise OptionError(f"-n {word} is empty: name the smaller number first")
        found += range(low, high + 1)
    return found


@click.command(name="forecast")
@click.argument("target")
@click.option("-n", "--stages", default="2..64", metavar="N..N", help="Numbers of devices.")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE[:DTYPE]", help="For a model.")
@ARG
@click.option(
    "--devices",
    metavar="NAME,...",
    help="Profile of every device, or of each of several: built in (h100) or a .toml file.",
)
@click.option(
    "--cost",
    type=click.Choice(["flops", "roofline", "measured"]),
    help="How nodes are weighed: roofline where --devices are given, else measured here.",
)
@click.option("--inference", is_flag=True, help="Forward alone, instead of training steps.")
@compiler_options("coarse", "coarse_budget")
@click.option("--micro-batches", default="4", metavar="M,...", help="Of pipelines set beside.")
@CACHE
@JSON
@DEBUG
def forecast_command(
    target: str,
    stages: str,
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    devices: str | None,
    cost: str | None,
    inference: bool,
    coarse: str,
    coarse_budget: float,
    micro_batches: str,
    cache: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Forecast a step of TARGET, a model or an artifact, on numbers of devices."""
    from pnn_compile.forecast.device_profiles import load_profile
    from pnn_compile.forecast.forecast import forecast

    wanted = counts(stages)
    profiles = [load_profile(name.strip()) for name in devices.split(",")] if devices else []
    model, given = _target(target, inputs, arguments)
    progress = Progress(as_json)
    with progress("forecasting") as say:
        found = forecast(
            model,
            stages=wanted,
            devices=profiles[0] if len(profiles) == 1 else profiles,
            cost=cost,
            training=not inference,
            micro_batches=numbers(micro_batches, "--micro-batches") if micro_batches else [],
            coarse=coarse,
            coarse_budget=coarse_budget,
            cache=cache,
            progress=say,
            **given,
        )
    if as_json:
        click.echo(json.dumps(found.as_data(), indent=2))
        return
    from pnn_compile.report.tables import forecast_tables

    console().print(forecast_tables(found))


def _target(
    target: str, inputs: tuple[str, ...], arguments: tuple[str, ...]
) -> tuple[Any, dict[str, Any]]:
    """What to forecast, and the example inputs of a model."""
    from pnn_compile.compiled import load
    from pnn_compile.sources import load_source

    if Path(target).is_dir() and (Path(target) / "plan.json").is_file():
        return load(target), {}
    with redirect_stdout(sys.stderr):
        source = load_source(target, inputs, arguments)
    return source.model, {"args": source.args, "kwargs": source.kwargs}


@click.command(name="profile")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write (.toml).")
@click.option("--device", "kind", type=click.Choice(["cpu", "cuda"]), help="Default: what is here.")
@click.option("--threads", default=1, type=click.IntRange(min=1), help="Threads of a process.")
@click.option("--name", help="What to call the device.")
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
    """Measure the device at hand, and the link between two local processes.

    Without -o the profile goes to stdout. `pnn-compile forecast MODEL --devices FILE` uses it.
    """
    import dataclasses

    from passes.cost.device_profile import write_profile
    from pnn_compile.bench.measure_device import measure_device

    with Progress(as_json)("measuring") as say:
        found = measure_device(kind, threads=threads, name=name, progress=say)
    text = write_profile(found)
    if output is not None:
        write_file(output, text)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        click.echo(text if output is None else f"{text}\nwritten to {output}")
