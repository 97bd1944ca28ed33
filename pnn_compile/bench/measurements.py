"""Measurements of a benchmark as plain data, and the instruments that time the parts of a step.

The parts of a step, without waiting, bound what ranks can reach:

    step >= max(forward) + serial + max(backward + optimizer)

`forward` and `backward` are by rank and run at the same time; `serial` is what no two ranks do at
once, the corrections and the head.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from passes.ir.program import tensor_leaves
from passes.schedule.instruction import Kind
from pnn_compile.inputs import batch_size
from pnn_compile.runtime.engine import run_in_one_process
from pnn_compile.runtime.rank_pieces import PieceOptions, RankPieces

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

SEQUENTIAL = "sequential"
"""The baseline: the original network on one rank."""
DIRECT = "direct"
"""The original network on one rank, its layers called directly, as in the stages."""
COPIES = "copies"
"""The original network on every rank at once, each with the whole batch."""

_FORWARD: tuple[Kind, ...] = (Kind.GUESS, Kind.FINE, Kind.PREDICT)
_SERIAL: tuple[Kind, ...] = (Kind.HEAD, Kind.HEAD_BACKWARD)
_BACKWARD: tuple[Kind, ...] = (Kind.FINE_BACKWARD, Kind.GUESS_BACKWARD)


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


def turns(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """Yield the order of the contenders in every round: each round starts with the next one.

    >>> [*turns("abc", 2)]
    [['a', 'b', 'c'], ['b', 'c', 'a']]
    """
    order = [*names]
    for _ in range(rounds):
        yield order
        order = [*order[1:], *order[:1]]


def mean_square(outputs: Any, _: object = None) -> torch.Tensor:
    """Compute a loss of any outputs: the mean square, averaged over the floating-point tensors."""
    floating = [x for x in tensor_leaves(outputs) if x.is_floating_point()]
    return torch.stack([x.float().square().mean() for x in floating]).mean()


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer | None:
    """Return SGD with momentum at learning rate 0: a thousand steps leave the weights unchanged."""
    parameters = [*module.parameters()]
    if not parameters:
        return None
    fused = all(parameter.is_floating_point() for parameter in parameters)
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=fused)


class PartsTimer:
    """Run the instruction lists of all ranks in this process, and time the instructions.

    Args:
        compiled: The network.
        inputs: One batch, by argument name.
        placement: Rank of every stage.
        training: Whether a step trains.
    """

    def __init__(
        self, compiled: Compiled, inputs: dict[str, Any], placement: Sequence[int], training: bool
    ) -> None:
        self._compiled = compiled
        self._inputs = [inputs]
        self._training = training
        self._ranks = [
            RankPieces(compiled, placement, rank).train(training)
            for rank in range(max(placement) + 1)
        ]
        for pieces in self._ranks:
            PieceOptions().apply(pieces)
        self._optimizers = [optimizer_of(pieces) for pieces in self._ranks]

    def __call__(self) -> Parts:
        """Run one step and return the seconds of its parts."""
        seconds = self.instructions()
        optimizers = [self._optimizer_seconds(optimizer) for optimizer in self._optimizers]
        self._zero_grad()
        ranks = [*map(RankParts, seconds, optimizers)]
        return parts_of(batch_size(self._inputs[0]), self._compiled.plan.sweep, ranks)

    def instructions(self) -> tuple[Mapping[Kind, float], ...]:
        """Run one step without the optimizers; return seconds by rank and instruction kind."""
        self._zero_grad()
        loss = mean_square if self._training else None
        with torch.set_grad_enabled(self._training):
            engines = run_in_one_process(
                self._compiled, self._ranks, self._inputs, loss, synchronize=True
            )
        return tuple(engine.seconds for engine in engines)

    def _zero_grad(self) -> None:
        for pieces in self._ranks:
            pieces.zero_grad(set_to_none=True)

    def _optimizer_seconds(self, optimizer: torch.optim.Optimizer | None) -> float:
        if optimizer is None or not self._training:
            return 0.0
        start = time.perf_counter()
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


class RankParts(NamedTuple):
    """Seconds of one rank in a step: by instruction kind, and of its optimizer."""

    seconds: Mapping[Kind, float]
    optimizer: float


def median_rank(steps: Sequence[RankParts]) -> RankParts:
    """Return the median over several steps of every part of a rank."""
    kinds = steps[0].seconds
    seconds = {kind: statistics.median(step.seconds[kind] for step in steps) for kind in kinds}
    return RankParts(seconds, statistics.median(step.optimizer for step in steps))


def parts_of(batch: int, sweep: str, ranks: Sequence[RankParts]) -> Parts:
    """Sum the seconds of instructions into the parts of a step.

    Args:
        batch: Samples of the step.
        sweep: "chain" or "collapsed"; a collapsed sweep computes its corrections in parallel.
        ranks: Seconds of every rank.
    """
    forward, serial, backward = _FORWARD, _SERIAL, _BACKWARD
    if sweep == "collapsed":
        forward, backward = (*forward, Kind.CORRECT), (*backward, Kind.COARSE_BACKWARD)
    else:
        serial = (*serial, Kind.CORRECT, Kind.COARSE_BACKWARD)
    return Parts(
        batch,
        tuple(sum(rank.seconds[kind] for kind in forward) for rank in ranks),
        sum(rank.seconds[kind] for rank in ranks for kind in serial),
        tuple(sum(rank.seconds[kind] for kind in backward) for rank in ranks),
        tuple(rank.optimizer for rank in ranks),
    )


def median_parts(steps: Sequence[Parts]) -> Parts:
    """Return the median of every part over several steps."""
    return Parts(
        steps[0].batch,
        _medians([parts.forward for parts in steps]),
        statistics.median(parts.serial for parts in steps),
        _medians([parts.backward for parts in steps]),
        _medians([parts.optimizer for parts in steps]),
    )


def _medians(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(statistics.median(column) for column in zip(*rows, strict=True))
