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


class ReadsWeights(nn.Module):
    """Reads its weights or buffers by other means than attributes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(4, 4), nn.BatchNorm1d(4), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.no_grad():
            if self.kind == "state_dict":
                scale = self.state_dict()["first.bias"].sum()
            elif self.kind == "parameters":
                scale = sum((p.norm() for p in self.parameters()), torch.zeros(()))
            else:
                scale = dict(self.named_buffers())["last.running_var"].mean()
        return self.last(y) * scale


@pytest.mark.parametrize("kind", ["state_dict", "parameters", "buffers"])
def test_what_is_computed_from_weights_is_no_constant(kind: str) -> None:
    model = ReadsWeights(kind)
    captured = capture(model, (torch.randn(3, 4),)).module
    x = torch.randn(5, 4)
    for _ in range(2):
        with torch.no_grad():
            for parameter in (*model.parameters(), *captured.parameters()):
                parameter.mul_(1.5)
        for train in (True, False):
            torch.testing.assert_close(captured.train(train)(x), model.train(train)(x))


def rows(x: Tensor, layout: torch.layout = torch.strided) -> Tensor:
    nested: Tensor = torch.nested.as_nested_tensor([x[0, :2], x[1, :3]], layout=layout)
    return nested


class Ragged(nn.Module):
    """Rows of several lengths: in a buffer, inside of forward, or as the output."""

    def __init__(self, where: str, layout: torch.layout = torch.strided) -> None:
        super().__init__()
        self.where, self.layout = where, layout
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if where == "buffer":
            self.register_buffer("table", rows(torch.zeros(2, 3, 4)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.where == "buffer":
            return y
        ragged: Tensor = rows(y, self.layout)
        if self.where == "output":
            return ragged
        return torch.nested.to_padded_tensor(self.body(torch.tanh(ragged)), 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_named_with_what_to_do(layout: torch.layout) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(CaptureError, match=r"example input \[0\] of Linear is nested.*pad them"):
        capture(nn.Linear(4, 4), (rows(x, layout),))
    with pytest.raises(CaptureError, match=r"buffer 'table' of Ragged is nested.*pad them"):
        capture(Ragged("buffer"), (x,))
    with pytest.raises(CaptureError, match=r"Ragged returns a nested tensor.*pad them"):
        capture(Ragged("output", layout), (x,))
    with pytest.raises(CaptureError, match=r"(?s)cannot be captured.*nested_tensor"):
        capture(Ragged("inside", layout), (x,))
