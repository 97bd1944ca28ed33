"""The star: a collapsed sweep whose residuals go through copied blocks, each of its own network."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import decoder, resnet110, vgg16
from passes.capture.ladder import capture
from passes.coarse.copied_blocks import Units
from passes.coarse.narrow import Bottleneck
from passes.errors import ArtifactError, OptionError, SynthesisError
from passes.ir.program import Program
from passes.ir.tensor_spec import TensorSpec
from passes.plan.schema import Plan
from tests.support.programs import compile_program

STAR: dict[str, Any] = {"coarse": "units", "sweep": "collapsed", "coarse_budget": 1.0}
NARROW: dict[str, Any] = {**STAR, "coarse_width": 0.5}


def _network(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name == "vgg":
        return vgg16.build_model(width=8), torch.randn(2, 3, 32, 32)
    if name == "resnet":
        return resnet110.build_model(3, 4), torch.randn(2, 3, 16, 16)
    return decoder.build_model(layers=6, width=16, context=16), torch.randint(256, (4, 16))


@cache
def _captured(name: str) -> Program:
    model, x = _network(name)
    return capture(model, (x,))


def plan_of(captured: Program, **options: Any) -> Plan:
    plan = compile_program(captured, **options).plan
    assert plan is not None
    return plan


def _compiled(name: str, stages: int = 3, **options: Any) -> tuple[pnn.Compiled, torch.Tensor]:
    model, x = _network(name)
    compiled = pnn.compile(model, x, stages=stages, **options)
    for parameter in compiled.module.parameters():  # no expansion of zeros that hides a part
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    compiled.module.eval()
    return compiled, x


@pytest.mark.parametrize("options", [STAR, NARROW], ids=["full", "narrow"])
@pytest.mark.parametrize("name", ["vgg", "resnet", "decoder"])
def test_every_residual_goes_through_its_own_network_to_the_last_state(
    name: str, options: dict[str, Any]
) -> None:
    compiled, x = _compiled(name, **options)
    stages, operators = compiled.stages, compiled.operators
    guesses = {j: operators.preprocess[j](x) for j in (1, 2)}
    outputs = [stages.fine[0](x), *(stages.fine[j](guesses[j]) for j in (1, 2))]
    residuals = {j: outputs[j - 1] - guesses[j] for j in (1, 2)}
    last = outputs[2] + sum(operators.coarse[j](residuals[j]) for j in (1, 2))
    torch.testing.assert_close(compiled.module(x), stages.head(last))
    assert compiled.verify().ok


@pytest.mark.parametrize("stages", [3, 6])
@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_it_costs_at_most_the_chain_of_as_many_blocks(name: str, stages: int) -> None:
    captured = _captured(name)
    chain = plan_of(captured, stages=stages, coarse="units", coarse_budget=1.0)
    cuts = [face.before for face in chain.interfaces[:-1]]
    star, narrow = (plan_of(captured, cuts=cuts, **how) for how in (STAR, NARROW))
    assert narrow.forecast.sweep < star.forecast.sweep <= chain.forecast.sweep
    deepest = [stage.coarse for stage in star.stages if stage.coarse]
    assert star.forecast.sweep == max(coarse.flops for coarse in deepest)


def test_the_networks_hold_the_down_sampling_that_lies_between() -> None:
    compiled, _ = _compiled("vgg", **STAR)
    assert compiled.plan.stages[1].first_module.startswith("features.")
    for number, stage in enumerate(compiled.plan.stages[1:], 1):
        units = compiled.operators.coarse[number]
        assert isinstance(units, Units)
        size, last = stage_size(compiled.plan, number - 1), stage_size(compiled.plan, 2)
        pools = [m for m in units.modules() if isinstance(m, nn.MaxPool2d)]
        assert size == last * 2 ** len(pools)
        kinds = {type(m) for m in units.modules()}
        assert {nn.Conv2d, nn.BatchNorm2d, nn.ReLU} <= kinds, stage.first_module


def stage_size(plan: Plan, number: int) -> int:
    return plan.interfaces[number].state[0].spec.shape[-1]


def _units(network: nn.Module) -> list[nn.Module]:
    assert isinstance(network, Units)
    return list(network.units)


def _linear_blocks() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(6)]
    return nn.Sequential(*layers), torch.randn(5, 6, dtype=torch.float64)


def test_copies_of_all_linear_blocks_make_it_exact_and_equal_the_collapsed_maps() -> None:
    model, x = _linear_blocks()
    options: dict[str, Any] = {"cuts": ["2", "4"], "sweep": "collapsed"}
    star = pnn.compile(model, x, coarse="thinned", units=99, **options)
    copies = {j: _units(star.operators.coarse[j]) for j in (1, 2)}
    assert [len(copies[j]) for j in (1, 2)] == [4, 2]
    torch.testing.assert_close(star.module(x), model(x))

    maps = pnn.compile(model, x, coarse="linear", **options)
    guesses = {k: v for k, v in star.module.state_dict().items() if k.startswith("preprocess")}
    maps.module.load_state_dict(guesses, strict=False)
    for number in (1, 2):
        product = torch.eye(6, dtype=torch.float64)
        for unit in copies[number]:
            [weight] = unit.parameters()
            weight.data.mul_(1.1)  # no longer exact, so that the guesses matter
            product = weight.data @ product
        [weight] = maps.operators.coarse[number].parameters()
        weight.data.copy_(product)
    assert not torch.allclose(star.module(x), model(x), rtol=1e-3)
    torch.testing.assert_close(star.module(x), maps.module(x))


def test_a_narrow_copy_has_a_share_of_all_channels() -> None:
    compiled, _ = _compiled("vgg", **NARROW)
    full, _ = _compiled("vgg", **STAR)
    for number in (1, 2):
        narrow, wide = compiled.operators.coarse[number], full.operators.coarse[number]
        assert isinstance(narrow, Bottleneck)
        pairs = zip(_convolutions(narrow.body), _convolutions(wide), strict=True)
        for (small, large), kernel in ((pair, pair[1].kernel_size) for pair in pairs):
            assert small.kernel_size == kernel
            assert (2 * small.in_channels, 2 * small.out_channels) == (
                large.in_channels, large.out_channels,
            )  # fmt: skip


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize("channels", [8, 16])
def test_a_residual_passes_a_narrow_copy_whole(channels: int) -> None:
    entering, leaving = (
        TensorSpec((4, count, 4, 4), "float32", batch_axis=0, channel_axis=1)
        for count in (8, channels)
    )
    body = nn.Identity() if channels == 8 else nn.Conv2d(2, 4, 1)
    narrow = Bottleneck(body, entering, leaving, 0.25)
    residual = torch.randn(entering.shape)
    passed = narrow(residual)
    assert torch.linalg.matrix_rank(passed.movedim(1, 0).flatten(1)) == 8
    if channels == 8:
        torch.testing.assert_close(passed, residual)


def test_a_narrow_copy_draws_weights_of_the_same_gain() -> None:
    model, x = _network("vgg")
    wide = pnn.compile(model, x, cuts=["features.14", "features.24"], **STAR)
    narrow = pnn.compile(model, x, cuts=["features.14", "features.24"], **NARROW)
    for number in (1, 2):
        layers = map(
            _convolutions, (narrow.operators.coarse[number], wide.operators.coarse[number])
        )
        for small, large in zip(*layers, strict=True):
            gains = [w.std() * w[0].numel() ** 0.5 for w in (small.weight, large.weight)]
            torch.testing.assert_close(*gains, rtol=1e-4, atol=0)


def test_a_chain_may_be_narrow_too_and_all_channels_are_the_default() -> None:
    model, x = _network("resnet")
    wide, half = (
        pnn.compile(model, x, stages=3, coarse="units", coarse_width=width, coarse_budget=1.0)
        for width in (1, 0.5)
    )
    plain = pnn.compile(model, x, stages=3, coarse="units", coarse_budget=1.0)
    assert wide.plan.stages == plain.plan.stages
    assert half.plan.forecast.sweep < plain.plan.forecast.sweep
    assert half.verify().ok


def test_what_cannot_be_narrow_says_why() -> None:
    model, x = _network("resnet")
    for width in (0, -0.5, 1.5, "half"):
        with pytest.raises(OptionError, match="coarse_width must be a share"):
            pnn.compile(model, x, stages=2, coarse="units", coarse_width=width)  # type: ignore[arg-type]
    tokens, ids = _network("decoder")
    with pytest.raises(SynthesisError, match=r"counts on all channels .* at a share of 0\.3"):
        pnn.compile(tokens, ids, stages=2, coarse="units", coarse_width=0.3, coarse_budget=1.0)
    blocks = nn.Sequential(*(Recurrent() for _ in range(4)))
    with pytest.raises(SynthesisError, match="layer of type GRU"):
        pnn.compile(blocks, torch.randn(2, 3, 8), stages=2, coarse="units", coarse_width=0.5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.cell(x)[0]


@pytest.mark.parametrize("options", [STAR, NARROW], ids=["full", "narrow"])
def test_plans_and_artifacts_keep_it(options: dict[str, Any], tmp_path: Path) -> None:
    compiled, x = _compiled("resnet", **options)
    text = compiled.plan.to_json()
    assert Plan.from_json(text) == compiled.plan
    model, _ = _network("resnet")
    again = pnn.compile(model, x, plan=Plan.from_json(text))
    again.module.load_state_dict(compiled.module.state_dict())
    torch.testing.assert_close(again.module.eval()(x), compiled.module(x))
    compiled.save(tmp_path / "star")
    torch.testing.assert_close(pnn.load(tmp_path / "star").module.eval()(x), compiled.module(x))


def test_a_width_that_was_edited_is_checked() -> None:
    compiled, x = _compiled("resnet", **NARROW)
    text = compiled.plan.to_json().replace('"width": 0.5', '"width": 3.0', 1)
    model, _ = _network("resnet")
    with pytest.raises(
        ArtifactError, match=r"coarse\.options\.width is 3\.0: it should be a share"
    ):
        pnn.compile(model, x, plan=Plan.from_json(text))
