"""The cheapest interfaces of a partition whose stages respect bounds: a dynamic program.

Work does not decrease, so a stage that begins at p may end at any q with p < q < end[p]: one
contiguous range, whatever the bounds on its cost and memory. From the last stage to the first, the
least serial cost after p is then a range minimum, and one sparse table answers all p at once:

    cost[N][q] = tail[q]        cost[j][p] = hop[p] + min(cost[j + 1][p + 1 : end[p]])

where cost[j][p] is the serial cost after stage j if that stage ends at p. Example with N = 3, and
no stage above 6:

    candidate       0     1     2     3     4
    work            2     4     5     8    10
    entry           1     1     1     1     1
    hop             1     3     2     1     9
    tail          inf   inf   inf   inf     0
    end             3     4     5     5           work[q] <= work[p] + 6 - entry[p]

    cost[3]       inf   inf   inf   inf     0
    cost[2]       inf   inf     2     1           e.g. p = 2: hop[2] + min(inf, 0)
    cost[1]         3     4     3                 e.g. p = 1: hop[1] + min(2, 1)

Stage 1 may end at 0, 1 or 2 (work <= 6). The least is cost[1][0] = 3; following the minima gives
the cuts (0, 2, 4) with stages of 2, 4 and 6. The next larger makespan that allows for another
partition is 7: a stage from 0 to 3 costs 1 + 8 - 2.

>>> from passes.partition.problem import CutProblem
>>> problem = CutProblem.uniform(
...     stages=3,
...     work=[2, 4, 5, 8, 10],
...     entry=[1] * 5,
...     hop=[1, 3, 2, 1, 9],
...     tail=[math.inf] * 4 + [0],
... )
>>> cheapest = DynamicProgram(problem).solve(StageBounds(0, math.inf, 6))
>>> cheapest.cuts, cheapest.makespan, cheapest.serial, cheapest.next_makespan
((0, 2, 4), 6.0, 3.0, 7)

Each stage looks only at the positions where it can end under the bounds: not later than the stages
up to it reach, and not earlier than the stages after it reach back.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from passes.partition.problem import CutProblem, Phases, PositionCosts, serial, slowest_phases

_SLACK = 4 * sys.float_info.epsilon
"""Four roundings lie between the cost of a stage and a comparison. Errors on the feasible side
keep the least cost a lower bound."""


class StageBounds(NamedTuple):
    """Bounds on the stages of a partition.

    A stage takes at most `max_forward` forward, at most `max_makespan - min_forward` backward (the
    slowest forward takes at least `min_forward`, and both phases together at most `max_makespan`),
    and at most `max_makespan` in both phases.
    """

    min_forward: float
    max_forward: float
    max_makespan: float


class CheapestCuts(NamedTuple):
    """The partition of least serial cost under bounds.

    Attributes:
        cuts: Its candidates; empty if there is none.
        phases: Its slowest stages. Each stage respects the bounds, but the slowest forward and the
            slowest backward may belong to two stages, whose sum exceeds `max_makespan`.
        serial: Its serial cost; `inf` if there is none.
        next_makespan: Least `max_makespan` above this one that allows for another partition.
    """

    cuts: tuple[int, ...]
    phases: Phases
    serial: float
    next_makespan: float

    @classmethod
    def none(cls, next_makespan: float) -> CheapestCuts:
        """Return the result for bounds that no partition respects."""
        return cls((), Phases(0.0, 0.0), math.inf, next_makespan)

    @property
    def makespan(self) -> float:
        """Slowest forward plus slowest backward."""
        return self.phases.makespan

    @property
    def time(self) -> float:
        """Makespan plus serial cost."""
        return self.makespan + self.serial


class DynamicProgram:
    """Solver for the partition of least serial cost under bounds.

    Args:
        problem: The costs, by stage.
    """

    def __init__(self, problem: CutProblem) -> None:
        self.problem = problem
        tensors = {id(costs): _DeviceTensors(costs) for costs in problem.devices}
        self.devices = [tensors[id(costs)] for costs in problem.devices]
        self._repeated = {d for d, count in Counter(self.devices).items() if count > 1}
        tail = problem.devices[-1].tail
        self._first_tail = next(i for i, cost in enumerate(tail) if cost < math.inf)

    def solve(self, bounds: StageBounds) -> CheapestCuts:
        """Return the partition of least serial cost whose stages respect the bounds.

        O(N P log P) in tensor operations, for N stages and P candidates.
        """
        earliest, next_makespan = self._earliest_ends(bounds)
        tables: dict[_DeviceTensors, _StageEnds] = {}
        last = len(self.devices) - 1
        latest, needed = self.devices[0].first_end(bounds)
        next_makespan = min(next_makespan, needed)
        # By stage, the first and the last candidate at which it can end.
        windows, ends = [(earliest[0], latest)], []
        for number, device in enumerate(self.devices[1:], 1):
            begin, stop = windows[-1]
            if begin > stop:
                return CheapestCuts.none(next_makespan)
            if device in self._repeated and number < last:
                # Equal devices share one table over all starts.
                if device not in tables:
                    tables[device] = device.stage_ends(
                        bounds, 0, self.problem.candidates, last=False
                    )
                table = tables[device].rows(begin, stop + 1)
            else:
                table = device.stage_ends(bounds, begin, stop + 1, last=number == last)
            next_makespan = min(next_makespan, float(table.next_makespan.min()))
            ends.append(table.end)
            windows.append((earliest[number], int(table.end.max()) - 1))
        begin, stop = windows[-1]
        if begin > stop:
            return CheapestCuts.none(next_makespan)
        return self._backtrack(windows, ends, next_makespan)

    def _earliest_ends(self, bounds: StageBounds) -> tuple[list[int], float]:
        """Return where each stage ends at the earliest, for those after it to reach the end.

        Also the least `max_makespan` that would change one of these.
        """
        position, next_makespan = self._first_tail, math.inf
        earliest = [position]
        for number in range(len(self.devices) - 1, 0, -1):
            position, needed = self.devices[number].earliest_begin(bounds, position)
            next_makespan = min(next_makespan, needed)
            if position > earliest[-1]:
                return [self.problem.candidates] * len(self.devices), next_makespan
            position = max(position, number - 1)  # stages before it need a candidate each
            earliest.append(position)
        return earliest[::-1], next_makespan

    def _backtrack(
        self, windows: Sequence[tuple[int, int]], ends: Sequence[Tensor], next_makespan: float
    ) -> CheapestCuts:
        """Fill the cost table from the last stage to the first, then follow its minima."""
        begin, stop = windows[-1]
        cost = self.devices[-1].tail[begin : stop + 1]
        costs = [cost]
        for number in range(len(self.devices) - 1, 0, -1):
            cost = range_minima(cost, windows[number][0], windows[number - 1], ends[number - 1])
            begin, stop = windows[number - 1]
            cost = cost + self.devices[number].hop[begin : stop + 1]
            costs.append(cost)
        costs.reverse()
        cut = int(costs[0].argmin())
        if costs[0][cut] == math.inf:
            return CheapestCuts.none(next_makespan)
        cuts = [windows[0][0] + cut]
        for number in range(1, len(self.devices)):
            begin = windows[number][0]
            limit = int(ends[number - 1][cuts[-1] - windows[number - 1][0]])
            first = max(cuts[-1] + 1, begin)
            cuts.append(first + int(costs[number][first - begin : limit - begin].argmin()))
        phases = slowest_phases(self.problem, cuts)
        return CheapestCuts(tuple(cuts), phases, serial(self.problem, cuts), next_makespan)


def range_minima(cost: Tensor, offset: int, starts: tuple[int, int], end: Tensor) -> Tensor:
    """Return `min(cost[p + 1 : end[p]])` for every start p, by a sparse table.

    Args:
        cost: Values `[n]`, the first of which belongs to candidate `offset`.
        offset: Candidate of `cost[0]`.
        starts: First and last start.
        end: For each start, one past the last candidate of its range.

    Returns:
        The minima `[starts]`; `inf` for an empty range.

    >>> range_minima(torch.tensor([5.0, 3.0, 4.0, 1.0]), 0, (0, 2), torch.tensor([3, 3, 4]))
    tensor([3., 4., 1.])
    """
    size = len(cost)
    left = (torch.arange(starts[0] + 1, starts[1] + 2, device="cpu") - offset).clamp(min=0)
    right = (end - offset).clamp(max=size)
    length = (right - left).clamp(min=0)
    levels = max(1, int(length.max()).bit_length())
    # A range is covered by two blocks of 2**level, one from each side; they may overlap.
    level = (torch.frexp(length.double()).exponent.long() - 1).clamp(min=0)
    blocks = torch.stack([left, right - (1 << level)]) + level * size
    blocks[:, length == 0] = levels * size
    table = cost.new_full((levels * size + 1,), math.inf)  # the last entry is for empty ranges
    rows = table[:-1].view(levels, size)
    rows[0] = cost
    for k in range(1, levels):
        # rows[k][i] is the minimum over i ... i + 2**k - 1.
        half, count = 1 << (k - 1), size - (1 << k) + 1
        below = rows[k - 1]
        torch.minimum(below[:count], below[half : half + count], out=rows[k][:count])
    return table[blocks].amin(dim=0)


class _StageEnds(NamedTuple):
    """For each start of a stage.

    Attributes:
        end: One past the last candidate at which the stage may end.
        next_makespan: Least `max_makespan` under which it may end later.
    """

    end: Tensor
    next_makespan: Tensor

    def rows(self, begin: int, stop: int) -> _StageEnds:
        """Return the rows of the starts from `begin` to before `stop`."""
        return _StageEnds(self.end[begin:stop], self.next_makespan[begin:stop])


class _Costs:
    """Costs of a stage on one device in one phase, "forward" or "backward", or in both."""

    def __init__(self, phase: str, work: Sequence[float], entry: Sequence[float]) -> None:
        self.phase = phase
        self.list, self.least_entry = list(work), min(entry)
        self.work, self.entry = (
            torch.tensor(values, dtype=torch.float64, device="cpu") for values in (work, entry)
        )
        self.padded = torch.cat([self.work, self.work.new_full((1,), math.inf)])

    def limit(self, bounds: StageBounds) -> float:
        """Return the largest cost of a stage in this phase."""
        if self.phase == "forward":
            return bounds.max_forward
        least = bounds.min_forward if self.phase == "backward" else 0.0
        return bounds.max_makespan - least

    def needed_makespan(self, bounds: StageBounds, cost: float) -> float:
        """Return the least `max_makespan` that allows for a stage of this cost."""
        if self.phase == "forward":
            return math.inf if cost > bounds.max_forward * (1 + _SLACK) else 0.0
        return cost + bounds.min_forward if self.phase == "backward" else cost


class _DeviceTensors:
    """The costs of one device as tensors."""

    def __init__(self, costs: PositionCosts) -> None:
        self.first_reach = costs.first_reach
        self.hop, self.tail = (
            torch.tensor(values, dtype=torch.float64, device="cpu")
            for values in (costs.hop, costs.tail)
        )
        self.size = len(self.hop)
        if costs.backward_work:
            both = [a + b for a, b in zip(costs.work, costs.backward_work, strict=True)]
            entry = [a + b for a, b in zip(costs.entry, costs.backward_entry, strict=True)]
            self.costs = [
                _Costs("forward", costs.work, costs.entry),
                _Costs("backward", costs.backward_work, costs.backward_entry),
                _Costs("both", both, entry),
            ]
        else:
            self.costs = [_Costs("both", costs.work, costs.entry)]
        self.reach = (
            torch.tensor(costs.reach, dtype=torch.long, device="cpu") if costs.reach else None
        )
        last = costs.last_reach or costs.reach
        self.last_reach = torch.tensor(last, dtype=torch.long, device="cpu") if last else None

    def first_end(self, bounds: StageBounds) -> tuple[int, float]:
        """Return where a first stage ends at the latest, and the makespan it needs to end later."""
        reach = self.first_reach
        latest = allowed = self.size - 1 if reach is None else min(reach, self.size - 1)
        for costs in self.costs:
            limit = costs.limit(bounds)
            latest = min(latest, bisect_right(costs.list, limit * (1 + _SLACK)) - 1)
        if latest >= allowed:
            return latest, math.inf
        return latest, max(c.needed_makespan(bounds, c.list[latest + 1]) for c in self.costs)

    def earliest_begin(self, bounds: StageBounds, end: int) -> tuple[int, float]:
        """Return where a stage that ends at `end` or later begins at the earliest.

        An optimistic estimate, to prune with: the entry costs as little as at any candidate, and
        memory suffices. Also returns the makespan that it needs to begin earlier.
        """
        earliest = 0
        for costs in self.costs:
            limit = costs.limit(bounds)
            slack = _SLACK * (limit + costs.list[end])
            begin = costs.list[end] + costs.least_entry - limit - slack
            earliest = max(earliest, bisect_left(costs.list, begin))
        if earliest > end:  # the entry alone exceeds the bounds
            needed = [costs.needed_makespan(bounds, costs.least_entry) for costs in self.costs]
        elif earliest:
            needed = [
                costs.needed_makespan(
                    bounds, costs.least_entry + (costs.list[end] - costs.list[earliest - 1])
                )
                for costs in self.costs
            ]
        else:
            return 0, math.inf
        return earliest, max(needed)

    def stage_ends(self, bounds: StageBounds, begin: int, stop: int, *, last: bool) -> _StageEnds:
        """Return where stages end at the latest, for every start from `begin` to before `stop`."""
        starts = torch.arange(begin, stop, device="cpu")
        end = starts.new_full((stop - begin,), self.size)
        reach = self.last_reach if last else self.reach
        if reach is not None:
            end = torch.minimum(end, reach[begin:stop] + 1)
        allowed = end
        for costs in self.costs:
            limit = costs.limit(bounds)
            if limit == math.inf:
                continue
            work, entry = costs.work[begin:stop], costs.entry[begin:stop]
            most = work + (limit - entry) + _SLACK * (limit + work)
            end = torch.minimum(end, torch.searchsorted(costs.work, most, right=True))
        too_far = torch.maximum(end, starts + 1)
        needed = torch.where(too_far >= allowed, math.inf, 0.0).double()
        for costs in self.costs:
            cost = costs.entry[begin:stop] + (costs.padded[too_far] - costs.work[begin:stop])
            if costs.phase == "forward":  # no makespan helps against the bound on forward
                needed[cost > bounds.max_forward * (1 + _SLACK)] = math.inf
            else:
                least = bounds.min_forward if costs.phase == "backward" else 0.0
                needed = torch.maximum(needed, cost + least)
        return _StageEnds(end, needed)
