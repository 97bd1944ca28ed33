"""Compiled networks that several files only read, and ranks that start quickly."""

from __future__ import annotations

import pytest

import pnn_compile as pnn
import tests.distributed.ranks  # noqa: F401  # tells what the server of ranks imports
from examples import unet
from pnn_compile.runtime import local_ranks


@pytest.fixture(scope="session")
def unet_compiled() -> pnn.Compiled:
    """A U-Net in three stages: to be read, never to be changed."""
    return pnn.compile(unet.build_model(), unet.example_inputs(), stages=3)


@pytest.fixture
def _forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks that the product starts come from the server of the tests, which has torch."""
    monkeypatch.setattr(local_ranks, "START_METHOD", "forkserver")
