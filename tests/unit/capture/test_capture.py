from __future__ import annotations

import copy
import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from passes.capture.ladder import capture
from passes.errors import CaptureError
from passes.ir.program import Program, provenance, storage_id
from tests.models.builders import Exported, Table, linear_chain
from tests.models.topologies import WIDTH, tied_linear
from tests.models.zoo import CAPTURABLE, by_name, with_tag
from tests.support.parity import assert_same_step, step
from tests.support.programs import call, node, program

FX, EXPORT = "torch.fx trace", "torch.export"
EXPORTED = tuple(case.name for case in with_tag("export"))
RUNGS = {"fx": FX, "export": EXPORT}


# --- every model of the zoo -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CAPTURABLE)
def test_the_graph_equals_the_model_at_a_batch_size_that_capture_did_not_see(name: str) -> None:
    case, captured, inputs = by_name(name), program(name), call(name, 7)
    model = case.build()
    for train in (True, False):
        expected = step(model, case.args(7), case.kwargs(7), train=train)
        actual = step(captured.module, (), inputs, train=train)
        assert_same_step(actual, expected)
    assert captured.capture.rung == next(RUNGS[tag] for tag in RUNGS if tag in case.tags)
    assert captured.dynamic == ("batch",)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_the_state_dict_is_the_models(name: str) -> None:
    state, captured = by_name(name).build().state_dict(), program(name)
    merged = {**captured.module.state_dict(), **captured.unused}

    assert merged.keys() == state.keys()
    assert not captured.module.state_dict().keys() & captured.unused.keys()
    for key, value in state.items():
        assert torch.equal(merged[key], value), key


@pytest.mark.parametrize("name", CAPTURABLE)
def test_the_users_model_is_left_as_it_was(name: str) -> None:
    case = by_name(name)
    model = case.build()
    next(iter(model.children())).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(model.state_dict())
    modes = {path: module.training for path, module in model.named_modules()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    args, kwargs = case.args(2), case.kwargs(2)
    inputs = copy.deepcopy((args, kwargs))
    random = torch.get_rng_state()
    captured = capture(model, args, kwargs)

    assert {path: module.training for path, module in model.named_modules()} == modes
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(map(torch.equal, pytree.tree_leaves(inputs), pytree.tree_leaves((args, kwargs))))
    assert torch.equal(torch.get_rng_state(), random)
    of_model, of_graph = (
        {storage_id(t) for t in (*m.parameters(), *m.buffers()) if t.numel()}
        for m in (model, captured.module)
    )
    assert not of_model & of_graph


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "data_branch",
            r"in DataBranch \(DataBranch\) at .*hard_models\.py:\d+\n  torch.export: .*Guard",
        ),
        (
            "data_branch",
            r"torch.export: .* in DataBranch \(DataBranch\) at .*hard_models\.py:\d+\n",
        ),
        ("data_branch", r"kept whole: no submodule alone stands in the way\ncompile the submodule"),
    ],
)
def test_what_cannot_be_captured_is_refused_with_the_place(name: str, message: str) -> None:
    case = by_name(name)
    with pytest.raises(CaptureError, match=message):
        capture(case.build(), case.args(2), case.kwargs(2))


def test_a_refusal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    case = by_name("data_branch")
    with pytest.raises(CaptureError):
        capture(case.build(), case.args(2))

    assert capfd.readouterr() == ("", "")


def test_the_graph_keeps_counting_where_the_model_does() -> None:
    case = by_name("step_counter")
    model, module = case.build(), copy.deepcopy(program("step_counter").module)
    (x,) = case.args(2)
    for _ in range(3):
        torch.testing.assert_close(module(x), model(x))
    assert module.state_dict()["6.steps"] == 3


@pytest.mark.parametrize("name", EXPORTED)
def test_an_example_of_one_sample_does_not_fix_the_batch(name: str) -> None:
    case = by_name(name)
    model = case.build().eval()
    captured = capture(model, case.args(1), case.kwargs(1))

    assert captured.dynamic == ("batch",)
    torch.testing.assert_close(captured.module.eval()(*case.args(5)), model(*case.args(5)))


# --- modes, randomness, writes --------------------------------------------------------------------


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.dropout(self.linear(x), 0.5, self.training))


class AttentionDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).unflatten(-1, (2, 4))
        p = 0.5 if self.training else 0.0
        return F.scaled_dot_product_attention(y, y, y, is_causal=True, dropout_p=p)


class InPlaceInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.add_(1.0)) + x


