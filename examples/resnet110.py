"""Pre-activation ResNet-110 with basic blocks (He et al. 2016, arXiv 1603.05027).

Three groups of residual units on grids of one, a half and a quarter of the input's resolution,
after a 3 x 3 stem. The same function builds the shorter and narrower members of the family.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["PreActivationResNet", "Unit", "build_model", "example_inputs"]


class Unit(nn.Module):
    """A residual unit: x + conv(relu(norm(conv(relu(norm(x)))))), both `[B, C, H, W]`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, H, W]` to `[B, C', H / stride, W / stride]`."""
        branch = self.conv1(self.relu(self.norm1(x)))
        branch = self.conv2(self.relu(self.norm2(branch)))
        return self.shortcut(x) + branch


class PreActivationResNet(nn.Module):
    """Stem, a trunk of residual units, and a linear classifier on the pooled features."""

    def __init__(
        self, units_per_group: int, width: int, in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        units = []
        channels = width
        for group in range(3):
            for index in range(units_per_group):
                stride = 2 if group and not index else 1
                units.append(Unit(channels, width * 2**group, stride))
                channels = width * 2**group
        self.trunk = nn.Sequential(*units)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify `[B, C, H, W]` images; logits `[B, num_classes]`."""
        x = self.relu(self.norm(self.trunk(self.stem(images))))
        return self.classifier(self.pool(x).flatten(1))


def build_model(
    units_per_group: int = 18, width: int = 16, in_channels: int = 3, num_classes: int = 10
) -> PreActivationResNet:
    """Build the network of `6 * units_per_group + 2` layers; 18 units a group give ResNet-110."""
    return PreActivationResNet(units_per_group, width, in_channels, num_classes)


def example_inputs(batch: int = 2, size: int = 32) -> tuple[torch.Tensor]:
    """Make a batch of random images `[batch, 3, size, size]`."""
    return (torch.randn(batch, 3, size, size),)
