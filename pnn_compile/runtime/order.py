"""Runs instruction lists in an order in which every message is sent before it is taken."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence

from passes.errors import RuntimeFault
from pnn_compile.runtime.instruction import RECEIVES, SENDS, Instruction, Kind

__all__ = ["check", "in_order"]

_Message = tuple[Kind, int, int, int]
"""Kind that takes it, stage, micro-batch and iteration."""


def check(programs: Sequence[Sequence[Instruction]]) -> int:
    """Prove that every message meets its receiver in order and that nothing waits for ever.

    Returns:
        The number of messages.

    Raises:
        RuntimeFault: Ranks wait for each other, or a message is left over, or is not the one that
            the receiver takes next.
    """
    return sum(instruction.kind in SENDS for _, instruction in in_order(programs))


def in_order(
    programs: Sequence[Sequence[Instruction]],
) -> Iterator[tuple[int, Instruction]]:
    """Give the instructions of all ranks, each rank's own in order and no receive before its send.

    Sends never wait; a receive waits for its message. Messages of two ranks arrive in the order in
    which they were sent, so that they need no tags. The checker, the ranks in one process and the
    simulator all walk this order.

    Yields:
        A rank and its next instruction.

    Raises:
        RuntimeFault: As `check`.
    """
    sent: dict[tuple[int, int], deque[_Message]] = defaultdict(deque)
    ahead = [deque(program) for program in programs]
    awake, waiting = deque(range(len(ahead))), set()
    while awake:
        rank = awake.popleft()
        left = ahead[rank]
        while left:
            instruction = left[0]
            kind, peer = instruction.kind, instruction.peer
            if kind in RECEIVES:
                assert peer is not None
                if not sent[peer, rank]:
                    waiting.add((peer, rank))
                    break
                _take(rank, instruction, sent[peer, rank].popleft())
            elif kind in SENDS:
                assert peer is not None
                sent[rank, peer].append((SENDS[kind], *instruction.key))
                if (rank, peer) in waiting:
                    waiting.remove((rank, peer))
                    awake.append(peer)
            left.popleft()
            yield rank, instruction
    stuck = [f"rank {rank} at {left[0]}" for rank, left in enumerate(ahead) if left]
    if stuck:
        raise RuntimeFault(f"ranks wait for messages that never come: {'; '.join(stuck)}")
    lost = Counter({f"rank {a} to {b}": len(queue) for (a, b), queue in sent.items() if queue})
    if lost:
        raise RuntimeFault(f"messages that nobody takes: {dict(lost)}")


def _take(rank: int, instruction: Instruction, found: _Message) -> None:
    if found != (instruction.kind, *instruction.key):
        kind, stage, batch, iteration = found
        first = Instruction(kind, stage, batch, instruction.peer, iteration)
        raise RuntimeFault(f"rank {rank} takes {instruction}, but {first} comes first")
