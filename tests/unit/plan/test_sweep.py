"""The collapsed sweep: every residual straight to the last state."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import resnet110, unet
from passes.capture.ladder import capture
from passes.ir.program import Program
from tests.models.builders import mlp
from tests.support.programs import compile_program


@cache
def _resnet() -> Program:
    return capture(resnet110.build_model(2, 4), resnet110.example_inputs(size=8))


def _linear_chain() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(6)]
    return nn.Sequential(*layers)


def test_products_of_the_stages_make_it_exact_on_a_linear_network() -> None:
    model = _linear_chain()
    x = torch.randn(5, 6, dtype=torch.float64)
    compiled = pnn.compile(model, x, stages=3, cuts=["2", "4"], sweep="collapsed", coarse="linear")
    weights = [layer.weight for layer in model]  # type: ignore[attr-defined]
    last = weights[5] @ weights[4]
    products = {1: last @ weights[3] @ weights[2], 2: last}
    if compiled.plan.head.nodes:
        pytest.fail("the head should be empty: every layer belongs to a stage")
    with torch.no_grad():
        for number, product in products.items():
            (weight,) = compiled.operators.coarse[number].parameters()
            weight.copy_(product)
    torch.testing.assert_close(compiled.module(x), model(x))


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_it_verifies_trains_and_costs_one_map(name: str) -> None:
    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    if name == "resnet":
        model, inputs = resnet110.build_model(2, 4), resnet110.example_inputs(size=8)
    else:
        model, inputs = unet.build_model(depth=2, width=4), unet.example_inputs()
    options = {"stages": 3, "coarse": "linear"}
    chain = pnn.compile(model, inputs, **options)  # type: ignore[arg-type]
    collapsed = pnn.compile(model, inputs, sweep="collapsed", **options)  # type: ignore[arg-type]
    assert collapsed.verify().ok
    assert collapsed.plan.forecast.serial_share < chain.plan.forecast.serial_share
    collapsed.module.train()(*inputs).square().mean().backward()
    missing = [n for n, p in collapsed.module.named_parameters() if p.grad is None]
    assert not missing


def test_what_it_cannot_do_is_refused() -> None:
    model, inputs = resnet110.build_model(2, 4), resnet110.example_inputs(size=8)
    refused: list[dict[str, Any]] = [
        {"coarse": "exact"}, {"correction": "difference"}, {"iterations": 2},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(pnn.OptionError, match="collapsed"):
            pnn.compile(model, inputs, stages=3, sweep="collapsed", **options)


@pytest.mark.parametrize(
    ("options", "sweep"),
    [
        ({"stages": 4, "coarse": "linear"}, "collapsed"),
        ({"stages": 4, "coarse": "lowrank", "rank": 2}, "collapsed"),
        ({"stages": 2, "coarse": "linear"}, "chain"),  # one map either way
        ({"stages": 4, "coarse": "zero"}, "chain"),
        ({"stages": 4, "coarse": "units"}, "chain"),
        ({"stages": 4, "coarse": "conv"}, "chain"),  # not linear
        ({"stages": 4, "coarse": "linear", "correction": "difference"}, "chain"),
        ({"stages": 4, "coarse": "linear", "iterations": 2}, "chain"),
    ],
    ids=str,
)
def test_auto_takes_the_faster_sweep_that_linear_maps_can_do(
    options: dict[str, Any], sweep: str
) -> None:
    auto, same = (
        compile_program(_resnet(), sweep=choice, **options).plan for choice in ("auto", sweep)
    )
    assert auto is not None
    assert same is not None
    assert auto.sweep == sweep
    # The note on cheaper corrections gives their speeds in the sweep that was asked for.
    assert dataclasses.replace(auto, notes=()) == dataclasses.replace(same, notes=())


def test_auto_stays_what_the_plan_says_through_calibration() -> None:
    model = mlp(8, 16)
    samples = [torch.randn(32, 16) for _ in range(4)]
    compiled = pnn.compile(
        model, samples[0], stages=4, coarse="linear", sweep="auto", calibration=samples
    )
    plan = compiled.plan
    assert plan.sweep == "collapsed"
    hops = [stage.coarse.flops for stage in plan.stages if stage.coarse is not None]
    assert plan.forecast.serial == pytest.approx(max(hops) + plan.head.flops)
