"""The balanced cut: choose the interfaces of least step time, with a proof.

Pure numbers in, candidates out. The step time is that of a parareal network with a serial sweep:
the slowest stage, plus the coarse propagator and link of every interface, plus the head. In
training no stage starts its backward before the slowest forward is done, as the head needs all
stages: the slowest forward F and the slowest backward B, of two stages perhaps, add up.

For given bounds on F and B the cheapest interfaces follow from a dynamic program
(`passes.partition.dp`); `solve` searches the bounds by branch and bound. It keeps boxes of
partitions by their makespan. A box `low <= F + B < high` whose partitions have a serial cost of at
least S takes at least `low + S`; boxes that cannot beat the best time are dropped.

With the costs of the example in `passes.partition.dp`, three stages and one phase (no stage can be
below 3.33, a third of all work):

    makespan at most   cheapest cuts   makespan + serial   boxes that are left, and their bounds
    no limit           (0, 3, 4)           7 + 2 = 9       [3.33, 7): at least 3.33 + 2 = 5.33
    4.01               none                                [5, 7): at least 5 + 2 = 7
    6.4                (0, 2, 4)           6 + 3 = 9       [5, 6): at least 5 + 3 = 8
    5.7                (2, 3, 4)           5 + 3 = 8       none below 8: it is the optimum

The first row is the cheapest sweep, with poor balance. In the second one the dynamic program says
that no bound below 5 allows for any partition; in the third, that none from 6.4 up to 7 allows for
a cheaper one.

>>> import math
>>> problem = CutProblem.uniform(
...     stages=3,
...     work=[2, 4, 5, 8, 10],
...     entry=[1] * 5,
...     hop=[1, 3, 2, 1, 9],
...     tail=[math.inf] * 4 + [0],
... )
>>> solution = solve(problem)
>>> solution.cuts, solution.makespan, solution.serial, solution.lower_bound
((2, 3, 4), 5.0, 3.0, 8.0)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from passes.errors import PartitionError
from passes.partition.dp import CheapestCuts, DynamicProgram, StageBounds
from passes.partition.problem import CutProblem, Phases

_ROUNDING = 1e-12
"""Two times closer than this, relatively, are equal."""
_SPLIT = 0.7
"""Where to split an interval; 0.5 took a third more evaluations on random costs."""
_WIDE, _NEAR, _FIRST = 1.5, 1.1, 0.25
"""An interval that ends above `_WIDE` times its beginning is split near the beginning: at a quarter
of its logarithm, but at least at `_NEAR` times the beginning."""


class DoesNotFit(PartitionError):
    """No partition fits into the memory of its devices."""


@dataclass(frozen=True, kw_only=True)
class CutSolution:
    """The chosen cuts, their cost, and the proof of how good they are.

    Attributes:
        cuts: Candidates c_1 < ... < c_N; the head follows the last one.
        makespan: Cost of the slowest stage, its preprocessing operator included: the slowest
            forward plus the slowest backward if these are two phases.
        serial: Sum of the hops of c_1 ... c_{N-1} and of the tail of c_N.
        lower_bound: No partition takes less time than this.
        evaluations: Number of bounds tried.
        devices: Device of each stage, filled in by `passes.partition.choose_cuts`.
    """

    cuts: tuple[int, ...]
    makespan: float
    serial: float
    lower_bound: float
    evaluations: int
    devices: tuple[Any, ...] = ()

    @property
    def time(self) -> float:
        """Modeled step time: makespan plus serial sweep."""
        return self.makespan + self.serial

    @property
    def gap(self) -> float:
        """Largest possible relative distance of the time from the optimum."""
        return (self.time - self.lower_bound) / self.time if self.time > 0 else 0.0


def solve(problem: CutProblem, *, gap: float = 1e-6, evaluations: int = 200) -> CutSolution:
    """Find the cuts of least time, makespan plus serial cost, by branch and bound.

    Let S be the least serial cost of all partitions under some bounds. S falls as the bounds grow,
    so a box of partitions, low <= F + B <= high and F within its own bounds, takes at least
    low + S. The box with the least such bound is split until no bound is below the best time.
    Usually it is split by F + B. If the cheapest partition under its bounds, whose stages respect
    each of them, exceeds the bound on the sum by more than the width of the box, it is split by F
    instead, so that neither half admits that partition again.

    Args:
        problem: Costs of the candidate positions, by stage.
        gap: Stop once the time is proven to be within this fraction of the optimum; 0 asks for
            the optimum up to rounding.
        evaluations: Stop after this many bounds, each O(N P log P) in tensor operations; the
            solution's `gap` says how much is then unproven.

    Returns:
        The best cuts; of equally fast ones that were met, those of the smaller makespan.

    Raises:
        PartitionError: `gap` is negative, or `evaluations` is not positive.
        DoesNotFit: No partition fits into the memory of its devices.
    """
    if not gap >= 0 or evaluations < 1:
        raise PartitionError(
            "the search needs gap >= 0 and at least one evaluation "
            f"(gap={gap}, evaluations={evaluations})"
        )
    cheapest, least = DynamicProgram(problem).solve, phase_lower_bounds(problem)
    best = cheapest(StageBounds(least.forward, math.inf, math.inf))
    if not best.cuts:
        raise DoesNotFit("no partition fits the memory of the devices")
    bounds = StageBounds(least.forward, math.inf, best.makespan)
    boxes = [_Box.of(least.makespan, bounds, best)]
    used = 1
    # Splitting a violated box takes two evaluations, any other box one.
    while boxes and used + 1 + boxes[0].violated <= evaluations:
        if boxes[0].bound >= best.time * (1 - max(gap, _ROUNDING)):
            break
        for box in _split(heapq.heappop(boxes), best, cheapest):
            used += box.evaluated
            if box.evaluated and box.cheapest.cuts:
                best = _better(best, box.cheapest)
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
    """Partitions with low <= F + B < high and min_forward < F <= max_forward.

    Boxes sort by their lower bound on the time.

    Attributes:
        bound: Lower bound on the time of its partitions.
        least_serial: Lower bound on their serial cost.
        cheapest: The cheapest partition under the bounds of the box, or under wider ones.
        evaluated: Whether `cheapest` was computed for this box.
        violated: Whether the slowest stages of `cheapest` exceed the bound on F + B together,
            though each stage respects every bound.
    """

    bound: float
    low: float
    high: float
    min_forward: float
    max_forward: float
    least_serial: float
    cheapest: CheapestCuts
    evaluated: bool
    violated: bool

    @classmethod
    def of(cls, low: float, bounds: StageBounds, cheapest: CheapestCuts) -> _Box:
        """Build a box from bounds and the cheapest partition under them."""
        min_forward, max_forward, high = bounds
        violated = bool(cheapest.cuts) and cheapest.makespan > high * (1 + _ROUNDING)
        return cls(
            low + cheapest.serial, low, high, min_forward, max_forward, cheapest.serial, cheapest,
            True, violated,
        )  # fmt: skip

    def within(self, low: float, high: float) -> _Box:
        """Return the part of the box between other bounds on F + B."""
        return self._replace(bound=low + self.least_serial, low=low, high=high, evaluated=False)


def _split(
    box: _Box, best: CheapestCuts, cheapest: Callable[[StageBounds], CheapestCuts]
) -> list[_Box]:
    """Split a box by F + B, or by F if its cheapest partition violates the bound on the sum."""
    # Above best.time - least_serial the box cannot improve on the best.
    high, phases = min(box.high, best.time - box.least_serial), box.cheapest.phases
    if box.violated and phases.makespan - high > high - box.low:
        middle = (
            max(box.min_forward, high - phases.backward) + min(phases.forward, box.max_forward)
        ) / 2
        slow = StageBounds(box.min_forward, middle, high)
        fast = StageBounds(middle, box.max_forward, high)
        return [
            _Box.of(box.low, slow, cheapest(slow)),
            _Box.of(max(box.low, middle), fast, cheapest(fast)),
        ]
    middle = box.low + _SPLIT * (high - box.low)
    if high > _WIDE * box.low > 0:  # small bounds are evaluated fast: few candidates are reachable
        middle = max(_NEAR * box.low, box.low ** (1 - _FIRST) * high**_FIRST)
    bounds = StageBounds(box.min_forward, box.max_forward, middle)
    point = cheapest(bounds)
    below = _Box.of(box.low, bounds, point)
    if below.violated:
        return [below, box.within(middle, high)]
    # From its own makespan up to the next one that allows for more, `point` is the cheapest.
    return [
        below.within(box.low, min(middle, point.makespan))._replace(evaluated=True),
        box.within(point.next_makespan, high),
    ]


def phase_lower_bounds(problem: CutProblem) -> Phases:
    """Bound the slowest stages from below: the first stage, and an even share of the trunk."""
    devices, count = problem.devices, problem.stages
    ends = range(count - 1, problem.candidates)
    trunk = next(i for i in ends if devices[-1].tail[i] < math.inf)
    bounds = []
    for phase in ("work", "backward_work"):
        rows = list({id(getattr(d, phase)): getattr(d, phase) for d in devices}.values())
        if not all(len(work) for work in rows):
            bounds.append(0.0)
            continue
        # On the device that is fastest for it, node by node.
        steps = (min(row[i] - row[i - 1] for row in rows) for i in range(1, trunk + 1))
        total = math.fsum([min(row[0] for row in rows), *steps])
        first = getattr(devices[0], phase)[0]
        bounds.append(max(first, total / count) * (1 - _ROUNDING))
    return Phases(*bounds)


def _better(best: CheapestCuts, other: CheapestCuts) -> CheapestCuts:
    if math.isclose(other.time, best.time, rel_tol=_ROUNDING):
        return min(best, other, key=lambda cuts: cuts.makespan)
    return min(best, other, key=lambda cuts: cuts.time)
