"""Family `units`: copies of the repeating block, with weights of their own."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from passes.coarse.copied_blocks import Units, UnitsOptions, build_units
from passes.coarse.spec import CoarseSpec, Site
from passes.errors import SynthesisError
from tests.support.programs import compile_model, compiled, program


def units_of(name: str, stage: int, **options: object) -> tuple[Units, CoarseSpec]:
    compilation = compiled(name, coarse="units", **options)
    assert compilation.plan is not None
    assert compilation.operators is not None
    spec, module = compilation.plan.stages[stage].coarse, compilation.operators.coarse[stage]
    assert spec is not None
    assert isinstance(module, Units)
    return module, spec


def options_of(spec: CoarseSpec) -> UnitsOptions:
    assert isinstance(spec.options, UnitsOptions)
    return spec.options


def test_units_are_the_down_sampling_and_copies_of_the_repeated_block() -> None:
    module, spec = units_of("resnet", 1, stages=2, cuts=("2",), units=2)

    # Stage 1 begins with a block of eight channels, then halves the resolution.
    names = [(block.first, block.last) for block in options_of(spec).blocks]
    assert names == [
        ("_3_conv1", "_3_relu_1"),
        ("_4_conv1", "_4_relu_1"),
        ("_4_conv1", "_4_relu_1"),
    ]
    x = torch.randn(3, 8, 8, 8)
    assert module(x).shape == (3, 16, 4, 4)


def test_a_unit_has_fresh_weights_at_the_scale_of_the_originals() -> None:
    for name, options in (("resnet", {"cuts": ("4",)}), ("container_transformer", {"stages": 2})):
        module, spec = units_of(name, 1, **options)
        original = program(name).module
        assert spec.parameters == sum(p.numel() for p in module.parameters())
        matrices = 0
        for key, weight in module.named_parameters():
            old = original.get_parameter(key.removeprefix("units.0."))
            assert weight is not old
            assert weight.shape == old.shape
            if weight.dim() > 1:
                matrices += 1
                assert not torch.equal(weight, old), key
                torch.testing.assert_close(weight.std(), old.std(), rtol=1e-3, atol=0)
        assert matrices >= 2


def test_two_units_are_drawn_apart() -> None:
    module, _ = units_of("resnet", 1, cuts=("4",), units=2)
    first, second = (unit.get_parameter("4.conv1.weight") for unit in module.units)

    assert not torch.equal(first, second)


def test_a_unit_is_given_the_inputs_that_its_block_reads() -> None:
    module, spec = units_of("float_mask_encoder", 1, cuts=("blocks.2",))
    ids = torch.randint(1, 9, (3, 10))
    x = torch.randn(3, 10, 16)
    masked = ids.clone()
    masked[:, 5:] = 0

    assert spec.options.inputs == ("tokens",)
    assert module(x, ids).shape == x.shape
    assert not torch.allclose(module(x, ids), module(x, masked))


def test_a_block_is_not_changed_by_being_copied() -> None:
    before = copy.deepcopy(program("resnet").module.state_dict())
    plan = compiled("resnet", coarse="units", cuts=("4",)).plan
    assert plan is not None
    spec = plan.stages[1].coarse
    assert spec is not None
    unit = build_units(options_of(spec), Site(program("resnet"), [], []))
    unit.train()(torch.randn(3, 16, 4, 4)).sum().backward()
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.add_(1.0)

    after = program("resnet").module.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_units_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SynthesisError, match=r"coarse='units' does not fit .* several components"):
        compiled("dict_output", coarse="units", stages=2)


def test_a_copy_without_weights_claims_no_repeating_block_and_no_evidence() -> None:
    pairs = [(nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)) for _ in range(3)]
    layers = [layer for pair in pairs for layer in pair]
    for coarse in ("auto", "units"):
        plan = compile_model(
            nn.Sequential(*layers), torch.randn(2, 8, 16, 16), cuts=("1", "2"), coarse=coarse
        ).plan
        assert plan is not None
        pooling, convolution = (stage.coarse for stage in plan.stages[1:])
        assert pooling is not None
        assert convolution is not None
        assert pooling.parameters == 0 < convolution.parameters
        assert not re.search("repeating|gained", pooling.why)
        assert "points in training from scratch" in convolution.why


def test_a_width_that_blocks_do_not_have_is_refused_by_auto_too() -> None:
    blocks = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(4)]
    with pytest.raises(SynthesisError, match="no narrower copy"):
        compile_model(nn.Sequential(*blocks), torch.randn(2, 4, 8), stages=2, coarse_width=0.5)


class Moving(nn.Module):
    """Writes a buffer of all channels, in training mode only."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x + torch.tanh(self.linear(x))


def test_a_block_that_writes_all_channels_in_training_has_no_narrower_copy() -> None:
    model, x = nn.Sequential(*(Moving() for _ in range(6))), torch.randn(4, 8)
    with pytest.raises(SynthesisError, match="counts on all channels"):
        compile_model(model, x, stages=2, coarse="units", coarse_width=0.25)
    plan = compile_model(model, x, stages=6, coarse_budget=0.1).plan
    assert plan is not None
    assert {stage.coarse.family for stage in plan.stages if stage.coarse} == {"linear"}
