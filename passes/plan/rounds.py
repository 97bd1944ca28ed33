"""The step-time model: what K iterations take, from what the parts of the network cost."""

from __future__ import annotations

from dataclasses import dataclass

from passes.plan.schema import Forecast, Plan

__all__ = ["Work"]


@dataclass(frozen=True)
class Work:
    """What the parts of a parareal network cost, each once.

    Attributes:
        total: The original network.
        makespan: Slowest stage, its preprocessing included.
        slowest: Slowest fine stage.
        sweep: One coarse sweep, links included.
        tail: The head.
    """

    total: float
    makespan: float
    slowest: float
    sweep: float
    tail: float

    def forecast(
        self, rounds: int, *, unit: str, imbalance: float, gap: float, link: float = 0.0
    ) -> Forecast:
        """Forecast `rounds` iterations; the guesses are made in the first one only."""
        serial = rounds * self.sweep + self.tail
        time = self.makespan + (rounds - 1) * self.slowest + serial
        free = rounds * self.slowest + self.tail
        return Forecast(
            unit=unit,
            sequential=self.total,
            makespan=self.makespan,
            serial=serial,
            time=time,
            speedup=self.total / time if time else 1.0,
            bound=self.total / free if self.slowest else 1.0,
            imbalance=imbalance,
            serial_share=serial / self.total if self.total else 0.0,
            gap=gap,
            link=link,
        )

    @classmethod
    def of(cls, plan: Plan) -> Work:
        """Take the forecast of a plan apart again."""
        known, count = plan.forecast, len(plan.stages)
        rounds = min(plan.iterations, count)
        free = known.sequential / known.bound  # rounds * slowest + tail
        if rounds > 1:
            slowest = (known.time - known.makespan - known.serial) / (rounds - 1)
        elif known.imbalance < count:
            # With it, the imbalance, which is slowest * count / (sequential - tail).
            slowest = known.imbalance * (known.sequential - free) / (count - known.imbalance)
        else:
            slowest = free  # one stage has all the cost
        tail = free - rounds * slowest
        return cls(
            total=known.sequential,
            makespan=known.makespan,
            slowest=slowest,
            sweep=(known.serial - tail) / rounds,
            tail=tail,
        )

    @classmethod
    def forecasts(cls, plan: Plan, most: int) -> tuple[Forecast, ...]:
        """Forecast a plan at 1 to `most` iterations, with everything else as it is."""
        work, known = cls.of(plan), plan.forecast
        link = known.link / min(plan.iterations, len(plan.stages))
        return tuple(
            work.forecast(
                k, unit=known.unit, imbalance=known.imbalance, gap=known.gap, link=k * link
            )
            for k in range(1, most + 1)
        )
