"""Buffers and inputs that forward writes, and constants among the arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from tests.models.builders import block_chain

WIDTH = 8


class Chain(nn.Module):
    """A chain of blocks and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block_chain(4, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        return self.head(self.body(x))


class Averages(Chain):
    """Keeps a moving average of its activations, as teachers and codebooks do."""

    average: Tensor

    def __init__(self, always: bool, sets: bool) -> None:
        super().__init__()
        self.always, self.sets = always, sets
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        y = self.body(x)
        if (self.training or self.always) and self.sets:
            self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        elif self.training or self.always:
            with torch.no_grad():
                self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y if self.always else y - self.average


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("sets", [False, True])
def test_averages_are_kept_without_gradients(always: bool, sets: bool) -> None:
    """Written ones became part of a graph that grew with every step; set ones were refused."""
    model, x = Averages(always, sets), torch.randn(4, WIDTH)
    network = pnn.compile(model, x, stages=2).sequential
    for _ in range(3):
        for module in (model, network):
            module(x).square().mean().backward()
    buffers = [buffer for name, buffer in network.named_buffers() if "average" in name]
    assert all(buffer.is_leaf and not buffer.requires_grad for buffer in buffers)
    torch.testing.assert_close(buffers[0], model.average)
    assert torch.equal(network.eval()(x), model.eval()(x))


def test_a_write_into_an_input_is_noted() -> None:
    class Scales(Chain):
        def forward(self, x: Tensor, extra: Any = None) -> Tensor:
            x.mul_(2)
            return super().forward(x)

    model, x = Scales(), torch.randn(3, WIDTH)
    compiled = pnn.compile(model, x, stages=2)
    assert any("forward writes into x" in note for note in compiled.program.capture.notes)
    before = x.clone()
    result = compiled.sequential(x)
    assert torch.equal(x, before)
    assert torch.equal(result, model(x))


def test_constants_may_be_passed_where_the_model_takes_them() -> None:
    class Chooses(Chain):
        def forward(self, x: Tensor, extra: Any = None, power: int = 1) -> Tensor:
            x = super().forward(x) ** power
            return getattr(torch, extra)(x)

    model, x = Chooses(), torch.randn(3, WIDTH)
    network = pnn.compile(model, (x, "tanh", 2), stages=2).sequential
    for args in ((x, "tanh", 2), (x, "tanh"), (x,)):
        assert torch.equal(network(*args), model(x, "tanh", 2))
    with pytest.raises(pnn.OptionError, match="power"):
        network(x, "tanh", 3)
