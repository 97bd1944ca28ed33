"""Small models that many tests share; a model with one shape of graph of its own is in the zoo."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[], nn.Module]


# --- chains ---------------------------------------------------------------------------------------


def block_list(
    count: int,
    width: int,
    *,
    activation: Activation = nn.Tanh,
    norm: bool = False,
    dropout: float | None = None,
) -> list[nn.Module]:
    """Build equal blocks: a linear layer, BatchNorm if asked for, an activation, dropout."""

    def block() -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(width, width)]
        layers += [nn.BatchNorm1d(width)] if norm else []
        layers += [activation()]
        layers += [nn.Dropout(dropout)] if dropout is not None else []
        return nn.Sequential(*layers)

    return [block() for _ in range(count)]


def block_chain(
    count: int,
    width: int,
    *,
    activation: Activation = nn.Tanh,
    norm: bool = False,
    dropout: float | None = None,
) -> nn.Sequential:
    """Chain the blocks of `block_list`; each stays a module of its own."""
    return nn.Sequential(
        *block_list(count, width, activation=activation, norm=norm, dropout=dropout)
    )


def mlp(count: int, width: int, activation: Activation = nn.Tanh) -> nn.Sequential:
    """Chain linear layers and activations without a module around each pair."""
    layers = [layer for _ in range(count) for layer in (nn.Linear(width, width), activation())]
    return nn.Sequential(*layers)


def linear_chain(count: int, width: int) -> nn.Sequential:
    """Chain linear layers and nothing else."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


class Residual(nn.Module):
    """x + scale * tanh(linear(x)): a time step of an ordinary differential equation."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(width, width), scale

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        return x + (y if self.scale == 1.0 else self.scale * y)


def residual_chain(count: int, width: int, scale: float = 1.0) -> nn.Sequential:
    """Chain residual blocks of one layer."""
    return nn.Sequential(*(Residual(width, scale) for _ in range(count)))


class ResidualMLP(nn.Module):
    """x + mlp(x), with a hidden layer."""

    def __init__(self, width: int, hidden: int, activation: Activation = nn.ReLU) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


# --- one property each ----------------------------------------------------------------------------


class Exported(nn.Module):
    """Asks for a shape, which a tracing proxy does not know: only torch.export captures it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.shape[-1] < 100 else x


class Shifts(nn.Module):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5)


class Table(nn.Module):
    """Adds a row of a buffer, so that another table must change the output."""

    table: Tensor

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.layers = body
        self.register_buffer("table", torch.ones(3, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + self.table[:1])


class LanguageModel(nn.Module):
    """Takes token ids and labels; returns logits and their loss."""

    def __init__(self, body: nn.Module, width: int, vocabulary: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.body = body
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(self.embedding(ids)))
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())
