"""The graph file: programs as data, and back."""

import copy
import enum
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.capture.ladder import capture
from passes.errors import ArtifactError
from passes.ir.program import CaptureReport, Program, graph_module, provenance
from pnn_compile.artifact.program_json import program_from_data, program_to_data


def round_trip(program: Program) -> Program:
    data, tensors = program_to_data(program)
    assert data["unknown"] == []
    again = program_from_data(json.loads(json.dumps(data, allow_nan=False)), tensors)
    assert again.fingerprint == program.fingerprint
    assert list(again.module.state_dict()) == list(program.module.state_dict())
    for old, new in zip(program.graph.nodes, again.graph.nodes, strict=True):
        assert provenance(new) == provenance(old)
    return again


class Sharing(nn.Module):
    """Ties two layers and holds every kind of tensor."""

    scale: Tensor
    table: Tensor
    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.first = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.shift = nn.Parameter(torch.randn(4))
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("table", torch.randn(6, 4), persistent=False)
        self.register_buffer("rotation", torch.polar(torch.ones(4), torch.rand(4)))
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.never = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.embedding(tokens) + self.shift)
        x = torch.tanh(self.frozen(x) * self.scale) @ (self.turned @ self.table)
        return self.head((x * self.rotation).real)


@pytest.fixture
def sharing() -> Program:
    torch.manual_seed(0)
    model = Sharing()
    model.first.eval()
    return capture(model, (torch.tensor([0, 3, 4]),))


def test_tied_parameters_stay_tied(sharing: Program) -> None:
    module = round_trip(sharing).module
    assert module.get_parameter("head.weight") is module.get_parameter("embedding.weight")


def test_flags_survive(sharing: Program) -> None:
    again = round_trip(sharing)
    assert not again.module.get_parameter("frozen.weight").requires_grad
    assert again.module.get_parameter("shift").requires_grad
    modes = {name: m.training for name, m in sharing.module.named_modules()}
    assert {name: m.training for name, m in again.module.named_modules()} == modes
    assert not modes["first"]
    buffers = dict(again.module.named_buffers())
    assert "table" in buffers
    assert "table" not in again.module.state_dict()


def test_values_and_strides_survive(sharing: Program) -> None:
    again = round_trip(sharing)
    for name, value in sharing.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value)
    assert again.module.get_parameter("turned").stride() == (1, 4)
    assert set(again.unused) == {"never.weight", "never.bias"}
    assert torch.equal(again.unused["never.bias"], sharing.unused["never.bias"])
    assert torch.equal(again.args["tokens"], sharing.args["tokens"])


def test_what_is_stored_is_stored_once(sharing: Program) -> None:
    _, tensors = program_to_data(sharing)
    assert ("embedding.weight" in tensors) != ("head.weight" in tensors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    starts = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert len(set(starts)) == len(starts)


def program_of(*calls: Callable[[Any, Any], Any], root: nn.Module | None = None) -> Program:
    graph = torch.fx.Graph()
    value: Any = graph.placeholder("x")
    for call in calls:
        value = call(graph, value)
    graph.output(value)
    module = graph_module(root or nn.Module(), graph, "Net")
    return Program(module, {"x": torch.ones(2, 2)}, ("batch",), CaptureReport("test"), "Net")


def test_one_module_at_two_paths_stays_one() -> None:
    root, layer = nn.Module(), nn.Linear(2, 2)
    root.a, root.b = nn.Module(), nn.Module()
    root.a.layer = root.b.layer = layer
    program = program_of(
        lambda g, x: g.call_module("a.layer", (x,)),
        lambda g, x: g.call_module("b.layer", (x,)),
        root=root,
    )
    module = round_trip(program).module
    assert module.get_submodule("a.layer") is module.get_submodule("b.layer")


def test_two_parameters_over_one_storage_stay_two() -> None:
    root = nn.Module()
    root.a = nn.Parameter(torch.randn(2))
    root.b = nn.Parameter(root.a.data)
    program = program_of(
        lambda g, x: g.call_function(torch.add, (x, g.get_attr("a"))),
        lambda g, x: g.call_function(torch.add, (x, g.get_attr("b"))),
        root=root,
    )
    module = round_trip(program).module
    a, b = module.get_parameter("a"), module.get_parameter("b")
    assert a is not b
    assert a.data_ptr() == b.data_ptr()


def test_expanded_tensors_are_stored_contiguous() -> None:
    root = nn.Module()
    root.register_buffer("a", torch.rand(1).expand(2))
    add = program_of(lambda g, x: g.call_function(torch.add, (x, g.get_attr("a"))), root=root)
    again = round_trip(add).module.get_buffer("a")
    assert again.is_contiguous()
    assert torch.equal(again, add.module.get_buffer("a"))


def test_meta_parameters_come_back_on_meta() -> None:
    root = nn.Module()
    root.layer = nn.Linear(2, 2, device="meta")
    program = program_of(lambda g, x: g.call_module("layer", (x,)), root=root)
    _, tensors = program_to_data(program)
    assert list(tensors) == ["example_inputs/2"]
    assert round_trip(program).module.get_parameter("layer.weight").is_meta


def test_half_precision_survives() -> None:
    root = nn.Module()
    root.layer = nn.Linear(2, 2, dtype=torch.bfloat16)
    program = program_of(lambda g, x: g.call_module("layer", (x,)), root=root)
    assert round_trip(program).module.get_parameter("layer.weight").dtype == torch.bfloat16


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any], pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {"sum": batch["x"] + batch["y"][0] + pair[1], "same": [pair[0] * 2]}


