from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.studies import balance
from examples.studies.blocks import block_partition, equal_count
from passes.partition.search import solve


def sums(costs: list[float], ends: list[int]) -> list[float]:
    return [sum(costs[a:b]) for a, b in itertools.pairwise([0, *ends])]


@given(costs=st.lists(st.floats(0, 10), min_size=1, max_size=30), data=st.data())
def test_blocks_differ_by_no_more_than_the_largest_element(
    costs: list[float], data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    least = min(costs)
    ends = block_partition(costs, parts)
    totals = sums([cost - least for cost in costs], ends)

    assert ends[-1] == len(costs)
    assert ends == sorted(ends)
    assert max(totals) <= min(totals) + (max(costs) - least) * (1 + 1e-9) + 1e-9


def test_equal_counts() -> None:
    assert equal_count(10, 4) == [2, 5, 7, 10]


@pytest.mark.parametrize("phases", [1, 2])
def test_unequal_devices_are_solved_to_a_small_gap(phases: int) -> None:
    solution = solve(balance.unequal(400, 12, phases=phases), gap=1e-3)

    assert solution.gap <= 1e-3
    assert solution.evaluations < 200


def test_no_committed_row_has_a_better_cut_than_ours(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in Path(balance.RESULTS).read_text().splitlines()]

    assert len({row["model"] for row in rows}) > 30
    for row in rows:
        for other in ("blocks", "equal"):
            assert row["time"]["ours"] <= row["time"][other] * (1 + 2e-6)
            slowest = row["makespan"]["ours, slowest stage alone"]
            assert slowest <= row["makespan"][other] * (1 + 2e-6)
    assert "| never better |" in balance.table()
