"""What stands in the way of every front end is said, with the line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.capture.ladder import capture
from passes.errors import CaptureError


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = torch.cond(y.mean() > 0, lambda a: a * 2, lambda a: a - 1, (y,))
        return y


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
def test_a_conditional_operator_is_named() -> None:
    with pytest.raises(CaptureError, match=r"forward calls torch\.cond at .*\.py:\d+"):
        capture(Conditional(), (torch.randn(3, 4),))


class DropThenBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.body(x))
        return y if y.abs().max() > 1.0 else y * 2.0


def test_a_branch_on_values_behind_dropout_is_no_random_decision() -> None:
    message = r"in training mode, Python reads at .*\.py:\d+ values of the model"
    with pytest.raises(CaptureError, match=message):
        capture(DropThenBranch(), (torch.randn(3, 4),))
