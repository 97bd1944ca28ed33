"""The balanced-cut problem as pure numbers: what every position costs on every device.

A partition is a list of cuts `c_1 < ... < c_N`, one candidate position per stage: stage 1 runs from
the beginning to `c_1`, stage j from `c_{j-1}` to `c_j`, and the head follows `c_N`. Here two stages
and five candidates, cut at (2, 4):

    candidate        0     1     2     3     4
    work             2     4     5     8    10      cost of all nodes before the candidate
    entry            1     1     1     1     1      cost of a preprocessing operator
    hop              1     3     2     1     9      cost of the coarse propagator and the link
    tail           inf   inf   inf   inf     0      cost of the head
                   [--- stage 1 ---][ stage 2 ]

    stage 1   5             work[2]
    stage 2   1 + 10 - 5    entry[2] + work[4] - work[2]
    makespan  6             the slowest stage; all of them run at once
    serial    2 + 0         hop[2] + tail[4]; the sweep visits one stage after another

A training step has two phases, forward and backward, with the head between them: the makespan is
then the slowest forward plus the slowest backward, which may be those of two different stages.

>>> problem = CutProblem.uniform(
...     stages=2,
...     work=[2, 4, 5, 8, 10],
...     entry=[1] * 5,
...     hop=[1, 3, 2, 1, 9],
...     tail=[math.inf] * 4 + [0],
... )
>>> makespan(problem, (2, 4)), serial(problem, (2, 4))
(6.0, 2.0)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from passes.errors import PartitionError


class Phases(NamedTuple):
    """Costs of the forward and of the backward phase, of one stage or of the slowest stages."""

    forward: float
    backward: float

    @property
    def makespan(self) -> float:
        """Sum of both: no stage starts its backward before the slowest forward is done."""
        return self.forward + self.backward

    @classmethod
    def slowest(cls, costs: Iterable[Phases]) -> Phases:
        """Return the slowest forward and the slowest backward, maybe of two stages."""
        return cls(*map(max, zip(*costs, strict=True)))


@dataclass(frozen=True, kw_only=True)
class PositionCosts:
    """Costs of P candidate positions, in topological order, on one device.

    All sequences have length P and share one unit (seconds or FLOPs). The first stage begins at
    the beginning of the graph, where work and entry are 0; a later stage begins at its interface.

    Attributes:
        work: Cost of all nodes before the candidate; non-decreasing, not negative. Forward alone
            if `backward_work` is set.
        entry: Cost of the preprocessing operator (C) of a stage that begins at the candidate.
        hop: Serial cost of an interface at the candidate, in front of a stage on this device:
            coarse propagator (F) and link.
        tail: Serial cost if the last stage ends at the candidate: coarse propagator into that
            state and the head (h) after it; `inf` where the last stage may not end.
        backward_work: Same as `work`, backward. Empty if the makespan has one phase: inference, or
            costs that sum forward and backward of a node.
        backward_entry: Same as `entry`, backward; as long as `backward_work`.
        reach: Last candidate at which a stage that begins at the candidate may end, by the memory
            of the device; empty means no limit.
        first_reach: Last candidate at which the first stage may end; None means no limit.
        last_reach: Same as `reach` for the last stage, whose device stores the head too; empty
            means `reach`.

    Raises:
        PartitionError: The sequences differ in length, or a cost is out of range.
    """

    work: Sequence[float]
    entry: Sequence[float]
    hop: Sequence[float]
    tail: Sequence[float]
    backward_work: Sequence[float] = ()
    backward_entry: Sequence[float] = ()
    reach: Sequence[int] = ()
    first_reach: int | None = None
    last_reach: Sequence[int] = ()

    def __post_init__(self) -> None:
        names = ["work", "entry", "hop", "tail"]
        if len(self.backward_work) or len(self.backward_entry):
            names += ["backward_work", "backward_entry"]
        names += [name for name in ("reach", "last_reach") if len(getattr(self, name))]
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1:
            raise PartitionError(f"the cost sequences differ in length ({lengths})")
        for name in names:
            if not name.endswith("reach"):
                _check_costs(name, getattr(self, name))
        for name in ("work", "backward_work"):
            work = getattr(self, name)
            for i in range(1, len(work)):
                if work[i] < work[i - 1]:
                    raise PartitionError(
                        f"{name} must not decrease along the topological order "
                        f"({name}[{i - 1}]={work[i - 1]:g}, {name}[{i}]={work[i]:g})"
                    )

    def stage_cost(self, begin: int | None, end: int) -> Phases:
        """Return the cost of a stage between two candidates; `begin=None` is the first stage."""

        def cost(work: Sequence[float], entry: Sequence[float]) -> float:
            if not work:
                return 0.0
            return work[end] if begin is None else entry[begin] + (work[end] - work[begin])

        return Phases(cost(self.work, self.entry), cost(self.backward_work, self.backward_entry))

    def fits(self, begin: int | None, end: int, *, last: bool) -> bool:
        """Return whether the memory of the device holds such a stage."""
        if begin is None:
            return self.first_reach is None or end <= self.first_reach
        reach = self.last_reach if last and self.last_reach else self.reach
        return not reach or end <= reach[begin]


def _check_costs(name: str, costs: Sequence[float]) -> None:
    for i, cost in enumerate(costs):
        if not cost >= 0 or (cost == math.inf and name != "tail"):
            allowed = "not negative" if name == "tail" else "finite and not negative"
            raise PartitionError(f"every {name} cost must be {allowed} ({name}[{i}]={cost})")


@dataclass(frozen=True, kw_only=True)
class CutProblem:
    """The costs of all candidates on all devices; stage j runs on device j.

    Attributes:
        devices: Costs by stage, in order; equal devices may be one object.

    Raises:
        PartitionError: The devices disagree on the candidates, or no N candidates can be the cuts.
    """

    devices: tuple[PositionCosts, ...]

    @classmethod
    def uniform(cls, *, stages: int, **costs: Any) -> CutProblem:
        """Build the problem of `stages` equal devices; `costs` are fields of `PositionCosts`."""
        return cls(devices=(PositionCosts(**costs),) * stages)

    def __post_init__(self) -> None:
        if not self.devices:
            raise PartitionError("a partition needs at least one stage (stages=0)")
        if len({(len(d.work), bool(d.backward_work)) for d in self.devices}) > 1:
            raise PartitionError(
                "every device needs costs of the same candidates and phases (candidates="
                f"{[len(d.work) for d in self.devices]}, phases="
                f"{[1 + bool(d.backward_work) for d in self.devices]})"
            )
        if self.candidates < self.stages:
            raise PartitionError(
                f"too few positions to cut at (candidates={self.candidates}, "
                f"stages={self.stages}); ask for at most {self.candidates} stages, or allow "
                "larger states at the interfaces"
            )
        tail = self.devices[-1].tail
        last = max((i for i, cost in enumerate(tail) if cost < math.inf), default=-1)
        if last + 1 < self.stages:
            raise PartitionError(
                f"the last stage cannot end late enough (candidates={self.candidates}, of which "
                f"{last + 1} up to the last allowed end, stages={self.stages}); "
                f"ask for at most {last + 1} stages, or allow the head to begin later"
            )

    @property
    def stages(self) -> int:
        """Number of stages, N."""
        return len(self.devices)

    @property
    def candidates(self) -> int:
        """Number of candidate positions, P."""
        return len(self.devices[0].work)

    def stage_costs(self, cuts: Sequence[int]) -> list[Phases]:
        """Return the cost of every stage of a partition."""
        spans = pairwise([None, *cuts])
        return [
            device.stage_cost(begin, end)
            for device, (begin, end) in zip(self.devices, spans, strict=True)
            if end is not None
        ]


def slowest_phases(problem: CutProblem, cuts: Sequence[int]) -> Phases:
    """Return the slowest stage of a partition in each phase, max_j(t(C_j) + t(g_j))."""
    return Phases.slowest(problem.stage_costs(cuts))


def makespan(problem: CutProblem, cuts: Sequence[int]) -> float:
    """Return the slowest forward plus the slowest backward of a partition.

    >>> costs = {"work": [2, 3, 5, 6], "entry": [1] * 4, "hop": [0.5] * 4, "tail": [0] * 4}
    >>> problem = CutProblem.uniform(stages=2, **costs)
    >>> makespan(problem, (1, 3))  # stage 1 costs 3; stage 2 costs 3 and its preprocessing 1
    4.0
    >>> makespan(problem, (0, 3))
    5.0
    """
    return slowest_phases(problem, cuts).makespan


def serial(problem: CutProblem, cuts: Sequence[int]) -> float:
    """Return the cost of the serial sweep of a partition, sum_j(t(F_j) + link) + t(h).

    >>> costs = {"work": [1, 2, 3], "entry": [0] * 3, "hop": [0.5, 0.25, 0], "tail": [9, 9, 1]}
    >>> serial(CutProblem.uniform(stages=2, **costs), (1, 2))  # one interface, and the head
    1.25
    """
    hops = (d.hop[c] for d, c in zip(problem.devices[1:], cuts[:-1], strict=True))
    return math.fsum([*hops, problem.devices[-1].tail[cuts[-1]]])
