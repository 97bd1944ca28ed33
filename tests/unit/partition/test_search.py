from __future__ import annotations

import dataclasses
import itertools
import math
import random
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.errors import PartitionError
from passes.partition.problem import CutProblem, PositionCosts, makespan, serial
from passes.partition.search import solve

COARSE_COSTS = [0.0, 0.25, 1.0, 1.0, 3.0]  # few values, so that ties are common


def costs() -> st.SearchStrategy[float]:
    return st.sampled_from(COARSE_COSTS) | st.floats(0, 10)


@st.composite
def problems(draw: st.DrawFn) -> CutProblem:
    """Draw a small problem with ties, candidates without work between them, and closed ends.

    Devices are equal or differ in every cost and in memory; there are one or two phases.
    """
    size = draw(st.integers(1, 9))
    stages = draw(st.integers(1, min(4, size)))
    unit = draw(st.sampled_from([1.0, 1e-6, 1e12]))
    two = draw(st.booleans())

    def row() -> list[float]:
        return draw(st.lists(costs().map(lambda p: unit * p), min_size=size, max_size=size))

    def device() -> PositionCosts:
        tail = [cost if draw(st.integers(0, 3)) else math.inf for cost in row()]
        if all(cost == math.inf for cost in tail[stages - 1 :]):
            tail[draw(st.integers(stages - 1, size - 1))] = unit * draw(costs())
        return PositionCosts(
            work=list(itertools.accumulate(row())),
            entry=row(),
            hop=row(),
            tail=tail,
            backward_work=list(itertools.accumulate(row())) if two else (),
            backward_entry=row() if two else (),
        )

    if draw(st.booleans()):
        return CutProblem(devices=(device(),) * stages)
    return CutProblem(devices=tuple(device() for _ in range(stages)))


@st.composite
def tight_problems(draw: st.DrawFn) -> CutProblem:
    """Draw a problem whose devices hold a few positions only, or none at all."""
    problem = draw(problems())
    size = problem.candidates

    def limited(device: PositionCosts) -> PositionCosts:
        spans = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
        heads = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
        reach = [i + span for i, span in enumerate(spans)]
        return dataclasses.replace(
            device,
            reach=reach,
            first_reach=draw(st.integers(-1, 5)),
            last_reach=[r - head for r, head in zip(reach, heads, strict=True)],
        )

    return CutProblem(devices=tuple(limited(device) for device in problem.devices))


def exhaustive(problem: CutProblem) -> float:
    """Return the least time over all partitions, written as in the problem's statement."""
    best = math.inf
    for cuts in itertools.combinations(range(problem.candidates), problem.stages):
        forward: list[float] = []
        backward: list[float] = []
        sweep: list[float] = []
        begin = None
        for stage, (device, end) in enumerate(zip(problem.devices, cuts, strict=True)):
            last = stage == problem.stages - 1
            limit = device.first_reach if begin is None else None
            if begin is not None and device.reach:
                limit = device.last_reach[begin] if last else device.reach[begin]
            if limit is not None and end > limit:
                break
            for phase, work, entry in (
                (forward, device.work, device.entry),
                (backward, device.backward_work, device.backward_entry),
            ):
                if work and begin is None:
                    phase.append(work[end])
                elif work and begin is not None:
                    phase.append(entry[begin] + (work[end] - work[begin]))
            if begin is not None:
                sweep.append(device.hop[begin])
            if last:
                time = max(forward) + max(backward, default=0.0) + sum(sweep) + device.tail[end]
                best = min(best, time)
            begin = end
    return best


@settings(max_examples=40)
@given(problem=problems(), gap=st.sampled_from([0.0, 1e-6, 0.1]))
def test_equals_exhaustive_search(problem: CutProblem, gap: float) -> None:
    solution = solve(problem, gap=gap)
    least = exhaustive(problem)

    assert least <= solution.time * (1 + 1e-9)
    assert solution.time * (1 - gap) <= least * (1 + 1e-9)
    assert solution.lower_bound <= least * (1 + 1e-9)
    assert solution.gap <= max(gap, 1e-9)


