"""Lists that end even where no message is kept on its way, and the checker that proves it."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pnn_compile as pnn
from examples import unet
from passes.schedule.instruction import EXPECTS, RECEIVES, SENDS, Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.verify import check, execution_order, rendezvous
from pnn_compile.inputs import named_batch
from pnn_compile.runtime.engine import Engine, state_shapes
from pnn_compile.runtime.rank_pieces import RankPieces

Programs = Sequence[Sequence[Instruction]]


@st.composite
def _lists(draw: st.DrawFn) -> Programs:
    """The lists of any placement, of a chain or of a sweep whose stages read any before them."""
    drawn = draw(st.lists(st.integers(0, 4), min_size=1, max_size=10))
    placement = [sorted(set(drawn)).index(rank) for rank in drawn]
    batches, backward = draw(st.integers(1, 3)), draw(st.booleans())
    sweep = Sweep(iterations=draw(st.integers(1, len(placement))))
    if draw(st.booleans()):
        read = [
            tuple(sorted(draw(st.sets(st.integers(0, stage - 1), max_size=4)))) if stage else ()
            for stage in range(len(placement))
        ]
        sweep = Sweep("collapsed", sources=tuple(read))
    return schedule(placement, sweep, batches=batches, backward=backward)


@given(_lists())
def test_lists_end_where_no_message_is_kept_and_those_of_two_ranks_mirror(
    programs: Programs,
) -> None:
    transfers = rendezvous(programs)
    assert len(transfers) == check(programs)
    for a, b in itertools.combinations(range(len(programs)), 2):
        assert _channel(programs[a], a, b) == _channel(programs[b], b, a)


def _channel(program: Sequence[Instruction], rank: int, other: int) -> list[tuple[int, object]]:
    """What a rank puts into its queue for another one: the sender of each message, and which."""
    expected = {EXPECTS[i.kind] for i in program if i.kind in EXPECTS}
    messages: list[tuple[int, object]] = []
    for it in program:
        if it.peer != other or it.kind in expected:
            continue
        taken = SENDS.get(it.kind) or EXPECTS.get(it.kind) or it.kind
        messages.append((rank if it.kind in SENDS else other, (taken, *it.key)))
    return messages


def test_no_rank_waits_before_its_fine_stages() -> None:
    """What is expected early is waited for late, and in between the stages compute."""
    for program in schedule((0, 1, 2, 0), Sweep("collapsed", sources=((), (0,), (1,), (0, 2)))):
        kinds = [it.kind for it in program]
        last = len(kinds) - 1 - kinds[::-1].index(Kind.FINE)
        assert not RECEIVES & set(kinds[:last])
        assert set(kinds[:last]) & EXPECTS.keys()


def _send(stage: int, peer: int) -> Instruction:
    return Instruction(Kind.SEND_OUTPUT, stage, 0, peer)


def _receive(stage: int, peer: int) -> Instruction:
    return Instruction(Kind.RECEIVE_OUTPUT, stage, 0, peer)


def _expect(stage: int, peer: int) -> Instruction:
    return Instruction(Kind.EXPECT_OUTPUT, stage, 0, peer)


def test_two_ranks_that_both_send_first_are_refused() -> None:
    both = [[_send(0, 1), _receive(1, 1)], [_send(1, 0), _receive(0, 0)]]
    assert len([*execution_order(both)]) == 4  # free of deadlock if sends do not wait
    with pytest.raises(pnn.RuntimeFault, match=r"wait for each other: rank 0 at send output"):
        check(both)
    mirrored = [[_send(0, 1), _receive(1, 1)], [_expect(0, 0), _send(1, 0), _receive(0, 0)]]
    assert check(mirrored) == 2


def test_a_circle_of_three_ranks_is_refused() -> None:
    circle = [[_send(rank, (rank + 1) % 3), _receive((rank - 1) % 3, (rank - 1) % 3)]
              for rank in range(3)]  # fmt: skip
    assert len([*execution_order(circle)]) == 6
    with pytest.raises(pnn.RuntimeFault, match="that keep no message"):
        check(circle)


@pytest.mark.parametrize(
    ("receiver", "message"),
    [
        ([_expect(0, 0)], "expects 1 messages of rank 0 in vain"),
        ([_expect(0, 0), _expect(1, 0), _receive(1, 0), _receive(0, 0)], "comes first"),
    ],
)
def test_room_that_nobody_waits_for_is_refused(receiver: list[Instruction], message: str) -> None:
    with pytest.raises(pnn.RuntimeFault, match=message):
        rendezvous([[_send(0, 1), _send(1, 1)], receiver])


class _Meeting:
    """Ranks in threads whose messages no one keeps: both sides stand still until both are there.

    Every rank does one thing at a time, whoever it is with; that is how NCCL runs the messages of
    an eagerly initialized group.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rooms: dict[tuple[int, int], list[Tensor]] = {}
        self._barriers: dict[tuple[int, int], threading.Barrier] = defaultdict(
            lambda: threading.Barrier(2, timeout=20)
        )

    def give(self, sender: int, receiver: int, tensors: list[Tensor] | None) -> list[Tensor]:
        with self._lock:
            barrier = self._barriers[sender, receiver]
        if tensors is not None:
            self._rooms[sender, receiver] = tensors
        barrier.wait()
        queue = self._rooms[sender, receiver]
        barrier.wait()
        return queue


