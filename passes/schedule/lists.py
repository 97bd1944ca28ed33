"""What every rank does in one step, as static lists of instructions, proven before they run.

A stage lives on one rank. Forward: all ranks guess and run their fine stages at once; then a sweep
corrects the last state. Backward mirrors it: the adjoints travel back through the coarse networks
alone, and each fine stage runs backward as soon as its own adjoint is there.

A **chain** passes the corrected state from stage to stage. Four ranks, one stage each; g guess,
f fine, c correct, h head, * message; capitals are backward:

    rank 0    f f f f c *                                           * F F F F
    rank 1  g f f f f   * c *                                   * C * F F F F G
    rank 2  g f f f f       * c *                           * C *     F F F F G
    rank 3  g f f f f           * c h H C *  F F F F G

With K iterations, iteration k (from 0) computes the stages k to N - K + k: those before are exact
by then, those behind reach no result any more. A state that arrived in one iteration is what the
stage reads in the next, so each state and each adjoint is one message.

A **collapsed** sweep sends every residual through a map P_j of its own to the last state, and adds
these up along a binary tree whose root holds the last stage: ceil(log2 R) messages deep for R
ranks. The residual y_{j-1} - x_j needs what stage j - 1 computed and what was guessed for stage j,
which live on two ranks. The *guess* crosses, to the rank of stage j - 1, where P_j lives too: it is
there before the fine stage is done, and backward its adjoint has the time of a whole fine stage.
(Were y_{j-1} to cross, of the same size, a link more would lie on the path each way.) A rank gives
room for these messages in an order that all ranks keep, and waits for them when it needs them.

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

__all__ = ["CHAIN", "Sweep", "schedule"]


@dataclass(frozen=True)
class Sweep:
    """What the lists depend on, beside the placement.

    Attributes:
        kind: "chain" or "collapsed".
        iterations: Number K of parareal iterations.
        sources: By stage, the stages that compute what it reads; the one before where there is no
            entry. In a chain states carry everything, and it does not matter.
    """

    kind: str = "chain"
    iterations: int = 1
    sources: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, plan: Plan) -> Sweep:
        """The sweep of a plan."""
        makers = {name: i for i, stage in enumerate(plan.stages) for name in stage.produces}
        sources = (sorted({makers[name] for name in s.consumes}) for s in plan.stages)
        rounds = min(plan.iterations, len(plan.stages))
        return cls(plan.sweep, rounds, tuple(map(tuple, sources)))

    def reads(self, stage: int) -> tuple[int, ...]:
        """The stages that compute what a stage reads."""
        return self.sources[stage] if self.sources else (stage - 1,)

    def computed(self, stages: int, iteration: int) -> range:
        """Return the stages, of so many, that an iteration computes.

        >>> [list(Sweep(iterations=2).computed(4, iteration)) for iteration in (0, 1)]
        [[0, 1, 2], [1, 2, 3]]
        """
        steps = sweep(stages, self.kind, self.iterations)
        computed = [s.stage for s in steps if s.role is Role.FINE and s.iteration == iteration]
        return range(computed[0], computed[-1] + 1)

    def corrected(self, stages: int, iteration: int) -> range:
        """The stages, of so many, that an iteration corrects; its first one is exact."""
        return self.computed(stages, iteration)[1:]

    def corrector(self, stage: int) -> int:
        """The stage on whose rank the correction of a stage lives."""
        return stage - 1 if self.kind == "collapsed" else stage


CHAIN = Sweep()
"""The paper's sweep: a chain, once."""


def schedule(
    placement: Sequence[int], sweep: Sweep = CHAIN, *, batches: int = 1, backward: bool = True
) -> tuple[tuple[Instruction, ...], ...]:
    """List what every rank does in one step.

    While the sweep of one micro-batch is under way, the fine stages of the next one compute.

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
    own: list[list[int]] = [[] for _ in range(max(placement) + 1)]
    for stage, rank in enumerate(placement):
        own[rank].append(stage)
    lists = (_Collapsed if sweep.kind == "collapsed" else _Chain)(tuple(placement), sweep, own)
    return tuple(_rank(lists, rank, batches, backward) for rank in range(len(own)))


def _rank(lists: _Lists, rank: int, batches: int, backward: bool) -> tuple[Instruction, ...]:
    done = lists.start(rank, 0)
    for batch in range(batches):
        if batch + 1 < batches:
            done += lists.start(rank, batch + 1)
        done += lists.sweep(rank, batch)
    if backward:
        for batch in range(batches):
            done += lists.backward(rank, batch)
    return tuple(done)


class _Lists(Protocol):
    """The parts of a rank's list, for one micro-batch."""

    def start(self, rank: int, batch: int) -> list[Instruction]:
        """Everything that waits for no sweep."""

    def sweep(self, rank: int, batch: int) -> list[Instruction]:
        """The rest of forward."""

    def backward(self, rank: int, batch: int) -> list[Instruction]:
        """All of backward."""


