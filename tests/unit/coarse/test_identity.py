"""Family `identity`: layers that read one state, and are added."""

from typing import Literal

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import resnet110


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


def test_where_the_type_changes_copied_layers_or_channel_maps_take_its_place() -> None:
    model, x = resnet110.build_model(2, 4), torch.randn(2, 3, 16, 16)
    compiled = pnn.compile(
        model, x, stages=3, windows=2, preprocess="identity", coarse="identity"
    )  # fmt: skip
    stages = [stage for stage in compiled.plan.stages if stage.preprocess and stage.coarse]
    families = [(stage.preprocess.family, stage.coarse.family) for stage in stages]  # type: ignore[union-attr]
    # Past the copied stem; in front of the first change; in the second window before its change,
    # and past it, where the layers to copy would be more than a stage.
    assert families == [
        ("identity", "identity"),
        ("identity", "linear"),
        ("identity", "linear"),
        ("linear", "identity"),
    ]
    assert "the stage changes the type" in stages[1].coarse.why  # type: ignore[union-attr]
    assert compiled.verify().ok
