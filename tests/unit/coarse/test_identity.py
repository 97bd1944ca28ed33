"""Family `identity`: layers that read one state, and are added."""

from typing import Literal

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import resnet110
from passes.errors import SynthesisError


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize("sweep", ["chain", "collapsed"])
def test_all_stages_read_the_state_after_the_first_layers_and_are_added(
    sweep: Literal["chain", "collapsed"],
) -> None:
    torch.manual_seed(0)
    first, layers = nn.Linear(5, 8), [Residual() for _ in range(4)]
    model = nn.Sequential(first, *layers)
    x = torch.randn(3, 5)
    compiled = pnn.compile(
        model, x, cuts=["2", "3", "4"], prologue=0.1, preprocess="identity", coarse="identity",
        sweep=sweep,
    )  # fmt: skip
    state = first(x)
    expected = state + sum(layer(state) - state for layer in layers)
    torch.testing.assert_close(compiled.module(x), expected)
    assert compiled.verify().ok


def test_where_the_shape_changes_it_says_so() -> None:
    model, x = resnet110.build_model(2, 4), torch.randn(2, 3, 16, 16)
    for options in ({"coarse": "identity"}, {"preprocess": "identity"}):
        with pytest.raises(SynthesisError, match="'identity' leads from"):
            pnn.compile(model, x, stages=3, **options)  # type: ignore[arg-type]
