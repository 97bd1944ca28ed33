"""The runtime: instructions that fit together, and ranks that equal one process."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from examples import decoder, resnet110, unet
from passes.schedule.instruction import Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.verify import check, in_order
from pnn_compile.inputs import named_batch
from pnn_compile.runtime.local import LocalNetwork, run_together
from pnn_compile.runtime.microbatches import crossing
from pnn_compile.runtime.rank import RankNetwork
from pnn_compile.runtime.step import Step

_PLACEMENTS = st.lists(st.integers(0, 4), min_size=1, max_size=12).map(
    lambda ranks: [sorted(set(ranks)).index(rank) for rank in ranks]
)


@given(_PLACEMENTS, st.integers(1, 5), st.booleans(), st.integers(1, 12))
def test_every_chain_is_free_of_deadlock(
    placement: list[int], batches: int, backward: bool, rounds: int
) -> None:
    stages = len(placement)
    rounds = min(rounds, stages)
    programs = schedule(
        placement, Sweep(iterations=rounds), batches=batches, backward=backward
    )  # fmt: skip
    band = range(stages - rounds + 1)  # stages that one iteration computes, from its own number on
    borders = [a != b for a, b in itertools.pairwise(placement)]
    crossing = sum(sum(borders[k : k + len(band)]) for k in range(rounds))
    assert check(programs) == crossing * batches * (2 if backward else 1)
    done = Counter((i.kind, i.stage) for program in programs for i in program)
    for stage in range(stages):
        times = sum(stage - k in band for k in range(rounds))
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
    for rank, it in in_order(programs):  # the longest line of sums that this rank's is made of
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


class Masked(nn.Module):
    """Several inputs, one of which only late layers read; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        for number, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x))
            if number > 5:
                x = self.norm(x * scale)
        return {"x": x, "mean": x.mean(1)}


def _masked() -> tuple[nn.Module, Any]:
    return Masked(), (torch.randn(6, 16), torch.rand(6, 16))


def _resnet() -> tuple[nn.Module, Any]:
    return resnet110.build_model(units_per_group=3, width=4), (torch.randn(6, 3, 16, 16),)


def _unet() -> tuple[nn.Module, Any]:
    return unet.build_model(width=4), (torch.randn(6, 1, 32, 32),)


def _decoder() -> tuple[nn.Module, Any]:
    model = decoder.build_model(layers=6, width=16, context=16, dropout=0.0)
    return model, (torch.randint(256, (6, 16)),)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "masked": _masked, "resnet": _resnet, "unet": _unet, "decoder": _decoder,
}  # fmt: skip


def _loss(outputs: Any) -> Tensor:
    leaves = outputs.values() if isinstance(outputs, dict) else [outputs]
    return torch.stack([F.mse_loss(leaf, torch.ones_like(leaf)) for leaf in leaves]).sum()


def _run(
    compiled: pnn.Compiled, inputs: list[Any], placement: tuple[int, ...], *, train: bool = True
) -> tuple[list[Any], list[RankNetwork]]:
    """Run a step over micro-batches on ranks in one process; give outputs by micro-batch."""
    ranks = [RankNetwork(compiled, placement, rank) for rank in range(max(placement) + 1)]
    named = [named_batch(compiled, each) for each in inputs]
    network = LocalNetwork()

    def share(outputs: Any, number: int) -> Tensor:
        return _loss(outputs) / len(inputs)

    steps = [
        Step(rank, named, network.link(rank.rank), share if train else None,
             crossing(compiled, named))
        for rank in ranks
    ]  # fmt: skip
    programs = ranks[0].programs(batches=len(inputs), backward=train)
    check(programs)
    run_together(network, steps, programs)
    last = steps[placement[-1]]
    return [last.outputs[number] for number in range(len(inputs))], ranks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"correction": "difference", "coarse": "conv"},
        {"sweep": "collapsed"},
        {"iterations": 2},
        {"correction": "difference", "coarse": "conv", "iterations": 2},
        {"iterations": 3},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "plain",
)
@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_equal_one_process(name: str, options: dict[str, Any]) -> None:
    compiled, example = _shaken(name, 3, options)
    for placement in ((0, 0, 0), (0, 1, 2), (0, 0, 1), (0, 1, 0)):
        _compare(compiled, example, placement)


def _shaken(name: str, stages: int, options: dict[str, Any]) -> tuple[pnn.Compiled, Any]:
    """Compile a network, and move every weight: no zeros that hide a gradient."""
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    compiled = pnn.compile(model, example, stages=stages, coarse_budget=1.0, **options)
    for parameter in compiled.module.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return compiled, example


