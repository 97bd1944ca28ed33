"""The contenders of a benchmark: N ranks take the same step, each contender in its own way.

Every rank builds every contender: a function from a `Workload` to the step of this rank, which does
nothing on a rank that has no part in it. Three ranks, one batch:

    sequential   rank 0: the original                        ranks 1 and 2: nothing
    copies       every rank: the original, the whole batch
    ddp          every rank: the original, a third of the batch; gradients are reduced
    parareal     rank j: stage j of the parareal network
    gpipe        rank j: stage j of the original, in micro-batches

Pipelines run the original over the cuts of the parareal network (torch.distributed.pipelining).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from passes.ir.direct_call import DirectCaller
from passes.transform.executor import Executor
from pnn_compile.bench.measurements import RankParts, mean_square, optimizer_of
from pnn_compile.runtime import distribute, place

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled


COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of micro-batches to try."""

_TRIALS, _MAX_SECONDS = 3, 1.0
"""Trial steps after the first one, and the seconds after which no further one is taken."""


class NotApplicable(Exception):
    """A contender cannot run this workload; the message says why."""


@dataclass(frozen=True)
class Workload:
    """What every contender runs, as seen by this rank.

    Attributes:
        compiled: The network.
        inputs: One batch, by argument name, the same on every rank.
        batch: Number of samples of the batch.
        training: Whether a step is a training step.
        group: Process group of this contender alone.
        device: Device of this rank.
    """

    compiled: Compiled
    inputs: Mapping[str, Any]
    batch: int
    training: bool
    group: dist.ProcessGroup
    device: torch.device

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group)


StepFunction = Callable[[], object]
"""Takes one step on this rank."""

Contender = Callable[[Workload], StepFunction]


@dataclass(frozen=True)
class TunedStep:
    """A step with an option that was chosen by trial.

    Attributes:
        step: The step.
        choice: The chosen option, in words.
    """

    step: StepFunction
    choice: str

    def __call__(self) -> object:
        """Take the step."""
        return self.step()


def step_of(
    module: nn.Module,
    inputs: Mapping[str, Any],
    training: bool,
    run: Callable[..., Any] | None = None,
) -> StepFunction:
    """Build the step of a module in one process: a training step, or the forward pass.

    Args:
        module: The module.
        inputs: Its arguments.
        training: Whether to train.
        run: Calls the module; None for the module itself.
    """
    run = run or module
    module.train(training)
    if not training:

        @torch.no_grad()
        def forward() -> None:
            run(**inputs)

        return forward
    optimizer = optimizer_of(module)

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad()  # module.zero_grad() would walk through all modules
        mean_square(run(**inputs)).backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()

    return step


def sequential(workload: Workload) -> StepFunction:
    """Run the original network on rank 0."""
    return (lambda: None) if workload.rank else copies(workload)


def direct(workload: Workload) -> StepFunction:
    """Run the original network on rank 0, its layers called directly, as in the stages."""
    if workload.rank:
        return lambda: None
    module = copy.deepcopy(workload.compiled.current_program().module)
    return step_of(module, workload.inputs, workload.training, DirectCaller(module))


def threads_of_all_ranks(workload: Workload) -> StepFunction:
    """Run the original network on rank 0, with the threads of all ranks."""
    if workload.device.type != "cpu":
        raise NotApplicable("threads run on the CPU only")
    if workload.rank:
        return lambda: None
    step, count = sequential(workload), torch.get_num_threads()

    def with_threads() -> None:
        torch.set_num_threads(count * workload.ranks)
        try:
            step()
        finally:
            torch.set_num_threads(count)

    return with_threads


def copies(workload: Workload) -> StepFunction:
    """Run the original network on every rank, independently: the throughput of the machine."""
    module = copy.deepcopy(workload.compiled.current_program().module)
    return step_of(module, workload.inputs, workload.training)


class Parareal:
    """Run the parareal network, one or several stages a rank.

    Attributes:
        parts: Seconds of the parts of this rank, step by step.
    """

    def __init__(self, workload: Workload) -> None:
        self._network = distribute(workload.compiled, group=workload.group).train(workload.training)
        self._inputs = workload.inputs
        self._training = workload.training
        self._optimizer = optimizer_of(self._network) if workload.training else None
        self.parts: list[RankParts] = []
        self._start = self._optimizer_seconds = 0.0
        if self._optimizer is not None:
            self._optimizer.register_step_pre_hook(lambda *_: self._begin())
            self._optimizer.register_step_post_hook(lambda *_: self._end())

    def __call__(self) -> None:
        """Take a step."""
        if self._training:
            self._network.train_step(dict(self._inputs), mean_square, self._optimizer)
        else:
            self._network(**self._inputs)
        self.parts.append(RankParts(self._network.seconds, self._optimizer_seconds))

    def _begin(self) -> None:
        self._start = time.perf_counter()

    def _end(self) -> None:
        self._optimizer_seconds = time.perf_counter() - self._start


def data_parallel(workload: Workload) -> StepFunction:
    """Run the original network on every rank, each with its share of the samples (DDP)."""
    share, remainder = divmod(workload.batch, workload.ranks)
    if remainder or not share:
        raise NotApplicable(f"no {workload.ranks} equal shares of a batch of {workload.batch}")
    module: nn.Module = copy.deepcopy(workload.compiled.current_program().module)
    inputs = _samples(workload, workload.rank * share, share)
    if workload.training:
        module = nn.parallel.DistributedDataParallel(module, process_group=workload.group)
    return step_of(module, inputs, workload.training)


def _samples(workload: Workload, start: int, count: int) -> dict[str, Any]:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == workload.batch:
            return leaf[start : start + count]
        return leaf

    return {name: pytree.tree_map(cut, value) for name, value in workload.inputs.items()}


