"""`CollapsedSweep`: what a rank does with fine stages and corrections in a collapsed sweep.

With x_j the guess of what enters stage j and y_j what the stage makes of it, the last state is one
sum over all ranks, U_N = y_N + sum_j P_j(y_{j-1} - x_j). A rank's share of it is what its own
stages computed of the last state, and what its maps P_j add.
"""

from __future__ import annotations

import torch

from passes.schedule.instruction import Instruction, Kind
from passes.transform.executor import State
from pnn_compile.runtime.piece import Piece, added, detached, leaves
from pnn_compile.runtime.workspace import Action, Workspace

__all__ = ["CollapsedSweep"]


_Key = tuple[int, int]


class CollapsedSweep:
    """The instructions of a collapsed sweep, on what a step holds.

    The share of the last state that is known on a rank stands in `step.state` at the last stage.

    Args:
        step: The step.

    Attributes:
        actions: By kind of instruction.
    """

    def __init__(self, step: Workspace) -> None:
        self._step = step
        self._last = step.network.last
        # By stage and micro-batch: what other ranks guessed and computed, and the adjoints of what
        # stages computed, from the corrections here and elsewhere that read it.
        self._guesses: dict[_Key, State] = {}
        self._outputs: dict[_Key, State] = {}
        self._read: dict[_Key, State] = {}
        self._maker = {
            name: number for number, stage in enumerate(step.plan.stages) for name in stage.produces
        }
        self.actions: dict[Kind, Action] = {
            Kind.FINE: self._fine,
            Kind.SEND_GUESS: self._send_guess,
            Kind.EXPECT_GUESS: self._expect_guess,
            Kind.RECEIVE_GUESS: self._receive_guess,
            Kind.SEND_OUTPUT: self._send_output,
            Kind.EXPECT_OUTPUT: self._expect_output,
            Kind.RECEIVE_OUTPUT: self._receive_output,
            Kind.CORRECT: self._correct,
            Kind.SEND_SUM: self._send_sum,
            Kind.RECEIVE_SUM: self._receive_sum,
            Kind.SEND_SUM_ADJOINT: self._send_sum_adjoint,
            Kind.RECEIVE_SUM_ADJOINT: self._receive_sum_adjoint,
            Kind.COARSE_BACKWARD: self._coarse_backward,
            Kind.SEND_OUTPUT_ADJOINT: self._send_output_adjoint,
            Kind.EXPECT_OUTPUT_ADJOINT: self._expect_output_adjoint,
            Kind.RECEIVE_OUTPUT_ADJOINT: self._receive_output_adjoint,
            Kind.SEND_GUESS_ADJOINT: self._send_guess_adjoint,
            Kind.EXPECT_GUESS_ADJOINT: self._expect_guess,  # as large as the guess
            Kind.RECEIVE_GUESS_ADJOINT: self._receive_guess_adjoint,
            Kind.FINE_BACKWARD: self._fine_backward,
        }

    # Forward

    def _fine(self, it: Instruction) -> None:
        step = self._step
        entering = leaves(step.guess[it.key].outputs) if it.stage else {}
        produced = step.executor.fine(it.stage, entering, step.inputs[it.batch])
        step.fine[it.key] = Piece(entering, produced)
        crossing = {value.name for value in step.plan.interfaces[-1].state}
        self._share(it, {name: value for name, value in produced.items() if name in crossing})

    def _send_guess(self, it: Instruction) -> None:
        self._step.send(it.peer, self._step.guess[it.key].outputs, self._like_guess(it))

    def _expect_guess(self, it: Instruction) -> None:
        self._step.expect(it.peer, self._like_guess(it))

    def _receive_guess(self, it: Instruction) -> None:
        self._guesses[it.stage, it.batch] = self._step.receive(it.peer, self._like_guess(it))

    def _send_output(self, it: Instruction) -> None:
        like = self._like_output(it, reader=it.peer)
        self._step.send(it.peer, self._step.fine[it.key].outputs, like)

    def _expect_output(self, it: Instruction) -> None:
        self._step.expect(it.peer, self._like_output(it, reader=self._step.network.rank))

    def _receive_output(self, it: Instruction) -> None:
        like = self._like_output(it, reader=self._step.network.rank)
        self._outputs[it.stage, it.batch] = self._step.receive(it.peer, like)

    def _correct(self, it: Instruction) -> None:
        """P_j(y_{j-1} - x_j), on leaves of its own."""
        step = self._step
        guess = self._guesses.pop((it.stage, it.batch), None) or step.guess[it.key].outputs
        residual = leaves(
            {
                name: self._output(name, it.batch).detach() - guess[name].detach()
                for name in step.plan.stages[it.stage].consumes
            }
        )
        result = step.executor.correction(
            it.stage, guess, list(residual.values()), step.inputs[it.batch]
        )
        step.coarse[it.key] = Piece(residual, result)
        self._share(it, result)

    def _output(self, name: str, batch: int) -> torch.Tensor:
        """What a stage computed, here or elsewhere."""
        maker = self._maker[name]
        known = self._outputs.get((maker, batch))
        return (known or self._step.fine[maker, batch, 0].outputs)[name]

    def _send_sum(self, it: Instruction) -> None:
        share = self._step.state.pop(it.key, {})
        self._step.send(it.peer, share, self._step.like(it.stage, it.batch))

    def _receive_sum(self, it: Instruction) -> None:
        self._share(it, self._step.receive(it.peer, self._step.like(it.stage, it.batch)))

    def _share(self, it: Instruction, more: State) -> None:
        """Add to what is known here of the last state."""
        key = self._last, it.batch, 0
        self._step.state[key] = added(self._step.state.get(key, {}), detached(more))

    # Backward

    def _send_sum_adjoint(self, it: Instruction) -> None:
        self._step.send_adjoint(it, self._step.adjoint[it.key])

    def _receive_sum_adjoint(self, it: Instruction) -> None:
        self._step.adjoint[it.key] = self._step.receive_adjoint(it)

    def _coarse_backward(self, it: Instruction) -> None:
        """Carry the adjoint of the last state through P_j, to what the residual is made of."""
        step = self._step
        residual = step.coarse.pop(it.key).backward(step.adjoint[self._last, it.batch, 0])
        for name, adjoint in residual.items():
            self._add_read(self._maker[name], it.batch, {name: adjoint})
        self._add_guess(it, {name: -adjoint for name, adjoint in residual.items()})

    def _send_output_adjoint(self, it: Instruction) -> None:
        like = self._like_output(it, reader=self._step.network.rank)
        self._step.send(it.peer, self._read.pop((it.stage, it.batch), {}), like)

    def _expect_output_adjoint(self, it: Instruction) -> None:
        self._step.expect(it.peer, self._like_output(it, reader=it.peer))

    def _receive_output_adjoint(self, it: Instruction) -> None:
        like = self._like_output(it, reader=it.peer)
        self._add_read(it.stage, it.batch, self._step.receive(it.peer, like))

    def _send_guess_adjoint(self, it: Instruction) -> None:
        adjoint = self._step.guess_adjoint.pop(it.key)
        self._step.send(it.peer, adjoint, self._like_guess(it))

    def _receive_guess_adjoint(self, it: Instruction) -> None:
        self._add_guess(it, self._step.receive(it.peer, self._like_guess(it)))

    def _fine_backward(self, it: Instruction) -> None:
        """Run the fine stage backward, from the last state and from the residuals that read it."""
        step = self._step
        last = step.adjoint[self._last, it.batch, 0]
        direct = {n: last[n] for n in step.plan.stages[it.stage].produces if n in last}
        adjoint = added(direct, self._read.pop((it.stage, it.batch), {}))
        entering = step.fine.pop(it.key).backward(adjoint)
        if it.stage:
            self._add_guess(it, entering)

    def _add_read(self, stage: int, batch: int, adjoint: State) -> None:
        self._read[stage, batch] = added(self._read.get((stage, batch), {}), adjoint)

    def _add_guess(self, it: Instruction, adjoint: State) -> None:
        known = self._step.guess_adjoint.get(it.key, {})
        self._step.guess_adjoint[it.key] = added(known, adjoint)

    # What messages are like

    def _like_guess(self, it: Instruction) -> State:
        known = self._step.like(it.stage - 1, it.batch)
        return {name: known[name] for name in self._step.plan.stages[it.stage].consumes}

    def _like_output(self, it: Instruction, reader: int | None) -> State:
        """What a stage computes and the corrections on a rank read."""
        network, stages = self._step.network, self._step.plan.stages
        read = {
            name
            for number in range(1, len(stages))
            if network.placement[network.sweep.corrector(number)] == reader
            for name in stages[number].consumes
        }
        known = self._step.like(it.stage, it.batch)
        return {name: known[name] for name in stages[it.stage].produces if name in read}