def test_nested_example_inputs_and_outputs_survive() -> None:
    x = torch.randn(3, 2)
    inputs = ({"x": x, "y": [x + 1], "name": "n"}, (x + 2, x + 3))
    again = round_trip(capture(Nested(), inputs))
    assert again.args["batch"]["name"] == "n"
    outputs = again.module(*copy.deepcopy(again.args).values())
    torch.testing.assert_close(outputs["sum"], 3 * x + 4)
    torch.testing.assert_close(outputs["same"][0], 2 * x + 4)


class Color(enum.Enum):
    RED = 1


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (program_of(lambda g, x: g.call_function(torch.save, (x, "file"))), "torch.serialization"),
        (program_of(lambda g, x: g.call_method("data_ptr", (x,))), "method 'data_ptr'"),
        (program_of(lambda g, x: g.call_function(getattr, (x, "grad_fn"))), "getattr of 'grad_fn'"),
        (program_of(lambda g, x: g.call_function(torch.mul, (x, Color.RED))), "Color"),
    ],
)
def test_operators_without_a_form_are_named(program: Program, reason: str) -> None:
    data, tensors = program_to_data(program)
    assert reason in data["unknown"][0]
    assert data["nodes"] is None
    with pytest.raises(ArtifactError, match="which has no form"):
        program_from_data(data, tensors)


def test_opaque_modules_are_named_with_their_path() -> None:
    root = nn.Module()
    root.layer = Hidden()
    program = program_of(lambda g, x: g.call_module("layer", (x,)), root=root)
    data, _ = program_to_data(program)
    assert data["unknown"] == ["layer: module tests.product.test_graphfile.Hidden"]


def test_sparse_tensors_are_refused() -> None:
    root = nn.Module()
    root.register_buffer("a", torch.eye(2).to_sparse())
    program = program_of(lambda g, x: g.call_function(torch.mm, (g.get_attr("a"), x)), root=root)
    with pytest.raises(ArtifactError, match="a is a Tensor"):
        program_to_data(program)


CODE = "x if __import__('os').abort() else x"


def tampered(change: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    root = nn.Module()
    root.layer = nn.Linear(2, 2)
    root.shift = nn.Parameter(torch.ones(2))
    data, tensors = program_to_data(
        program_of(
            lambda g, x: g.call_module("layer", (x,)),
            lambda g, x: g.call_function(torch.add, (x, g.get_attr("shift"))),
            lambda g, x: g.call_function(torch.sum, (x,), {"dim": 0}),
            lambda g, x: g.call_method("tanh", (x,)),
            lambda g, x: g.call_function(getattr, (x, "T")),
            root=root,
        )
    )
    change(data)
    return data, tensors


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set the item at a path, whose last part is the value."""
    *keys, last, value = path

    def change(data: Any) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return change


PLACEHOLDER, LAYER, SHIFT, ADD, SUM, TANH, TURN, OUTPUT = range(8)


@pytest.mark.parametrize(
    "change",
    [
        put("schema", 99),
        put("name", CODE),
        put("nodes", PLACEHOLDER, "target", CODE),
        put("nodes", PLACEHOLDER, "name", CODE),
        put("nodes", PLACEHOLDER, "op", "call_code"),
        put("nodes", PLACEHOLDER, "op", "root"),
        put("nodes", LAYER, "target", f'layer"+{CODE}+"'),
        put("nodes", LAYER, "target", "shift"),
        put("nodes", LAYER, "target", "nothing"),
        put("nodes", SHIFT, "target", f'shift"+{CODE}+"'),
        put("nodes", SHIFT, "name", "self"),
        put("nodes", SHIFT, "name", "torch"),
        put("nodes", ADD, "target", "builtins.eval"),
        put("nodes", ADD, "args", [{"node": "nothing"}]),
        put("nodes", ADD, "name", "x"),
        put("nodes", SUM, "kwargs", {CODE: 1}),
        put("nodes", TANH, "target", "__reduce__"),
        put("nodes", TURN, "args", [{"node": "tanh"}, "__class__"]),
        put("nodes", OUTPUT, "name", "lambda"),
        put("modules", 0, "path", f'layer"+{CODE}+"'),
        put("modules", 0, "class", "torch.nn.ReLU"),
        put("modules", 0, "arguments", "in_features", 3),
        put("modules", []),
        put("tensors", 0, "shape", [3]),
        put("tensors", 0, "name", "elsewhere"),
        put("tensors", 0, "key", "elsewhere"),
        put("tensors", 0, "same_as", "elsewhere"),
        put("tensors", 0, "stride", [0]),
        put("tensors", 1, "name", "layer.extra"),
        put("tensors", []),
    ],
)
def test_tampered_data_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    data, tensors = tampered(change)
    with pytest.raises(ArtifactError):
        program_from_data(data, tensors)


def test_untampered_data_is_accepted() -> None:
    data, tensors = tampered(lambda data: None)
    assert program_from_data(data, tensors).name == "Net"
