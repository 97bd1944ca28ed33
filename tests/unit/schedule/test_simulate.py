"""The simulator: small cases by hand, the step-time model, and ranks that really run."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pnn_compile as pnn
from examples import unet
from pnn_compile.runtime import (
    Instruction,
    Kind,
    Sweep,
    Timeline,
    Times,
    chrome_trace,
    schedule,
    simulate,
)
from pnn_compile.runtime.rank_pieces import RankPieces
from tests.distributed.ranks import start
from tests.models.builders import linear_chain, mlp

TWO: dict[tuple[Kind, int], float] = {
    (Kind.FINE, 0): 3, (Kind.CORRECT, 0): 0, (Kind.GUESS, 1): 1, (Kind.FINE, 1): 5,
    (Kind.CORRECT, 1): 2, (Kind.HEAD, 1): 1, (Kind.HEAD_BACKWARD, 1): 1,
    (Kind.COARSE_BACKWARD, 1): 2, (Kind.FINE_BACKWARD, 0): 6, (Kind.FINE_BACKWARD, 1): 10,
    (Kind.GUESS_BACKWARD, 1): 2,
}  # fmt: skip
"""Two stages; the times below are by hand from these."""


def _when(timeline: Timeline, rank: int) -> dict[Kind, tuple[float, float]]:
    return {span.instruction.kind: (span.start, span.end) for span in timeline.spans[rank]}


def test_two_ranks_by_hand() -> None:
    times = Times(TWO, {(Kind.SEND, 0): 10}, latency=1, bandwidth=5)
    timeline = simulate(schedule((0, 1)), times)
    first, second = _when(timeline, 0), _when(timeline, 1)
    assert first[Kind.FINE] == (0, 3)
    assert first[Kind.SEND] == (3, 3)
    assert second[Kind.FINE] == (1, 6)
    assert second[Kind.RECEIVE] == (6, 6)  # 2 seconds on the link and 1 of latency: there at 6
    assert second[Kind.CORRECT] == (6, 8)
    assert second[Kind.COARSE_BACKWARD] == (10, 12)
    assert first[Kind.RECEIVE_ADJOINT] == (3, 13)
    assert first[Kind.FINE_BACKWARD] == (13, 19)
    assert second[Kind.GUESS_BACKWARD] == (22, 24)
    assert timeline.time == 24
    assert timeline.idle == (24 - 3 - 6, 0)
    assert {rank for rank, _ in timeline.critical_path} == {1}


def test_ranks_of_two_nodes_send_over_the_network() -> None:
    links = {"node": 1, "network_latency": 2, "network_bandwidth": 2}
    sizes = {(Kind.SEND, 0): 10.0}
    inside = simulate(schedule((0, 1), backward=False), Times(TWO, sizes, latency=1, bandwidth=5))
    across = simulate(schedule((0, 1), backward=False), Times(TWO, sizes, latency=2, bandwidth=2))
    between = simulate(schedule((0, 1), backward=False), Times(TWO, sizes, 1, 5, **links))
    assert between.time == across.time > inside.time


def test_a_late_message_puts_its_sender_on_the_critical_path() -> None:
    times = Times({**TWO, (Kind.FINE, 0): 7}, {(Kind.SEND, 0): 10}, latency=1, bandwidth=5)
    timeline = simulate(schedule((0, 1)), times)
    assert timeline.time == 7 + 3 + 2 + 1 + 1 + 2 + 10 + 2
    path = [(rank, span.instruction.kind) for rank, span in timeline.critical_path]
    assert path[:5] == [
        (0, Kind.FINE), (0, Kind.CORRECT), (0, Kind.SEND), (1, Kind.RECEIVE), (1, Kind.CORRECT),
    ]  # fmt: skip


def test_a_link_carries_one_message_at_a_time() -> None:
    sends = tuple(Instruction(Kind.SEND, 0, batch, 1) for batch in range(2))
    takes = tuple(Instruction(Kind.RECEIVE, 0, batch, 0) for batch in range(2))
    times = Times({}, {(Kind.SEND, 0): 8}, latency=1, bandwidth=4)
    timeline = simulate([sends, takes], times)
    assert [span.end for span in timeline.spans[1]] == [3, 5]


def test_micro_batches_compute_while_the_sweep_is_under_way() -> None:
    """Two ranks, two micro-batches: the second fine stage hides the link of the first sweep."""
    compute = {(Kind.FINE, 0): 4.0, (Kind.FINE, 1): 4.0, (Kind.CORRECT, 1): 1.0}
    programs = schedule((0, 1), batches=2, backward=False)
    timeline = simulate(programs, Times(compute, latency=3))
    # Both sends leave at 8, after the second fine stage; 11, and two corrections.
    assert timeline.time == 4 + 4 + 3 + 1 + 1
    # One batch alone costs 4 + 3 + 1.
    alone = simulate(schedule((0, 1), backward=False), Times(compute, latency=3)).time
    assert timeline.time < 2 * alone


def test_a_collapsed_sweep_by_hand() -> None:
    """Four ranks: fine stages until 4, maps until 5, sums there at 6 and 7, the head."""
    compute = {(Kind.FINE, stage): 4.0 for stage in range(4)}
    compute |= {(Kind.CORRECT, stage): 1.0 for stage in range(1, 4)} | {(Kind.HEAD, 3): 1.0}
    programs = schedule(range(4), Sweep("collapsed"), backward=False)
    timeline = simulate(programs, Times(compute, latency=1))
    assert timeline.time == 8
    assert _when(timeline, 3)[Kind.HEAD] == (7, 8)
    assert _when(timeline, 0)[Kind.RECEIVE_GUESS] == (4, 4)  # it was there long before


@pytest.mark.parametrize("options", [{}, {"sweep": "collapsed"}, {"iterations": 3}], ids=str)
def test_the_forecast_of_a_plan_is_what_its_lists_take(options: dict[str, Any]) -> None:
    """Equal stages take what the plan says, others and several iterations at most that."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.Tanh())]
    for model, example in (
        (nn.Sequential(*layers), torch.randn(4, 32)),
        (unet.build_model(width=4), torch.randn(2, 1, 32, 32)),
    ):
        plan = pnn.compile(model, example, stages=4, coarse="linear", **options).plan
        forward = schedule(range(4), Sweep.of(plan), backward=False)
        simulated = simulate(forward, Times.of(plan)).time
        assert simulated <= plan.forecast.time * (1 + 1e-9)
        if isinstance(model, nn.Sequential) and plan.iterations == 1:
            assert simulated == pytest.approx(plan.forecast.time, rel=0.02)
        both = simulate(schedule(range(4), Sweep.of(plan)), Times.of(plan)).time
        assert both > 2 * simulated


