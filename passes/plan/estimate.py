"""The forecast of a plan: what its stages, guesses, corrections and links take in a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from passes.analysis.analysis import Analysis
from passes.coarse.spec import OperatorSpec
from passes.cost.device_profile import DeviceProfile
from passes.options import Options
from passes.partition.build_problem import transfer
from passes.partition.problem import Phases
from passes.plan.schema import Forecast, Head, Interface, Stage

__all__ = ["predict"]


def predict(
    analysis: Analysis,
    stages: Sequence[Stage],
    interfaces: Sequence[Interface],
    head: Head,
    options: Options,
    gap: float,
) -> Forecast:
    """Forecast a step by the step-time model, every stage on its device."""
    known = {device.name: device for device in options.devices}
    devices = [known.get(stage.device or "") for stage in stages]
    order = {node.name: i for i, node in enumerate(analysis.frontiers.order)}
    places = [_Place.of(analysis, device) for device in devices]
    fine = [
        place.cost(order[stage.first], order[stage.last] + 1)
        for place, stage in zip(places, stages, strict=True)
    ]
    guesses = [p.price(s.preprocess) for p, s in zip(places, stages, strict=True)]
    # In difference form a coarse network that is not linear is called twice, on one batch.
    calls = [
        2 if options.correction == "difference" and s.coarse and not s.coarse.linear else 1
        for s in stages
    ]
    hops = [
        sum(place.price(stage.coarse)) * count
        for place, stage, count in zip(places, stages, calls, strict=True)
    ]
    trips = 2 if analysis.backward else 1
    links = [
        trips * transfer(interfaces[j - 1].bytes, devices[j - 1], devices[j])
        for j in range(1, len(stages))
    ]
    # A collapsed sweep is one sum of maps that all devices apply at once, added up along a tree.
    sweep, link = sum(hops), sum(links)
    if options.sweep == "collapsed":
        sweep, link = max(hops), max(links, default=0.0) * math.ceil(math.log2(len(stages)))
    tail = math.fsum(places[-1].cost(order[stages[-1].last] + 1, len(order)))
    fastest = min({id(place): place for place in places}.values(), key=lambda p: p.total)
    slowest = _slowest(fine)
    rounds = min(options.iterations, len(stages))
    share = (fastest.total - tail) / len(fine)
    return Forecast.of(
        rounds,
        unit=analysis.unit,
        sequential=fastest.total,
        makespan=_slowest([_sum(*pair) for pair in zip(fine, guesses, strict=True)]),
        slowest=slowest,
        sweep=sweep + link,
        tail=tail,
        imbalance=slowest / share if share > 0 else 1.0,
        gap=gap,
        link=link,
    )


@dataclass(frozen=True)
class _Place:
    """A device: what nodes cost on it, and networks that are not in the program."""

    forward: Sequence[float]
    backward: Sequence[float]
    total: float
    scale: Phases
    timed: bool

    @classmethod
    def of(cls, analysis: Analysis, device: DeviceProfile | None) -> _Place:
        costs = analysis.on(device)
        found = [costs[node] for node in analysis.frontiers.order]
        total = sum(cost.cost for cost in found)
        back = sum(cost.backward for cost in found)
        flops = analysis.flops
        scale = Phases((total - back) / flops, back / flops) if flops else Phases(1.0, 0.0)
        timed = costs is analysis.costs  # networks that are not in the program were timed there
        ways = [c.forward for c in found], [c.backward for c in found]
        return cls(*ways, total, scale, timed)

    def cost(self, start: int, stop: int) -> Phases:
        """What a run of nodes costs."""
        return Phases(sum(self.forward[start:stop]), sum(self.backward[start:stop]))

    def price(self, spec: OperatorSpec | None) -> Phases:
        """What a guess or a correction costs: its own seconds, or else by its FLOPs."""
        if spec is not None and self.timed and spec.seconds is not None:
            back = spec.backward_seconds or 0.0
            return Phases(spec.seconds - back, back)
        flops = spec.flops if spec is not None else 0
        return Phases(flops * self.scale.forward, flops * self.scale.backward)


def _sum(one: Phases, other: Phases) -> Phases:
    return Phases(one.forward + other.forward, one.backward + other.backward)


def _slowest(costs: Sequence[Phases]) -> float:
    """The slowest stage each way: none goes back before all went forward."""
    return max(cost.forward for cost in costs) + max(cost.backward for cost in costs)
