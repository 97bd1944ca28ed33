"""Runs an artifact on local processes for a first look: who holds what, how long, is it equal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from pnn_compile.artifact.directory import load
from pnn_compile.bench.setting import mean_square, optimizer_of
from pnn_compile.compiled import Compiled
from pnn_compile.fit.metrics import RelativeError
from pnn_compile.inputs import batch_size, check_batch_size, device_of, resized
from pnn_compile.runtime import distribute, place
from pnn_compile.runtime.local_ranks import run_on_ranks

__all__ = ["FirstRun", "RankReport", "first_run"]

TOLERANCE = 1e-4
"""Largest relative error of outputs that are taken as equal: float32 added in another order."""


@dataclass(frozen=True)
class RankReport:
    """What one rank holds, and how long a step took there.

    Attributes:
        rank: Its number.
        stages: Numbers of its stages, from 0.
        modules: First and last module of these.
        parameters: Number of parameters that it holds.
        bytes: Memory of the parameters and buffers that it holds.
        seconds: Of a step, the median.
    """

    rank: int
    stages: tuple[int, ...]
    modules: tuple[str, str]
    parameters: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class FirstRun:
    """What a first run found.

    Attributes:
        model: Name of the model.
        batch: Samples of a step.
        training: Whether a step was a training step, else the forward pass alone.
        ranks: What every rank says.
        parameters: Number of parameters of the whole network.
        error: Error of the outputs against those of one process, relative to these (evaluation
            mode).
    """

    model: str
    batch: int
    training: bool
    ranks: tuple[RankReport, ...]
    parameters: int
    error: float

    @property
    def equal(self) -> bool:
        """Whether the outputs are those of one process, but for rounding."""
        return self.error <= TOLERANCE


@dataclass(frozen=True)
class _Order:
    artifact: Path
    batch: int
    steps: int
    training: bool


def first_run(
    path: str | Path,
    *,
    ranks: int | None = None,
    batch: int | None = None,
    steps: int = 5,
    training: bool = False,
    threads: int = 1,
) -> FirstRun:
    """Run an artifact on local processes that talk over Gloo.

    Every rank reads its own stages alone. This process then runs the whole network, to compare.

    Args:
        path: The directory.
        ranks: Number of processes; one a stage if None.
        batch: Samples of a step; as many as the example inputs have if None.
        steps: Number of steps that are timed, behind one that is not.
        training: Time training steps, on the mean square of the outputs, at a rate of zero.
        threads: Threads of each process.

    Raises:
        ArtifactError: As `pnn.load`.
        OptionError: The network does not take such batches.
        RuntimeFault: There are more ranks than stages, or a rank failed.
    """
    compiled = load(path)
    ranks = ranks or len(compiled.plan.stages)
    place(len(compiled.plan.stages), ranks)
    batch = batch or batch_size(compiled.program.args)
    check_batch_size(compiled, batch)
    order = _Order(Path(path), batch, steps, training)
    reports, outputs = zip(*run_on_ranks(_look, ranks, order, threads=threads), strict=True)
    total = sum(p.numel() for p in compiled.module.parameters())
    error = _error(outputs[-1], _alone(compiled, batch))
    return FirstRun(compiled.plan.model, batch, training, reports, total, error)


def _alone(compiled: Compiled, batch: int) -> list[torch.Tensor]:
    inputs = resized(compiled, batch, device_of(compiled.module))
    with torch.no_grad():
        return _tensors(compiled.module.eval()(**inputs))


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _error(outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> float:
    error = RelativeError()
    for output, target in zip(outputs, targets, strict=True):
        error.add(output, target)
    return error.value


def _look(_: torch.device, order: _Order) -> tuple[RankReport, list[torch.Tensor]]:
    """Load, time and describe this rank's part; the outputs are those of the last stage."""
    module = distribute(order.artifact)
    inputs = resized(module.whole, order.batch, device_of(module.network))
    outputs = _tensors(module.eval()(**inputs))
    optimizer = optimizer_of(module.train(order.training))

    def run() -> object:
        if order.training:
            return module.train_step(inputs, mean_square, optimizer)
        return module(**inputs)

    seconds = _timed(run, order.steps)
    held = [*module.parameters(), *module.buffers()]
    stages = [module.whole.plan.stages[number] for number in module.network.stages]
    report = RankReport(
        module.rank,
        tuple(module.network.stages),
        (stages[0].first_module, stages[-1].last_module),
        sum(tensor.numel() for tensor in held if isinstance(tensor, nn.Parameter)),
        sum(tensor.nbytes for tensor in held),
        seconds,
    )
    return report, outputs


def _timed(run: Callable[[], object], steps: int) -> float:
    """Median of the seconds of a step."""
    run()
    seconds = []
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
