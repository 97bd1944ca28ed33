from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import pnn_compile as pnn
from passes.capture.ladder import capture
from passes.capture.refold import RULES, Attention, attach, toggle
from passes.ir.program import graph_module
from tests.models.builders import Exported
from tests.support.parameters import grid

aten = torch.ops.aten


def calls_of(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


IMAGE, VECTOR, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(2, 8), torch.randint(9, (2, 5))


@pytest.mark.parametrize(
    ("layers", "x"),
    [
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)], IMAGE),
        ([nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Dropout2d(), nn.AdaptiveAvgPool2d(2)], IMAGE),
        ([nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.3)], IMAGE),
        ([nn.Linear(8, 8), nn.BatchNorm1d(8), nn.AlphaDropout(0.5), nn.Softmax(dim=1)], VECTOR),
        ([nn.Embedding(9, 4), nn.RMSNorm(4), nn.Linear(4, 4), nn.Hardswish()], TOKENS),
    ],
)
def test_the_operators_of_a_layer_become_the_layer_again(
    layers: list[nn.Module], x: Tensor
) -> None:
    captured = capture(Exported(nn.Sequential(*layers)), (x,))

    assert captured.capture.rung == "torch.export"
    assert calls_of(captured.graph) == [f"body.{index}" for index in range(len(layers))]
    assert len(captured.order) == len(layers)
    for index, layer in enumerate(layers):
        assert type(captured.module.get_submodule(f"body.{index}")) is type(layer)
    captured.module.eval()
    assert not any(module.training for module in captured.module.modules())


def test_each_call_of_a_shared_layer_is_restored() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.alias = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(torch.tanh(self.first(torch.tanh(self.first(x)))))

    captured = capture(Exported(Again()), (VECTOR,))
    layers = [captured.module.get_submodule(path) for path in calls_of(captured.graph)]

    assert [type(layer) for layer in layers] == [nn.Linear] * 3
    assert layers[0] is layers[1] is layers[2]


def test_a_batchnorm_of_two_branches_is_restored_twice_and_a_dead_one_once() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unread = nn.BatchNorm1d(8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            self.unread(y)
            return y + self.norm(2.0 * x.exp())

    captured = capture(Exported(Siamese()), (VECTOR,))

    assert calls_of(captured.graph) == ["body.norm", "body.unread", "body.norm"]


class Picks(nn.Module):
    """Takes the first tensor that a layer returns."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer = layer
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.times)[0]


SEQUENCE = torch.randn(2, 5, 8)


BODIES = (
    (Picks(nn.LSTM(8, 8, batch_first=True), 1), SEQUENCE),
    (Picks(nn.GRU(8, 8, batch_first=True), 1), SEQUENCE),
    (Picks(nn.LSTMCell(8, 8), 1), VECTOR),
    (Picks(nn.MultiheadAttention(8, 2, batch_first=True), 3), SEQUENCE),
    (Picks(nn.MaxPool2d(2, return_indices=True), 1), IMAGE),
    (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), SEQUENCE),
    (nn.Bilinear(8, 8, 3), VECTOR),
)


@pytest.mark.parametrize(("body", "x", "dynamic"), grid(BODIES, (True, False)))
def test_a_layer_of_several_inputs_or_outputs_keeps_its_operators(
    body: nn.Module, x: Tensor, dynamic: bool
) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = body

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x) if isinstance(body, nn.Bilinear) else self.layer(x)

    captured = capture(Exported(Twice()), (x,), dynamic=("batch",) * dynamic)

    assert captured.capture.rung == "torch.export"
    kinds = {type(captured.module.get_submodule(path)) for path in calls_of(captured.graph)}
    assert kinds <= {nn.LayerNorm, nn.Linear, nn.Dropout}


# --- toggle ---------------------------------------------------------------------------------------


def one_call(target: Any, *args: Any, **kwargs: Any) -> tuple[nn.Module, fx.Graph]:
    """Return a root, and a graph that calls `target` on its input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, *args), kwargs))
    return nn.Module(), graph


