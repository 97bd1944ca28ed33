"""Guesses read no position that the model masks, and mix no samples that it keeps apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from passes.capture.refold import dropouts
from tests.support.parameters import grid
from tests.support.programs import analyze_model

SAMPLES, LENGTH, WIDTH = 3, 6, 8
MASK = (torch.arange(LENGTH) < torch.tensor([4, 3, 5])[:, None]).float()


def written(x: Tensor, mask: Tensor) -> Tensor:
    x = x.clone()
    x[mask == 0] = 0.0
    return x


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda x, mask: x * mask[..., None],
    "where": lambda x, mask: torch.where(mask[..., None] > 0, x, torch.zeros_like(x)),
    "masked_fill": lambda x, mask: x.masked_fill(mask[..., None] == 0, 0.0),
    "written": written,
    "mean": lambda x, mask: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "added": lambda x, mask: (x + 1) * mask[..., None],
}


class Masked(nn.Module):
    """Masks its input, or what it looks up, before the first layer."""

    def __init__(self, kind: str, embeds: bool = False, dropout: float = 0) -> None:
        super().__init__()
        embedding = nn.Embedding(9, WIDTH) if embeds else nn.Identity()
        self.embedding = nn.Sequential(embedding, nn.Dropout(dropout)) if dropout else embedding
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.kind = kind

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = MASKED[self.kind](self.embedding(x), mask)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def shuffled(compiled: pnn.Compiled) -> nn.Module:
    """Return the network with other weights in guesses and corrections: some begin at zero."""
    network = compiled.module.eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "coarse" in name or "preprocess" in name:
                parameter.add_(torch.randn_like(parameter))
    return network


OPTIONS: tuple[dict[str, str], ...] = (
    {},
    {"preprocess": "lowrank"},
    {"preprocess": "conv", "coarse": "conv"},
)


@pytest.mark.parametrize(("kind", "options"), grid(tuple(MASKED), OPTIONS))
@pytest.mark.parametrize(("embeds", "dropout"), [(False, 0), (True, 0), (True, 0.5)])
def test_masked_positions_do_not_move_the_prediction(
    kind: str, options: dict[str, str], embeds: bool, dropout: float
) -> None:
    model = Masked(kind, embeds, dropout).eval()
    x = torch.randint(0, 9, (SAMPLES, LENGTH)) if embeds else torch.randn(SAMPLES, LENGTH, WIDTH)
    compiled = pnn.compile(model, (x, MASK), stages=3, **options)  # type: ignore[arg-type]
    if kind != "mean":
        sources = compiled.plan.stages[1].preprocess.options.sources  # type: ignore[union-attr]
        assert len(sources) == 2  # what is masked, and the mask
    assert not any(dropouts(m) for n, m in compiled.module.named_children() if "preprocess" in n)
    network = shuffled(compiled)
    kept = MASK.bool() if embeds else MASK.bool()[..., None]
    changed = torch.where(kept, x, (x + 1) % 9 if embeds else -3 * x)
    expected, found = (
        model(changed, MASK) - model(x, MASK),
        network(changed, MASK) - network(x, MASK),
    )
    assert not found[expected == 0].any()


WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fill": lambda s, m, v: s.masked_fill(~m, -1e9).softmax(-1) @ v,
    "bias": lambda s, m, v: F.softmax(torch.where(m, 0.0, -1e9) + s / 2, -1) @ v,
    "where": lambda s, m, v: torch.where(m, s, torch.full_like(s, -1e9)).softmax(-1) @ v,
    "sum": lambda s, m, v: (s.exp() * m / (s.exp() * m).sum(-1, keepdim=True)) @ v,
    "tril": lambda s, m, v: torch.einsum("bts,bsd->btd", torch.tril(s), v),
}


class Attending(nn.Module):
    """Attends to earlier positions, between two layers."""

    mask: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().bool())
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x, value = self.layers[0](x), self.layers[1](x)
        scores = self.dropout(x @ value.transpose(1, 2))
        return self.layers[2](WEIGHTS[self.kind](scores, self.mask, value))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_cut_between_scores_a_mask_and_what_it_hides(kind: str) -> None:
    result = analyze_model(Attending(kind), torch.randn(2, LENGTH, WIDTH))
    states = [position.specs for position in result.frontiers.positions]
    assert len(states) >= 3
    assert all(WIDTH in spec.shape for specs in states for spec in specs)


class DroppedMask(nn.Module):
    """Draws at random which positions it hides, once for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        bias = self.dropout((1 - mask) * -1e4)[:, None]
        for layer in self.layers:
            x = x + torch.tanh(layer((x @ x.transpose(1, 2) + bias).softmax(-1) @ x))
        return x


def test_a_mask_with_dropout_is_not_guessed() -> None:
    result = analyze_model(DroppedMask(), torch.randn(SAMPLES, LENGTH, WIDTH), MASK)
    names = {node.name for position in result.frontiers.positions for node in position.state}
    assert not names & {"dropout", "getitem", "add_10", "softmax_5"}
    assert "add_9" in names  # it has read the mask for the last time


class Writing(nn.Module):
    """Writes what its layers compute into new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = x.new_zeros(x.shape)
            y[:, ::2] = torch.tanh(layer(x))[:, ::2]
            x = x + y
        return x


def test_what_layers_are_written_into_is_no_mask() -> None:
    """All of the network was a side value, to be computed again in every stage."""
    result = analyze_model(Writing(), torch.randn(3, WIDTH))
    assert not any(node.op == "call_module" for node in result.frontiers.recomputable)
    assert len(result.frontiers.positions) >= 4


class Ragged(nn.Module):
    """Averages rows with those of their own sample alone, which end at given rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        sample = (torch.arange(x.shape[0])[:, None] >= ends).sum(1)
        weights = (sample[:, None] == sample).to(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(weights @ x / weights.sum(1, keepdim=True)))
        return x


def test_rows_of_several_samples_are_not_mixed() -> None:
    model, x, ends = Ragged().eval(), torch.randn(9, WIDTH), torch.tensor([2, 5, 9])
    network = shuffled(pnn.compile(model, (x, ends), stages=3))
    changed = x.clone()
    changed[:2] += 1
    assert torch.equal(network(changed, ends)[2:], network(x, ends)[2:])


class Turned(nn.Module):
    """Takes `[T, B, C]` and works on `[B, T, C]`, or on `[B, C]`."""

    def __init__(self, pools: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(0) if self.pools else x.transpose(0, 1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("pools", [False, True])
def test_as_many_times_as_samples_are_not_confused(pools: bool) -> None:
    model, x = Turned(pools).eval(), torch.randn(4, 4, WIDTH)
    if pools:
        with pytest.raises(pnn.PnnError, match="without a batch axis"):
            pnn.compile(model, x, stages=3, dynamic=())
        return
    network = shuffled(pnn.compile(model, x, stages=3, dynamic=()))
    changed = x.clone()
    changed[:, 1] += 1
    moved = (network(changed) != network(x)).flatten(1).any(1)
    assert moved.tolist() == [False, True, False, False]