@pytest.mark.parametrize(
    ("build", "rung"),
    [
        (FunctionalDropout, FX),
        (lambda: Exported(FunctionalDropout()), EXPORT),
        (AttentionDropout, FX),
        (lambda: Exported(AttentionDropout()), EXPORT),
        (InPlaceInput, FX),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_both_modes_are_in_the_graph_whatever_the_models_mode_was(
    build: Callable[[], nn.Module], rung: str, training: bool
) -> None:
    model = build().train(training)
    captured = capture(model, (torch.randn(2, 5, 8),))

    assert captured.capture.rung == rung
    assert all(module.training == training for module in captured.module.modules())
    x = torch.randn(3, 5, 8)
    for train in (True, False, True):
        expected = step(model, (x,), train=train)
        assert_same_step(step(captured.module, (x,), train=train), expected)


def test_a_module_that_stays_in_evaluation_mode_does_so_in_the_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()
    module = capture(model, (torch.randn(3, 4),)).module

    assert [module.get_submodule(str(i)).training for i in range(3)] == [True, False, True]


def test_a_buffer_that_both_front_ends_lose_is_never_lost_silently() -> None:
    class Replaces(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = torch.cat([self.calls, x[:1, 0]])
            return self.linear(x)

    with pytest.raises(CaptureError) as caught:
        capture(Replaces(), (torch.randn(2, 4),))
    assert str(caught.value).count("the step does not change buffer calls") == 1


def test_a_failed_front_end_leaves_nothing_behind() -> None:
    class Caches(nn.Linear):
        sizes: dict[str, Any]

        def forward(self, x: Tensor) -> Tensor:
            width = self.sizes.setdefault("width", x.shape[-1])
            return super().forward(x) if width < 100 else x

    model = Caches(8, 8)
    model.sizes = {}
    assert capture(model, (torch.randn(2, 8),)).capture.rung == EXPORT


# --- inputs and outputs ---------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, batch: dict[str, Any], flag: bool = True, *, gain: float = 2.0, extra: Any = None
    ) -> dict[str, Any]:
        y = self.linear(batch["images"]["x"]) + batch["list"][1]
        y = y * gain if flag else y
        return {"y": y if extra is None else (y, extra), "count": 3, "nothing": None}


def batch_of(size: int) -> dict[str, Any]:
    return {"images": {"x": torch.randn(size, 4)}, "list": [0.5, torch.randn(size, 4)]}


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    model = Nested()
    captured = capture(model, (batch_of(2),), {"extra": torch.ones(2)})
    other = batch_of(5)

    assert list(captured.args) == ["batch", "extra"]
    actual = captured.module(batch=other, extra=torch.zeros(5))
    torch.testing.assert_close(actual["y"], model(other, extra=torch.zeros(5))["y"])
    assert (actual["count"], actual["nothing"]) == (3, None)
    assert captured.capture.notes == (
        "argument \"batch['list'][0]\" is fixed at 0.5 and no longer taken",
    )


def test_constants_are_fixed_with_a_note() -> None:
    model = Nested()
    captured = capture(model, (batch_of(2), False), {"gain": 3.0})
    other = batch_of(5)

    torch.testing.assert_close(captured.module(other)["y"], model(other, False)["y"])
    assert captured.capture.notes[:2] == (
        "argument 'flag' is fixed at False and no longer taken",
        "argument 'gain' is fixed at 3.0 and no longer taken",
    )


def test_positional_and_keyword_arguments_may_be_of_any_kind() -> None:
    class AnyKind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, first: Tensor, /, *others: Tensor, **named: Tensor) -> Tensor:
            return self.linear(first * others[0]) + others[1] * named["last"]

    model = AnyKind()
    first, second, third, last = (torch.randn(2, 4) for _ in range(4))
    captured = capture(model, (first, second, third), {"last": last})

    assert list(captured.args) == ["first", "others_0", "others_1", "last"]
    torch.testing.assert_close(
        captured.module(first, second, third, last), model(first, second, third, last=last)
    )


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(2, 3),), {}, r"Linear itself fails .*\(input \[2, 3\]\): RuntimeError: mat1"),
        ((torch.zeros(2, 4),), {"x": 1}, r"do not fit Linear\.forward\(input.*unexpected keyword"),
        ((), {}, r"do not fit Linear\.forward\(input.*missing a required argument"),
        ((3,), {}, r"the example inputs of Linear hold no tensor"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_its_own_failure(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(nn.Linear(4, 4), args, kwargs)


def test_an_example_without_samples_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"hold no sample \(input is \[0, 8\]\)"):
        capture(nn.Linear(8, 4), (torch.randn(0, 8),))


def test_a_model_that_refuses_another_batch_size_keeps_its_own() -> None:
    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.arange(2)[:, None]

    captured = capture(OneSize(), (torch.randn(2, 4),))

    assert not captured.dynamic
    assert captured.capture.notes[0].startswith("batch size fixed: the model refuses another")
    assert not capture(nn.Linear(4, 4), (torch.randn(2, 4),), dynamic=()).dynamic


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(4, 4)
    model.generator = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(CaptureError, match="Linear cannot be copied: attribute generator is a "):
        capture(model, (torch.zeros(2, 4),))


# --- what the program tells -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rung", "at", "path", "line"),
    [
        ("unet", FX, "down_0_0", "down.0.0", "x = down(x)"),
        ("unet", FX, "cat_1", "", "x = up(torch.cat((skips.pop(), x), dim=1))"),
        ("resnet", FX, "add", "1", ""),
        ("mlp", FX, "_3", "3", None),
        ("mlp", FX, "input_1", "", None),
        ("slice_assignment", EXPORT, "layers_3", "layers.3", "x = layer(torch.tanh(x))"),
        ("slice_assignment", EXPORT, "fill__2", "", "x[:, :2] = 1.0"),
        ("step_counter", FX, "add__1", "1", "self.steps.add_(1)"),
        ("container_transformer", EXPORT, "_1_layers_0_norm1", "1.layers.0.norm1", None),
    ],
)
def test_a_node_knows_its_module_and_its_line(
    name: str, rung: str, at: str, path: str, line: str | None
) -> None:
    captured = program(name)
    record = provenance(node(captured, at))

    assert captured.capture.rung == rung
    assert record.path == path
    if line is None:
        assert record.source == ""
    else:
        filename, _, number = record.source.rpartition(":")
        assert line in linecache.getline(filename, int(number))


