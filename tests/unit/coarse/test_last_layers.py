"""Family `layers`: copies of the last layers of a stage, between states of several tensors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import unet
from examples.studies.networks import build_revnet
from passes.coarse.last_layers import LastLayers, LayersOptions
from passes.coarse.map_matrix import MapMatrix
from passes.coarse.wrappers import Identity
from passes.plan.schema import Plan
from tests.support.programs import copies


@copies
def _compiled(name: str, **options: Any) -> pnn.Compiled:
    model = build_revnet(9, 4, 3) if name == "revnet" else unet.UNet(3, 2, width=8, depth=4)
    return pnn.compile(model, torch.randn(2, 3, 32, 32), **options)


def _options_of(plan: Plan, stage: int) -> LayersOptions:
    spec = plan.stages[stage].coarse
    assert spec is not None
    assert isinstance(spec.options, LayersOptions)
    return spec.options


def _network(compiled: pnn.Compiled, stage: int) -> LastLayers:
    [network] = [m for m in compiled.module.get_submodule(f"coarse_{stage}").modules()
                 if isinstance(m, LastLayers)]  # fmt: skip
    return network


def test_copies_begin_where_the_last_unit_does() -> None:
    compiled = _compiled("revnet", cuts=("trunk.3", "trunk.6"), coarse="layers")
    options = _options_of(compiled.plan, 1)

    assert compiled.plan.stages[1].last_module == "trunk.5"
    assert options.first.startswith("trunk_5_")
    assert options.sources[0].shape == (2, 8, 16, 16)
    original = compiled.program.module.get_submodule("trunk.5")
    copied = _network(compiled, 1).body
    assert sum(p.numel() for p in copied.parameters()) == sum(
        p.numel() for p in original.parameters()
    )
    assert all(
        a.shape != b.shape or a.dim() < 2 or not torch.equal(a, b)
        for a, b in itertools.product(copied.parameters(), original.parameters())
    )


@pytest.mark.parametrize("width", [None, 0.25])
def test_copies_of_a_level_read_the_skip_that_it_reads(width: float | None) -> None:
    cuts = "up.0", "up.2"
    compiled = _compiled("unet", cuts=cuts, coarse="layers", sweep="chain", coarse_width=width)
    options, stage = _options_of(compiled.plan, 2), compiled.plan.stages[2]
    assert options.first == "up_3_upsample"
    assert options.entering == ("stem_5", "down_0_5", "up_1_convolve_5")
    assert [source.name for source in options.sources] == ["stem_5", "up_2_convolve_5"]
    assert options.mapped == ((0,), (0, 1, 2))

    state = [torch.randn(value.spec.shape) for value in compiled.plan.enters(2)]
    network = _network(compiled, 2).eval()
    for expand in network.expand:
        nn.init.ones_(expand.get_parameter("weight"))
    [value] = compiled.plan.corrects(2)
    result = network(*state)
    assert isinstance(result, torch.Tensor)
    assert result.shape == value.spec.shape
    for place in range(3):
        other = [x + (index == place) for index, x in enumerate(state)]
        assert not torch.equal(network(*other), result)
    assert stage.coarse is not None
    assert stage.coarse.flops < (0.6 if width is None else 0.2) * stage.flops


def test_narrow_copies_begin_as_their_shortcut_and_cost_less() -> None:
    whole, narrow = (
        _compiled("revnet", stages=3, coarse="layers", coarse_width=width) for width in (None, 0.5)
    )
    network = _network(narrow, 1).eval()
    state = [torch.randn(value.spec.shape) for value in narrow.plan.enters(1)]
    assert network.shortcut is not None
    pairs = zip(network(*state), network.shortcut(*state), strict=True)
    assert all(torch.equal(result, straight) for result, straight in pairs)

    specs = [compiled.plan.stages[1].coarse for compiled in (whole, narrow)]
    assert specs[0] is not None
    assert specs[1] is not None
    assert specs[1].flops < 0.6 * specs[0].flops


def test_copies_are_narrow_where_whole_ones_are_above_the_budget() -> None:
    free, limited = (
        _compiled("revnet", stages=9, coarse_budget=budget).plan for budget in (None, 0.3)
    )
    assert _options_of(free, 1).width is None
    assert _options_of(limited, 1).width == 0.25
    spec = limited.stages[1].coarse
    assert spec is not None
    assert "copies of the last layers, of which narrow" in spec.why


class Separable(nn.Module):
    """A block of two streams that costs less than maps between their channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + torch.relu(self.convolution(x) + before), x


class Wide(nn.Module):
    """Two streams of many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Separable(channels) for _ in range(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = before = self.stem(x)
        for block in self.blocks:
            x, before = block(x, before)
        return x + before


def test_maps_that_would_cost_more_than_the_copies_are_straight() -> None:
    torch.manual_seed(0)
    cuts = "blocks.3", "blocks.6"
    compiled = pnn.compile(Wide(32), torch.randn(2, 3, 8, 8), cuts=cuts)
    compiled.verify(strict=True)
    network, stage = _network(compiled, 1), compiled.plan.stages[1]
    assert stage.coarse is not None
    assert stage.coarse.flops < stage.flops
    assert "not measured" in stage.coarse.why
    assert isinstance(network.enter, MapMatrix)
    assert all(isinstance(single, Identity) for (single,) in network.enter.rows())
    state = [torch.randn(value.spec.shape) for value in compiled.plan.enters(1)]
    # The second stream enters, and the first one of the copied block is nearest to it too.
    torch.testing.assert_close(network.enter(*state), (state[1], state[1]))


class Towers(nn.Module):
    """Two towers that never meet, each of an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.right = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for left, right in zip(self.left, self.right, strict=True):
            x, y = torch.tanh(left(x)), torch.tanh(right(y))
        return x, y


@pytest.mark.parametrize("width", [None, 0.5])
@pytest.mark.parametrize("sweep", ["chain", "collapsed"])
def test_a_correction_reads_no_input_that_its_tensor_does_not_depend_on(
    width: float | None, sweep: Literal["chain", "collapsed"]
) -> None:
    inputs = torch.randn(2, 8), torch.randn(2, 8, requires_grad=True)
    compiled = pnn.compile(
        Towers(), inputs, stages=3, coarse="layers", coarse_width=width, sweep=sweep
    )
    for module in compiled.module.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)
    left, right = compiled.module(*inputs)

    assert torch.autograd.grad(left.sum(), inputs[1], allow_unused=True)[0] is None or not (
        torch.autograd.grad(left.sum(), inputs[1], allow_unused=True)[0].any()
    )
    assert torch.autograd.grad(right.sum(), inputs[1])[0].any()


@pytest.mark.parametrize("sweep", ["chain", "collapsed"])
def test_networks_of_last_layers_pass_all_checks_and_are_saved(tmp_path: Path, sweep: str) -> None:
    for name in ("unet", "revnet"):
        compiled = _compiled(name, stages=3, coarse="layers", coarse_width=0.25, sweep=sweep)
        compiled.verify(strict=True)
        compiled.save(tmp_path / name)
        x = torch.randn(2, 3, 32, 32)
        compiled.module.eval()
        assert torch.equal(pnn.load(tmp_path / name).module.eval()(x), compiled.module(x))


def test_a_stage_without_weights_is_copied() -> None:
    layers = nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
    images = torch.randn(2, 8, 16, 16)
    compiled = pnn.compile(nn.Sequential(*layers), images, cuts=("1", "2"), coarse="layers")
    x = torch.randn(2, 8, 14, 14)
    assert torch.equal(compiled.module.get_submodule("coarse_1")(x), layers[1](x))
