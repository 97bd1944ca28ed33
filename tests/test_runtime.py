"""The runtime: instructions that fit together, and ranks that equal one process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from examples import decoder, resnet110, unet
from pnn_compile.batches import named_batch
from pnn_compile.runtime.distributed import crossing
from pnn_compile.runtime.local import LocalNetwork, run_together
from pnn_compile.runtime.rank import RankNetwork, Step
from pnn_compile.runtime.schedule import Instruction, Kind, check, schedule


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12).map(
        lambda ranks: [sorted(set(ranks)).index(rank) for rank in ranks]
    ),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_schedule_is_free_of_deadlock(
    placement: list[int], batches: int, backward: bool
) -> None:
    programs = schedule(placement, batches=batches, backward=backward)
    borders = sum(a != b for a, b in itertools.pairwise(placement))
    assert check(programs) == borders * batches * (2 if backward else 1)
    fine = [i.stage for program in programs for i in program if i.kind is Kind.FINE]
    assert sorted(fine) == sorted(list(range(len(placement))) * batches)


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
    programs = schedule(placement, batches=len(inputs), backward=train)
    check(programs)
    run_together(network, steps, programs)
    last = steps[placement[-1]]
    return [last.outputs[number] for number in range(len(inputs))], ranks


@pytest.mark.parametrize("placement", [(0, 0, 0), (0, 1, 2), (0, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize("options", [{}, {"correction": "difference", "coarse": "conv"}])
@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_equal_one_process(
    name: str, options: dict[str, Any], placement: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    compiled = pnn.compile(model, example, stages=3, coarse_budget=1.0, **options)
    for parameter in compiled.module.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # no zeros that hide a gradient
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


def test_micro_batches_add_up_to_the_batch() -> None:
    torch.manual_seed(0)
    model, (tokens,) = _decoder()
    compiled = pnn.compile(model, tokens, stages=3, coarse_budget=1.0)
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


def test_what_does_not_run_on_ranks_is_refused() -> None:
    model, example = _resnet()
    for options in ({"sweep": "collapsed", "coarse": "linear"}, {"iterations": 2}):
        compiled = pnn.compile(model, example, stages=3, **options)
        with pytest.raises(pnn.RuntimeFault, match="chain sweep with one iteration"):
            RankNetwork(compiled, (0, 1, 2), 0)
    compiled = pnn.compile(model, example, stages=3)
    with pytest.raises(pnn.RuntimeFault, match="3 stages, but 2 were placed"):
        RankNetwork(compiled, (0, 1), 0)
    with pytest.raises(pnn.RuntimeFault, match="every rank needs a stage"):
        RankNetwork(compiled, (0, 2, 2), 0)
    with pytest.raises(pnn.RuntimeFault, match="4 ranks for 3 stages"):
        pnn.runtime.place(3, 4)
    with pytest.raises(pnn.RuntimeFault, match="init_process_group"):
        pnn.runtime.distribute(compiled)
