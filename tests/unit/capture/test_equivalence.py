"""Wrong graphs are caught: one test for each kind of error of a front end."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from passes.capture.equivalence import Reference
from passes.capture.ladder import capture
from passes.errors import CaptureError
from passes.ir.example_inputs import ExampleInputs, bind
from passes.ir.program import graph_module
from tests.models.builders import block_chain
from tests.models.hard_models import (
    CustomGradient,
    RunningMean,
    SliceAssignment,
    StepCounter,
    ViewWrite,
    repeat,
)
from tests.models.topologies import WIDTH
from tests.models.zoo import by_name

Wrong = Callable[[nn.Module, Tensor], nn.Module]


def traced(model: nn.Module, x: Tensor) -> nn.Module:
    return fx.symbolic_trace(model)


def cleaned(model: nn.Module, x: Tensor) -> nn.Module:
    """A trace without the nodes that nothing reads, as splitting by data flow leaves it."""
    module = fx.symbolic_trace(model)
    for node in reversed(module.graph.nodes):
        if not node.users and node.op not in ("output", "placeholder"):
            module.graph.erase_node(node)
    module.recompile()
    return module


def exported(model: nn.Module, x: Tensor) -> nn.Module:
    return plain(torch.export.export(model, (x,)).module(check_guards=False))


def functional(model: nn.Module, x: Tensor) -> nn.Module:
    """An exported graph whose writes were made functional."""
    program = torch.export.export(model, (x,)).run_decompositions({})
    return plain(program.module(check_guards=False))


def plain(module: fx.GraphModule) -> nn.Module:
    """The graph alone: exported modules refuse to change their mode."""
    for node in module.graph.find_nodes(op="call_module"):
        module.graph.erase_node(node)  # guards
    module.graph.set_codegen(fx.graph.CodeGen())
    return graph_module(module, module.graph, "Plain")


def slices() -> nn.Module:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            y[:, 0].add_(1.0)
            return y

    return Slices()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))


@pytest.mark.parametrize(
    ("build", "wrong", "reason"),
    [
        (CustomGradient, traced, "mode, gradient of linear.weight differs"),
        (CustomGradient, exported, "mode, gradient of linear.weight differs"),
        (slices, cleaned, "in evaluation mode, output 0 differs"),
        (ViewWrite, cleaned, "in evaluation mode, output 0 differs"),
        (repeat(RunningMean), cleaned, "in evaluation mode, (output 0 differs|.*buffer)"),
        (repeat(StepCounter), cleaned, "in evaluation mode, (output 0 differs|.*buffer)"),
        (normed, functional, "in evaluation mode"),
        (normed, exported, "in evaluation mode"),
        (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)), exported, "evaluation"),
    ],
)
def test_a_wrong_graph_is_caught(build: Callable[[], nn.Module], wrong: Wrong, reason: str) -> None:
    model = build()
    x = torch.linspace(-2.0, 2.0, 4 * WIDTH).view(4, WIDTH)
    arguments: ExampleInputs = bind(model, (x,), {})
    reference = Reference(build_like(model), arguments.with_dynamic(()))

    assert reference.mismatch(build_like(model)) == ""
    difference = reference.mismatch(wrong(build_like(model), x))
    assert re.search(reason, difference), difference


def build_like(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def test_a_container_is_entered() -> None:
    case = by_name("container_transformer")
    captured = capture(case.build(), case.args(2))
    paths = {str(node.target) for node in captured.graph.nodes if node.op == "call_module"}
    assert len(captured.order) > 20
    assert not paths & {"1", "1.layers.0"}


def test_writes_of_slices_are_in_the_graph() -> None:
    captured = capture(SliceAssignment(), (torch.randn(2, WIDTH),))
    assert sum("fill" in node.name for node in captured.order) == 7


class Cache:
    """What language models return beside the logits, and torch cannot look into."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return y, Cache([y * 2.0])


def test_a_cache_in_the_output_is_refused_by_its_class() -> None:
    with pytest.raises(CaptureError, match="Cache"):
        capture(Caching(), (torch.randn(2, WIDTH),))


class Branches(nn.Module):
    """Takes another way by a size of its input, which a trace does not follow."""

    def __init__(self, choose: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.body, self.choose = block_chain(4, WIDTH), choose

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return 2 * x if self.choose(x) else x


@pytest.mark.parametrize(
    ("choose", "size"),
    [
        (lambda x: x.shape[0] > 5, 6),
        (lambda x: x.shape[0] == 1, 1),
        (lambda x: x.shape[0] < 4, 3),
    ],
)
def test_a_branch_on_the_batch_size_is_no_graph(choose: Any, size: int) -> None:
    model, x = Branches(choose), torch.randn(4, WIDTH)
    with pytest.raises(CaptureError, match=rf"at a batch size of {size}, .*dynamic=\(\)"):
        capture(model, (x,))
    assert not capture(model, (x,), dynamic=()).dynamic


def test_a_result_that_only_looks_like_a_branch_is_followed() -> None:
    program = capture(Branches(lambda x: x[:6].squeeze().dim() > 9), (torch.randn(4, WIDTH),))
    assert (program.capture.rung, program.dynamic) == ("torch.export", ("batch",))


def test_sizes_that_a_graph_holds_are_noted() -> None:
    class Mean(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sum(1) / x.shape[1])

    x = torch.randn(3, 5, WIDTH)
    (note,) = capture(Mean(lambda x: x.shape[1] > 99), (x,)).capture.notes
    assert note.startswith(
        "sizes of the inputs but the batch are fixed (x [3, 5, 16]): with another"
    )
    assert not capture(Mean(lambda x: False), (x,)).capture.notes
