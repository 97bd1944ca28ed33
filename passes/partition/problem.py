"""The problem of the balanced cut as pure numbers: what every position costs on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from passes.errors import PartitionError

__all__ = ["CutProblem", "Phases", "Prices", "makespan", "phases", "serial"]


class Phases(NamedTuple):
    """The slowest stage on the way forward and on the way back."""

    forward: float
    backward: float

    @property
    def makespan(self) -> float:
        """Both after each other: no stage goes back before the slowest went forward."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What P candidate positions, in topological order, cost on one device.

    All sequences have length P and share one unit (seconds or FLOPs). The first stage begins at
    the beginning of the graph, where work and entry are 0; a later stage begins at its interface.

    Attributes:
        work: Cost of all nodes before the candidate; non-decreasing, not negative. Of the way
            forward alone where `back_work` is given.
        entry: Cost of the preprocessing operator (C) of a stage that begins at the candidate.
        hop: Serial price of an interface at the candidate, in front of a stage on this device:
            coarse propagator (F) and link.
        tail: Serial price if the last stage ends at the candidate: coarse propagator into that
            state and the head (h) behind it; ``inf`` where the last stage may not end.
        back_work: As `work`, of the way back. Empty where the two ways are one phase: of all
            stages forward alone, or of each stage forward and backward at a stretch.
        back_entry: As `entry`, of the way back; as long as `back_work`.
        reach: Last candidate at which a stage that begins at the candidate may end, for the
            memory of the device; empty: any.
        first_reach: The same of a first stage; None: any.
        last_reach: The same as `reach`, of a last stage, whose device holds the head too; empty:
            as `reach`.
    """

    work: Sequence[float]
    entry: Sequence[float]
    hop: Sequence[float]
    tail: Sequence[float]
    back_work: Sequence[float] = ()
    back_entry: Sequence[float] = ()
    reach: Sequence[int] = ()
    first_reach: int | None = None
    last_reach: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        names = ["work", "entry", "hop", "tail"]
        if len(self.back_work) or len(self.back_entry):
            names += ["back_work", "back_entry"]
        names += [name for name in ("reach", "last_reach") if len(getattr(self, name))]
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1:
            raise PartitionError(f"the price sequences differ in length ({lengths})")
        for name in names:
            if not name.endswith("reach"):
                _check_prices(name, getattr(self, name))
        for name in ("work", "back_work"):
            work = getattr(self, name)
            for i in range(1, len(work)):
                if work[i] < work[i - 1]:
                    raise PartitionError(
                        f"{name} must not decrease along the topological order "
                        f"({name}[{i - 1}]={work[i - 1]:g}, {name}[{i}]={work[i]:g})"
                    )

    def cost(self, begin: int | None, end: int) -> Phases:
        """Cost of a stage from one candidate, or from the beginning, to another."""
        found = [0.0, 0.0]
        ways = ((self.work, self.entry), (self.back_work, self.back_entry))
        for way, (work, entry) in enumerate(ways):
            if work:
                found[way] = (
                    work[end] if begin is None else entry[begin] + (work[end] - work[begin])
                )
        return Phases(*found)

    def fits(self, begin: int | None, end: int, *, last: bool) -> bool:
        """Whether the device has the memory for such a stage."""
        if begin is None:
            return self.first_reach is None or end <= self.first_reach
        reach = self.last_reach if last and self.last_reach else self.reach
        return not reach or end <= reach[begin]


def _check_prices(name: str, prices: Sequence[float]) -> None:
    for i, price in enumerate(prices):
        if not price >= 0 or (price == math.inf and name != "tail"):
            allowed = "not negative" if name == "tail" else "finite and not negative"
            raise PartitionError(f"every {name} price must be {allowed} ({name}[{i}]={price})")


@dataclass(frozen=True, kw_only=True)
class CutProblem:
    """State what every device costs, one device a stage.

    Attributes:
        devices: Prices by stage, in order; devices that are alike may be one object.

    Raises:
        PartitionError: The devices do not fit together, or no N candidates can be the cuts.
    """

    devices: tuple[Prices, ...]

    @classmethod
    def alike(cls, *, stages: int, **prices: Any) -> CutProblem:
        """The problem of `stages` devices of the same prices, which are those of `Prices`."""
        return cls(devices=(Prices(**prices),) * stages)

    def __post_init__(self) -> None:
        """Check that there may be a solution."""
        if not self.devices:
            raise PartitionError("a partition needs at least one stage (stages=0)")
        if len({(len(d.work), bool(d.back_work)) for d in self.devices}) > 1:
            raise PartitionError(
                "every device needs prices of the same candidates and phases (candidates="
                f"{[len(d.work) for d in self.devices]}, phases="
                f"{[1 + bool(d.back_work) for d in self.devices]})"
            )
        if self.candidates < self.stages:
            raise PartitionError(
                f"too few positions to cut at (candidates={self.candidates}, "
                f"stages={self.stages}); ask for at most {self.candidates} stages, or allow "
                "larger states at the interfaces"
            )
        tail = self.devices[-1].tail
        last = max((i for i, price in enumerate(tail) if price < math.inf), default=-1)
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


def phases(problem: CutProblem, cuts: Sequence[int]) -> Phases:
    """Return the slowest stage of a partition each way, max_j(t(C_j) + t(g_j))."""
    costs = [
        device.cost(begin, end)
        for device, (begin, end) in zip(problem.devices, pairwise([None, *cuts]), strict=True)
        if end is not None
    ]
    return Phases(max(c.forward for c in costs), max(c.backward for c in costs))


def makespan(problem: CutProblem, cuts: Sequence[int]) -> float:
    """Return the cost of the slowest stage forward and of the slowest stage backward.

    >>> four_layers = {"work": [2, 3, 5, 6], "entry": [1] * 4, "hop": [0.5] * 4, "tail": [0] * 4}
    >>> problem = CutProblem.alike(stages=2, **four_layers)
    >>> makespan(problem, (1, 3))  # the first stage costs 3, the second 3 and a guess that costs 1
    4.0
    >>> makespan(problem, (0, 3))
    5.0
    """
    return phases(problem, cuts).makespan


def serial(problem: CutProblem, cuts: Sequence[int]) -> float:
    """Return the price of the serial sweep, sum_j(t(F_j) + link) + t(h), of a partition.

    >>> prices = {"work": [1, 2, 3], "entry": [0] * 3, "hop": [0.5, 0.25, 0], "tail": [9, 9, 1]}
    >>> serial(CutProblem.alike(stages=2, **prices), (1, 2))  # one hop, and the head
    1.25
    """
    hops = (d.hop[c] for d, c in zip(problem.devices[1:], cuts[:-1], strict=True))
    return math.fsum([*hops, problem.devices[-1].tail[cuts[-1]]])