CASES: tuple[tuple[Any, tuple[Any, ...], type[nn.Module], tuple[int, ...]], ...] = (
    (F.dropout, (0.5, True), nn.Dropout, (4, 8)),
    (torch.dropout, (0.5, True), nn.Dropout, (4, 8)),
    (aten.dropout.default, (0.5, True), nn.Dropout, (4, 8)),
    (torch.dropout_, (0.5, True), nn.Dropout, (4, 8)),
    (aten.dropout_.default, (0.5, True), nn.Dropout, (4, 8)),
    (F.alpha_dropout, (0.5, True), nn.AlphaDropout, (4, 8)),
    (torch.alpha_dropout, (0.5, True), nn.AlphaDropout, (4, 8)),
    (aten.alpha_dropout.default, (0.5, True), nn.AlphaDropout, (4, 8)),
    (F.feature_alpha_dropout, (0.5, True), nn.FeatureAlphaDropout, (4, 8, 3)),
    (torch.feature_alpha_dropout, (0.5, True), nn.FeatureAlphaDropout, (4, 8, 3)),
    (aten.feature_alpha_dropout.default, (0.5, True), nn.FeatureAlphaDropout, (4, 8, 3)),
    (F.dropout1d, (0.5, True), nn.Dropout1d, (4, 8, 3)),
    (F.dropout2d, (0.5, True), nn.Dropout2d, (4, 8, 3, 3)),
    (torch.feature_dropout, (0.5, True), nn.Dropout2d, (4, 8, 3, 3)),
    (aten.feature_dropout.default, (0.5, True), nn.Dropout2d, (4, 8, 3, 3)),
    (F.dropout3d, (0.5, True), nn.Dropout3d, (4, 8, 2, 2, 2)),
)


def test_every_rule_is_tested() -> None:
    tested = {target for target, *_ in CASES}
    attention = {F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default}
    others = attention | {*SLOPES, *NORMS, DEPTH, EXPERTS}
    assert {target for rule in RULES for target in rule.targets} == tested | others


SLOPES = (F.rrelu, torch.rrelu, aten.rrelu.default)
EXPERTS = "transformers::grouped_mm_fallback"  # test_artifact_library_code.py
DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"
NORMS = (F.batch_norm, torch.batch_norm, aten.batch_norm.default)


@pytest.mark.parametrize("target", SLOPES)
def test_random_slopes_become_a_module_that_follows_the_mode(target: Any) -> None:
    root, graph = one_call(target, 0.1, 0.9, True)
    assert toggle(root, graph) == 1
    module = graph_module(root, graph, "Toggled")
    x = torch.randn(4, 8)

    for train in (True, False):
        torch.manual_seed(0)
        expected = F.rrelu(x, 0.1, 0.9, train)
        torch.manual_seed(0)
        assert torch.equal(module.train(train)(x), expected)


