"""The contenders of a benchmark: N ranks take the same step, each contender in its own way.

Every rank builds every contender: a function from a `Workload` to the step of this rank, which does
nothing on a rank that has no part in it. Three ranks, one batch:

    sequential   rank 0: the original                        ranks 1 and 2: nothing
    copies       every rank: the original, the whole batch
    ddp          every rank: the original, a third of the batch; gradients are reduced
    parareal     rank j: stage j of the parareal network
    gpipe        rank j: stage j of the original, in micro-batches
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from passes.ir.direct_call import DirectCaller
from pnn_compile.bench.parts import RankParts, mean_square, optimizer_of
from pnn_compile.runtime import distribute

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled


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


def _training_step(
    module: nn.Module, inputs: Mapping[str, Any], run: Callable[..., Any]
) -> StepFunction:
    """Build the training step of a module in one process; `run` calls it."""
    optimizer = optimizer_of(module.train())

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad()  # module.zero_grad() would walk through all modules
        mean_square(run(**inputs)).backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()

    return step


def _forward_step(
    module: nn.Module, inputs: Mapping[str, Any], run: Callable[..., Any]
) -> StepFunction:
    """Build the forward pass of a module in one process; `run` calls it."""
    module.eval()

    def step() -> None:
        with torch.no_grad():
            run(**inputs)

    return step


def sequential(workload: Workload) -> StepFunction:
    """Run the original network on rank 0."""
    return (lambda: None) if workload.rank else copies(workload)


def direct(workload: Workload) -> StepFunction:
    """Run the original network on rank 0, its layers called directly, as in the stages."""
    if workload.rank:
        return lambda: None
    module = copy.deepcopy(workload.compiled.current_program().module)
    build = _training_step if workload.training else _forward_step
    return build(module, workload.inputs, DirectCaller(module))


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
    build = _training_step if workload.training else _forward_step
    return build(module, workload.inputs, module)


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
    module = copy.deepcopy(workload.compiled.current_program().module)
    inputs = _samples(workload, workload.rank * share, share)
    if not workload.training:
        return _forward_step(module, inputs, module)
    wrapped = nn.parallel.DistributedDataParallel(module, process_group=workload.group)
    return _training_step(wrapped, inputs, wrapped)


def _samples(workload: Workload, start: int, count: int) -> dict[str, Any]:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == workload.batch:
            return leaf[start : start + count]
        return leaf

    return {name: pytree.tree_map(cut, value) for name, value in workload.inputs.items()}