@settings(max_examples=40)
@given(problem=tight_problems())
def test_memory_is_obeyed(problem: CutProblem) -> None:
    least = exhaustive(problem)
    if least == math.inf:
        with pytest.raises(PartitionError, match="no partition fits the memory"):
            solve(problem, gap=0)
        return
    solution = solve(problem, gap=0)

    assert solution.time == pytest.approx(least, rel=1e-9)
    ends = itertools.pairwise([None, *solution.cuts])
    for stage, (device, (begin, end)) in enumerate(zip(problem.devices, ends, strict=True)):
        assert end is not None
        assert device.fits(begin, end, last=stage == problem.stages - 1)


@settings(max_examples=40)
@given(problem=problems(), evaluations=st.integers(1, 4))
def test_is_honest_when_the_budget_ends_early(problem: CutProblem, evaluations: int) -> None:
    solution = solve(problem, gap=0, evaluations=evaluations)

    assert solution.evaluations <= evaluations
    assert solution.lower_bound <= exhaustive(problem) * (1 + 1e-9)
    assert exhaustive(problem) <= solution.time * (1 + 1e-9)
    assert 0 <= solution.gap <= 1


@settings(max_examples=40)
@given(problem=problems())
def test_reports_the_cost_of_its_cuts(problem: CutProblem) -> None:
    solution = solve(problem)

    assert len(solution.cuts) == problem.stages
    assert list(solution.cuts) == sorted(set(solution.cuts))
    assert solution.makespan == makespan(problem, solution.cuts)
    assert solution.serial == serial(problem, solution.cuts)
    assert solution.time == solution.makespan + solution.serial


def chain(costs: list[float], *, stages: int, entry: float = 0, hop: float = 0) -> CutProblem:
    """A chain of nodes with a candidate after each; what the head takes over is serial."""
    work = list(itertools.accumulate(costs))
    count = len(work)
    return CutProblem.uniform(
        work=work,
        entry=[entry] * count,
        hop=[hop] * count,
        tail=[work[-1] - done for done in work],
        stages=stages,
    )


def replace(problem: CutProblem, **changes: Any) -> CutProblem:
    """The problem with other costs, the same on every device."""
    stages = changes.pop("stages", problem.stages)
    return CutProblem.uniform(stages=stages, **(asdict(problem.devices[0]) | changes))


def test_equal_nodes_give_equal_stages() -> None:
    solution = solve(chain([1.0] * 12, stages=4))

    assert solution.cuts == (2, 5, 8, 11)
    assert (solution.makespan, solution.serial) == (3.0, 0.0)


def test_the_heaviest_node_stands_alone() -> None:
    solution = solve(chain([1.0, 1.0, 5.0, 1.0, 1.0], stages=3))

    assert solution.cuts == (1, 2, 4)
    assert solution.makespan == 5.0


def test_the_first_stage_needs_no_preprocessing_and_is_longer() -> None:
    solution = solve(chain([1.0] * 10, stages=2, entry=2.0))

    assert solution.cuts == (5, 9)  # 6 nodes against 4 nodes and the preprocessing operator
    assert solution.makespan == 6.0


def test_a_cheap_interface_is_worth_some_imbalance() -> None:
    balanced = CutProblem.uniform(
        work=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        entry=[0.0] * 6,
        hop=[0.2, 0.2, 0.9, 0.2, 0.2, 0.2],
        tail=[math.inf] * 5 + [0.0],
        stages=2,
    )
    assert solve(balanced).cuts == (2, 5)  # 3 + 0.9 against 4 + 0.2

    expensive = replace(balanced, hop=[0.2, 0.2, 1.9, 0.2, 0.2, 0.2])
    assert solve(expensive).makespan == 4.0


def test_the_last_stage_ends_where_it_may() -> None:
    problem = replace(
        chain([1.0] * 6, stages=2), tail=[math.inf, math.inf, math.inf, 2.0, math.inf, math.inf]
    )
    solution = solve(problem)

    assert solution.cuts == (1, 3)
    assert solution.time == 2.0 + 2.0


