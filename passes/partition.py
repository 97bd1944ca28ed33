"""The balanced cut: given the price of every position, choose the interfaces that cost least time.

Pure numbers in, positions out. The model is the step time of a parareal network with a serial
sweep: the slowest stage, plus every interface's coarse propagator, plus the head behind them.

For a bound on the slowest stage the cheapest interfaces follow from a dynamic programme over the
stages; ``solve`` searches that bound by branch and bound, so the answer comes with a proof.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from passes.errors import PartitionError

__all__ = ["CutProblem", "CutSolution", "makespan", "serial", "solve"]

_ROUNDING = 1e-12  # two times closer than this, relatively, are the same time
_SPLIT = 0.7  # where an interval is split; 0.5 took a third more evaluations on random prices


@dataclass(frozen=True, kw_only=True)
class CutProblem:
    """State the prices of P candidate positions, in topological order, and the number of stages.

    All four sequences have length P and share one unit (seconds or FLOPs). Stage 1 begins at the
    beginning of the graph, where work and entry are 0; a later stage begins at its interface.

    Attributes:
        work: Cost of all nodes before the candidate; non-decreasing, not negative.
        entry: Cost of the preprocessing operator (C) of a stage that begins at the candidate.
        hop: Serial price of an interface at the candidate: coarse propagator (F) and link.
        tail: Serial price if the last stage ends at the candidate: coarse propagator into that
            state and the head (h) behind it; ``inf`` where the last stage may not end.
        stages: Number of stages, N.

    Raises:
        PartitionError: The numbers are malformed, or no N candidates can be the cuts.
    """

    work: Sequence[float]
    entry: Sequence[float]
    hop: Sequence[float]
    tail: Sequence[float]
    stages: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        lengths = {name: len(getattr(self, name)) for name in ("work", "entry", "hop", "tail")}
        if len(set(lengths.values())) > 1:
            raise PartitionError(f"the price sequences differ in length ({lengths})")
        for name in lengths:
            _check_prices(name, getattr(self, name))
        for i in range(1, len(self.work)):
            if self.work[i] < self.work[i - 1]:
                raise PartitionError(
                    "work must not decrease along the topological order "
                    f"(work[{i - 1}]={self.work[i - 1]:g}, work[{i}]={self.work[i]:g})"
                )
        self._check_feasible()

    def _check_feasible(self) -> None:
        candidates = len(self.work)
        if self.stages < 1:
            raise PartitionError(f"a partition needs at least one stage (stages={self.stages})")
        if candidates < self.stages:
            raise PartitionError(
                f"too few positions to cut at (candidates={candidates}, stages={self.stages}); "
                f"ask for at most {candidates} stages, or allow larger states at the interfaces"
            )
        last = max((i for i, price in enumerate(self.tail) if price < math.inf), default=-1)
        if last + 1 < self.stages:
            raise PartitionError(
                f"the last stage cannot end late enough (candidates={candidates}, of which "
                f"{last + 1} up to the last allowed end, stages={self.stages}); "
                f"ask for at most {last + 1} stages, or allow the head to begin later"
            )


@dataclass(frozen=True, kw_only=True)
class CutSolution:
    """Hold the chosen cuts, their price, and the proof of how good they are.

    Attributes:
        cuts: Candidate indices c_1 < ... < c_N; the head follows the last one.
        makespan: Cost of the slowest stage, its preprocessing operator included.
        serial: Sum of the hops of c_1 ... c_{N-1} and of the tail of c_N.
        lower_bound: No partition takes less time than this.
        evaluations: How many bounds on the makespan were tried.
    """

    cuts: tuple[int, ...]
    makespan: float
    serial: float
    lower_bound: float
    evaluations: int

    @property
    def time(self) -> float:
        """Return the modelled step time: makespan plus serial sweep."""
        return self.makespan + self.serial

    @property
    def gap(self) -> float:
        """Return how far, relatively, the time may at most be above the best possible."""
        return (self.time - self.lower_bound) / self.time if self.time > 0 else 0.0


def makespan(problem: CutProblem, cuts: Sequence[int]) -> float:
    """Return the cost of the slowest stage, max_j(t(C_j) + t(g_j)), of a partition."""
    work, entry = problem.work, problem.entry
    later = (entry[p] + (work[q] - work[p]) for p, q in pairwise(cuts))
    return max([work[cuts[0]], *later])


def serial(problem: CutProblem, cuts: Sequence[int]) -> float:
    """Return the price of the serial sweep, sum_j(t(F_j) + link) + t(h), of a partition."""
    return math.fsum([*(problem.hop[c] for c in cuts[:-1]), problem.tail[cuts[-1]]])


def solve(problem: CutProblem, *, gap: float = 1e-6, evaluations: int = 200) -> CutSolution:
    """Find the cuts of least time, makespan plus serial price.

    Write S(b) for the least serial price when no stage may cost more than b. S falls as b grows,
    so on an interval low <= makespan < high every partition takes at least low + S(high). The
    interval with the least such bound is split until no bound is below the best time found.

    Args:
        problem: Prices of the candidate positions.
        gap: Stop when the time is proven to be within this fraction of the best possible;
            0 asks for the optimum up to rounding.
        evaluations: Stop after this many evaluations of S, each O(N P log P) in tensor
            operations; what is then unproven stands in the solution's ``gap``.

    Returns:
        The best cuts found; of equally fast ones met, those of the smaller makespan.

    Raises:
        PartitionError: ``gap`` is negative or ``evaluations`` is not positive.
    """
    if not gap >= 0 or evaluations < 1:
        raise PartitionError(
            "the search needs gap >= 0 and at least one evaluation "
            f"(gap={gap}, evaluations={evaluations})"
        )
    sweep = _Sweep(problem)
    best = sweep.cheapest(math.inf)
    intervals = [_Interval.between(_least_makespan(problem), best.makespan, best.serial)]
    used = 1
    while intervals and used < evaluations:
        if intervals[0].bound >= best.time * (1 - max(gap, _ROUNDING)):
            break
        _, low, high, floor = heapq.heappop(intervals)
        # Above best.time - floor the interval cannot improve on the best.
        high = min(high, best.time - floor)
        point = sweep.cheapest(low + _SPLIT * (high - low))
        used += 1
        if point.makespan > low:
            heapq.heappush(intervals, _Interval.between(low, point.makespan, point.serial))
        if point.next_makespan < high:
            heapq.heappush(intervals, _Interval.between(point.next_makespan, high, floor))
        best = _better(best, point)
    bound = min([best.time, *(interval.bound for interval in intervals[:1])])
    return CutSolution(
        cuts=best.cuts,
        makespan=best.makespan,
        serial=best.serial,
        lower_bound=bound,
        evaluations=used,
    )


def _check_prices(name: str, prices: Sequence[float]) -> None:
    for i, price in enumerate(prices):
        if not price >= 0 or (price == math.inf and name != "tail"):
            allowed = "not negative" if name == "tail" else "finite and not negative"
            raise PartitionError(f"every {name} price must be {allowed} ({name}[{i}]={price})")


def _least_makespan(problem: CutProblem) -> float:
    """Bound the makespan from below: the first stage, and an even share of the least trunk."""
    ends = range(problem.stages - 1, len(problem.work))
    trunk = next(problem.work[i] for i in ends if problem.tail[i] < math.inf)
    return max(problem.work[0], trunk / problem.stages)


class _Interval(NamedTuple):
    """Partitions with low <= makespan < high: their serial price is at least floor."""

    bound: float
    low: float
    high: float
    floor: float

    @classmethod
    def between(cls, low: float, high: float, floor: float) -> _Interval:
        return cls(low + floor, low, high, floor)


class _Point(NamedTuple):
    """The cheapest partition under a bound, and the least stage cost above that bound."""

    cuts: tuple[int, ...]
    makespan: float
    serial: float
    next_makespan: float

    @property
    def time(self) -> float:
        return self.makespan + self.serial


def _better(best: _Point, point: _Point) -> _Point:
    if math.isclose(point.time, best.time, rel_tol=_ROUNDING):
        return min(best, point, key=lambda each: each.makespan)
    return min(best, point, key=lambda each: each.time)


class _Sweep:
    """Evaluate S(bound): the cheapest interfaces when no stage may cost more than bound.

    Work does not decrease, so a stage that begins at p may end at any q with p < q < end[p]: one
    contiguous range. Going from the last stage to the first, the least price behind p is then a
    range minimum, and a sparse table answers all P of them at once:

        price[N][q] = tail[q]        price[j][p] = hop[p] + min(price[j + 1][p + 1 : end[p]])
    """

    def __init__(self, problem: CutProblem) -> None:
        self.problem = problem
        self.work, self.entry, self.hop, self.tail = (
            torch.tensor(prices, dtype=torch.float64, device="cpu")
            for prices in (problem.work, problem.entry, problem.hop, problem.tail)
        )
        self.size = len(problem.work)
        self.work_or_inf = torch.cat([self.work, self.work.new_full((1,), math.inf)])
        self.first_end = torch.arange(1, self.size + 1, device="cpu")  # p + 1
        # One buffer for all evaluations: fresh pages cost more than the arithmetic on them.
        self.prices = list(self.work.new_empty(problem.stages, self.size))
        self.table = self.work.new_empty(self.size * self.size.bit_length() + 1)

    def cheapest(self, bound: float) -> _Point:
        """Return the partition of least serial price whose stages cost at most bound.

        Where there is none, its cuts are empty, its makespan is 0 and its price inf.
        """
        # Four roundings lie between a stage's cost and this comparison: erring on the feasible
        # side keeps S a lower bound.
        tolerance = 4 * sys.float_info.epsilon * (bound + self.work)
        limit = self.work + (bound - self.entry) + tolerance
        end = torch.searchsorted(self.work, limit, right=True)
        first_stage = int(torch.searchsorted(self.work, bound, right=True))
        following = self._next_makespan(end, first_stage)
        if first_stage == 0:
            return _Point((), 0.0, math.inf, following)
        self._fill_prices(end)
        cuts = [int(self.prices[0][:first_stage].argmin())]
        if self.prices[0][cuts[0]] == math.inf:
            return _Point((), 0.0, math.inf, following)
        for price in self.prices[1:]:
            after = cuts[-1] + 1
            cuts.append(after + int(price[after : int(end[cuts[-1]])].argmin()))
        chosen = tuple(cuts)
        return _Point(
            chosen, makespan(self.problem, chosen), serial(self.problem, chosen), following
        )

    def _next_makespan(self, end: Tensor, first_stage: int) -> float:
        """Return the least cost of a stage that is too long under the bound."""
        too_far = torch.maximum(end, self.first_end)
        later = self.entry + (self.work_or_inf[too_far] - self.work)
        return float(torch.minimum(later.min(), self.work_or_inf[first_stage]))

    def _fill_prices(self, end: Tensor) -> None:
        """Fill the price of every candidate as each stage's end, from the last stage back."""
        size, minimum = self.size, torch.minimum
        length = (end - self.first_end).clamp(min=0)
        levels = max(1, int(length.max()).bit_length())
        # A range is covered by two blocks of 2**level, one from each side; they may overlap.
        level = (torch.frexp(length.double()).exponent.long() - 1).clamp(min=0)
        blocks = torch.stack([self.first_end, end - (1 << level)]) + level * size
        blocks[:, length == 0] = levels * size
        ends = blocks.flatten()
        table = self.table[: levels * size + 1]
        table[-1] = math.inf  # where empty ranges look
        # rows[k][i] is the minimum over i ... i + 2**k - 1; the views are made once.
        rows = table[:-1].view(levels, size)
        doubling = []
        for k in range(1, levels):
            half, count = 1 << (k - 1), size - (1 << k) + 1
            below = rows[k - 1]
            doubling.append((below[:count], below[half : half + count], rows[k][:count]))
        found = table.new_empty(2, size)
        left, right = found
        flat = found.view(-1)
        self.prices[-1].copy_(self.tail)
        for behind, price in zip(self.prices[:0:-1], self.prices[-2::-1], strict=True):
            rows[0].copy_(behind)
            for one, other, out in doubling:
                minimum(one, other, out=out)
            torch.index_select(table, 0, ends, out=flat)
            minimum(left, right, out=price)
            price.add_(self.hop)
