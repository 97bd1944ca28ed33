"""What a graph file can hold: modules, functions, methods and values, and what it refuses."""

import json
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from passes.capture.refold import Attention
from passes.errors import ArtifactError
from pnn_compile.artifact.functions import check_method, function, function_name
from pnn_compile.artifact.modules import ModuleWriter, build
from pnn_compile.artifact.values import UnsupportedError, decode, encode

MODULES: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(3, 4, bias=False),
    lambda: nn.Bilinear(3, 4, 5),
    lambda: nn.Conv1d(2, 4, 3, padding="same", dilation=2),
    lambda: nn.Conv2d(4, 8, (3, 1), stride=2, groups=2, bias=False, padding_mode="reflect"),
    lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1),
    lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=None),
    lambda: nn.BatchNorm1d(4, affine=False),
    lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.LayerNorm((3, 4), bias=False),
    lambda: nn.LayerNorm(4, elementwise_affine=False),
    lambda: nn.RMSNorm(4),
    lambda: nn.Embedding(10, 4, padding_idx=-1, max_norm=2.0),
    lambda: nn.EmbeddingBag(10, 4, mode="max"),
    lambda: nn.RNN(3, 4, nonlinearity="relu"),
    lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, dropout=0.1),
    lambda: nn.GRU(3, 4, batch_first=True, bias=False),
    lambda: nn.LSTMCell(3, 4, bias=False),
    lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
    lambda: nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True, kdim=4, vdim=6),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, "gelu", batch_first=True, bias=False),
    lambda: nn.TransformerDecoderLayer(8, 2, 16, norm_first=True, layer_norm_eps=1e-3),
    lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], 2.0, head_bias=True),
    lambda: nn.PReLU(3, init=0.1),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.GELU("tanh"),
    lambda: nn.Hardtanh(-2.0, 2.0),
    lambda: nn.Threshold(0.1, 20.0),
    lambda: nn.Softmax(dim=-1),
    lambda: nn.Dropout2d(0.3),
    lambda: nn.MaxPool2d(3, 2, ceil_mode=True, return_indices=True),
    lambda: nn.AvgPool2d(2, count_include_pad=False, divisor_override=3),
    lambda: nn.AdaptiveAvgPool2d((None, 5)),
    lambda: nn.FractionalMaxPool2d(2, output_ratio=(0.5, 0.5)),
    lambda: nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True),
    lambda: nn.UpsamplingNearest2d(size=4),
    lambda: nn.ConstantPad1d((1, 2), 3.5),
    lambda: nn.ReflectionPad2d(1),
    lambda: nn.Flatten(0, 1),
    lambda: nn.Unflatten(1, (2, 3)),
    lambda: nn.PixelShuffle(2),
    lambda: nn.Fold((4, 5), 2),
    lambda: nn.CosineSimilarity(dim=0),
    lambda: nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
    lambda: nn.Identity(),
    lambda: Attention(0.5, is_causal=True),
)


@pytest.mark.parametrize("make", MODULES, ids=lambda make: repr(make())[:40])
def test_modules_are_built_again_from_their_attributes(make: Callable[[], nn.Module]) -> None:
    module = make()
    data = json.loads(json.dumps(ModuleWriter().write(module)))
    again = build(data["class"], data["arguments"])
    assert repr(again) == repr(module)
    assert [p.shape for p in again.parameters()] == [p.shape for p in module.parameters()]
    assert all(p.is_meta for p in again.parameters())


def test_a_parametrized_attention_is_built_with_its_own_arguments() -> None:
    """Arguments that are not attributes are found for the class before it was parametrized."""
    module = parametrizations.weight_norm(nn.MultiheadAttention(8, 2, bias=False), "in_proj_weight")
    data = json.loads(json.dumps(ModuleWriter().write(module)))
    again = build(data["class"], data["arguments"], data["parametrizations"])
    assert again.state_dict().keys() == module.state_dict().keys()


class Mine(nn.Linear):
    pass


def mirrored(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


def hooked() -> nn.Module:
    module = nn.MultiheadAttention(8, 2)
    module.out_proj.register_forward_hook(lambda *_: None)
    return module


def overridden() -> nn.Module:
    module = nn.ReLU()
    module.forward = torch.tanh  # type: ignore[method-assign]
    return module


def changed() -> nn.Module:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.zeros(4, 5))
    return module


def shadowed() -> nn.Module:
    module = nn.Conv2d(3, 4, 3)
    module._conv_forward = lambda x, *_: x  # type: ignore[method-assign]
    return module


def mentioned() -> nn.Module:
    module = nn.TransformerEncoderLayer(8, 2)
    del module.activation_relu_or_gelu
    return module


