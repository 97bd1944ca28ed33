"""Families `linear` and `lowrank`: maps that are linear in the state, fitted by regression.

`linear` mixes the channels at every position, after pooling to the next state's shape. It has no
bias, so that the correction of a zero residual is zero. It accepts images, token sequences, flat
states and tuples of them, and is initialized to the identity if the channels agree (the skip of a
residual network), else to an orthogonal map. From an image [B, 16, 32, 32] to the next one
[B, 32, 16, 16]: pool to [B, 16, 16, 16], then apply a 32 x 16 matrix at each of the 256 positions.
If the target has the finer grid, the matrix comes first, as it acts on fewer positions there.

`lowrank` is a map of small rank between whole states, on a pooled grid. An image is pooled until
channels x positions is at most `CAP`, flattened, mapped through `rank` numbers, and repeated to the
resolution of the next state. A token sequence is mapped position by position, so that no token sees
another (a causal model stays causal). For the same two images with rank 8: pool by halves to
[B, 16, 8, 8], 1024 features (16 x 16 x 16 would be over the cap); 1024 -> 8 -> 32 x 8 x 8 numbers,
repeated to [B, 32, 16, 16].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from passes.coarse.map_matrix import FittedMap, MapMatrix
from passes.coarse.regression import Solution
from passes.coarse.spec import CoarseOptions, Count, Reads, Span
from passes.coarse.tensor_layout import Layout, fit_positions, layouts, resize
from passes.ir.tensor_spec import TensorSpec

CAP = 2048
"""Largest number of features or targets of one regression of a map of low rank."""


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
            x = fit_positions(x, self._source, self._target)
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


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(CoarseOptions):
    """Options of family `lowrank`.

    Attributes:
        rank: Numbers per sample that each map goes through.
    """

    rank: Count
    bias: bool = False

    @classmethod
    def choose(cls, span: Span) -> Self:
        """Take the rank of the options; in residual form a bias may fit the mean error too."""
        return cls(
            rank=span.options.rank, bias=span.options.correction == "residual", reads=span.reads
        )


class LowRankMap(FittedMap):
    """From one tensor to another through `rank` numbers per sample (per token in a sequence).

    The initial map is zero, so that it adds nothing until it is trained or fitted.
    """

    def __init__(
        self, source: TensorSpec, target: TensorSpec, rank: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        self._source, self._target = layouts(source, target)
        self._whole = _is_grid(source) and _is_grid(target) and target.channel_axis >= 0
        self._grids = _capped(self._source), _capped(self._target)
        features, targets = self._source.channels, self._target.channels
        if self._whole:
            features *= math.prod(self._grids[0])
            targets *= math.prod(self._grids[1])
        rank = min(rank, targets)
        self.rank = rank
        self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, targets, bias=bias)
        nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.up.bias)
        self.to(getattr(torch, target.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a source tensor to a tensor of the target's shape."""
        rows = self.up(self.down(self.features(x).to(self.down.weight.dtype)))
        if self._whole:
            grid = rows.reshape(rows.shape[0], self._target.channels, *self._grids[1])
        else:
            grid = rows.reshape(-1, self._target.positions, self._target.channels).movedim(-1, 1)
            grid = grid.reshape(*grid.shape[:2], *self._target.space)
        return self._target.leave(resize(grid, self._target.space))

    @property
    def groups(self) -> int:
        """Size of the target's batch axis over the number of samples."""
        return self._target.groups

    @property
    def rows(self) -> int:
        """Number of times that the map is applied to a sample: once, or once for every token."""
        return 1 if self._whole else self._target.positions

    @property
    def width(self) -> int:
        """Number of features per row of the regression."""
        return self.down.in_features

    @property
    def biased(self) -> bool:
        """Whether it has a bias."""
        return self.up.bias is not None

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of the regression for a source tensor."""
        return self._rows(self._source.enter(x), self._grids[0])

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        """Return the rows of the regression for a target tensor."""
        return self._rows(self._target.enter(y), self._grids[1])

    def _rows(self, x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        if self._whole:
            return resize(x, grid).flatten(1)
        return _rows(resize(x, self._target.space))

    def assign(self, solution: Solution, columns: slice, *, first: bool) -> None:
        """Set the factors to these columns of a solution, and the bias if `first`."""
        weight = solution.weight[:, columns]
        if solution.down is None or solution.up is None:
            up, down = torch.eye(len(weight), device=weight.device).to(weight), weight
            if weight.shape[1] < weight.shape[0]:
                up, down = weight, torch.eye(weight.shape[1], device=weight.device).to(weight)
        else:
            up, down = solution.up, solution.down[:, columns]
        with torch.no_grad():
            self.down.weight.zero_()
            self.up.weight.zero_()
            self.down.weight[: len(down)] = down.to(self.down.weight.dtype)
            self.up.weight[:, : len(down)] = up.to(self.up.weight.dtype)
            if first and self.up.bias is not None:
                self.up.bias.copy_(solution.bias)


def _is_grid(spec: TensorSpec) -> bool:
    """Return whether positions may be mixed: in an image or a flat state, not in a sequence."""
    return len(spec.shape) < 3 or spec.channel_axis in (1, 1 - len(spec.shape))


def _capped(layout: Layout) -> tuple[int, ...]:
    """Halve the grid of a tensor until the number of features is at most `CAP`."""
    space = layout.space
    while space and layout.channels * math.prod(space) > CAP and max(space) > 1:
        space = tuple(max(1, -(-size // 2)) for size in space)
    return space


class LowRank(MapMatrix):
    """One `LowRankMap` per pair of an entering and a leaving tensor.

    Args:
        entering: Types of the tensors that it reads.
        leaving: Types of the tensors that it returns.
        rank: Numbers per sample that each map goes through.
        bias: Whether the maps have a bias.
        reads: Which entering tensors each leaving one may depend on; all if None.
    """

    def __init__(
        self,
        entering: Sequence[TensorSpec],
        leaving: Sequence[TensorSpec],
        rank: int,
        *,
        bias: bool = False,
        reads: Reads | None = None,
    ) -> None:
        def make(source: TensorSpec, target: TensorSpec, first: bool) -> LowRankMap:
            return LowRankMap(source, target, rank, bias=bias and first)

        super().__init__(entering, leaving, make, reads)


def lowrank_flops(
    entering: Sequence[TensorSpec], leaving: Sequence[TensorSpec], rank: int
) -> float:
    """Estimate the FLOPs of one call without building the weights."""
    return _lowrank_flops(tuple(entering), tuple(leaving), rank)


@functools.lru_cache(maxsize=4096)
def _lowrank_flops(
    entering: tuple[TensorSpec, ...], leaving: tuple[TensorSpec, ...], rank: int
) -> float:
    total = 0.0
    for target in leaving:
        for source in entering:
            with torch.device("meta"):
                single = LowRankMap(source, target, rank)
            count = single.down.weight.numel() + single.up.weight.numel()
            samples = target.shape[target.batch_axis or 0] / single.groups
            total += 2.0 * count * samples * single.rows
    return total
