"""Cuts for devices that differ in speed, memory and links."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture
from passes.cost.device_profile import DeviceProfile
from passes.cost.node_facts import observe
from passes.errors import OptionError, PartitionError
from passes.options import Options
from passes.partition.choose_cuts import choose_cut, problem_builder
from passes.plan.build import make_plan
from passes.plan.schema import Plan
from tests.models.builders import linear_chain

FAST = DeviceProfile(
    name="fast",
    flops={"float32": 4e9},
    bandwidth=1e15,
    launch=0.0,
    memory=1e9,
    link_bandwidth=1e12,
    link_latency=0.0,
)
SLOW = dataclasses.replace(FAST, name="slow", flops={"float32": 1e9})
WIDTH = 64


def linear_layers() -> Analysis:
    """Ten equal layers."""
    program = capture(linear_chain(10, WIDTH), (torch.randn(32, WIDTH),))
    return analyze(program, observe(program), "roofline", FAST)


ANALYSIS = linear_layers()


def plan_of(devices: tuple[DeviceProfile, ...], **choices: Any) -> Plan:
    options = Options(cost="roofline", coarse="zero", devices=devices, **choices)
    return make_plan(ANALYSIS, choose_cut(ANALYSIS, options), options)


def nodes(plan: Plan) -> list[int]:
    return [stage.nodes for stage in plan.stages]


def test_a_faster_device_gets_more() -> None:
    plan = plan_of((FAST, SLOW), stages=2)

    # A guess costs as much as a layer: nine layers at four times the speed, two at once.
    assert nodes(plan) == [9, 1]
    assert [stage.device for stage in plan.stages] == ["fast", "slow"]
    fast, slow = (stage.seconds or 0.0 for stage in plan.stages)
    assert slow == pytest.approx(4 / 9 * fast)
    assert plan.forecast.sequential == pytest.approx(10 / 9 * fast)
    assert plan.forecast.makespan == pytest.approx(fast)


def test_links_cost_time() -> None:
    far = dataclasses.replace(FAST, link_latency=1e-3, link_bandwidth=1e6)
    near, distant = plan_of((FAST,), stages=3), plan_of((far,), stages=3)

    state = 4 * 32 * WIDTH
    assert distant.forecast.link == pytest.approx(2 * 2 * (1e-3 + state / 1e6))
    more = distant.forecast.time - near.forecast.time
    assert more == pytest.approx(distant.forecast.link - near.forecast.link)


def test_memory_is_obeyed_and_reported() -> None:
    layer = 4 * 4 * WIDTH * (WIDTH + 1) + 4 * 32 * WIDTH
    small = dataclasses.replace(SLOW, name="small", memory=3.5 * layer)
    plan = plan_of((small, FAST), stages=2)

    assert nodes(plan) == [3 - 1, 8]
    assert plan.stages[0].memory == 2 * layer
    assert all((stage.memory or 0) <= small.memory for stage in plan.stages[:1])


def test_what_does_not_fit_says_where_by_how_much_and_what_would() -> None:
    layer = 4 * 4 * WIDTH * (WIDTH + 1) + 4 * 32 * WIDTH
    small = dataclasses.replace(FAST, name="small", memory=4.8 * layer)
    with pytest.raises(
        PartitionError,
        match=r"Sequential does not fit 2 devices: in a training step, stage 1 \(.* with the "
        r"head\) needs .* kB, .* kB more than the 359 kB of 'small'; (\d+) stages would fit",
    ) as caught:
        plan_of((small,), stages=2)
    count = int(str(caught.value).split(" stages would fit")[0].rsplit(" ", 1)[1])
    assert len(plan_of((small,), stages=count).stages) == count
    with pytest.raises(PartitionError, match="does not fit"):
        plan_of((small,), stages=count - 1)
    with pytest.raises(PartitionError, match=rf"{count} stages would fit"):
        plan_of((small,), cuts=("5",))
    tiny = dataclasses.replace(FAST, name="tiny", memory=0.5 * layer)
    with pytest.raises(PartitionError, match=r"no number of these devices up to .* holds it"):
        plan_of((tiny,), stages=2)
    with pytest.raises(PartitionError, match="nor do 2 of the listed devices hold it"):
        plan_of((tiny, tiny), stages=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": (FAST,), "cost": "flops"}, "devices need costs in seconds"),
        ({"devices": (FAST, SLOW), "cost": "measured"}, "of this machine, but the devices differ"),
        ({"devices": (FAST, SLOW), "stages": 3}, r"3 stages need a device each \(devices=2\)"),
        (
            {"devices": (FAST, dataclasses.replace(SLOW, name="fast"))},
            "devices that differ need names that differ",
        ),
    ],
)
def test_devices_that_cannot_be_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options(**({"cost": "roofline"} | options))


@pytest.mark.parametrize("family", ["linear", "lowrank"])
def test_a_collapsed_map_is_priced_by_the_last_state(family: str) -> None:
    # From a large early state to a small last one: a map between two large ones would cost more.
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=4, padding=1),
        *(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)),
    )  # fmt: skip
    program = capture(layers, (torch.randn(1, 3, 32, 32),))
    analysis = analyze(program, observe(program), "flops")
    options = Options(stages=3, sweep="collapsed", coarse=family)
    plan = make_plan(analysis, choose_cut(analysis, options), options)
    builder = problem_builder(analysis, options)
    (costs, *_) = builder.build(builder.devices(3)).devices
    order = [node.name for node in analysis.frontiers.order]
    ends = [order[position.index - 1] for position in builder.positions]
    for stage, before in zip(plan.stages[1:], plan.stages, strict=False):
        assert stage.preprocess is not None
        assert stage.coarse is not None
        built = stage.preprocess.flops + stage.coarse.flops
        assert costs.entry[ends.index(before.last)] == pytest.approx(built, rel=0.05)
