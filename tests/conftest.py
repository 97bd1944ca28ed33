"""One thread, one seed: the tests give the same numbers wherever and in whatever order they run."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import hypothesis
import pytest
import torch

from tests.support.sourcefiles import Write

torch.set_num_threads(1)

# Deadlines would fail on a busy machine; random examples would fail on somebody else's.
hypothesis.settings.register_profile(
    "reproducible", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PNN_COMPILE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write files into an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file
