"""Which device takes which stage, where their order is free.

Exact for few devices or few kinds of them: the dynamic programme of `passes.cheapest` over sets of
devices instead of stages,

    price[D][p] = min over k in D of hop_k[p] + min(price[D - k][p + 1 : end_k[p]]),

where D counts the devices left of every kind and price[{}] is the tail. Chains of processors with
unequal speeds are hard in general; where there are too many sets, orders are improved by swaps, and
the bound is that of a chain whose devices all pull their full weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from passes.cheapest import Bounds, Cheapest, Kind, Point, ranges
from passes.errors import PartitionError
from passes.partition import CutSolution, DoesNotFit, least_phases, search, solve
from passes.prices import CutProblem, Phases, Prices, phases, serial

__all__ = ["assign"]

_K = TypeVar("_K", bound=Hashable)

_MOST_SETS = 4000
"""Pairs of a set of devices and one of it that the exact search looks at, at most."""
_SWAPS = 40
_QUICK = 60
_CLOSE = 1e-3


def assign(
    listed: Sequence[_K],
    stages: int,
    problem: Callable[[Sequence[_K]], CutProblem],
    *,
    gap: float = 1e-6,
    evaluations: int = 200,
) -> CutSolution:
    """Choose the devices of the stages among those listed, and cut for them.

    Args:
        listed: Kinds of the devices at hand, each as often as there are such devices.
        stages: Number of stages; at most one per device.
        problem: The problem for an order of kinds. What a kind costs may depend on the one before
            it only by a dearer hop than from its like.
        gap: As of `solve`.
        evaluations: As of `solve`.

    Returns:
        The cuts and the kind that each stage runs on, with a bound over all orders; `exact` says
        whether all of them were searched.

    Raises:
        PartitionError: There are too few devices, or no order fits their memory.
    """
    if stages > len(listed):
        raise PartitionError(
            f"{stages} stages need a device each (devices={len(listed)}): list more devices, or "
            "ask for fewer stages"
        )
    counts: dict[_K, int] = {}
    for kind in listed:
        counts[kind] = counts.get(kind, 0) + 1
    alike = {kind: problem([kind] * stages).devices[-1] for kind in counts}
    if _sets(counts, stages) <= _MOST_SETS:
        programme = _Sets(alike, counts, stages)
        found = search(programme, programme.least(), gap=gap, evaluations=evaluations)
        order = programme.order(found.cuts)
        solution = solve(problem(order), gap=gap, evaluations=evaluations)
        return _ordered(solution, order, found.lower_bound, exact=True)
    order, solution = _swapped(listed, stages, problem)
    return _ordered(solution, order, _bound(alike, listed, stages), exact=False)


def _ordered(
    solution: CutSolution, order: Sequence[Any], bound: float, *, exact: bool
) -> CutSolution:
    """The solution for one order, with a bound over all orders."""
    return replace(
        solution, devices=tuple(order), lower_bound=min(solution.time, bound), exact=exact
    )


def _sets(counts: Mapping[_K, int], stages: int) -> int:
    sizes = [range(min(count, stages) + 1) for count in counts.values()]
    total = math.prod(len(size) for size in sizes)
    return total * len(counts)


class _Sets(Generic[_K]):
    """The cheapest partition under bounds, whatever the order of the devices."""

    def __init__(self, prices: Mapping[_K, Prices], counts: Mapping[_K, int], stages: int) -> None:
        self.names = list(counts)
        self.prices = [prices[name] for name in self.names]
        self.kinds = [Kind(each) for each in self.prices]
        self.counts = [counts[name] for name in self.names]
        self.stages = stages
        self.found: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}

    def least(self) -> Phases:
        """What no slowest stage is below."""
        every = [least_phases(CutProblem(devices=(each,) * self.stages)) for each in self.prices]
        return Phases(min(p.forward for p in every), min(p.backward for p in every))

    def order(self, cuts: tuple[int, ...]) -> list[_K]:
        """The devices of a partition that was found, by name."""
        return [self.names[kind] for kind in self.found[cuts][1]]

    def __call__(self, bounds: Bounds) -> Point:
        size = self.kinds[0].size
        following = math.inf
        inner: list[Tensor] = []
        outer: list[Tensor] = []
        firsts: list[int] = []
        for kind in self.kinds:
            for last, into in ((False, inner), (True, outer)):
                ends = kind.ends(bounds, 0, size, last=last)
                into.append(ends.end)
                following = min(following, float(ends.following.min()))
            furthest, after = kind.first(bounds)
            firsts.append(furthest)
            following = min(following, after)
        price: dict[tuple[int, ...], Tensor] = {}
        choice: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for used in self._vectors():
            rows = []
            for k, kind in enumerate(self.kinds):
                if not used[k]:
                    continue
                rest = _less(used, k)
                alone = not any(rest)
                behind = kind.tail if alone else price[rest]
                end = (outer if alone else inner)[k]
                rows.append((k, kind.hop + ranges(behind, 0, (0, size - 1), end)))
            choice[used] = rows
            price[used] = torch.stack([row for _, row in rows]).amin(dim=0)
        best = self._best(price, firsts)
        if best is None:
            return Point((), Phases(0.0, 0.0), math.inf, following)
        cuts, kinds = self._walk(*best, price, choice, inner, outer)
        problem = CutProblem(devices=tuple(self.prices[k] for k in kinds))
        point = Point(cuts, phases(problem, cuts), serial(problem, cuts), following)
        if cuts not in self.found or point.time < self.found[cuts][0]:
            self.found[cuts] = point.time, kinds
        return point

    def _vectors(self) -> list[tuple[int, ...]]:
        """Sets of devices by kind, of at most all stages but the first, the small ones first."""
        spans = [range(min(count, self.stages) + 1) for count in self.counts]
        found = [v for v in itertools.product(*spans) if 0 < sum(v) < self.stages]
        return sorted(found, key=sum)

    def _best(
        self, price: Mapping[tuple[int, ...], Tensor], firsts: Sequence[int]
    ) -> tuple[int, int, tuple[int, ...]] | None:
        """The first stage's kind and end, and the devices behind it, of the cheapest partition."""
        least, best = math.inf, None
        for k, furthest in enumerate(firsts):
            if furthest < 0:
                continue
            if self.stages == 1:
                rows = {(0,) * len(self.kinds): self.kinds[k].tail}
            else:
                rows = {
                    used: row
                    for used, row in price.items()
                    if sum(used) == self.stages - 1 and used[k] < self.counts[k]
                }
            for used, row in rows.items():
                place = int(row[: furthest + 1].argmin())
                if float(row[place]) < least:
                    least, best = float(row[place]), (k, place, used)
        return best

    def _walk(
        self,
        first: int,
        place: int,
        used: tuple[int, ...],
        price: Mapping[tuple[int, ...], Tensor],
        choice: Mapping[tuple[int, ...], list[tuple[int, Tensor]]],
        inner: Sequence[Tensor],
        outer: Sequence[Tensor],
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        cuts, kinds = [place], [first]
        while any(used):
            k = min(choice[used], key=lambda pair: float(pair[1][place]))[0]
            used = _less(used, k)
            alone = not any(used)
            behind, end = (
                self.kinds[k].tail if alone else price[used],
                (outer if alone else inner)[k],
            )
            start = place + 1
            place = start + int(behind[start : int(end[place])].argmin())
            cuts.append(place)
            kinds.append(k)
        return tuple(cuts), tuple(kinds)


def _less(used: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*used[:kind], used[kind] - 1, *used[kind + 1 :])


def _swapped(
    listed: Sequence[_K], stages: int, problem: Callable[[Sequence[_K]], CutProblem]
) -> tuple[list[_K], CutSolution]:
    """A good order: the listed one, the fastest first or last, improved by swaps."""
    alike = {kind: problem([kind] * stages).devices[-1] for kind in set(listed)}
    slowness = {kind: sum(_totals(prices)) for kind, prices in alike.items()}
    fastest = sorted(listed, key=lambda kind: slowness[kind])[:stages]
    best: tuple[list[_K], CutSolution] | None = None

    def attempt(order: list[_K]) -> None:
        nonlocal best
        try:
            found = solve(problem(order), gap=_CLOSE, evaluations=_QUICK)
        except DoesNotFit:
            return
        if best is None or found.time < best[1].time:
            best = order, found

    for order in (list(listed[:stages]), fastest, fastest[::-1]):
        attempt(order)
    if best is None:
        raise DoesNotFit("no order of the devices that was tried fits their memory")
    pairs = [
        (i, j)
        for distance in range(1, stages)
        for i in range(stages - distance)
        if best[0][i] != best[0][j := i + distance]
    ]
    for i, j in pairs[:_SWAPS]:
        order = list(best[0])
        order[i], order[j] = order[j], order[i]
        attempt(order)
    return best


def _totals(prices: Prices) -> list[float]:
    return [way[-1] for way in (prices.work, prices.back_work) if len(way)]


def _bound(alike: Mapping[_K, Prices], listed: Sequence[_K], stages: int) -> float:
    """No order takes less: every device as fast as on what it does best, and cheapest hops."""
    some = next(iter(alike.values()))
    last = next(i for i, price in enumerate(some.tail) if price < math.inf)
    makespan = 0.0
    for way in ("work", "back_work"):
        reference = getattr(some, way)
        if not len(reference):
            continue
        speeds = sorted((_speed(reference, getattr(alike[k], way)) for k in listed), reverse=True)
        makespan += reference[last] / sum(speeds[:stages])
    hops = [min(each.hop[p] for each in alike.values()) for p in range(len(some.hop))]
    tail = [min(each.tail[p] for each in alike.values()) for p in range(len(some.tail))]
    nothing = [0.0] * len(hops)
    free = CutProblem.alike(stages=stages, work=nothing, entry=nothing, hop=hops, tail=tail)
    return makespan + Cheapest(free)(Bounds(0.0, math.inf, math.inf)).serial


def _speed(reference: Sequence[float], own: Sequence[float]) -> float:
    """How many times as fast as the reference a device is, where it is best."""
    steps = zip(itertools.pairwise([0.0, *reference]), itertools.pairwise([0.0, *own]), strict=True)
    ratios = [(b - a) / (d - c) for (a, b), (c, d) in steps if d > c]
    return max(ratios, default=1.0)
