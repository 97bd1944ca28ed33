"""Time the parts of a step without waiting: a bound for what ranks can reach.

    step >= max(forward) + serial + max(backward + optimizer)

`forward` and `backward` are by rank and run at the same time; `serial` is what no two ranks do at
once, the corrections and the head.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.schedule.instruction import Kind
from pnn_compile.bench.result import Parts
from pnn_compile.inputs import batch_size
from pnn_compile.runtime.engine import run_in_one_process
from pnn_compile.runtime.rank_pieces import PieceOptions, RankPieces

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_FORWARD: tuple[Kind, ...] = (Kind.GUESS, Kind.FINE)
_SERIAL: tuple[Kind, ...] = (Kind.HEAD, Kind.HEAD_BACKWARD)
_BACKWARD: tuple[Kind, ...] = (Kind.FINE_BACKWARD, Kind.GUESS_BACKWARD)


def mean_square(outputs: Any, _: object = None) -> torch.Tensor:
    """Compute a loss of any outputs: the mean square, averaged over the floating-point tensors."""
    leaves = pytree.tree_leaves(outputs)
    floating = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
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
