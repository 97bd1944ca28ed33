"""Cuts beside those of other algorithms on the same measured costs, and the time that takes.

python -m examples.studies.balance zoo       # measures every model of the tests and examples
python -m examples.studies.balance table     # the rows as a table
python -m examples.studies.balance sizes     # seconds of the search against its size
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples import decoder, resnet1001, unet, vgg16
from examples.studies.blocks import block_partition, equal_count
from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture
from passes.cost.node_facts import observe
from passes.errors import PnnError
from passes.options import Options
from passes.partition.choose_cuts import problem_builder
from passes.partition.problem import CutProblem, PositionCosts, makespan, serial
from passes.partition.search import solve
from tests.models.zoo import CASES

RESULTS = Path(__file__).parent / "results" / "balance.jsonl"
STAGES = (2, 4, 8)


def _built(case: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return case.build(), case.args(2), case.kwargs(2)


def models() -> Iterator[tuple[str, Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]]]:
    """Every model by name, with what builds it and its inputs."""
    for case in CASES:
        yield case.name, partial(_built, case)
    images = torch.randn(2, 3, 32, 32)
    yield "examples.vgg16", lambda: (vgg16.build_model(), (images,), {})
    yield "examples.resnet1001, 110 layers", lambda: (resnet1001.build_model(12), (images,), {})
    yield "examples.unet", lambda: (unet.build_model(), (torch.randn(1, 1, 64, 64),), {})
    yield (
        "examples.decoder, 24 blocks",
        lambda: (
            decoder.build_model(layers=24, width=128, heads=4, vocabulary=512, context=64),
            (torch.randint(512, (2, 64)),),
            {},
        ),
    )


def measured(build: Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> Analysis:
    """The analysis of a model, by seconds of a training step."""
    model, args, kwargs = build()
    program = capture(model, args, kwargs)
    return analyze(program, observe(program), "measured")


def rows(name: str, analysis: Analysis) -> Iterator[dict[str, Any]]:
    """For each number of stages, what every algorithm's cuts take on the same costs."""
    for stages in STAGES:
        options = Options(stages=stages, cost="measured")
        builder = problem_builder(analysis, options)
        candidates = len(builder.positions)
        if candidates < stages:
            continue
        problem = builder.build(builder.devices(stages))
        first = problem.devices[0]
        backward = first.backward_work or [0.0] * candidates
        work = [a + b for a, b in zip(first.work, backward, strict=True)]
        costs = [b - a for a, b in itertools.pairwise([0.0, *work])]
        cuts = {
            "ours": solve(problem).cuts,
            "blocks": tuple(end - 1 for end in block_partition(costs, stages)),
            "equal": tuple(end - 1 for end in equal_count(candidates, stages)),
            "ours, slowest stage alone": solve(without_serial(problem)).cuts,
        }
        yield {
            "model": name,
            "stages": stages,
            "positions": candidates,
            "time": {
                key: makespan(problem, cut) + serial(problem, cut) for key, cut in cuts.items()
            },
            "makespan": {key: makespan(problem, cut) for key, cut in cuts.items()},
        }


def without_serial(problem: CutProblem) -> CutProblem:
    """The same problem with a free sweep: the slowest stage is all that counts."""
    first = problem.devices[0]
    free = dataclasses.replace(first, hop=[0.0] * len(first.hop))
    return CutProblem(devices=(free,) * problem.stages)


def run() -> None:
    """Measure and cut every model, and write the rows."""
    with RESULTS.open("w", encoding="utf-8") as file:
        for name, build in models():
            try:
                analysis = measured(build)
                found = list(rows(name, analysis))
            except PnnError as error:
                print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            for row in found:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: {len(found)} rows", file=sys.stderr)


def table() -> str:
    """How much longer other cuts take than ours, as a Markdown table."""
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = [
        "| N | models | against | slowest stage: median, worst | never better | step time: "
        "median, worst | never better |",
        "|---|---|---|---|---|---|---|",
    ]
    for stages, other in itertools.product(STAGES, ("blocks", "equal")):
        here = [row for row in found if row["stages"] == stages]
        cells = []
        for key, ours in (("makespan", "ours, slowest stage alone"), ("time", "ours")):
            ratios = [row[key][other] / row[key][ours] for row in here]
            better = sum(ratio < 1 - 1e-6 for ratio in ratios)
            cells.append(f"{statistics.median(ratios) - 1:+.1%}, {max(ratios) - 1:+.1%}")
            cells.append("yes" if not better else f"no ({better})")
        lines.append(f"| {stages} | {len(here)} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def unequal(candidates: int, stages: int, *, phases: int, seed: int = 0) -> CutProblem:
    """A random chain for devices of half to twice the speed and of limited memory."""
    draw = random.Random(seed).uniform
    forward = [draw(0.5, 1.5) for _ in range(candidates)]
    backward = [node * draw(1.8, 2.2) for node in forward]
    share = candidates / stages
    coarse = [0.0025 * share * draw(0.8, 1.2) for _ in range(candidates)]
    most = math.ceil(2.5 * share)
    reach = [min(candidates - 1, place + most) for place in range(candidates)]

    def device() -> PositionCosts:
        slow = draw(0.5, 2.0)
        back = slow * draw(0.95, 1.05)
        two = phases == 2
        return PositionCosts(
            work=list(itertools.accumulate(slow * node for node in forward)),
            entry=[0.02 * share * slow] * candidates,
            hop=[slow * cost for cost in coarse],
            tail=[math.inf] * (candidates - 1) + [1.0],
            backward_work=list(itertools.accumulate(back * node for node in backward))
            if two
            else (),
            backward_entry=[0.04 * share * back] * candidates if two else (),
            reach=reach,
            first_reach=most,
            last_reach=reach,
        )

    return CutProblem(devices=tuple(device() for _ in range(stages)))


def sizes() -> None:
    """Print what the search takes against the number of positions and of devices."""
    print("| phases | positions | unequal devices | bounds tried | proven within | CPU seconds |")
    print("|---|---|---|---|---|---|")
    settings = [(p, 64) for p in (1250, 2500, 5000, 10_000)] + [(10_000, 128), (10_000, 256)]
    for phases, (candidates, stages) in itertools.product((1, 2), settings):
        problem = unequal(candidates, stages, phases=phases)
        start = time.process_time()
        found = solve(problem, gap=1e-3, evaluations=60)
        spent = time.process_time() - start
        print(
            f"| {phases} | {candidates:,} | {stages} | {found.evaluations} | {found.gap:.2%} | "
            f"{spent:.1f} |",
            flush=True,
        )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("zoo", "table", "sizes"))
    what = parser.parse_args().what
    torch.set_num_threads(1)
    if what == "zoo":
        run()
    elif what == "table":
        print(table())
    else:
        sizes()


if __name__ == "__main__":
    main()
