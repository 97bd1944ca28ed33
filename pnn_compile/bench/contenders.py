"""What N ranks can do with a model: each contender takes the same step in its own way.

Every rank makes every contender. A contender gives the step of this rank; a rank that has nothing
to do in it returns at once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.errors import OptionError
from passes.ir.direct_call import DirectCaller
from pnn_compile.bench.parts import RankParts
from pnn_compile.bench.pipelines import pipelines
from pnn_compile.bench.result import COPIES, DIRECT, SEQUENTIAL
from pnn_compile.bench.setting import Setting, Step, Unfit, mean_square, optimizer_of
from pnn_compile.runtime import distribute

__all__ = ["CONTENDERS", "Parareal", "contender", "mean_square", "optimizer_of"]


def _trained(module: nn.Module, inputs: Mapping[str, Any], run: Callable[..., Any]) -> Step:
    """Forward, backward and optimizer of a module in one process, by what runs it."""
    optimizer = optimizer_of(module.train())

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad()  # what users call; module.zero_grad() walks through all modules
        mean_square(run(**inputs)).backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()

    return step


def _evaluated(module: nn.Module, inputs: Mapping[str, Any], run: Callable[..., Any]) -> Step:
    """The forward pass of a module in one process, by what runs it."""
    module.eval()

    def step() -> None:
        with torch.no_grad():
            run(**inputs)

    return step


def sequential(setting: Setting) -> Step:
    """The original network on rank 0; the other ranks rest."""
    return (lambda: None) if setting.rank else copies(setting)


def direct(setting: Setting) -> Step:
    """The original network on rank 0, its layers called as those of the stages are."""
    if setting.rank:
        return lambda: None
    module = copy.deepcopy(setting.compiled.current_program().module)
    make = _trained if setting.training else _evaluated
    return make(module, setting.inputs, DirectCaller(module))


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
    module = copy.deepcopy(setting.compiled.current_program().module)
    make = _trained if setting.training else _evaluated
    return make(module, setting.inputs, module)


class Parareal:
    """Steps of the parareal network, one or several stages a rank.

    Args:
        setting: What is measured.

    Attributes:
        parts: What the parts of this rank took, step by step.
    """

    def __init__(self, setting: Setting) -> None:
        self._network = distribute(setting.compiled, group=setting.group).train(setting.training)
        self._inputs = setting.inputs
        self._training = setting.training
        self._optimizer = optimizer_of(self._network) if setting.training else None
        self.parts: list[RankParts] = []
        self._began = self._took = 0.0
        if self._optimizer is not None:
            self._optimizer.register_step_pre_hook(lambda *_: self._begin())
            self._optimizer.register_step_post_hook(lambda *_: self._end())

    def __call__(self) -> None:
        """Take a step."""
        if self._training:
            self._network.train_step(dict(self._inputs), mean_square, self._optimizer)
        else:
            self._network(**self._inputs)
        self.parts.append(RankParts(self._network.seconds, self._took))

    def _begin(self) -> None:
        self._began = time.perf_counter()

    def _end(self) -> None:
        self._took = time.perf_counter() - self._began


def data_parallel(setting: Setting) -> Step:
    """The original network on every rank, each with its share of the samples (DDP)."""
    share, rest = divmod(setting.batch, setting.ranks)
    if rest or not share:
        raise Unfit(f"no {setting.ranks} equal shares of a batch of {setting.batch}")
    module = copy.deepcopy(setting.compiled.current_program().module)
    inputs = _samples(setting, setting.rank * share, share)
    if not setting.training:
        return _evaluated(module, inputs, module)
    wrapped = nn.parallel.DistributedDataParallel(module, process_group=setting.group)
    return _trained(wrapped, inputs, wrapped)


def _samples(setting: Setting, start: int, count: int) -> dict[str, Any]:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == setting.batch:
            return leaf[start : start + count]
        return leaf

    return {name: pytree.tree_map(cut, value) for name, value in setting.inputs.items()}


CONTENDERS: dict[str, Callable[[Setting], Step]] = {
    SEQUENTIAL: sequential,
    "parareal": Parareal,
    COPIES: copies,
    DIRECT: direct,
    "threads": threads,
    "ddp": data_parallel,
    **pipelines(),
}
"""By name."""


def contender(name: str) -> Callable[[Setting], Step]:
    """Find a contender.

    Raises:
        OptionError: There is none of that name.
    """
    if name not in CONTENDERS:
        raise OptionError(f"there is no contender {name!r}: choose from {', '.join(CONTENDERS)}")
    return CONTENDERS[name]
