"""Family `linear`: channels mixed at every position, after pooling to the next state's shape.

Linear in the state and without a bias, so that the correction of a zero residual is zero. Accepts
images, token sequences, flat states and tuples of them. Initialized to the identity if the channels
agree (the skip of a residual network), else to an orthogonal map. Fitted by least squares.

From an image [B, 16, 32, 32] to the next one [B, 32, 16, 16]: pool to [B, 16, 16, 16], then apply a
32 x 16 matrix at each of the 256 positions. If the target has the finer grid, the matrix comes
first, as it acts on fewer positions there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from passes.coarse.map_matrix import FittedMap, MapMatrix, Reads
from passes.coarse.regression import Solution
from passes.coarse.tensor_layout import layouts, resize
from passes.ir.tensor_spec import TensorSpec


class LinearMap(FittedMap):
    """A linear map between two tensors of one network.

    Args:
        source: Type of the tensor that it reads.
        target: Type of the tensor that it returns.
        bias: Whether to add a bias per channel.
        gain: Scale of the initial weights.
    """

    def __init__(
        self, source: TensorSpec, target: TensorSpec, *, bias: bool = False, gain: float = 1.0
    ) -> None:
        super().__init__()
        self._source, self._target = layouts(source, target)
        dtype = getattr(torch, target.dtype)
        shape = (self._target.channels, self._source.channels)
        self.weight = nn.Parameter(torch.empty(shape))
        if shape[0] == shape[1]:
            nn.init.eye_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)
        with torch.no_grad():
            self.weight.mul_(gain)
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a source tensor to a tensor of the target's shape."""
        x = self._source.enter(x).to(self.weight.dtype)
        shrinks = self._target.positions <= self._source.positions
        if shrinks:
            x = resize(x, self._target.space)
        space = x.shape[2:]
        x = torch.matmul(self.weight, x.flatten(2) if space else x.unsqueeze(2))
        if self.bias is not None:
            x = x + self.bias[:, None]
        x = x.reshape(*x.shape[:2], *space)
        if not shrinks:
            x = resize(x, self._target.space)
        return self._target.leave(x)

    @property
    def width(self) -> int:
        """Number of features per row of the regression."""
        return self._source.channels

    @property
    def biased(self) -> bool:
        """Whether it has a bias."""
        return self.bias is not None

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of the regression for a source tensor, one per position of the target."""
        return _rows(resize(self._source.enter(x), self._target.space))

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        """Return the rows of the regression for a target tensor."""
        return _rows(self._target.enter(y))

    def assign(self, solution: Solution, columns: slice, *, first: bool) -> None:
        """Set the weights to these columns of a solution, and the bias if `first`."""
        with torch.no_grad():
            self.weight.copy_(solution.weight[:, columns])
            if first and self.bias is not None:
                self.bias.copy_(solution.bias)

    def extra_repr(self) -> str:
        """Show the channel counts in the repr of the module."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).movedim(1, 2).flatten(0, 1) if x.dim() > 2 else x


class Linear(MapMatrix):
    """One `LinearMap` per pair of an entering and a leaving tensor.

    Args:
        entering: Types of the tensors that it reads.
        leaving: Types of the tensors that it returns.
        bias: Whether the maps have a bias.
        reads: Which entering tensors each leaving one may depend on; all if None.
    """

    def __init__(
        self,
        entering: Sequence[TensorSpec],
        leaving: Sequence[TensorSpec],
        *,
        bias: bool = False,
        reads: Reads | None = None,
    ) -> None:
        gain = len(entering) ** -0.5

        def make(source: TensorSpec, target: TensorSpec, first: bool) -> LinearMap:
            return LinearMap(source, target, bias=bias and first, gain=gain)

        super().__init__(entering, leaving, make, reads)


def linear_flops(entering: Sequence[TensorSpec], leaving: Sequence[TensorSpec]) -> float:
    """Estimate the FLOPs of one call without building the network.

    >>> spec = TensorSpec((2, 16), "float32", batch_axis=0, channel_axis=1)
    >>> linear_flops([spec], [spec])  # 2 * 16 * 16 for each of two samples
    1024.0
    """
    return _linear_flops(tuple(entering), tuple(leaving))


@functools.lru_cache(maxsize=4096)  # the states of a deep network have few distinct types
def _linear_flops(entering: tuple[TensorSpec, ...], leaving: tuple[TensorSpec, ...]) -> float:
    total = 0.0
    for target in leaving:
        for source in entering:
            first, second = layouts(source, target)
            samples = target.shape[target.batch_axis or 0] // second.groups
            positions = min(first.positions, second.positions)
            total += 2.0 * first.channels * second.channels * positions * samples
    return total
