"""The parareal iteration, stated once: a list of typed steps over named states.

For stages j = 0 ... N - 1, let e_j be the input of stage j (the guess x_j in the first iteration,
then u_{j-1} of the iteration before) and u_j the corrected state after it. An iteration computes

    y_j = g_j(e_j)                       fine stage
    r_j = u_{j-1} - e_j                  residual: the error of the input
    c_j = F_j(r_j)                       correction: its effect on the output
    u_j = y_j + c_j                      chain: the sweep of the paper (Lee, Lee, Park 2022, eq. 9)
    u_{N-1} = y_{N-1} + sum_j c_j        collapsed: every correction goes straight to the last state

and the head reads u_{N-1} of the last iteration. In difference form F_j reads e_j beside r_j
(Lions, Maday, Turinici 2001). After k iterations the first k states are exact.

Coarse steps of a loop in time predict: G_j reads a state alone, and every state once. With p_j, the
prediction of the iteration before,

    p_j = G_j(e_j)                       in the first iteration, beside the fine stage
    r_j = y_j - p_j                      what the coarse steps miss
    c_j = G_j(u_{j-1})                   the prediction; p_j of the next iteration
    u_j = r_j + c_j

which is the difference form with one call in the sweep in place of two.

In W **windows** the trunk is divided into W runs of stages, one run after another. A window is a
parareal network of its own: its first stage reads the corrected state u before the window, which
needs no guess, and the guesses of its other stages are made from that state in place of the inputs.

The docstring of `sweep` lists the steps of two stages. The fx graph, the eager executor, the ONNX
writer, CUDA streams and the lists of ranks walk over these steps; none states the iteration again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from passes.plan.schema import Plan, windows_of

_T = TypeVar("_T")


class Role(StrEnum):
    """Kind of a step."""

    PREPROCESS = "preprocess"  # guess the state that enters a stage
    FINE = "fine"  # propagate a state through a stage
    RESIDUAL = "residual"  # subtract the input of a stage from the corrected state
    COARSE = "coarse"  # propagate a residual through a stage: the correction
    CORRECT = "correct"  # combine the state after a stage, and add corrections
    HEAD = "head"  # from the last state to the outputs


@dataclass(frozen=True)
class Symbol:
    """Name of a state: a letter as in the formulas above, a stage and an iteration, from 0."""

    letter: str
    stage: int
    iteration: int = 0

    def __str__(self) -> str:
        iteration = f"^{self.iteration + 1}" if self.iteration else ""
        return f"{self.letter}_{self.stage}{iteration}"


@dataclass(frozen=True)
class Step:
    """One call, difference or sum.

    Attributes:
        role: What it does.
        stage: Number of the stage, from 0; of the head the last one.
        iteration: Number of the iteration, from 0.
        reads: The states that it reads. FINE: the input of the stage, nothing for the first one.
            RESIDUAL: the state after the stage before, and the input of the stage. COARSE: the
            residual, and the input of the stage. CORRECT: the state after the stage before unless
            it is the first stage, the output of the stage, and corrections. HEAD: the last state.
            PREPROCESS: the state before the window, nothing in the first window.
            Of predictions, COARSE reads a state alone, RESIDUAL the output of the stage and a
            prediction, and CORRECT the residual in place of the output.
        writes: The state that it writes.
    """

    role: Role
    stage: int
    iteration: int
    reads: tuple[Symbol, ...]
    writes: Symbol

    def __str__(self) -> str:
        return f"{self.writes} <- {self.role}_{self.stage}({', '.join(map(str, self.reads))})"


def sweep(
    stages: int,
    kind: str = "chain",
    iterations: int = 1,
    *,
    reuse: bool = True,
    prune: bool = True,
    predicts: bool = False,
    chained: Collection[int] = (),
    windows: int = 1,
) -> tuple[Step, ...]:
    """List the steps of a parareal network, in a valid order of execution.

    Args:
        stages: Number of stages of all windows.
        kind: "chain" or "collapsed", which has one iteration.
        iterations: Number K of iterations.
        reuse: Whether iteration k takes the first k states, which are exact by then, from the
            iteration before; False computes every stage every time.
        prune: Whether to omit steps that the outputs do not depend on: with several iterations, the
            last stages of the first iterations.
        predicts: Whether coarse propagators predict states, as those of a loop in time.
        chained: Of predictions, the stages whose guess is the prediction of the stage before.
        windows: Number W of windows of equally many stages; of a chain without predictions.

    >>> for step in sweep(2):
    ...     print(step)
    x_1 <- preprocess_1()
    y_0 <- fine_0()
    y_1 <- fine_1(x_1)
    u_0 <- correct_0(y_0)
    r_1 <- residual_1(u_0, x_1)
    c_1 <- coarse_1(r_1, x_1)
    u_1 <- correct_1(u_0, y_1, c_1)
    out_1 <- head_1(u_1)
    """
    steps: list[Step] = []
    states: dict[int, Symbol] = {}
    for window in windows_of(stages, windows):
        entering: dict[int, Symbol] = {}
        steps += _guesses(window, entering, states, chained)
        for iteration in range(min(iterations, len(window))):
            computed = window[iteration if reuse else 0 :]
            for stage in computed:
                reads = (entering[stage],) if stage else ()
                output = Symbol("y", stage, iteration)
                steps.append(Step(Role.FINE, stage, iteration, reads, output))
            if predicts:
                if not iteration:
                    rest = (j for j in computed if j and j + 1 not in chained)
                    steps += (_prediction(stage, entering) for stage in rest)
                steps += _predicted(computed, iteration, states)
            else:
                add = _collapsed if kind == "collapsed" else _chain
                steps += add(computed, iteration, entering, states)
            entering = {stage: states[stage - 1] for stage in window if stage}
    last = states[stages - 1]
    steps.append(Step(Role.HEAD, stages - 1, last.iteration, (last,), _out(last)))
    return _needed(steps) if prune else tuple(steps)


def steps_of(plan: Plan, *, reuse: bool = True) -> tuple[Step, ...]:
    """List the steps of the network of a plan; the argument is that of `sweep`."""
    return sweep(
        len(plan.stages),
        plan.sweep,
        plan.iterations,
        reuse=reuse,
        predicts=plan.predicts,
        windows=plan.windows,
    )


def _guesses(
    window: range,
    entering: dict[int, Symbol],
    states: Mapping[int, Symbol],
    chained: Collection[int],
) -> Iterator[Step]:
    """Guess what enters the stages of a window; the state before the first one is there."""
    before = (states[window[0] - 1],) if window[0] else ()
    entering.update(zip(window, before, strict=False))
    for stage in window[1:]:
        step = Step(Role.PREPROCESS, stage, 0, before, Symbol("x", stage))
        if stage in chained:
            step = _prediction(stage - 1, entering)
        entering[stage] = step.writes
        yield step


def _chain(
    computed: range, iteration: int, entering: dict[int, Symbol], states: dict[int, Symbol]
) -> Iterator[Step]:
    """Correct one state after another; the first one that is computed is exact."""
    for stage in computed:
        corrections: tuple[Symbol, ...] = ()
        if stage > computed[0]:
            yield from _correction(stage, iteration, entering[stage], states[stage - 1])
            corrections = (Symbol("c", stage, iteration),)
        yield _correct(stage, iteration, states, corrections)


def _prediction(stage: int, entering: dict[int, Symbol]) -> Step:
    return Step(Role.COARSE, stage, 0, (entering[stage],), Symbol("p", stage))


def _predicted(computed: range, iteration: int, states: dict[int, Symbol]) -> Iterator[Step]:
    """Correct one state after another by the change of its prediction.

    >>> for step in sweep(3, iterations=2, predicts=True)[6:]:
    ...     print(step)
    c_1 <- coarse_1(u_0)
    u_1 <- correct_1(u_0, r_1, c_1)
    c_2 <- coarse_2(u_1)
    y_1^2 <- fine_1(u_0)
    y_2^2 <- fine_2(u_1)
    u_1^2 <- correct_1(u_0, y_1^2)
    r_2^2 <- residual_2(y_2^2, c_2)
    c_2^2 <- coarse_2(u_1^2)
    u_2^2 <- correct_2(u_1^2, r_2^2, c_2^2)
    out_2^2 <- head_2(u_2^2)
    """
    for stage in computed:
        if stage == computed[0]:
            yield _correct(stage, iteration, states, ())
            continue
        symbols = (Symbol(letter, stage, iteration) for letter in "yrc")
        output, residual, correction = symbols
        before = Symbol("c", stage, iteration - 1) if iteration else Symbol("p", stage)
        yield Step(Role.RESIDUAL, stage, iteration, (output, before), residual)
        yield Step(Role.COARSE, stage, iteration, (states[stage - 1],), correction)
        yield _correct(stage, iteration, states, (correction,), residual)


def _collapsed(
    computed: range, iteration: int, entering: dict[int, Symbol], states: dict[int, Symbol]
) -> Iterator[Step]:
    """Leave the states in between uncorrected; add every correction to the last one."""
    corrections: list[Symbol] = []
    for stage in computed:
        if stage:
            yield from _correction(stage, iteration, entering[stage], states[stage - 1])
            corrections.append(Symbol("c", stage, iteration))
        last = stage == computed[-1]
        yield _correct(stage, iteration, states, tuple(corrections) if last else ())


def _correction(stage: int, iteration: int, entering: Symbol, before: Symbol) -> Iterator[Step]:
    residual, correction = (Symbol(letter, stage, iteration) for letter in "rc")
    yield Step(Role.RESIDUAL, stage, iteration, (before, entering), residual)
    yield Step(Role.COARSE, stage, iteration, (residual, entering), correction)


def _correct(
    stage: int,
    iteration: int,
    states: dict[int, Symbol],
    corrections: tuple[Symbol, ...],
    produced: Symbol | None = None,
) -> Step:
    before = (states[stage - 1],) if stage else ()
    states[stage] = Symbol("u", stage, iteration)
    reads = (*before, produced or Symbol("y", stage, iteration), *corrections)
    return Step(Role.CORRECT, stage, iteration, reads, states[stage])


def in_sequence(stages: int) -> tuple[Step, ...]:
    """List the steps of the original network: the stages one after another, then the head.

    >>> print(*in_sequence(2), sep="; ")
    y_0 <- fine_0(); u_0 <- correct_0(y_0); y_1 <- fine_1(u_0); u_1 <- correct_1(u_0, y_1); \
