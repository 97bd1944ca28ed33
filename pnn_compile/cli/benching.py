"""`pnn-compile run` and `bench`: measure a network on local processes, beside other methods."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from passes.errors import OptionError, VerificationError
from pnn_compile.cli.command import Command
from pnn_compile.cli.common import (
    DEBUG,
    DIRECTORY,
    JSON,
    RANKS,
    THREADS,
    Progress,
    open_target,
    read_numbers,
    show,
    target_options,
)

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled


@click.command(
    name="run",
    cls=Command,
    examples=[
        ("build/model", "a process per stage"),
        ("build/model --ranks 2 --train", "training steps on 2 processes"),
        ("build/model --batch 16 --steps 20", "other steps"),
    ],
)
@DIRECTORY
@RANKS
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Samples of a step.",
    show_default="as compiled",
)
@click.option("--steps", default=5, type=click.IntRange(min=1), help="Number of timed steps.")
@click.option(
    "--train",
    "training",
    is_flag=True,
    help="Time training steps, with the mean square of the outputs as loss.",
)
@THREADS
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
    """Run the artifact DIRECTORY on local processes.

    Shows the stages of every process and the seconds of a step, and compares the outputs with those
    of one process.
    """
    from pnn_compile.bench.first_run import first_run
    from pnn_compile.report.tables import first_run_table

    with Progress(as_json)("running"):
        result = first_run(
            directory, ranks=ranks, batch=batch, steps=steps, training=training, threads=threads
        )
    show(as_json, asdict(result) | {"equal": result.equal}, first_run_table(result))
    if not result.equal:
        raise VerificationError(
            f"the ranks do not compute what one process does (relative error {result.error:.1e})"
        )


@click.command(
    name="bench",
    cls=Command,
    examples=[
        ("build/model --batch 1,8", "two batch sizes"),
        ("model.py -n 4 --against ddp,gpipe:8", "beside other methods"),
        ("model.py --streams 2,4", "on CUDA streams of one GPU"),
    ],
)
@click.argument("target")
@target_options("2")
@RANKS
@click.option("--batch", "batches", default="1", metavar="B,B,...", help="Samples of a step.")
@click.option(
    "--against",
    default="direct,threads,ddp,gpipe,1f1b",
    metavar="NAME,...",
    help="Methods to compare with: direct (the original, its layers called as in the stages), "
    "threads, ddp, the pipelines gpipe and 1f1b at their best number of micro-batches, or gpipe:M "
    "and 1f1b:M at M of them; the original is always measured.",
)
@click.option(
    "--streams",
    metavar="N,N,...",
    help="Measure numbers of stages on CUDA streams of one GPU, instead of processes.",
)
@click.option("--inference", is_flag=True, help="Time the forward pass, not training steps.")
@click.option("--rounds", default=7, type=click.IntRange(min=1), help="Steps of every method.")
@THREADS
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
    """Measure a step of TARGET beside other methods, on local processes.

    TARGET is the directory of an artifact, or a model as in `pnn-compile compile`: that is cut by
    measured seconds, anew for every batch size.
    """
    sizes = read_numbers(batches, "--batch")
    if streams is not None:
        counts = read_numbers(streams, "--streams")
        with Progress(as_json)("opening") as begin:
            networks = [open_target(target, n, inputs, arguments, debug, begin) for n in counts]
        _bench_streams(networks, counts, sizes, as_json, options)
        return
    from pnn_compile.bench import bench
    from pnn_compile.report.tables import bench_table

    names = [name.strip() for name in against.split(",") if name.strip()]
    training = not options["inference"]
    with Progress(as_json)("opening") as begin:
        compiled = open_target(target, stages, inputs, arguments, debug, begin)
        cuts = [(compiled, sizes)]
        if not Path(target).is_dir():
            begin("cutting by seconds")
            cuts = [(_cut_by_seconds(compiled, size, training), [size]) for size in sizes]
        begin("measuring")
        results = [
            bench(
                network,
                ranks=ranks,
                batches=counts,
                against=names,
                training=training,
                rounds=options["rounds"],
                threads=options["threads"],
            )
            for network, counts in cuts
        ]
    joined: dict[str, Any] = {
        name: tuple(row for one in results for row in getattr(one, name))
        for name in ("timings", "parts", "together")
    }
    result = dataclasses.replace(results[0], **joined)
    show(as_json, result, bench_table(result))
    if any(timing.contender == "parareal" and timing.problem for timing in result.timings):
        raise OptionError("the parareal network could not run; see the table")


def _cut_by_seconds(compiled: Compiled, batch: int, training: bool) -> Compiled:
    """Compile the captured model again, cut by measured seconds of a batch of this size."""
    from passes.options import Options
    from pnn_compile.compiled import compile_program
    from pnn_compile.inputs import check_batch_size, resized

    check_batch_size(compiled, batch)
    arguments = resized(compiled, batch, compiled.program.device)
    program = dataclasses.replace(compiled.program, args=arguments)
    cost: Any = "measured" if training else "measured-forward"
    options = Options(stages=compiled.plan.devices, windows=compiled.plan.windows, cost=cost)
    return compile_program(program, options)


def _bench_streams(
    networks: list[Compiled],
    counts: list[int],
    batches: list[int],
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Measure networks on CUDA streams, and show the result."""
    from pnn_compile.bench.gpu_streams import bench_streams
    from pnn_compile.report.tables import streams_table

    compiled_counts = [len(network.plan.stages) for network in networks]
    if compiled_counts != counts:  # an artifact has one number of stages
        stages = compiled_counts[0]
        raise OptionError(f"the artifact has {stages} stages: ask for --streams {stages}")
    training = not options["inference"]
    with Progress(as_json)("measuring"):
        result = bench_streams(
            networks, batches=batches, training=training, rounds=options["rounds"]
        )
    show(as_json, result, streams_table(result))
