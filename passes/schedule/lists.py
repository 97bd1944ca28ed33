"""List what every rank does in one step: static instructions, checked before they run.

A stage lives on one rank. Forward: all ranks preprocess and run their fine stages at once; then a
sweep corrects the last state. Backward mirrors it: the adjoints travel back through the coarse
propagators alone, and each fine stage runs backward as soon as its adjoint arrives.

A **chain** passes the corrected state from stage to stage. Four ranks, one stage each; g preprocess
(guess), f fine, c correct, h head, * message; capitals are backward:

    rank 0    f f f f c *                                           * F F F F
    rank 1  g f f f f   * c *                                   * C * F F F F G
    rank 2  g f f f f       * c *                           * C *     F F F F G
    rank 3  g f f f f           * c h H C *  F F F F G

With K iterations, iteration k (from 0) computes the stages k to N - K + k: the stages before are
exact by then, and the stages after do not reach any result. A state that arrives in one iteration
is the input of the stage in the next, so each state and each adjoint is one message.

A **collapsed** sweep sends every residual through a map P_j of its own to the last state, and sums
the results along a binary tree whose root holds the last stage: ceil(log2 R) receives deep for R
ranks. The residual y_{j-1} - x_j needs the output of stage j - 1 and the guess of stage j, which
live on two ranks. The *guess* is sent, to the rank of stage j - 1, where P_j lives too: it arrives
before the fine stage is done, and backward its adjoint has the time of a whole fine stage. (Were
y_{j-1} sent, of the same size, each phase would have one more link on its critical path.) A rank
posts receives for these messages in an order that all ranks share, and waits for them later.

    rank 0  f f f f *   c *                           * C *   F F F F
    rank 1  g * f f f f * c * *                   * * C * F F F F * G
    rank 2  g * f f f f * c *                     * C *   F F F F * G
    rank 3  g * f f f f         * * h H * *   F F F F * G
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from passes.plan.schema import Plan
from passes.schedule.instruction import Instruction, Kind
from passes.transform.sweep import Role, sweep


@dataclass(frozen=True)
class Sweep:
    """The sweep that the lists implement.

    Attributes:
        kind: "chain" or "collapsed".
        iterations: Number K of parareal iterations.
        sources: By stage, the stages that compute its inputs; empty if each stage reads the one
            before. Irrelevant in a chain, whose states carry everything.
    """

    kind: str = "chain"
    iterations: int = 1
    sources: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, plan: Plan) -> Sweep:
        """Return the sweep of a plan."""
        producer = {name: i for i, stage in enumerate(plan.stages) for name in stage.produces}
        sources = (sorted({producer[name] for name in s.consumes}) for s in plan.stages)
        iterations = min(plan.iterations, len(plan.stages))
        return cls(plan.sweep, iterations, tuple(map(tuple, sources)))

    def reads(self, stage: int) -> tuple[int, ...]:
        """Return the stages that compute the inputs of a stage."""
        return self.sources[stage] if self.sources else (stage - 1,)

    def computed(self, stages: int, iteration: int) -> range:
        """Return which of `stages` stages an iteration computes.

        >>> [list(Sweep(iterations=2).computed(4, iteration)) for iteration in (0, 1)]
        [[0, 1, 2], [1, 2, 3]]
        """
        steps = sweep(stages, self.kind, self.iterations)
        computed = [s.stage for s in steps if s.role is Role.FINE and s.iteration == iteration]
        return range(computed[0], computed[-1] + 1)

    def corrected(self, stages: int, iteration: int) -> range:
        """Return which stages an iteration corrects: all that it computes but the first, exact."""
        return self.computed(stages, iteration)[1:]

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
    """Lists of a chain of K iterations.

    Args:
        placement: Rank of every stage.
        sweep: The sweep.
        stages_of: Stages of every rank.
    """

    def __init__(
        self, placement: tuple[int, ...], sweep: Sweep, stages_of: Sequence[Sequence[int]]
    ) -> None:
        self._placement = placement
        self._stages_of = stages_of
        self._last = len(placement) - 1
        self._bands = [sweep.computed(len(placement), k) for k in range(sweep.iterations)]

    def start(self, rank: int, batch: int) -> list[Instruction]:
        instructions = []
        for stage in self._computed(rank, 0):
            if stage:
                instructions.append(Instruction(Kind.GUESS, stage, batch))
            instructions.append(Instruction(Kind.FINE, stage, batch))
        return instructions

    def sweep(self, rank: int, batch: int) -> list[Instruction]:
        instructions = []
        for k in range(len(self._bands)):
            if k:
                instructions += [_fine(stage, batch, k) for stage in self._computed(rank, k)]
            instructions += self._sweep(rank, batch, k)
        return instructions

    def backward(self, rank: int, batch: int) -> list[Instruction]:
        instructions = []
        for k in reversed(range(len(self._bands))):
            instructions += self._sweep_backward(rank, batch, k)
            for stage in reversed(self._computed(rank, k)):
                instructions.append(Instruction(Kind.FINE_BACKWARD, stage, batch, None, k))
                if stage and not k:
                    instructions.append(Instruction(Kind.GUESS_BACKWARD, stage, batch))
        return instructions

    def _sweep(self, rank: int, batch: int, k: int) -> list[Instruction]:
        instructions = []
        for stage in self._stages_of[rank]:
            if (
                stage
                and stage - 1 in self._bands[k]
                and (peer := self._neighbor_rank(stage, -1)) is not None
            ):
                instructions.append(Instruction(Kind.RECEIVE, stage - 1, batch, peer, k))
            if stage not in self._bands[k]:
                continue
            instructions.append(Instruction(Kind.CORRECT, stage, batch, None, k))
            if stage == self._last:
                instructions.append(Instruction(Kind.HEAD, stage, batch, None, k))
            elif (peer := self._neighbor_rank(stage, +1)) is not None:
                instructions.append(Instruction(Kind.SEND, stage, batch, peer, k))
        return instructions

    def _sweep_backward(self, rank: int, batch: int, k: int) -> list[Instruction]:
        instructions = []
        for stage in reversed(self._stages_of[rank]):
            if stage in self._bands[k]:
                if stage == self._last:
                    instructions.append(Instruction(Kind.HEAD_BACKWARD, stage, batch, None, k))
                elif (peer := self._neighbor_rank(stage, +1)) is not None:
                    instructions.append(Instruction(Kind.RECEIVE_ADJOINT, stage, batch, peer, k))
                if stage > k:  # stage k is exact
                    instructions.append(Instruction(Kind.COARSE_BACKWARD, stage, batch, None, k))
            if (
                stage
                and stage - 1 in self._bands[k]
                and (peer := self._neighbor_rank(stage, -1)) is not None
            ):
                instructions.append(Instruction(Kind.SEND_ADJOINT, stage - 1, batch, peer, k))
        return instructions

    def _computed(self, rank: int, k: int) -> list[int]:
        return [stage for stage in self._stages_of[rank] if stage in self._bands[k]]

    def _neighbor_rank(self, stage: int, side: int) -> int | None:
        """Return the rank of a neighboring stage; None if it is the same rank."""
        rank = self._placement[stage + side]
        return rank if rank != self._placement[stage] else None


def _fine(stage: int, batch: int, k: int) -> Instruction:
    return Instruction(Kind.FINE, stage, batch, None, k)


class _CollapsedLists:
    """Lists of a collapsed sweep: one map per residual, and one sum over the ranks.

    Args:
        placement: Rank of every stage.
        sweep: The sweep.
        stages_of: Stages of every rank.
    """

    def __init__(
        self, placement: tuple[int, ...], sweep: Sweep, stages_of: Sequence[Sequence[int]]
    ) -> None:
        self._placement = placement
        self._corrector = sweep.corrector
        self._stages_of = stages_of
        self._last = len(placement) - 1
        corrected: list[list[int]] = [[] for _ in stages_of]
        readers: list[set[int]] = [set() for _ in placement]
        for stage in range(1, len(placement)):
            rank = placement[self._corrector(stage)]
            corrected[rank].append(stage)
            for source in sweep.reads(stage):
                readers[source].add(rank)
        # By rank, the stages whose corrections it computes, and the outputs that these need.
        self._corrected = corrected
        self._readers = [sorted(ranks - {placement[i]}) for i, ranks in enumerate(readers)]
        self._read: list[list[int]] = [[] for _ in stages_of]
        for stage, ranks in enumerate(self._readers):
            for rank in ranks:
                self._read[rank].append(stage)
        # By rank, the stages whose guesses, and whose outputs, it computes or reads.
        self._with_guesses = [
            sorted({*a, *b} - {0}) for a, b in zip(stages_of, corrected, strict=True)
        ]
        self._with_outputs = [sorted({*a, *b}) for a, b in zip(stages_of, self._read, strict=True)]

    def start(self, rank: int, batch: int) -> list[Instruction]:
        instructions, corrected = [], self._corrected[rank]
        for stage in self._with_guesses[rank]:
            if self._placement[stage] == rank:
                instructions.append(Instruction(Kind.GUESS, stage, batch))
            instructions += self._guess(rank, stage, batch, Kind.SEND_GUESS, Kind.EXPECT_GUESS)
        for stage in self._with_outputs[rank]:
            if self._placement[stage] == rank:
                instructions.append(Instruction(Kind.FINE, stage, batch))
            instructions += self._output(rank, stage, batch, Kind.SEND_OUTPUT, Kind.EXPECT_OUTPUT)
        for stage in corrected:
            if self._guess_reader(stage) is not None:
                owner = self._placement[stage]
                instructions.append(Instruction(Kind.RECEIVE_GUESS, stage, batch, owner))
        for stage in self._read[rank]:
            owner = self._placement[stage]
            instructions.append(Instruction(Kind.RECEIVE_OUTPUT, stage, batch, owner))
        return instructions + [Instruction(Kind.CORRECT, stage, batch) for stage in corrected]

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
        instructions += [Instruction(Kind.COARSE_BACKWARD, s, batch) for s in self._corrected[rank]]
        for stage in self._with_outputs[rank]:
            instructions += self._output(
                rank, stage, batch, Kind.EXPECT_OUTPUT_ADJOINT, Kind.SEND_OUTPUT_ADJOINT
            )
        for stage in self._with_guesses[rank]:
            instructions += self._guess(
                rank, stage, batch, Kind.EXPECT_GUESS_ADJOINT, Kind.SEND_GUESS_ADJOINT
            )
        for stage in self._stages_of[rank]:
            for peer in self._readers[stage]:
                instructions.append(Instruction(Kind.RECEIVE_OUTPUT_ADJOINT, stage, batch, peer))
        instructions += [
            Instruction(Kind.FINE_BACKWARD, stage, batch) for stage in self._stages_of[rank]
        ]
        for stage in self._stages_of[rank]:
            if stage:
                if (home := self._guess_reader(stage)) is not None:
                    instructions.append(Instruction(Kind.RECEIVE_GUESS_ADJOINT, stage, batch, home))
                instructions.append(Instruction(Kind.GUESS_BACKWARD, stage, batch))
        return instructions

    # All ranks handle the guesses by stage, then the outputs by stage and reader (backward in the
    # reverse order): as any two of them see the same order, no cycle of waits can occur.

    def _guess(
        self, rank: int, stage: int, batch: int, owner: Kind, corrector: Kind
    ) -> list[Instruction]:
        """Return the side of a rank in the message of a guess, or of its adjoint."""
        owned, home = self._placement[stage], self._guess_reader(stage)
        if home is None or rank not in (owned, home):
            return []
        if rank == owned:
            return [Instruction(owner, stage, batch, home)]
        return [Instruction(corrector, stage, batch, owned)]

    def _output(
        self, rank: int, stage: int, batch: int, owner: Kind, reader: Kind
    ) -> list[Instruction]:
        """Return the side of a rank in the messages of an output, or of its adjoints."""
        if self._placement[stage] == rank:
            return [Instruction(owner, stage, batch, peer) for peer in self._readers[stage]]
        if rank in self._readers[stage]:
            return [Instruction(reader, stage, batch, self._placement[stage])]
        return []

    def _guess_reader(self, stage: int) -> int | None:
        """Return the rank that the guess of a stage is sent to; None if it is the same rank."""
        rank = self._placement[self._corrector(stage)]
        return rank if rank != self._placement[stage] else None

    def _tree(self, rank: int) -> tuple[list[int], int | None]:
        """Return the ranks whose partial sums a rank receives, in order, and its parent.

        A binomial tree: at step d the ranks at a distance from the root of an odd multiple of 2^d
        send their sums to the rank 2^d nearer. With 8 ranks and root 7: rank 1 receives from 0,
        5 from 4, 3 from 2 and 1, and 7 from 6, 5 and 3.
        """
        ranks, root = len(self._stages_of), self._placement[-1]
        distance, step = (root - rank) % ranks, 1
        below: list[int] = []
        while step < ranks:
            if distance & step:
                return below, (rank + step) % ranks
            if distance + step < ranks:
                below.append((rank - step) % ranks)
            step *= 2
        return below, None
