"""Forecasts: the simulator's truth, what they say of it, and what they set beside it."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.errors import OptionError
from passes.plan.estimate import BOTTLENECKS
from passes.schedule.instruction import Kind
from pnn_compile.forecast.compare_methods import balanced, gpipe_lists
from pnn_compile.forecast.forecast import forecast
from pnn_compile.forecast.table import ForecastRow, ForecastTable
from pnn_compile.runtime import Sweep, Times, schedule, simulate
from tests.models.builders import residual_chain
from tests.unit.cost.test_device_profile import profile

TIMES = st.floats(min_value=0, max_value=10)


def row(stages: int, time: float, method: str = "chain", limit: str = "coarse") -> ForecastRow:
    parts = dict.fromkeys(("preprocessing", "coarse", "head", "link"), 0.0) | {"fine": time}
    return ForecastRow(
        stages, method, time, 1 / time, 1 / time, 1 / time / stages, (1.0,) * stages, 0, parts,
        limit,
    )  # fmt: skip


def table(*rows: ForecastRow) -> ForecastTable:
    return ForecastTable("Net", "roofline", "seconds", True, 8, ("h100",), 1.0, rows)


def blocks(count: int = 12, width: int = 8) -> tuple[nn.Module, torch.Tensor]:
    return residual_chain(count, width), torch.randn(8, width)


def test_more_devices_stop_paying_where_five_percent_are_left() -> None:
    result = table(row(2, 0.6), row(4, 0.31), row(6, 0.30), row(8, 0.32, limit="link"))
    assert result.enough("chain").stages == 4
    assert result.best.stages == 4
    assert result.verdict == (
        "more than 4 devices do not pay: these give 3.23 times the speed of one with the chain "
        "sweep, and what holds back more at 8 is the links"
    )


def test_the_verdict_says_when_nothing_pays_and_when_the_end_is_not_seen() -> None:
    assert "does not pay" in table(row(2, 1.2, limit="block"), row(3, 1.3)).verdict
    assert BOTTLENECKS["block"] in table(row(2, 1.2, limit="block"), row(3, 1.3)).verdict
    assert "up to the 4 looked at" in table(row(2, 0.6), row(4, 0.3)).verdict
    assert "cannot be forecast" in table(row(2, 0.5, "ddp")).verdict


def test_a_table_is_plain_data() -> None:
    result = table(row(2, 0.5), row(2, 0.6, "ddp")).as_data()
    assert json.loads(json.dumps(result))["best"] == {"stages": 2, "method": "chain"}
    assert result["rows"][0]["parts"]["fine"] == 0.5


@given(st.lists(TIMES, min_size=1, max_size=7), st.data())
def test_the_balanced_cut_is_the_best_of_all(work: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(work)))

    def largest(ends: tuple[int, ...]) -> float:
        return max(sum(work[a:b]) for a, b in itertools.pairwise([0, *ends]))

    every = itertools.combinations(range(1, len(work)), stages - 1)
    best = min(largest((*inner, len(work))) for inner in every)
    result = balanced(work, stages)
    assert len(set(result)) == stages
    assert result[-1] == len(work)
    assert largest(result) <= best + 1e-6 * sum(work)


@given(st.lists(st.tuples(TIMES, TIMES, TIMES, TIMES), min_size=2, max_size=9), TIMES)
@settings(deadline=None)
def test_a_chain_takes_what_the_formula_of_the_step_says(
    stages: list[tuple[float, float, float, float]], latency: float
) -> None:
    """T = max_j (C_j + g_j + sum_{i >= j} (F_i + link)) + h + h' + the same on the way back."""
    count = len(stages)
    compute: dict[tuple[Kind, int], float] = {(Kind.HEAD, count - 1): 1.0}
    compute[Kind.HEAD_BACKWARD, count - 1] = 2.0
    for number, (guess, fine, coarse, back) in enumerate(stages):
        compute[Kind.FINE, number], compute[Kind.FINE_BACKWARD, number] = fine, back
        if number:
            compute[Kind.GUESS, number] = compute[Kind.GUESS_BACKWARD, number] = guess
            compute[Kind.CORRECT, number] = compute[Kind.COARSE_BACKWARD, number] = coarse

    def slowest(fine: int) -> float:
        result = []
        for number, each in enumerate(stages):
            own = (each[0] if number else 0.0) + each[fine]
            hops = [stages[i][2] for i in range(max(1, number), count)]
            result.append(own + sum(hops) + latency * (count - 1 - number))
        return max(result)

    took = simulate(schedule(range(count)), Times(compute, latency=latency)).time
    assert took == pytest.approx(slowest(1) + 3.0 + slowest(3))


@pytest.mark.parametrize(("stages", "batches"), [(1, 1), (2, 4), (3, 1), (4, 8)])
def test_a_pipeline_of_equal_stages_takes_what_huang_et_al_say(stages: int, batches: int) -> None:
    compute = {(Kind.FINE, n): 1.0 for n in range(stages)}
    compute |= {(Kind.FINE_BACKWARD, n): 2.0 for n in range(stages)}
    took = simulate(gpipe_lists(stages, batches, backward=True), Times(compute)).time
    assert took == 3 * (batches + stages - 1)