class _MeetingTransport:
    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self._rank = rank
        self._there: dict[int, list[list[Tensor]]] = defaultdict(list)

    def send(self, peer: int, tensors: Sequence[Tensor]) -> None:
        self._meeting.give(self._rank, peer, [tensor.detach().clone() for tensor in tensors])

    def expect(self, peer: int, like: Sequence[Tensor]) -> None:
        self._there[peer].append(self._meeting.give(peer, self._rank, None))

    def receive(self, peer: int, like: Sequence[Tensor]) -> list[Tensor]:
        if not self._there[peer]:
            self.expect(peer, like)
        return self._there[peer].pop(0)


class _Skips(nn.Module):
    """Every layer reads what the first ones gave, over any number of cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x).tanh()
        second = self.layers[1](first).tanh()
        x = second
        for number, layer in enumerate(self.layers[2:]):
            x = x + layer(x + (first, second)[number % 2]).tanh()
        return x


@pytest.mark.parametrize("placement", [(0, 1, 2, 3), (0, 1, 0, 1), (1, 0, 2, 0)], ids=str)
@pytest.mark.parametrize("options", [{"sweep": "collapsed"}, {"iterations": 2}], ids=str)
@pytest.mark.parametrize("name", ["skips", "unet"])
def test_ranks_that_meet_for_every_message_end_with_the_same_gradients(
    name: str, options: dict[str, object], placement: tuple[int, ...]
) -> None:
    model, example = {
        "skips": lambda: (_Skips(), torch.randn(4, 8)),
        "unet": lambda: (unet.build_model(width=4), torch.randn(2, 1, 32, 32)),
    }[name]()
    compiled = pnn.compile(model, example, stages=4, coarse_budget=1.0, **options)  # type: ignore[arg-type]
    compiled.module.eval()
    output = compiled.module(example)
    output.square().mean().backward()
    gradients = {key: p.grad for key, p in compiled.module.named_parameters()}
    compiled.module.zero_grad(set_to_none=True)
    meeting, inputs = _Meeting(), [named_batch(compiled, example)]
    engines = [
        Engine(RankPieces(compiled, placement, rank), inputs, _MeetingTransport(meeting, rank),
               state_shapes(compiled, inputs), lambda outputs: outputs[0].square().mean())
        for rank in range(max(placement) + 1)
    ]  # fmt: skip
    problems: list[BaseException] = []

    def run(engine: Engine, instructions: Sequence[Instruction]) -> None:
        try:
            engine.run_list(instructions)
        except BaseException as error:
            problems.append(error)

    both = zip(engines, engines[0].pieces.instruction_lists(), strict=True)
    threads = [threading.Thread(target=run, args=each) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    torch.testing.assert_close(engines[placement[-1]].outputs[0], output)
    for key, parameter in compiled.module.named_parameters():
        zero = torch.zeros_like(parameter)  # a gradient that is not there
        actual, expected = parameter.grad, gradients[key]
        torch.testing.assert_close(
            zero if actual is None else actual, zero if expected is None else expected,
            rtol=1e-4, atol=1e-6, msg=key,
        )  # fmt: skip
