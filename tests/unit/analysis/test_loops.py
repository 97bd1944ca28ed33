"""The loop in time of unrolled programs: its steps, where it lies, and its constants."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from passes.analysis.analysis import Analysis, analyze
from passes.analysis.loops import describe
from passes.capture.ladder import capture
from passes.cost.node_facts import observe
from tests.models import loops


def _analysis(model: nn.Module, *inputs: torch.Tensor) -> Analysis:
    program = capture(model.eval(), inputs)
    return analyze(program, observe(program), "flops")


@pytest.mark.parametrize(
    ("model", "start", "after", "steps", "state"),
    [
        (loops.Euler, 0, 0, 12, 1),
        (loops.Heun, 0, 0, 12, 1),
        (loops.DDIM, 0, 0, 12, 1),
        (loops.DDIMNumbers, 0, 0, 12, 1),
        (loops.Guided, 1, 0, 12, 1),
        (loops.Ancestral, 0, 0, 12, 1),
        (loops.Nested, 3, 3, 12, 1),
        (loops.Recurrent, 1, 0, 12, 1),
    ],
)
def test_steps(model: type[nn.Module], start: int, after: int, steps: int, state: int) -> None:
    analysis = _analysis(model(), *loops.inputs(model))
    loop, order = analysis.loop, analysis.frontiers.order
    assert loop is not None
    assert (loop.start, loop.steps, len(loop.positions[0].state)) == (start, steps, state)
    assert loop.positions[-1].index == len(order) - after
    assert start + steps * loop.period + after == len(order)
    assert [loop.step_at(p.index) for p in loop.positions] == [*range(1, steps + 1)]
    assert loop.step_at(loop.start + 1) is (1 if loop.period == 1 else None)
    # The steps are blocks of one signature, and no block of the trunk is without work.
    signatures = Counter(block.signature for block in analysis.trunk_blocks)
    assert signatures.most_common(1)[0][1] >= steps - 1
    assert all(analysis.block_flops(block) for block in analysis.trunk_blocks)


def test_state_of_two_tensors() -> None:
    loop = _analysis(loops.Multistep(), *loops.inputs(loops.Multistep)).loop
    assert loop is not None
    assert len(loop.positions[0].state) == 2
    assert loop.steps >= 10


def test_a_state_with_a_history_is_the_same_after_as_many_steps() -> None:
    """After one step it is x, its evaluation, and one from before the loop."""
    loop = _analysis(loops.Multistep3(), *loops.inputs(loops.Multistep3)).loop
    assert loop is not None
    assert len(loop.positions[0].state) == 3
    assert loop.steps >= 9


def test_constants() -> None:
    analysis = _analysis(loops.DDIM(), *loops.inputs(loops.DDIM))
    assert analysis.loop is not None
    values = {(c.values, c.ends) for c in analysis.loop.constants}
    assert values == {(tuple(range(12)), False), (tuple(range(1, 13)), True)}
    lines = describe(analysis.program, analysis.loop, analysis.frontiers.order)
    assert lines == ("times[i]: 0, 1 ... 11", "times[i]: 1, 2 ... 12, of the end of a step")
    numbers = _analysis(loops.Euler(), *loops.inputs(loops.Euler)).loop
    assert numbers is not None
    [times] = numbers.constants
    assert times.values == pytest.approx([i / 12 for i in range(12)])


def test_layers_of_their_own_are_no_loop() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)]
    assert _analysis(nn.Sequential(*layers), torch.randn(2, 8)).loop is None


class _Small(nn.Module):
    """A loop that takes little of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.large = nn.Linear(4, 4), nn.Linear(4, 4000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = x + self.layer(x)
        return self.large(x)


def test_a_small_part_is_no_loop() -> None:
    assert _analysis(_Small(), torch.randn(2, 4)).loop is None


def test_first_steps_of_a_long_loop_may_be_side_values() -> None:
    loop = _analysis(loops.Nested(250), *loops.inputs(loops.Nested)).loop
    assert loop is not None
    assert loop.period == 5
    assert 245 <= loop.steps <= 250
