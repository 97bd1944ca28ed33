"""Runs the pieces of a compiled network one by one: the true states, the guesses, the sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.coarse.spec import OperatorSpec

if TYPE_CHECKING:
    from passes.transform.split import Stages
    from pnn_compile.network import Network

__all__ = ["Operator", "State", "Walker", "plus"]

State = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Operator:
    """A guess or a correction: what the plan says of it, and the network."""

    spec: OperatorSpec
    network: nn.Module


class Walker:
    """Calls fine stages, guesses and corrections by stage number on named states.

    Inputs go by the names of the arguments; the plan goes by the names of their nodes, which differ
    where an argument is called like a builtin (`input`).

    Args:
        compiled: The network.
        stages: Copies of its fine stages and head to call in their place.

    Attributes:
        plan: The plan.
        stages: The fine stages and the head.
        guesses: By stage number; may be replaced.
        corrections: By stage number; may be replaced.
    """

    def __init__(self, compiled: Network, stages: Stages | None = None) -> None:
        self.plan = compiled.plan
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
        """The inputs that the plan names."""
        return [inputs[self._argument[name]] for name in names]

    def fine(self, number: int, state: State, inputs: Mapping[str, Any]) -> State:
        """Propagate a state through fine stage `number`; give what it produces."""
        stage = self.plan.stages[number]
        result = self.stages.fine[number](
            *(state[name] for name in stage.consumes), *self.given(stage.inputs, inputs)
        )
        return _named(stage.produces, result)

    def last_state(self, inputs: Mapping[str, Any]) -> State:
        """The true state in front of the head."""
        state: State = {}
        for number in range(len(self.plan.stages)):
            state = self.advance(number, state, self.fine(number, state, inputs))
        return state

    def advance(self, number: int, state: State, produced: State) -> State:
        """The state behind stage `number`: what crosses from before, and what it produced."""
        crossing = [value.name for value in self.plan.interfaces[number].state]
        both = {**state, **produced}
        return {name: both[name] for name in crossing}

    def guess(self, number: int, inputs: Mapping[str, Any]) -> State:
        """Guess the state that enters stage `number`."""
        guess = self.guesses[number]
        result = guess.network(*self.given(guess.spec.options.inputs, inputs))
        return _named(self.plan.stages[number].consumes, result)

    def correct(self, number: int, guess: State, true: State, inputs: Mapping[str, Any]) -> State:
        """Estimate how the output of stage `number` moves from the guess to the true state.

        In a collapsed sweep that is the output of the last stage.
        """
        residual = [true[name] - guess[name] for name in self.plan.stages[number].consumes]
        return self.correction(number, guess, residual, inputs)

    def correction(
        self, number: int, guess: State, residual: list[torch.Tensor], inputs: Mapping[str, Any]
    ) -> State:
        """Call the correction of stage `number` on a residual."""
        arguments = self.correction_arguments(number, guess, residual, inputs)
        names = tuple(value.name for value in self.plan.corrects(number))
        return _named(names, self.corrections[number].network(*arguments))

    def correction_arguments(
        self, number: int, guess: State, residual: list[torch.Tensor], inputs: Mapping[str, Any]
    ) -> list[Any]:
        """What the correction of stage `number` is called with."""
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
