"""One thread, one seed: the tests give the same numbers wherever and in whatever order they run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# Deadlines would fail on a busy machine; random examples would fail on somebody else's.
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
