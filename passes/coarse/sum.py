"""Families combined by sum: `linear+lowrank` and the like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["Sum"]


class Sum(nn.Module):
    """Adds what its parts give for the same state.

    Args:
        parts: Networks from one state to another.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map the entering tensors to the leaving ones (a tensor if there is one)."""
        results = [part(*state) for part in self.parts]
        total = results[0]
        for result in results[1:]:
            if isinstance(total, tuple):
                total = tuple(a + b for a, b in zip(total, result, strict=True))
            else:
                total = total + result
        return total  # type: ignore[no-any-return]  # modules are untyped
