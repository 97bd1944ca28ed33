"""List what every rank does in one step: static instructions, checked before they run.

A stage lives on one rank. Forward: all ranks preprocess and run their fine stages at once; then a
sweep corrects the last state. Backward mirrors it: the adjoints travel back through the coarse
propagators alone, and each fine stage runs backward as soon as its adjoint arrives.

A **chain** passes the corrected state from stage to stage. Four ranks, one stage each, in time from
left to right: p preprocess (the guess), f fine stage, c correct, h head, * message, and in capitals
the same backward:

    rank 0    f f f f c *                                           * F F F F
    rank 1  p f f f f   * c *                                   * C * F F F F P
    rank 2  p f f f f       * c *                           * C *     F F F F P
    rank 3  p f f f f           * c h H C *  F F F F P

In windows, the state before a window goes to every rank, whose guesses and fine stages then start.

With K iterations, iteration k (from 0) computes the stages k to N - K + k: the stages before are
exact by then, and the stages after do not reach any result. A state that arrives in one iteration
is the input of the stage in the next, so each state and each adjoint is one message.

A **collapsed** sweep sends every residual through a coarse propagator F_j of its own to the last
state, and sums the results along a binary tree whose root holds the last stage: ceil(log2 R)
receives deep for R ranks. The residual y_{j-1} - x_j needs the output of stage j - 1 and the guess
of stage j, which live on two ranks. The *guess* is sent, to the rank of stage j - 1, where F_j
lives too: it arrives before the fine stage is done, and backward its adjoint has the time of a
whole fine stage. (Were y_{j-1} sent, of the same size, each phase would have one more link on its
critical path.) A rank posts receives for these messages in an order that all ranks share, and waits
for them later.

    rank 0  f f f f *   c *                           * C *   F F F F
    rank 1  p * f f f f * c * *                   * * C * F F F F * P
    rank 2  p * f f f f * c *                     * C *   F F F F * P
    rank 3  p * f f f f         * * h H * *   F F F F * P
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from passes.plan.schema import Plan, windows_of
from passes.schedule.instruction import EXPECTS, Instruction, Kind
from passes.transform.sweep import Role, Symbol
from passes.transform.sweep import sweep as list_steps


@dataclass(frozen=True)
class Sweep:
    """The sweep that the lists implement.

    Attributes:
        kind: "chain" or "collapsed".
        iterations: Number K of parareal iterations.
        sources: By stage, the stages that compute its inputs; empty if each stage reads the one
            before. Irrelevant in a chain, whose states carry everything.
        predicts: Whether coarse propagators predict states; see `passes.transform.sweep`.
        windows: Number W of windows; see there.
    """

    kind: str = "chain"
    iterations: int = 1
    sources: tuple[tuple[int, ...], ...] = ()
    predicts: bool = False
    windows: int = 1

    @classmethod
    def of(cls, plan: Plan) -> Sweep:
        """Return the sweep of a plan."""
        producer = {name: i for i, stage in enumerate(plan.stages) for name in stage.produces}
        sources = (sorted({producer[name] for name in s.consumes}) for s in plan.stages)
        iterations = min(plan.iterations, len(plan.stages))
        return cls(plan.sweep, iterations, tuple(map(tuple, sources)), plan.predicts, plan.windows)

    def reads(self, stage: int) -> tuple[int, ...]:
        """Return the stages that compute the inputs of a stage."""
        return self.sources[stage] if self.sources else (stage - 1,)

    def computed(self, stages: int, iteration: int) -> range:
        """Return which of `stages` stages an iteration computes.

        >>> [list(Sweep(iterations=2).computed(4, iteration)) for iteration in (0, 1)]
        [[0, 1, 2], [1, 2, 3]]
        """
        steps = list_steps(stages, self.kind, self.iterations)
        computed = [s.stage for s in steps if s.role is Role.FINE and s.iteration == iteration]
        return range(computed[0], computed[-1] + 1)

    def corrected(self, stages: int, iteration: int) -> list[int]:
        """Return which stages an iteration corrects: all that it computes but the first, exact.

        Nor is the first stage of any other window corrected.
        """
        opening = {window[0] for window in windows_of(stages, self.windows)[1:]}
        return [j for j in self.computed(stages, iteration)[1:] if j not in opening]

    def corrector(self, stage: int) -> int:
        """Return the stage on whose rank the coarse propagator of a stage lives."""
        return stage - 1 if self.kind == "collapsed" else stage


CHAIN = Sweep()
"""The sweep of the paper: a chain, one iteration."""


def schedule(
    placement: Sequence[int], sweep: Sweep = CHAIN, *, batches: int = 1, backward: bool = True
) -> tuple[tuple[Instruction, ...], ...]:
    """List what every rank does in one step.

    During the sweep of one micro-batch, the fine stages of the next micro-batch compute.

    Args:
        placement: Rank of every stage; several stages may share one.
        sweep: How the corrections travel.
        batches: Number of micro-batches.
        backward: Whether to run backward too.

    Returns:
        The instructions, by rank.

    >>> for program in schedule((0, 1), backward=False):
    ...     print([instruction.kind.value for instruction in program])
    ['fine', 'correct', 'send state']
    ['guess', 'fine', 'receive state', 'correct', 'head']
    """
    stages_of: list[list[int]] = [[] for _ in range(max(placement) + 1)]
    for stage, rank in enumerate(placement):
        stages_of[rank].append(stage)
    writer: _ListWriter = (_CollapsedLists if sweep.kind == "collapsed" else _ChainLists)(
        tuple(placement), sweep, stages_of
    )
    return tuple(_rank_list(writer, rank, batches, backward) for rank in range(len(stages_of)))


def _rank_list(
    writer: _ListWriter, rank: int, batches: int, backward: bool
) -> tuple[Instruction, ...]:
    instructions = writer.start(rank, 0)
    for batch in range(batches):
        if batch + 1 < batches:
            instructions += writer.start(rank, batch + 1)
        instructions += writer.sweep(rank, batch)
    if backward:
        for batch in range(batches):
            instructions += writer.backward(rank, batch)
    return tuple(instructions)


class _ListWriter(Protocol):
    """Writer of the parts of a rank's list, for one micro-batch."""

    def start(self, rank: int, batch: int) -> list[Instruction]:
        """List everything that waits for no sweep."""

    def sweep(self, rank: int, batch: int) -> list[Instruction]:
        """List the remaining forward instructions."""

    def backward(self, rank: int, batch: int) -> list[Instruction]:
        """List all backward instructions."""


