from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import pnn_compile as pnn
from passes.capture.ladder import capture
from passes.capture.train_eval import ByMode, merge_modes
from passes.errors import CaptureError
from tests.models.builders import Exported
from tests.support.parameters import grid
from tests.support.parity import assert_same_step, step

WIDTH = 16


class Drops(nn.Module):
    """Drops whole samples of a branch, written as in the libraries of image models."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
        keep.div_(0.7)
        return x * keep


class Floors(nn.Module):
    """The same with a rounded draw, and the division on the other factor."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 0.7 + torch.rand((x.size(0), 1), dtype=x.dtype, device=x.device)
        keep.floor_()
        return x.div(0.7) * keep


class Noise(nn.Module):
    """Adds noise in training mode and scales in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else 0.9 * x


class OwnStatistics(nn.Module):
    """Functional batch normalization over its own buffers, counting its steps."""

    mean: Tensor
    var: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps.add_(1)
        return F.batch_norm(x, self.mean, self.var, self.weight, training=self.training)


class ByHand(nn.Module):
    """Normalises by statistics that it updates by hand in training mode."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.mean(0)
            self.mean.lerp_(mean.detach(), 0.1)
        else:
            mean = self.mean
        return x - mean


class AlwaysOn(nn.Module):
    """Dropout that stays on in evaluation mode, beside one that does not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.dropout(x, 0.2), 0.3, self.training)


class Skips(nn.Module):
    """Calls its dropout in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.drops = nn.Dropout(0.3), Drops()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drops(x)
        return self.dropout(x) if self.training else x


class TwoValues(nn.Module):
    """Gives two values that differ by mode, and reads both later."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            scale, shift = torch.rand_like(x), x.mean()
        else:
            scale, shift = x.sigmoid(), x.max()
        y = torch.tanh(x)
        return y * scale + shift


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.last(torch.tanh(self.first(x))))


def network(kind: type[nn.Module], *, exported: bool = False) -> nn.Module:
    """Chain six blocks."""
    chain = nn.Sequential(*(Block(kind()) for _ in range(6)))
    return Exported(chain) if exported else chain


KINDS = (Drops, Floors, Noise, OwnStatistics, ByHand, AlwaysOn, Skips, TwoValues)


@pytest.mark.parametrize(
    ("kind", "exported", "training"), grid(KINDS, (False, True), (True, False))
)
def test_a_branch_on_the_mode_is_kept_whatever_the_models_mode_was(
    kind: type[nn.Module], exported: bool, training: bool
) -> None:
    model = network(kind, exported=exported).train(training)
    captured = capture(model, (torch.randn(4, WIDTH),))
    x = torch.randn(7, WIDTH)

    assert captured.capture.rung == ("torch.export" if exported else "torch.fx trace")
    assert captured.dynamic == ("batch",)
    assert all(module.training == training for module in captured.module.modules())
    assert {**captured.module.state_dict(), **captured.unused}.keys() == model.state_dict().keys()
    for train in (True, False, True):
        expected = step(model, (x,), train=train)
        assert_same_step(step(captured.module, (x,), train=train), expected)


@pytest.mark.parametrize("kind", [Drops, pytest.param(Skips, marks=pytest.mark.slow), TwoValues])
def test_a_branch_on_the_mode_is_told_cut_and_stored(kind: type[nn.Module], tmp_path: Path) -> None:
    x = torch.randn(4, WIDTH)
    compiled = pnn.compile(network(kind), x, stages=3)

    assert any("branch on self.training in 0.inner" in note for note in compiled.plan.notes)
    compiled.verify(strict=True)
    loaded = pnn.load(compiled.save(tmp_path / "out"))
    loaded.verify(strict=True)
    for train in (True, False):
        expected = step(compiled.module, (x,), train=train)
        assert_same_step(step(loaded.module, (x,), train=train), expected)


def test_equal_blocks_stay_equal() -> None:
    compiled = pnn.compile(network(Drops), torch.randn(4, WIDTH), stages=3)
    assert len(compiled.analysis.trunk_blocks) >= 4


class Extra(nn.Module):
    """Has a layer that only one mode calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        return y + self.extra(y) if self.training else y


def graph_of(model: nn.Module, *, train: bool) -> fx.Graph:
    return fx.Tracer().trace(model.train(train))


@pytest.mark.parametrize(
    ("model", "message"),
    [(Extra(), "module extra has parameters or buffers and is called in one mode only")],
)
def test_what_cannot_be_merged_says_why(model: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        merge_modes(model, graph_of(model, train=True), graph_of(model, train=False))


def test_graphs_without_a_difference_are_left_alone() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    graph = graph_of(model, train=True)
    before = str(graph)

    assert merge_modes(model, graph, graph_of(model, train=False)) == ()
    assert str(graph) == before
    assert not any(isinstance(module, ByMode) for module in model.modules())


class ZeroBranch(nn.Module):
    """A residual block whose branch begins at zero, so that no output shows what drops it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drops = nn.Linear(WIDTH, WIDTH), Drops()
        self.scale = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.drops(self.scale * torch.tanh(self.linear(x)))
        return y


def test_what_drops_a_branch_that_begins_at_zero_is_off_in_evaluation_mode() -> None:
    model = nn.Sequential(*(ZeroBranch() for _ in range(4)))
    x = torch.randn(8, WIDTH)
    program = capture(model, (x,))
    with torch.no_grad():
        for net in (model, program.module):
            for name, parameter in net.named_parameters():
                if name.endswith("scale"):
                    parameter.fill_(1.0)

    assert "both branches are kept" in program.capture.notes[0]
    for train in (True, False):
        expected = step(model, (x,), train=train)
        assert_same_step(step(program.module, (x,), train=train), expected)
