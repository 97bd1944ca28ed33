"""Handle the instructions of a collapsed sweep: fine stages and corrections.

With x_j the guess of the input of stage j and y_j the output of the stage for it, the last state is
one sum over all ranks, u_{N-1} = y_{N-1} + sum_j F_j(y_{j-1} - x_j). The share of a rank is the
part of the last state that its stages computed, plus the outputs of its coarse propagators F_j;
`engine.states` stores the share under the last stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from passes.schedule.instruction import Instruction, Kind
from passes.transform.executor import State
from pnn_compile.runtime.rank_pieces import PieceGraph, add_to, added, as_leaves, detached

if TYPE_CHECKING:
    from pnn_compile.runtime.engine import Engine


# Forward


def _fine(engine: Engine, it: Instruction) -> None:
    entering = as_leaves(engine.guesses[it.key].outputs) if it.stage else {}
    produced = engine.executor.fine(it.stage, entering, engine.inputs[it.batch])
    engine.fine[it.key] = PieceGraph(entering, produced)
    crossing = {value.name for value in engine.plan.interfaces[-1].state}
    _share(engine, it, {name: value for name, value in produced.items() if name in crossing})


def _send_guess(engine: Engine, it: Instruction) -> None:
    engine.send(it.peer, engine.guesses[it.key].outputs, _guess_shapes(engine, it))


def _expect_guess(engine: Engine, it: Instruction) -> None:
    engine.expect(it.peer, _guess_shapes(engine, it))


def _receive_guess(engine: Engine, it: Instruction) -> None:
    engine.remote_guesses[it.key] = engine.receive(it.peer, _guess_shapes(engine, it))


def _send_output(engine: Engine, it: Instruction) -> None:
    engine.send(it.peer, engine.fine[it.key].outputs, _output_shapes(engine, it, it.peer))


def _expect_output(engine: Engine, it: Instruction) -> None:
    engine.expect(it.peer, _output_shapes(engine, it, engine.pieces.rank))


def _receive_output(engine: Engine, it: Instruction) -> None:
    shapes = _output_shapes(engine, it, engine.pieces.rank)
    engine.remote_outputs[it.key] = engine.receive(it.peer, shapes)


def _correct(engine: Engine, it: Instruction) -> None:
    """Compute F_j(y_{j-1} - x_j) in a separate autograd graph."""
    guess = engine.remote_guesses.pop(it.key, None) or engine.guesses[it.key].outputs
    residual = as_leaves(
        {
            name: _output(engine, name, it.batch).detach() - guess[name].detach()
            for name in engine.plan.stages[it.stage].consumes
        }
    )
    result = engine.executor.correction(
        it.stage, guess, list(residual.values()), engine.inputs[it.batch]
    )
    engine.coarse[it.key] = PieceGraph(residual, result)
    _share(engine, it, result)


def _output(engine: Engine, name: str, batch: int) -> torch.Tensor:
    """Return the output of a stage, on this rank or received from another."""
    key = engine.pieces.producers[name], batch, 0
    return (engine.remote_outputs.get(key) or engine.fine[key].outputs)[name]


def _send_sum(engine: Engine, it: Instruction) -> None:
    engine.send(it.peer, engine.states.pop(it.key, {}), engine.shapes(it.stage, it.batch))


def _receive_sum(engine: Engine, it: Instruction) -> None:
    _share(engine, it, engine.receive(it.peer, engine.shapes(it.stage, it.batch)))


def _share(engine: Engine, it: Instruction, more: State) -> None:
    """Add to this rank's share of the last state."""
    add_to(engine.states, (engine.pieces.last, it.batch, 0), detached(more))


# Backward


def _send_sum_adjoint(engine: Engine, it: Instruction) -> None:
    engine.send_adjoint(it, engine.adjoints[it.key])


def _receive_sum_adjoint(engine: Engine, it: Instruction) -> None:
    engine.receive_adjoint(it)


