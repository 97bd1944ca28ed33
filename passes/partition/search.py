"""The balanced cut: given the price of every position, choose the interfaces that cost least time.

Pure numbers in, positions out. The model is the step time of a parareal network with a serial
sweep: the slowest stage, plus every interface's coarse propagator, plus the head behind them. In
training no stage goes back before the slowest one went forward, as the head needs them all: the
slowest stage forward F and the slowest stage backward B, two stages perhaps, follow each other.

For bounds on both the cheapest interfaces follow from a dynamic programme (`passes.partition.dp`);
``solve`` searches the bounds by branch and bound, so the answer comes with a proof.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from passes.errors import PartitionError
from passes.partition.dp import Bounds, Cheapest, Point
from passes.partition.problem import CutProblem, Phases

__all__ = ["CutSolution", "DoesNotFit", "least_phases", "search", "solve"]

_ROUNDING = 1e-12  # two times closer than this, relatively, are the same time
_SPLIT = 0.7  # where an interval is split; 0.5 took a third more evaluations on random prices
_FAR, _NEAR = 1.5, 1.1  # one up to more than so many times its beginning is split near to it,
_FIRST = 0.25  # so near on a logarithmic scale


class DoesNotFit(PartitionError):
    """No partition keeps to the memory of its devices."""


@dataclass(frozen=True, kw_only=True)
class CutSolution:
    """Hold the chosen cuts, their price, and the proof of how good they are.

    Attributes:
        cuts: Candidate indices c_1 < ... < c_N; the head follows the last one.
        makespan: Cost of the slowest stage, its preprocessing operator included; of the slowest
            forward and of the slowest backward where these are two phases.
        serial: Sum of the hops of c_1 ... c_{N-1} and of the tail of c_N.
        lower_bound: No partition takes less time than this.
        evaluations: How many bounds were tried.
        devices: What each stage runs on, where that was chosen too.
    """

    cuts: tuple[int, ...]
    makespan: float
    serial: float
    lower_bound: float
    evaluations: int
    devices: tuple[Any, ...] = ()

    @property
    def time(self) -> float:
        """Return the modelled step time: makespan plus serial sweep."""
        return self.makespan + self.serial

    @property
    def gap(self) -> float:
        """Return how far, relatively, the time may at most be above the best possible."""
        return (self.time - self.lower_bound) / self.time if self.time > 0 else 0.0


def solve(problem: CutProblem, *, gap: float = 1e-6, evaluations: int = 200) -> CutSolution:
    """Find the cuts of least time, makespan plus serial price.

    Args:
        problem: Prices of the candidate positions, by stage.
        gap: Stop when the time is proven to be within this fraction of the best possible;
            0 asks for the optimum up to rounding.
        evaluations: Stop after trying this many bounds, each O(N P log P) in tensor operations;
            what is then unproven stands in the solution's ``gap``.

    Returns:
        The best cuts found; of equally fast ones met, those of the smaller makespan.

    Raises:
        PartitionError: ``gap`` is negative, or ``evaluations`` is not positive.
        DoesNotFit: No partition keeps to the memory of its devices.
    """
    return search(Cheapest(problem), least_phases(problem), gap=gap, evaluations=evaluations)


def search(
    cheapest: Callable[[Bounds], Point], least: Phases, *, gap: float, evaluations: int
) -> CutSolution:
    """Search the bounds for the least time.

    Write S for the least serial price of all partitions under bounds, a lower bound of it. S falls
    as the bounds grow, so that a box of partitions, low <= F + B <= high and F between its own
    bounds, takes at least low + S. The box with the least such bound is split until none is below
    the best time found. Usually it is split by F + B; where the cheapest partition under its
    bounds, each of which its stages obey, breaks that on the sum by more than the box is wide, then
    by F, so that neither half admits it again.

    Args:
        cheapest: The cheapest partition under bounds.
        least: What no slowest stage is below, each way.
        gap: Stop when the time is proven to be within this fraction of the best possible.
        evaluations: Stop after trying this many bounds.

    Raises:
        PartitionError: ``gap`` is negative, or ``evaluations`` is not positive.
        DoesNotFit: There is no partition at all.
    """
    if not gap >= 0 or evaluations < 1:
        raise PartitionError(
            "the search needs gap >= 0 and at least one evaluation "
            f"(gap={gap}, evaluations={evaluations})"
        )
    best = cheapest(Bounds(least.forward, math.inf, math.inf))
    if not best.cuts:
        raise DoesNotFit("no partition fits the memory of the devices")
    bounds = Bounds(least.forward, math.inf, best.makespan)
    boxes = [_Box.of(least.makespan, bounds, best)]
    used = 1
    while boxes and used + 1 + boxes[0].broken <= evaluations:
        if boxes[0].bound >= best.time * (1 - max(gap, _ROUNDING)):
            break
        for box in _split(heapq.heappop(boxes), best, cheapest):
            used += box.fresh
            if box.fresh and box.point.cuts:
                best = _better(best, box.point)
            if box.low < box.high and box.bound < best.time:
                heapq.heappush(boxes, box)
    return CutSolution(
        cuts=best.cuts,
        makespan=best.makespan,
        serial=best.serial,
        lower_bound=min([best.time, *(box.bound for box in boxes[:1])]),
        evaluations=used,
    )


class _Box(NamedTuple):
    """Partitions with low <= F + B < high and least < F <= forward.

    Attributes:
        bound: No partition in the box takes less time.
        floor: Nor has it a lower serial price.
        point: The cheapest partition under the bounds of the box, or under wider ones.
        fresh: Whether that was found for this box.
        broken: Whether its slowest stages, together, are above the bound on them, though no stage
            of it breaks a bound.
    """

    bound: float
    low: float
    high: float
    least: float
    forward: float
    floor: float
    point: Point
    fresh: bool
    broken: bool

    @classmethod
    def of(cls, low: float, bounds: Bounds, point: Point) -> _Box:
        least, forward, high = bounds
        broken = bool(point.cuts) and point.makespan > high * (1 + _ROUNDING)
        bound = low + point.serial
        return cls(bound, low, high, least, forward, point.serial, point, True, broken)

    def within(self, low: float, high: float) -> _Box:
        """The part of the box between other bounds on F + B."""
        return self._replace(bound=low + self.floor, low=low, high=high, fresh=False)


def _split(box: _Box, best: Point, cheapest: Callable[[Bounds], Point]) -> list[_Box]:
    # Above best.time - floor the box cannot improve on the best.
    high, at = min(box.high, best.time - box.floor), box.point.phases
    if box.broken and at.makespan - high > high - box.low:
        middle = (max(box.least, high - at.backward) + min(at.forward, box.forward)) / 2
        slow, fast = Bounds(box.least, middle, high), Bounds(middle, box.forward, high)
        return [
            _Box.of(box.low, slow, cheapest(slow)),
            _Box.of(max(box.low, middle), fast, cheapest(fast)),
        ]
    middle = box.low + _SPLIT * (high - box.low)
    if high > _FAR * box.low > 0:  # low bounds are tried fast: few positions can be reached
        middle = max(_NEAR * box.low, box.low ** (1 - _FIRST) * high**_FIRST)
    bounds = Bounds(box.least, box.forward, middle)
    below = _Box.of(box.low, bounds, point := cheapest(bounds))
    if below.broken:
        return [below, box.within(middle, high)]
    # From the makespan of the point on, up to where the bounds allow for more, it is the best.
    return [
        below.within(box.low, min(middle, point.makespan))._replace(fresh=True),
        box.within(point.next_both, high),
    ]


def least_phases(problem: CutProblem) -> Phases:
    """Bound the slowest stages from below: the first one, and an even share of the least trunk."""
    devices, count = problem.devices, problem.stages
    ends = range(count - 1, problem.candidates)
    trunk = next(i for i in ends if devices[-1].tail[i] < math.inf)
    found = []
    for way in ("work", "back_work"):
        each = {id(getattr(d, way)): getattr(d, way) for d in devices}
        if not all(len(work) for work in each.values()):
            found.append(0.0)
            continue
        rows = list(each.values())
        # On the device that is fastest for it, node by node.
        steps = (min(row[i] - row[i - 1] for row in rows) for i in range(1, trunk + 1))
        total = math.fsum([min(row[0] for row in rows), *steps])
        found.append(max(getattr(devices[0], way)[0], total / count) * (1 - _ROUNDING))
    return Phases(*found)


def _better(best: Point, point: Point) -> Point:
    if math.isclose(point.time, best.time, rel_tol=_ROUNDING):
        return min(best, point, key=lambda each: each.makespan)
    return min(best, point, key=lambda each: each.time)
