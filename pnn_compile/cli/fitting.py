"""`pnn-compile assess`, `probe`, `fit` and `dial`: judge a network, and train it."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from passes.errors import OptionError, amount
from pnn_compile.cli.command import Command
from pnn_compile.cli.common import (
    ARG,
    CALIBRATION_BATCH,
    DEBUG,
    DIRECTORY,
    INPUT,
    JSON,
    SAMPLES,
    Progress,
    build_source,
    compile_source,
    compiler_options,
    console,
    read_numbers,
    show,
    target_options,
)

_CHECKED = 4
"""Batches on which a fit is compared with the network before it."""
_NEGLIGIBLE = 0.01
"""Relative error that a fit may leave in any case."""


@click.command(
    cls=Command,
    examples=[
        ("model.py samples.safetensors", "2, 3 and 4 stages"),
        ("model.py samples.npz -n 2,4,8 --iterations 3", "and up to 3 iterations"),
        ("model.py samples.npz -n 3 --windows 1,2,4", "the trunk as one, two and four runs"),
        ("model.py samples.npz --coarse-budget 0.1 --json", "as one JSON document"),
    ],
)
@click.argument("model")
@SAMPLES
@click.option(
    "-n", "--stages", default="2,3,4", metavar="N,N,...", help="Numbers of stages to try."
)
@click.option(
    "--windows", default="1", metavar="W,W,...", help="Numbers of windows to try with each."
)
@INPUT
@ARG
@compiler_options("coarse_budget")
@click.option(
    "--iterations",
    default=2,
    type=click.IntRange(min=1),
    help="Largest number K of parareal iterations to try.",
)
@JSON
@DEBUG
def assess(
    model: str,
    samples: Path,
    stages: str,
    windows: str,
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    coarse_budget: float | None,
    iterations: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Judge how well the trained MODEL converts, without training it.

    Compiles and calibrates MODEL, and compares outputs of the parareal networks and of early exits
    with those of MODEL on SAMPLES, a .safetensors or .npz file with an array per argument.
    """
    from pnn_compile.inputs import read_batches
    from pnn_compile.report.tables import verdict_table

    counts, runs = read_numbers(stages, "-n"), read_numbers(windows, "--windows")
    read = partial(read_batches, samples, size=CALIBRATION_BATCH, least=5)
    source = build_source(model, inputs, arguments)
    with Progress(as_json)("opening") as begin:
        compiled = compile_source(
            source, stages=counts[0], windows=runs[0], coarse_budget=coarse_budget,
            calibration=read, debug=debug, progress=begin,
        )  # fmt: skip
        begin("judging")
        verdict = compiled.assess(
            read(compiled.program),
            stages=counts[1:],
            windows=runs[1:],
            iterations=iterations,
            coarse_budget=coarse_budget,
        )
    show(as_json, verdict, verdict_table(verdict))


