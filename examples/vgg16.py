"""VGG-16 with batch normalization, for CIFAR and for ImageNet.

Compile the first with `pnn-compile examples/vgg16.py -n 3` and the second with
`pnn-compile examples/vgg16.py:build_imagenet_model -n 3 --input 1x3x224x224`.
"""

import torch
from torch import Tensor, nn

# (output channels in units of the base width, convolutions) of each block; a 2x2 pooling ends it.
BLOCKS = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
REDUCTION = 2 ** len(BLOCKS)
IMAGENET_SIZE = 224


class VGG16(nn.Module):
    """Classify images with thirteen 3x3 convolutions and three linear layers.

    Configuration D of Simonyan and Zisserman, "Very deep convolutional networks for large-scale
    image recognition" (ICLR 2015), with BatchNorm after each convolution (Ioffe and Szegedy, 2015).

    Args:
        num_classes: Number of classes.
        image_size: Height and width of the images in pixels, a multiple of 32.
        width: Channels of the first block; 64 in the paper.
        hidden: Width of the two hidden layers of the classifier; 4096 in the paper.

    Raises:
        ValueError: If the five poolings do not divide the image size.
    """

    def __init__(self, num_classes: int, image_size: int, width: int, hidden: int) -> None:
        super().__init__()
        if image_size < REDUCTION or image_size % REDUCTION:
            raise ValueError(f"image size must be a multiple of {REDUCTION} (got {image_size})")
        pixels = (image_size // REDUCTION) ** 2
        self.features = make_features(width)
        self.classifier = nn.Sequential(
            nn.Linear(8 * width * pixels, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[B, num_classes]` of images `[B, 3, image_size, image_size]`."""
        x = self.features(images)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def make_features(width: int) -> nn.Sequential:
    """Build the convolutional trunk, `[B, 3, H, W]` to `[B, 8 * width, H / 32, W / 32]`."""
    layers: list[nn.Module] = []
    in_channels = 3
    for multiple, convolutions in BLOCKS:
        for _ in range(convolutions):
            out_channels = multiple * width
            layers += [
                nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = out_channels
        layers.append(nn.MaxPool2d(kernel_size=2))
    return nn.Sequential(*layers)


def initialize(module: nn.Module) -> None:
    """Draw weights as He et al. (ICCV 2015) do and zero the biases."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(num_classes: int = 10, image_size: int = 32, width: int = 64) -> VGG16:
    """Build a VGG-16 whose classifier fits the image size.

    Below 224 pixels the hidden layers have `8 * width` units (512-512-10, the usual CIFAR network);
    from 224 on they have `64 * width` (4096-4096-1000, the paper's ImageNet network).
    """
    hidden = 64 * width if image_size >= IMAGENET_SIZE else 8 * width
    return VGG16(num_classes, image_size, width, hidden)


def example_inputs(batch: int = 2, image_size: int = 32) -> tuple[Tensor, ...]:
    """Return one batch of random images `[batch, 3, image_size, image_size]`."""
    return (torch.randn(batch, 3, image_size, image_size),)


def build_imagenet_model() -> VGG16:
    """Build the paper's network: 1000 classes of images of 224 x 224 pixels."""
    return build_model(num_classes=1000, image_size=IMAGENET_SIZE)


def imagenet_example_inputs(batch: int = 2) -> tuple[Tensor, ...]:
    """Return one batch of random images `[batch, 3, 224, 224]`."""
    return example_inputs(batch, IMAGENET_SIZE)
