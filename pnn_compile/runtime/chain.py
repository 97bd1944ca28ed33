"""Handle the instructions of a chain sweep: fine stages and corrections, K times.

The formulas are those of `passes/transform/sweep.py`. In iteration k a stage j reads e_j, the state
after stage j - 1 of the iteration before (the guess x_j where k = 0), and is corrected to
u_j = y_j + F_j(u_{j-1} - e_j), or by the change of its prediction. Stage k is exact: it has no
correction, and its state is its output and the values that cross it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from passes.schedule.instruction import Instruction, Kind
from passes.transform.executor import State, plus
from pnn_compile.runtime.rank_pieces import PieceGraph, add_to, added, as_leaves, detached

if TYPE_CHECKING:
    from pnn_compile.runtime.engine import Engine


# Forward


def _fine(engine: Engine, it: Instruction) -> None:
    entering = as_leaves(_entering(engine, it))
    produced = engine.executor.fine(it.stage, entering, engine.inputs[it.batch])
    engine.fine[it.key] = PieceGraph(entering, produced)


def _entering(engine: Engine, it: Instruction) -> State:
    """Return what a stage reads in an iteration, e_j."""
    if not it.stage:
        return {}
    opens = engine.plan.opens_window(it.stage)
    if not it.iteration and not opens:
        return engine.guesses[it.key].outputs
    iteration = it.iteration if opens else it.iteration - 1
    state = engine.states[it.stage - 1, it.batch, iteration]
    return {name: state[name] for name in engine.plan.stages[it.stage].consumes}


def _receive(engine: Engine, it: Instruction) -> None:
    engine.states[it.key] = engine.receive(it.peer, engine.shapes(it.stage, it.batch))


def _predict(engine: Engine, it: Instruction) -> None:
    """Predict the state after a stage by coarse steps, before its input is corrected."""
    entering = _entering(engine, it)
    engine.predictions[it.key] = engine.executor.predict(
        it.stage, entering, engine.inputs[it.batch]
    )


def _correct(engine: Engine, it: Instruction) -> None:
    stage, batch, k = it.key
    produced = detached(engine.fine[it.key].outputs)
    before: State = {}
    opens = engine.plan.opens_window(stage)
    if stage > k and not opens:
        before = engine.states[stage - 1, batch, k]
        change = _change if engine.plan.predicts else _correction
        produced = plus(produced, detached(change(engine, it, before)))
    elif stage:
        before = engine.states[stage - 1, batch, k if opens else k - 1]
    # All guesses of a window, which read the state before it, were made before any correction.
    engine.states.pop((engine.plan.window_start(stage) - 1, batch, k), None)
    # The next iteration reads the state that corrected this one; nothing reads the one before it.
    last = k + 1 == engine.pieces.sweep.iterations
    for iteration in (k - 1, k) if last else (k - 1,):
        engine.states.pop((stage - 1, batch, iteration), None)
    engine.states[it.key] = engine.executor.advance(stage, before, produced)


def _correction(engine: Engine, it: Instruction, true: State) -> State:
    """Compute F_j(u_{j-1} - e_j) in a separate autograd graph."""
    executor, consumes = engine.executor, engine.plan.stages[it.stage].consumes
    guess = as_leaves(_entering(engine, it))
    residual = as_leaves({name: true[name] - guess[name].detach() for name in consumes})
    result = executor.correction(it.stage, guess, list(residual.values()), engine.inputs[it.batch])
    reads_guess = engine.plan.reads_guess(executor.corrections[it.stage].spec)
    tagged = {_TAG + name: value for name, value in guess.items()} if reads_guess else {}
    engine.coarse[it.key] = PieceGraph({**tagged, **residual}, result)
    return result


def _change(engine: Engine, it: Instruction, true: State) -> State:
    """Compute the change of the prediction, G_j(u_{j-1}) - G_j(e_j); keep it for the next one."""
    before = engine.predictions.pop(it.key)
    after = engine.executor.predict(it.stage, true, engine.inputs[it.batch])
    if it.iteration + 1 < min(engine.pieces.sweep.iterations, it.stage):
        engine.predictions[it.stage, it.batch, it.iteration + 1] = after
    return {name: after[name] - value for name, value in before.items()}


_TAG = "guess of "
"""Prefix of the leaf for a guess, whose residual has a leaf of the same name."""


def _send(engine: Engine, it: Instruction) -> None:
    engine.send(it.peer, engine.states[it.key], engine.shapes(it.stage, it.batch))
    if not engine.plan.opens_window(it.stage + 1):  # before a window, others read it too
        del engine.states[it.key]


# Backward


def _receive_adjoint(engine: Engine, it: Instruction) -> None:
    engine.receive_adjoint(it)


def _coarse_backward(engine: Engine, it: Instruction) -> None:
    """Propagate the adjoint through the coarse network to the state after the stage before."""
    moved = engine.coarse[it.key].backward(engine.adjoints[it.key])
    consumes = engine.plan.stages[it.stage].consumes
    residual = {name: moved[name] for name in consumes if name in moved}
    before = it.stage - 1, it.batch, it.iteration
    add_to(engine.adjoints, before, added(_untouched(engine, it), residual))


def _send_adjoint(engine: Engine, it: Instruction) -> None:
    engine.send_adjoint(it, engine.adjoints.pop(it.key))


def _fine_backward(engine: Engine, it: Instruction) -> None:
    """Run the fine stage backward; add the adjoint of its input to that of the input's source."""
    stage, batch, k = it.key
    opens = engine.plan.opens_window(stage)
    total = engine.fine.pop(it.key).backward(engine.adjoints[it.key])
    if stage > k and not opens:
        coarse = engine.coarse.pop(it.key).gradients
        for name in engine.plan.stages[stage].consumes:
            if _TAG + name in coarse:
                total = added(total, {name: coarse[_TAG + name]})
            if name in coarse:
                total = added(total, {name: -coarse[name]})
    if k or (stage and opens):
        untouched = _untouched(engine, it) if opens or stage == k else {}
        before = stage - 1, batch, k if opens else k - 1
        add_to(engine.adjoints, before, added(total, untouched))
    elif stage:
        engine.guess_adjoints[it.key] = total
    del engine.adjoints[it.key]


def _untouched(engine: Engine, it: Instruction) -> State:
    """Return the adjoint of the values that cross a stage unchanged."""
    produces = engine.plan.stages[it.stage].produces
    return {n: a for n, a in engine.adjoints[it.key].items() if n not in produces}


HANDLERS: dict[Kind, Callable[[Engine, Instruction], None]] = {
    Kind.FINE: _fine,
    Kind.PREDICT: _predict,
    Kind.RECEIVE: _receive,
    Kind.CORRECT: _correct,
    Kind.SEND: _send,
    Kind.RECEIVE_ADJOINT: _receive_adjoint,
    Kind.COARSE_BACKWARD: _coarse_backward,
    Kind.SEND_ADJOINT: _send_adjoint,
    Kind.FINE_BACKWARD: _fine_backward,
}
"""Handlers of a chain by kind of instruction."""