def test_a_forecast_is_what_the_simulator_gives_for_the_plan_that_compile_makes() -> None:
    from pnn_compile.compiled import compile as compile_model

    model, x = blocks()
    result = forecast(model, x, stages=[2, 3], cost="flops", micro_batches=[2])
    assert result.methods == ("chain", "collapsed", "gpipe:2", "ddp")
    plan = compile_model(model, x, stages=3).plan
    lists = schedule(range(3), Sweep.of(plan))
    chain = result.of("chain")[1]
    assert chain.time == simulate(lists, Times.of(plan)).time
    for each in result.rows:
        assert sum(each.parts.values()) == pytest.approx(each.time)
        assert each.speedup == pytest.approx(result.sequential / each.time)
        assert each.bound >= each.speedup * (1 - 1e-9)
        assert len(each.memory) == each.stages
        assert each.limit in BOTTLENECKS


def test_slow_links_are_what_limits() -> None:
    model, x = blocks()
    slow = dataclasses.replace(profile(), link_bandwidth=1e3, launch=0.0)
    result = forecast(model, x, stages=[4], devices=slow)
    assert result.of("chain")[0].limit == "link"
    assert result.of("chain")[0].parts["link"] > 0.5 * result.of("chain")[0].time
    assert result.devices == ("test",)
    assert result.unit == "seconds"


def test_inference_takes_no_way_back() -> None:
    model, x = blocks()
    both = forecast(model, x, stages=[2], devices=profile())
    forward = forecast(model, x, stages=[2], devices=profile(), training=False)
    assert 0 < forward.sequential < both.sequential
    assert forward.of("ddp")[0].link_bytes == 0 < both.of("ddp")[0].link_bytes
    assert forward.of("chain")[0].most_memory < both.of("chain")[0].most_memory


def test_a_compiled_network_is_forecast_as_its_model() -> None:
    from pnn_compile.compiled import compile as compile_model

    model, x = blocks()
    compiled = compile_model(model, x, stages=2)
    one = forecast(compiled, stages=[2], cost="flops")
    assert one.rows == forecast(model, x, stages=[2], cost="flops").rows


def test_what_cannot_be_is_named() -> None:
    model, x = blocks(4)
    result = forecast(model, x, stages=[2, 40], cost="flops", micro_batches=[3])
    text = " ".join(result.problems)
    assert "no chain at 1 of 2 numbers of devices, from 40 on" in text
    assert "no 3 equal micro-batches" in text
    with pytest.raises(OptionError, match="stages must be whole numbers"):
        forecast(model, x, stages=[0])
    with pytest.raises(OptionError, match="unknown cost"):
        forecast(model, x, cost="watts")
    with pytest.raises(OptionError, match="needs a device"):
        forecast(model, x, cost="roofline")
    with pytest.raises(OptionError, match="sweeps are"):
        forecast(model, x, sweeps=["star"])
    with pytest.raises(OptionError, match="2 devices cannot hold 3 stages"):
        forecast(model, x, stages=[3], devices=[profile(), profile()])


def test_devices_that_differ_and_their_memory_count() -> None:
    model, x = blocks()
    fast = dataclasses.replace(profile(), name="fast", flops={"float32": 1e10}, bandwidth=1e9)
    alike = forecast(model, x, stages=[2, 3], devices=profile(), micro_batches=[2])
    mixed = forecast(model, x, stages=[2], devices=[profile(), fast], micro_batches=[2])
    assert mixed.devices == ("test", "fast")
    assert mixed.sequential < alike.sequential
    for method in ("chain", "gpipe:2"):
        assert mixed.of(method)[0].time < alike.of(method)[0].time
    # The slower of two devices holds up shares that are equal.
    assert mixed.of("ddp")[0].time == pytest.approx(alike.of("ddp")[0].time)
    most = [row.most_memory for row in alike.of("chain")]
    assert most[1] < most[0]
    small = dataclasses.replace(profile(), memory=1.02 * most[1])
    result = forecast(model, x, stages=[2, 3], devices=small, sweeps=["chain"], micro_batches=[])
    assert [row.stages for row in result.of("chain")] == [3]
    assert any(problem.startswith("no chain at 1 of 2") for problem in result.problems)


def test_guesses_and_corrections_take_their_own_seconds() -> None:
    from pnn_compile.compiled import compile as compile_model

    model, x = blocks()
    slow = dataclasses.replace(profile(), launch=1.0)  # a correction is a few launches, not FLOPs
    plan = compile_model(model, x, stages=3, cost="roofline", devices=slow).plan
    coarse = plan.stages[1].coarse
    assert coarse is not None
    assert coarse.seconds is not None
    assert coarse.backward_seconds is not None
    assert coarse.seconds > 3
    times = Times.of(plan).compute
    both = times[Kind.CORRECT, 1] + times[Kind.COARSE_BACKWARD, 1]
    assert both == pytest.approx(coarse.seconds)
    assert times[Kind.COARSE_BACKWARD, 1] == pytest.approx(coarse.backward_seconds)
    assert compile_model(model, x, stages=3).plan.stages[1].coarse.seconds is None  # type: ignore[union-attr]
