"""What N ranks can do with a model: each contender takes the same step in its own way.

Every rank makes every contender. A contender gives the step of this rank; a rank that has nothing
to do in it returns at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import OptionError
from pnn_compile.bench.result import COPIES, SEQUENTIAL
from pnn_compile.runtime import distribute, place
from pnn_compile.walk import Walker

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["CONTENDERS", "Setting", "Unfit", "mean_square"]


class Unfit(Exception):
    """A contender cannot run in this setting; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What is measured, on this rank.

    Attributes:
        compiled: The network.
        inputs: One batch, by argument name, alike on every rank.
        batch: Its number of samples.
        training: Whether a step trains.
        group: Process group of this contender alone.
        device: Device of this rank.
    """

    compiled: Network
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


Step = Callable[[], object]


def mean_square(outputs: Any, _: object = None) -> torch.Tensor:
    """A loss for any outputs: the mean square of all floating-point numbers in them."""
    leaves = pytree.tree_leaves(outputs)
    floating = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return torch.stack([x.float().square().mean() for x in floating]).mean()


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer | None:
    """SGD with momentum at rate 0, so that a thousand steps leave the weights as they are."""
    parameters = [*module.parameters()]
    if not parameters:
        return None
    fused = all(parameter.is_floating_point() for parameter in parameters)
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=fused)


def _trained(module: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """Forward, backward and optimizer of a module in one process."""
    optimizer = optimizer_of(module.train())

    def step() -> None:
        module.zero_grad(set_to_none=True)
        mean_square(module(**inputs)).backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()

    return step


def _evaluated(module: nn.Module, inputs: Mapping[str, Any]) -> Step:
    module.eval()

    def step() -> None:
        with torch.no_grad():
            module(**inputs)

    return step


def sequential(setting: Setting) -> Step:
    """The original network on rank 0; the other ranks rest."""
    return (lambda: None) if setting.rank else copies(setting)


def threads(setting: Setting) -> Step:
    """The original network on rank 0, with as many threads as there are ranks."""
    if setting.device.type != "cpu":
        raise Unfit("threads share the work on the CPU only")
    if setting.rank:
        return lambda: None
    step, count = sequential(setting), torch.get_num_threads()

    def with_threads() -> None:
        torch.set_num_threads(count * setting.ranks)
        try:
            step()
        finally:
            torch.set_num_threads(count)

    return with_threads


def copies(setting: Setting) -> Step:
    """The original network on every rank, whole and independent: what the machine has to give."""
    make = _trained if setting.training else _evaluated
    return make(copy.deepcopy(setting.compiled.current_program().module), setting.inputs)


def parareal(setting: Setting) -> Step:
    """The parareal network, one or several stages a rank."""
    network = distribute(setting.compiled, group=setting.group)
    if not setting.training:
        network.eval()
        return lambda: network(**setting.inputs)
    optimizer = optimizer_of(network.train())
    return lambda: network.train_step(dict(setting.inputs), mean_square, optimizer)


def data_parallel(setting: Setting) -> Step:
    """The original network on every rank, each with its share of the samples (DDP)."""
    share, rest = divmod(setting.batch, setting.ranks)
    if rest or not share:
        raise Unfit(f"no {setting.ranks} equal shares of a batch of {setting.batch}")
    module = copy.deepcopy(setting.compiled.current_program().module)
    inputs = _samples(setting, setting.rank * share, share)
    if not setting.training:
        return _evaluated(module, inputs)
    wrapped = nn.parallel.DistributedDataParallel(module, process_group=setting.group)
    return _trained(wrapped, inputs)


def _samples(setting: Setting, start: int, count: int) -> dict[str, Any]:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == setting.batch:
            return leaf[start : start + count]
        return leaf

    return {name: pytree.tree_map(cut, value) for name, value in setting.inputs.items()}


class _Piece(nn.Module):
    """Fine stages of one rank, and the head on the last one, as a stage of a pipeline.

    It takes what crosses from the rank before, as positional tensors, and gives what crosses to the
    next one. A tensor that the first rank is called with stands for the first argument.
    """

    def __init__(self, compiled: Network, placement: tuple[int, ...], rank: int) -> None:
        super().__init__()
        self._walker = [Walker(compiled)]  # a list hides it from nn.Module
        self._own = [stage for stage, place in enumerate(placement) if place == rank]
        self._last = len(placement) - 1
        for stage in self._own:
            self.add_module(f"fine_{stage}", compiled.stages.fine[stage])
        if self._last in self._own:
            self.add_module("head", compiled.stages.head)

    def forward(self, *crossing: torch.Tensor, **inputs: Any) -> Any:
        walker, state = self._walker[0], {}
        if first := self._own[0]:
            names = [value.name for value in walker.plan.interfaces[first - 1].state]
            state = dict(zip(names, crossing, strict=True))
        for stage in self._own:
            state = walker.advance(stage, state, walker.fine(stage, state, inputs))
        if self._last in self._own:
            return walker.head(state, inputs)
        return tuple(state.values())


def _pipeline(count: int) -> Callable[[Setting], Step]:
    def build(setting: Setting) -> Step:
        return pipeline(setting, count)

    return build


def pipeline(setting: Setting, micro_batches: int) -> Step:
    """The stages one after another, micro-batch behind micro-batch (GPipe, Huang et al. 2019).

    torch.distributed.pipelining runs it, over the cuts of the parareal network.
    """
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    if setting.batch % micro_batches:
        raise Unfit(f"no {micro_batches} equal micro-batches of a batch of {setting.batch}")
    compiled = setting.compiled
    placement = place(len(compiled.plan.stages), setting.ranks)
    piece = _Piece(compiled, placement, setting.rank)
    stage = PipelineStage(piece, setting.rank, setting.ranks, setting.device, group=setting.group)
    loss = mean_square if setting.training else None
    schedule = ScheduleGPipe(stage, micro_batches, loss_fn=loss)
    first = next(iter(setting.inputs.values()))
    if not isinstance(first, torch.Tensor):
        raise Unfit("the first input is no tensor")
    leading = () if setting.rank else (first,)
    last = setting.rank == setting.ranks - 1
    target = torch.zeros(setting.batch, device=setting.device) if last and loss else None
    optimizer = optimizer_of(piece.train(setting.training)) if setting.training else None

    def step() -> None:
        with torch.set_grad_enabled(setting.training):
            piece.zero_grad(set_to_none=True)
            schedule.step(*leading, target=target, **setting.inputs)
            if optimizer is not None:
                optimizer.step()

    return step


CONTENDERS: dict[str, Callable[[Setting], Step]] = {
    SEQUENTIAL: sequential,
    "parareal": parareal,
    COPIES: copies,
    "threads": threads,
    "ddp": data_parallel,
    "gpipe": _pipeline(1),
    **{f"gpipe:{count}": _pipeline(count) for count in (2, 4, 8, 16)},
}
"""By name; behind "gpipe" stands the number of micro-batches."""


def contender(name: str) -> Callable[[Setting], Step]:
    """Find a contender.

    Raises:
        OptionError: There is none of that name.
    """
    if name not in CONTENDERS:
        raise OptionError(f"there is no contender {name!r}: choose from {', '.join(CONTENDERS)}")
    return CONTENDERS[name]
