"""Constants of a graph: a call that passes others is refused, whatever they are and wherever."""

import enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from pnn_compile.inputs import by_argument

WIDTH = 8


class Side(enum.Enum):
    """A choice between two."""

    LEFT = 1
    RIGHT = 2


class Setting:
    """An object that equals no other."""

    def __init__(self, size: int) -> None:
        self.size = size


class Takes(nn.Module):
    """A chain that also takes something else than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, batch: Any, extra: Any = None) -> Tensor:
        x: Tensor = self.layers(batch["x"] if isinstance(batch, dict) else batch)
        return x


PAIRS: dict[str, tuple[Any, Any]] = {
    "flag": (True, False),
    "number": (1, 1.0),
    "not a number": (2.0, float("nan")),
    "array": (np.ones(3), np.array([1.0, 1.0, 2.0])),
    "list of arrays": ([np.ones(3)], [np.ones(4)]),
    "set": ({1, 3}, {2}),
    "choice": (Side.LEFT, Side.RIGHT),
    "dtype": (torch.float32, torch.float64),
    "function": (torch.sin, torch.cos),
    "object": (Setting(1), Setting(2)),
    "key": ({"a": 1}, {"b": 1}),
    "range": (range(3), range(4)),
    "tensor": (None, torch.ones(3)),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_another_constant_is_refused(name: str, nested: bool) -> None:
    x = torch.randn(4, WIDTH)
    constant, other = PAIRS[name]

    def call(value: Any) -> dict[str, Any]:
        return {"batch": {"x": x, "extra": value}} if nested else {"batch": x, "extra": value}

    compiled = pnn.compile(Takes(), kwargs=call(constant), stages=2, validate="off")
    expected = compiled.sequential(**call(constant))
    assert expected.shape == x.shape
    if isinstance(constant, Setting):  # another object of the same content is the same constant
        assert torch.equal(compiled.sequential(**call(Setting(1))), expected)
    for run in (
        lambda: compiled.sequential(**call(other)),
        lambda: compiled.module(**call(other)),
        lambda: by_argument(compiled.program, call(other)),
    ):
        with pytest.raises(pnn.OptionError, match=r"extra.*(compile another|structure)"):
            run()