out_1 <- head_1(u_1)
    """
    steps: list[Step] = []
    states: dict[int, Symbol] = {}
    for stage in range(stages):
        reads = (states[stage - 1],) if stage else ()
        steps.append(Step(Role.FINE, stage, 0, reads, Symbol("y", stage)))
        steps.append(_correct(stage, 0, states, ()))
    last = states[stages - 1]
    return (*steps, Step(Role.HEAD, stages - 1, 0, (last,), _out(last)))


def _out(last: Symbol) -> Symbol:
    return Symbol("out", last.stage, last.iteration)


def _needed(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Omit the steps that the last one does not depend on."""
    read = {steps[-1].writes}
    kept = []
    for step in reversed(steps):
        if step.writes in read:
            read.update(step.reads)
            kept.append(step)
    return tuple(reversed(kept))


def walk(
    steps: Iterable[Step],
    call: Callable[[Step, Sequence[_T]], _T],
    together: Callable[[Sequence[Step], Sequence[Sequence[_T]]], Sequence[_T]] | None = None,
) -> Iterator[tuple[Step, _T]]:
    """Execute steps in order, and yield every step with its result.

    A value is dropped after the last step that reads it.

    Args:
        steps: The steps.
        call: Executes a step, given the values of the states that it reads.
        together: Executes all fine stages of an iteration at once.

    >>> for step, value in walk(in_sequence(2), lambda step, values: sum(values) + 1):
    ...     print(step.writes, value)
    y_0 1
    u_0 2
    y_1 3
    u_1 6
    out_1 7
    """
    steps = tuple(steps)
    last_read = {symbol: step for step in steps for symbol in step.reads}
    values: dict[Symbol, _T] = {}
    for fine, run in itertools.groupby(steps, lambda step: step.role is Role.FINE):
        group = [*run]
        done: Iterable[_T]
        if fine and together is not None:
            done = together(group, [[values[symbol] for symbol in s.reads] for s in group])
        else:
            done = (call(step, [values[symbol] for symbol in step.reads]) for step in group)
        for step, value in zip(group, done, strict=True):
            if step.writes in last_read:
                values[step.writes] = value
            for symbol in step.reads:
                if last_read[symbol] is step:
                    values.pop(symbol, None)
            yield step, value
