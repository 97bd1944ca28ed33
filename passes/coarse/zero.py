"""Family `zero`: no correction at all, the control that shows what the sweep is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from passes.coarse.layout import layouts, resize
from passes.plan import TensorSpec

__all__ = ["Zero"]


class Zero(nn.Module):
    """Returns zeros of the leaving types.

    Args:
        entering: Types of the tensors that it reads; the first one gives the batch size.
        leaving: Types of the tensors that it gives.
    """

    def __init__(self, entering: Sequence[TensorSpec], leaving: Sequence[TensorSpec]) -> None:
        super().__init__()
        self._pairs = [layouts(entering[0], target) for target in leaving]

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return one zero tensor per leaving type."""
        results = []
        for source, target in self._pairs:
            x = source.enter(state[0]) * 0
            x = resize(x[:, :1], target.space)
            results.append(target.leave(x.expand(-1, target.channels, *target.space)))
        return results[0] if len(results) == 1 else tuple(results)
