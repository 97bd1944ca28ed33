"""The step-time model in closed form: the forecast of a plan, and its bottleneck.

A step of N stages and K iterations takes

    makespan + (K - 1) slowest + K sweep + head

where `makespan` is the slowest stage with its preprocessing operator, `slowest` the slowest fine
stage alone (of several windows, the sums of theirs), and `sweep` the coarse propagators and links
of one iteration. The objective of the partition (`passes.partition.problem`) is the same model for
K = 1. `passes.schedule.simulate` is the exact model, of which this is an upper bound, tight for
equal stages and one iteration:

- A chain is counted as makespan, then sweep. In the simulation the sweep already passes the first
  stages while a later, slower stage still computes. The difference is at most the sweep, and 0 if
  no stage is slower than the first one.
- K iterations are counted as K fine stages and K sweeps, one after another. In the simulation
  iteration k computes the stages k to N - K + k alone, preprocessing operators run in the first
  iteration only, and its sweep overlaps with the one before.
- A collapsed sweep is counted with the largest map and `ceil(log2(N))` links. In the simulation the
  tree has `floor(log2(N))` links on its longest path, but the largest map forward and the largest
  one backward may be those of two stages, and a map may wait for the message with its guess: up to
  one map and two links more than the closed form.

`tests/unit/schedule/test_step_time.py` checks these bounds on random costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from passes.analysis.analysis import Analysis
from passes.coarse.family import in_time
from passes.coarse.spec import OperatorSpec
from passes.cost.device_profile import DeviceProfile
from passes.options import Options
from passes.partition.problem import Phases
from passes.plan.schema import Forecast, Interface, Plan, Stage, windows_of

BOTTLENECKS = {
    "block": "the largest piece that cannot be cut",
    "imbalance": "stages that legal cuts leave unequal",
    "preprocessing": "the preprocessing operators",
    "coarse": "the coarse sweep",
    "link": "the links",
    "head": "the head, which one device computes alone",
    "bubble": "devices that wait for their first and last micro-batch",
    "none": "nothing but the number of devices",
}
"""What limits the speed-up, in words."""
_NEGLIGIBLE = 0.01
"""Share of an equal part of the original below which a loss counts as none."""


@dataclass(frozen=True)
class StepCosts:
    """Costs of the parts of a step.

    Attributes:
        fine: By stage.
        preprocess: Of the preprocessing operator, by stage; 0 for the first one.
        coarse: Of the coarse propagator, by stage, forward plus backward; 0 for the first one.
        links: Of the messages, by interface between two stages, forward plus backward.
        head: Forward plus backward.
    """

    fine: Sequence[Phases]
    preprocess: Sequence[Phases]
    coarse: Sequence[float]
    links: Sequence[float]
    head: float

    def forecast(
        self,
        sweep: str,
        iterations: int,
        *,
        unit: str,
        sequential: float,
        gap: float,
        windows: int = 1,
    ) -> Forecast:
        """Put the parts of a step together.

        Args:
            sweep: "chain", or "collapsed".
            iterations: K, at most the number of stages.
            unit: Unit of the costs.
            sequential: Cost of the original network.
            gap: Relative distance of the cut from the optimum.
            windows: Number of windows, one after another.
        """
        coarse, link = sum(self.coarse), sum(self.links)
        if sweep == "collapsed":
            # All devices apply their maps at once, and add the results up along a binary tree.
            depth = math.ceil(math.log2(len(self.fine)))
            coarse, link = max(self.coarse), max(self.links, default=0.0) * depth
        with_preprocess = [_sum(*pair) for pair in zip(self.fine, self.preprocess, strict=True)]
        windowed = windows_of(len(self.fine), windows)

        def slowest_of(parts: Sequence[Phases]) -> float:
            return sum(Phases.slowest([parts[j] for j in window]).makespan for window in windowed)

        slowest = slowest_of(self.fine)
        share = (sequential - self.head) / len(windowed[0])
        return Forecast.of(
            iterations,
            unit=unit,
            sequential=sequential,
            makespan=slowest_of(with_preprocess),
            slowest=slowest,
            sweep=coarse + link,
            tail=self.head,
            imbalance=slowest / share if share > 0 else 1.0,
            gap=gap,
            link=link,
        )


def forecast_step(
    analysis: Analysis,
    stages: Sequence[Stage],
    interfaces: Sequence[Interface],
    options: Options,
    gap: float,
) -> Forecast:
    """Forecast a step of a plan, every stage on its device.

    Args:
        analysis: Costs of the nodes.
        stages: The stages, with their operators.
        interfaces: Where the stages end.
        options: Options of the compilation: devices, sweep and iterations.
        gap: Relative distance of the cut from the optimum.
    """
    profiles = {device.name: device for device in options.devices}
    devices = [profiles.get(stage.device or "") for stage in stages]
    order = {node.name: i for i, node in enumerate(analysis.frontiers.order)}
    costs = [_DeviceCosts.of(analysis, device) for device in devices]
    phases = 2 if analysis.backward else 1
    # In difference form a coarse network that is not linear is called twice, on one batch; one that
    # predicts once in the sweep, and once before it.
    predicts = [s.coarse is not None and in_time(s.coarse.family) for s in stages]
    twice = options.correction == "difference"
    calls = [
        2 if twice and s.coarse and not s.coarse.linear and not p else 1
        for s, p in zip(stages, predicts, strict=True)
    ]
    step = StepCosts(
        fine=[
            device.nodes(order[stage.first], order[stage.last] + 1)
            for device, stage in zip(costs, stages, strict=True)
        ],
        preprocess=_entries(costs, stages),
        coarse=[
            sum(device.operator(stage.coarse)) * count
            for device, stage, count in zip(costs, stages, calls, strict=True)
        ],
        links=[
            phases * device.transfer(face.bytes, before, rank) if before and device else 0.0
            for rank, (face, before, device) in enumerate(
                zip(interfaces, devices, devices[1:], strict=False), 1
            )
        ],
        head=math.fsum(costs[-1].nodes(order[stages[-1].last] + 1, len(order))),
    )
    return step.forecast(
        options.sweep,
        min(options.count, len(stages)),
        unit=analysis.unit,
        sequential=min(device.total for device in costs),
        gap=gap,
        windows=options.windows,
    )


def _entries(costs: Sequence[_DeviceCosts], stages: Sequence[Stage]) -> list[Phases]:
    """Return the cost of what precedes every fine stage.

    That is its preprocessing operator. Coarse steps of a loop predict once more, and their guesses
    take as long as the sweep up to the stage, one step longer: only the rest delays anything.
    """
    entries, swept = [], Phases(0.0, 0.0)
    for device, stage in zip(costs, stages, strict=True):
        entry = device.operator(stage.preprocess)
        if stage.coarse is not None and in_time(stage.coarse.family):
            coarse = device.operator(stage.coarse)
            rest = (max(0.0, one - other) for one, other in zip(entry, swept, strict=True))
            entry, swept = _sum(Phases(*rest), coarse), _sum(swept, coarse)
        entries.append(entry)
    return entries


@dataclass(frozen=True)
class _DeviceCosts:
    """Costs on one device.

    Attributes:
        forward: Of every node.
        backward: Of every node.
        total: Of the whole program, forward plus backward.
        per_flop: Of a FLOP, averaged over the program.
        timed: Whether seconds of operators, which are not in the program, are those of this device.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    total: float
    per_flop: Phases
    timed: bool

    @classmethod
    def of(cls, analysis: Analysis, device: DeviceProfile | None) -> _DeviceCosts:
        by_node = analysis.on(device)
        costs = [by_node[node] for node in analysis.frontiers.order]
        total = sum(cost.cost for cost in costs)
        backward = sum(cost.backward for cost in costs)
        flops = analysis.flops
        per_flop = Phases((total - backward) / flops, backward / flops) if flops else Phases(1, 0)
        return cls(
            [c.forward for c in costs],
            [c.backward for c in costs],
            total,
            per_flop,
            by_node is analysis.costs,
        )

    def nodes(self, start: int, stop: int) -> Phases:
        """Return the cost of a run of nodes."""
        return Phases(sum(self.forward[start:stop]), sum(self.backward[start:stop]))

    def operator(self, spec: OperatorSpec | None) -> Phases:
        """Return the cost of an operator: its measured seconds, or else by its FLOPs."""
        if spec is not None and self.timed and spec.seconds is not None:
            backward = spec.backward_seconds or 0.0
            return Phases(spec.seconds - backward, backward)
        flops = spec.flops if spec is not None else 0
        return Phases(flops * self.per_flop.forward, flops * self.per_flop.backward)