@pytest.mark.parametrize("target", NORMS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_over_ones_own_statistics_follows_the_mode(target: Any, affine: bool) -> None:
    graph = fx.Graph()
    names = ("input", "mean", "var", *(("weight", "bias") if affine else ()))
    x, mean, var, *scale = (graph.placeholder(name) for name in names)
    weight, bias = scale or (None, None)
    if target is F.batch_norm:
        args: tuple[Any, ...] = (x, mean, var, weight, bias, True, 0.3, 1e-4)
    else:
        args = (x, weight, bias, mean, var, True, 0.3, 1e-4, True)
    graph.output(graph.call_function(target, args))
    root = nn.Module()
    assert toggle(root, graph) == 1
    module = graph_module(root, graph, "Toggled")
    values = [torch.randn(6, 4), *(torch.rand(4) + 0.5 for _ in names[1:])]

    for train in (True, False):
        arguments, copies = ([value.clone() for value in values] for _ in range(2))
        x_, mean_, var_, *scale_and_shift = copies
        weight_, bias_ = scale_and_shift or (None, None)
        expected = F.batch_norm(x_, mean_, var_, weight_, bias_, train, 0.3, 1e-4)
        assert torch.equal(module.train(train)(*arguments), expected)
        assert all(map(torch.equal, arguments, copies))


def test_a_norm_without_statistics_takes_those_of_the_batch_in_either_mode() -> None:
    root, graph = one_call(F.batch_norm, None, None, training=True)
    assert toggle(root, graph) == 0


@pytest.mark.parametrize(("target", "args", "kind", "shape"), CASES)
def test_a_dropout_becomes_a_module_that_follows_the_mode(
    target: Callable[..., Tensor], args: tuple[Any, ...], kind: type, shape: tuple[int, ...]
) -> None:
    root, graph = one_call(target, *args)
    assert toggle(root, graph) == 1
    module = graph_module(root, graph, "Toggled")
    x = torch.randn(shape)

    (path,) = calls_of(graph)
    assert type(module.get_submodule(path)) is kind
    torch.manual_seed(0)
    expected = target(x.clone(), *args)
    torch.manual_seed(0)
    assert torch.equal(module.train()(x.clone()), expected)
    assert not torch.equal(expected, x)
    assert torch.equal(module.eval()(x.clone()), x)


@pytest.mark.parametrize(
    ("target", "kwargs"),
    [(F.dropout, {"p": 0.5, "inplace": True}), (torch.dropout_, {"p": 0.5, "train": True})],
)
def test_a_dropout_in_place_stays_in_place(target: Any, kwargs: dict[str, Any]) -> None:
    root, graph = one_call(target, **kwargs)
    toggle(root, graph)
    module = graph_module(root, graph, "Toggled")
    x = torch.ones(100)
    module(x)

    assert set(x.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(
    ("target", "kwargs"),
    [
        (F.dropout, {"p": 0.5, "training": False}),
        (aten.dropout.default, {"p": 0.5, "train": False}),
        (F.relu, {}),
        (torch.add, {"other": 1.0}),
    ],
)
def test_what_has_no_flag_or_a_flag_that_is_off_stays(target: Any, kwargs: dict[str, Any]) -> None:
    root, graph = one_call(target, **kwargs)

    assert toggle(root, graph) == 0
    assert calls_of(graph) == []


@pytest.mark.parametrize(
    "operator", [F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_drops_in_training_mode_only(operator: Any, masked: bool) -> None:
    def build(p: float) -> tuple[nn.Module, fx.Graph]:
        root, graph = nn.Module(), fx.Graph()
        query, key, value, mask = (graph.placeholder(name) for name in "qkvm")
        options: dict[str, Any] = {"attn_mask": mask} if masked else {"is_causal": True}
        options |= {"dropout_p": p, "scale": 0.3}
        graph.output(graph.call_function(operator, (query, key, value), options))
        return root, graph

    assert toggle(*build(0.0)) == 0
    root, graph = build(0.5)
    assert toggle(root, graph) == 1
    module = graph_module(root, graph, "Toggled")
    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))
    mask = torch.randn(6, 6)

    def plain(p: float) -> Tensor:
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(
            q, k, v, mask if masked else None, p, is_causal=not masked, scale=0.3
        )

    (path,) = calls_of(graph)
    assert isinstance(module.get_submodule(path), Attention)
    torch.manual_seed(0)
    torch.testing.assert_close(module.train()(q, k, v, mask), plain(0.5))
    torch.testing.assert_close(module.eval()(q, k, v, mask), plain(0.0))


@pytest.mark.parametrize("training", [True, False])
def test_a_new_module_is_put_in_the_mode_of_the_place(training: bool) -> None:
    model = nn.Sequential(nn.ModuleDict({"inner": nn.Linear(2, 2)})).train(training)
    attach(model, "0.made.on.the.way", nn.Dropout())

    assert isinstance(model.get_submodule("0.inner"), nn.Linear)
    assert {module.training for module in model.modules()} == {training}


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """Do what the function of this name in torchvision does."""
    if not training or p == 0.0:
        return input
    size = [input.shape[0] if mode == "row" else 1] + [1] * (input.ndim - 1)
    return input * torch.empty(size).bernoulli_(1.0 - p).div_(1.0 - p)


stochastic_depth.__module__ = DEPTH.rpartition(".")[0]
torch.fx.wrap("stochastic_depth")  # torchvision does: a trace keeps it whole


class Skipping(nn.Module):
    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.linear, self.p, self.mode = nn.Linear(8, 8), p, mode

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        return x + stochastic_depth(y, self.p, self.mode, self.training)


def test_stochastic_depth_of_torchvision_is_saved(tmp_path: Path) -> None:
    options = [(0.0, "row"), (0.3, "row"), (0.4, "batch"), (0.5, "row")]
    model, x = nn.Sequential(*(Skipping(*both) for both in options)), torch.randn(4, 8)
    compiled = pnn.compile(model, x, stages=2)
    assert not compiled.program.capture.notes
    loaded = pnn.load(compiled.save(tmp_path / "a"))
    for train in (True, False):
        outputs = []
        for network in (model, loaded.sequential):
            torch.manual_seed(0)
            outputs.append(network.train(train)(x))
        assert torch.equal(*outputs)
