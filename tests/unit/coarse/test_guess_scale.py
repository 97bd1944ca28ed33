"""The scale of states and gradients in a fresh parareal network, for any number of stages."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import pnn_compile as pnn
from examples import decoder, resnet110
from tests.support.parameters import grid


@functools.cache
def fresh(kind: str, stages: int, coarse: str) -> tuple[pnn.Compiled, Tensor]:
    """An untrained network in so many stages, with a batch for it."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "resnet":
        model, x = resnet110.build_model(6, 4), torch.randn(8, 3, 16, 16)
    else:
        model = decoder.build_model(layers=12, width=32, vocabulary=64, context=16, dropout=0.0)
        x = torch.randint(64, (4, 16))
    return pnn.compile(model, x, stages=stages, coarse=coarse, coarse_budget=1.0), x


def values(module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Every tensor of a run in training mode, by the name of its node or of what it calls."""
    values: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                values[str(n.target) if n.op == "call_module" else n.name] = value
            return value

    with torch.no_grad():
        Recorder(module.train()).run(x)
    return values


def gradients(module: nn.Module, compiled: pnn.Compiled, x: Tensor) -> list[float]:
    """Norms of the gradients of the fine stages, for the mean square of the logits."""
    compiled.module.zero_grad()
    module.train()(x).square().mean().backward()
    return [norm(stage) for stage in compiled.stages.fine]


def norm(module: nn.Module) -> float:
    """Norm of the gradient of all parameters."""
    norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return torch.stack(norms).norm().item()


CASES = pytest.mark.parametrize(
    ("kind", "stages", "coarse"),
    grid(("resnet", "decoder"), (3, 6, 12), ("linear", "units")),
)


@CASES
def test_the_last_state_does_not_grow_with_the_number_of_stages(
    kind: str, stages: int, coarse: str
) -> None:
    """Identity-initialized corrections telescope: the guesses cancel, the branches are summed."""
    compiled, x = fresh(kind, stages, coarse)
    true = values(compiled.sequential, x)[f"fine_{stages - 1}"].std()
    last = values(compiled.module, x)[f"u_{stages - 1}"].std()

    assert 0.5 < (last / true).item() < 2


@CASES
def test_no_gradient_explodes_or_is_cut_off(kind: str, stages: int, coarse: str) -> None:
    compiled, x = fresh(kind, stages, coarse)
    expected = gradients(compiled.sequential, compiled, x)
    actual = gradients(compiled.module, compiled, x)

    # The first stages of an image network get less: each change of resolution on the way averages
    # four pixels and doubles the channels. It is a factor per change, not per stage.
    assert max(actual) < 5 * max(expected)
    assert 0.2 < actual[-1] / expected[-1] < 5
    assert min(actual) > (0.005 if kind == "resnet" else 0.1) * max(actual)
    for operator in (*compiled.operators.preprocess.values(), *compiled.operators.coarse.values()):
        assert 0.002 * max(expected) < norm(operator) < 5 * max(expected)
