"""What every rank does in one step, as static lists of instructions, proven before they run.

A stage j lives on one rank. Forward: all ranks guess and run their fine stages at once; then the
corrected states travel from stage to stage. Backward mirrors it: the adjoints travel back through
the coarse networks alone, and each fine stage runs backward as soon as its own adjoint is there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from passes.errors import RuntimeFault

__all__ = ["Instruction", "Kind", "Message", "check", "schedule"]


class Kind(Enum):
    """What an instruction does."""

    GUESS = "guess"
    FINE = "fine"
    RECEIVE = "receive state"
    CORRECT = "correct"
    SEND = "send state"
    HEAD = "head"
    HEAD_BACKWARD = "head backward"
    RECEIVE_ADJOINT = "receive adjoint"
    COARSE_BACKWARD = "coarse backward"
    SEND_ADJOINT = "send adjoint"
    FINE_BACKWARD = "fine backward"


SENDS = {Kind.SEND: Kind.RECEIVE, Kind.SEND_ADJOINT: Kind.RECEIVE_ADJOINT}
"""Every kind that sends, and the kind that takes it."""


@dataclass(frozen=True)
class Instruction:
    """One operation of a rank.

    Attributes:
        kind: What it does.
        stage: Number of the stage; of the head the last one. A message carries the state behind
            this stage, or its adjoint.
        batch: Number of the micro-batch.
        peer: The other rank of a message.
    """

    kind: Kind
    stage: int
    batch: int
    peer: int | None = None

    def __str__(self) -> str:
        where = f", rank {self.peer}" if self.peer is not None else ""
        return f"{self.kind.value} (stage {self.stage}, micro-batch {self.batch}{where})"


Message = tuple[Kind, int, int]
"""Kind that takes it, stage and micro-batch."""


def schedule(
    placement: Sequence[int], *, batches: int = 1, backward: bool = True
) -> tuple[tuple[Instruction, ...], ...]:
    """List what every rank does in one step.

    While the sweep of one micro-batch is under way, the fine stages of the next one compute.

    Args:
        placement: Rank of every stage; several stages may share one.
        batches: Number of micro-batches.
        backward: Whether to run backward too.

    Returns:
        The instructions, by rank.
    """
    ranks = max(placement) + 1
    return tuple(_rank(tuple(placement), rank, batches, backward) for rank in range(ranks))


def _rank(
    placement: tuple[int, ...], rank: int, batches: int, backward: bool
) -> tuple[Instruction, ...]:
    own = [stage for stage, place in enumerate(placement) if place == rank]
    done = _start(own, 0)
    for batch in range(batches):
        if batch + 1 < batches:
            done += _start(own, batch + 1)
        done += _sweep(placement, own, batch)
    if backward:
        for batch in range(batches):
            done += _sweep_back(placement, own, batch)
            done += [Instruction(Kind.FINE_BACKWARD, stage, batch) for stage in reversed(own)]
    return tuple(done)


def _start(own: Sequence[int], batch: int) -> list[Instruction]:
    found = []
    for stage in own:
        if stage:
            found.append(Instruction(Kind.GUESS, stage, batch))
        found.append(Instruction(Kind.FINE, stage, batch))
    return found


def _sweep(placement: Sequence[int], own: Sequence[int], batch: int) -> list[Instruction]:
    found, last = [], len(placement) - 1
    for stage in own:
        if stage and placement[stage - 1] != placement[stage]:
            found.append(Instruction(Kind.RECEIVE, stage - 1, batch, placement[stage - 1]))
        found.append(Instruction(Kind.CORRECT, stage, batch))
        if stage == last:
            found.append(Instruction(Kind.HEAD, stage, batch))
        elif placement[stage + 1] != placement[stage]:
            found.append(Instruction(Kind.SEND, stage, batch, placement[stage + 1]))
    return found


def _sweep_back(placement: Sequence[int], own: Sequence[int], batch: int) -> list[Instruction]:
    found, last = [], len(placement) - 1
    for stage in reversed(own):
        if stage == last:
            found.append(Instruction(Kind.HEAD_BACKWARD, stage, batch))
        elif placement[stage + 1] != placement[stage]:
            found.append(Instruction(Kind.RECEIVE_ADJOINT, stage, batch, placement[stage + 1]))
        if stage:
            found.append(Instruction(Kind.COARSE_BACKWARD, stage, batch))
            if placement[stage - 1] != placement[stage]:
                found.append(Instruction(Kind.SEND_ADJOINT, stage - 1, batch, placement[stage - 1]))
    return found


def check(programs: Sequence[Sequence[Instruction]]) -> int:
    """Prove that every message meets its receiver in order and that nothing waits for ever.

    Sends never wait; a receive waits for its message. Messages of two ranks arrive in the order in
    which they were sent, so that they need no tags.

    Returns:
        The number of messages.

    Raises:
        RuntimeFault: Ranks wait for each other, or a message is left over, or is not the one that
            the receiver takes next.
    """
    channels: dict[tuple[int, int], deque[Message]] = {}
    ahead = [deque(program) for program in programs]
    count, moved = 0, True
    while moved:
        moved = False
        for rank, left in enumerate(ahead):
            while left and _ready(channels, rank, left[0]):
                count += _run(channels, rank, left.popleft())
                moved = True
    stuck = [f"rank {rank} at {left[0]}" for rank, left in enumerate(ahead) if left]
    if stuck:
        raise RuntimeFault(f"ranks wait for messages that never come: {'; '.join(stuck)}")
    lost = Counter({f"rank {a} to {b}": len(queue) for (a, b), queue in channels.items() if queue})
    if lost:
        raise RuntimeFault(f"messages that nobody takes: {dict(lost)}")
    return count


def _ready(
    channels: dict[tuple[int, int], deque[Message]], rank: int, instruction: Instruction
) -> bool:
    if instruction.kind not in SENDS.values():
        return True
    assert instruction.peer is not None
    return bool(channels.get((instruction.peer, rank)))


def _run(
    channels: dict[tuple[int, int], deque[Message]], rank: int, instruction: Instruction
) -> int:
    """Send or take a message; give 1 for one that was sent."""
    kind, peer = instruction.kind, instruction.peer
    if kind in SENDS:
        assert peer is not None
        message = (SENDS[kind], instruction.stage, instruction.batch)
        channels.setdefault((rank, peer), deque()).append(message)
        return 1
    if kind in SENDS.values():
        assert peer is not None
        found = channels[(peer, rank)].popleft()
        if found != (kind, instruction.stage, instruction.batch):
            raise RuntimeFault(f"rank {rank} takes {instruction}, but {found} comes first")
    return 0
