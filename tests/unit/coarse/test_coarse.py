from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from passes.coarse.convolution import (
    Conv,
    Convolution,
    convolution_fits,
    convolution_flops,
    fitting_width,
)
from passes.coarse.linear import Linear, LowRank, linear_flops
from passes.coarse.tensor_layout import layouts, resize
from passes.coarse.wrappers import Difference, PreprocessingOperator, Zero
from passes.errors import SynthesisError
from passes.ir.tensor_spec import TensorSpec
from passes.plan.schema import Plan
from tests.support.programs import compile_model, compiled, parts, program

SAMPLES = 2  # of every type below


def image(channels: int, *space: int) -> TensorSpec:
    return TensorSpec((SAMPLES, channels, *space), "float32", 0, 1)


def tokens(length: int, width: int) -> TensorSpec:
    return TensorSpec((SAMPLES, length, width), "float32", 0, 2)


def time_first(length: int, width: int) -> TensorSpec:
    return TensorSpec((length, SAMPLES, width), "float32", 1, 2)


def windows(count: int, length: int, width: int) -> TensorSpec:
    return TensorSpec((count * SAMPLES, length, width), "float32", 0, 2)


def flat(width: int) -> TensorSpec:
    return TensorSpec((SAMPLES, width), "float32", 0, 1)


ONE_NUMBER = TensorSpec((SAMPLES,), "float32", 0, 0)

