"""`ChainSweep`: what a rank does with fine stages and corrections in a chain of K iterations.

In iteration k a stage j reads the state behind stage j - 1 of the iteration before, x_j (the guess
where k = 0), and is corrected to U_j = y_j + F_j(U_{j-1} - x_j). Stage k is exact: nothing but what
it computed, and what crosses it untouched.
"""

from __future__ import annotations

from passes.schedule.instruction import Instruction, Kind
from passes.transform.executor import State, plus
from pnn_compile.runtime.piece import Piece, added, detached, leaves
from pnn_compile.runtime.workspace import Action, Workspace

__all__ = ["ChainSweep"]


class ChainSweep:
    """The instructions of a chain, on what a step holds.

    Args:
        step: The step.

    Attributes:
        actions: By kind of instruction.
    """

    def __init__(self, step: Workspace) -> None:
        self._step = step
        self._rounds = step.network.sweep.iterations
        self.actions: dict[Kind, Action] = {
            Kind.FINE: self._fine,
            Kind.RECEIVE: self._receive,
            Kind.CORRECT: self._correct,
            Kind.SEND: self._send,
            Kind.RECEIVE_ADJOINT: self._receive_adjoint,
            Kind.COARSE_BACKWARD: self._coarse_backward,
            Kind.SEND_ADJOINT: self._send_adjoint,
            Kind.FINE_BACKWARD: self._fine_backward,
        }

    # Forward

    def _fine(self, it: Instruction) -> None:
        step = self._step
        entering = leaves(self._entering(it))
        produced = step.executor.fine(it.stage, entering, step.inputs[it.batch])
        step.fine[it.key] = Piece(entering, produced)

    def _entering(self, it: Instruction) -> State:
        """What a stage reads in an iteration, x_j."""
        if not it.stage:
            return {}
        if not it.iteration:
            return self._step.guess[it.key].outputs
        known = self._step.state[it.stage - 1, it.batch, it.iteration - 1]
        return {name: known[name] for name in self._step.plan.stages[it.stage].consumes}

    def _receive(self, it: Instruction) -> None:
        like = self._step.like(it.stage, it.batch)
        self._step.state[it.key] = self._step.receive(it.peer, like)

    def _correct(self, it: Instruction) -> None:
        step, (stage, batch, k) = self._step, it.key
        produced = detached(step.fine[it.key].outputs)
        before: State = {}
        if stage > k:
            before = step.state[stage - 1, batch, k]
            correction = self._correction(it, before)
            produced = plus(produced, detached(correction))
        elif stage:
            before = step.state[stage - 1, batch, k - 1]
        # The next iteration reads the state that this one was corrected by, none the one before.
        for iteration in (k - 1, k) if k + 1 == self._rounds else (k - 1,):
            step.state.pop((stage - 1, batch, iteration), None)
        step.state[it.key] = step.executor.advance(stage, before, produced)

    def _correction(self, it: Instruction, true: State) -> State:
        """F_j(U_{j-1} - x_j), on leaves of its own."""
        step, stage = self._step, self._step.plan.stages[it.stage]
        guess = leaves(self._entering(it))
        residual = leaves({name: true[name] - guess[name].detach() for name in stage.consumes})
        result = step.executor.correction(
            it.stage, guess, list(residual.values()), step.inputs[it.batch]
        )
        read = guess if step.plan.reads_guess(step.executor.corrections[it.stage].spec) else {}
        step.coarse[it.key] = Piece({**_tagged(read), **residual}, result)
        return result

    def _send(self, it: Instruction) -> None:
        state = self._step.state.pop(it.key)
        self._step.send(it.peer, state, self._step.like(it.stage, it.batch))

    # Backward

    def _receive_adjoint(self, it: Instruction) -> None:
        self._step.adjoint[it.key] = self._step.receive_adjoint(it)

    def _coarse_backward(self, it: Instruction) -> None:
        """Carry the adjoint through the coarse network to the state behind the stage before."""
        step, stage = self._step, self._step.plan.stages[it.stage]
        adjoint = step.adjoint[it.key]
        moved = step.coarse[it.key].backward(adjoint)
        residual = {name: moved[name] for name in stage.consumes if name in moved}
        self._add(it.stage - 1, it.batch, it.iteration, added(self._carried(it), residual))

    def _send_adjoint(self, it: Instruction) -> None:
        self._step.send_adjoint(it, self._step.adjoint.pop(it.key))

    def _fine_backward(self, it: Instruction) -> None:
        """Run the fine stage backward; give the adjoint of what it read to where that came from."""
        step, (stage, batch, k) = self._step, it.key
        total = step.fine.pop(it.key).backward(step.adjoint[it.key])
        if stage > k:
            coarse = step.coarse.pop(it.key).gradients
            for name in step.plan.stages[stage].consumes:
                if _TAG + name in coarse:
                    total = added(total, {name: coarse[_TAG + name]})
                if name in coarse:
                    total = added(total, {name: -coarse[name]})
        if k:
            carried = self._carried(it) if stage == k else {}
            self._add(stage - 1, batch, k - 1, added(total, carried))
        elif stage:
            step.guess_adjoint[it.key] = total
        del step.adjoint[it.key]

    def _carried(self, it: Instruction) -> State:
        """The adjoint of what crosses a stage without being computed there."""
        produces = self._step.plan.stages[it.stage].produces
        return {n: a for n, a in self._step.adjoint[it.key].items() if n not in produces}

    def _add(self, stage: int, batch: int, iteration: int, adjoint: State) -> None:
        known = self._step.adjoint.get((stage, batch, iteration), {})
        self._step.adjoint[stage, batch, iteration] = added(known, adjoint)


_TAG = "guess of "


def _tagged(state: State) -> State:
    return {_TAG + name: value for name, value in state.items()}