class _ChainLists:
    """Lists of a chain of K iterations: a walk over the steps of the sweep, and its mirror image.

    Args:
        placement: Rank of every stage.
        sweep: The sweep.
        stages_of: Stages of every rank.
    """

    def __init__(
        self, placement: tuple[int, ...], sweep: Sweep, stages_of: Sequence[Sequence[int]]
    ) -> None:
        steps = list_steps(
            len(placement), sweep.kind, sweep.iterations,
            predicts=sweep.predicts, windows=sweep.windows,
        )  # fmt: skip
        readers: dict[Symbol, set[int]] = {}  # ranks that read a state
        for step in steps:
            for symbol in step.reads:
                readers.setdefault(symbol, set()).add(placement[step.stage])
        ends = {(s.stage, s.iteration) for s in steps if s.role is Role.CORRECT}
        coarse = {(s.stage, s.iteration) for s in steps if s.role is Role.COARSE}
        self._corrected = coarse & ends
        guessed = {step.stage for step in steps if step.role is Role.PREPROCESS}
        first, *_ = windows_of(len(placement), sweep.windows)
        # By rank: what waits for no state of another rank, and all that follows.
        self._start: list[list[Instruction]] = [[] for _ in stages_of]
        self._sweep: list[list[Instruction]] = [[] for _ in stages_of]
        for step in steps:
            rank, stage, k = placement[step.stage], step.stage, step.iteration
            if step.role is Role.FINE and not k:
                begin = (self._start if stage in first else self._sweep)[rank]
                if stage in guessed:
                    begin.append(Instruction(Kind.GUESS, stage, 0))
                begin.append(Instruction(Kind.FINE, stage, 0))
            elif step.role is Role.COARSE and step.writes.letter == "p":
                self._start[rank].append(Instruction(Kind.PREDICT, stage, 0))
            elif step.role is Role.COARSE and (stage, k) not in ends:
                # The first iteration of the stage is the next one, which needs a prediction.
                self._sweep[rank].append(Instruction(Kind.PREDICT, stage, 0, None, k + 1))
            elif step.role in _COMPUTES:
                self._sweep[rank].append(Instruction(_COMPUTES[step.role], stage, 0, None, k))
            if step.role is Role.CORRECT:
                # A state travels as soon as it is there: to the rank of the stage after, and before
                # a window to all ranks, which guess from it.
                for reader in sorted(readers[step.writes] - {rank}):
                    self._sweep[rank].append(Instruction(Kind.SEND, stage, 0, reader, k))
                    self._sweep[reader].append(Instruction(Kind.RECEIVE, stage, 0, rank, k))

    def start(self, rank: int, batch: int) -> list[Instruction]:
        return [replace(instruction, batch=batch) for instruction in self._start[rank]]

    def sweep(self, rank: int, batch: int) -> list[Instruction]:
        return [replace(instruction, batch=batch) for instruction in self._sweep[rank]]

    def backward(self, rank: int, batch: int) -> list[Instruction]:
        forward = [*self._start[rank], *self._sweep[rank]]
        return [
            replace(it, kind=_BACKWARD[it.kind], batch=batch)
            for it in reversed(forward)
            # A state without a correction has no coarse propagator to go back through.
            if it.kind is not Kind.PREDICT
            and (it.kind is not Kind.CORRECT or (it.stage, it.iteration) in self._corrected)
        ]


