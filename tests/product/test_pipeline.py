from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from passes.errors import CaptureError, OptionError
from passes.ir.program import verify_graph
from passes.options import Options
from passes.pipeline import COMPILE, REPLAY, Compilation, Pass, run_passes
from tests.support.programs import compiled, parts, program


def start() -> Compilation:
    return Compilation(program=program("mlp"), options=Options(stages=2))


# --- the list of passes ---------------------------------------------------------------------------


def test_the_passes_fill_the_compilation_in_order() -> None:
    result, times = run_passes(start(), COMPILE, check=True)

    assert [time.name for time in times] == [step.name for step in COMPILE]
    assert all(time.seconds >= 0 for time in times)
    for step in COMPILE:
        assert all(getattr(result, field) is not None for field in step.ensures)


def test_every_pass_requires_what_an_earlier_one_ensures() -> None:
    for passes, known in ((COMPILE, {"program", "options"}), (REPLAY, {"program", "plan"})):
        for step in passes:
            assert set(step.requires) <= known
            known |= set(step.ensures)
        assert {"sequential", "module"} <= known


@pytest.mark.parametrize("step", COMPILE, ids=lambda step: step.name)
def test_a_pass_without_what_it_requires_says_what_is_missing(step: Pass) -> None:
    with pytest.raises(
        OptionError, match=rf"pass '{step.name}' requires {', '.join(step.requires)}"
    ):
        run_passes(Compilation(), [step])


def test_a_pass_that_breaks_its_promise_is_caught() -> None:
    idle = Pass("idle", ("options",), ("plan", "analysis"), lambda compilation: compilation)
    with pytest.raises(OptionError, match=r"pass 'idle' should have made plan, analysis"):
        run_passes(start(), [idle])


def test_a_plan_is_replayed_to_the_same_network() -> None:
    first = compiled("resnet", stages=3)
    again, _ = run_passes(
        Compilation(program=program("resnet"), plan=first.plan), REPLAY, check=True
    )
    module, other = parts(first)[2], parts(again)[2]

    assert other.code == module.code
    for key, value in other.state_dict().items():
        assert torch.equal(value, module.state_dict()[key])


def test_a_broken_graph_is_caught_between_passes() -> None:
    def spoil(compilation: Compilation) -> Compilation:
        graph = fx.Graph()
        graph.output(graph.call_module("ghost", (graph.placeholder("x"),)))
        module = fx.GraphModule(nn.Module(), fx.Graph())
        module.graph = graph
        return dataclasses.replace(compilation, module=module)

    step = Pass("spoil", (), ("module",), spoil)
    run_passes(start(), [step])
    with pytest.raises(CaptureError, match=r"malformed graph: .*nonexistent attribute ghost"):
        run_passes(start(), [step], check=True)


# --- the executable specification -----------------------------------------------------------------


def sound() -> fx.GraphModule:
    """x -> layer(x) * weight"""
    root = nn.Module()
    root.layer = nn.Linear(2, 2)
    root.weight = nn.Parameter(torch.ones(2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    graph.output(graph.call_function(torch.mul, (graph.call_module("layer", (x,)), weight)))
    return fx.GraphModule(root, graph)


def named(module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in module.graph.nodes if node.name == name)


def late_placeholder(module: fx.GraphModule) -> None:
    with module.graph.inserting_after(named(module, "layer")):
        module.graph.placeholder("late")


def two_outputs(module: fx.GraphModule) -> None:
    with module.graph.inserting_before(named(module, "mul")):
        module.graph.create_node("output", "output", (named(module, "layer"),))


def no_output(module: fx.GraphModule) -> None:
    module.graph.erase_node(module.graph.output_node())


def module_is_gone(module: fx.GraphModule) -> None:
    del module.layer


def attribute_is_gone(module: fx.GraphModule) -> None:
    del module.weight


def calls_a_parameter(module: fx.GraphModule) -> None:
    named(module, "layer").target = "weight"


def reads_a_module(module: fx.GraphModule) -> None:
    named(module, "weight").target = "layer"


def literal_tensor(module: fx.GraphModule) -> None:
    named(module, "mul").args = (named(module, "layer"), torch.ones(2))


def nested_literal_tensor(module: fx.GraphModule) -> None:
    named(module, "mul").kwargs = {"more": [{"deep": torch.ones(2)}]}


def use_before_definition(module: fx.GraphModule) -> None:
    named(module, "layer").args = (named(module, "mul"),)


def foreign_node(module: fx.GraphModule) -> None:
    named(module, "layer").args = (named(sound(), "x"),)


def test_a_sound_graph_passes() -> None:
    verify_graph(sound())


@pytest.mark.filterwarnings("ignore:Attempted to insert")
@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (late_placeholder, r"placeholders come first \(node 'late', placeholder\)"),
        (two_outputs, r"one output node, and it comes last \(node 'output"),
        (no_output, r"one output node, and it comes last \(node 'mul'"),
        (module_is_gone, r"layer"),
        (attribute_is_gone, r"weight"),
        (calls_a_parameter, r"weight"),
        (reads_a_module, r"every module and attribute .* exists \(node 'weight', get_attr\)"),
        (literal_tensor, r"tensors are attributes, never literal arguments \(node 'mul'"),
        (nested_literal_tensor, r"tensors are attributes, never literal arguments \(node 'mul'"),
        (use_before_definition, r"used before it has been defined|before"),
        (foreign_node, r"graph"),
    ],
)
def test_every_broken_rule_is_named(damage: Callable[[fx.GraphModule], None], rule: str) -> None:
    module = sound()
    damage(module)
    with pytest.raises(CaptureError, match=rf"^malformed graph: .*{rule}"):
        verify_graph(module)
