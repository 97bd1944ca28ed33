"""Networks of the studies at any depth: trained shorter, or shortened when trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import nn

from examples import decoder, resnet110, vgg16

__all__ = [
    "SideBySide",
    "build_decoder",
    "build_resnet",
    "build_revnet",
    "build_vgg",
    "in_groups",
    "shortened",
]


def build_resnet(units: int, width: int, channels: int) -> nn.Module:
    """A pre-activation ResNet of so many residual units in three groups."""
    per_group = [units // 3 + (group < units % 3) for group in range(3)]
    network = resnet110.build_model(max(per_group), width, channels)
    kept = [
        unit
        for index, unit in enumerate(network.trunk)
        if index % max(per_group) < per_group[index // max(per_group)]
    ]
    network.trunk = nn.Sequential(*kept)
    return network


class Coupling(nn.Module):
    """A unit of two streams: y1 = x1 + F(x2), y2 = x2 + G(y1), both `[B, C, H, W]`."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = _branch(channels, out_channels, stride)
        self.second = _branch(out_channels, out_channels, 1)
        self.shortcut: nn.Module = nn.Identity()
        if channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map two streams to two `[B, C', H / stride, W / stride]`."""
        y1 = self.shortcut(x1) + self.first(x2)
        return y1, self.shortcut(x2) + self.second(y1)


def _branch(channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
    )


class RevNet(nn.Module):
    """A residual network of two streams (Gomez et al. 2017, arXiv 1707.04585).

    Two tensors cross every interface between its units.

    Args:
        units: Units of two convolutions, in three groups.
        width: Channels of each stream in the first group.
        in_channels: Channels of the images.
    """

    def __init__(self, units: int, width: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 2 * width, 3, padding=1, bias=False)
        trunk, channels = [], width
        for group in range(3):
            for index in range(units // 3 + (group < units % 3)):
                out = width * 2**group
                trunk.append(Coupling(channels, out, 2 if group and not index else 1))
                channels = out
        self.trunk = nn.ModuleList(trunk)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(2 * channels, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify `[B, C, H, W]` images; logits `[B, 10]`."""
        x1, x2 = self.stem(images).chunk(2, 1)
        for unit in self.trunk:
            x1, x2 = unit(x1, x2)
        x = self.relu(self.norm(torch.cat([x1, x2], 1)))
        return self.classifier(x.mean((2, 3)))


def build_revnet(units: int, width: int, channels: int) -> nn.Module:
    """A residual network of two streams, of so many units in three groups."""
    return RevNet(units, width, channels)


def build_vgg(units: int, width: int) -> nn.Module:
    """VGG-16 with so many convolutions of its thirteen."""
    return shortened(vgg16.build_model(width=width), units)


def build_decoder(layers: int, width: int) -> nn.Module:
    """A decoder of so many layers for 64 bytes of context."""
    return decoder.build_model(layers=layers, width=width, heads=4, context=64)


def shortened(network: nn.Module, keep: int) -> nn.Module:
    """A copy of a network with evenly spaced units left out; those that change the shape stay."""
    network = copy.deepcopy(network)
    name = next(n for n in ("trunk", "blocks", "features") if hasattr(network, n))
    groups = _units(list(getattr(network, name)))
    free = [i for i, group in enumerate(groups) if _keeps_shape(group)]
    others = sum(_counts(group) for group in groups) - len(free)
    count = max(0, min(keep - others, len(free)))
    chosen = {free[int(k * len(free) / count)] for k in range(count)}
    kept = [group for i, group in enumerate(groups) if i in chosen or i not in free]
    setattr(network, name, nn.Sequential(*itertools.chain.from_iterable(kept)))
    return network


def in_groups(network: nn.Module, keep: int) -> nn.Module | None:
    """A copy of a residual network whose neighboring units read one state, and are added.

    Pairs of layers in parallel (Gonzalez et al. 2025, arXiv 2502.02790), or larger groups, so that
    the groups, and the units that change the shape, are `keep` one after another. None if the
    units are not residual.
    """
    network = copy.deepcopy(network)
    name = next((n for n in ("trunk", "blocks") if hasattr(network, n)), None)
    if name is None:
        return None
    units = list(getattr(network, name))
    runs = [
        (free, list(run)) for free, run in itertools.groupby(units, lambda u: _keeps_shape([u]))
    ]
    total = sum(len(run) for free, run in runs if free)
    share = max(0, keep - (len(units) - total)) / total
    groups: list[nn.Module] = []
    for free, run in runs:
        count = max(1, round(share * len(run))) if free else len(run)
        bounds = [len(run) * part // count for part in range(count + 1)]
        groups += [SideBySide(run[a:b]) for a, b in itertools.pairwise(bounds)]
    setattr(network, name, nn.Sequential(*groups))
    return network


class SideBySide(nn.Module):
    """Residual units that read one state x: x + sum_j (g_j(x) - x)."""

    def __init__(self, units: Sequence[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what every unit does to the state."""
        first, *others = self.units
        y: torch.Tensor = first(x)
        for unit in others:
            y = y + (unit(x) - x)
        return y


def _units(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """A unit is one residual block, or a convolution with what follows up to the next one."""
    if not any(isinstance(layer, nn.Conv2d) for layer in layers):
        return [[layer] for layer in layers]
    groups: list[list[nn.Module]] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            groups.append([])
        groups[-1].append(layer)
    return groups


def _counts(group: Sequence[nn.Module]) -> bool:
    return not isinstance(group[0], nn.MaxPool2d)


def _keeps_shape(group: Sequence[nn.Module]) -> bool:
    first = group[0]
    if isinstance(first, nn.Conv2d):
        return first.in_channels == first.out_channels
    return _counts(group) and not isinstance(getattr(first, "shortcut", None), nn.Conv2d)
