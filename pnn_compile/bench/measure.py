"""Starts the ranks and measures the contenders in turns."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from passes.errors import OptionError
from passes.ir.direct_call import with_frame_headroom
from pnn_compile.bench.contenders import Parareal, contender
from pnn_compile.bench.parts import PartsTimer, RankParts, median_parts, median_rank, parts_of
from pnn_compile.bench.result import COPIES, SEQUENTIAL, Bench, Parts, Timing
from pnn_compile.bench.setting import Setting, Step, Unfit
from pnn_compile.bench.traffic import sent
from pnn_compile.inputs import check_batch_size, resized
from pnn_compile.runtime import place
from pnn_compile.runtime.local_ranks import TIMEOUT, run_on_ranks

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["bench"]


@dataclass(frozen=True)
class _Order:
    """What the ranks are told to measure."""

    artifact: Path
    batches: tuple[int, ...]
    contenders: tuple[str, ...]
    training: bool
    rounds: int


@dataclass(frozen=True)
class _Turns:
    """What a rank measured at one batch size.

    Attributes:
        timings: Of all contenders, on the slowest rank.
        alone: Parts that rank 0 timed while the other ranks rested.
        steps: Parts of this rank in the steps of the parareal network; none where it cannot run, or
            where the host only launches them.
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

    All contenders run in one set of processes, in turns, round after round, so that what else
    happens on the machine meets all of them. A step is forward, backward and an optimizer step.
    On Linux all of them keep freed memory (`pnn_compile.runtime.local_ranks.KEEP_MEMORY`).

    Args:
        compiled: The network; it must be of a kind that can be saved.
        ranks: Number of processes; one a stage if None.
        batches: Sizes of a batch.
        against: What to measure beside the sequential and the parareal network: "direct" (the
            original with its layers called as in the stages), "threads", "ddp", the pipelines
            "gpipe" and "1f1b" at the number of micro-batches that is found to be best, or "gpipe:4"
            (micro-batches).
        training: Measure training steps; else the forward pass without gradients.
        rounds: Steps of each contender.
        threads: Threads of each process.

    Raises:
        OptionError: There is no such contender, or a number is too small.
        RuntimeFault: A rank failed.
        ArtifactError: The network cannot be saved.
    """
    from pnn_compile.artifact.directory import save

    ranks = ranks or len(compiled.plan.stages)
    place(len(compiled.plan.stages), ranks)
    contenders = tuple(dict.fromkeys((SEQUENTIAL, "parareal", *against, COPIES)))
    for name in contenders:
        contender(name)
    sizes = tuple(batches)
    _check(compiled, sizes, rounds)
    with tempfile.TemporaryDirectory() as folder:
        artifact = save(compiled, Path(folder) / "artifact")
        order = _Order(artifact, sizes, contenders, training, rounds)
        by_rank = run_on_ranks(_measure, ranks, order, threads=threads, cuda=True)
    devices, measured = zip(*by_rank, strict=True)
    by_batch: list[tuple[_Turns, ...]] = [*zip(*measured, strict=True)]
    return Bench(
        compiled.plan.model, training, ranks, len(compiled.plan.stages), threads, devices[0],
        tuple(timing for turns in by_batch for timing in turns[0].timings),
        tuple(median_parts(turns[0].alone) for turns in by_batch),
        tuple(
            parts_of(batch, compiled.plan.sweep, [median_rank(rank.steps) for rank in turns])
            for batch, turns in zip(sizes, by_batch, strict=True)
            if turns[0].steps
        ),
    )  # fmt: skip


def _check(compiled: Compiled, batches: Sequence[int], rounds: int) -> None:
    if rounds < 1 or not batches or min(batches) < 1:
        raise OptionError("bench needs at least one round and batches of at least one sample")
    for batch in batches:
        check_batch_size(compiled, batch)


def _measure(device: torch.device, order: _Order) -> tuple[str, tuple[_Turns, ...]]:
    """Measure on this rank; give the name of its device, and what was found at every batch size."""
    from pnn_compile.artifact.directory import load

    compiled = load(order.artifact)
    compiled.module.to(device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return kind, tuple(_turns(order, compiled, batch, device) for batch in order.batches)


def _turns(order: _Order, compiled: Compiled, batch: int, device: torch.device) -> _Turns:
    """Let the contenders take turns at one batch size; the parts are timed in between."""
    inputs = resized(compiled, batch, device)
    ready: dict[str, Step] = {}
    problems: dict[str, str] = {}
    for name in order.contenders:
        group = dist.new_group(timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        setting = Setting(compiled, inputs, batch, order.training, group, device)
        step, problem = _prepared(name, setting)
        if problem:
            problems[name] = problem
        else:
            assert step is not None
            ready[name] = step
    timer = None
    if dist.get_rank() == 0:
        placement = place(len(compiled.plan.stages), dist.get_world_size())
        timer = PartsTimer(compiled, inputs, placement, order.training)
        timer()
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    alone: list[Parts] = []
    names = [*ready]
    gc.collect()
    gc.freeze()  # or it goes through all that was loaded in the middle of somebody's step
    try:
        for turn in range(order.rounds):
            shift = turn % len(names)
            for name in (*names[shift:], *names[:shift]):
                seconds[name].append(_timed(ready[name], device))
            dist.barrier()
            if timer is not None:
                alone.append(timer())
    finally:
        gc.unfreeze()
    own = ready.get("parareal")
    steps: tuple[RankParts, ...] = ()
    if isinstance(own, Parareal) and device.type == "cpu":
        steps = tuple(own.parts[-order.rounds :])
    timings = tuple(
        Timing(
            name, batch, tuple(seconds.get(name, ())), problems.get(name, ""),
            sent(ready[name]) if name in ready else 0,
            getattr(ready.get(name), "choice", ""),
        )
        for name in order.contenders
    )  # fmt: skip
    return _Turns(timings, tuple(alone), steps)


def _prepared(name: str, setting: Setting) -> tuple[Step | None, str]:
    """Make a contender and warm it up; else tell what the first rank to fail says."""
    step, problem = None, ""
    try:
        step = contender(name)(setting)
        step()
        step()
    except Unfit as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return step, next((each for each in found if each), "")


def _timed(step: Step, device: torch.device) -> float:
    """Seconds of a step on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    with_frame_headroom(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()
