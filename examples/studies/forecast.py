"""Do stages take what their plan says? Predicted beside measured seconds, stage by stage.

    python -m examples.studies.forecast run vgg16 --stages 2 4
    python -m examples.studies.forecast table

`run` compiles a model of examples/ with cost="measured" and then times the compiled stages as the
runtime runs them, in training, one thread, in a process of the kind that the ranks are. It appends
a line per number of stages to results/forecast.jsonl; `table` writes the table of all lines.

The speed of a shared machine drifts between the measurement that a plan is made from and the timing
of the stages. So the same measurement of the same nodes is made again between the rounds: "planned"
is what the plan said, "predicted" what it would say in the minutes of the timing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import pnn_compile as pnn
from examples.studies.balance import without_serial
from passes.analysis.analysis import Analysis
from passes.cost.measured import measure_seconds
from passes.options import Options
from passes.partition.choose_cuts import problem_builder
from passes.partition.problem import makespan
from passes.partition.search import solve
from passes.schedule.instruction import Kind
from pnn_compile.bench.measurements import PartsTimer
from pnn_compile.runtime import Times
from pnn_compile.runtime.local_ranks import run_on_ranks
from pnn_compile.sources import load_source

RESULTS = Path(__file__).parent / "results" / "forecast.jsonl"
ARGUMENTS = {"decoder": ("layers=24",)}
ROUNDS = 7
STEPS = 5

FORWARD = (Kind.GUESS, Kind.FINE)
BACKWARD = (Kind.FINE_BACKWARD, Kind.GUESS_BACKWARD)
FINE = (Kind.FINE, Kind.FINE_BACKWARD)
SWEEP = (Kind.CORRECT, Kind.COARSE_BACKWARD)


def study(
    device: torch.device, model: str, counts: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Compile into every number of stages, then time the stages."""
    source = load_source(f"examples/{model}.py", (), ARGUMENTS.get(model, ()))
    rows = []
    for count in counts:
        compiled = pnn.compile(
            source.model, args=source.args, kwargs=source.kwargs, stages=count, cost="measured",
            cache=False,
        )  # fmt: skip
        timer = PartsTimer(compiled, dict(compiled.program.args), range(count), training=True)
        timer.instructions()
        runs, again = [], []
        for _ in range(rounds):
            runs += [timer.instructions() for _ in range(STEPS)]
            again.append(remeasured(compiled))
        known = Times.of(compiled.plan).compute
        planned = [{kind: known.get((kind, n), 0.0) for kind in Kind} for n in range(count)]
        predicted = [
            {**stage, **{kind: statistics.median(each[n][kind] for each in again) for kind in FINE}}
            for n, stage in enumerate(planned)
        ]
        measured = [
            {kind: statistics.median(run[n].get(kind, 0.0) for run in runs) for kind in Kind}
            for n in range(count)
        ]
        row = {"model": model, "stages": count, "rounds": rounds, "torch": torch.__version__}
        row["planned"] = [_named(each) for each in planned]
        row["least"] = least_imbalance(compiled.weighed, count)
        row["predicted"] = [_named(each) for each in predicted]
        row["measured"] = [_named(each) for each in measured]
        rows.append(row | {"machine": platform.processor() or platform.machine()})
    return rows


def remeasured(compiled: pnn.Compiled) -> list[dict[Kind, float]]:
    """Seconds of the fine stages by the measurement that the plan was made from, made again."""
    assert compiled.weighed is not None
    frontiers = compiled.weighed.frontiers
    names = [node.name for node in frontiers.order]
    ends = [names.index(stage.last) + 1 for stage in compiled.plan.stages]
    stops = sorted({p.index for p in frontiers.positions} | {*ends, len(names)})
    segments = [frontiers.order[a:b] for a, b in itertools.pairwise([0, *stops])]
    found = measure_seconds(compiled.weighed.program, segments, backward=True)
    stages = []
    for start, end in itertools.pairwise([0, *ends]):
        own = [each for each, stop in zip(found, stops, strict=True) if start < stop <= end]
        ways = sum(each.forward for each in own), sum(each.backward for each in own)
        stages.append(dict(zip(FINE, ways, strict=True)))
    return stages


def least_imbalance(analysis: Analysis | None, stages: int) -> float:
    """The imbalance of the cuts with the fastest slowest stage, whatever the sweep costs then."""
    assert analysis is not None
    builder = problem_builder(analysis, Options(stages=stages, cost="measured"))
    problem = builder.build(builder.devices(stages))
    cuts = solve(without_serial(problem)).cuts
    total = sum(cost.makespan for cost in problem.stage_costs(cuts))
    return makespan(problem, cuts) * stages / total


def _named(seconds: Mapping[Kind, float]) -> dict[str, float]:
    return {kind.value: value for kind, value in seconds.items() if value}


def way(stages: Sequence[Mapping[str, float]], kinds: Sequence[Kind]) -> list[float]:
    """Seconds of some kinds of work, by stage."""
    return [sum(stage.get(kind.value, 0.0) for kind in kinds) for stage in stages]


def whole(stages: Sequence[Mapping[str, float]]) -> list[float]:
    """Seconds of every stage with its guess, forward and backward."""
    return way(stages, (*FORWARD, *BACKWARD))


def imbalance(stages: Sequence[Mapping[str, float]]) -> float:
    """Slowest stage over mean: the slowest forward and the slowest backward, as ranks wait."""
    ways = [way(stages, FORWARD), way(stages, BACKWARD)]
    return sum(map(max, ways)) / sum(map(statistics.mean, ways))


def error(row: Mapping[str, Any], said: str) -> float:
    """How far predicted seconds are from measured ones, the median over the stages."""
    pairs = zip(whole(row[said]), whole(row["measured"]), strict=True)
    return statistics.median(abs(predicted / measured - 1) for predicted, measured in pairs)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, the last of every model and number of stages."""
    last = {(row["model"], row["stages"]): row for row in rows}
    lines = [
        "| model | N | planned by stage (ms) | predicted (ms) | measured (ms) | error of the plan "
        "| of the prediction | imbalance possible | predicted | measured | sweep and head planned "
        "(ms) | measured (ms) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, count), row in sorted(last.items()):
        said = row["planned"], row["predicted"], row["measured"]
        stages = [" ".join(f"{1e3 * value:.1f}" for value in whole(side)) for side in said]
        serial = (*SWEEP, Kind.HEAD, Kind.HEAD_BACKWARD)
        sweeps = [f"{1e3 * sum(way(side, serial)):.1f}" for side in (said[0], said[2])]
        uneven = [f"{imbalance(side):.3f}" for side in said[1:]]
        possible = f"{row['least']:.3f}"
        errors = f"{error(row, 'planned'):.1%}", f"{error(row, 'predicted'):.1%}"
        cells = (model, count, *stages, *errors, possible, *uneven, *sweeps)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("model")
    run.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    run.add_argument("--rounds", type=int, default=ROUNDS)
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        order = arguments.model, arguments.stages, arguments.rounds
        rows = run_on_ranks(study, 1, *order)[0]
        with RESULTS.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(table(rows))
    else:
        lines = RESULTS.read_text(encoding="utf-8").splitlines()
        print(table([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()
