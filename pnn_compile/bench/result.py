"""Results of a benchmark, as plain data."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

SEQUENTIAL = "sequential"
"""The baseline: the original network on one rank."""
DIRECT = "direct"
"""The original network on one rank, its layers called directly, as in the stages."""
COPIES = "copies"
"""The original network on every rank at once, each with the whole batch."""


@dataclass(frozen=True)
class Timing:
    """The steps of one contender at one batch size.

    Attributes:
        contender: Its name.
        batch: Samples of a step.
        seconds: Of every round, on the slowest rank; empty where it could not run.
        problem: Why it could not run; "" if it ran.
        sent: Bytes that all ranks together send in a step.
        choice: Option that was chosen for it by trial, in words; "" if none.
    """

    contender: str
    batch: int
    seconds: tuple[float, ...]
    problem: str = ""
    sent: int = 0
    choice: str = ""

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of one step, without waiting of ranks for each other.

    Attributes:
        batch: Samples of the step.
        forward: Preprocessing and fine stages of every rank, which all ranks run at once.
        serial: What no two ranks do at once: corrections and the head, forward and backward.
        backward: The same backward.
        optimizer: Of every rank.
    """

    batch: int
    forward: tuple[float, ...]
    serial: float
    backward: tuple[float, ...]
    optimizer: tuple[float, ...]

    @property
    def step(self) -> float:
        """Seconds of a step if ranks do not disturb each other and links are free.

        No rank starts backward before the slowest has finished forward: the head needs them all.
        """
        after = [a + b for a, b in zip(self.backward, self.optimizer, strict=True)]
        return max(self.forward) + self.serial + max(after)


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        model: Name of the model.
        training: Whether a step is a training step: forward, backward and optimizer.
        ranks: Number of processes.
        stages: Number of stages of the parareal network.
        threads: Threads of each process.
        device: Name of the device.
        timings: One per contender and batch size.
        parts: One per batch size, timed in one process while the others are idle.
        together: One per batch size where ranks compute on the CPU: parts timed in the steps
            themselves, while the other ranks compute too.
    """

    model: str
    training: bool
    ranks: int
    stages: int
    threads: int
    device: str
    timings: tuple[Timing, ...]
    parts: tuple[Parts, ...]
    together: tuple[Parts, ...]

    def ratios(self, timing: Timing, baseline: str = SEQUENTIAL) -> tuple[float, ...]:
        """Return the speed-up over another contender, round by round; empty if one did not run.

        Args:
            timing: The contender.
            baseline: Name of the other one.
        """
        seconds = self._seconds(baseline, timing.batch)
        if not timing.seconds or not seconds:
            return ()
        return tuple(a / b for a, b in zip(seconds, timing.seconds, strict=True))

    def bound(self, batch: int, *, together: bool = False) -> float | None:
        """Return the speed-up that the measured parts allow; None where they were not measured.

        Args:
            batch: Samples of a step.
            together: Whether to take the parts timed in the steps of the parareal network.
        """
        baseline = self._seconds(SEQUENTIAL, batch)
        measured = self.together if together else self.parts
        step = next((parts.step for parts in measured if parts.batch == batch), None)
        return statistics.median(baseline) / step if baseline and step else None

    def machine(self, batch: int) -> float | None:
        """Return the throughput of all ranks, in ranks: less than `ranks` if they share memory."""
        timing = next((t for t in self.timings if (t.contender, t.batch) == (COPIES, batch)), None)
        ratios = self.ratios(timing) if timing else ()
        return self.ranks * statistics.median(ratios) if ratios else None

    def _seconds(self, contender: str, batch: int) -> tuple[float, ...]:
        return next(
            (t.seconds for t in self.timings if (t.contender, t.batch) == (contender, batch)), ()
        )