def _compare(compiled: pnn.Compiled, example: Any, placement: tuple[int, ...]) -> None:
    compiled.module.zero_grad()
    reference = copy.deepcopy(compiled.module).train()
    smaller = tuple(value[:4] for value in example)
    wanted = reference(*smaller)
    _loss(wanted).backward()
    compiled.module.train()
    (found,), _ = _run(compiled, [smaller], placement)
    torch.testing.assert_close(found, wanted)
    gradients = dict(reference.named_parameters())
    for key, parameter in compiled.module.named_parameters():
        expected = gradients[key].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), key
        else:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5, msg=key)
    for key, buffer in compiled.module.named_buffers():
        torch.testing.assert_close(buffer, dict(reference.named_buffers())[key])


@pytest.mark.parametrize(
    "options", [{"sweep": "collapsed"}, {"iterations": 3}], ids=["collapsed", "three rounds"]
)
@pytest.mark.parametrize("placement", [range(8), (0, 0, 1, 1, 2, 2, 3, 3)], ids=["8", "4"])
@pytest.mark.parametrize("name", ["masked", "decoder"])
def test_many_ranks_equal_one_process(
    name: str, placement: Sequence[int], options: dict[str, Any]
) -> None:
    compiled, example = _shaken(name, len(placement), options)
    _compare(compiled, example, tuple(placement))


@pytest.mark.parametrize("options", [{}, {"sweep": "collapsed"}, {"iterations": 2}], ids=str)
def test_micro_batches_add_up_to_the_batch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, (tokens,) = _decoder()
    compiled = pnn.compile(model, tokens, stages=3, coarse_budget=1.0, **options)
    reference = copy.deepcopy(compiled.module).train()
    _loss(reference(tokens)).backward()
    compiled.module.train()
    _run(compiled, [tokens[:2], tokens[2:4], tokens[4:]], (0, 1, 2))
    for (key, parameter), other in zip(
        compiled.module.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_forward_alone_keeps_no_graph() -> None:
    model, example = _resnet()
    compiled = pnn.compile(model, example, stages=3)
    compiled.module.eval()
    with torch.no_grad():
        (found,), _ = _run(compiled, [example], (0, 1, 2), train=False)
        torch.testing.assert_close(found, compiled.module(*example))
    assert not found.requires_grad


def test_a_rank_owns_its_stages_and_nothing_else() -> None:
    model, example = _resnet()
    compiled = pnn.compile(model, example, stages=3)
    ranks = [RankNetwork(compiled, (0, 0, 1), rank) for rank in range(2)]
    names = [{name for name, _ in rank.named_children()} for rank in ranks]
    assert names[0] == {"fine_0", "fine_1", "preprocess_1", "coarse_1"}
    assert names[1] == {"fine_2", "preprocess_2", "coarse_2", "head"}


def test_the_map_of_a_collapsed_sweep_lives_where_its_residual_is_computed() -> None:
    model, example = _resnet()
    compiled = pnn.compile(model, example, stages=3, sweep="collapsed")
    ranks = [RankNetwork(compiled, (0, 1, 2), rank) for rank in range(3)]
    names = [{name for name, _ in rank.named_children()} for rank in ranks]
    assert names[0] == {"fine_0", "coarse_1"}
    assert names[1] == {"fine_1", "preprocess_1", "coarse_2"}
    assert names[2] == {"fine_2", "preprocess_2", "head"}


def test_what_crosses_several_stages_is_sent_to_the_corrections_that_read_it() -> None:
    model, example = _unet()
    compiled = pnn.compile(model, example, stages=3, sweep="collapsed")
    program = RankNetwork(compiled, (0, 1, 2), 0).programs()[0]
    sent = [i for i in program if i.kind is Kind.SEND_OUTPUT]
    assert [(i.stage, i.peer) for i in sent] == [(0, 1)]


def test_placements_that_do_not_fit_are_refused() -> None:
    model, example = _resnet()
    compiled = pnn.compile(model, example, stages=3)
    with pytest.raises(pnn.RuntimeFault, match="3 stages, but 2 were placed"):
        RankNetwork(compiled, (0, 1), 0)
    with pytest.raises(pnn.RuntimeFault, match="every rank needs a stage"):
        RankNetwork(compiled, (0, 2, 2), 0)
    with pytest.raises(pnn.RuntimeFault, match="4 ranks for 3 stages"):
        pnn.runtime.place(3, 4)
    with pytest.raises(pnn.RuntimeFault, match="init_process_group"):
        pnn.runtime.distribute(compiled)
