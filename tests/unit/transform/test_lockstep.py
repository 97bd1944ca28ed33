"""Stages of a loop as one batched call: the numbers of single calls, in fewer calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from passes.errors import OptionError
from passes.transform.lockstep import chained_stages
from passes.transform.sweep import Role, sweep
from tests.models import loops


def _compiled(model: nn.Module, inputs: Any, **options: Any) -> pnn.Compiled:
    return pnn.compile(model.eval(), inputs, **{"stages": 5, **options})


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention on a CPU
@pytest.mark.parametrize(
    "model", [loops.DDIM, loops.DDIMNumbers, loops.Guided, loops.Ancestral, loops.Multistep,
              loops.Recurrent],
)  # fmt: skip
def test_batched_stages_are_the_stages(model: type[nn.Module]) -> None:
    """Twelve steps on five devices: stages of three steps and of two."""
    torch.manual_seed(0)
    compiled = _compiled(model(), loops.inputs(model), coarse="time_step")
    inputs = loops.inputs(model, batch=3)
    for iterations in (1, 2, 5):
        apart = compiled.iterate(inputs, iterations=iterations)
        batched = compiled.iterate(inputs, iterations=iterations, batched=True)
        torch.testing.assert_close(batched.outputs, apart.outputs)
        torch.testing.assert_close(batched.increments, apart.increments, rtol=1e-2, atol=1e-6)


def test_as_many_calls_as_the_longest_stage() -> None:
    model = loops.Euler()
    compiled = _compiled(model, inputs := loops.inputs(loops.Euler), stages=4)
    calls: list[torch.Size] = []
    layer = compiled.stages.fine[0].get_submodule("net.last")
    layer.register_forward_hook(lambda *arguments: calls.append(arguments[-1].shape))
    counts = []
    for batched in (False, True):
        calls.clear()
        compiled.iterate(inputs, iterations=1, batched=batched)
        counts.append(len(calls))
    # One coarse step to the first guess, three to the next ones and past the last, three in the
    # sweep; twelve steps one by one, or three of all four stages.
    assert counts == [7 + 12, 7 + 3]


class _Table(nn.Module):
    """Step sizes from a buffer."""

    times: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.register_buffer("times", torch.linspace(0, 1, 7) ** 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(6):
            x = x + (self.times[i + 1] - self.times[i]) * self.field(x)
        return x


class _Items(_Table):
    """Times as numbers of a schedule, constants made in the loop, and an embedding of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, time in enumerate(torch.arange(6)):
            e = self.field(x + self.embed(time))
            x = x + self.times[time] * e / 6 + torch.tensor(0.1 * i)
        return x


def test_what_differs_from_stage_to_stage_is_computed_for_each() -> None:
    torch.manual_seed(0)
    compiled = _compiled(_Items(), x := torch.randn(4, 8), stages=3, coarse="time_step")
    batched = compiled.iterate(x, iterations=2, batched=True).outputs
    torch.testing.assert_close(batched, compiled.iterate(x, iterations=2).outputs)


def test_weights_and_tables_are_those_of_now() -> None:
    torch.manual_seed(0)
    compiled = _compiled(_Table(), x := torch.randn(4, 8), stages=3)
    compiled.iterate(x, batched=True)
    compiled.module.double()
    with torch.no_grad():
        next(compiled.module.parameters()).mul_(1.5)
    batched = compiled.iterate(x.double(), iterations=2, batched=True).outputs
    assert batched.dtype == torch.float64
    torch.testing.assert_close(batched, compiled.iterate(x.double(), iterations=2).outputs)


class _Rolls(loops.Euler):
    """A number that no tensor can stand for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.steps):
            x = x + self.net(x.roll(i, 1), torch.full((x.shape[0],), 0.5)) / self.steps
        return x


def test_what_cannot_be_batched_is_refused_with_a_reason() -> None:
    chain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    compiled = _compiled(chain, x := torch.randn(2, 4), stages=2)
    with pytest.raises(OptionError, match=r"preprocess=.time_step. can"):
        compiled.iterate(x, batched=True)
    compiled = _compiled(_Rolls(), x := torch.randn(4, 8), coarse="time_step")
    with pytest.raises(OptionError, match=r"one batch: .*roll.*; leave out batched=True"):
        compiled.iterate(x, batched=True)


def test_a_guess_is_the_prediction_before_it_where_it_is_the_same_chain() -> None:
    plan = _compiled(loops.DDIM(), loops.inputs(loops.DDIM), stages=4).plan
    assert chained_stages(plan) == {2, 3}
    steps = sweep(4, predicts=True, chained=chained_stages(plan))
    assert [s.stage for s in steps if s.role is Role.PREPROCESS] == [1]
    first = [str(s) for s in steps if s.role is Role.COARSE and s.writes.letter == "p"]
    assert first == ["p_1 <- coarse_1(x_1)", "p_2 <- coarse_2(p_1)", "p_3 <- coarse_3(p_2)"]
    uneven = _compiled(loops.DDIM(), loops.inputs(loops.DDIM)).plan
    assert chained_stages(uneven) < {2, 3, 4}
