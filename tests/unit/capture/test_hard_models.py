"""Regression tests: models that capture once refused, or captured wrongly."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pnn_compile as pnn
from passes.capture.ladder import capture
from passes.errors import ArtifactError, CaptureError
from pnn_compile.artifact.program_json import program_from_data, program_to_data
from tests.models.builders import mlp
from tests.support.parity import assert_same_step, step

WIDTH = 16


def body(count: int = 4) -> nn.Sequential:
    return mlp(count, WIDTH)


class WithoutGradients(nn.Module):
    """Computes a table without gradients, on the way from a layer to others."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.first, self.last, self.nested = body(), body(), nested

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) if x.shape[-1] < 100 else x
        with torch.no_grad():
            table, scale = y.cos(), y.mean(1, keepdim=True)
            if self.nested:
                with torch.enable_grad():
                    table = table + x
        with torch.autocast("cpu", enabled=False):
            y = y.float() * 2.0
        return self.last(y + table) * scale


@pytest.mark.parametrize("nested", [False, True])
def test_what_is_computed_without_gradients_has_none(nested: bool) -> None:
    model = WithoutGradients(nested)
    compiled = pnn.compile(model, torch.randn(4, WIDTH), stages=3)
    x = torch.randn(7, WIDTH)

    assert compiled.program.capture.rung == "torch.export"
    for train in (True, False):
        expected = step(model, (x,), train=train)
        assert_same_step(step(compiled.program.module, (x,), train=train), expected)
    compiled.verify(strict=True)


class Casts(nn.Module):
    """Runs its trunk in lower precision, and its head outside."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.LayerNorm(WIDTH), *body(6), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)]
        self.trunk, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.trunk(x) + torch.softmax(x @ x.mT, -1) @ x
        with torch.autocast("cpu", enabled=False):
            return self.head(y.float())


def test_conversions_by_autocast_become_part_of_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Casts(), torch.randn(4, WIDTH)
    compiled = pnn.compile(model, x, stages=3)
    x = torch.randn(6, WIDTH)

    assert compiled.program.capture.rung == "torch.export"
    loaded = pnn.load(compiled.save(tmp_path / "casts"))
    for train in (True, False):
        for network in (compiled.sequential, loaded.sequential):
            torch.manual_seed(1)
            result = network.train(train)(x)
            torch.manual_seed(1)
            expected = model.train(train)(x)
            torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
    in_full = copy.deepcopy(model).eval()
    in_full.forward = lambda x: in_full.head(  # type: ignore[method-assign]
        in_full.trunk(x) + torch.softmax(x @ x.mT, -1) @ x
    )
    assert not torch.equal(in_full(x), expected)
    compiled.verify(strict=True)


def test_a_trace_that_would_lose_autocast_is_no_graph() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.body(x)
            return y.to(torch.bfloat16).float()

    rejected = capture(Mixed(), (torch.randn(4, WIDTH),)).capture.rejected
    assert "forward turns on torch.autocast" in rejected[0]


@pytest.mark.parametrize("exported", [False, True])
def test_a_parameter_has_two_names_and_the_first_is_not_used(exported: bool) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.bias = body(), nn.Parameter(torch.zeros(3))
            self.decoder = nn.Linear(WIDTH, 3)
            self.decoder.bias = self.bias

        def forward(self, x: Tensor) -> Tensor:
            if exported and x.shape[-1] > 100:
                return x
            y: Tensor = self.decoder(self.body(x))
            return y

    model = Head()
    compiled = pnn.compile(model, torch.randn(4, WIDTH), stages=2)

    compiled.verify(strict=True)
    assert compiled.original_state_dict().keys() == model.state_dict().keys()
    x = torch.randn(5, WIDTH)
    compiled.sequential(x).sum().backward()
    gradient = compiled.program.module.get_parameter("decoder.bias").grad
    model(x).sum().backward()
    assert gradient is not None
    torch.testing.assert_close(gradient, model.bias.grad)


def mask(size: int, causal: bool) -> Tensor:
    if causal:
        return nn.Transformer.generate_square_subsequent_mask(size)
    return torch.zeros(size, size).masked_fill(torch.eye(size).flip(0) > 0, float("-inf"))


def test_a_transformer_of_torch_takes_a_mask() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.1, batch_first=True)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.layers(x, mask=mask)
            return y

    model = Encoder()
    compiled = pnn.compile(model, (torch.randn(2, 5, WIDTH), mask(5, True)), stages=2)
    x = torch.randn(3, 5, WIDTH)
    for other in (mask(5, causal=True), mask(5, causal=False)):
        torch.testing.assert_close(
            compiled.sequential.eval()(x, other), model.eval()(x, other), rtol=1e-5, atol=1e-5
        )
    compiled.verify(strict=True)


def test_buffers_may_be_expanded() -> None:
    class Expanded(nn.Module):
        row: Tensor
        one: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.body = body()
            self.register_buffer("row", torch.arange(float(WIDTH)).expand(1, WIDTH))
            self.register_buffer("one", torch.ones(1).expand(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x + self.row * self.one)
            return y

    pnn.compile(Expanded(), torch.randn(4, WIDTH), stages=2).verify(strict=True)


@pytest.mark.parametrize("exported", [False, True])
def test_a_setting_may_be_called_like_the_layer_that_is_made_of_it(exported: bool) -> None:
    class Setting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.dropout, self.by_mode = body(), 0.1, True

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x) if not exported or x.shape[-1] < 100 else x
            y = nn.functional.dropout(y, self.dropout, self.training)
            return y + torch.rand_like(y) if self.training else y

    model = Setting()
    captured = capture(model, (torch.randn(4, WIDTH),))
    x = torch.randn(5, WIDTH)
    for train in (True, False):
        assert_same_step(step(captured.module, (x,), train=train), step(model, (x,), train=train))


# --- containers -----------------------------------------------------------------------------------


class ModelOutput(OrderedDict[str, Any]):
    """A dict whose items are attributes too, as libraries have it, and torch does not know it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Unknown:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


