"""Run the pieces of a compiled network one by one, on named states, outside of any graph.

The steps are those of `passes.transform.sweep`. Calibration, fits and iteration use the executor to
see the states between the pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from passes.coarse.spec import OperatorSpec, PreprocessSpec
from passes.ir.program import Program
from passes.plan.schema import Plan
from passes.transform.lockstep import Lockstep
from passes.transform.split import Stages
from passes.transform.sweep import Role, Step, in_sequence, steps_of, walk
from passes.transform.synthesize import Operators

State = dict[str, torch.Tensor]
"""The tensors of a state, by the names of their nodes."""


class Pieces(Protocol):
    """Parts that an executor needs: those of a compiled network."""

    @property
    def program(self) -> Program:
        """The captured model."""

    @property
    def plan(self) -> Plan:
        """The plan of the network."""

    @property
    def stages(self) -> Stages:
        """The fine stages and the head."""

    @property
    def operators(self) -> Operators:
        """The preprocessing operators and coarse propagators."""


@dataclass(frozen=True, eq=False)
class Operator:
    """A preprocessing operator or coarse propagator: its specification, and the network."""

    spec: OperatorSpec
    network: nn.Module


class Executor:
    """Calls of fine stages and operators by stage number, on named states.

    Inputs have the names of the arguments. The plan has the names of their nodes, which differ if
    an argument is called like a builtin (`input`).

    Args:
        compiled: The network.
        stages: Copies of its fine stages and head to call instead.
        lockstep: Runs all fine stages of an iteration as one batch, if it is given.

    Attributes:
        plan: The plan.
        stages: The fine stages and the head.
        guesses: Preprocessing operators by stage number; may be replaced.
        corrections: Coarse propagators by stage number; may be replaced.
    """

    def __init__(
        self,
        compiled: Pieces,
        stages: Stages | None = None,
        *,
        lockstep: Lockstep | None = None,
    ) -> None:
        self.plan, self.lockstep = compiled.plan, lockstep
        self.stages = stages or compiled.stages
        self.guesses: dict[int, Operator] = {}
        self.corrections: dict[int, Operator] = {}
        for number, stage in enumerate(compiled.plan.stages):
            if stage.preprocess is not None and stage.coarse is not None:
                guess = compiled.operators.preprocess[number]
                self.guesses[number] = Operator(stage.preprocess, guess)
                self.corrections[number] = Operator(stage.coarse, compiled.operators.coarse[number])
        self._argument = {node.name: str(node.target) for node in compiled.program.inputs}

    def given(self, names: Iterable[str], inputs: Mapping[str, Any]) -> list[Any]:
        """Return the inputs of these names in the plan."""
        return [inputs[self._argument[name]] for name in names]

    def fine(self, number: int, state: State, inputs: Mapping[str, Any]) -> State:
        """Propagate a state through fine stage `number`, and return what the stage produces."""
        result = self.stages.fine[number](*self._entering(number, state, inputs))
        return _named(self.plan.stages[number].produces, result)

    def _entering(self, number: int, state: State, inputs: Mapping[str, Any]) -> list[Any]:
        stage = self.plan.stages[number]
        return [*(state[name] for name in stage.consumes), *self.given(stage.inputs, inputs)]

    def run(self, steps: Iterable[Step], inputs: Mapping[str, Any]) -> Iterator[tuple[Step, State]]:
        """Do the steps of a sweep; yield each with the state that it makes, up to the head."""
        steps = (step for step in steps if step.role is not Role.HEAD)
        lockstep = self.lockstep

        def together(fine: Sequence[Step], states: Sequence[Sequence[State]]) -> list[State]:
            assert lockstep is not None
            numbers = [step.stage for step in fine]
            arguments = [
                self._entering(number, read[0] if number else {}, inputs)
                for number, read in zip(numbers, states, strict=True)
            ]
            results = lockstep.run(numbers, arguments)
            names = (self.plan.stages[number].produces for number in numbers)
            return [dict(zip(*pair, strict=True)) for pair in zip(names, results, strict=True)]

        return walk(
            steps,
            lambda step, states: self.compute(step, states, inputs),
            None if lockstep is None else together,
        )

    def compute(self, step: Step, states: Sequence[State], inputs: Mapping[str, Any]) -> State:
        """Do one step of a sweep, given the states that it reads; not the head."""
        number = step.stage
        if step.role is Role.PREPROCESS:
            return self.guess(number, inputs, *states)
        if step.role is Role.FINE:
            return self.fine(number, states[0] if number else {}, inputs)
        if step.role is Role.RESIDUAL:
            before, entering = states
            names = [*entering] if self.plan.predicts else self.plan.stages[number].consumes
            return {name: before[name] - entering[name] for name in names}
        if step.role is Role.COARSE and self.plan.predicts:
            return self.predict(number, states[0], inputs)
        if step.role is Role.COARSE:
            residual, entering = states
            return self.correction(number, entering, [*residual.values()], inputs)
        before, produced, *corrections = states if number else ({}, *states)
        state = self.advance(number, before, produced)
        for correction in corrections:
            state = plus(state, correction)
        return state

    def true_states(self, inputs: Mapping[str, Any]) -> Iterator[State]:
        """Yield the state after every stage of the original network."""
        for step, state in self.run(in_sequence(len(self.plan.stages)), inputs):
            if step.role is Role.CORRECT:
                yield state

    def last_state(self, inputs: Mapping[str, Any]) -> State:
        """Return the true state that the head reads."""
        *_, last = self.true_states(inputs)
        return last

    def corrected_state(self, inputs: Mapping[str, Any]) -> State:
        """Return the state that the head of the parareal network reads, after its iterations."""
        *_, (_, last) = self.run(steps_of(self.plan), inputs)
        return last

    def advance(self, number: int, state: State, produced: State) -> State:
        """Return the state after stage `number`: values that bypass it, and those it produced."""
        crossing = [value.name for value in self.plan.interfaces[number].state]
        both = {**state, **produced}
        return {name: both[name] for name in crossing}

    def guess(self, number: int, inputs: Mapping[str, Any], before: State | None = None) -> State:
        """Guess the state that enters stage `number`, from the state before its window if any."""
        guess = self.guesses[number]
        result = guess.network(*self.guess_arguments(guess, inputs, before or {}))
        return _named(self.plan.stages[number].consumes, result)

    def guess_arguments(
        self, guess: Operator, inputs: Mapping[str, Any], before: State
    ) -> list[Any]:
        """Return the arguments of a preprocessing operator."""
        assert isinstance(guess.spec, PreprocessSpec)
        options = guess.spec.options
        return [*(before[name] for name in options.state), *self.given(options.inputs, inputs)]

    def correct(self, number: int, guess: State, true: State, inputs: Mapping[str, Any]) -> State:
        """Estimate the change of the output of stage `number` from the guess to the true state.

        In a collapsed sweep, of the output of the last stage.
        """
        residual = [true[name] - guess[name] for name in self.plan.stages[number].consumes]
        return self.correction(number, guess, residual, inputs)

    def correction(
        self, number: int, guess: State, residual: list[torch.Tensor], inputs: Mapping[str, Any]
    ) -> State:
        """Apply the coarse propagator of stage `number` to a residual."""
        if self.plan.predicts:
            names = self.plan.stages[number].consumes
            moved = plus(guess, dict(zip(names, residual, strict=True)))
            before = self.predict(number, guess, inputs)
            after = self.predict(number, moved, inputs)
            return {name: after[name] - value for name, value in before.items()}
        arguments = self.correction_arguments(number, guess, residual, inputs)
        names = tuple(value.name for value in self.plan.corrects(number))
        return _named(names, self.corrections[number].network(*arguments))

    def predict(self, number: int, state: State, inputs: Mapping[str, Any]) -> State:
        """Propagate a state through stage `number` by coarse steps."""
        spec, network = self.corrections[number].spec, self.corrections[number].network
        entering = [state[name] for name in self.plan.stages[number].consumes]
        names = tuple(value.name for value in self.plan.corrects(number))
        return _named(names, network(*entering, *self.given(spec.options.inputs, inputs)))

    def correction_arguments(
        self, number: int, guess: State, residual: list[torch.Tensor], inputs: Mapping[str, Any]
    ) -> list[Any]:
        """Return the arguments of the coarse propagator of stage `number`."""
        spec = self.corrections[number].spec
        given = self.given(spec.options.inputs, inputs)
        leading = [guess[name] for name in self.plan.stages[number].consumes]
        return [*(leading if self.plan.reads_guess(spec) else []), *residual, *given]

    def head(self, state: State, inputs: Mapping[str, Any]) -> Any:
        """Run the head on the last state."""
        names = [value.name for value in self.plan.interfaces[-1].state]
        return self.stages.head(
            *(state[name] for name in names), *self.given(self.plan.head.inputs, inputs)
        )


def plus(state: State, correction: State) -> State:
    """Add a correction to the components that it names."""
    moved = {name: state[name] + value for name, value in correction.items()}
    return {**state, **moved}


def _named(names: tuple[str, ...], result: Any) -> State:
    if len(names) == 1:
        return {names[0]: result}
    return dict(zip(names, result, strict=True))
