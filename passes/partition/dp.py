"""The cheapest interfaces of a partition whose stages keep to bounds: a dynamic programme.

Work does not decrease, so a stage that begins at p may end at any q with p < q < end[p]: one
contiguous range, whatever bounds there are on its time and memory. Going from the last stage to
the first, the least price behind p is then a range minimum, and a sparse table answers all p at
once:

    price[N][q] = tail[q]        price[j][p] = hop[p] + min(price[j + 1][p + 1 : end[p]])

Only the positions are looked at where a stage can end under the bounds: not later than the stages
up to it reach, and not earlier than the stages behind it reach back.
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

from passes.partition.problem import CutProblem, Phases, Prices, phases, serial

__all__ = ["Bounds", "Cheapest", "Kind", "Point", "ranges"]

_SLACK = 4 * sys.float_info.epsilon
"""Four roundings lie between the cost of a stage and a comparison: erring on the feasible side
keeps the least price a lower bound."""


class Bounds(NamedTuple):
    """What the stages of a partition may cost.

    The slowest stage forward takes at least `least` and at most `forward`, and the slowest ones
    each way together at most `both`; so that no stage takes more than `both - least` back.
    """

    least: float
    forward: float
    both: float


class Point(NamedTuple):
    """The cheapest partition under bounds.

    Attributes:
        cuts: Its candidates; empty where there is none.
        phases: Its slowest stages; together they may be above the bound on both.
        serial: Its serial price; ``inf`` where there is none.
        next_both: Least bound on both above this one that allows for another partition.
    """

    cuts: tuple[int, ...]
    phases: Phases
    serial: float
    next_both: float

    @property
    def makespan(self) -> float:
        """Slowest stage forward and slowest stage backward."""
        return self.phases.makespan

    @property
    def time(self) -> float:
        """Makespan and serial price."""
        return self.makespan + self.serial


class Cheapest:
    """Finds the cheapest partition of a problem under bounds."""

    def __init__(self, problem: CutProblem) -> None:
        self.problem = problem
        kinds = {id(device): Kind(device) for device in problem.devices}
        self.kinds = [kinds[id(device)] for device in problem.devices]
        self._often = {kind for kind, count in Counter(self.kinds).items() if count > 1}
        tail = problem.devices[-1].tail
        self._first_tail = next(i for i, price in enumerate(tail) if price < math.inf)

    def __call__(self, bounds: Bounds) -> Point:
        """Return the partition of least serial price whose stages keep to the bounds."""
        earliest, following = self._earliest(bounds)
        known: dict[Kind, _Ends] = {}
        kind, last = self.kinds[0], len(self.kinds) - 1
        furthest, after = kind.first(bounds)
        following = min(following, after)
        windows, ends = [(earliest[0], furthest)], []
        for number, kind in enumerate(self.kinds[1:], 1):
            begin, stop = windows[-1]
            if begin > stop:
                return Point((), Phases(0.0, 0.0), math.inf, following)
            if kind in self._often and number < last:
                if kind not in known:
                    known[kind] = kind.ends(bounds, 0, self.problem.candidates, last=False)
                end = known[kind].end[begin : stop + 1]
                following = min(following, float(known[kind].following[begin : stop + 1].min()))
            else:
                found = kind.ends(bounds, begin, stop + 1, last=number == last)
                end = found.end
                following = min(following, float(found.following.min()))
            ends.append(end)
            windows.append((earliest[number], int(end.max()) - 1))
        begin, stop = windows[-1]
        if begin > stop:
            return Point((), Phases(0.0, 0.0), math.inf, following)
        return self._point(windows, ends, following)

    def _earliest(self, bounds: Bounds) -> tuple[list[int], float]:
        """Where each stage ends at the earliest for those behind it to reach the end.

        Also the least bound on both under which that would change.
        """
        position, following = self._first_tail, math.inf
        found = [position]
        for number in range(len(self.kinds) - 1, 0, -1):
            position, after = self.kinds[number].back(bounds, position)
            following = min(following, after)
            if position > found[-1]:
                return [self.problem.candidates] * len(self.kinds), following
            position = max(position, number - 1)
            found.append(position)
        return found[::-1], following

    def _point(
        self, windows: Sequence[tuple[int, int]], ends: Sequence[Tensor], following: float
    ) -> Point:
        begin, stop = windows[-1]
        price = self.kinds[-1].tail[begin : stop + 1]
        prices = [price]
        for number in range(len(self.kinds) - 1, 0, -1):
            price = ranges(price, windows[number][0], windows[number - 1], ends[number - 1])
            begin, stop = windows[number - 1]
            price = price + self.kinds[number].hop[begin : stop + 1]
            prices.append(price)
        prices.reverse()
        cut = int(prices[0].argmin())
        if prices[0][cut] == math.inf:
            return Point((), Phases(0.0, 0.0), math.inf, following)
        cuts = [windows[0][0] + cut]
        for number in range(1, len(self.kinds)):
            begin = windows[number][0]
            limit = int(ends[number - 1][cuts[-1] - windows[number - 1][0]])
            first = max(cuts[-1] + 1, begin)
            cuts.append(first + int(prices[number][first - begin : limit - begin].argmin()))
        chosen = tuple(cuts)
        return Point(chosen, phases(self.problem, chosen), serial(self.problem, chosen), following)


def ranges(price: Tensor, offset: int, starts: tuple[int, int], end: Tensor) -> Tensor:
    """Least price over the ends that each start allows for; `price` begins at `offset`."""
    size = len(price)
    left = (torch.arange(starts[0] + 1, starts[1] + 2) - offset).clamp(min=0)
    right = (end - offset).clamp(max=size)
    length = (right - left).clamp(min=0)
    levels = max(1, int(length.max()).bit_length())
    # A range is covered by two blocks of 2**level, one from each side; they may overlap.
    level = (torch.frexp(length.double()).exponent.long() - 1).clamp(min=0)
    blocks = torch.stack([left, right - (1 << level)]) + level * size
    blocks[:, length == 0] = levels * size
    table = price.new_full((levels * size + 1,), math.inf)  # the last: where empty ranges look
    rows = table[:-1].view(levels, size)
    rows[0] = price
    for k in range(1, levels):
        # rows[k][i] is the minimum over i ... i + 2**k - 1.
        half, count = 1 << (k - 1), size - (1 << k) + 1
        below = rows[k - 1]
        torch.minimum(below[:count], below[half : half + count], out=rows[k][:count])
    return table[blocks].amin(dim=0)


class _Ends(NamedTuple):
    """For each start: behind where its stage must end, and the bound on both that allows more."""

    end: Tensor
    following: Tensor


class _Way:
    """What a stage costs on one device: forward, backward, or both."""

    def __init__(self, name: str, work: Sequence[float], entry: Sequence[float]) -> None:
        self.name = name
        self.list, self.least_entry = list(work), min(entry)
        self.work, self.entry = (
            torch.tensor(values, dtype=torch.float64, device="cpu") for values in (work, entry)
        )
        self.padded = torch.cat([self.work, self.work.new_full((1,), math.inf)])

    def limit(self, bounds: Bounds) -> float:
        """What a stage may cost this way."""
        if self.name == "forward":
            return bounds.forward
        return bounds.both - bounds.least if self.name == "backward" else bounds.both

    def needs(self, bounds: Bounds, cost: float) -> float:
        """The bound on both that allows for a stage of this cost."""
        if self.name == "forward":
            return math.inf if cost > bounds.forward * (1 + _SLACK) else 0.0
        return cost + bounds.least if self.name == "backward" else cost


class Kind:
    """One device: its prices as tensors."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.hop, self.tail = (
            torch.tensor(values, dtype=torch.float64, device="cpu")
            for values in (prices.hop, prices.tail)
        )
        self.size = len(self.hop)
        if prices.back_work:
            both = [a + b for a, b in zip(prices.work, prices.back_work, strict=True)]
            entry = [a + b for a, b in zip(prices.entry, prices.back_entry, strict=True)]
            self.ways = [
                _Way("forward", prices.work, prices.entry),
                _Way("backward", prices.back_work, prices.back_entry),
                _Way("both", both, entry),
            ]
        else:
            self.ways = [_Way("both", prices.work, prices.entry)]
        self.reach = torch.tensor(prices.reach, dtype=torch.long) if prices.reach else None
        last = prices.last_reach or prices.reach
        self.last_reach = torch.tensor(last, dtype=torch.long) if last else None

    def first(self, bounds: Bounds) -> tuple[int, float]:
        """Where a first stage ends at the latest, and the bound on both under which later."""
        reach = self.prices.first_reach
        furthest = allowed = self.size - 1 if reach is None else min(reach, self.size - 1)
        for way in self.ways:
            limit = way.limit(bounds)
            furthest = min(furthest, bisect_right(way.list, limit * (1 + _SLACK)) - 1)
        if furthest >= allowed:
            return furthest, math.inf
        return furthest, max(way.needs(bounds, way.list[furthest + 1]) for way in self.ways)

    def back(self, bounds: Bounds, end: int) -> tuple[int, float]:
        """Where a stage that ends at `end` or later begins at the earliest.

        The price of entry is taken to be the least one of all candidates, and memory to suffice.
        Also the bound on both under which it could begin earlier.
        """
        earliest = 0
        for way in self.ways:
            limit = way.limit(bounds)
            slack = _SLACK * (limit + way.list[end])
            begin = way.list[end] + way.least_entry - limit - slack
            earliest = max(earliest, bisect_left(way.list, begin))
        if earliest > end:  # the entry alone is too much
            needed = [way.needs(bounds, way.least_entry) for way in self.ways]
        elif earliest:
            needed = [
                way.needs(bounds, way.least_entry + (way.list[end] - way.list[earliest - 1]))
                for way in self.ways
            ]
        else:
            return 0, math.inf
        return earliest, max(needed)

    def ends(self, bounds: Bounds, begin: int, stop: int, *, last: bool) -> _Ends:
        """For every start from `begin` to before `stop`."""
        starts = torch.arange(begin, stop)
        end = starts.new_full((stop - begin,), self.size)
        reach = self.last_reach if last else self.reach
        if reach is not None:
            end = torch.minimum(end, reach[begin:stop] + 1)
        allowed = end
        for way in self.ways:
            limit = way.limit(bounds)
            if limit == math.inf:
                continue
            work, entry = way.work[begin:stop], way.entry[begin:stop]
            most = work + (limit - entry) + _SLACK * (limit + work)
            end = torch.minimum(end, torch.searchsorted(way.work, most, right=True))
        too_far = torch.maximum(end, starts + 1)
        needed = torch.where(too_far >= allowed, math.inf, 0.0).double()
        for way in self.ways:
            cost = way.entry[begin:stop] + (way.padded[too_far] - way.work[begin:stop])
            if way.name == "forward":
                needed[cost > bounds.forward * (1 + _SLACK)] = math.inf
            else:
                least = bounds.least if way.name == "backward" else 0.0
                needed = torch.maximum(needed, cost + least)
        return _Ends(end, needed)