class _Chain:
    """From stage to stage, K times."""

    def __init__(
        self, placement: tuple[int, ...], sweep: Sweep, own: Sequence[Sequence[int]]
    ) -> None:
        self._placement = placement
        self._own = own
        self._last = len(placement) - 1
        self._bands = [sweep.computed(len(placement), k) for k in range(sweep.iterations)]

    def start(self, rank: int, batch: int) -> list[Instruction]:
        found = []
        for stage in self._computed(rank, 0):
            if stage:
                found.append(Instruction(Kind.GUESS, stage, batch))
            found.append(Instruction(Kind.FINE, stage, batch))
        return found

    def sweep(self, rank: int, batch: int) -> list[Instruction]:
        found = []
        for k in range(len(self._bands)):
            if k:
                found += [_fine(stage, batch, k) for stage in self._computed(rank, k)]
            found += self._sweep(rank, batch, k)
        return found

    def backward(self, rank: int, batch: int) -> list[Instruction]:
        found = []
        for k in reversed(range(len(self._bands))):
            found += self._sweep_back(rank, batch, k)
            for stage in reversed(self._computed(rank, k)):
                found.append(Instruction(Kind.FINE_BACKWARD, stage, batch, None, k))
                if stage and not k:
                    found.append(Instruction(Kind.GUESS_BACKWARD, stage, batch))
        return found

    def _sweep(self, rank: int, batch: int, k: int) -> list[Instruction]:
        found = []
        for stage in self._own[rank]:
            if (
                stage
                and stage - 1 in self._bands[k]
                and (peer := self._other(stage, -1)) is not None
            ):
                found.append(Instruction(Kind.RECEIVE, stage - 1, batch, peer, k))
            if stage not in self._bands[k]:
                continue
            found.append(Instruction(Kind.CORRECT, stage, batch, None, k))
            if stage == self._last:
                found.append(Instruction(Kind.HEAD, stage, batch, None, k))
            elif (peer := self._other(stage, +1)) is not None:
                found.append(Instruction(Kind.SEND, stage, batch, peer, k))
        return found

    def _sweep_back(self, rank: int, batch: int, k: int) -> list[Instruction]:
        found = []
        for stage in reversed(self._own[rank]):
            if stage in self._bands[k]:
                if stage == self._last:
                    found.append(Instruction(Kind.HEAD_BACKWARD, stage, batch, None, k))
                elif (peer := self._other(stage, +1)) is not None:
                    found.append(Instruction(Kind.RECEIVE_ADJOINT, stage, batch, peer, k))
                if stage > k:  # stage k is exact
                    found.append(Instruction(Kind.COARSE_BACKWARD, stage, batch, None, k))
            if (
                stage
                and stage - 1 in self._bands[k]
                and (peer := self._other(stage, -1)) is not None
            ):
                found.append(Instruction(Kind.SEND_ADJOINT, stage - 1, batch, peer, k))
        return found

    def _computed(self, rank: int, k: int) -> list[int]:
        return [stage for stage in self._own[rank] if stage in self._bands[k]]

    def _other(self, stage: int, side: int) -> int | None:
        """The rank of a neighbouring stage, if it is another one."""
        found = self._placement[stage + side]
        return found if found != self._placement[stage] else None


def _fine(stage: int, batch: int, k: int) -> Instruction:
    return Instruction(Kind.FINE, stage, batch, None, k)


