"""AmoebaNet-D (Real et al. 2019, arXiv 1802.01548), the benchmark of GPipe and torchgpipe.

A stem, two cells that halve the resolution, and three groups of equal cells with a halving cell
between them. A cell reads the outputs of the two cells before it, so that two states cross every
interface. `build_model(18, 32)` is the network of 18 cells and 32 filters.

Compile it with `pnn-compile examples/amoebanet.py -n 4`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AmoebaNet", "Cell", "build_model", "example_inputs"]

NORMAL = (
    ((1, "point"), (1, "average")),
    ((1, "none"), (0, "cross")),
    ((0, "point"), (0, "cross")),
    ((2, "average"), (2, "none")),
    ((1, "average"), (5, "point")),
)
"""Pairs of (state, operation) that are added to the next state; states 0 and 1 enter the cell."""
NORMAL_OUTPUTS = (0, 3, 4, 6)
REDUCTION = (
    ((0, "largest"), (0, "average")),
    ((2, "none"), (1, "square")),
    ((2, "cross"), (2, "average")),
    ((3, "none"), (1, "largest")),
    ((2, "average"), (3, "point")),
)
REDUCTION_OUTPUTS = (4, 5, 6)


def _convolve(
    channels: int, out: int, kernel: tuple[int, int] = (1, 1), stride: tuple[int, int] = (1, 1)
) -> nn.Sequential:
    """Build ReLU, a convolution that keeps the size at stride 1, and BatchNorm."""
    padding = kernel[0] // 2, kernel[1] // 2
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, out, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(out),
    )


class Halve(nn.Module):
    """Halve the resolution by two 1 x 1 convolutions, on even and on odd pixels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(channels, out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels, out - out // 2, 1, stride=2, bias=False)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, out, H / 2, W / 2]`."""
        x = self.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(self.pad(x[:, :, 1:, 1:]))], 1))


def _operation(name: str, channels: int, stride: int) -> nn.Module:
    """Build an operation of the genotype; "average" stands for the 3 x 3 poolings too."""
    inner = channels // 4
    if name == "none":
        return nn.Identity() if stride == 1 else Halve(channels, channels)
    if name == "average":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if name == "largest":
        return nn.MaxPool2d(2, stride)
    if name == "point":
        return _convolve(channels, channels, stride=(stride, stride))
    middle = (
        [_convolve(inner, inner, (3, 3), (stride, stride))]
        if name == "square"
        else [
            _convolve(inner, inner, (1, 7), (1, stride)),
            _convolve(inner, inner, (7, 1), (stride, 1)),
        ]
    )
    return nn.Sequential(_convolve(channels, inner), *middle, _convolve(inner, channels))


class Cell(nn.Module):
    """A cell: five sums of two operations each, on the outputs of the two cells before.

    Args:
        before: Channels of the cell before the last one.
        last: Channels of the last cell.
        channels: Channels of every state inside.
        reduction: Whether it halves the resolution.
        halved: Whether the last cell did.
    """

    def __init__(
        self, before: int, last: int, channels: int, *, reduction: bool, halved: bool
    ) -> None:
        super().__init__()
        genotype = REDUCTION if reduction else NORMAL
        self.outputs = REDUCTION_OUTPUTS if reduction else NORMAL_OUTPUTS
        self.reads = [(first, second) for (first, _), (second, _) in genotype]
        self.reduce_last = _convolve(last, channels)
        self.reduce_before: nn.Module = nn.Identity()
        if halved:
            self.reduce_before = Halve(before, channels)
        elif before != channels:
            self.reduce_before = _convolve(before, channels)
        self.operations = nn.ModuleList(
            _operation(name, channels, 2 if reduction and state < 2 else 1)
            for pair in genotype
            for state, name in pair
        )

    def forward(self, last: Tensor, before: Tensor) -> Tensor:
        """Map the outputs of the last cell and of the one before to `[B, C', H', W']`."""
        states = [self.reduce_last(last), self.reduce_before(before)]
        for index, (first, second) in enumerate(self.reads):
            left, right = self.operations[2 * index], self.operations[2 * index + 1]
            states.append(left(states[first]) + right(states[second]))
        return torch.cat([states[index] for index in self.outputs], 1)


class AmoebaNet(nn.Module):
    """The stem, the cells and a linear classifier on the pooled features.

    Args:
        cells: Cells that keep the resolution, a multiple of three.
        filters: Four times the channels of the stem.
        num_classes: Number of classes.
    """

    def __init__(self, cells: int, filters: int, num_classes: int) -> None:
        super().__init__()
        width = filters // 4
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        group = [False] * (cells // 3)
        before = last = width
        halved = False
        made = []
        for reduction in (True, True, *group, True, *group, True, *group):
            width *= 2 if reduction else 1
            cell = Cell(before, last, width, reduction=reduction, halved=halved)
            before, last, halved = last, width * len(cell.outputs), reduction
            made.append(cell)
        self.cells = nn.ModuleList(made)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify `[B, 3, H, W]` images; logits `[B, num_classes]`."""
        last = before = self.stem(images)
        for cell in self.cells:
            last, before = cell(last, before), last
        return self.classifier(self.pool(last).flatten(1))


def build_model(cells: int = 18, filters: int = 32, num_classes: int = 10) -> AmoebaNet:
    """Build AmoebaNet-D (cells, filters).

    Raises:
        ValueError: The number of cells is no multiple of three, or of filters none of 16.
    """
    if cells % 3 or filters % 16:
        raise ValueError(f"cells in three equal groups, filters in sixteenths ({cells}, {filters})")
    return AmoebaNet(cells, filters, num_classes)


def example_inputs(batch: int = 1, size: int = 224) -> tuple[Tensor, ...]:
    """Make a batch of random images `[batch, 3, size, size]`."""
    return (torch.randn(batch, 3, size, size),)