size = st.integers(1, 5)
specs = st.one_of(
    st.builds(image, size, size),
    st.builds(image, size, size, size),
    st.builds(image, size, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.builds(tokens, size, size),
    st.builds(time_first, size, size),
    st.builds(windows, st.integers(2, 3), size, size),
    st.builds(flat, size),
    st.just(ONE_NUMBER),
)
states = st.lists(specs, min_size=1, max_size=2)


def shape_of(spec: TensorSpec, samples: int) -> tuple[int, ...]:
    """The shape that a type has with another number of samples."""
    return tuple(
        n * samples // SAMPLES if axis == spec.batch_axis else n
        for axis, n in enumerate(spec.shape)
    )


def draw(state: list[TensorSpec], samples: int) -> list[Tensor]:
    return [torch.randn(shape_of(spec, samples)) for spec in state]


def called(module: nn.Module, state: list[Tensor]) -> tuple[Tensor, ...]:
    result = module(*state)
    return result if isinstance(result, tuple) else (result,)


# --- what holds of every family on every pair of types --------------------------------------------


@given(states, states, st.sampled_from([1, SAMPLES, 5]))
def test_every_family_gives_the_leaving_types_at_every_batch_size(
    entering: list[TensorSpec], leaving: list[TensorSpec], samples: int
) -> None:
    state = draw(entering, samples)
    for module in (
        Linear(entering, leaving),
        Linear(entering, leaving, bias=True),
        LowRank(entering, leaving, rank=2),
        Conv(entering, leaving),
        Zero(entering, leaving),
    ):
        shapes = [tuple(y.shape) for y in called(module, state)]
        assert shapes == [shape_of(spec, samples) for spec in leaving]


@given(states, states, st.floats(-2, 2), st.floats(-2, 2))
def test_linear_is_linear_and_keeps_zero(
    entering: list[TensorSpec], leaving: list[TensorSpec], a: float, b: float
) -> None:
    module = Linear(entering, leaving)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x, y = draw(entering, 3), draw(entering, 3)
    mixed = called(module, [a * u + b * v for u, v in zip(x, y, strict=True)])
    apart = zip(called(module, x), called(module, y), strict=True)
    for got, (fx_, fy) in zip(mixed, apart, strict=True):
        torch.testing.assert_close(got, a * fx_ + b * fy, rtol=1e-4, atol=1e-4)
    assert all(not z.any() for z in called(module, [torch.zeros_like(u) for u in x]))


@given(states, states)
def test_the_flops_of_a_linear_map_are_known_before_it_is_built(
    entering: list[TensorSpec], leaving: list[TensorSpec]
) -> None:
    module, state = Linear(entering, leaving), draw(entering, SAMPLES)
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        module(*state)

    assert linear_flops(entering, leaving) == mode.get_total_flops()


@given(specs, specs)
def test_a_layout_and_its_inverse_cancel(source: TensorSpec, target: TensorSpec) -> None:
    for spec, layout in zip((source, target), layouts(source, target), strict=True):
        x = torch.randn(shape_of(spec, 3))
        inside = layout.enter(x)
        assert inside.shape[1:] == (layout.channels, *layout.space)
        assert torch.equal(layout.leave(inside), x)


@given(states)
def test_between_equal_types_the_initial_linear_map_is_the_identity(
    state: list[TensorSpec],
) -> None:
    for spec in state:
        (x,) = draw([spec], 3)
        assert torch.equal(Linear([spec], [spec])(x), x)


@given(states, states)
def test_zero_gives_zeros_that_follow_the_batch(
    entering: list[TensorSpec], leaving: list[TensorSpec]
) -> None:
    assert all(not y.any() for y in called(Zero(entering, leaving), draw(entering, 5)))


# --- what a linear map does to particular types ---------------------------------------------------


def test_an_image_is_pooled_before_its_channels_are_mixed() -> None:
    module = Linear([image(3, 4, 4)], [image(3, 2, 2)])
    x = torch.randn(1, 3, 4, 4)

    torch.testing.assert_close(module(x), nn.functional.avg_pool2d(x, 2))


def test_a_coarse_image_is_repeated() -> None:
    x = torch.randn(1, 3, 2, 2)
    module = Linear([image(3, 2, 2)], [image(3, 4, 4)])

    torch.testing.assert_close(module(x), nn.functional.interpolate(x, scale_factor=2.0))


def test_a_flat_state_is_the_image_pooled_or_unrolled() -> None:
    x = torch.randn(1, 3, 2, 2)

    torch.testing.assert_close(Linear([image(3, 2, 2)], [flat(3)])(x), x.mean((2, 3)))
    torch.testing.assert_close(Linear([image(3, 2, 2)], [flat(12)])(x), x.flatten(1))


def test_windows_and_images_of_one_network_agree_on_the_samples() -> None:
    module = Linear([windows(4, 3, 5)], [windows(4, 3, 5)])
    x = torch.randn(3 * 4, 3, 5)

    assert torch.equal(module(x), x)
    assert module(torch.zeros(12, 3, 5)).abs().sum() == 0
    pooled = Linear([windows(4, 3, 5)], [flat(5)])(x)
    torch.testing.assert_close(pooled, x.reshape(3, 12, 5).mean(1))


def test_time_first_is_mixed_over_its_last_axis() -> None:
    module = Linear([time_first(4, 3)], [tokens(4, 3)])
    x = torch.randn(4, SAMPLES, 3)

    torch.testing.assert_close(module(x), x.transpose(0, 1))


def test_double_precision_stays() -> None:
    spec = dataclasses.replace(flat(3), dtype="float64")
    for module in (Linear([spec], [spec]), LowRank([spec], [spec], 2), Conv([spec], [spec])):
        assert module(torch.randn(2, 3).double()).dtype is torch.float64


@pytest.mark.parametrize(
    ("shape", "space"), [((2, 3, 4), (2,)), ((2, 3, 4, 4), (2, 3)), ((2, 3, 4, 4), (6,)),
                         ((2, 3, 2, 2, 2, 2), (4,)), ((2, 3), (2, 2)), ((2, 3, 5), ())]
)  # fmt: skip
def test_resizing_keeps_a_constant(shape: tuple[int, ...], space: tuple[int, ...]) -> None:
    x = torch.ones(shape)

    assert torch.equal(resize(x, space), torch.ones(*shape[:2], *space))


# --- guesses by convolution -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (image(3, 8, 8), image(5, 8, 8)),
        (image(3, 8, 8), image(5, 4, 4)),
        (image(3, 8, 8), image(5, 1, 1)),
        (image(3, 7, 9), image(5, 3, 2)),
        (image(2, 24), image(8, 6)),
        (image(1, 4, 4, 4), image(2, 2, 4, 1)),
    ],
)
def test_a_convolution_reaches_the_states_resolution(
    source: TensorSpec, target: TensorSpec
) -> None:
    assert convolution_fits(source, target)
    module = Convolution([source], [target, target]).eval()
    x = torch.randn(shape_of(source, 3))
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        shapes = [tuple(y.shape) for y in module(x)]

    assert shapes == [shape_of(target, 3)] * 2
    if source.shape[2] % target.shape[2] == 0:
        estimate = convolution_flops(source, [target, target])
        assert mode.get_total_flops() == pytest.approx(estimate * 3 / SAMPLES)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (image(3, 4, 4), image(3, 8, 8)),  # finer
        (image(3, 8, 8), flat(3)),
        (tokens(4, 3), tokens(4, 3)),
        (image(3, 8, 8), image(3, 8)),
        (image(3, 8), TensorSpec((2 * SAMPLES, 3, 8), "float32", 0, 1)),  # folded
    ],
)
def test_a_convolution_does_not_fit_everything(source: TensorSpec, target: TensorSpec) -> None:
    assert not convolution_fits(source, target)


