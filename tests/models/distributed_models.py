"""Small networks that compile in a moment, for tests on several ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn

__all__ = ["WIDTH", "Blocks", "Tied", "batches", "loss", "network"]

WIDTH = 8


class Blocks(nn.Module):
    """Residual blocks with, where wanted, BatchNorm and dropout."""

    def __init__(self, depth: int = 6, *, norm: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH),
                nn.BatchNorm1d(WIDTH) if norm else nn.Identity(),
                nn.Tanh(),
                nn.Dropout(dropout),
            )
            for _ in range(depth)
        )
        self.top = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.top(x)


class Tied(Blocks):
    """The last layer has the weight of the first one."""

    def __init__(self, depth: int = 6, *, norm: bool = False, dropout: float = 0.1) -> None:
        super().__init__(depth, norm=norm, dropout=dropout)
        self.top.weight = self.stem.weight


def network(stages: int, kind: str = "blocks", **options: Any) -> pnn.Compiled:
    """A compiled network, the same every time."""
    torch.manual_seed(0)
    model = {"blocks": Blocks, "tied": Tied}[kind](**options)
    return pnn.compile(model, torch.randn(4, WIDTH), stages=stages, coarse_budget=1.0)


def batches(count: int, samples: int = 4) -> list[Tensor]:
    """Inputs, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, WIDTH, generator=generator) for _ in range(count)]


def loss(outputs: Tensor, batch: Any) -> Tensor:
    """The distance from one."""
    return F.mse_loss(outputs, torch.ones_like(outputs))