def test_notes_on_a_layer_are_no_part_of_it() -> None:
    plain, noted = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    for module in noted.modules():
        module._is_initialized, module.label, module.scale = True, "a", torch.ones(4)  # type: ignore[assignment]
    assert ModuleWriter().write(noted) == ModuleWriter().write(plain)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Mine(3, 4), "Mine"),
        (hooked, "a hook of out_proj"),
        (overridden, "attribute 'forward' differs"),
        (changed, "other parameters, buffers or shapes"),
        (shadowed, "attribute '_conv_forward' differs"),
        (mentioned, "attribute 'activation_relu_or_gelu' differs"),
        (lambda: nn.Sequential(nn.ReLU()), "Sequential"),
        (lambda: nn.CrossEntropyLoss(torch.ones(3)), "argument 'weight'"),
        (lambda: nn.TransformerEncoderLayer(8, 2, activation=F.silu), "TransformerEncoderLayer"),
        (lambda: mirrored(nn.Linear(3, 4)), "parametrization torch.nn.modules.linear.Identity"),
        (lambda: nn.TripletMarginWithDistanceLoss(), "distance_function"),
    ],
)
def test_modules_without_a_form_are_named(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        ModuleWriter().write(make())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("torch.nn.Linear", {"in_features": 3, "out_features": 4, "device": "cpu"}, "'device'"),
        ("torch.nn.Linear", {"in_features": 3}, "cannot be built"),
        ("torch.nn.Sequential", {}, "not among"),
        ("torch.nn.LazyLinear", {"out_features": 3}, "not among"),
        ("subprocess.Popen", {"args": "true"}, "not among"),
    ],
)
def test_modules_outside_the_list_are_not_built(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        build(name, arguments)


@pytest.mark.parametrize(
    "target",
    [
        F.gelu, F.max_pool2d, F.scaled_dot_product_attention, F.interpolate, torch.cat, torch.relu,
        torch.einsum, torch.split, torch.unique, torch.linalg.norm, torch.fft.rfft, torch.arange,
        torch.zeros_like, torch.special.expit, torch._assert, operator.getitem, operator.iadd,
        getattr, torch.ops.aten.add.Tensor, torch.ops.aten.sym_size.int,
        torch.ops.aten.relu.default, torch.ops.aten.__and__.Tensor,
        torch.ops.aten._to_copy.default,
    ],
)  # fmt: skip
def test_functions_are_found_again_by_name(target: Any) -> None:
    assert function(function_name(target)) is target


@pytest.mark.parametrize(
    "target",
    [
        print, eval, torch.load, torch.save, torch.compile, torch.from_file, operator.methodcaller,
        torch.ops.aten.from_file.default, torch.ops.aten._print.default, torch.nn.init.normal_,
        torch.ops.aten.record_stream.default, lambda x: x, torch.ops.aten.set_.source_Storage,
    ],
)  # fmt: skip
def test_functions_outside_the_list_have_no_name(target: Any) -> None:
    with pytest.raises(UnsupportedError):
        function_name(target)


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval", "os.system", "torch.load", "torch.nn.functional.__builtins__", "torch",
        "torch.ops.aten.save.default", "torch.ops.aten.from_file.default", "operator.attrgetter",
        "torch.ops.aten.__class__.mro", "torch.ops.prim.Print.default", "torch.overrides", "",
    ],
)  # fmt: skip
def test_names_outside_the_list_are_not_resolved(name: str) -> None:
    with pytest.raises(ArtifactError, match="not among"):
        function(name)


@pytest.mark.parametrize("name", ["view", "add_", "to", "size", "unflatten", "expand_as"])
def test_methods_of_tensors_may_be_called(name: str) -> None:
    assert check_method(name) == name


@pytest.mark.parametrize(
    "name", ["__class__", "apply_", "map_", "data_ptr", "numpy", "set_", "storage", "grad", "nope"]
)
def test_methods_outside_the_list_may_not_be_called(name: str) -> None:
    with pytest.raises(UnsupportedError):
        check_method(name)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -0.0, 1e300, float("inf"), "it's", 1 + 2j, complex(float("inf"), 1),
        [1, (2, [3])], (), {"a": [1], 2: (None,)}, slice(None, -1, 2), Ellipsis, torch.float16,
        torch.channels_last, torch.strided, torch.device("cuda", 1), torch.Size([2, 3]),
        (slice(0, None), None, Ellipsis),
    ],
)  # fmt: skip
def test_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("value", [object(), print, torch.ones(1), torch.Generator(), {1, 2}])
def test_values_without_a_form_are_named(value: Any) -> None:
    with pytest.raises(UnsupportedError, match=type(value).__name__):
        encode(value)


@pytest.mark.parametrize(
    "data", [{"node": "x"}, {"dtype": "load"}, {"what": 1}, {}, {"float": "1e5"}, {"a": 1, "b": 2}]
)
def test_malformed_values_are_refused(data: Any) -> None:
    with pytest.raises(ArtifactError):
        decode(data, {}, {})
