"""Pre-activation ResNet-1001 for CIFAR: 333 bottleneck units, a thousand layers in a row.

Compile it with `pnn-compile examples/resnet1001.py -n 3`.
"""

import math

import torch
from torch import Tensor, nn

STEM_WIDTH = 16
GROUP_WIDTHS = (64, 128, 256)
EXPANSION = 4


class PreActivationBottleneck(nn.Module):
    """Add a residual of three convolutions (1x1, 3x3, 1x1), each after its BatchNorm and ReLU.

    The unit of He et al., "Identity mappings in deep residual networks" (ECCV 2016), figure 4(e):
    nothing but the addition stands on the shortcut. Only where the shape changes is the shortcut a
    1x1 convolution, and then it reads the activated input, as in the authors' code.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; the 3x3 convolution works on a quarter of them.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        width = out_channels // EXPANSION
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, stride=stride, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.projection: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H / stride, W / stride]`."""
        activated = self.relu(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(activated)
        residual = self.conv1(activated)
        residual = self.conv2(self.relu(self.norm2(residual)))
        residual = self.conv3(self.relu(self.norm3(residual)))
        return shortcut + residual


class PreActivationResNet(nn.Module):
    """Classify CIFAR images with three groups of bottleneck units and one linear layer.

    He et al. (ECCV 2016), section 4: a 3x3 stem of 16 channels, groups of 64, 128 and 256 channels
    at full, half and quarter resolution, and a last BatchNorm and ReLU before the average pooling.

    Args:
        units_per_group: Bottleneck units in each group; the network has `9 * units + 2` layers.
        num_classes: Number of classes.
    """

    def __init__(self, units_per_group: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM_WIDTH, kernel_size=3, padding=1, bias=False)
        self.group1 = make_group(STEM_WIDTH, GROUP_WIDTHS[0], units_per_group, stride=1)
        self.group2 = make_group(GROUP_WIDTHS[0], GROUP_WIDTHS[1], units_per_group, stride=2)
        self.group3 = make_group(GROUP_WIDTHS[1], GROUP_WIDTHS[2], units_per_group, stride=2)
        self.norm = nn.BatchNorm2d(GROUP_WIDTHS[2])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(GROUP_WIDTHS[2], num_classes)
        self.apply(initialize)
        scale_residuals(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[B, num_classes]` of images `[B, 3, 32, 32]`."""
        x = self.stem(images)
        x = self.group1(x)
        x = self.group2(x)
        x = self.group3(x)
        x = self.pool(self.relu(self.norm(x)))
        return self.classifier(torch.flatten(x, 1))


def make_group(in_channels: int, out_channels: int, units: int, stride: int) -> nn.Sequential:
    """Chain bottleneck units; the first one changes channels and resolution."""
    first = PreActivationBottleneck(in_channels, out_channels, stride)
    rest = (PreActivationBottleneck(out_channels, out_channels) for _ in range(units - 1))
    return nn.Sequential(first, *rest)


def initialize(module: nn.Module) -> None:
    """Draw convolutions as He et al. (ICCV 2015) do, by their fan-out."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def scale_residuals(model: nn.Module) -> None:
    """Divide the last convolution of every residual by the root of the number of units.

    BatchNorm has this effect in training mode (De and Smith, NeurIPS 2020). In eval mode the
    running variances of an untrained network are 1: each unit would double the variance of its
    input, and 333 units would overflow float32.
    """
    units = [unit for unit in model.modules() if isinstance(unit, PreActivationBottleneck)]
    with torch.no_grad():
        for unit in units:
            unit.conv3.weight.div_(math.sqrt(len(units)))


def build_model(units_per_group: int = 111, num_classes: int = 10) -> PreActivationResNet:
    """Build the network of `9 * units_per_group + 2` layers.

    12 units a group give ResNet-110, 18 ResNet-164 and 111 ResNet-1001.

    Raises:
        ValueError: If a group would be empty.
    """
    if units_per_group < 1:
        raise ValueError(f"a group needs at least one unit (got {units_per_group})")
    return PreActivationResNet(units_per_group, num_classes)


def example_inputs(batch: int = 2, image_size: int = 32) -> tuple[Tensor, ...]:
    """Return one batch of random images `[batch, 3, image_size, image_size]`."""
    return (torch.randn(batch, 3, image_size, image_size),)
