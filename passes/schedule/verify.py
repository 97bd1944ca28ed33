"""Verify instruction lists: every message meets its receive in order, and no rank waits forever.

Two models of sends are checked. A buffered send (Gloo) never waits: `execution_order` runs the
lists so. A rendezvous send (NCCL) waits for its receive: `rendezvous` matches the two sides.
Two ranks that both send before they receive pass the first check, but not the second:

    rank 0   send to 1, receive from 1          buffered: both sends return, both receives follow
    rank 1   send to 0, receive from 0          rendezvous: each send waits for the other's receive
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence

from passes.errors import RuntimeFault
from passes.schedule.instruction import EXPECTS, RECEIVES, SENDS, Instruction, Kind

_Message = tuple[Kind, int, int, int]
"""Kind that receives it, stage, micro-batch and iteration."""

_Transfer = tuple[int, int, _Message]
"""Sender, receiver, and message."""


def check(programs: Sequence[Sequence[Instruction]]) -> int:
    """Prove that the lists end, with buffered sends and with rendezvous sends.

    Args:
        programs: Instructions of every rank.

    Returns:
        The number of messages.

    Raises:
        RuntimeFault: Ranks wait for each other, a message is never received, or it is not the one
            that its receiver expects next.
    """
    messages = sum(instruction.kind in SENDS for _, instruction in execution_order(programs))
    rendezvous(programs)
    return messages


def execution_order(
    programs: Sequence[Sequence[Instruction]],
) -> Iterator[tuple[int, Instruction]]:
    """Yield the instructions of all ranks: each list in order, and no receive before its send.

    Sends never wait; a receive waits for its message. Messages between two ranks arrive in the
    order in which they are sent, so they need no tags. `check`, the ranks in one process and the
    simulator all use this order.

    Args:
        programs: Instructions of every rank.

    Yields:
        A rank and its next instruction.

    Raises:
        RuntimeFault: As `check`.
    """
    sent: dict[tuple[int, int], deque[_Message]] = defaultdict(deque)
    pending = [deque(program) for program in programs]
    runnable, waiting = deque(range(len(pending))), set()
    while runnable:
        rank = runnable.popleft()
        instructions = pending[rank]
        while instructions:
            instruction = instructions[0]
            kind, peer = instruction.kind, instruction.peer
            if kind in RECEIVES:
                assert peer is not None
                if not sent[peer, rank]:
                    waiting.add((peer, rank))
                    break
                _check_received(rank, instruction, sent[peer, rank].popleft())
            elif kind in SENDS:
                assert peer is not None
                sent[rank, peer].append((SENDS[kind], *instruction.key))
                if (rank, peer) in waiting:
                    waiting.remove((rank, peer))
                    runnable.append(peer)
            instructions.popleft()
            yield rank, instruction
    stuck = [f"rank {rank} at {queue[0]}" for rank, queue in enumerate(pending) if queue]
    if stuck:
        raise RuntimeFault(f"ranks wait for messages that never come: {'; '.join(stuck)}")
    lost = Counter({f"rank {a} to {b}": len(queue) for (a, b), queue in sent.items() if queue})
    if lost:
        raise RuntimeFault(f"messages that nobody takes: {dict(lost)}")


def rendezvous(programs: Sequence[Sequence[Instruction]]) -> list[_Transfer]:
    """Prove that the lists end if every send waits for its receive.

    A rank reaches its sends, and the places where it posts receives, one after another in the
    order of its list, and passes none before the other side has reached its counterpart. No
    network is stricter: NCCL runs the messages between two ranks in one queue on each of them, or
    all messages of a rank in one. It follows that the lists of two ranks mirror each other. A
    receive with an `expect` before it is posted there, and only waits for the message later.

    Args:
        programs: Instructions of every rank.

    Returns:
        The messages, in the order in which they are transferred.

    Raises:
        RuntimeFault: Ranks wait for each other; or a rank waits for a message for which it posted
            no receive, or posts receives in another order than it waits for them.
    """
    pending = [deque(_posts(rank, program)) for rank, program in enumerate(programs)]
    runnable, transfers = deque(range(len(pending))), list[_Transfer]()
    while runnable:
        rank = runnable.popleft()
        while pending[rank]:
            _, transfer = pending[rank][0]
            peer = transfer[1] if transfer[0] == rank else transfer[0]
            if not pending[peer] or pending[peer][0][1] != transfer:
                break  # the other side wakes this one when it gets there
            pending[rank].popleft()
            pending[peer].popleft()
            transfers.append(transfer)
            runnable.append(peer)
    stuck = [f"rank {rank} at {queue[0][0]}" for rank, queue in enumerate(pending) if queue]
    if stuck:
        raise RuntimeFault(f"ranks that keep no message wait for each other: {'; '.join(stuck)}")
    return transfers


def _posts(rank: int, program: Sequence[Instruction]) -> Iterator[tuple[Instruction, _Transfer]]:
    """Yield the sends of a rank, and the places where it posts its receives."""
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
            _check_received(rank, it, expected[it.peer].popleft())
        else:
            yield it, (it.peer, rank, (it.kind, *it.key))
    for peer, queue in expected.items():
        if queue:
            raise RuntimeFault(f"rank {rank} expects {len(queue)} messages of rank {peer} in vain")


def _check_received(rank: int, instruction: Instruction, message: _Message) -> None:
    """Refuse a message that is not the one that an instruction receives."""
    if message != (instruction.kind, *instruction.key):
        kind, stage, batch, iteration = message
        first = Instruction(kind, stage, batch, instruction.peer, iteration)
        raise RuntimeFault(f"rank {rank} takes {instruction}, but {first} comes first")