def _coarse_backward(engine: Engine, it: Instruction) -> None:
    """Propagate the adjoint of the last state through F_j, to both terms of the residual."""
    last = engine.adjoints[engine.pieces.last, it.batch, 0]
    residual = engine.coarse.pop(it.key).backward(last)
    for name, adjoint in residual.items():
        producer = engine.pieces.producers[name], it.batch, 0
        add_to(engine.output_adjoints, producer, {name: adjoint})
    minus = {name: -adjoint for name, adjoint in residual.items()}
    add_to(engine.guess_adjoints, it.key, minus)


def _send_output_adjoint(engine: Engine, it: Instruction) -> None:
    shapes = _output_shapes(engine, it, engine.pieces.rank)
    engine.send(it.peer, engine.output_adjoints.pop(it.key, {}), shapes)


def _expect_output_adjoint(engine: Engine, it: Instruction) -> None:
    engine.expect(it.peer, _output_shapes(engine, it, it.peer))


def _receive_output_adjoint(engine: Engine, it: Instruction) -> None:
    adjoint = engine.receive(it.peer, _output_shapes(engine, it, it.peer))
    add_to(engine.output_adjoints, it.key, adjoint)


def _send_guess_adjoint(engine: Engine, it: Instruction) -> None:
    engine.send(it.peer, engine.guess_adjoints.pop(it.key), _guess_shapes(engine, it))


def _receive_guess_adjoint(engine: Engine, it: Instruction) -> None:
    adjoint = engine.receive(it.peer, _guess_shapes(engine, it))
    add_to(engine.guess_adjoints, it.key, adjoint)


def _fine_backward(engine: Engine, it: Instruction) -> None:
    """Run the fine stage backward, from the last state and from the residuals that read it."""
    last = engine.adjoints[engine.pieces.last, it.batch, 0]
    direct = {n: last[n] for n in engine.plan.stages[it.stage].produces if n in last}
    adjoint = added(direct, engine.output_adjoints.pop(it.key, {}))
    entering = engine.fine.pop(it.key).backward(adjoint)
    if it.stage:
        add_to(engine.guess_adjoints, it.key, entering)


# Shapes of messages


def _guess_shapes(engine: Engine, it: Instruction) -> State:
    before = engine.shapes(it.stage - 1, it.batch)
    return {name: before[name] for name in engine.plan.stages[it.stage].consumes}


def _output_shapes(engine: Engine, it: Instruction, reader: int | None) -> State:
    """Describe the outputs of a stage that the corrections on a rank read."""
    assert reader is not None
    after, read = engine.shapes(it.stage, it.batch), engine.pieces.residuals[reader]
    return {name: after[name] for name in engine.plan.stages[it.stage].produces if name in read}


HANDLERS: dict[Kind, Callable[[Engine, Instruction], None]] = {
    Kind.FINE: _fine,
    Kind.SEND_GUESS: _send_guess,
    Kind.EXPECT_GUESS: _expect_guess,
    Kind.RECEIVE_GUESS: _receive_guess,
    Kind.SEND_OUTPUT: _send_output,
    Kind.EXPECT_OUTPUT: _expect_output,
    Kind.RECEIVE_OUTPUT: _receive_output,
    Kind.CORRECT: _correct,
    Kind.SEND_SUM: _send_sum,
    Kind.RECEIVE_SUM: _receive_sum,
    Kind.SEND_SUM_ADJOINT: _send_sum_adjoint,
    Kind.RECEIVE_SUM_ADJOINT: _receive_sum_adjoint,
    Kind.COARSE_BACKWARD: _coarse_backward,
    Kind.SEND_OUTPUT_ADJOINT: _send_output_adjoint,
    Kind.EXPECT_OUTPUT_ADJOINT: _expect_output_adjoint,
    Kind.RECEIVE_OUTPUT_ADJOINT: _receive_output_adjoint,
    Kind.SEND_GUESS_ADJOINT: _send_guess_adjoint,
    Kind.EXPECT_GUESS_ADJOINT: _expect_guess,  # as large as the guess
    Kind.RECEIVE_GUESS_ADJOINT: _receive_guess_adjoint,
    Kind.FINE_BACKWARD: _fine_backward,
}
"""Handlers of a collapsed sweep by kind of instruction."""
