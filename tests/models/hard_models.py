"""Models of the zoo that set traps: writes, control flow, and gradients of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.topologies import WIDTH, mlp_block

# --- writes ---------------------------------------------------------------------------------------


class ViewWrite(nn.Module):
    """A network that changes a hidden state through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(torch.tanh(x))
            x[:, 0].add_(1.0)
        return x


class SliceAssignment(nn.Module):
    """The same with an assignment to a slice, which a tracing proxy does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(torch.tanh(x))
            x[:, :2] = 1.0
        return x


class RunningMean(nn.Module):
    """A layer that subtracts a mean which it updates by hand at every call."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean.lerp_(y.detach().mean(dim=0), 0.1)
        return torch.tanh(y - self.mean)


class StepCounter(nn.Module):
    """A layer that counts its calls and uses the count, which tracing must not freeze."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return torch.tanh(self.linear(x) + 0.1 * self.steps)


def repeat(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder of a chain of seven such layers."""
    return lambda: nn.Sequential(*(layer() for _ in range(7)))


# --- control flow and gradients of one's own ------------------------------------------------------


class ShapeBranch(nn.Module):
    """A network whose Python code asks for a shape, which a tracing proxy does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = mlp_block(6)
        self.narrow = mlp_block(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) if x.shape[-1] > 8 else self.narrow(x)


class UnrolledLSTM(nn.Module):
    """A recurrent cell in a Python loop over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            hidden, cell = self.cell(x[:, step], (hidden, cell))
        return self.head(hidden)


class DataBranch(nn.Module):
    """A network that takes another way for other values."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = mlp_block(6)
        self.negative = mlp_block(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if x.sum() > 0 else self.negative(x)


class StraightThrough(torch.autograd.Function):
    """Round to halves, and pass a clipped gradient as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.round(2.0 * x) / 2.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() < 1.0)


class CustomGradient(nn.Module):
    """A quantised layer (Bengio et al., 2013): its operators alone have a zero gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(self.linear(x))
