"""Compare the outputs and states of a network with the original's, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.errors import OptionError
from passes.ir.isolation import preserved
from passes.ir.program import tensor_leaves
from pnn_compile.inputs import named_batch

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled


@contextmanager
def evaluating(compiled: Compiled) -> Iterator[None]:
    """Put all pieces into evaluation mode, without gradients; restore the modes on exit.

    Buffers of the fine stages and of the head are restored too. Those of the operators may change
    for good: calibration measures their BatchNorm statistics anew.
    """
    pieces = (compiled.module, compiled.sequential, compiled.operators.named())
    modes = {module: module.training for piece in pieces for module in piece.modules()}
    with preserved(compiled.sequential), torch.no_grad():
        for piece in pieces:
            piece.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def main_output(outputs: Any) -> torch.Tensor:
    """Return the output to compare: the first floating-point tensor, else the first tensor.

    Raises:
        OptionError: There is no tensor among the outputs.
    """
    tensors = tensor_leaves(outputs)
    if not tensors:
        raise OptionError("the network has no tensor among its outputs to judge it by")
    return next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])


def agreement(output: torch.Tensor, target: torch.Tensor) -> float | None:
    """Compute the share of places whose largest score is the same.

    Classes lie along the last axis of `[B, C]` and `[B, T, C]`, along axis 1 of `[B, C, *S]` with
    two or more axes in S. Of whole numbers (classes, tokens) it is the share of equal ones.

    Returns:
        The share; None for a single score or number, which has no largest one.

    >>> agreement(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    0.5
    """
    if target.is_floating_point():
        axis = 1 if target.dim() > 3 else -1
        if target.dim() < 2 or target.shape[axis] < 2:
            return None
        output, target = output.argmax(axis), target.argmax(axis)
    return (output == target).double().mean().item()


class Agreement:
    """Agreement over batches, averaged over their samples."""

    def __init__(self) -> None:
        self._agreed = 0.0
        self._samples = 0

    def add(self, output: torch.Tensor, target: torch.Tensor, samples: int) -> None:
        """Add one batch of outputs."""
        share = agreement(output, target)
        if share is not None:
            self._agreed += share * samples
            self._samples += samples

    @property
    def share(self) -> float | None:
        """The agreement so far; None where outputs have no largest score."""
        return self._agreed / self._samples if self._samples else None


def outputs_of(
    compiled: Compiled, network: nn.Module, batches: Iterable[Any]
) -> list[torch.Tensor]:
    """Return the main outputs of a network of `compiled` on batches, in evaluation mode."""
    with evaluating(compiled):
        return [main_output(network(**named_batch(compiled, batch))) for batch in batches]


def relative_error(values: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> float:
    """Return the relative error of some tensors."""
    error = RelativeError()
    for value, target in zip(values, targets, strict=True):
        error.add(value, target)
    return error.value


class RelativeError:
    """Norm of the error over the norm of the target, `|value - target| / |target|`, over batches.

    >>> error = RelativeError()
    >>> error.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    >>> error.add(torch.tensor([4.0]), torch.tensor([4.0]))
    >>> error.value
    0.8
    """

    def __init__(self) -> None:
        self._error = 0.0
        self._target = 0.0

    def add(self, value: torch.Tensor, target: torch.Tensor) -> None:
        """Add a pair of tensors of the same shape."""
        self._error += (value.double() - target.double()).square().sum().item()
        self._target += target.double().square().sum().item()

    @property
    def value(self) -> float:
        """The relative error so far; infinite where every target is zero and a value is not."""
        if not self._target:
            return math.inf if self._error else 0.0
        return math.sqrt(self._error / self._target)