def _sum(one: Phases, other: Phases) -> Phases:
    return Phases(one.forward + other.forward, one.backward + other.backward)


def find_bottleneck(parts: Mapping[str, float], sequential: float, count: int) -> str:
    """Find what costs most beyond an equal share of the original on every device.

    Args:
        parts: Costs of a step on `count` devices: "fine", "head", and any others.
        sequential: Cost of the original on one device.
        count: Number of devices.

    Returns:
        A key of `BOTTLENECKS`, or "fine" if a device computes more of the original than its share.

    >>> find_bottleneck({"fine": 25.0, "coarse": 3.0, "head": 0.0}, sequential=100.0, count=4)
    'coarse'
    >>> find_bottleneck({"fine": 30.0, "coarse": 3.0, "head": 0.0}, sequential=100.0, count=4)
    'fine'
    """
    losses = dict(parts)
    head = losses.get("head", 0.0)
    losses["head"] = head * (1 - 1 / count)
    losses["fine"] -= (sequential - head) / count
    worst = max(losses, key=lambda name: losses[name])
    return worst if losses[worst] > _NEGLIGIBLE * sequential / count else "none"


def slowest_is_block(analysis: Analysis, plan: Plan, cost: Callable[[fx.Node], float]) -> bool:
    """Return whether no legal cut lies inside the slowest fine stage of a plan."""
    order = analysis.frontiers.order
    index = {node.name: number for number, node in enumerate(order)}
    spans = [(index[stage.first], index[stage.last] + 1) for stage in plan.stages]
    start, stop = max(spans, key=lambda span: sum(map(cost, order[slice(*span)])))
    return not any(start < p.index < stop for p in analysis.frontiers.positions)
