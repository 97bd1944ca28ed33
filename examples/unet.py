"""U-Net: a segmentation network whose skip connections span most of its depth.

Compile it with `pnn-compile examples/unet.py -n 3`.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


class DoubleConvolution(nn.Sequential):
    """Apply two 3x3 convolutions, each with BatchNorm and ReLU; height and width are kept.

    Args:
        in_channels: Channels of the input `[B, in_channels, H, W]`.
        out_channels: Channels of the output `[B, out_channels, H, W]`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    """Double the resolution, append the skip of the same level and convolve.

    Args:
        channels: Channels of the lower level; the skip and the output have half as many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
        self.convolve = DoubleConvolution(channels, channels // 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map `[B, C, H, W]` and a skip `[B, C/2, 2H, 2W]` to `[B, C/2, 2H, 2W]`."""
        both = torch.cat((skip, self.upsample(x)), dim=1)
        return self.convolve(both)


class UNet(nn.Module):
    """Segment images by a contracting and an expanding path with skips between equal levels.

    Ronneberger, Fischer and Brox, "U-Net: convolutional networks for biomedical image
    segmentation" (MICCAI 2015), with padded convolutions, so that the output has the size of the
    input, and BatchNorm.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes of a pixel.
        width: Channels of the first level; each level doubles them. 64 in the paper.
        depth: Number of poolings; 4 in the paper.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = DoubleConvolution(in_channels, width)
        self.pool = nn.MaxPool2d(kernel_size=2)
        self.down = nn.ModuleList(
            DoubleConvolution(upper, lower) for upper, lower in pairwise(widths)
        )
        self.up = nn.ModuleList(Up(channels) for channels in reversed(widths[1:]))
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        """Return pixel logits `[B, num_classes, H, W]` of images `[B, in_channels, H, W]`.

        Height and width must be multiples of `2 ** depth`.
        """
        x = self.stem(images)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(self.pool(x))
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)


def initialize(module: nn.Module) -> None:
    """Draw weights as He et al. (ICCV 2015) do and zero the biases."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(
    in_channels: int = 1, num_classes: int = 2, width: int = 16, depth: int = 4
) -> UNet:
    """Build a U-Net; `width=64` gives the widths of the paper."""
    return UNet(in_channels, num_classes, width, depth)


def example_inputs(
    batch: int = 2, image_size: int = 64, in_channels: int = 1
) -> tuple[Tensor, ...]:
    """Return one batch of random images `[batch, in_channels, image_size, image_size]`."""
    return (torch.randn(batch, in_channels, image_size, image_size),)