# --- forms ----------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A coarse network of two components with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(torch.tanh(self.norm(a) + b)), a * b


def test_the_difference_in_one_batch_is_the_difference_of_two_calls() -> None:
    inner = Pair().eval()
    x, r = [torch.randn(3, 4) for _ in range(2)], [torch.randn(3, 4) for _ in range(2)]
    joint, separate = (Difference(inner, 2, joint=joint)(*x, *r) for joint in (True, False))
    moved = inner(x[0] + r[0], x[1] + r[1])

    for index, still in enumerate(inner(*x)):
        torch.testing.assert_close(joint[index], moved[index] - still)
        torch.testing.assert_close(separate[index], moved[index] - still)


def test_one_batch_updates_statistics_once() -> None:
    inner = Pair().train()
    state = [torch.randn(3, 4) for _ in range(4)]
    Difference(inner, 2, joint=True)(*state)
    assert inner.norm.num_batches_tracked == 1
    Difference(inner, 2, joint=False)(*state)
    assert inner.norm.num_batches_tracked == 3


def test_a_difference_passes_its_inputs_to_both_calls() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return scale * x**2

    x, r, scale = (torch.randn(3) for _ in range(3))
    result = Difference(Scaled(), 1, joint=False)(x, r, scale)

    torch.testing.assert_close(result, scale * (x + r) ** 2 - scale * x**2)


def test_one_batch_is_not_taken_where_a_state_does_not_begin_with_the_batch() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x.transpose(0, 1)

    x = torch.randn(3, 5, 8)
    compilation = compile_model(
        TimeFirst(), x, cuts=("layers.3",), coarse="conv", correction="difference"
    )
    module = parts(compilation)[2].get_submodule("coarse_1")

    assert isinstance(module, Difference)
    assert not module._joint
    assert module(torch.randn(5, 3, 8), torch.randn(5, 3, 8)).shape == (5, 3, 8)


def test_a_guess_is_made_from_inputs_or_from_the_first_learned_value() -> None:
    operators = compiled("mlp", stages=2).operators
    assert operators is not None
    direct = operators.preprocess[1]
    assert isinstance(direct, PreprocessingOperator)
    assert direct.prologue is None
    operators = compiled("tied_language_model", stages=2).operators
    assert operators is not None
    learned = operators.preprocess[1]
    assert isinstance(learned, PreprocessingOperator)
    assert isinstance(learned.prologue, fx.GraphModule)
    weight = program("tied_language_model").module.get_parameter("embedding.weight")
    assert learned.prologue.get_parameter("embedding.weight") is weight


# --- the choice -----------------------------------------------------------------------------------


