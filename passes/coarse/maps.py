"""A matrix of maps between the tensors of two states: one row per leaving tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["MapMatrix"]


class MapMatrix(nn.Module):
    """Sums each row of maps, one map per entering tensor.

    Args:
        rows: For every leaving tensor, one map per entering tensor.
    """

    def __init__(self, rows: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.ModuleList(row) for row in rows)

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map the entering tensors to the leaving ones (a tensor if there is one)."""
        results = []
        for row in self.rows():
            total = row[0](state[0])
            for column, x in zip(row[1:], state[1:], strict=True):
                total = total + column(x)
            results.append(total)
        return results[0] if len(results) == 1 else tuple(results)

    def rows(self) -> list[list[nn.Module]]:
        """The maps, row by row."""
        return [list(row) for row in self.maps if isinstance(row, nn.ModuleList)]
