"""Family `convolution`: the preprocessing operator of the paper, for images and other grids.

A strided convolution to the state's resolution, BatchNorm, ReLU, and a 1 x 1 convolution to the
state's channels (Lee, Park, Lee 2022, section IV). From [B, 3, 224, 224] to [B, 64, 56, 56]: stride
4, kernel 5 (odd, and no smaller than the stride, so that no pixel is skipped), then 64 -> 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from passes.coarse.tensor_layout import resize
from passes.ir.tensor_spec import TensorSpec

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def convolution_fits(source: TensorSpec, target: TensorSpec) -> bool:
    """Return whether both are channels-first grids of one rank, and the target is not finer."""
    grids = source.channel_axis == target.channel_axis == 1
    same = len(source.shape) == len(target.shape) and 3 <= len(source.shape) <= 5
    batches = source.batch_axis == target.batch_axis == 0
    if not (grids and same and batches and source.shape[0] == target.shape[0]):
        return False
    return all(a >= b for a, b in zip(source.shape[2:], target.shape[2:], strict=True))


def _stride(source: TensorSpec, target: TensorSpec) -> tuple[int, ...]:
    pairs = zip(source.shape[2:], target.shape[2:], strict=True)
    return tuple(max(1, a // b) for a, b in pairs)


class ConvolutionMap(nn.Module):
    """Strided convolution from one channels-first tensor to another of no finer resolution."""

    def __init__(self, source: TensorSpec, target: TensorSpec) -> None:
        super().__init__()
        rank = len(source.shape) - 2
        stride = _stride(source, target)
        kernel = tuple(max(3, s | 1) for s in stride)
        channels = target.shape[1]
        self.space = target.shape[2:]
        self.strided = _CONVOLUTIONS[rank](
            source.shape[1], channels, kernel, stride, tuple(k // 2 for k in kernel), bias=False
        )
        self.norm = _NORMS[rank](channels)
        self.relu = nn.ReLU()
        self.mix = _CONVOLUTIONS[rank](channels, channels, 1)
        self.to(getattr(torch, target.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, *S]` to the target's `[B, C', *S']`."""
        x = resize(self.strided(x.to(self.strided.weight.dtype)), self.space)
        result: torch.Tensor = self.mix(self.relu(self.norm(x)))
        return result


class Convolution(nn.Module):
    """One `ConvolutionMap` per leaving tensor, from the entering tensor."""

    def __init__(self, entering: Sequence[TensorSpec], leaving: Sequence[TensorSpec]) -> None:
        super().__init__()
        (source,) = entering
        self.maps = nn.ModuleList(ConvolutionMap(source, target) for target in leaving)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map the entering tensor to the leaving ones (a tensor if there is one)."""
        results = tuple(single(x) for single in self.maps)
        return results[0] if len(results) == 1 else results


def convolution_flops(source: TensorSpec, leaving: Sequence[TensorSpec]) -> float:
    """Estimate the FLOPs of one call without building the network."""
    total = 0.0
    for target in leaving:
        kernel = 1
        for s in _stride(source, target):
            kernel *= max(3, s | 1)
        total += 2.0 * target.elements * (kernel * source.shape[1] + target.shape[1])
    return total
