from __future__ import annotations

import pytest
from hypothesis import given, settings

from passes.partition.alternatives import alternatives
from passes.partition.problem import CutProblem, makespan, serial
from passes.partition.search import DoesNotFit, solve
from tests.unit.partition.test_partition import tight_problems


@settings(max_examples=60, deadline=None)
@given(problem=tight_problems())
def test_each_cut_alone_goes_where_it_costs_least(problem: CutProblem) -> None:
    try:
        cuts = solve(problem, gap=0).cuts
    except DoesNotFit:
        return
    found = alternatives(problem, cuts)

    assert len(found) == problem.stages - 1
    for number, alternative in enumerate(found):
        times = {}
        for place in range(cuts[number - 1] + 1 if number else 0, cuts[number + 1]):
            moved = (*cuts[:number], place, *cuts[number + 1 :])
            begins = (None, *moved)
            if place != cuts[number] and all(
                device.fits(begin, end, last=stage == problem.stages - 1)
                for stage, (device, begin, end) in enumerate(
                    zip(problem.devices, begins, moved, strict=False)
                )
            ):
                times[place] = makespan(problem, moved) + serial(problem, moved)
        if alternative is None:
            assert not times
        else:
            assert alternative.time == pytest.approx(min(times.values()), rel=1e-9)
            assert times[alternative.candidate] == pytest.approx(alternative.time, rel=1e-9)
