"""`pnn-compile bench`: a parareal network beside what else N processes could do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from passes.errors import OptionError
from pnn_compile.cli.common import Progress, console, numbers, open_target
from pnn_compile.cli.options import ARG, DEBUG, JSON, stages_option

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["bench_command"]


@click.command(name="bench")
@click.argument("target")
@click.option("-n", "--stages", default="2", callback=stages_option, help="For a model: stages.")
@click.option("--input", "inputs", multiple=True, metavar="SHAPE[:DTYPE]", help="For a model.")
@ARG
@click.option("--ranks", type=click.IntRange(min=1), help="Processes; one a stage by default.")
@click.option("--batch", "batches", default="1", metavar="B,B,...", help="Samples of a step.")
@click.option(
    "--against",
    default="direct,threads,ddp,gpipe,1f1b",
    metavar="NAME,...",
    help="direct (layers called as in the stages), threads, ddp, the pipelines gpipe and 1f1b at "
    "their best number of micro-batches, or gpipe:M, 1f1b:M at M of them; the original is always "
    "measured.",
)
@click.option(
    "--streams",
    metavar="N,N,...",
    help="On one GPU, stages side by side on CUDA streams, in place of processes.",
)
@click.option("--inference", is_flag=True, help="Forward alone, instead of training steps.")
@click.option("--rounds", default=7, type=click.IntRange(min=1), help="Steps of each.")
@click.option("--threads", default=1, type=click.IntRange(min=1), help="Threads of a process.")
@JSON
@DEBUG
def bench_command(
    target: str,
    stages: int | Literal["auto"],
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    ranks: int | None,
    batches: str,
    against: str,
    streams: str | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Measure a step of TARGET, an artifact or a model, on local processes, side by side."""
    if streams is not None:
        counts = numbers(streams, "--streams")
        with Progress(as_json)("compiling"):
            networks = [open_target(target, n, inputs, arguments, debug) for n in counts]
        _bench_streams(networks, counts, numbers(batches, "--batch"), as_json, options)
        return
    from pnn_compile.bench import bench
    from pnn_compile.report.tables import bench_table

    sizes = numbers(batches, "--batch")
    names = [name.strip() for name in against.split(",") if name.strip()]
    with Progress(as_json)("compiling"):
        compiled = open_target(target, stages, inputs, arguments, debug)
    with Progress(as_json)("measuring"):
        found = bench(
            compiled,
            ranks=ranks,
            batches=sizes,
            against=names,
            training=not options["inference"],
            rounds=options["rounds"],
            threads=options["threads"],
        )
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        console().print(bench_table(found))
    if any(timing.contender == "parareal" and timing.problem for timing in found.timings):
        raise OptionError("the parareal network could not run; see the table")


def _bench_streams(
    networks: list[Compiled],
    counts: list[int],
    batches: list[int],
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from pnn_compile.bench.gpu_streams import bench_streams
    from pnn_compile.report.tables import streams_table

    found = [len(network.plan.stages) for network in networks]
    if found != counts:
        raise OptionError(f"the artifact has {found[0]} stages: ask for --streams {found[0]}")
    training = not options["inference"]
    with Progress(as_json)("measuring"):
        measured = bench_streams(
            networks, batches=batches, training=training, rounds=options["rounds"]
        )
    if as_json:
        click.echo(json.dumps(asdict(measured), indent=2))
    else:
        console().print(streams_table(measured))