def plan_of(name: str, **options: object) -> Plan:
    plan = compiled(name, **options).plan
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("name", "options", "family", "why"),
    [
        (
            "resnet",
            {"stages": 2},
            "units",
            r"^repeating block found; gained 1.9 and 2.1 points in training from scratch",
        ),
        ("resnet", {"stages": 2, "coarse_width": 0.5}, "units", r"lost 0.4 and 0.6 points"),
        ("resnet", {"stages": 2, "coarse_width": 0.3}, "units", r"; accuracy not measured"),
        ("conv1d", {"stages": 2}, "units", r"^repeating block found; accuracy not measured"),
        ("vision_transformer", {"stages": 2}, "units", r"gained 2.0 points .* text decoder"),
        (
            "resnet",
            {"stages": 2, "coarse_budget": 0.05},
            "units",
            r"^repeating block found, of which narrow .*; within the budget \(.*; lost 1.1 and",
        ),
        (
            "resnet",
            {"stages": 2, "coarse_budget": 0.005},
            "linear",
            r"^units would take \d.* FLOPs of \d.*; .* the budget \(.*; lost 2.1 points",
        ),
        ("resnet", {"stages": 2, "coarse_budget": 0.9}, "units", r"repeating block found; within"),
        (
            "mlp",
            {"stages": 2, "coarse_budget": 0.05},
            "linear",
            r"OVER the budget \([\d,]+ of [\d,]+ FLOP",
        ),
        (
            "unet",
            {"cuts": ("middle.0",)},
            "layers",
            r"^the state has several components: copies of the last layers",
        ),
        (
            "mixer",
            {"stages": 3, "cut_inside_blocks": True},
            "layers",
            r"^the (stage is not made|state has several) .*: copies of the last layers",
        ),
        (
            "unet",
            {"cuts": ("middle.0",), "sweep": "collapsed"},
            "linear",
            r"^the state has several components; ",
        ),
        ("resnet", {"stages": 2, "sweep": "collapsed"}, "units", r"found; gained 0.9 points"),
        ("mlp", {"stages": 2, "coarse": "linear"}, "linear", r"^asked for$"),
        ("mlp", {"stages": 2, "coarse": "zero"}, "zero", r"^asked for$"),
        ("resnet", {"stages": 2, "coarse": "units"}, "units", r"^asked for; gained 1.9 and 2.1"),
        ("resnet", {"stages": 2, "coarse": "linear"}, "linear", r"^asked for; lost 2.1 points"),
        ("resnet", {"stages": 2, "prologue": 0.2}, "units", r"; accuracy not measured"),
        ("resnet", {"stages": 2, "preprocess": "linear"}, "units", r"; accuracy not measured"),
        ("resnet", {"stages": 2, "iterations": 2}, "units", r"; accuracy not measured"),
        ("mlp", {"stages": 2, "coarse": "exact"}, "exact", r"^the oracle$"),
    ],
)
def test_the_choice_says_why(name: str, options: dict[str, object], family: str, why: str) -> None:
    spec = plan_of(name, **options).stages[1].coarse
    assert spec is not None

    assert spec.family == family
    assert spec.linear == (family in ("linear", "zero"))
    assert re.search(why, spec.why)


@pytest.mark.parametrize(
    ("name", "family"),
    [("resnet", "convolution"), ("mlp", "linear"), ("unet", "convolution"), ("mixer", "linear"),
     ("conv1d", "convolution"), ("vision_transformer", "linear"), ("encoder_decoder", "linear")],
)  # fmt: skip
def test_images_are_guessed_by_convolutions_and_the_rest_by_linear_maps(
    name: str, family: str
) -> None:
    spec = plan_of(name, stages=2).stages[1].preprocess
    assert spec is not None

    assert spec.family == family
    assert spec.flops > 0
    assert spec.parameters > 0


def test_a_convolution_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        SynthesisError, match=r"preprocess='convolution' needs one image-like input"
    ):
        compiled("mlp", stages=2, preprocess="convolution")


def test_a_convolution_is_narrowed_to_its_budget() -> None:
    source, target = image(3, 64, 64), image(512, 4, 4)
    dense = convolution_flops(source, [target])
    width = fitting_width(source, [target], dense / 3)
    assert width == 128
    assert fitting_width(source, [target], dense) is None
    assert fitting_width(source, [target], 0.0) == 32

    module = Convolution([source], [target], width)
    x = torch.randn(shape_of(source, 3))
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        assert tuple(module(x).shape) == shape_of(target, 3)
    assert mode.get_total_flops() == pytest.approx(
        convolution_flops(source, [target], width) * 3 / SAMPLES
    )


def test_a_guess_takes_a_tenth_of_a_stage_or_is_as_narrow_as_can_be() -> None:
    layers = [nn.Conv2d(3, 256, 3, stride=8, padding=1)]
    layers += [nn.Conv2d(256, 256, 3, padding=1) for _ in range(6)]
    plan = compile_model(nn.Sequential(*layers), torch.randn(2, 3, 64, 64), stages=3).plan
    assert plan is not None
    stage = plan.stages[1]
    assert stage.preprocess is not None
    dense = convolution_flops(image(3, 64, 64), [image(256, 8, 8)])
    assert stage.preprocess.options.width == 128
    assert stage.preprocess.flops < 0.6 * dense
    assert stage.preprocess.flops <= 0.11 * stage.flops
