"""Times the parts of a step in a process, to know what the ranks could reach at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from passes.schedule.instruction import Kind
from pnn_compile.bench.result import Parts
from pnn_compile.bench.setting import mean_square, optimizer_of
from pnn_compile.inputs import batch_size
from pnn_compile.runtime.engine import run_in_one_process
from pnn_compile.runtime.rank_pieces import PieceOptions, RankPieces

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["PartsTimer", "RankParts", "median_parts", "median_rank", "parts_of"]

_FORWARD: tuple[Kind, ...] = (Kind.GUESS, Kind.FINE)
_SERIAL: tuple[Kind, ...] = (Kind.HEAD, Kind.HEAD_BACKWARD)
_BACKWARD: tuple[Kind, ...] = (Kind.FINE_BACKWARD, Kind.GUESS_BACKWARD)


class PartsTimer:
    """Runs the lists of all ranks in turns in this process, and times their instructions.

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
        """Run one step and give its seconds."""
        seconds = self.instructions()
        optimizers = [self._stepped(optimizer) for optimizer in self._optimizers]
        self._forget()
        ranks = [*map(RankParts, seconds, optimizers)]
        return parts_of(batch_size(self._inputs[0]), self._compiled.plan.sweep, ranks)

    def instructions(self) -> tuple[Mapping[Kind, float], ...]:
        """Run one step, but for the optimizers, and give its seconds by rank and kind."""
        self._forget()
        loss = mean_square if self._training else None
        with torch.set_grad_enabled(self._training):
            engines = run_in_one_process(
                self._compiled, self._ranks, self._inputs, loss, synchronize=True
            )
        return tuple(engine.seconds for engine in engines)

    def _forget(self) -> None:
        for pieces in self._ranks:
            pieces.zero_grad(set_to_none=True)

    def _stepped(self, optimizer: torch.optim.Optimizer | None) -> float:
        if optimizer is None or not self._training:
            return 0.0
        start = time.perf_counter()
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


class RankParts(NamedTuple):
    """What the parts of one rank took in a step: seconds by kind, and those of its optimizer."""

    seconds: Mapping[Kind, float]
    optimizer: float


def median_rank(steps: Sequence[RankParts]) -> RankParts:
    """The median of every part of a rank over several steps."""
    kinds = steps[0].seconds
    seconds = {kind: statistics.median(step.seconds[kind] for step in steps) for kind in kinds}
    return RankParts(seconds, statistics.median(step.optimizer for step in steps))


def parts_of(batch: int, sweep: str, ranks: Sequence[RankParts]) -> Parts:
    """Sort what the ranks did in a step into parts.

    Args:
        batch: Samples of the step.
        sweep: "chain" or "collapsed"; a collapsed one computes its corrections all at once.
        ranks: What each rank did.
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


def median_parts(found: Sequence[Parts]) -> Parts:
    """The median of every part over several steps."""
    return Parts(
        found[0].batch,
        _medians([parts.forward for parts in found]),
        statistics.median(parts.serial for parts in found),
        _medians([parts.backward for parts in found]),
        _medians([parts.optimizer for parts in found]),
    )


def _medians(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(statistics.median(each) for each in zip(*rows, strict=True))
