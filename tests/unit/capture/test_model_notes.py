"""Notes name what a graph does not carry over from its model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pnn_compile as pnn
from passes.capture.ladder import capture
from passes.errors import CaptureError
from tests.models.builders import residual_chain

X = torch.linspace(-1, 1, 12).view(3, 4)


def notes(model: nn.Module) -> str:
    return "\n".join(capture(model, (X,)).capture.notes)


def test_a_plain_model_has_no_notes() -> None:
    assert notes(residual_chain(3, 4)) == ""


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_trains_nothing_is_named(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(4, 4), residual_chain(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=reentrant)
            y: Tensor = checkpoint(self.body, x, use_reentrant=reentrant)
            return y

    assert ("does not train what it runs" in notes(Checkpointed())) is reentrant


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_of_modules_that_the_graph_does_not_call_are_named(kind: str) -> None:
    model = residual_chain(3, 4)
    getattr(model[1], f"register_{kind}_hook")(lambda *_: None)
    assert "hooks of 1 are not called" in notes(model)
    model.register_forward_hook(lambda *_: None)
    assert "hooks of the model itself, 1 are not called" in notes(model)


def test_hooks_of_layers_are_called_and_need_no_note() -> None:
    model: Any = residual_chain(3, 4)
    model[1].linear.register_forward_hook(lambda *_: None)
    nn.utils.spectral_norm(model[2].linear)
    assert notes(model) == ""


class Listed(nn.Module):
    """Holds a parameter in a list, of which torch knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scales = [nn.Parameter(torch.full((4,), 2.0))]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scales[0]


class Viewed(nn.Module):
    """Holds a view of a parameter, computed once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.first = self.linear.weight[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.first


OUTSIDE = nn.Parameter(torch.ones(4))


class Global(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * OUTSIDE


@pytest.mark.parametrize(
    ("layer", "name"),
    [(Listed, r"1\.scales\[0\]"), (Global, r"a tensor \[4\] outside")],
)
def test_parameters_that_are_not_registered_are_named(layer: type[nn.Module], name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer())
    program = capture(model, (X,))
    (note,) = program.capture.notes
    assert re.match(f"{name}.*: not registered as parameters", note)
    torch.testing.assert_close(program.module(X), model(X))
    assert not any(buffer.requires_grad for buffer in program.module.buffers())


def test_a_view_that_leads_to_a_parameter_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"1\.first: not registered as parameters"):
        capture(nn.Sequential(nn.Linear(4, 4), Viewed()), (X,))


class Counts(nn.Module):
    """Counts its calls, and may use the count."""

    def __init__(self, *, uses: bool) -> None:
        super().__init__()
        self.calls, self.uses = 0, uses

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls if self.uses else x


def test_an_attribute_that_forward_changes_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counts(uses=False))
    assert "forward changes the attributes 1.calls" in notes(model)
    assert model[1].calls == 0


class Remembers(nn.Module):
    """Adds its state, which is the mean of the last output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = y if self.state is None else y + self.state
        self.state = y.mean().detach()
        return y


def test_a_model_with_state_between_calls_is_told_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Remembers())
    try:
        told = notes(model)
    except CaptureError as error:
        told = str(error)
    assert "forward changes the attributes 1.state" in told


class FrozenNorm(nn.Module):
    """Keeps its norm in evaluation mode, whatever train() is told."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def test_a_train_method_that_keeps_a_layer_in_evaluation_is_followed() -> None:
    frozen: Any = FrozenNorm()
    frozen.norm.running_mean.add_(1.0)
    model = nn.Sequential(nn.Linear(4, 4), frozen, nn.Linear(4, 4)).train()
    compiled = pnn.compile(model, X, stages=2)

    x = torch.randn(5, 4)
    for train in (True, False):
        actual = compiled.sequential.train(train)(x)
        torch.testing.assert_close(actual, model.train(train)(x))
    assert frozen.norm.running_mean.mean() == 1.0
    compiled.verify(strict=True)


class Branching(FrozenNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_train_method_is_named_where_no_graph_is_captured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Branching()).train()
    with pytest.raises(CaptureError, match=r"1 overrides train\(\)"):
        capture(model, (X,))