def test_one_stage_weighs_the_trunk_against_the_head() -> None:
    problem = CutProblem.uniform(
        work=[1, 2, 3], entry=[0] * 3, hop=[0] * 3, tail=[5, 3.5, 3], stages=1
    )

    assert solve(problem).cuts == (1,)
    assert solve(problem).time == 5.5


def test_candidates_without_work_between_them_are_distinct_cuts() -> None:
    solution = solve(chain([0.0] * 5, stages=5, hop=1.0))

    assert solution.cuts == (0, 1, 2, 3, 4)
    assert (solution.makespan, solution.serial, solution.gap) == (0.0, 4.0, 0.0)


def test_nothing_costs_anything() -> None:
    solution = solve(chain([0.0] * 4, stages=2))

    assert (solution.time, solution.lower_bound, solution.gap) == (0.0, 0.0, 0.0)


def test_a_sum_that_rounds_does_not_hide_the_balanced_cut() -> None:
    solution = solve(chain([0.1] * 30, stages=10), gap=0)

    assert solution.makespan == pytest.approx(0.3, rel=1e-12)
    assert solution.gap <= 1e-12


def test_a_prohibitive_cost_does_not_blur_the_others() -> None:
    problem = replace(
        chain([1.0] * 6, stages=3), entry=[0.0, 0.0, 0.0, 0.0, 1e30, 0.0], hop=[1e30] + [0.0] * 5
    )
    solution = solve(problem, gap=0)

    assert solution.cuts == (1, 3, 5)
    assert (solution.time, solution.lower_bound) == (2.0, 2.0)


def test_unequal_entries_may_let_an_earlier_candidate_reach_further() -> None:
    problem = CutProblem.uniform(
        work=[4.0, 4.5, 8.0],
        entry=[0.0, 9.0, 0.0],
        hop=[1.0, 0.0, 1.0],
        tail=[math.inf, math.inf, 0.0],
        stages=2,
    )
    assert solve(problem).cuts == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": 7}, r"candidates=6, stages=7\); ask for at most 6 stages"),
        ({"stages": 0}, r"at least one stage \(stages=0\)"),
        ({"tail": [0.0, 0.0] + [math.inf] * 4}, r"of which 2 .*stages=3\); ask for at most 2"),
        ({"tail": [math.inf] * 6}, r"of which 0 .*stages=3\)"),
        ({"hop": [0.0] * 5}, r"differ in length \(.*'hop': 5"),
        ({"work": [1.0, 2.0, 1.5, 3.0, 4.0, 5.0]}, r"work\[1\]=2, work\[2\]=1.5"),
        ({"work": [-1.0, 2.0, 2.5, 3.0, 4.0, 5.0]}, r"work\[0\]=-1.0"),
        ({"hop": [0.0] * 5 + [math.inf]}, r"finite and not negative \(hop\[5\]=inf\)"),
        ({"entry": [math.nan] * 6}, r"entry\[0\]=nan"),
    ],
)
def test_a_problem_without_a_partition_says_its_numbers(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        replace(chain([1.0] * 6, stages=3), **change)


@pytest.mark.parametrize("options", [{"gap": -0.1}, {"gap": math.nan}, {"evaluations": 0}])
def test_a_search_that_cannot_be_made_says_its_numbers(options: dict[str, float]) -> None:
    with pytest.raises(PartitionError, match=r"gap=.*evaluations="):
        solve(chain([1.0] * 6, stages=3), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", [pytest.param("uniform", marks=pytest.mark.slow), "random", "blocks"]
)
def test_ten_thousand_candidates_and_64_stages(kind: str) -> None:
    count, draw = 10_000, random.Random(0).random
    spread = 1.0 if kind == "random" else 0.0
    work = list(itertools.accumulate(1 + spread * (draw() - 0.5) for _ in range(count)))
    hop = [1.0 + spread * (draw() - 0.5) for _ in range(count)]
    if kind == "blocks":
        hop = [1.0 if i % 10 == 0 else 2.0 for i in range(count)]
    tail = [cost + work[-1] - done for cost, done in zip(hop, work, strict=True)]
    solution = solve(CutProblem.uniform(work=work, entry=hop, hop=hop, tail=tail, stages=64))

    assert solution.gap <= 1e-6
    assert solution.evaluations < 200
