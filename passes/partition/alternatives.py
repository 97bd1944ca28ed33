"""The next best place of every cut: where it would go if it could not be where it is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from passes.partition.problem import CutProblem, Phases, serial

__all__ = ["Alternative", "alternatives"]


class Alternative(NamedTuple):
    """Another candidate for a cut, and the time if that cut alone moves there."""

    candidate: int
    time: float


def alternatives(problem: CutProblem, cuts: Sequence[int]) -> list[Alternative | None]:
    """Find the next best candidate of every cut but the last, the others staying where they are.

    Args:
        problem: The prices.
        cuts: A partition.

    Returns:
        For each cut the best of the candidates between its neighbours; None where none fits.
    """
    devices, count = problem.devices, problem.stages
    spans = list(itertools.pairwise([None, *cuts]))
    costs = [
        device.cost(begin, end)
        for device, (begin, end) in zip(devices, spans, strict=True)
        if end is not None
    ]
    others = _without_two(costs)
    fixed = serial(problem, cuts)
    found: list[Alternative | None] = []
    for number in range(count - 1):
        begin, here, end = spans[number][0], cuts[number], cuts[number + 1]
        own, behind = devices[number], devices[number + 1]
        best: Alternative | None = None
        for place in range(0 if begin is None else begin + 1, end):
            last = number + 2 == count
            if place == here or not (
                own.fits(begin, place, last=False) and behind.fits(place, end, last=last)
            ):
                continue
            pair = own.cost(begin, place), behind.cost(place, end)
            slowest = [max(values) for values in zip(others[number], *pair, strict=True)]
            time = sum(slowest) + fixed - behind.hop[here] + behind.hop[place]
            if best is None or time < best.time:
                best = Alternative(place, time)
        found.append(best)
    return found


def _without_two(costs: Sequence[Phases]) -> list[Phases]:
    """For each stage but the last: the slowest of all stages but it and the next one."""
    none = Phases(0.0, 0.0)
    front = [none, *itertools.accumulate(costs, _slower)]
    back = [none, *itertools.accumulate(reversed(costs), _slower)][::-1]
    return [_slower(front[i], back[i + 2]) for i in range(len(costs) - 1)]


def _slower(one: Phases, other: Phases) -> Phases:
    return Phases(max(one.forward, other.forward), max(one.backward, other.backward))