@dataclass
class Known:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Named(NamedTuple):
    logits: Tensor
    hidden: tuple[Tensor, ...]


torch.export.register_dataclass(Known)


class Gives(nn.Module):
    def __init__(self, kind: type[Any], exported: bool) -> None:
        super().__init__()
        self.body, self.kind, self.exported = body(), kind, exported

    def forward(self, x: Tensor) -> Any:
        y = self.body(x) if not self.exported or x.shape[-1] < 100 else x
        return self.kind(logits=y.mean(1), hidden=(x * 2.0, y))


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kind", [ModelOutput, Unknown, Known, Named])
def test_outputs_of_any_class_keep_their_fields(kind: type[Any], exported: bool) -> None:
    model = Gives(kind, exported).eval()
    compiled = pnn.compile(model, torch.randn(4, WIDTH), stages=2)
    x = torch.randn(5, WIDTH)
    actual, expected = compiled.sequential(x), model(x)

    assert type(actual) is type(expected)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.hidden, expected.hidden)
    (note,) = [note for note in compiled.plan.notes if "the output" in note]
    assert f"the output holds {kind.__name__}, which a network that is loaded without" in note
    compiled.verify(strict=True)


class Ordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return [OrderedDict(logits=y, first=({"x": x}, None)), defaultdict(list, {"y": [y]})]


def test_ordered_dicts_are_saved_as_such(tmp_path: Path) -> None:
    model, x = Ordered().eval(), torch.randn(4, WIDTH)
    compiled = pnn.compile(model, x, stages=2)
    loaded = pnn.load(compiled.save(tmp_path / "network"))

    expected = model(x)
    for network, kind in ((compiled.sequential, defaultdict), (loaded.sequential, dict)):
        actual = network(x)
        torch.testing.assert_close([dict(part) for part in actual], [dict(p) for p in expected])
        assert [*map(type, actual)] == [OrderedDict, kind]
    damaged = program_to_data(compiled.program)[0] | {"ordered_outputs": [{"tuple": [1, "z"]}]}
    with pytest.raises(ArtifactError, match="the outputs have no dict at"):
        program_from_data(damaged, program_to_data(compiled.program)[1])


class Reads(nn.Module):
    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.body, self.exported = body(), exported

    def forward(self, batch: Any, late: dict[str, list[Tensor]]) -> Tensor:
        y = self.body(batch.logits) if not self.exported or batch.logits.shape[-1] < 100 else batch
        return y + batch.hidden[0] * late["x"][1]


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kind", [Known, Named])
def test_inputs_may_be_dataclasses_and_named_tuples(kind: type[Any], exported: bool) -> None:
    def call(batch: int) -> tuple[Any, ...]:
        a, b, c, d = torch.randn(4, batch, WIDTH)
        return kind(a, (b,)), {"x": [c, d]}

    model = Reads(exported)
    compiled = pnn.compile(model, call(4), stages=3)
    args = call(5)

    torch.testing.assert_close(compiled.sequential.eval()(*args), model.eval()(*args))
    compiled.verify(strict=True)


# --- devices and types ----------------------------------------------------------------------------


def test_a_model_on_the_meta_device_is_compiled_by_its_shapes() -> None:
    with torch.device("meta"):
        model, x = body(6), torch.randn(4, WIDTH)
    compiled = pnn.compile(model, x, stages=3)

    assert "shapes were compared, and no values" in compiled.plan.notes[0]
    assert {p.device.type for p in compiled.module.parameters()} == {"meta"}
    assert compiled.module(x).shape == (4, WIDTH)
    real = pnn.compile(body(6), torch.randn(4, WIDTH), stages=3)
    assert [s.first for s in real.plan.stages] == [s.first for s in compiled.plan.stages]


