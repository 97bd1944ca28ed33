"""The forecast as plain data, and its conclusion: at how many devices more do not pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from passes.plan.estimate import BOTTLENECKS

PARAREAL = ("chain", "collapsed")
"""Methods that are parareal networks, by the sweep of the corrections."""
_NEAR_BEST = 1.05
"""More devices do not pay if they make a step faster by at most this factor."""


@dataclass(frozen=True)
class ForecastRow:
    """One method to run one step on N devices.

    Attributes:
        stages: Number N of devices, one stage each.
        method: "chain" or "collapsed" (parareal networks, by sweep), "gpipe:M" (the original as a
            pipeline of M micro-batches) or "ddp" (the original on shares of the batch).
        time: Of the step, in the unit of the table, simulated from the instruction lists that the
            ranks run.
        speedup: Time of the original on one device, over `time`.
        bound: Speed-up if preprocessing, coarse propagators and links took no time; of other
            methods, if links took none.
        efficiency: `speedup / stages`.
        memory: Bytes that every device needs, in the order of the stages.
        link_bytes: Bytes that cross links in one step, all links together.
        parts: `time` split along its critical path: "fine", "preprocessing", "coarse", "head",
            "link" and, of a pipeline, "bubble". They sum to it.
        limit: The largest limit of the speed-up, a key of `passes.plan.estimate.BOTTLENECKS`.
    """

    stages: int
    method: str
    time: float
    speedup: float
    bound: float
    efficiency: float
    memory: tuple[float, ...]
    link_bytes: float
    parts: Mapping[str, float]
    limit: str

    @property
    def most_memory(self) -> float:
        """Bytes of the device that needs most."""
        return max(self.memory)


@dataclass(frozen=True)
class ForecastTable:
    """A forecast of one model over numbers of devices.

    Attributes:
        model: Class name of the model.
        cost: Source of the costs of nodes: "flops", "roofline", "measured".
        unit: Of every time: "seconds" or "FLOPs".
        training: Whether a step trains (forward and backward), else the forward pass alone.
        batch: Samples of a step.
        devices: Names of the device profiles; empty where none were given, and links are free.
        sequential: Time of the original network on one device.
        rows: By method, then by number of stages.
        problems: Why some rows are missing, a sentence each.
        notes: Remarks on the figures, a sentence each.
        windows: Windows of the parareal networks.
    """

    model: str
    cost: str
    unit: str
    training: bool
    batch: int
    devices: tuple[str, ...]
    sequential: float
    rows: tuple[ForecastRow, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    windows: int = 1

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that have rows, in order."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def of(self, method: str) -> tuple[ForecastRow, ...]:
        """Return the rows of a method, by number of stages."""
        return tuple(row for row in self.rows if row.method == method)

    def enough(self, method: str) -> ForecastRow:
        """Return the row of fewest devices whose time is within 5 % of the method's best one."""
        rows = self.of(method)
        best = min(row.time for row in rows)
        return next(row for row in rows if row.time <= _NEAR_BEST * best)

    @property
    def best(self) -> ForecastRow:
        """Of the parareal networks, the row to take: the faster method, with enough devices."""
        rows = [self.enough(method) for method in self.methods if method in PARAREAL]
        return min(rows, key=lambda row: row.time)

    @property
    def verdict(self) -> str:
        """At how many devices more do not pay, and why, in one sentence."""
        if not set(self.methods) & set(PARAREAL):
            return f"{self.model} cannot be forecast at any of these numbers of devices"
        row = self.best
        others = self.of(row.method)
        after = next((other for other in others if other.stages >= 2 * row.stages), others[-1])
        why = BOTTLENECKS[after.limit]
        if row.speedup < _NEAR_BEST:
            return (
                f"splitting {self.model} does not pay: {row.stages} devices give "
                f"{row.speedup:.2f} times the speed of one, held back by {BOTTLENECKS[row.limit]}"
            )
        gain = f"{row.speedup:.2f} times the speed of one with the {row.method} sweep"
        if row is others[-1]:
            return (
                f"devices pay up to the {row.stages} looked at, which give {gain}; what holds back "
                f"most there is {why}"
            )
        at = f" at {after.stages}" if after is not row else ""
        return (
            f"more than {row.stages} devices do not pay: these give {gain}, and what holds back "
            f"more{at} is {why}"
        )

    def as_data(self) -> dict[str, Any]:
        """Return all fields as plain data for JSON, with the verdict and the best row."""
        data = dataclasses.asdict(self)
        data["verdict"] = self.verdict
        if set(self.methods) & set(PARAREAL):
            data["best"] = {"stages": self.best.stages, "method": self.best.method}
        return data
