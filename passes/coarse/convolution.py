"""Families `convolution` and `conv`: small networks of convolutions, for images and other grids.

`convolution` is the preprocessing operator of the paper: a strided convolution to the state's
resolution, BatchNorm, ReLU, and a 1 x 1 convolution to the state's channels (Lee, Lee, Park 2022,
section IV). From [B, 3, 224, 224] to [B, 64, 56, 56]: stride 4, kernel 5 (odd, and no smaller than
the stride, so that no pixel is skipped), then 64 -> 64. Where that takes too much of a stage, the
first convolution leads to fewer channels: to [B, 1024, 14, 14], stride 16 and kernel 17, the dense
one takes 0.8 GFLOPs a sample, one of width 256 0.2.

`conv` is a non-linear residual unit: two 3 x 3 convolutions with a ReLU between them on grids, two
linear layers with a GELU on token sequences and flat states. The last layer starts at zero, so that
a fitted linear part in the same sum stays as it is until training improves on it. It has no
normalization, as a coarse propagator may be called on two differently distributed states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from passes.coarse.map_matrix import MapMatrix
from passes.coarse.spec import Reads
from passes.coarse.tensor_layout import layouts, resize
from passes.errors import SynthesisError
from passes.ir.tensor_spec import TensorSpec

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LEAST_WIDTH = 32
"""Fewest channels to which the first convolution is narrowed to fit a budget."""


def convolution_fits(source: TensorSpec, target: TensorSpec) -> bool:
    """Return whether both are channels-first grids of one rank, and the target is not finer."""
    # A target that counts from the end may not be mixed.
    grids = source.channel_axis in (1, 1 - len(source.shape)) and target.channel_axis == 1
    same = len(source.shape) == len(target.shape) and 3 <= len(source.shape) <= 5
    batches = source.batch_axis == target.batch_axis == 0
    if not (grids and same and batches and source.shape[0] == target.shape[0]):
        return False
    return all(a >= b for a, b in zip(source.shape[2:], target.shape[2:], strict=True))


def _stride(source: TensorSpec, target: TensorSpec) -> tuple[int, ...]:
    pairs = zip(source.shape[2:], target.shape[2:], strict=True)
    return tuple(max(1, a // b) for a, b in pairs)


class ConvolutionMap(nn.Module):
    """Strided convolution from one channels-first tensor to another of no finer resolution.

    Args:
        source: Type of the tensor that it reads.
        target: Type of the tensor that it returns.
        width: Most channels between the two convolutions; None for those of the target.
    """

    def __init__(self, source: TensorSpec, target: TensorSpec, width: int | None = None) -> None:
        super().__init__()
        rank = len(source.shape) - 2
        stride = _stride(source, target)
        kernel = tuple(max(3, s | 1) for s in stride)
        width = min(width or target.shape[1], target.shape[1])
        self.space = target.shape[2:]
        self.strided = _CONVOLUTIONS[rank](
            source.shape[1], width, kernel, stride, tuple(k // 2 for k in kernel), bias=False
        )
        self.norm = _NORMS[rank](width)
        self.relu = nn.ReLU()
        self.mix = _CONVOLUTIONS[rank](width, target.shape[1], 1)
        self.to(getattr(torch, target.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, *S]` to the target's `[B, C', *S']`."""
        x = resize(self.strided(x.to(self.strided.weight.dtype)), self.space)
        result: torch.Tensor = self.mix(self.relu(self.norm(x)))
        return result


class Convolution(nn.Module):
    """One `ConvolutionMap` per leaving tensor, from the entering tensor."""

    def __init__(
        self,
        entering: Sequence[TensorSpec],
        leaving: Sequence[TensorSpec],
        width: int | None = None,
    ) -> None:
        super().__init__()
        if len(entering) != 1 or not all(convolution_fits(entering[0], one) for one in leaving):
            raise SynthesisError(
                "family 'convolution' leads from one image-like tensor to others of no higher "
                f"resolution, not from {', '.join(map(str, entering))} to "
                f"{', '.join(map(str, leaving))}: use 'linear'"
            )
        (source,) = entering
        self.maps = nn.ModuleList(ConvolutionMap(source, target, width) for target in leaving)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map the entering tensor to the leaving ones (a tensor if there is one)."""
        results = tuple(single(x) for single in self.maps)
        return results[0] if len(results) == 1 else results


def convolution_flops(
    source: TensorSpec, leaving: Sequence[TensorSpec], width: int | None = None
) -> float:
    """Estimate the FLOPs of one call without building the network."""
    total = 0.0
    for target in leaving:
        kernel = math.prod(max(3, s | 1) for s in _stride(source, target))
        channels = target.shape[1]
        hidden = min(width or channels, channels)
        positions = target.elements / channels
        total += 2.0 * positions * hidden * (kernel * source.shape[1] + channels)
    return total


def fitting_width(source: TensorSpec, leaving: Sequence[TensorSpec], budget: float) -> int | None:
    """Return the largest width, of repeated halves, whose FLOPs fit a budget; None if all do.

    The width is at least 32, or that of the leaving tensors.
    """
    widest = width = max(target.shape[1] for target in leaving)
    while width > _LEAST_WIDTH and convolution_flops(source, leaving, width) > budget:
        width = max(width // 2, _LEAST_WIDTH)
    return None if width == widest else width


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
