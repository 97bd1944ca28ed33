"""How far outputs and states are from those that were wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from passes.errors import OptionError

__all__ = ["Energy", "agreement", "judged"]


def judged(outputs: Any) -> torch.Tensor:
    """The output that stands for all: the first of floating point, else the first.

    Raises:
        OptionError: There is no tensor among the outputs.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise OptionError("the network has no tensor among its outputs to judge it by")
    return next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])


def agreement(given: torch.Tensor, right: torch.Tensor) -> float:
    """Share of places whose largest entry along the last axis is the same.

    Of whole numbers (classes, tokens) the share of those that are equal.
    """
    if right.is_floating_point():
        given, right = given.argmax(-1), right.argmax(-1)
    return (given == right).double().mean().item()


class Energy:
    """Root of the energy of an error over the energy of what was wanted, summed over batches."""

    def __init__(self) -> None:
        self._error = 0.0
        self._wanted = 0.0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Count one more pair of tensors of the same shape."""
        self._error += (found.double() - wanted.double()).square().sum().item()
        self._wanted += wanted.double().square().sum().item()

    @property
    def share(self) -> float:
        """The relative error so far; 0 where nothing was wanted."""
        return (self._error / self._wanted) ** 0.5 if self._wanted else 0.0
