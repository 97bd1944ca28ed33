"""The lists of all ranks: nothing waits for ever, and the order of messages is the one promised."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pnn_compile as pnn
from passes.schedule.instruction import Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.verify import check, execution_order

_PLACEMENTS = st.lists(st.integers(0, 4), min_size=1, max_size=12).map(
    lambda ranks: [sorted(set(ranks)).index(rank) for rank in ranks]
)


@given(_PLACEMENTS, st.integers(1, 5), st.booleans(), st.integers(1, 12))
def test_every_chain_is_free_of_deadlock(
    placement: list[int], batches: int, backward: bool, iterations: int
) -> None:
    stages = len(placement)
    iterations = min(iterations, stages)
    programs = schedule(
        placement, Sweep(iterations=iterations), batches=batches, backward=backward
    )  # fmt: skip
    band = range(
        stages - iterations + 1
    )  # stages that one iteration computes, from its own number on
    borders = [a != b for a, b in itertools.pairwise(placement)]
    crossing = sum(sum(borders[k : k + len(band)]) for k in range(iterations))
    assert check(programs) == crossing * batches * (2 if backward else 1)
    done = Counter((i.kind, i.stage) for program in programs for i in program)
    for stage in range(stages):
        times = sum(stage - k in band for k in range(iterations))
        assert done[Kind.FINE, stage] == times * batches
        assert done[Kind.FINE_BACKWARD, stage] == times * batches * backward
        assert done[Kind.GUESS, stage] == (stage in band and stage > 0) * batches


@st.composite
def _sources(draw: st.DrawFn) -> tuple[list[int], Sweep]:
    """A placement, and stages that read what any stages before them compute."""
    placement = draw(_PLACEMENTS)
    read = [
        tuple(sorted(draw(st.sets(st.integers(0, stage - 1), max_size=3)))) if stage else ()
        for stage in range(len(placement))
    ]
    return placement, Sweep("collapsed", sources=tuple(read))


@given(_sources(), st.integers(1, 5), st.booleans())
def test_every_collapsed_sweep_is_free_of_deadlock(
    drawn: tuple[list[int], Sweep], batches: int, backward: bool
) -> None:
    placement, sweep = drawn
    programs = schedule(placement, sweep, batches=batches, backward=backward)
    check(programs)
    done = Counter(i.kind for program in programs for i in program)
    assert done[Kind.SEND_SUM] == (max(placement) * batches)
    assert done[Kind.CORRECT] == (len(placement) - 1) * batches
    for forward in (Kind.SEND_GUESS, Kind.SEND_OUTPUT, Kind.SEND_SUM):
        assert done[Kind[forward.name + "_ADJOINT"]] == done[forward] * backward


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 13, 64, 100])
def test_the_sum_is_a_tree_of_logarithmic_depth(ranks: int) -> None:
    programs = schedule(range(ranks), Sweep("collapsed"))
    depth: dict[int | None, int] = {}
    for rank, it in execution_order(programs):  # the longest chain of sums into each rank
        if it.kind is Kind.RECEIVE_SUM:
            depth[rank] = max(depth.get(rank, 0), depth.get(it.peer, 0)) + 1
    assert depth.get(ranks - 1, 0) == math.ceil(math.log2(ranks))


def test_the_guess_crosses_before_the_fine_stage_begins() -> None:
    """Neither direction of a collapsed sweep waits for a residual to cross."""
    for program in schedule((0, 1, 2), Sweep("collapsed")):
        kinds = [i.kind for i in program]
        assert Kind.SEND_OUTPUT not in kinds
        if Kind.SEND_GUESS in kinds:
            assert kinds.index(Kind.SEND_GUESS) < kinds.index(Kind.FINE)
            late = kinds.index(Kind.RECEIVE_GUESS_ADJOINT)
            assert kinds.index(Kind.FINE_BACKWARD) < late


def test_fine_stages_wait_for_nobody_and_the_adjoints_travel_first() -> None:
    for program in schedule((0, 1, 2, 3), batches=3):
        kinds = [i.kind for i in program]
        assert Kind.FINE in kinds[:2]
        for batch in range(1, 3):  # the next micro-batch computes before this one's sweep
            fine = next(n for n, i in enumerate(program) if (i.kind, i.batch) == (Kind.FINE, batch))
            correct = next(
                n for n, i in enumerate(program) if (i.kind, i.batch) == (Kind.CORRECT, batch - 1)
            )
            assert fine < correct
    middle = schedule((0, 1, 2))[1]
    order = [i.kind for i in middle]
    assert order.index(Kind.SEND_ADJOINT) < order.index(Kind.FINE_BACKWARD)


def _message(kind: Kind, stage: int, peer: int) -> Instruction:
    return Instruction(kind, stage, 0, peer)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ([[_message(Kind.RECEIVE, 0, 1)], [_message(Kind.RECEIVE, 0, 0)]], "wait for messages"),
        ([[_message(Kind.SEND, 0, 1)], []], "nobody takes: .*rank 0 to 1"),
        (
            [
                [_message(Kind.SEND, 0, 1), _message(Kind.SEND, 1, 1)],
                [_message(Kind.RECEIVE, 1, 0), _message(Kind.RECEIVE, 0, 0)],
            ],
            "comes first",
        ),
    ],
)
def test_programs_that_do_not_fit_are_refused(
    programs: list[list[Instruction]], message: str
) -> None:
    with pytest.raises(pnn.RuntimeFault, match=message):
        check(programs)
