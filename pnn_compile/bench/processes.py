"""Start processes, and measure the contenders of a benchmark on them in turns.

Every round takes one step of each contender, and starts with the next one, so that other load of
the machine affects all of them alike. Three contenders, three rounds:

    sequential, parareal, copies; parareal, copies, sequential; copies, sequential, parareal
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from passes.errors import OptionError, first_line
from passes.ir.direct_call import with_frame_headroom
from passes.ir.isolation import DispatchMode
from passes.ir.program import tensor_leaves
from pnn_compile.bench.contenders import (
    Contender,
    NotApplicable,
    Parareal,
    StepFunction,
    Workload,
    copies,
    data_parallel,
    direct,
    pipelines,
    sequential,
    threads_of_all_ranks,
)
from pnn_compile.bench.measurements import (
    COPIES,
    DIRECT,
    SEQUENTIAL,
    Bench,
    Parts,
    PartsTimer,
    RankParts,
    Timing,
    median_parts,
    median_rank,
    parts_of,
    turns,
)
from pnn_compile.inputs import check_batch_size, resized
from pnn_compile.runtime import place
from pnn_compile.runtime.local_ranks import TIMEOUT, run_on_ranks

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

CONTENDERS: dict[str, Contender] = {
    SEQUENTIAL: sequential,
    "parareal": Parareal,
    COPIES: copies,
    DIRECT: direct,
    "threads": threads_of_all_ranks,
    "ddp": data_parallel,
    **pipelines(),
}
"""All contenders by name."""


@dataclass(frozen=True)
class _BenchOrder:
    """What all ranks measure."""

    artifact: Path
    batches: tuple[int, ...]
    contenders: tuple[str, ...]
    training: bool
    rounds: int


@dataclass(frozen=True)
class _RankResult:
    """What a rank measured at one batch size.

    Attributes:
        timings: Of all contenders, on the slowest rank.
        alone: Parts that rank 0 timed while the other ranks were idle.
        steps: Parts of this rank in the steps of the parareal network; empty if that cannot run,
            or on a GPU, where the host only launches kernels.
    """

    timings: tuple[Timing, ...]
    alone: tuple[Parts, ...]
    steps: tuple[RankParts, ...]


def bench(
    compiled: Compiled,
    *,
    ranks: int | None = None,
    batches: Iterable[int] = (1,),
    against: Iterable[str] = ("direct", "threads", "ddp", "gpipe", "1f1b"),
    training: bool = True,
    rounds: int = 7,
    threads: int = 1,
) -> Bench:
    """Measure a step of the parareal network beside others on the same processes.

    All contenders run in one set of processes, in turns, so that other load of the machine affects
    all of them. A step is forward, backward and an optimizer step. On Linux the processes keep
    freed memory (`pnn_compile.runtime.local_ranks.KEEP_MEMORY`).

    Args:
        compiled: The network; it must be possible to save it.
        ranks: Number of processes; one a stage if None.
        batches: Sizes of a batch.
        against: Contenders beside the sequential and the parareal network: "direct" (the original
            with its layers called as in the stages), "threads", "ddp", the pipelines "gpipe" and
            "1f1b" at their best number of micro-batches, or at a given one ("gpipe:4").
        training: Whether to measure training steps; else the forward pass without gradients.
        rounds: Steps of each contender.
        threads: Threads of each process.

    Returns:
        The timings.

    Raises:
        OptionError: There is no such contender, or a number is too small.
        RuntimeFault: A rank failed.
        ArtifactError: The network cannot be saved.
    """
    from pnn_compile.artifact.directory import save

    ranks = ranks or compiled.plan.devices
    place(len(compiled.plan.stages), ranks, compiled.plan.windows)
    contenders = tuple(dict.fromkeys((SEQUENTIAL, "parareal", *against, COPIES)))
    for name in contenders:
        _contender(name)
    sizes = tuple(batches)
    _check(compiled, sizes, rounds)
    with tempfile.TemporaryDirectory() as folder:
        artifact = save(compiled, Path(folder) / "artifact")
        order = _BenchOrder(artifact, sizes, contenders, training, rounds)
        reports = run_on_ranks(_measure, ranks, order, threads=threads, cuda=True)
    devices, results = zip(*reports, strict=True)
    by_batch: list[tuple[_RankResult, ...]] = [*zip(*results, strict=True)]
    return Bench(
        compiled.plan.model, training, ranks, len(compiled.plan.stages), threads, devices[0],
        tuple(timing for by_rank in by_batch for timing in by_rank[0].timings),
        tuple(median_parts(by_rank[0].alone) for by_rank in by_batch),
        tuple(
            parts_of(batch, compiled.plan.sweep, [median_rank(rank.steps) for rank in by_rank])
            for batch, by_rank in zip(sizes, by_batch, strict=True)
            if by_rank[0].steps
        ),
    )  # fmt: skip


def _contender(name: str) -> Contender:
    if name not in CONTENDERS:
        raise OptionError(f"there is no contender {name!r}: choose from {', '.join(CONTENDERS)}")
    return CONTENDERS[name]


def _check(compiled: Compiled, batches: Sequence[int], rounds: int) -> None:
    if rounds < 1 or not batches or min(batches) < 1:
        raise OptionError("bench needs at least one round and batches of at least one sample")
    for batch in batches:
        check_batch_size(compiled, batch)


def _measure(device: torch.device, order: _BenchOrder) -> tuple[str, tuple[_RankResult, ...]]:
    """Measure on this rank; return the name of its device, and the result for every batch size."""
    from pnn_compile.artifact.directory import load

    compiled = load(order.artifact)
    compiled.module.to(device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return kind, tuple(_take_turns(order, compiled, batch, device) for batch in order.batches)


def _take_turns(
    order: _BenchOrder, compiled: Compiled, batch: int, device: torch.device
) -> _RankResult:
    """Time the contenders in turns at one batch size, and the parts between rounds."""
    inputs = resized(compiled, batch, device)
    ready: dict[str, StepFunction] = {}
    problems: dict[str, str] = {}
    for name in order.contenders:
        group = dist.new_group(timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        workload = Workload(compiled, inputs, batch, order.training, group, device)
        step, problem = _prepared(name, workload)
        if problem:
            problems[name] = problem
        else:
            assert step is not None
            ready[name] = step
    timer = None
    if dist.get_rank() == 0:
        placement = place(len(compiled.plan.stages), dist.get_world_size(), compiled.plan.windows)
        timer = PartsTimer(compiled, inputs, placement, order.training)
        timer()
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    alone: list[Parts] = []
    gc.collect()
    gc.freeze()  # else it may traverse all loaded objects in the middle of a timed step
    try:
        for turn in turns(ready, order.rounds):
            for name in turn:
                seconds[name].append(_timed(ready[name], device))
            dist.barrier()
            if timer is not None:
                alone.append(timer())
    finally:
        gc.unfreeze()
    parareal = ready.get("parareal")
    steps: tuple[RankParts, ...] = ()
    if isinstance(parareal, Parareal) and device.type == "cpu":
        steps = tuple(parareal.parts[-order.rounds :])
    timings = tuple(
        Timing(
            name, batch, tuple(seconds.get(name, ())), problems.get(name, ""),
            _bytes_sent(ready[name]) if name in ready else 0,
            getattr(ready.get(name), "choice", ""),
        )
        for name in order.contenders
    )  # fmt: skip
    return _RankResult(timings, tuple(alone), steps)


def _prepared(name: str, workload: Workload) -> tuple[StepFunction | None, str]:
    """Build a contender and warm it up; return it, or the error of the first rank that failed."""
    step, problem = None, ""
    try:
        step = _contender(name)(workload)
        step()
        step()
    except NotApplicable as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return step, next(filter(None, problems), "")


def _timed(step: StepFunction, device: torch.device) -> float:
    """Return the seconds of a step on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    with_frame_headroom(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


class _SentBytes(DispatchMode):
    """Count the bytes that this rank sends, by the calls that reach torch.distributed's backend.

    A message counts with its size, a collective with the least that this rank must send: an
    all-reduce of B bytes on R ranks 2 (R - 1) / R B (a ring), a broadcast (R - 1) / R B.

    Args:
        ranks: Number of ranks of the group.

    Attributes:
        bytes: The sum.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        share = (ranks - 1) / ranks
        self._factors = {"send": 1.0, "broadcast_": share, "allreduce_": 2 * share}
        self.bytes = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count a call of a collective or message, and let it through."""
        if func.namespace == "c10d":
            factor = self._factors.get(func.__name__.partition(".")[0], 0.0)
            self.bytes += factor * sum(tensor.nbytes for tensor in tensor_leaves(args[0]))
        return func(*args, **(kwargs or {}))


def _bytes_sent(step: StepFunction) -> int:
    """Take a step on every rank; return the bytes that all of them send together."""
    ranks = dist.get_world_size()
    with _SentBytes(ranks) as sent:
        step()
    by_rank: list[Any] = [None] * ranks
    dist.all_gather_object(by_rank, sent.bytes)
    total: int = math.ceil(sum(by_rank))
    return total
