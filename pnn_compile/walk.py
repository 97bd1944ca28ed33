"""Runs the pieces of a compiled network one by one: the true states, the guesses, the sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from passes.assemble import reads_guess

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["State", "Walker"]

State = dict[str, torch.Tensor]


class Walker:
    """Calls fine stages, guesses and corrections by stage number on named states.

    Inputs go by the names of the arguments; the plan goes by the names of their nodes, which differ
    where an argument is called like a builtin (`input`).
    """

    def __init__(self, compiled: Network) -> None:
        self.plan = compiled.plan
        self.stages = compiled.stages
        self.operators = compiled.operators
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

    def advance(self, number: int, state: State, produced: State) -> State:
        """The state behind stage `number`: what crosses from before, and what it produced."""
        crossing = [value.name for value in self.plan.interfaces[number].state]
        both = {**state, **produced}
        return {name: both[name] for name in crossing}

    def guess(self, number: int, inputs: Mapping[str, Any]) -> State:
        """Guess the state that enters stage `number`."""
        stage = self.plan.stages[number]
        assert stage.preprocess is not None
        names = stage.preprocess.options["inputs"]
        result = self.operators.preprocess[number](*self.given(names, inputs))
        return _named(stage.consumes, result)

    def correct(self, number: int, guess: State, true: State, inputs: Mapping[str, Any]) -> State:
        """Estimate how the output of stage `number` moves from the guess to the true state."""
        stage = self.plan.stages[number]
        residual = [true[name] - guess[name] for name in stage.consumes]
        arguments = self.correction_arguments(number, guess, residual, inputs)
        return _named(stage.produces, self.operators.coarse[number](*arguments))

    def correction_arguments(
        self, number: int, guess: State, residual: list[torch.Tensor], inputs: Mapping[str, Any]
    ) -> list[Any]:
        """What the correction of stage `number` is called with."""
        stage = self.plan.stages[number]
        assert stage.coarse is not None
        given = self.given(stage.coarse.options.get("inputs", ()), inputs)
        leading = [guess[name] for name in stage.consumes]
        return [*(leading if reads_guess(self.plan, stage) else []), *residual, *given]

    def head(self, state: State, inputs: Mapping[str, Any]) -> Any:
        """Run the head on the last state."""
        names = [value.name for value in self.plan.interfaces[-1].state]
        return self.stages.head(
            *(state[name] for name in names), *self.given(self.plan.head.inputs, inputs)
        )


def _named(names: tuple[str, ...], result: Any) -> State:
    if len(names) == 1:
        return {names[0]: result}
    return dict(zip(names, result, strict=True))
