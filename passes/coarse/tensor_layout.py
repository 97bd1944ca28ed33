"""One layout for every kind of state: `[batch, channels, *space]`.

A `Layout` converts images, sequences, flat vectors, windows folded into the batch, and any order of
their axes into it and back, so that every family of coarse networks is written only once:

    image    [B, 64, 56, 56]  as it is           tokens     [B, 128, 512] -> [B, 512, 128]
    flat     [B, 1000]        no space           time first [128, B, 512] -> [B, 512, 128]
    windows  [B * 4, 49, 96] -> [B, 96, 4, 49]   beside an image, whose batch is B
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from passes.ir.tensor_spec import TensorSpec

_POOLS: dict[int, Callable[..., torch.Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class Layout:
    """Conversion of one tensor into `[batch, channels, *space]` and back.

    Args:
        spec: Type of the tensor.
        groups: Size of its batch axis over the number of samples; above 1 if the network folds
            something else (windows, time steps) into the batch.
        channels: Overrides the number of channels of a flat tensor that is an unrolled image.
        space: The spatial sizes of that image.
    """

    def __init__(
        self,
        spec: TensorSpec,
        groups: int = 1,
        channels: int | None = None,
        space: tuple[int, ...] | None = None,
    ) -> None:
        rank = len(spec.shape)
        self.groups = groups
        self.batch_axis = spec.batch_axis or 0
        self.channel_axis = spec.channel_axis % rank if rank > 1 else None
        if self.channel_axis == self.batch_axis:
            self.channel_axis = next(axis for axis in range(rank) if axis != self.batch_axis)
        spatial = [a for a in range(rank) if a not in (self.batch_axis, self.channel_axis)]
        self.order: list[int] = [self.batch_axis, *spatial]
        if self.channel_axis is not None:
            self.order.insert(1, self.channel_axis)
        self.inverse = [self.order.index(axis) for axis in range(rank)]
        self.flat = channels is not None
        self.channels = 1 if self.channel_axis is None else spec.shape[self.channel_axis]
        if channels is not None:
            self.channels = channels
        self.tail = tuple(spec.shape[axis] for axis in spatial)
        grouped = ((groups,) if groups > 1 else ()) + self.tail
        self.space = space if space is not None else grouped

    @property
    def positions(self) -> int:
        """Number of spatial positions per sample."""
        return math.prod(self.space)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Convert a tensor to `[batch, channels, *space]`."""
        if x.dim() == 1:
            return x.unsqueeze(1)
        x = x.permute(self.order) if self.order != sorted(self.order) else x
        if self.flat:
            return x.reshape(-1, self.channels, *self.space)
        if self.groups > 1:
            x = x.reshape(-1, self.groups, *x.shape[1:]).movedim(1, 2)
        return x

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Convert a tensor back from `[batch, channels, *space]`."""
        if self.channel_axis is None:
            return x.squeeze(1)
        if self.flat:
            x = x.flatten(1)
        elif self.groups > 1:
            x = x.movedim(2, 1).flatten(0, 1)
        return x.permute(self.inverse) if self.inverse != sorted(self.inverse) else x


def layouts(source: TensorSpec, target: TensorSpec) -> tuple[Layout, Layout]:
    """Return the layouts of two tensors of one network, made to agree on the batch.

    A flat target that has as many elements as the source is the same image unrolled.

    >>> image = TensorSpec((2, 8, 4, 4), "float32", batch_axis=0, channel_axis=1)
    >>> flat = TensorSpec((2, 128), "float32", batch_axis=0, channel_axis=1)
    >>> [layout.space for layout in layouts(image, flat)]
    [(4, 4), (4, 4)]
    """
    entering = source.shape[source.batch_axis or 0] if source.shape else 1
    leaving = target.shape[target.batch_axis or 0] if target.shape else 1
    samples = math.gcd(entering, leaving)
    first = Layout(source, entering // samples)
    groups = leaving // samples
    unrolled = Layout(target, groups)
    same = first.channels * first.positions == unrolled.channels
    if first.space and not unrolled.space and same and unrolled.channel_axis is not None:
        return first, Layout(target, groups, first.channels, first.space)
    return first, unrolled


def fit_positions(x: torch.Tensor, source: Layout, target: Layout) -> torch.Tensor:
    """Resize `[B, C, *S]` of a source to the positions of a target; at any length if they agree."""
    return x if source.space == target.space else resize(x, target.space)


def resize(x: torch.Tensor, space: tuple[int, ...]) -> torch.Tensor:
    """Pool or repeat `[B, C, *S]` to `[B, C, *space]`.

    >>> resize(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), (2,))
    tensor([[[2., 6.]]])
    >>> resize(torch.ones(4, 8), (3, 3)).shape
    torch.Size([4, 8, 3, 3])
    """
    if tuple(x.shape[2:]) == space:
        return x
    batch, channels = x.shape[:2]
    if not space:
        return x.flatten(2).mean(2)
    if x.dim() == 2:
        return x.reshape(batch, channels, *[1] * len(space)).expand(batch, channels, *space)
    if x.dim() - 2 == len(space) <= 3:
        return _POOLS[len(space)](x, space if len(space) > 1 else space[0])
    pooled = F.adaptive_avg_pool1d(x.flatten(2), math.prod(space))
    return pooled.reshape(batch, channels, *space)