def test_every_compute_node_of_the_users_own_code_has_a_line() -> None:
    for name in ("encoder_decoder", "slice_assignment", "step_counter", "unrolled_lstm"):
        captured = program(name)
        missing = [n.name for n in captured.order if "/tests/" not in provenance(n).source]
        assert [n for n in missing if not n.endswith("size")] == [], name


def test_tensors_outside_the_state_dict_stay_outside() -> None:
    class Plain(nn.Module):
        quiet: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.scale = torch.full((8,), 2.0)
            self.register_buffer("quiet", torch.ones(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale + self.quiet

    for model, rung, prefix in ((Plain(), FX, ""), (Exported(Plain()), EXPORT, "body.")):
        captured = capture(model, (torch.randn(2, 8),))
        assert captured.capture.rung == rung
        keys = [f"{prefix}linear.weight", f"{prefix}linear.bias"]
        assert list(captured.module.state_dict()) == keys


def test_a_tied_parameter_stays_one() -> None:
    exported = capture(Exported(tied_linear()), (torch.randn(2, WIDTH),))
    assert exported.capture.rung == EXPORT
    for captured, first, second in (
        (exported, "body.2.weight", "body.10.weight"),
        (program("tied_linear"), "2.weight", "10.weight"),
    ):
        get = captured.module.get_parameter
        assert get(first) is get(second)


def test_the_fingerprint_tells_structures_apart_and_nothing_else() -> None:
    def chain(width: int, slope: float) -> Program:
        layers = nn.Sequential(nn.Linear(4, width), nn.LeakyReLU(slope), nn.Linear(width, 4))
        return capture(layers, (torch.randn(2, 4),))

    assert chain(5, 0.1).fingerprint == chain(5, 0.1).fingerprint
    assert len({chain(*kind).fingerprint for kind in ((5, 0.1), (6, 0.1), (5, 0.2))}) == 3


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_recurrent_layer_is_exported_without_a_warning(dynamic: bool) -> None:
    class Recurrent(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    model = Exported(Recurrent(8, 8, num_layers=2, batch_first=True))
    captured = capture(model, (torch.randn(2, 5, 8),), dynamic=("batch",) * dynamic)
    x = torch.randn(7 if dynamic else 2, 5, 8)

    assert captured.capture.rung == EXPORT
    for train in (True, False):
        assert_same_step(step(captured.module, (x,), train=train), step(model, (x,), train=train))


def test_what_follows_from_a_buffer_is_not_a_frozen_table() -> None:
    captured = capture(Table(linear_chain(4, 4), 4), (torch.randn(2, 4),))
    assert "table" in captured.module.state_dict()
    assert not captured.unused
    x = torch.randn(2, 4)
    before = captured.module(x)
    captured.module.get_buffer("table").zero_()
    assert not torch.equal(captured.module(x), before)


def test_operators_of_an_export_are_named_by_module_and_operator() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            width = 2 if x.shape[1] > 3 else 1  # a trace refuses this
            x = (x + self.layer(x)).view(x.shape[0], width, -1)
            return nn.functional.dropout(x.flatten(1) + 1, training=self.training)

    program = capture(nn.Sequential(Block(), Block()), (torch.randn(2, 4),))

    assert program.capture.rung == "torch.export"
    assert [node.name for node in program.order] == [
        "size",
        *("_0_layer", "_0_add", "_0_reshape", "_0_flatten", "_0_add_1", "_0_dropout_1"),
        *("_1_layer", "_1_add", "_1_reshape", "_1_flatten", "_1_add_1", "_1_dropout_1"),
    ]