class _Collapsed:
    """Every residual through a map of its own, and one sum over the ranks."""

    def __init__(
        self, placement: tuple[int, ...], sweep: Sweep, own: Sequence[Sequence[int]]
    ) -> None:
        self._placement = placement
        self._corrector = sweep.corrector
        self._own = own
        self._last = len(placement) - 1
        corrected: list[list[int]] = [[] for _ in own]
        readers: list[set[int]] = [set() for _ in placement]
        for stage in range(1, len(placement)):
            rank = placement[self._corrector(stage)]
            corrected[rank].append(stage)
            for source in sweep.reads(stage):
                readers[source].add(rank)
        # By rank, the stages whose corrections it applies, and the outputs that these need.
        self._corrected = corrected
        self._readers = [sorted(found - {placement[i]}) for i, found in enumerate(readers)]
        self._read: list[list[int]] = [[] for _ in own]
        for stage, ranks in enumerate(self._readers):
            for rank in ranks:
                self._read[rank].append(stage)
        # The stages whose guesses, and whose outputs, a rank makes or reads.
        both = [sorted({*a, *b} - {0}) for a, b in zip(own, corrected, strict=True)]
        self._with_guesses = both
        self._with_outputs = [sorted({*a, *b}) for a, b in zip(own, self._read, strict=True)]

    def start(self, rank: int, batch: int) -> list[Instruction]:
        found, corrected = [], self._corrected[rank]
        for stage in self._with_guesses[rank]:
            if self._placement[stage] == rank:
                found.append(Instruction(Kind.GUESS, stage, batch))
            found += self._guess(rank, stage, batch, Kind.SEND_GUESS, Kind.EXPECT_GUESS)
        for stage in self._with_outputs[rank]:
            if self._placement[stage] == rank:
                found.append(Instruction(Kind.FINE, stage, batch))
            found += self._output(rank, stage, batch, Kind.SEND_OUTPUT, Kind.EXPECT_OUTPUT)
        for stage in corrected:
            if self._guess_goes(stage) is not None:
                owner = self._placement[stage]
                found.append(Instruction(Kind.RECEIVE_GUESS, stage, batch, owner))
        for stage in self._read[rank]:
            owner = self._placement[stage]
            found.append(Instruction(Kind.RECEIVE_OUTPUT, stage, batch, owner))
        return found + [Instruction(Kind.CORRECT, stage, batch) for stage in corrected]

    def sweep(self, rank: int, batch: int) -> list[Instruction]:
        below, above = self._tree(rank)
        found = [Instruction(Kind.RECEIVE_SUM, self._last, batch, peer) for peer in below]
        if above is None:
            return [*found, Instruction(Kind.HEAD, self._last, batch)]
        return [*found, Instruction(Kind.SEND_SUM, self._last, batch, above)]

    def backward(self, rank: int, batch: int) -> list[Instruction]:
        below, above = self._tree(rank)
        found = [Instruction(Kind.HEAD_BACKWARD, self._last, batch)]
        if above is not None:
            found = [Instruction(Kind.RECEIVE_SUM_ADJOINT, self._last, batch, above)]
        for peer in reversed(below):  # the deepest branch first
            found.append(Instruction(Kind.SEND_SUM_ADJOINT, self._last, batch, peer))
        found += [Instruction(Kind.COARSE_BACKWARD, s, batch) for s in self._corrected[rank]]
        for stage in self._with_outputs[rank]:
            found += self._output(
                rank, stage, batch, Kind.EXPECT_OUTPUT_ADJOINT, Kind.SEND_OUTPUT_ADJOINT
            )
        for stage in self._with_guesses[rank]:
            found += self._guess(
                rank, stage, batch, Kind.EXPECT_GUESS_ADJOINT, Kind.SEND_GUESS_ADJOINT
            )
        for stage in self._own[rank]:
            for peer in self._readers[stage]:
                found.append(Instruction(Kind.RECEIVE_OUTPUT_ADJOINT, stage, batch, peer))
        found += [Instruction(Kind.FINE_BACKWARD, stage, batch) for stage in self._own[rank]]
        for stage in self._own[rank]:
            if stage:
                if (home := self._guess_goes(stage)) is not None:
                    found.append(Instruction(Kind.RECEIVE_GUESS_ADJOINT, stage, batch, home))
                found.append(Instruction(Kind.GUESS_BACKWARD, stage, batch))
        return found

    # All ranks come to the guesses by stage, then to the outputs by stage and reader (backward the
    # other way round): as no two take messages in another order, none waits in a circle.

    def _guess(
        self, rank: int, stage: int, batch: int, owner: Kind, corrector: Kind
    ) -> list[Instruction]:
        """A rank's part in the message that a guess, or its adjoint, is."""
        owned, home = self._placement[stage], self._guess_goes(stage)
        if home is None or rank not in (owned, home):
            return []
        if rank == owned:
            return [Instruction(owner, stage, batch, home)]
        return [Instruction(corrector, stage, batch, owned)]

    def _output(
        self, rank: int, stage: int, batch: int, owner: Kind, reader: Kind
    ) -> list[Instruction]:
        """A rank's part in the messages that an output, or the adjoints of it, are."""
        if self._placement[stage] == rank:
            return [Instruction(owner, stage, batch, peer) for peer in self._readers[stage]]
        if rank in self._readers[stage]:
            return [Instruction(reader, stage, batch, self._placement[stage])]
        return []

    def _guess_goes(self, stage: int) -> int | None:
        """The rank that the guess of a stage is sent to, if it is another one."""
        found = self._placement[self._corrector(stage)]
        return found if found != self._placement[stage] else None

    def _tree(self, rank: int) -> tuple[list[int], int | None]:
        """The ranks whose partial sums a rank takes, in order, and the one that takes its own.

        A binomial tree: at step d the ranks at a distance from the root of an odd multiple of 2^d
        give theirs to the one 2^d nearer.
        """
        ranks, root = len(self._own), self._placement[-1]
        distance, step = (root - rank) % ranks, 1
        below: list[int] = []
        while step < ranks:
            if distance & step:
                return below, (rank + step) % ranks
            if distance + step < ranks:
                below.append((rank - step) % ranks)
            step *= 2
        return below, None
