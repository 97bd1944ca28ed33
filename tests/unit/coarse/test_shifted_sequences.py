"""Generative models predict a position from those before it: no guess may show it to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from tests.support.parameters import grid
from tests.support.programs import analyze_model

VOCABULARY = 11


class Convolution(nn.Module):
    """Convolves over a position and those before it, in `[B, C, T]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.convolution(F.pad(x, (2, 0))))


def _blocks(count: int = 9) -> nn.Sequential:
    return nn.Sequential(*(Convolution(16) for _ in range(count)))


class Signal(nn.Module):
    """Predicts a signal `[B, C, T]` from what comes before (WaveNet, van den Oord et al., 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inlet, self.blocks = nn.Conv1d(3, 16, width), _blocks()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.inlet(F.pad(x, (self.width, -1))))


class Tokens(nn.Module):
    """Shifts token ids, their embedding, or the state after some blocks; outputs `[B, C, T]`."""

    def __init__(self, shifted: str) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(VOCABULARY, 16), _blocks()
        self.shifted = shifted

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(F.pad(ids, (1, -1)) if self.shifted == "ids" else ids).mT
        if self.shifted == "embedding":
            x = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)
        for index, block in enumerate(self.blocks):
            x = block(F.pad(x, (1, -1)) if self.shifted == f"block {index}" else x)
        return F.pad(x, (1, -1)) if self.shifted == "end" else x


class Conditioned(nn.Module):
    """Predicts tokens from those before and a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.condition = nn.Embedding(VOCABULARY, 16), nn.Linear(5, 16)
        self.blocks = _blocks()

    def forward(self, ids: Tensor, condition: Tensor) -> Tensor:
        x = F.pad(self.embedding(ids), (0, 0, 1, -1)) + self.condition(condition)[:, None]
        return self.blocks(x.mT)


class Masked(nn.Conv2d):
    """A convolution that reads pixels before its own, in rows, and its own if asked to."""

    mask: Tensor

    def __init__(self, channels: int, out_channels: int, size: int, own: bool) -> None:
        super().__init__(channels, out_channels, size, padding=size // 2)
        mask = torch.ones(size * size)
        mask[size * size // 2 + own :] = 0
        self.register_buffer("mask", mask.view(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class Pixels(nn.Module):
    """Predicts pixels from those before (PixelCNN, van den Oord et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = Masked(3, 16, 5, own=False)
        self.blocks = nn.Sequential(
            *(nn.Sequential(Masked(16, 16, 3, own=True), nn.Tanh()) for _ in range(9))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.inlet(x))


class Stacks(nn.Module):
    """PixelCNN in two stacks: of the rows above, and of the pixels to the left."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.above, self.left = nn.Conv2d(3, width, (2, 3)), nn.Conv2d(3, width, (1, 2))
        self.rows = nn.ModuleList(nn.Conv2d(width, width, (2, 3)) for _ in range(6))
        self.pixels = nn.ModuleList(nn.Conv2d(width, width, (1, 2)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        above = self.above(F.pad(x, (1, 1, 2, -1)))
        left = self.left(F.pad(x, (2, -1, 0, 0))) + above
        for row, pixel in zip(self.rows, self.pixels, strict=True):
            above = above + torch.relu(row(F.pad(above, (1, 1, 1, 0))))
            left = left + torch.relu(pixel(F.pad(left, (1, 0, 0, 0)))) + above
        return left


def _seen(network: nn.Module, x: Tensor, *others: Tensor) -> float:
    """Return by how much an output moves with its own position of the input, and those after."""
    moved, start = 0.0, 1 if x.dim() == 2 else 2
    with torch.no_grad():
        expected = network(x, *others).flatten(2)
        for position in range(expected.shape[-1]):
            other = x.flatten(start).clone()
            later = other[..., position:]
            later.copy_(later + 1 if x.is_floating_point() else (later + 3) % VOCABULARY)
            change = network(other.view_as(x), *others).flatten(2) - expected
            moved = max(moved, change[..., : position + 1].abs().max().item())
    return moved


IDS, SIGNAL, IMAGE = torch.randint(0, VOCABULARY, (2, 12)), (2, 3, 12), (2, 3, 6, 8)
MODELS: list[tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = [
    (lambda: Signal(1), (torch.randn(SIGNAL),)),
    (lambda: Signal(3), (torch.randn(SIGNAL),)),
    (lambda: Tokens("ids"), (IDS,)),
    (lambda: Tokens("embedding"), (IDS,)),
    (lambda: Tokens("block 4"), (IDS,)),
    (lambda: Tokens("end"), (IDS,)),
    (Conditioned, (IDS, torch.randn(2, 5))),
    (Pixels, (torch.randn(IMAGE),)),
    (Stacks, (torch.randn(IMAGE),)),
]
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"coarse": "linear"}, {"coarse": "layers"}, {"preprocess": "lowrank"},
    {"preprocess": "linear", "prologue": 0.2}, {"sweep": "collapsed"},
    {"preprocess": "linear", "windows": 2},
)  # fmt: skip


@pytest.mark.parametrize(("build", "inputs", "options"), grid(MODELS, OPTIONS))
def test_nothing_shows_a_position_that_is_predicted(
    build: Callable[[], nn.Module], inputs: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    assert _seen(model, *inputs) == 0
    network = pnn.compile(model, inputs, stages=3, **options).module.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert _seen(network, *inputs) < 1e-5


@pytest.mark.parametrize(
    ("model", "inputs", "sources"),
    [
        (Signal(1), (torch.randn(SIGNAL),), ["x", "inlet"]),
        (Tokens("ids"), (IDS,), ["getattr_1"]),
        (Tokens("end"), (IDS,), ["getattr_1"]),
        (Conditioned(), (IDS, torch.randn(2, 5)), ["getattr_1", "condition"]),
        (Pixels(), (torch.randn(IMAGE),), ["x", "conv2d"]),
    ],
)
def test_guesses_start_after_the_shift(
    model: nn.Module, inputs: tuple[Tensor, ...], sources: list[str]
) -> None:
    assert [source.node.name for source in analyze_model(model, *inputs).sources] == sources


def test_no_cut_lies_after_a_late_shift() -> None:
    frontiers = analyze_model(Tokens("block 4"), IDS).frontiers
    assert any("after a shift that no stage can repeat" in reason for reason in frontiers.refused)
    assert max(position.index for position in frontiers.positions) == 4 * 4 + 2
