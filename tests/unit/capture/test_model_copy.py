"""A copy computes and trains as its model does, and has no tensor of it."""

from __future__ import annotations

import copy
import functools
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.capture.ladder import capture
from passes.capture.model_copy import copy_model
from passes.errors import CaptureError
from tests.models.builders import linear_chain, residual_chain

X = torch.linspace(-1, 1, 12).view(3, 4)
DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute")
"""For models that torch.compile runs, which looks at gradients of everything."""


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of one step by name; the network has none before and after."""
    network.zero_grad()
    network(X).square().sum().backward()
    result = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    return result


def assert_trains_alike(model: nn.Module) -> Any:
    """Hold a copy and a captured graph against the model; return the copy."""
    copied, module = copy_model(model), capture(model, (X,)).module
    reference = gradients(model)
    for network in (copied, module):
        torch.testing.assert_close(network(X), model(X))
        for name, gradient in gradients(network).items():
            torch.testing.assert_close(gradient, reference[name], msg=name)
        assert all(parameter.grad is None for parameter in model.parameters())
    return copied


# --- tensors --------------------------------------------------------------------------------------


def tied(view: Callable[[Tensor], Tensor]) -> Any:
    model: Any = linear_chain(3, 4)
    model[2].weight.data = view(model[0].weight.data)
    return model


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.t(), lambda w: w.flip(0).flip(0)])
def test_parameters_over_one_memory_stay_over_one_memory(view: Callable[[Tensor], Tensor]) -> None:
    model = tied(view)
    copied = assert_trains_alike(model)
    with torch.no_grad():
        for network in (model, copied):
            network[0].weight.fill_(2.0)
    torch.testing.assert_close(copied[2].weight, model[2].weight)


def test_slices_of_one_buffer_stay_slices_of_it() -> None:
    model: Any = linear_chain(2, 4)
    flat = torch.zeros(32)
    for index in (0, 1):
        part = flat[index * 16 :][:16].view(4, 4)
        model[index].weight.data = part.copy_(model[index].weight.data)
    copied = assert_trains_alike(model)
    assert copied[0].weight.untyped_storage()._cdata == copied[1].weight.untyped_storage()._cdata


def test_hooks_on_gradients_and_attributes_of_parameters_are_copied() -> None:
    model: Any = linear_chain(3, 4)
    mask, calls, weight = torch.eye(4), list[Tensor](), model[1].weight
    weight.register_hook(lambda gradient: gradient * mask)
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter))
    weight.group = "slow"
    copied = assert_trains_alike(model)
    calls.clear()
    gradient = gradients(copied)["1.weight"]
    assert gradient is not None
    assert not (gradient * (1 - mask)).any()
    assert calls == [copied[1].weight]
    assert copied[1].weight.group == "slow"


def test_a_weight_norm_that_ran_before_is_copied() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(*(nn.utils.weight_norm(layer) for layer in linear_chain(3, 4)))
    model(X).sum().backward()
    model.zero_grad()
    assert_trains_alike(model)


class Cached(nn.Module):
    """Computes a table in evaluation mode once, and drops it in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(4))
        self.table: Tensor | None = None

    def train(self, mode: bool = True) -> Cached:
        if mode:
            self.table = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.bias.flip(0)
        if self.table is None:
            self.table = self.bias.flip(0)
        return x + self.table


@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_that_train_drops_is_no_constant_of_the_network(grad: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Cached(), nn.Linear(4, 4)).eval()
    with torch.set_grad_enabled(grad):
        model(X)
    table = model[1].table
    module = capture(model, (X,)).module.eval()
    assert model[1].table is table
    with torch.no_grad():
        module.get_parameter("1.bias").fill_(3.0)
        model.train().get_parameter("1.bias").fill_(3.0)
        torch.testing.assert_close(module(X), model.eval()(X))


# --- code that holds a part of the model ----------------------------------------------------------


def closure(layer: nn.Module) -> Any:
    original = layer.forward
    return lambda x: 2 * original(x)


def default(layer: Any) -> Any:
    return lambda x, layer=layer: nn.functional.linear(x, layer.weight) * 2


def partial(layer: nn.Module) -> Any:
    return functools.partial(lambda layer, x: 2 * nn.Linear.forward(layer, x), layer)


def method(layer: nn.Module) -> Any:
    original = layer.forward
    return types.MethodType(lambda self, x: self.weight.sum() * original(x), layer)


def compiled(layer: nn.Module) -> Any:
    return torch.compile(layer.forward, backend="eager")


@DYNAMO
@pytest.mark.parametrize("replace", [closure, default, partial, method, compiled])
def test_a_replaced_forward_calls_the_copy(replace: Callable[[nn.Module], Any]) -> None:
    model = linear_chain(3, 4)
    model[1].forward = replace(model[1])
    assert_trains_alike(model)


GLOBAL: dict[str, Any] = {}


def test_a_replaced_forward_may_reach_the_model_by_a_global_name() -> None:
    model = linear_chain(3, 4)
    GLOBAL["layer"] = model[2]
    model[1].forward = lambda x: nn.functional.linear(x, GLOBAL["layer"].weight)
    assert_trains_alike(model)


class ReadsGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ GLOBAL["layer"].weight


def test_a_class_that_reads_the_model_by_a_global_name_is_refused() -> None:
    model = nn.Sequential(*linear_chain(3, 4), ReadsGlobal())
    GLOBAL["layer"] = model[1]
    with pytest.raises(CaptureError, match=r"forward reads 1\.weight of the model that was passed"):
        capture(model, (X,))


class Itself(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Itself:
        return self


def test_a_part_that_copies_itself_to_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Itself(4, 4))
    with pytest.raises(CaptureError, match="1 of the copy still is the model's own Itself"):
        capture(model, (X,))


class Collector:
    """Collects what a layer returns."""

    def __init__(self, layer: nn.Module) -> None:
        self.outputs: list[Tensor] = []
        layer.register_forward_hook(self.collect)

    def collect(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.outputs.append(output)


def test_a_hook_of_a_layer_collects_where_the_user_looks() -> None:
    model = linear_chain(3, 4)
    collector = Collector(model[1])
    module = capture(model, (X,)).module
    collector.outputs.clear()
    module(X)
    assert len(collector.outputs) == 1


# --- what cannot be copied, and what need not be --------------------------------------------------


def test_locks_modules_of_python_and_references_are_no_obstacle() -> None:
    model: Any = residual_chain(2, 4)
    model.lock, model.condition = threading.Lock(), threading.Condition()
    model.functions, model.first = torch.nn.functional, weakref.ref(model[0])
    copied = assert_trains_alike(model)
    assert copied.lock is model.lock
    assert copied.first() is copied[0]


def test_a_message_names_what_cannot_be_copied() -> None:
    model: Any = residual_chain(2, 4)
    model[1].numbers = (number for number in range(3))
    with pytest.raises(CaptureError, match=r"attribute 1\.numbers is a generator"):
        copy_model(model)


def test_a_model_without_values_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"0\.weight of a LazyLinear has no values yet: call"):
        capture(model, (X,))
    model(X)
    assert_trains_alike(model)


# --- wrappers -------------------------------------------------------------------------------------


@DYNAMO
@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "dp"]
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_wrapped_model_is_captured_under_its_names(wrap: Any, inside: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), wrap(residual_chain(2, 4)))
    model = model if inside else wrap(residual_chain(2, 4))
    program = capture(model, (X,))
    assert program.module.state_dict().keys() == model.state_dict().keys()
    assert program.name == "Sequential"
    torch.testing.assert_close(program.module(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_torchscript_is_refused_with_what_to_pass_instead(inside: bool) -> None:
    script: nn.Module = torch.jit.script(linear_chain(2, 4))
    model = nn.Sequential(nn.Linear(4, 4), script) if inside else script
    place = "1" if inside else "the model"
    with pytest.raises(CaptureError, match=f"{place} is a TorchScript module .*: pass the module"):
        capture(model, (X,))


# --- a model's own methods ------------------------------------------------------------------------


class Overrides(nn.Module):
    """Overrides what torch calls on the root of a model, and returns less."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residual_chain(2, 4)

    def parameters(self) -> Any:  # type: ignore[override]
        return []

    def named_parameters(self) -> Any:  # type: ignore[override]
        return []

    def modules(self) -> Any:  # type: ignore[override]
        return []

    def train(self, mode: bool = True) -> Any:
        super().train(mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("body"), name)

    def __call__(self, batch: Tensor) -> Any:
        return 2 * super().__call__(batch, 3.0)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return scale * self.body(x)


@pytest.mark.parametrize("inside", [False, True])
def test_methods_that_a_model_overrides_hold_at_the_root_as_inside(inside: bool) -> None:
    model: Any = nn.Sequential(Overrides()) if inside else Overrides()
    program = capture(model, (X,))
    assert set(program.module.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(program.module(X), model(X))


def test_modules_of_tensors_and_plain_values_are_rebuilt_as_a_deep_copy_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.shared, self.none = nn.BatchNorm1d(4), shared, None
            self.register_module("absent", None)
            self.sizes = (2, 3)

    shared = nn.Linear(4, 4)
    model = nn.Sequential(Block(), nn.Sequential(Block(), nn.ReLU()))
    expected = copy.deepcopy(model)
    rebuilt: list[object] = []
    monkeypatch.setattr(copy, "_reconstruct", lambda x, *_: rebuilt.append(x))
    copied = copy_model(model)
    assert not rebuilt

    for (path, ours), (other, theirs) in zip(
        copied.named_modules(remove_duplicate=False),
        expected.named_modules(remove_duplicate=False),
        strict=True,
    ):
        assert path == other
        assert type(ours) is type(theirs)
        assert [*vars(ours)] == [*vars(theirs)]
        assert repr(ours) == repr(theirs)
        assert {type(value) for value in vars(ours).values()} == {
            type(value) for value in vars(theirs).values()
        }
    first, second = (copied.get_submodule(path) for path in ("0", "1.0"))
    assert first.shared is second.shared
    for one, other in zip(copied.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    first.register_forward_hook(print)
    assert not model[0]._forward_hooks
