"""The tasks of the studies: data on a device, and the family of networks that learns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from examples.studies.data import Split, fashion_mnist, gated_pairs, load_cifar10, standard_library
from examples.studies.networks import build_decoder, build_resnet, build_revnet, build_vgg
from examples.studies.presets import Preset

__all__ = ["TASKS", "Task", "make_task"]

TASKS = ("gated", "cifar10", "vgg", "revnet", "text")
"""Names of the tasks."""


@dataclass(frozen=True)
class Task:
    """A data set with the family of networks for it.

    Attributes:
        train: Training samples.
        test: Test samples.
        build: Makes the network with so many units (or layers) in all.
        units: Units of the original.
        batch: Samples per step of the training from scratch.
        fit_batch: Samples per step of the fit of a converted network.
        augment: Whether training shifts and mirrors the samples at random.
        name: What it is called.
    """

    train: Split
    test: Split
    build: Callable[[int], nn.Module]
    units: int
    batch: int = 128
    fit_batch: int = 64
    augment: bool = False
    name: str = ""


def make_task(name: str, folder: Path | None, preset: Preset, device: str = "cpu") -> Task:
    """Read the data of a task onto a device, and say which networks learn it."""
    if name == "text":
        train, test = standard_library(64, preset.texts)
        test = test.first(preset.tests)
        build = partial(build_decoder, width=preset.embedding)
        sizes = preset.text_batch, preset.text_batch
        return Task(train.to(device), test.to(device), build, preset.layers, *sizes, name=name)
    if folder is None:
        raise SystemExit(f"task {name} needs --data FOLDER; see examples/studies/data.py")
    train, test = _images(name, folder, preset)
    make = build_revnet if name == "revnet" else build_resnet
    units, build = preset.units, partial(make, width=preset.width)
    build = partial(build, channels=train.x.shape[1])
    if name == "vgg":
        units, build = 13, partial(build_vgg, width=preset.vgg_width)
    return Task(
        train.to(device), test.to(device), build, units, preset.batch, preset.fit_batch,
        augment=preset.augment and name != "gated", name=name,
    )  # fmt: skip


def _images(name: str, folder: Path, preset: Preset) -> tuple[Split, Split]:
    if name == "gated":
        generator = torch.Generator().manual_seed(0)
        train, test = fashion_mnist(folder)
        train = _pooled(gated_pairs(train, preset.samples, generator))
        return train, _pooled(gated_pairs(test, preset.tests, generator))
    train, test = load_cifar10(folder)
    train, test = train.first(preset.samples), test.first(preset.tests)
    if name != "vgg" and preset.width < 16:
        return _pooled(train), _pooled(test)
    return train, test


def _pooled(split: Split) -> Split:
    return Split(F.avg_pool2d(split.x, 2), split.y)