def test_seconds_of_a_training_step_are_those_of_both_phases() -> None:
    layers = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.Tanh())]
    plan = pnn.compile(nn.Sequential(*layers), torch.randn(4, 32), stages=3, cost="measured").plan
    compute = Times.of(plan).compute
    for number, stage in enumerate(plan.stages):
        both = compute[Kind.FINE, number] + compute[Kind.FINE_BACKWARD, number]
        assert both == pytest.approx(stage.seconds)
        assert compute[Kind.FINE_BACKWARD, number] == pytest.approx(stage.backward_seconds)
    forward = pnn.compile(
        nn.Sequential(*layers), torch.randn(4, 32), stages=3, cost="measured-forward"
    ).plan
    assert Times.of(forward).compute[Kind.FINE, 1] == forward.stages[1].seconds


def test_bytes_on_the_link_cost_time() -> None:
    compiled = pnn.compile(unet.build_model(width=4), torch.randn(2, 1, 32, 32), stages=3)
    plan = compiled.plan
    programs = RankPieces(compiled, (0, 1, 2), 0).instruction_lists()
    free = simulate(programs, Times.of(plan)).time
    slow = Times.of(plan, bandwidth=1e-6)  # bytes per FLOP
    crossed = sum(2 * face.bytes for face in plan.interfaces[:-1])
    assert simulate(programs, slow).time == pytest.approx(free + crossed / 1e-6, rel=0.01)


def test_costs_that_a_plan_does_not_store_are_refused() -> None:
    model = linear_chain(4, 8)
    plan = pnn.compile(model, torch.randn(2, 8), stages=2, cost=lambda node, flops: 1.0).plan
    with pytest.raises(pnn.RuntimeFault, match="cost='flops' or 'measured'"):
        Times.of(plan)


@pytest.mark.parametrize("kind", ["chain", "collapsed"])
def test_thousands_of_ranks_take_seconds(kind: str) -> None:
    ranks = 2048
    compute = {(Kind.FINE, stage): 5.0 for stage in range(ranks)}
    compute |= {(Kind.CORRECT, stage): 1.0 for stage in range(1, ranks)}
    began = time.process_time()
    timeline = simulate(schedule(range(ranks), Sweep(kind), backward=False), Times(compute))
    assert time.process_time() - began < 20
    assert timeline.time == (5 + ranks - 1 if kind == "chain" else 5 + 1)


