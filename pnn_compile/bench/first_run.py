"""Run an artifact on local processes for a first check: placement, seconds and equal outputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from passes.ir.module_walk import named_tensors, num_parameters
from passes.ir.program import tensor_leaves
from pnn_compile.artifact.directory import load
from pnn_compile.bench.measurements import mean_square, optimizer_of
from pnn_compile.compiled import Compiled
from pnn_compile.fit.metrics import relative_error
from pnn_compile.inputs import batch_size, check_batch_size, device_of, resized
from pnn_compile.runtime import distribute, place
from pnn_compile.runtime.local_ranks import run_on_ranks

TOLERANCE = 1e-4
"""Largest relative error of outputs that count as equal: float32, added in another order."""


@dataclass(frozen=True)
class RankReport:
    """Stages, memory and step time of one rank.

    Attributes:
        rank: Its number.
        stages: Numbers of its stages, from 0.
        modules: First and last module of these.
        parameters: Number of its parameters.
        bytes: Memory of its parameters and buffers.
        seconds: Median of its steps.
    """

    rank: int
    stages: tuple[int, ...]
    modules: tuple[str, str]
    parameters: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class FirstRun:
    """Results of a first run.

    Attributes:
        model: Name of the model.
        batch: Samples of a step.
        training: Whether a step was a training step, else the forward pass alone.
        ranks: Reports of all ranks.
        parameters: Number of parameters of the whole network.
        error: Relative error of the outputs against those of one process, in evaluation mode.
    """

    model: str
    batch: int
    training: bool
    ranks: tuple[RankReport, ...]
    parameters: int
    error: float

    @property
    def equal(self) -> bool:
        """Whether the outputs are those of one process, except for rounding."""
        return self.error <= TOLERANCE


@dataclass(frozen=True)
class _RunOrder:
    """What all ranks run."""

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
    """Run an artifact on local processes that communicate over Gloo.

    Every rank reads its own stages only. This process then runs the whole network, to compare.

    Args:
        path: The directory.
        ranks: Number of processes; one a stage if None.
        batch: Samples of a step; those of the example inputs if None.
        steps: Number of timed steps, after one that is not.
        training: Whether to time training steps: mean square loss, learning rate 0.
        threads: Threads of each process.

    Returns:
        The reports of the ranks, and the error of the outputs.

    Raises:
        ArtifactError: As `pnn.load`.
        OptionError: The network was compiled for another batch size.
        RuntimeFault: There are more ranks than stages, or a rank failed.
    """
    compiled = load(path)
    ranks = ranks or compiled.plan.devices
    place(len(compiled.plan.stages), ranks, compiled.plan.windows)
    batch = batch or batch_size(compiled.program.args)
    check_batch_size(compiled, batch)
    order = _RunOrder(Path(path), batch, steps, training)
    reports, outputs = zip(*run_on_ranks(_run_rank, ranks, order, threads=threads), strict=True)
    total = num_parameters(compiled.module)
    error = relative_error(outputs[-1], _run_alone(compiled, batch))
    return FirstRun(compiled.plan.model, batch, training, reports, total, error)


def _run_alone(compiled: Compiled, batch: int) -> list[torch.Tensor]:
    inputs = resized(compiled, batch, device_of(compiled.module))
    with torch.no_grad():
        return tensor_leaves(compiled.module.eval()(**inputs))


def _run_rank(_: torch.device, order: _RunOrder) -> tuple[RankReport, list[torch.Tensor]]:
    """Load, run and time this rank's stages; return its report and its outputs."""
    module = distribute(order.artifact)
    inputs = resized(module.whole, order.batch, device_of(module.network))
    outputs = tensor_leaves(module.eval()(**inputs))
    optimizer = optimizer_of(module.train(order.training))

    def run() -> object:
        if order.training:
            return module.train_step(inputs, mean_square, optimizer)
        return module(**inputs)

    seconds = _timed(run, order.steps)
    stages = [module.whole.plan.stages[number] for number in module.network.stages]
    report = RankReport(
        module.rank,
        tuple(module.network.stages),
        (stages[0].first_module, stages[-1].last_module),
        num_parameters(module),
        sum(tensor.nbytes for _, tensor in named_tensors(module)),
        seconds,
    )
    return report, outputs


def _timed(run: Callable[[], object], steps: int) -> float:
    """Return the median seconds of a step."""
    run()
    seconds = []
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
