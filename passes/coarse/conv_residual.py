"""Family `conv`: a small non-linear residual unit that starts at zero.

Two 3 x 3 convolutions with a ReLU between them on images and other grids, two linear layers with
a GELU on token sequences and flat states. The last layer starts at zero, so that a fitted linear
part in the same sum stays as it is until training improves on it. It has no normalization, as a
coarse propagator may be called on two differently distributed states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from passes.coarse.map_matrix import MapMatrix, Reads
from passes.coarse.tensor_layout import layouts, resize
from passes.ir.tensor_spec import TensorSpec

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvMap(nn.Module):
    """Residual unit from one tensor to another, at the resolution of the target.

    Args:
        source: Type of the tensor that it reads.
        target: Type of the tensor that it returns.
    """

    def __init__(self, source: TensorSpec, target: TensorSpec) -> None:
        super().__init__()
        self._source, self._target = layouts(source, target)
        channels = self._source.channels, self._target.channels
        self._grid = target.channel_axis == 1 and 1 <= len(self._target.space) <= 3
        first: nn.Module
        last: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
        if self._grid:
            convolution = _CONVOLUTIONS[len(self._target.space)]
            first = convolution(channels[0], channels[1], 3, padding=1)
            last = convolution(channels[1], channels[1], 3, padding=1)
        else:
            first, last = nn.Linear(*channels), nn.Linear(channels[1], channels[1])
        self.first, self.last = first, last
        self.activation = nn.ReLU() if self._grid else nn.GELU()
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.dtype = getattr(torch, target.dtype)
        self.to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a source tensor to a tensor of the target's shape."""
        x = resize(self._source.enter(x), self._target.space).to(self.dtype)
        if self._grid:
            x = self.last(self.activation(self.first(x)))
        else:
            x = self.last(self.activation(self.first(x.movedim(1, -1)))).movedim(-1, 1)
        return self._target.leave(x)


class Conv(MapMatrix):
    """One `ConvMap` per pair of an entering and a leaving tensor.

    Args:
        entering: Types of the tensors that it reads.
        leaving: Types of the tensors that it returns.
        reads: Which entering tensors each leaving one may depend on; all if None.
    """

    def __init__(
        self,
        entering: Sequence[TensorSpec],
        leaving: Sequence[TensorSpec],
        reads: Reads | None = None,
    ) -> None:
        super().__init__(entering, leaving, lambda a, b, _: ConvMap(a, b), reads)