def test_a_trace_has_every_instruction_and_an_arrow_per_message() -> None:
    programs = schedule(range(3), Sweep("collapsed"), batches=2)
    times = Times({(Kind.FINE, stage): 1e-3 for stage in range(3)}, latency=1e-4)
    events = json.loads(json.dumps(chrome_trace(simulate(programs, times))))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert Counter(e["tid"] for e in spans) == {r: len(p) for r, p in enumerate(programs)}
    assert max(e["dur"] for e in spans) == pytest.approx(1000)  # microseconds
    for rank in range(3):
        intervals = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == rank)
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(intervals))
    tails = {e["id"]: e["ts"] for e in events if e["ph"] == "s"}
    tips = {e["id"]: e["ts"] for e in events if e["ph"] == "f"}
    assert tails.keys() == tips.keys()
    assert all(tips[name] > tails[name] for name in tips)
    assert any(e["args"]["critical"] for e in spans)


# Ranks that really run, on stages that sleep: they need no core while they do.

SLEEPS = {
    Kind.FINE: 0.2, Kind.FINE_BACKWARD: 0.3, Kind.CORRECT: 0.04, Kind.COARSE_BACKWARD: 0.04,
}  # fmt: skip
CLOSE, STEPS = 1.08, 20
OPTIONS: list[tuple[dict[str, Any], int, float]] = [
    ({}, 1, 0.2 + 3 * 0.04 + 3 * 0.04 + 0.3),
    ({"sweep": "collapsed"}, 1, 0.2 + 0.04 + 0.04 + 0.3),
    # Fine stages until 0.4, both sweeps until 0.56; then the adjoints of one micro-batch travel
    # back, and those of the other one behind it, each rank running its stage in between.
    ({}, 2, 2 * 0.2 + 4 * 0.04 + 4 * 0.04 + 2 * 0.3),
]
"""Options, micro-batches, and the seconds of a step by hand."""


def _sleep(module: nn.Module, forward: Kind, backward: Kind) -> None:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        time.sleep(SLEEPS[forward])
        if output.requires_grad:  # not in the trial that compares micro-batches
            output.register_hook(lambda adjoint: time.sleep(SLEEPS[backward]))

    module.register_forward_hook(hook)


def _measured(rank: int) -> list[tuple[float, float]]:
    """For every kind of step: what the simulator says, and what the best of several takes."""
    torch.manual_seed(0)
    model = mlp(8, 8)
    rows = []
    for options, batches, _ in OPTIONS:
        example = torch.randn(4, 8)
        compiled = pnn.compile(model, example, stages=4, coarse="linear", **options)
        for fine in compiled.stages.fine:
            _sleep(fine, Kind.FINE, Kind.FINE_BACKWARD)
        for coarse in compiled.operators.coarse.values():
            _sleep(coarse, Kind.CORRECT, Kind.COARSE_BACKWARD)
        module = pnn.runtime.distribute(compiled, batches=batches)
        compute = {
            (kind, stage): seconds
            for kind, seconds in SLEEPS.items()
            for stage in range(kind in (Kind.CORRECT, Kind.COARSE_BACKWARD), 4)
        }
        programs = module.network.instruction_lists(batches=batches)
        simulated = simulate(programs, Times(compute)).time
        best, steps = math.inf, 0
        while best > CLOSE * simulated and steps < STEPS:  # others may have the cores for a while
            best, steps = min(best, _step(module, example)), steps + 1
        rows.append((simulated, best))
    return rows


def _step(module: pnn.runtime.RankModule, example: Tensor) -> float:
    """Take a step; give the seconds until the last rank was done, alike on all ranks."""
    dist.barrier()
    began = time.perf_counter()
    module.forward_backward(example, _mean)
    seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def _mean(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.square().mean()


def test_ranks_overlap_as_the_simulator_says(tmp_path: Path) -> None:
    """Four processes; were their fine stages to run one after another, a step took over 2 s."""
    measured = start(_measured, 4, tmp_path)[0]
    for (options, batches, by_hand), (simulated, seconds) in zip(OPTIONS, measured, strict=True):
        assert simulated == pytest.approx(by_hand), (options, batches)
        assert 0.98 * simulated <= seconds <= 1.1 * simulated, (options, batches)
