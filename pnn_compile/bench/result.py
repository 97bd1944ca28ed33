"""What a benchmark found, as plain data."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

__all__ = ["COPIES", "DIRECT", "SEQUENTIAL", "Bench", "Parts", "Timing"]

SEQUENTIAL = "sequential"
"""Name of the baseline: the original network on one rank."""
DIRECT = "direct"
"""The original network on one rank, its layers called by their functions as in the stages."""
COPIES = "copies"
"""The original network on every rank at once, each with the whole batch."""


@dataclass(frozen=True)
class Timing:
    """The steps of one contender at one batch size.

    Attributes:
        contender: Its name.
        batch: Samples of a step.
        seconds: Of every round, on the slowest rank; empty where it could not run.
        problem: Why it could not run, or nothing.
        sent: Bytes that all ranks together send in a step.
        choice: What was chosen for it by trying, in words, or nothing.
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
    """Seconds of the parts of one step, without what ranks wait for each other.

    Attributes:
        batch: Samples of the step.
        forward: Guesses and fine stages of every rank, which all ranks run at once.
        serial: What no two ranks do at once: corrections and the head, forward and backward.
        backward: Fine stages and guesses of every rank, backward, all ranks at once.
        optimizer: Of every rank.
    """

    batch: int
    forward: tuple[float, ...]
    serial: float
    backward: tuple[float, ...]
    optimizer: tuple[float, ...]

    @property
    def step(self) -> float:
        """Seconds of a step whose ranks disturb each other in no way and whose links are free.

        No rank runs its stage backward before the slowest has run forward: the head needs them all.
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
        device: What it ran on, in words.
        timings: One per contender and batch size.
        parts: One per batch size, timed in one process while the others rest.
        together: One per batch size where ranks compute on the CPU: what each rank took for its
            parts in the steps themselves, while the others computed too.
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
        """How many times as fast as another contender, round by round; nothing if one did not run.

        Args:
            timing: The contender.
            baseline: Name of the other one.
        """
        known = self._seconds(baseline, timing.batch)
        if not timing.seconds or not known:
            return ()
        return tuple(a / b for a, b in zip(known, timing.seconds, strict=True))

    def bound(self, batch: int, *, together: bool = False) -> float | None:
        """Speed-up that the measured parts allow; None where they were not measured.

        Args:
            batch: Samples of a step.
            together: Take the parts as timed in the steps of the parareal network.
        """
        baseline = self._seconds(SEQUENTIAL, batch)
        known = self.together if together else self.parts
        step = next((parts.step for parts in known if parts.batch == batch), None)
        return statistics.median(baseline) / step if baseline and step else None

    def machine(self, batch: int) -> float | None:
        """Work that the machine does at once, in ranks: less than `ranks` if they share memory."""
        timing = next((t for t in self.timings if (t.contender, t.batch) == (COPIES, batch)), None)
        ratios = self.ratios(timing) if timing else ()
        return self.ranks * statistics.median(ratios) if ratios else None

    def _seconds(self, contender: str, batch: int) -> tuple[float, ...]:
        return next(
            (t.seconds for t in self.timings if (t.contender, t.batch) == (contender, batch)), ()
        )
