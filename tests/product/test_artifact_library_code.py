"""Whole artifacts of models with parametrized weights, or operators of a library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import pnn_compile as pnn
from passes.capture.refold import GroupedMatmul
from passes.errors import ArtifactError
from pnn_compile.artifact.modules import Parametrization, build
from tests.support.parity import assert_same_step, step

WIDTH = 6


class Mirrored(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(-1)


def mirrored(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Mirrored())
    return layer


class Block(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm = wrap(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)), nn.GroupNorm(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(torch.relu(self.conv(x)))


def assert_whole(model: nn.Module, x: Tensor, folder: Path) -> pnn.Compiled:
    """Compile, save and load; the stages of what comes back are the model, gradients included."""
    compiled = pnn.compile(model, x, stages=2)
    again = pnn.load(compiled.save(folder))
    for train in (True, False):
        expected = step(model, (x,), train=train)
        assert_same_step(step(again.program.module, (x,), train=train), expected)
    assert again.verify().ok
    return compiled


@pytest.mark.parametrize(
    ("wrap", "rung"),
    [
        (lambda layer: parametrizations.weight_norm(layer, dim=2), "torch.fx trace"),
        (parametrizations.spectral_norm, "torch.fx trace"),
        (mirrored, "torch.export"),
    ],
)
def test_parametrized_weights_are_stored(
    wrap: Callable[[nn.Module], nn.Module], rung: str, tmp_path: Path
) -> None:
    model = nn.Sequential(Block(wrap), Block(wrap))
    compiled = assert_whole(model, torch.randn(3, WIDTH, 7), tmp_path / "a")
    assert compiled.program.capture.rung == rung


@pytest.mark.parametrize(
    ("name", "parameter", "arguments"),
    [
        ("os.system", "weight", {}),
        ("torch.nn.utils.parametrizations.weight_norm", "forward", {}),
        ("torch.nn.utils.parametrizations.weight_norm", "weight", {"dim": "x"}),
        ("torch.nn.utils.parametrizations.weight_norm", "weight", {"module": 1}),
        ("torch.nn.utils.parametrizations.spectral_norm", "weight", {"n_power_iterations": 10**9}),
    ],
)
def test_parametrizations_of_a_file_are_those_of_a_list(
    name: str, parameter: str, arguments: dict[str, Any]
) -> None:
    records: dict[str, list[Parametrization]]
    records = {parameter: [{"class": name, "arguments": arguments}]}
    with pytest.raises(ArtifactError):
        build("torch.nn.Linear", {"in_features": 2, "out_features": 2}, records)


@torch.library.custom_op("pnn_tests::gate", mutates_args=())
def gate(x: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(x @ weight) * 2


@torch.library.custom_op("pnn_tests::rounded", mutates_args=())
def rounded(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).round()


@rounded.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def backward_of_gate(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = context.saved_tensors
    gradient = 2 * gradient * (x @ weight > 0)
    return gradient @ weight.T, x.T @ gradient


def straight_through(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = context.saved_tensors
    return gradient @ weight.T, x.T @ gradient


gate.register_autograd(backward_of_gate, setup_context=keep)
rounded.register_autograd(straight_through, setup_context=keep)


class Gated(nn.Module):
    def __init__(self, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.LayerNorm(WIDTH)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.operator(self.norm(x), self.weight)
        return y


def test_operators_of_a_library_are_entered(tmp_path: Path) -> None:
    model = nn.Sequential(Gated(gate), Gated(gate), Gated(gate))
    compiled = assert_whole(model, torch.randn(3, WIDTH), tmp_path / "a")
    assert "entered" in compiled.program.capture.rung


def test_an_operator_with_a_backward_of_its_own_stays_one_call(tmp_path: Path) -> None:
    model, x = nn.Sequential(Gated(rounded), Gated(rounded), Gated(rounded)), torch.randn(3, WIDTH)
    compiled = pnn.compile(model, x, stages=2)
    assert_same_step(step(compiled.program.module, (x,), train=True), step(model, (x,), train=True))
    with pytest.raises(ArtifactError, match=r"pnn_tests\.rounded"):
        pnn.load(compiled.save(tmp_path / "a"))


@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 1, 6], [0, 0, 0]])
def test_groups_of_rows_have_a_matrix_each(
    ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, offsets = torch.randn(6, 4), torch.randn(3, 4, 2), torch.tensor(ends)
    expected = torch.zeros(6, 2)
    for start, end, matrix in zip([0, *ends], ends, weight, strict=False):
        expected[start:end] = x[start:end] @ matrix
    torch.testing.assert_close(GroupedMatmul()(x, weight, offsets), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(GroupedMatmul()(x, weight, offsets), expected)
    assert GroupedMatmul()(*(t.to("meta") for t in (x, weight, offsets))).shape == (6, 2)
