"""Family `time_step`: the step of a loop at a larger step, chosen on the example inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from passes.coarse.spec import Site
from passes.coarse.time_step import StartOptions, TimeStepOptions, build_time_step
from passes.errors import ArtifactError, SynthesisError
from passes.plan.schema import Plan
from passes.plan.validate import check_plan
from passes.transform.executor import Executor
from pnn_compile.inputs import named_batch
from tests.models import loops


def _compiled(model: type[nn.Module], **options: Any) -> tuple[nn.Module, Any, pnn.Compiled]:
    torch.manual_seed(0)
    network, inputs = model().eval(), loops.inputs(model)
    return network, inputs, pnn.compile(network, inputs, **{"stages": 4, **options})


def _error(result: torch.Tensor, target: torch.Tensor) -> float:
    return ((result - target).norm() / target.norm()).item()


def _options(compiled: pnn.Compiled, stage: int) -> TimeStepOptions:
    coarse = compiled.plan.stages[stage].coarse
    assert coarse is not None
    assert isinstance(coarse.options, TimeStepOptions)
    return coarse.options


@pytest.mark.parametrize(
    ("model", "held", "limit"),
    [
        (loops.Euler, False, 1e-4),
        (loops.Heun, False, 1e-5),
        (loops.DDIM, False, 0.02),
        (loops.DDIMNumbers, True, 0.02),
        (loops.Guided, False, 1e-4),
        (loops.Ancestral, True, 1e-3),
        (loops.Multistep, False, 1e-2),
        (loops.Nested, True, 1e-3),
    ],
)
def test_loops_take_coarse_steps(model: type[nn.Module], held: bool, limit: float) -> None:
    network, inputs, compiled = _compiled(model)
    plan, target = compiled.plan, network(*inputs)
    assert plan.correction == "difference"
    assert plan.predicts
    assert {_options(compiled, stage).steps.rule.held for stage in (1, 2, 3)} == {held}
    assert any(note.startswith("a loop of ") for note in plan.notes)
    errors = [_error(compiled.iterate(inputs, iterations=k).outputs, target) for k in (1, 2, 4)]
    assert errors[0] < limit
    assert errors[1] < max(1e-6, 0.2 * errors[0])
    assert errors[2] < 1e-6
    # Cuts lie between steps, and no weight is copied.
    loop = compiled.analysis.loop
    assert loop is not None
    ends = {compiled.analysis.frontiers.order[p.index - 1].name for p in loop.positions}
    assert {stage.last for stage in plan.stages} <= ends
    weights = {id(parameter) for parameter in compiled.sequential.parameters()}
    assert {id(parameter) for parameter in compiled.module.parameters()} <= weights
    assert all(stage.operator_parameters == 0 for stage in plan.stages)


def test_as_many_coarse_steps_as_steps_are_the_stage() -> None:
    for model in (loops.Heun, loops.DDIM, loops.Ancestral, loops.Multistep):
        _, inputs, compiled = _compiled(model, units=12)
        executor, batch = Executor(compiled), named_batch(compiled, inputs)
        states = [*executor.true_states(batch)]
        for stage in (1, 2, 3):
            assert set(_options(compiled, stage).steps.lengths) == {1}
            predicted = executor.predict(stage, states[stage - 1], batch)
            for name, value in predicted.items():
                torch.testing.assert_close(value, states[stage][name])
            guess = executor.guess(stage, batch)
            for name, value in guess.items():
                torch.testing.assert_close(value, states[stage - 1][name])


def test_more_coarse_steps_are_nearer() -> None:
    network, inputs, one = _compiled(loops.DDIM)
    _, _, two = _compiled(loops.DDIM, units=2)
    target = network(*inputs)
    assert _error(two.module(*inputs), target) < 0.5 * _error(one.module(*inputs), target)


def test_constants_by_hand() -> None:
    network, inputs, compiled = _compiled(loops.Euler)
    assert isinstance(network, loops.Euler)
    options = _options(compiled, 2)
    [length] = options.steps.lengths
    [moved] = options.steps.rule.moved
    assert moved.rule == "sum"
    coarse = build_time_step(options, Site(compiled.program, (), ()))
    start = sum(int(stage.nodes) for stage in compiled.plan.stages[:2])
    assert compiled.analysis.loop is not None
    step = start // compiled.analysis.loop.period
    x = torch.randn(4, 8)
    time = torch.full((4,), step / 12)
    arguments = [inputs[0]] * len(options.inputs)
    torch.testing.assert_close(
        coarse(x, *arguments), x + length / 12 * network.net(x, time), atol=1e-6, rtol=1e-5
    )


def test_the_guess_takes_a_coarse_step_a_stage() -> None:
    _, _, compiled = _compiled(loops.DDIM)
    for number, stage in enumerate(compiled.plan.stages[1:], 1):
        assert stage.preprocess is not None
        assert isinstance(stage.preprocess.options, StartOptions)
        lengths = stage.preprocess.options.steps.lengths
        assert number <= len(lengths) <= number + 1
        steps = sum(len(_lengths(compiled, earlier)) for earlier in range(number))
        assert sum(lengths) == steps


def _lengths(compiled: pnn.Compiled, stage: int) -> range:
    """Return as many numbers as a stage has steps."""
    assert compiled.analysis.loop is not None
    return range(compiled.plan.stages[stage].nodes // compiled.analysis.loop.period)


class _Draws(loops.Euler):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.steps):
            t = torch.full((x.shape[0],), i / self.steps)
            x = x + self.net(x, t) / self.steps + 0.01 * torch.randn_like(x)
        return x


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    _, _, compiled = _compiled(loops.Recurrent)
    [note] = [note for note in compiled.plan.notes if note.startswith("a loop of 12 steps without")]
    assert "does not follow a smooth path" in note
    assert compiled.plan.correction == "residual"
    with pytest.raises(SynthesisError, match="has no loop in time"):
        pnn.compile(
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), torch.randn(2, 4),
            stages=2, coarse="time_step",
        )  # fmt: skip
    with pytest.raises(SynthesisError, match="pass the noise as an input"):
        pnn.compile(_Draws().eval(), torch.randn(2, 8), stages=2, coarse="time_step")


def test_plan_round_trip() -> None:
    _, _, compiled = _compiled(loops.Heun, tolerance=1e-3)
    again = Plan.from_json(compiled.plan.to_json())
    assert again == compiled.plan
    check_plan(compiled.program, again)
    coarse, options = again.stages[1].coarse, _options(compiled, 1)
    assert coarse is not None
    steps = dataclasses.replace(options.steps, first="nowhere")
    broken = dataclasses.replace(coarse, options=dataclasses.replace(options, steps=steps))
    edited = dataclasses.replace(again.stages[1], coarse=broken)
    stages = (again.stages[0], edited, *again.stages[2:])
    with pytest.raises(ArtifactError, match=r"coarse\.options\.steps\.first is 'nowhere'"):
        check_plan(compiled.program, dataclasses.replace(again, stages=stages))