@click.command(
    cls=Command,
    examples=[
        ("model.py samples.safetensors", "five minutes, three stages"),
        ("model.py samples.npz -n 6 --minutes 20", "an array per argument, and labels"),
        ("hf:bert samples.npz --labels targets --batch 16", "targets of another name"),
    ],
)
@click.argument("model")
@SAMPLES
@click.option("--labels", default="labels", help="Name of the array of targets in SAMPLES.")
@click.option("--minutes", default=5.0, type=float, help="Time for all trainings together.")
@click.option("--batch", default=128, type=click.IntRange(min=1), help="Samples of a step.")
@click.option("--learning-rate", default=3e-3, type=float, help="Peak learning rate.")
@click.option("--seed", default=0, type=int, help="Seed of new weights and of the order.")
@target_options("3")
@JSON
@DEBUG
def probe(
    model: str,
    samples: Path,
    labels: str,
    minutes: float,
    batch: int,
    learning_rate: float,
    seed: int,
    stages: int,
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Train MODEL beside its parareal forms, for a few minutes.

    The forms are the default, chains and stars of copied blocks, whole or narrow, and channel maps;
    those that are predicted no faster than MODEL are left out. SAMPLES is a .safetensors or .npz
    file with an array per argument and one of labels. Every fifth batch is held out; early exits as
    fast as the forms are trained beside them.
    """
    from pnn_compile.inputs import read_batches
    from pnn_compile.report.tables import probe_table

    source = build_source(model, inputs, arguments)
    with Progress(as_json)("opening") as begin:
        compiled = compile_source(source, stages=stages, debug=debug, progress=begin)
    with Progress(as_json).bar("training") as advance:
        result = compiled.probe(
            read_batches(
                samples, compiled.program, batch, shuffle_seed=seed, least=5, labels=labels
            ),
            labels=labels, minutes=minutes, learning_rate=learning_rate, seed=seed,
            progress=advance,
        )  # fmt: skip
    show(as_json, result, probe_table(result))


@click.command(
    name="fit",
    cls=Command,
    examples=[
        ("build/model samples.safetensors", "one epoch, saved in place"),
        ("build/model samples.npz --epochs 3 --checkpoint fit.pt", "resumes if interrupted"),
        ("build/model samples.npz --interface-epochs 0.5 --epochs 0.5", "guesses first"),
    ],
)
@DIRECTORY
@SAMPLES
@click.option("--epochs", default=1.0, type=float, help="Passes over the samples, end to end.")
@click.option(
    "--interface-epochs",
    default=0.0,
    type=float,
    help="Passes before that to train every preprocessing operator and coarse propagator alone.",
)
@click.option("--batch", default=64, type=click.IntRange(min=1), help="Samples of a step.")
@click.option("--learning-rate", default=1.5e-3, type=float, help="Peak learning rate.")
@click.option("--dropout", is_flag=True, help="Keep dropout on.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="File to save to, and to resume from.",
)
@click.option(
    "--seed", "order_seed", default=0, type=int, help="Seed of the shuffled order of samples."
)
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
    order_seed: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Train DIRECTORY to the outputs of its original, and save it.

    DIRECTORY is an artifact, and SAMPLES is a .safetensors or .npz file with an array per argument;
    no labels are needed.
    """
    from pnn_compile.compiled import load
    from pnn_compile.fit.metrics import outputs_of, relative_error
    from pnn_compile.fit.train import fit
    from pnn_compile.inputs import read_batches

    compiled = load(directory)
    batches = read_batches(samples, compiled.program, batch, shuffle_seed=order_seed)
    few = batches[:_CHECKED]
    wanted = outputs_of(compiled, compiled.sequential, few)
    before = relative_error(outputs_of(compiled, compiled.module, few), wanted)
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
    after = relative_error(outputs_of(compiled, compiled.module, few), wanted)
    rose = not report.last_loss <= report.first_loss
    if rose and not after <= max(2 * before, _NEGLIGIBLE):
        raise OptionError(
            f"the fit would make {directory} worse, which is left as it was (relative error of "
            f"the outputs {before:.3g} before, {after:.3g} after): try "
            f"--learning-rate {learning_rate / 10:g}"
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
        f"{amount(report.steps, 'step')} on {amount(report.samples, 'sample')}: loss "
        f"{report.first_loss:.4g} to {report.last_loss:.4g}; saved to {directory}"
    )


@click.command(
    name="dial",
    cls=Command,
    examples=[
        ("build/model samples.safetensors", "error and speed by iterations"),
        ("build/model samples.npz --batch 16", "smaller batches"),
        ("build/model samples.npz --json", "as one JSON document"),
    ],
)
@DIRECTORY
@SAMPLES
@click.option("--batch", default=64, type=click.IntRange(min=1), help="Samples of a call.")
@JSON
@DEBUG
def dial_command(directory: Path, samples: Path, batch: int, as_json: bool, debug: bool) -> None:
    """Measure the error of DIRECTORY by number of iterations.

    DIRECTORY is an artifact, and SAMPLES is a .safetensors or .npz file with an array per argument.
    """
    from pnn_compile.compiled import load
    from pnn_compile.inputs import read_batches
    from pnn_compile.report.tables import dial_table

    compiled = load(directory)
    batches = read_batches(samples, compiled.program, batch)
    with Progress(as_json)("iterating"):
        rows = compiled.dial(batches)
    show(as_json, rows, dial_table(compiled.plan.model, rows))