def test_channels_last_stays_channels_last() -> None:
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    compiled = pnn.compile(model, x, stages=3)

    assert compiled.sequential(x).is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in compiled.program.module.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    compiled.verify(strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precisions_compile(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), body()).to(dtype)
    compiled = pnn.compile(model, torch.randn(4, WIDTH, dtype=dtype), stages=3)

    leaves = pytree.tree_leaves(compiled.module(torch.randn(4, WIDTH, dtype=dtype)))
    assert {leaf.dtype for leaf in leaves} == {dtype}
    compiled.verify(strict=True)


class AsksForGradients(nn.Module):
    """Sets requires_grad of its input in training mode, which no other than a leaf allows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, None]
        if self.training:
            y.requires_grad = True
        return self.body(y) * (2.0 if self.training else 1.0)


def test_a_model_that_sets_requires_grad_is_compared_in_training_mode() -> None:
    program = capture(AsksForGradients(), (torch.randn(3, WIDTH),))

    assert not any("was not compared" in note for note in program.capture.notes)
    x = torch.randn(2, WIDTH)
    for train in (True, False):
        model = AsksForGradients().train(train)
        model.load_state_dict(program.module.state_dict())
        torch.testing.assert_close(program.module.train(train)(x), model(x))


class AttentionBlock(nn.Module):
    """Makes the attended values contiguous, which torch.export drops where they are already."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if length > 100:
            return x
        heads = self.inlet(x).view(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads.unbind(0))
        return x + self.outlet(mixed.transpose(1, 2).contiguous().view(batch, length, WIDTH))


def test_exported_attention_is_copied_whatever_the_strides() -> None:
    model = nn.Sequential(nn.Linear(3, WIDTH), *(AttentionBlock() for _ in range(6)))
    x = torch.randn(2, 5, 3)
    compiled = pnn.compile(model, x, stages=3, coarse="units")

    assert compiled.program.capture.rung == "torch.export"
    compiled.module.train()(x).sum().backward()
    compiled.verify(strict=True)


class Transformed(nn.Module):
    """Applies a transform of torch.func in the middle."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.last, self.kind = body(), body(2), kind
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        def layer(v: Tensor) -> Tensor:
            return torch.tanh(v @ self.weight)

        x = self.body(x)
        if self.kind == "vmap":
            return self.last(torch.vmap(torch.vmap(layer))(x))
        return self.last(torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1])


def test_vmap_becomes_operators_on_batches() -> None:
    model, x = Transformed("vmap"), torch.randn(2, 3, WIDTH)
    compiled = pnn.compile(model, x, stages=2)
    assert compiled.verify().ok
    torch.testing.assert_close(compiled.sequential(x), model(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_failed_trace_leaves_no_level_of_a_transform_behind() -> None:
    model, x = Transformed("jvp"), torch.randn(2, 3, WIDTH)
    with pytest.raises(CaptureError, match="cannot be captured as a graph"):
        capture(model, (x,))
    assert model(x).shape == x.shape
    assert nn.Linear(2, 2).weight.sum().item()  # random numbers inside of vmap are refused


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_positions_are_what_the_layers_compute() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 4)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    model, x = Padded().eval(), torch.randn(3, 5, WIDTH)
    padding = torch.arange(5) >= torch.tensor([[4], [3], [5]])
    compiled = pnn.compile(model, (x, padding), stages=2)
    note, sizes = compiled.program.capture.notes
    assert note.startswith("encoder (nn.TransformerEncoder) returns zeros at padded positions")
    assert "with another one instead of 5, which the model takes" in sizes
    torch.testing.assert_close(compiled.sequential.eval()(x, padding), model(x, padding))
    with torch.no_grad():
        fast, outputs = model(x, padding), compiled.sequential(x, padding)
    torch.testing.assert_close(outputs[~padding], fast[~padding])
    assert not fast[padding].any()
    assert outputs[padding].any()


def padded(x: Tensor) -> Tensor:
    """Pad by the shape of a tensor, which a trace does not know."""
    return nn.functional.pad(x, (0, -x.shape[1] % 4)) if x.shape[1] % 4 else x


def clipped(x: Tensor) -> Tensor:
    """Branch on the values of a tensor, which no graph can."""
    return x.clamp(max=1) if x.max() > 1 else x


torch.fx.wrap("padded")
torch.fx.wrap("clipped")


@pytest.mark.parametrize(("rung", "whole"), [("torch.export", True), ("torch.fx trace", False)])
def test_wrapped_functions_are_entered_by_an_export(rung: str, whole: bool, tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(13, 13), body()

        def forward(self, x: Tensor) -> Tensor:
            y = padded(self.first(x)) if whole else clipped(self.first(x))
            return self.body(nn.functional.pad(y, (0, WIDTH - y.shape[1])))

    model, x = Wrapped(), torch.randn(3, 13)
    compiled = pnn.compile(model, x, stages=2)
    assert compiled.program.capture.rung == rung
    torch.testing.assert_close(compiled.sequential(x), model(x))
    folder = compiled.save(tmp_path / "a")
    if whole:
        assert pnn.load(folder).verify().ok
    else:
        with pytest.raises(pnn.PnnError, match=r"cannot store all of it .*clipped"):
            pnn.load(folder)
