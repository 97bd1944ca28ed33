"""The engine: ranks that take turns in one process equal the network, forward and backward."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnn_compile as pnn
from examples import decoder, resnet110, unet
from passes.schedule.instruction import Kind
from passes.schedule.lists import schedule
from passes.schedule.verify import check
from pnn_compile.inputs import named_batch
from pnn_compile.runtime import engine
from pnn_compile.runtime.engine import run_in_one_process
from pnn_compile.runtime.rank_pieces import RankPieces
from tests.support.parameters import grid


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
) -> tuple[list[Any], list[RankPieces]]:
    """Run a step over micro-batches on ranks in one process; give outputs by micro-batch."""
    ranks = [RankPieces(compiled, placement, rank) for rank in range(max(placement) + 1)]
    named = [named_batch(compiled, each) for each in inputs]

    def mean(outputs: list[Any]) -> Tensor:
        return torch.stack([_loss(piece) for piece in outputs]).mean()

    lists = ranks[0].instruction_lists(batches=len(inputs), backward=train)
    check(lists)
    engines = run_in_one_process(compiled, ranks, named, mean if train else None)
    for engine_of_rank, instructions in zip(engines, lists, strict=True):
        assert tuple(s.instruction for s in engine_of_rank.spans) == tuple(instructions)
        assert all(span.start <= span.end for span in engine_of_rank.spans)
    last = engines[placement[-1]]
    return [last.outputs[number] for number in range(len(inputs))], ranks


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"correction": "difference", "coarse": "conv"},
    {"sweep": "collapsed"},
    {"iterations": 2},
    {"correction": "difference", "coarse": "conv", "iterations": 2},
    {"iterations": 3},
)


@pytest.mark.parametrize(("name", "options"), grid(tuple(NETWORKS), OPTIONS))
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
    outputs = reference(*smaller)
    _loss(outputs).backward()
    compiled.module.train()
    (result,), _ = _run(compiled, [smaller], placement)
    torch.testing.assert_close(result, outputs)
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
    ("name", "placement", "options"),
    grid(
        ("masked", "decoder"),
        (range(8), [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"sweep": "collapsed"}, {"iterations": 3}),
    ),
)
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


def test_the_drawing_of_a_step_is_what_two_ranks_do() -> None:
    """The drawing on top of the engine: left what rank 0 does, right what rank 1 does."""
    assert engine.__doc__ is not None
    _, *lines = engine.__doc__.partition("rank 0")[2].split("\n\n")[0].splitlines()
    column = lines[0].index("GUESS")
    columns = [line[:column] for line in lines], [line[column:] for line in lines]
    for cells, instructions in zip(columns, schedule((0, 1)), strict=True):
        drawn = re.findall(r"[A-Z_]{4,} \d", "\n".join(cells))
        assert drawn == [f"{it.kind.name} {it.stage}" for it in instructions]


@cache
def _resnet_in_three_stages() -> tuple[pnn.Compiled, Any]:
    model, example = _resnet()
    return pnn.compile(model, example, stages=3), example


def test_forward_alone_keeps_no_graph() -> None:
    compiled, example = _resnet_in_three_stages()
    compiled.module.eval()
    with torch.no_grad():
        (result,), _ = _run(compiled, [example], (0, 1, 2), train=False)
        torch.testing.assert_close(result, compiled.module(*example))
    assert not result.requires_grad


def test_a_rank_owns_its_stages_and_nothing_else() -> None:
    compiled, _ = _resnet_in_three_stages()
    ranks = [RankPieces(compiled, (0, 0, 1), rank) for rank in range(2)]
    names = [{name for name, _ in rank.named_children()} for rank in ranks]
    assert names[0] == {"fine_0", "fine_1", "preprocess_1", "coarse_1"}
    assert names[1] == {"fine_2", "preprocess_2", "coarse_2", "head"}


def test_the_map_of_a_collapsed_sweep_lives_where_its_residual_is_computed() -> None:
    model, example = _resnet()
    compiled = pnn.compile(model, example, stages=3, sweep="collapsed")
    ranks = [RankPieces(compiled, (0, 1, 2), rank) for rank in range(3)]
    names = [{name for name, _ in rank.named_children()} for rank in ranks]
    assert names[0] == {"fine_0", "coarse_1"}
    assert names[1] == {"fine_1", "preprocess_1", "coarse_2"}
    assert names[2] == {"fine_2", "preprocess_2", "head"}


def test_what_crosses_several_stages_is_sent_to_the_corrections_that_read_it() -> None:
    model, example = _unet()
    compiled = pnn.compile(model, example, stages=3, sweep="collapsed")
    program = RankPieces(compiled, (0, 1, 2), 0).instruction_lists()[0]
    sent = [i for i in program if i.kind is Kind.SEND_OUTPUT]
    assert [(i.stage, i.peer) for i in sent] == [(0, 1)]


def test_placements_that_do_not_fit_are_refused() -> None:
    compiled, _ = _resnet_in_three_stages()
    with pytest.raises(pnn.RuntimeFault, match="3 stages, but 2 were placed"):
        RankPieces(compiled, (0, 1), 0)
    with pytest.raises(pnn.RuntimeFault, match="every rank needs a stage"):
        RankPieces(compiled, (0, 2, 2), 0)
    with pytest.raises(pnn.RuntimeFault, match="4 ranks for 3 stages"):
        pnn.runtime.place(3, 4)
    with pytest.raises(pnn.RuntimeFault, match="init_process_group"):
        pnn.runtime.distribute(compiled)
