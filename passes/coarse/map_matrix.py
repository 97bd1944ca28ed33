"""A matrix of maps between the tensors of two states: one row per leaving tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from passes.coarse.tensor_layout import layouts, resize
from passes.ir.tensor_spec import TensorSpec

Reads = Sequence[Sequence[int]]
"""For every leaving tensor, the numbers of the entering tensors that it may depend on."""


class MapMatrix(nn.Module):
    """Sums, for every leaving tensor, one map per entering tensor that it may depend on.

    A leaving tensor that may depend on none of them is zero.

    Args:
        entering: Types of the tensors that it reads.
        leaving: Types of the tensors that it returns.
        make: Builds the map from a source to a target; told whether it is the first of its row.
        reads: Which entering tensors each leaving one may depend on; all if None.
    """

    def __init__(
        self,
        entering: Sequence[TensorSpec],
        leaving: Sequence[TensorSpec],
        make: Callable[[TensorSpec, TensorSpec, bool], nn.Module],
        reads: Reads | None = None,
    ) -> None:
        super().__init__()
        self.reads = [tuple(range(len(entering)))] * len(leaving)
        if reads is not None:
            self.reads = [tuple(row) for row in reads]
        self.maps = nn.ModuleList(
            nn.ModuleList(make(entering[number], target, number == row[0]) for number in row)
            for row, target in zip(self.reads, leaving, strict=True)
        )
        self._layouts = [layouts(entering[0], target) for target in leaving]

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map the entering tensors to the leaving ones (a tensor if there is one)."""
        results = []
        for row, reads, (source, target) in zip(
            self.rows(), self.reads, self._layouts, strict=True
        ):
            if not row:  # `zeros_like` reads the shape alone: a NaN does not reach the result
                x = resize(torch.zeros_like(source.enter(state[0])[:, :1]), target.space)
                results.append(target.leave(x.expand(-1, target.channels, *target.space)))
                continue
            total = row[0](state[reads[0]])
            for single, number in zip(row[1:], reads[1:], strict=True):
                total = total + single(state[number])
            results.append(total)
        return results[0] if len(results) == 1 else tuple(results)

    def rows(self) -> list[list[nn.Module]]:
        """The maps, row by row."""
        return [list(row) for row in self.maps if isinstance(row, nn.ModuleList)]
