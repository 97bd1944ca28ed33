"""Compiled networks that several files only read, and ranks that start quickly."""

from __future__ import annotations

import importlib

import pytest

import pnn_compile as pnn
from examples import unet
from tests.distributed.ranks import spawn


@pytest.fixture(scope="session")
def unet_compiled() -> pnn.Compiled:
    """A U-Net in three stages: to be read, never to be changed."""
    return pnn.compile(unet.build_model(), unet.example_inputs(), stages=3)


@pytest.fixture
def _forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks that the product starts come from the server of the tests, which has torch."""
    module = importlib.import_module("torch.multiprocessing.spawn")  # a function hides its name
    monkeypatch.setattr(module, "spawn", spawn)
