"""Layers that are called by their functions compute what their modules do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils.parametrize import register_parametrization

from passes.ir.direct_call import DirectCaller


class Many(nn.Module):
    """Layers of every kind that is called directly, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3, padding=1)
        self.line_norm = nn.BatchNorm1d(4)
        self.plane = nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False)
        self.plane_norm = nn.BatchNorm2d(4, affine=False)
        self.relu = nn.ReLU(inplace=True)
        self.groups = nn.GroupNorm(2, 4)
        self.space = nn.Conv3d(4, 2, 1, dilation=2)
        self.space_norm = nn.BatchNorm3d(2)
        self.mixed = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8, bias=False)])
        self.gelu = nn.GELU(approximate="tanh")
        self.around = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
        self.average = nn.BatchNorm1d(2, momentum=None)
        self.tanh = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.line_norm(self.line(x)).unsqueeze(2)
        x = self.groups(self.relu(self.plane_norm(self.plane(x)))).unsqueeze(2)
        x = self.space_norm(self.space(x)).flatten(2)
        x = self.relu(self.mixed[1](self.mixed[0](x)))
        return self.tanh(self.average(self.around(self.gelu(x))) + self.mixed[0](x))


def _traced(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def _step(
    module: nn.Module, run: object, x: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None], dict[str, torch.Tensor]]:
    assert callable(run)
    y = run(x)
    y.square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    return y, gradients, dict(module.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_same_to_the_bit(training: bool) -> None:
    module = _traced(Many()).train(training)
    other = copy.deepcopy(module)
    x = torch.randn(5, 3, 8)
    for _ in range(2):
        expected = _step(module, module, x)
        actual = _step(other, DirectCaller(other), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_calls_of_plain_layers_pass_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    run = DirectCaller(_traced(Many()))
    called: list[str] = []
    plain = nn.Module._call_impl

    def counted(self: nn.Module, *args: object, **kwargs: object) -> object:
        called.append(type(self).__name__)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counted)
    run(torch.randn(5, 3, 8))
    assert called == ["Conv1d", "BatchNorm1d", "Tanh"]  # the circular one, and no momentum


def test_a_hook_is_called() -> None:
    module = _traced(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    run, observed = DirectCaller(module), []
    handle = module.get_submodule("0").register_forward_hook(lambda *_: observed.append("layer"))
    run(torch.ones(1, 4))
    handle.remove()
    run(torch.ones(1, 4))
    with nn.modules.module.register_module_forward_hook(lambda *_: observed.append("any")):
        run(torch.ones(1, 4))
    module.register_forward_pre_hook(lambda *_: observed.append("module"))
    run(torch.ones(1, 4))
    assert observed == ["layer", "any", "any", "any", "module"]


class Block(nn.Module):
    """Layers on a path of several names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x))


def _frozen_weight(layer: Any) -> None:
    weight = layer.weight.detach() * 2
    del layer.weight
    layer.register_buffer("weight", weight)


def _without_statistics(norm: Any) -> None:
    norm.running_mean = norm.running_var = None


def _edited(module: fx.GraphModule) -> None:
    out = module.graph.output_node()
    with module.graph.inserting_before(out):
        out.args = (module.graph.call_function(torch.neg, (out.args[0],)),)
    module.recompile()


CHANGES: dict[str, Callable[[Any], object]] = {
    "another weight": lambda m: setattr(m.last, "weight", nn.Parameter(torch.ones(4, 4))),
    "another layer": lambda m: setattr(m, "last", nn.Linear(4, 4)),
    "another container": lambda m: setattr(m, "body", Block().body),
    "evaluation": lambda m: m.eval(),
    "a parametrization": lambda m: register_parametrization(m.last, "weight", nn.Tanh()),
    "a hook that changes the output": lambda m: m.last.register_forward_hook(lambda *_: _[2] * 2),
    "an overridden forward": lambda m: setattr(m.last, "forward", torch.neg),
    "an overridden convolution": lambda m: setattr(
        m.get_submodule("body.0"), "_conv_forward", lambda x, *_: -x
    ),
    "a forward of the module": lambda m: setattr(m, "forward", torch.neg),
    "an edited graph": _edited,
    "a weight that is a buffer": lambda m: _frozen_weight(m.last),
    "another padding": lambda m: setattr(m.get_submodule("body.0"), "padding_mode", "circular"),
    "no statistics": lambda m: _without_statistics(m.eval().get_submodule("body.1")),
    "no statistics from now on": lambda m: setattr(
        m.get_submodule("body.1"), "track_running_stats", False
    ),
    "no count": lambda m: setattr(m.get_submodule("body.1"), "num_batches_tracked", None),
    "an average of all": lambda m: setattr(m.get_submodule("body.1"), "momentum", None),
    "another epsilon": lambda m: setattr(m.get_submodule("body.1"), "eps", 1.0),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_is_seen(change: str, before: bool) -> None:
    module = _traced(Block())
    plain, x = copy.deepcopy(module), torch.randn(3, 3, 4, 4)
    if before:
        CHANGES[change](module)
    run = DirectCaller(module)
    if not before:
        CHANGES[change](module)
    state = copy.deepcopy(module.state_dict())
    expected = module(x), copy.deepcopy(module.state_dict())
    module.load_state_dict(state)
    actual = run(x), module.state_dict()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    only_later = ("no count", "an average of all", "no statistics", "no statistics from now on")
    assert change in only_later or not torch.equal(actual[0], plain(x))


def test_a_patched_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _traced(Block()).eval()
    run = DirectCaller(module)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: -x)
    x = torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(run(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_calls_its_own_layers(copied: Callable[[DirectCaller], DirectCaller]) -> None:
    module = _traced(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    run, x = DirectCaller(module), torch.randn(3, 4)
    other, expected = copied(run), module(x)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    module.get_submodule("0").bias = nn.Parameter(torch.full((4,), 9.0))
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    assert not torch.equal(run(x), expected)


def test_inputs_of_other_dimensions_are_refused_as_by_the_layer() -> None:
    run = DirectCaller(_traced(nn.Sequential(nn.BatchNorm2d(4))))
    with pytest.raises(ValueError, match="expected 4D input"):
        run(torch.ones(3, 4, 4))


def test_subclasses_and_patched_layers_are_called_as_they_are() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.doubled, self.patched, self.named = Doubled(4, 4), nn.ReLU(), nn.ReLU()
            self.patched.forward = torch.neg  # type: ignore[method-assign]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.named(input=self.patched(self.doubled(x)))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = Model()
    module = fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(3, 4)
    torch.testing.assert_close(DirectCaller(module)(x), module(x), rtol=0, atol=0)
    assert bool((module(x) != 0).any())


def test_a_single_value_is_refused_as_by_the_layer() -> None:
    run = DirectCaller(_traced(nn.Sequential(nn.BatchNorm1d(4))).train())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(torch.ones(1, 4))