def best_pipeline(workload: Workload, kind: str) -> TunedStep:
    """Build the pipeline with the fastest number of micro-batches, found by trial.

    Args:
        workload: The workload.
        kind: As of `pipeline`.

    Raises:
        NotApplicable: No number of micro-batches divides the batch.
    """
    candidates = COUNTS if workload.training or kind == "gpipe" else ()
    counts = [
        count
        for count in candidates
        if workload.batch % count == 0 and _supported(kind, count, workload)
    ]
    if not counts:
        raise NotApplicable(_reason(kind, workload, workload.batch))
    steps = {count: pipeline(workload, kind, count) for count in counts}
    seconds = {count: _shortest(step, workload) for count, step in steps.items()}
    best = min(counts, key=seconds.__getitem__)
    return TunedStep(steps[best], f"best of {', '.join(map(str, counts))} micro-batches: {best}")


def pipeline(workload: Workload, kind: str, micro_batches: int) -> StepFunction:
    """Build a pipeline: the stages in sequence, micro-batch after micro-batch.

    Args:
        workload: The workload.
        kind: "gpipe", all forward and then all backward (Huang et al. 2019); or "1f1b", one forward
            and one backward in turns (Narayanan et al. 2019).
        micro_batches: Number of micro-batches.

    Raises:
        NotApplicable: The schedule does not support that number, or it does not divide the batch.
    """
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    if workload.batch % micro_batches or not _supported(kind, micro_batches, workload):
        raise NotApplicable(_reason(kind, workload, micro_batches))
    compiled = workload.compiled
    # The original in order, whatever windows the network has: neighbors together.
    placement = place(len(compiled.plan.stages), workload.ranks)
    piece = _PipelineStageModule(compiled, placement, workload.rank)
    stage = PipelineStage(
        piece, workload.rank, workload.ranks, workload.device, group=workload.group
    )
    loss = mean_square if workload.training else None
    make: Any = ScheduleGPipe if kind == "gpipe" else Schedule1F1B
    schedule = make(stage, micro_batches, loss_fn=loss)
    first = next(iter(workload.inputs.values()))
    if not isinstance(first, torch.Tensor):
        raise NotApplicable("the first input is not a tensor")
    leading = () if workload.rank else (first,)
    last = workload.rank == workload.ranks - 1
    target = torch.zeros(workload.batch, device=workload.device) if last and loss else None
    optimizer = optimizer_of(piece.train(workload.training)) if workload.training else None

    def step() -> None:
        with torch.set_grad_enabled(workload.training):
            if optimizer is not None:
                optimizer.zero_grad()
            schedule.step(*leading, target=target, **workload.inputs)
            if optimizer is not None:
                optimizer.step()

    return step


def _supported(kind: str, micro_batches: int, workload: Workload) -> bool:
    """Return whether a schedule runs so many micro-batches: 1F1B trains, and needs one a rank."""
    return kind == "gpipe" or (workload.training and micro_batches >= workload.ranks)


def _reason(kind: str, workload: Workload, micro_batches: int) -> str:
    if kind != "gpipe" and not workload.training:
        return "1F1B takes turns between forward and backward: it only trains"
    if workload.batch % micro_batches:
        return f"no {micro_batches} equal micro-batches of a batch of {workload.batch}"
    return f"1F1B needs at least {workload.ranks} micro-batches on {workload.ranks} ranks"


def _shortest(step: StepFunction, workload: Workload) -> float:
    """Return the seconds of the shortest of a few steps, on the slowest rank."""
    times: list[float] = []
    # The first step also infers shapes, which dominates where steps are short.
    while len(times) <= _TRIALS and sum(times) < _MAX_SECONDS:
        dist.barrier(workload.group)
        start = time.perf_counter()
        step()
        if workload.device.type == "cuda":
            torch.cuda.synchronize(workload.device)
        seconds = torch.tensor(time.perf_counter() - start, device=workload.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, workload.group)
        times.append(seconds.item())
    return min(times)


class _PipelineStageModule(nn.Module):
    """Fine stages of one rank, and the head on the last one, as a stage of a pipeline.

    Positional tensors are the state from the rank before; the outputs are the state for the next
    one. The first rank ignores them: all inputs reach every rank by name.
    """

    def __init__(self, compiled: Compiled, placement: tuple[int, ...], rank: int) -> None:
        super().__init__()
        self._executor = [Executor(compiled)]  # a list hides it from nn.Module
        self._stages = [stage for stage, place in enumerate(placement) if place == rank]
        self._last = len(placement) - 1
        for stage in self._stages:
            self.add_module(f"fine_{stage}", compiled.stages.fine[stage])
        if self._last in self._stages:
            self.add_module("head", compiled.stages.head)

    def forward(self, *crossing: torch.Tensor, **inputs: Any) -> Any:
        executor, state = self._executor[0], {}
        if first := self._stages[0]:
            names = [value.name for value in executor.plan.interfaces[first - 1].state]
            state = dict(zip(names, crossing, strict=True))
        for stage in self._stages:
            state = executor.advance(stage, state, executor.fine(stage, state, inputs))
        if self._last in self._stages:
            return executor.head(state, inputs)
        return tuple(state.values())


def pipelines() -> dict[str, Contender]:
    """Return all pipelines by name; "gpipe:4" has 4 micro-batches."""
    by_name: dict[str, Contender] = {}
    for kind in ("gpipe", "1f1b"):
        by_name[kind] = partial(best_pipeline, kind=kind)
        by_name |= {
            f"{kind}:{count}": partial(pipeline, kind=kind, micro_batches=count) for count in COUNTS
        }
    return by_name
