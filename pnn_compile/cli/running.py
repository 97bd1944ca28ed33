"""`pnn-compile run`: a first look at an artifact on several local processes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from passes.errors import VerificationError
from pnn_compile.cli.common import Progress, console
from pnn_compile.cli.options import DEBUG, JSON

__all__ = ["run_command"]


@click.command(name="run")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--ranks", type=click.IntRange(min=1), help="Processes; one a stage by default.")
@click.option("--batch", type=click.IntRange(min=1), help="Samples; as compiled by default.")
@click.option("--steps", default=5, type=click.IntRange(min=1), help="Steps that are timed.")
@click.option("--train", "training", is_flag=True, help="Training steps on a loss of its own.")
@click.option("--threads", default=1, type=click.IntRange(min=1), help="Threads of a process.")
@JSON
@DEBUG
def run_command(
    directory: Path,
    ranks: int | None,
    batch: int | None,
    steps: int,
    training: bool,
    threads: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Run an artifact on local processes: who holds what, seconds per step, equal outputs."""
    from pnn_compile.bench.first_run import first_run

    with Progress(as_json)("running"):
        found = first_run(
            directory, ranks=ranks, batch=batch, steps=steps, training=training, threads=threads
        )
    if as_json:
        click.echo(json.dumps(asdict(found) | {"equal": found.equal}, indent=2))
    else:
        from pnn_compile.report.tables import first_run_table

        console().print(first_run_table(found))
    if not found.equal:
        raise VerificationError(
            f"the ranks do not compute what one process does (relative error {found.error:.1e})"
        )
