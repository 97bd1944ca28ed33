from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.errors import PartitionError
from passes.ir.isolation import preserved
from passes.ir.program import extract, nodes_between
from passes.ir.tensor_spec import Value
from passes.plan.schema import Plan
from passes.transform.split import split
from tests.models.builders import linear_chain
from tests.support.parameters import quick
from tests.support.parity import assert_same_step, step
from tests.support.programs import call, compile_model, compiled, parts, program


def plan_of(name: str, **options: Any) -> Plan:
    plan = compiled(name, **options).plan
    assert plan is not None
    return plan


@pytest.mark.parametrize("name", quick())
def test_the_stages_in_sequence_are_the_model(name: str) -> None:
    captured = program(name)
    _, sequential, _ = parts(compiled(name, stages=3))
    inputs = call(name, 3)  # another batch size than the example's
    for train in (True, False):

        def forward(*, train: bool = train, **arguments: Any) -> Any:
            return sequential.train(train)(**arguments)

        expected = step(captured.module, (), inputs, train=train)
        actual = step(captured.module, (), inputs, train=train, forward=forward)
        assert_same_step(actual, expected)


@pytest.mark.parametrize("name", quick())
def test_the_stages_own_the_models_weights_under_the_models_names(name: str) -> None:
    captured, (stages, sequential, module) = program(name), parts(compiled(name, stages=3))
    original = dict(captured.module.named_parameters(remove_duplicate=False))
    buffers = dict(captured.module.named_buffers(remove_duplicate=False))
    names: set[str] = set()
    for piece in (*stages.fine, stages.head):
        for key, parameter in piece.named_parameters(remove_duplicate=False):
            assert parameter is original[key]
        for key, buffer in piece.named_buffers(remove_duplicate=False):
            assert buffer is buffers[key]
        names |= set(piece.state_dict())

    assert names == set(captured.module.state_dict())
    prefixes = ("fine_0.", "fine_1.", "fine_2.", "head.")
    assert all(key.startswith(prefixes) for key in sequential.state_dict())
    assert module.get_submodule("fine_1") is sequential.get_submodule("fine_1") is stages.fine[1]


@pytest.mark.parametrize(
    ("name", "cuts", "paths"),
    [
        ("tied_linear", ("6",), ("fine_0.2.weight", "fine_1.10.weight")),
        ("tied_language_model", ("blocks.2",), ("fine_0.embedding.weight", "head.head.weight")),
        ("reused_module", ("middle",), ("fine_0.shared.0.weight", "fine_1.shared.0.weight")),
    ],
)
def test_a_tied_parameter_is_one_object_in_all_stages(
    name: str, cuts: tuple[str, ...], paths: tuple[str, str]
) -> None:
    _, sequential, module = parts(compiled(name, cuts=cuts))
    for network in (sequential, module):
        first, second = (network.get_parameter(path) for path in paths)
        assert first is second
    assert len({id(p) for p in sequential.parameters()}) == len(list(sequential.parameters()))


def test_a_stage_computes_what_it_produces_from_what_it_consumes() -> None:
    stages, _, _ = parts(compiled("unet", cuts=("down.1", "up.1")))
    x = torch.randn(3, 1, 16, 16)
    with preserved(*stages.fine):  # whose layers other tests use as well
        skip, pooled = stages.fine[0](x)
        result = stages.fine[1](pooled)

    assert (skip.shape, pooled.shape) == ((3, 8, 16, 16), (3, 8, 8, 8))
    assert isinstance(result, Tensor)
    assert type(stages.fine[1]).__name__ == "Fine1"


def test_modes_reach_every_stage() -> None:
    stages, sequential, module = parts(compiled("resnet", stages=3, seed=1))
    for network in (sequential, module):
        network.eval()
        assert not any(m.training for piece in stages.fine for m in piece.modules())
        network.train()
        assert all(m.training for piece in stages.fine for m in piece.modules())


def test_an_argument_may_be_called_as_the_builtins_are() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = linear_chain(4, 4)

        def forward(self, input: Tensor, type: Tensor) -> Tensor:
            return self.layers(input) + type

    arguments = {"input": torch.randn(2, 4), "type": torch.randn(2, 4)}
    compilation = compile_model(Net(), *arguments.values(), stages=2)
    _, sequential, module = parts(compilation)

    assert compilation.program is not None
    torch.testing.assert_close(sequential(**arguments), compilation.program.module(**arguments))
    assert module(**arguments).shape == (2, 4)


# --- plans that do not fit ------------------------------------------------------------------------


def edited(plan: Plan, number: int, **changes: Any) -> Plan:
    stages = list(plan.stages)
    stages[number] = dataclasses.replace(stages[number], **changes)
    return dataclasses.replace(plan, stages=tuple(stages))


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (
            1,
            {"first": "_77"},
            r"does not fit the program Sequential: no run of nodes from '_77' to",
        ),
        (1, {"first": "_14"}, r"no run of nodes from '_14' to '_13'; compile again"),
        (1, {"consumes": ()}, r"Fine1 reads '_6', which does not reach it"),
        (1, {"consumes": ("ghost",)}, r"stage 1 consumes 'ghost', which does not cross before it"),
        (0, {"consumes": ("_6",)}, r"stage 0 consumes '_6', which does not cross before it"),
        (0, {"produces": ("_5",)}, r"'_5' crosses after stage 0 or is produced by it, not both"),
        (0, {"produces": ()}, r"'_6' crosses after stage 0 or is produced by it, not both"),
        (0, {"last": "_5"}, r"stage 0 ends at '_5', its interface at '_6'"),
        (0, {"inputs": ()}, r"Fine0 reads 'input_1', which does not reach it"),
        (1, {"sides": ("ghost",)}, r"Fine1 names 'ghost', which the program does not have"),
    ],
)
def test_an_edited_plan_that_does_not_fit_is_refused(
    number: int, changes: dict[str, Any], message: str
) -> None:
    plan = edited(plan_of("mlp", cuts=("_7",)), number, **changes)
    with pytest.raises(PartitionError, match=message):
        split(program("mlp"), plan)


def test_interfaces_that_do_not_fit_are_refused() -> None:
    plan = plan_of("mlp", cuts=("_7",))
    first, last = plan.interfaces
    spec = first.state[0].spec
    ghosts = dataclasses.replace(first, state=(Value("ghost", spec),))
    for interfaces, message in (
        ((first,), r"2 stages, 1 interfaces"),
        ((), r"2 stages, 0 interfaces"),
        (
            (dataclasses.replace(first, state=()), last),
            r"'_6' crosses after stage 0 or is produced",
        ),
        ((ghosts, last), r"'_6' crosses after|'ghost' crosses after"),
        (
            (first, dataclasses.replace(last, after="ghost")),
            r"stage 1 ends at '_13', its interface at 'ghost'",
        ),
    ):
        with pytest.raises(PartitionError, match=rf"does not fit the program .*: ({message})"):
            split(program("mlp"), dataclasses.replace(plan, interfaces=interfaces))


def test_a_run_of_nodes_has_both_its_ends() -> None:
    names = [node.name for node in nodes_between(program("mlp"), "_3", "_5")]

    assert names == ["_3", "_4", "_5"]


def test_what_a_piece_reads_must_reach_it() -> None:
    captured = program("mlp")
    with pytest.raises(PartitionError, match=r"Piece reads '_2', which does not reach it"):
        extract(captured, captured.order[3:5], [], ["_4"], inputs=[], sides=[], name="Piece")
