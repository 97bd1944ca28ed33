"""Compiled networks that several files only read, and ranks that start quickly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pnn_compile as pnn
import tests.distributed.ranks  # noqa: F401  # tells what the server of ranks imports
from examples import unet, vgg16
from pnn_compile.runtime import local_ranks


@pytest.fixture(scope="session")
def unet_compiled() -> pnn.Compiled:
    """A U-Net in three stages: to be read, never to be changed."""
    return pnn.compile(unet.build_model(width=4), unet.example_inputs(), stages=3)


@pytest.fixture(scope="session")
def vgg() -> pnn.Compiled:
    """A narrow VGG16 in three stages: to be read, never to be changed."""
    torch.manual_seed(0)
    return pnn.compile(vgg16.build_model(width=4), vgg16.example_inputs(), stages=3)


@pytest.fixture(scope="session")
def vgg_artifact(vgg: pnn.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact: to be copied."""
    return vgg.save(tmp_path_factory.mktemp("vgg") / "out")


@pytest.fixture
def _forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks that the product starts come from the server of the tests, which has torch."""
    monkeypatch.setattr(local_ranks, "START_METHOD", "forkserver")
