"""Runs instruction lists in an order in which every message is sent before it is taken."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence

from passes.errors import RuntimeFault
from passes.schedule.instruction import EXPECTS, RECEIVES, SENDS, Instruction, Kind

__all__ = ["check", "in_order", "meet"]

_Message = tuple[Kind, int, int, int]
"""Kind that takes it, stage, micro-batch and iteration."""

_Meeting = tuple[int, int, _Message]
"""Sender and receiver of a message, and the message."""


def check(programs: Sequence[Sequence[Instruction]]) -> int:
    """Prove that every message meets its receiver in order and that nothing waits for ever.

    That holds for sends that never wait (`in_order`), as over Gloo, and for sends that wait for
    their receiver (`meet`), as over NCCL.

    Returns:
        The number of messages.

    Raises:
        RuntimeFault: Ranks wait for each other, or a message is left over, or is not the one that
            the receiver takes next.
    """
    messages = sum(instruction.kind in SENDS for _, instruction in in_order(programs))
    meet(programs)
    return messages


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


def meet(programs: Sequence[Sequence[Instruction]]) -> list[_Meeting]:
    """Prove that the lists run to their end where no message is kept on its way.

    A rank comes to its sends, and to the places that give room for a message, one after another in
    the order of its list, and passes none before the other side has come to its own. That is the
    strictest that a network can be: NCCL runs what two ranks exchange in one queue on each of them,
    or everything that a rank exchanges in one. It follows that the lists of two ranks mirror each
    other. Where a receive has an `expect` before it, that one is the place, and the receive only
    waits for what has been met.

    Returns:
        The messages, in the order in which they meet.

    Raises:
        RuntimeFault: Ranks wait for each other, or a rank waits for a message that it never gave
            room for, or gives room for one that it does not wait for, in this order.
    """
    ahead = [deque(_places(rank, program)) for rank, program in enumerate(programs)]
    awake, found = deque(range(len(ahead))), list[_Meeting]()
    while awake:
        rank = awake.popleft()
        while ahead[rank]:
            _, meeting = ahead[rank][0]
            peer = meeting[1] if meeting[0] == rank else meeting[0]
            if not ahead[peer] or ahead[peer][0][1] != meeting:
                break  # the other side wakes this one when it comes there
            ahead[rank].popleft()
            ahead[peer].popleft()
            found.append(meeting)
            awake.append(peer)
    stuck = [f"rank {rank} at {left[0][0]}" for rank, left in enumerate(ahead) if left]
    if stuck:
        raise RuntimeFault(f"ranks that keep no message wait for each other: {'; '.join(stuck)}")
    return found


def _places(rank: int, program: Sequence[Instruction]) -> Iterator[tuple[Instruction, _Meeting]]:
    """Where a rank meets others: its sends, and where it gives room for what it receives."""
    expected: dict[int, deque[_Message]] = defaultdict(deque)
    for it in program:
        if it.peer is None:
            continue
        if it.kind in SENDS:
            yield it, (rank, it.peer, (SENDS[it.kind], *it.key))
        elif it.kind in EXPECTS:
            message = (EXPECTS[it.kind], *it.key)
            expected[it.peer].append(message)
            yield it, (it.peer, rank, message)
        elif expected[it.peer]:
            _take(rank, it, expected[it.peer].popleft())
        else:
            yield it, (it.peer, rank, (it.kind, *it.key))
    for peer, left in expected.items():
        if left:
            raise RuntimeFault(f"rank {rank} expects {len(left)} messages of rank {peer} in vain")


def _take(rank: int, instruction: Instruction, found: _Message) -> None:
    if found != (instruction.kind, *instruction.key):
        kind, stage, batch, iteration = found
        first = Instruction(kind, stage, batch, instruction.peer, iteration)
        raise RuntimeFault(f"rank {rank} takes {instruction}, but {first} comes first")
