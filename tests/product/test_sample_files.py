"""Files of samples and checkpoints of a fit that are damaged, or made to do harm."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from passes.errors import OptionError
from pnn_compile import inputs
from pnn_compile.fit.optimizer import FitState


class _Executes:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


def test_what_unpacks_to_many_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bomb.npz"
    np.savez_compressed(file, x=np.zeros((1 << 18, 2), np.float32))
    assert inputs._read(file)["x"].shape == (1 << 18, 2)
    monkeypatch.setattr(inputs, "_LARGE", 1 << 20)
    with pytest.raises(OptionError, match="more than 100 times its size"):
        inputs._read(file)


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "x"},
        {"step": -5},
        {"samples": None},
        {"losses": ["a"]},
        {"random": None},
        {"random": {"cpu": torch.zeros(3)}},
        {"random": {"cpu": torch.full_like(torch.get_rng_state(), 255)}},
    ],
)
def test_a_damaged_checkpoint_is_refused_as_a_whole(damage: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "fit.pt"
    FitState(nn.Linear(3, 3), {}, file).save()
    torch.save(torch.load(file) | damage, file)
    with pytest.raises(OptionError, match="does not continue this fit"):
        FitState(nn.Linear(3, 3), {}, file)


def test_a_checkpoint_with_objects_runs_nothing(tmp_path: Path) -> None:
    file, mark = tmp_path / "fit.pt", tmp_path / "executed"
    torch.save(_Executes(mark), file)
    with pytest.raises(OptionError, match=r"tensors and numbers alone\): delete it"):
        FitState(nn.Linear(3, 3), {}, file)
    assert not mark.exists()
