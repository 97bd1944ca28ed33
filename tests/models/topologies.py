"""Models of the zoo: chains, residuals, skips, branches, shared weights, inputs and outputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


# --- chains ---------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """Chain eight linear layers."""
    hidden = [layer for _ in range(7) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 4))


def deep_linear() -> nn.Module:
    """Chain eight linear layers without bias or activation."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)))


def conv_inplace() -> nn.Module:
    """Chain convolutions with in-place activations, as VGG does."""
    return nn.Sequential(
        *conv_relu(3, 8),
        *conv_relu(8, 8),
        nn.MaxPool2d(2),
        *conv_relu(8, 16),
        *conv_relu(16, 16),
        nn.MaxPool2d(2),
        *conv_relu(16, 16),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 4),
    )


def conv_relu(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    """Return a 3x3 convolution and its in-place activation."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU(inplace=True)


def conv1d() -> nn.Module:
    """Chain dilated convolutions over sequences `[B, C, L]`."""
    layers: list[nn.Module] = [nn.Conv1d(2, 8, 3, padding=1), nn.ReLU()]
    for dilation in (1, 2, 4, 1, 2):
        layers += [nn.Conv1d(8, 8, 3, padding=dilation, dilation=dilation), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))


def deep_batchnorm() -> nn.Module:
    """Chain eight convolutions, each with BatchNorm."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        channels = 8
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def dropout() -> nn.Module:
    """Chain linear layers with strong dropout between them."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


# --- residual, skip and branch topologies ---------------------------------------------------------


class BasicBlock(nn.Module):
    """The post-activation residual block of He et al. (CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


def resnet() -> nn.Module:
    """Chain six residual blocks of two resolutions."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    shapes = ((8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1), (16, 16, 1))
    blocks = [BasicBlock(*shape) for shape in shapes]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


class UNet(nn.Module):
    """A U-Net of three levels: three skips live across the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(conv_norm(*widths) for widths in ((1, 8), (8, 8), (8, 16)))
        self.middle = conv_norm(16, 16)
        self.up = nn.ModuleList(conv_norm(*widths) for widths in ((32, 8), (16, 8), (16, 8)))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = up(torch.cat((skips.pop(), x), dim=1))
        return self.head(x)


def conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 3x3 convolution with BatchNorm and activation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DenseBlock(nn.Module):
    """Layers that each read all earlier outputs (Huang et al., CVPR 2017): the frontier grows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH + 4 * i, 4) for i in range(8))
        self.head = nn.Linear(WIDTH + 4 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.gelu(layer(torch.cat(features, dim=1))))
        return self.head(torch.cat(features, dim=1))


class InceptionBlock(nn.Module):
    """Four parallel branches that are concatenated (Szegedy et al., CVPR 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU())
        self.small = nn.Sequential(nn.Conv2d(16, 4, 1), *conv_relu(4, 4))
        self.large = nn.Sequential(nn.Conv2d(16, 4, 1), *conv_relu(4, 4), *conv_relu(4, 4))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, padding=1), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.small(x), self.large(x), self.pooled(x)], dim=1)


def inception() -> nn.Module:
    """Chain four multi-branch blocks."""
    blocks = [InceptionBlock() for _ in range(4)]
    return nn.Sequential(
        *conv_relu(3, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )


class SegNet(nn.Module):
    """An encoder and decoder that share the indices of a max pooling (int64), not activations."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*conv_relu(1, 8), *conv_relu(8, 8), *conv_relu(8, 8))
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.middle = nn.Sequential(*conv_relu(8, 8), *conv_relu(8, 8))
        self.unpool = nn.MaxUnpool2d(2)
        self.decoder = nn.Sequential(*conv_relu(8, 8), *conv_relu(8, 8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(self.encoder(x))
        return self.decoder(self.unpool(self.middle(x), indices))


# --- shared weights -------------------------------------------------------------------------------


def tied_linear() -> nn.Module:
    """Chain linear layers; the second and the sixth are two modules with one weight."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(7)]
    layers[5].weight = layers[1].weight
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))


class ReusedModule(nn.Module):
    """A network that calls one layer near its beginning and again near its end."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = mlp_block(4)
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x))
        x = self.shared(self.middle(x))
        return self.last(x)


def mlp_block(layers: int) -> nn.Sequential:
    """Chain linear layers of equal width, each with an activation."""
    return nn.Sequential(
        *(module for _ in range(layers) for module in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    )


# --- inputs and outputs ---------------------------------------------------------------------------


class ManyInputsOutputs(nn.Module):
    """Three inputs, one of them needed late; three outputs, one of them computed early."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(8, WIDTH)
        self.trunk1 = mlp_block(3)
        self.trunk2 = mlp_block(3)
        self.auxiliary = nn.Linear(WIDTH, 2)
        self.head = nn.Linear(WIDTH + 3, 4)

    def forward(self, x: Tensor, y: Tensor, late: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.trunk1(self.left(x) * torch.sigmoid(self.right(y)))
        features = self.trunk2(hidden)
        logits = self.head(torch.cat((features, late), dim=1))
        return logits, self.auxiliary(hidden), features.square().mean(dim=1)


class DictOutput(nn.Module):
    """A network that returns nested dicts and lists, with values of many depths."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp_block(2) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        norms = {"first": hidden[0].norm(dim=1), "last": hidden[-1].norm(dim=1)}
        return {"logits": self.head(x), "hidden": hidden[1:3], "statistics": {"norms": norms}}


class KeywordArguments(nn.Module):
    """A network whose second and third input are given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = mlp_block(3)
        self.decode = mlp_block(3)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, context: Tensor, *, gain: Tensor) -> Tensor:
        x = self.encode(x) + context
        return self.head(gain * self.decode(x))
