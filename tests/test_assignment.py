from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.assignment import assign
from passes.errors import PartitionError
from passes.partition import solve
from passes.prices import CutProblem, Prices
from tests.test_partition import tight_problems


def chosen(kinds: dict[str, Prices]) -> object:
    """The problem of an order of kinds that talk to each other for nothing."""

    def problem(order: Sequence[str]) -> CutProblem:
        return CutProblem(devices=tuple(kinds[name] for name in order))

    return problem


@settings(max_examples=60, deadline=None)
@given(problem=tight_problems(), spare=st.integers(0, 2), data=st.data())
def test_equals_the_best_of_all_orders(
    problem: CutProblem, spare: int, data: st.DataObject
) -> None:
    names = "abc"[: len(set(map(id, problem.devices)))]
    distinct = list({id(d): d for d in problem.devices}.values())[:3]
    kinds = dict(zip(names, distinct, strict=False))
    listed = [data.draw(st.sampled_from(sorted(kinds))) for _ in range(problem.stages + spare)]
    make = chosen(kinds)
    least = math.inf
    for order in set(itertools.permutations(listed, problem.stages)):
        try:
            least = min(least, solve(make(order), gap=0).time)  # type: ignore[operator]
        except PartitionError:
            continue
    if least == math.inf:
        with pytest.raises(PartitionError):
            assign(listed, problem.stages, make, gap=0)  # type: ignore[arg-type]
        return
    found = assign(listed, problem.stages, make, gap=0)  # type: ignore[arg-type]

    assert found.exact
    assert found.time == pytest.approx(least, rel=1e-9)
    assert found.gap <= 1e-9
    assert solve(make(found.devices), gap=0).time == pytest.approx(least, rel=1e-9)  # type: ignore[operator]
    assert all(found.devices.count(name) <= listed.count(name) for name in kinds)
