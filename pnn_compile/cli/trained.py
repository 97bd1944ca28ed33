"""`pnn-compile assess`, `fit` and `dial`: what a trained model keeps, and how to keep more."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from pnn_compile.cli.common import CALIBRATION_BATCH, Progress, console, numbers
from pnn_compile.cli.options import DEBUG, JSON

__all__ = ["assess", "dial_command", "fit_command"]


@click.command()
@click.argument("model")
@click.argument("samples", type=click.Path(path_type=Path))
@click.option("-n", "--stages", default="2,3,4", metavar="N,N,...", help="Numbers of stages.")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE[:DTYPE]", help="Example input.")
@click.option("--coarse-budget", default=0.05, type=float, help="Largest share of the sweep.")
@click.option("--iterations", default=2, type=click.IntRange(min=1), help="Largest K to try.")
@JSON
@DEBUG
def assess(
    model: str,
    samples: Path,
    stages: str,
    inputs: tuple[str, ...],
    coarse_budget: float,
    iterations: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Tell what MODEL, trained, keeps as a parareal network, on SAMPLES, without training it."""
    from pnn_compile.compiled import compile as compile_model
    from pnn_compile.inputs import read_batches
    from pnn_compile.report.tables import verdict_table
    from pnn_compile.sources import load_source

    sizes = numbers(stages, "-n")
    read = partial(read_batches, samples, size=CALIBRATION_BATCH, least=5)
    with redirect_stdout(sys.stderr):
        source = load_source(model, inputs)
    with Progress(as_json)("judging"):
        compiled = compile_model(
            source.model, args=source.args, kwargs=source.kwargs, stages=sizes[0],
            coarse_budget=coarse_budget, calibration=read, debug=debug,
        )  # fmt: skip
        verdict = compiled.assess(
            read(compiled.program),
            stages=sizes[1:],
            iterations=iterations,
            coarse_budget=coarse_budget,
        )
    if as_json:
        click.echo(json.dumps(asdict(verdict), indent=2))
    else:
        console().print(verdict_table(verdict))


@click.command(name="fit")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("samples", type=click.Path(path_type=Path))
@click.option("--epochs", default=1.0, type=float, help="Times through the samples.")
@click.option(
    "--interface-epochs",
    default=0.0,
    type=float,
    help="Times before that, for every guess and correction by itself.",
)
@click.option("--batch", default=64, type=click.IntRange(min=1), help="Samples per step.")
@click.option("--learning-rate", default=1.5e-3, type=float, help="Peak learning rate.")
@click.option("--dropout", is_flag=True, help="Leave dropout on.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="File to save to and resume.")
@click.option("--seed", default=0, type=int, help="Seed of the order of the samples.")
@JSON
@DEBUG
def fit_command(
    directory: Path,
    samples: Path,
    epochs: float,
    interface_epochs: float,
    batch: int,
    learning_rate: float,
    dropout: bool,
    checkpoint: Path | None,
    seed: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Train a saved artifact to the outputs of its original on SAMPLES, and save it again."""
    from pnn_compile.compiled import load
    from pnn_compile.fit.train import fit
    from pnn_compile.inputs import read_batches

    compiled = load(directory)
    batches = read_batches(samples, compiled.program, batch, shuffle_seed=seed)
    with Progress(as_json).bar("fitting") as advance:
        report = fit(
            compiled,
            batches,
            epochs=epochs,
            interface_epochs=interface_epochs,
            learning_rate=learning_rate,
            dropout=dropout,
            checkpoint=checkpoint,
            progress=advance,
        )
    compiled.save(directory)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    from pnn_compile.report.terminal import interfaces_table

    screen = console()
    if report.interfaces:
        screen.print(interfaces_table(report))
    screen.print(
        f"{report.steps} steps on {report.samples} samples: loss {report.first_loss:.4g} to "
        f"{report.last_loss:.4g}; saved to {directory}"
    )


@click.command(name="dial")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("samples", type=click.Path(path_type=Path))
@click.option("--batch", default=64, type=click.IntRange(min=1), help="Samples per call.")
@JSON
@DEBUG
def dial_command(directory: Path, samples: Path, batch: int, as_json: bool, debug: bool) -> None:
    """Measure on SAMPLES what a saved artifact gives at every number of iterations."""
    from pnn_compile.compiled import load
    from pnn_compile.inputs import read_batches

    compiled = load(directory)
    batches = read_batches(samples, compiled.program, batch)
    with Progress(as_json)("iterating"):
        rows = compiled.dial(batches)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from pnn_compile.report.tables import dial_table

    console().print(dial_table(compiled.plan.model, rows))
