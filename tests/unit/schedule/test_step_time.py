"""The closed form of the step time, held against the simulation of the instruction lists."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.partition.problem import CutProblem, Phases, makespan, serial
from passes.plan.estimate import StepCosts
from passes.plan.schema import Forecast
from passes.schedule.instruction import Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Times, simulate

FREE = Phases(0.0, 0.0)
CLOSE = 1e-9


@dataclass(frozen=True)
class Parts:
    """Costs of a step, one stage per rank: by stage, the head, and by interface of a message."""

    fine: list[Phases]
    preprocess: list[Phases]
    coarse: list[Phases]
    head: Phases
    links: list[float]

    @property
    def stages(self) -> int:
        return len(self.fine)

    @property
    def largest_map(self) -> float:
        return max(cost.makespan for cost in self.coarse)

    @property
    def largest_link(self) -> float:
        return max(self.links, default=0.0)

    def forecast(self, sweep: str, iterations: int) -> Forecast:
        costs = StepCosts(
            self.fine,
            self.preprocess,
            [cost.makespan for cost in self.coarse],
            [2 * link for link in self.links],
            self.head.makespan,
        )
        sequential = sum(cost.makespan for cost in self.fine) + self.head.makespan
        return costs.forecast(sweep, iterations, unit="seconds", sequential=sequential, gap=0.0)

    def objective(self, sweep: str) -> float:
        """What the partition minimizes, as `ProblemBuilder` states it."""
        entry, hop = self.preprocess[1:], [cost.makespan for cost in self.coarse[1:]]
        if sweep == "collapsed":
            entry = [_plus(a, b) for a, b in zip(entry, self.coarse[1:], strict=True)]
            hop = [0.0] * len(hop)
        last = self.stages - 1
        problem = CutProblem.uniform(
            stages=self.stages,
            work=list(itertools.accumulate(cost.forward for cost in self.fine)),
            entry=[*(cost.forward for cost in entry), 0.0],
            hop=[*(cost + 2 * link for cost, link in zip(hop, self.links, strict=True)), 0.0],
            tail=[math.inf] * last + [self.head.makespan],
            backward_work=list(itertools.accumulate(cost.backward for cost in self.fine)),
            backward_entry=[*(cost.backward for cost in entry), 0.0],
        )
        return makespan(problem, range(self.stages)) + serial(problem, range(self.stages))

    def simulated(self, sweep: str, iterations: int) -> float:
        compute: dict[tuple[Kind, int], float] = {}
        kinds = (
            (Kind.FINE, Kind.FINE_BACKWARD, self.fine),
            (Kind.GUESS, Kind.GUESS_BACKWARD, self.preprocess),
            (Kind.CORRECT, Kind.COARSE_BACKWARD, self.coarse),
        )
        for forward, backward, costs in kinds:
            for stage, cost in enumerate(costs):
                compute |= {(forward, stage): cost.forward, (backward, stage): cost.backward}
        last = self.stages - 1
        compute |= {
            (Kind.HEAD, last): self.head.forward,
            (Kind.HEAD_BACKWARD, last): self.head.backward,
        }
        sizes = {(Kind.SEND, stage): link for stage, link in enumerate(self.links)}
        sizes |= {(Kind.SEND_GUESS, stage + 1): link for stage, link in enumerate(self.links)}
        sizes[Kind.SEND_SUM, last] = self.largest_link
        for (kind, stage), size in list(sizes.items()):
            sizes[Kind[f"{kind.name}_ADJOINT"], stage] = size
        lists = schedule(range(self.stages), Sweep(sweep, iterations))
        return simulate(lists, Times(compute, sizes, bandwidth=1.0)).time


def _plus(a: Phases, b: Phases) -> Phases:
    return Phases(a.forward + b.forward, a.backward + b.backward)


_SECONDS = st.sampled_from([0.0, 1.0]) | st.floats(0, 10)
_PHASES = st.builds(Phases, _SECONDS, _SECONDS)


@st.composite
def parts(draw: st.DrawFn) -> Parts:
    """Draw random costs of up to seven stages, with links or without."""
    stages = draw(st.integers(1, 7))
    link = _SECONDS if draw(st.booleans()) else st.just(0.0)

    def by_stage(count: int) -> list[Phases]:
        return draw(st.lists(_PHASES, min_size=count, max_size=count))

    return Parts(
        fine=by_stage(stages),
        preprocess=[FREE, *by_stage(stages - 1)],
        coarse=[FREE, *by_stage(stages - 1)],
        head=draw(_PHASES),
        links=draw(st.lists(link, min_size=stages - 1, max_size=stages - 1)),
    )


@settings(max_examples=75)
@given(parts=parts())
def test_a_chain_takes_at_most_the_closed_form(parts: Parts) -> None:
    forecast, simulated = parts.forecast("chain", 1), parts.simulated("chain", 1)

    assert parts.objective("chain") == pytest.approx(forecast.time)
    assert simulated <= forecast.time + CLOSE
    # The sweep passes the first stages while a later one still computes, but never this one.
    assert simulated >= forecast.makespan + forecast.tail - CLOSE
    assert simulated >= parts.fine[0].makespan + forecast.serial - CLOSE


@given(parts=parts())
def test_a_chain_takes_the_closed_form_if_no_stage_is_slower_than_the_first(parts: Parts) -> None:
    slowest = Phases(
        max(a.forward + b.forward for a, b in zip(parts.fine, parts.preprocess, strict=True)),
        max(a.backward + b.backward for a, b in zip(parts.fine, parts.preprocess, strict=True)),
    )
    even = Parts(
        [slowest, *parts.fine[1:]], parts.preprocess, parts.coarse, parts.head, parts.links
    )

    assert even.simulated("chain", 1) == pytest.approx(even.forecast("chain", 1).time)


@settings(max_examples=75)
@given(parts=parts(), data=st.data())
def test_several_iterations_take_at_most_the_closed_form(parts: Parts, data: st.DataObject) -> None:
    iterations = data.draw(st.integers(1, parts.stages))
    forecast = parts.forecast("chain", iterations)
    simulated = parts.simulated("chain", iterations)

    assert simulated <= forecast.time + CLOSE
    # Iteration k makes the state after stage k exact; the last one then sweeps to the head.
    exact = sum(cost.makespan for cost in parts.fine[:iterations])
    sweep = sum(cost.makespan for cost in parts.coarse[iterations:]) + 2 * sum(parts.links)
    assert simulated >= exact + sweep + forecast.tail - CLOSE


@settings(max_examples=75)
@given(parts=parts())
def test_a_collapsed_sweep_differs_by_a_map_and_its_links(parts: Parts) -> None:
    forecast, simulated = parts.forecast("collapsed", 1), parts.simulated("collapsed", 1)

    # The largest maps forward and backward may be two, and a map may wait for its guess.
    assert simulated <= forecast.time + parts.largest_map + 2 * parts.largest_link + CLOSE
    assert simulated >= forecast.makespan + forecast.tail - CLOSE
    # The partition adds each map to its stage, and counts the links of a chain, not of the tree.
    objective, maps = parts.objective("collapsed"), 2 * parts.largest_map
    tree = 2 * (1 + math.floor(math.log2(parts.stages))) * parts.largest_link
    assert simulated <= objective + maps + tree + CLOSE
    assert simulated >= objective - maps - 2 * sum(parts.links) - CLOSE


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("link", [0.0, 0.5])
def test_equal_stages_take_the_closed_form(stages: int, link: float) -> None:
    fine, coarse = Phases(10.0, 20.0), Phases(1.0, 2.0)
    parts = Parts(
        [fine] * stages,
        [FREE] * stages,
        [FREE, *[coarse] * (stages - 1)],
        Phases(1.0, 1.0),
        [link] * (stages - 1),
    )
    for sweep in ("chain", "collapsed"):
        assert parts.simulated(sweep, 1) == pytest.approx(parts.forecast(sweep, 1).time)


_STAGES = st.lists(st.tuples(_SECONDS, _SECONDS, _SECONDS), min_size=1, max_size=9)


@given(_STAGES, _SECONDS)
def test_forward_takes_its_longest_path(
    stages: list[tuple[float, float, float]], head: float
) -> None:
    last = len(stages) - 1
    compute: dict[tuple[Kind, int], float] = {(Kind.HEAD, last): head}
    for number, (guess, fine, coarse) in enumerate(stages):
        compute |= {(Kind.FINE, number): fine}
        if number:
            compute |= {(Kind.GUESS, number): guess, (Kind.CORRECT, number): coarse}
    times = Times(compute)
    ready = [fine + (guess if i else 0) for i, (guess, fine, _) in enumerate(stages)]
    maps = [coarse if i else 0.0 for i, (_, _, coarse) in enumerate(stages)]

    chain = simulate(schedule(range(last + 1), backward=False), times).time
    paths = [ready[i] + sum(maps[max(1, i) :]) for i in range(last + 1)]
    assert chain == pytest.approx(max(paths) + head)

    lists = schedule(range(last + 1), Sweep("collapsed"), backward=False)
    ends = [ready[last]]
    for i in range(last):  # P_{i+1} runs on the rank of stage i, once the guess arrives
        ends.append(max(ready[i], stages[i + 1][0]) + maps[i + 1])
    assert simulate(lists, times).time == pytest.approx(max(ends) + head)
