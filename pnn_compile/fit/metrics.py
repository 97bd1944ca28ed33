"""How far outputs and states are from those that were wanted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils import _pytree as pytree

from passes.errors import OptionError

__all__ = ["Agreement", "Energy", "agreement", "judged"]


def judged(outputs: Any) -> torch.Tensor:
    """The output that stands for all: the first of floating point, else the first.

    Raises:
        OptionError: There is no tensor among the outputs.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise OptionError("the network has no tensor among its outputs to judge it by")
    return next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])


def agreement(given: torch.Tensor, right: torch.Tensor) -> float | None:
    """Share of places whose largest score is the same.

    Classes lie along the last axis of `[B, C]` and `[B, T, C]`, along axis 1 of `[B, C, *S]` with
    two and more axes behind it. Of whole numbers (classes, tokens) it is the share of those that
    are equal.

    Returns:
        The share; None for a single score or number, which has no largest one.
    """
    if right.is_floating_point():
        axis = 1 if right.dim() > 3 else -1
        if right.dim() < 2 or right.shape[axis] < 2:
            return None
        given, right = given.argmax(axis), right.argmax(axis)
    return (given == right).double().mean().item()


class Agreement:
    """Agreement over batches, weighed by their samples."""

    def __init__(self) -> None:
        self._agreed = 0.0
        self._samples = 0

    def add(self, given: torch.Tensor, right: torch.Tensor, samples: int) -> None:
        """Count one more batch."""
        found = agreement(given, right)
        if found is not None:
            self._agreed += found * samples
            self._samples += samples

    @property
    def share(self) -> float | None:
        """The agreement so far; None where outputs have no largest score."""
        return self._agreed / self._samples if self._samples else None


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
        """The relative error so far; infinite where nothing was wanted and something found."""
        if not self._wanted:
            return math.inf if self._error else 0.0
        return math.sqrt(self._error / self._wanted)