_COMPUTES = {Role.FINE: Kind.FINE, Role.CORRECT: Kind.CORRECT, Role.HEAD: Kind.HEAD}
"""Instructions of a chain by step; CORRECT includes residual and coarse propagator."""

_BACKWARD = {
    Kind.GUESS: Kind.GUESS_BACKWARD,
    Kind.FINE: Kind.FINE_BACKWARD,
    Kind.CORRECT: Kind.COARSE_BACKWARD,
    Kind.HEAD: Kind.HEAD_BACKWARD,
    Kind.SEND: Kind.RECEIVE_ADJOINT,
    Kind.RECEIVE: Kind.SEND_ADJOINT,
}
"""Backward instruction of every forward instruction of a chain."""


class _CollapsedLists:
    """Lists of a collapsed sweep: one map per residual, and one sum over the ranks.

    Every rank handles the guesses by stage, then the outputs by stage and reader, forward and
    backward alike: as any two ranks see the same order, no cycle of waits can occur.

    Args:
        placement: Rank of every stage.
        sweep: The sweep.
        stages_of: Stages of every rank.
    """

    def __init__(
        self, placement: tuple[int, ...], sweep: Sweep, stages_of: Sequence[Sequence[int]]
    ) -> None:
        self._root = placement[-1]
        self._ranks = len(stages_of)
        self._last = len(placement) - 1
        # By rank: what it computes and posts at once, and the corrections, which wait for messages.
        self._start: list[list[Instruction]] = [[] for _ in stages_of]
        self._corrections: list[list[Instruction]] = [[] for _ in stages_of]
        correctors = {
            stage: placement[sweep.corrector(stage)] for stage in range(1, self._last + 1)
        }
        readers: list[set[int]] = [set() for _ in placement]  # of the output of every stage
        for stage, rank in correctors.items():
            for source in sweep.reads(stage):
                readers[source].add(rank)
        for step in list_steps(len(placement), sweep.kind):
            stage, owner = step.stage, placement[step.stage]
            if step.role is Role.PREPROCESS:
                self._start[owner].append(Instruction(Kind.GUESS, stage, 0))
                self._post(Kind.SEND_GUESS, Kind.EXPECT_GUESS, stage, owner, {correctors[stage]})
            elif step.role is Role.FINE:
                self._start[owner].append(Instruction(Kind.FINE, stage, 0))
                self._post(Kind.SEND_OUTPUT, Kind.EXPECT_OUTPUT, stage, owner, readers[stage])
            elif step.role is Role.COARSE:
                correction = Instruction(Kind.CORRECT, stage, 0)
                self._corrections[correctors[stage]].append(correction)

    def _post(self, send: Kind, expect: Kind, stage: int, owner: int, readers: set[int]) -> None:
        """Post a message from the owner of a value to every other rank that reads it."""
        for reader in sorted(readers - {owner}):
            self._start[owner].append(Instruction(send, stage, 0, reader))
            self._start[reader].append(Instruction(expect, stage, 0, owner))

    def start(self, rank: int, batch: int) -> list[Instruction]:
        posted = self._start[rank]
        awaited = [replace(it, kind=EXPECTS[it.kind]) for it in posted if it.kind in EXPECTS]
        return [replace(it, batch=batch) for it in (*posted, *awaited, *self._corrections[rank])]

    def sweep(self, rank: int, batch: int) -> list[Instruction]:
        below, above = self._tree(rank)
        instructions = [Instruction(Kind.RECEIVE_SUM, self._last, batch, peer) for peer in below]
        if above is None:
            return [*instructions, Instruction(Kind.HEAD, self._last, batch)]
        return [*instructions, Instruction(Kind.SEND_SUM, self._last, batch, above)]

    def backward(self, rank: int, batch: int) -> list[Instruction]:
        below, above = self._tree(rank)
        instructions = [Instruction(Kind.HEAD_BACKWARD, self._last, batch)]
        if above is not None:
            instructions = [Instruction(Kind.RECEIVE_SUM_ADJOINT, self._last, batch, above)]
        for peer in reversed(below):  # the deepest branch first, as it takes longest
            instructions.append(Instruction(Kind.SEND_SUM_ADJOINT, self._last, batch, peer))
        posted = self._start[rank]
        outputs = [it for it in posted if it.kind in (Kind.SEND_OUTPUT, Kind.EXPECT_OUTPUT)]
        guesses = [it for it in posted if it.kind in (Kind.SEND_GUESS, Kind.EXPECT_GUESS)]
        instructions += [replace(it, kind=Kind.COARSE_BACKWARD) for it in self._corrections[rank]]
        # An adjoint travels the way of its value in reverse: who sent expects, who expected sends.
        instructions += [replace(it, kind=_ADJOINT[it.kind]) for it in (*outputs, *guesses)]
        instructions += [
            replace(it, kind=Kind.RECEIVE_OUTPUT_ADJOINT)
            for it in outputs
            if it.kind is Kind.SEND_OUTPUT
        ]
        instructions += [
            replace(it, kind=Kind.FINE_BACKWARD) for it in posted if it.kind is Kind.FINE
        ]
        sent = {it.stage: it for it in guesses if it.kind is Kind.SEND_GUESS}
        for guess in posted:
            if guess.kind is Kind.GUESS:
                if guess.stage in sent:
                    message = sent[guess.stage]
                    instructions.append(replace(message, kind=Kind.RECEIVE_GUESS_ADJOINT))
                instructions.append(replace(guess, kind=Kind.GUESS_BACKWARD))
        return [replace(it, batch=batch) for it in instructions]

    def _tree(self, rank: int) -> tuple[list[int], int | None]:
        """Return the ranks whose partial sums a rank receives, in order, and its parent.

        A binomial tree: at step d the ranks at a distance from the root of an odd multiple of 2^d
        send their sums to the rank 2^d nearer. With 8 ranks and root 7: rank 1 receives from 0,
        5 from 4, 3 from 2 and 1, and 7 from 6, 5 and 3.
        """
        ranks = self._ranks
        distance, step = (self._root - rank) % ranks, 1
        below: list[int] = []
        while step < ranks:
            if distance & step:
                return below, (rank + step) % ranks
            if distance + step < ranks:
                below.append((rank - step) % ranks)
            step *= 2
        return below, None


_ADJOINT = {
    Kind.SEND_OUTPUT: Kind.EXPECT_OUTPUT_ADJOINT,
    Kind.EXPECT_OUTPUT: Kind.SEND_OUTPUT_ADJOINT,
    Kind.SEND_GUESS: Kind.EXPECT_GUESS_ADJOINT,
    Kind.EXPECT_GUESS: Kind.SEND_GUESS_ADJOINT,
}
"""Message of the adjoint, on the same rank, for every message of a value."""
