"""What a contender is given, and what it has in common with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["Setting", "Step", "Tuned", "Unfit", "mean_square", "optimizer_of"]


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


Step = Callable[[], object]


@dataclass(frozen=True)
class Tuned:
    """A step with an option that was chosen by trying.

    Attributes:
        step: The step.
        choice: What was chosen, in words.
    """

    step: Step
    choice: str

    def __call__(self) -> object:
        """Take the step."""
        return self.step()


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
