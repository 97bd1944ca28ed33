"""Family `lowrank`: a map of small rank between whole states, on a pooled grid.

An image is pooled until channels x positions is at most `CAP`, flattened, mapped through `rank`
numbers, and repeated to the resolution of the next state. A token sequence is mapped position by
position, so that no token sees another (a causal model stays causal). Fitted by reduced-rank
regression.

From an image [B, 16, 32, 32] to the next one [B, 32, 16, 16] with rank 8: pool by halves to
[B, 16, 8, 8], 1024 features (16 x 16 x 16 would be over the cap); 1024 -> 8 -> 32 x 8 x 8 numbers,
repeated to [B, 32, 16, 16].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from passes.coarse.map_matrix import FittedMap, MapMatrix, Reads
from passes.coarse.regression import Solution
from passes.coarse.spec import CoarseOptions, Count, Span
from passes.coarse.tensor_layout import Layout, layouts, resize
from passes.ir.tensor_spec import TensorSpec

CAP = 2048
"""Largest number of features or targets of one regression."""


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
        self._whole = _is_grid(source) and _is_grid(target)
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
            grid = rows.reshape(len(rows), self._target.channels, *self._grids[1])
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
        x = resize(x, self._target.space)
        return x.flatten(2).movedim(1, 2).flatten(0, 1) if x.dim() > 2 else x

    def assign(self, solution: Solution, columns: slice, *, first: bool) -> None:
        """Set the factors to these columns of a solution, and the bias if `first`."""
        weight = solution.weight[:, columns]
        if solution.down is None or solution.up is None:
            up, down = torch.eye(len(weight)).to(weight), weight
            if weight.shape[1] < weight.shape[0]:
                up, down = weight, torch.eye(weight.shape[1]).to(weight)
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
    return len(spec.shape) < 3 or spec.channel_axis == 1


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
    total = 0.0
    for target in leaving:
        for source in entering:
            with torch.device("meta"):
                single = LowRankMap(source, target, rank)
            count = single.down.weight.numel() + single.up.weight.numel()
            samples = target.shape[target.batch_axis or 0] / single.groups
            total += 2.0 * count * samples * single.rows
    return total
