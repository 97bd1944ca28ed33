"""Pipelines over the cuts of a parareal network, run by torch.distributed.pipelining."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from passes.transform.executor import Executor
from pnn_compile.bench.setting import Setting, Step, Tuned, Unfit, mean_square, optimizer_of
from pnn_compile.runtime import place

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["COUNTS", "best_pipeline", "pipeline", "pipelines"]

COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of micro-batches that are tried."""

_TRIALS, _LONG = 3, 1.0
"""Steps of each behind the first one, and the seconds after which no further one is taken."""


def best_pipeline(setting: Setting, kind: str) -> Tuned:
    """The pipeline with the number of micro-batches that turns out fastest, tried here and now.

    Args:
        setting: What is measured.
        kind: As of `pipeline`.

    Raises:
        Unfit: No number of micro-batches divides the batch.
    """
    most = COUNTS if setting.training or kind == "gpipe" else ()
    counts = [count for count in most if setting.batch % count == 0 and _fits(kind, count, setting)]
    if not counts:
        raise Unfit(_reason(kind, setting, setting.batch))
    steps = {count: pipeline(setting, kind, count) for count in counts}
    seconds = {count: _tried(step, setting) for count, step in steps.items()}
    best = min(counts, key=seconds.__getitem__)
    return Tuned(steps[best], f"best of {', '.join(map(str, counts))} micro-batches: {best}")


def pipeline(setting: Setting, kind: str, micro_batches: int) -> Step:
    """The stages one after another, micro-batch behind micro-batch.

    Args:
        setting: What is measured.
        kind: "gpipe", all forward and then all backward (Huang et al. 2019); or "1f1b", one forward
            and one backward in turns (Narayanan et al. 2019).
        micro_batches: Their number.

    Raises:
        Unfit: The schedule does not take so many, or they do not divide the batch.
    """
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    if setting.batch % micro_batches or not _fits(kind, micro_batches, setting):
        raise Unfit(_reason(kind, setting, micro_batches))
    compiled = setting.compiled
    placement = place(len(compiled.plan.stages), setting.ranks)
    piece = _Piece(compiled, placement, setting.rank)
    stage = PipelineStage(piece, setting.rank, setting.ranks, setting.device, group=setting.group)
    loss = mean_square if setting.training else None
    make: Any = ScheduleGPipe if kind == "gpipe" else Schedule1F1B
    schedule = make(stage, micro_batches, loss_fn=loss)
    first = next(iter(setting.inputs.values()))
    if not isinstance(first, torch.Tensor):
        raise Unfit("the first input is no tensor")
    leading = () if setting.rank else (first,)
    last = setting.rank == setting.ranks - 1
    target = torch.zeros(setting.batch, device=setting.device) if last and loss else None
    optimizer = optimizer_of(piece.train(setting.training)) if setting.training else None

    def step() -> None:
        with torch.set_grad_enabled(setting.training):
            if optimizer is not None:
                optimizer.zero_grad()
            schedule.step(*leading, target=target, **setting.inputs)
            if optimizer is not None:
                optimizer.step()

    return step


def _fits(kind: str, micro_batches: int, setting: Setting) -> bool:
    """Whether a schedule takes so many micro-batches: 1F1B needs one a rank, and trains."""
    return kind == "gpipe" or (setting.training and micro_batches >= setting.ranks)


def _reason(kind: str, setting: Setting, micro_batches: int) -> str:
    if kind != "gpipe" and not setting.training:
        return "1F1B takes turns between forward and backward: it only trains"
    if setting.batch % micro_batches:
        return f"no {micro_batches} equal micro-batches of a batch of {setting.batch}"
    return f"1F1B needs at least {setting.ranks} micro-batches on {setting.ranks} ranks"


def _tried(step: Step, setting: Setting) -> float:
    """The shortest of a few steps, on the slowest rank."""
    found: list[float] = []
    # The first step also finds out about shapes, which matters where steps are short.
    while len(found) <= _TRIALS and sum(found) < _LONG:
        dist.barrier(setting.group)
        start = time.perf_counter()
        step()
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
        seconds = torch.tensor(time.perf_counter() - start, device=setting.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, setting.group)
        found.append(seconds.item())
    return min(found)


class _Piece(nn.Module):
    """Fine stages of one rank, and the head on the last one, as a stage of a pipeline.

    It takes what crosses from the rank before, as positional tensors, and gives what crosses to the
    next one. A tensor that the first rank is called with stands for the first argument.
    """

    def __init__(self, compiled: Compiled, placement: tuple[int, ...], rank: int) -> None:
        super().__init__()
        self._executor = [Executor(compiled)]  # a list hides it from nn.Module
        self._own = [stage for stage, place in enumerate(placement) if place == rank]
        self._last = len(placement) - 1
        for stage in self._own:
            self.add_module(f"fine_{stage}", compiled.stages.fine[stage])
        if self._last in self._own:
            self.add_module("head", compiled.stages.head)

    def forward(self, *crossing: torch.Tensor, **inputs: Any) -> Any:
        executor, state = self._executor[0], {}
        if first := self._own[0]:
            names = [value.name for value in executor.plan.interfaces[first - 1].state]
            state = dict(zip(names, crossing, strict=True))
        for stage in self._own:
            state = executor.advance(stage, state, executor.fine(stage, state, inputs))
        if self._last in self._own:
            return executor.head(state, inputs)
        return tuple(state.values())


def pipelines() -> dict[str, Callable[[Setting], Step]]:
    """All of them by name; behind a colon stands the number of micro-batches."""
    found: dict[str, Callable[[Setting], Step]] = {}
    for kind in ("gpipe", "1f1b"):
        found[kind] = _best(kind)
        found |= {f"{kind}:{count}": _fixed(kind, count) for count in COUNTS}
    return found


def _best(kind: str) -> Callable[[Setting], Step]:
    return lambda setting: best_pipeline(setting, kind)


def _fixed(kind: str, count: int) -> Callable[[Setting], Step]:
    return lambda setting: pipeline(setting, kind, count)
