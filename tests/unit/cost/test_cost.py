from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from passes.analysis.analysis import analyze
from passes.capture.ladder import capture
from passes.cost.flops import (
    NodeCost,
    count_work,
    measure_costs,
    parameters,
    plain_attention,
    plain_recurrence,
)
from passes.cost.measured import measure_seconds
from passes.cost.node_facts import observe
from passes.errors import OptionError
from tests.support.parameters import quick
from tests.support.programs import analysis, analyze_model, node, program


def registered(cost: NodeCost) -> int:
    """The part of the FLOPs that torch's registry knows: that part counts twice backward."""
    return cost.backward_flops - cost.flops


def counted(function: Callable[[], object]) -> int:
    with plain_attention(), plain_recurrence(), FlopCounterMode(display=False) as mode:
        function()
    return mode.get_total_flops()


@pytest.mark.parametrize("name", quick())
def test_forward_flops_are_those_of_torchs_own_counter(name: str) -> None:
    captured = program(name)
    module = copy.deepcopy(captured.module).eval()
    with torch.no_grad():
        expected = counted(lambda: module(**captured.args))

    assert sum(map(registered, analysis(name).costs.values())) == expected > 0


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("mlp", 0.0), ("deep_batchnorm", 0.0), ("unet", 0.0), ("inception", 0.0), ("mixer", 0.0),
     ("vision_transformer", 0.02)],
)  # fmt: skip
def test_backward_flops_are_close_to_those_of_a_real_backward(name: str, tolerance: float) -> None:
    captured = program(name)
    module = copy.deepcopy(captured.module).eval()
    (x,) = captured.args.values()
    with plain_attention(), plain_recurrence():
        out = module(x.clone().requires_grad_())  # so that the first layer has both its gradients
    expected = counted(lambda: out.sum().backward())
    flops = sum(2 * registered(cost) for cost in analysis(name).costs.values())

    assert flops == pytest.approx(expected, rel=tolerance, abs=0)


class Operators(nn.Module):
    """Operators that the registry does not know: elementwise ones, reductions, views, writes."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = F.relu(y)
        y = y.flatten(1)
        y = torch.cat((y, y), dim=1)
        y = y.add_(1.0)
        y = y.reshape(-1, 2, 12).sum(dim=1)
        return y.clone()


def test_an_unknown_operator_costs_one_flop_per_element_and_a_view_none() -> None:
    costs = {
        n.name: cost for n, cost in analyze_model(Operators(), torch.randn(2, 3, 4)).costs.items()
    }

    assert {name: cost.flops for name, cost in costs.items()} == {
        "transpose": 0,
        "relu": 24,
        "flatten": 24,  # of a transposed tensor: a copy
        "cat": 48,
        "add_": 48,
        "reshape": 0,
        "sum_1": 24,
        "clone": 24,
    }
    assert all(cost.backward_flops == cost.flops for cost in costs.values())


def test_bytes_are_of_what_a_node_reads_and_writes() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) * self.scale

    result = analyze_model(Shares(), torch.randn(3, 4))
    costs = {n.name: cost for n, cost in result.costs.items()}

    assert {name: cost.parameter_bytes for name, cost in costs.items()} == {
        "first": 80,
        "second": 80,
        "mul": 16,
    }
    assert {cost.activation_bytes for cost in costs.values()} == {48}
    names = {id(p): name for name, p in result.program.module.named_parameters()}
    first = parameters(result.program, node(result.program, "first"))
    assert [names[id(p)] for p in first] == ["first.weight", "first.bias"]


def test_flops_of_a_function_are_counted() -> None:
    weight = torch.randn(4, 8, requires_grad=True)

    assert count_work(lambda: torch.randn(2, 4) @ weight)[0] == 2 * 2 * 4 * 8 + 8
    assert count_work(lambda: None)[0] == 0


def test_users_may_supply_the_cost_of_nodes() -> None:
    calls: list[tuple[str, int]] = []

    def one_each(node: fx.Node, flops: int) -> float:
        calls.append((node.name, flops))
        return 1.0 if node.op == "call_module" else 0.0

    captured = program("mlp")
    result = analyze(captured, observe(captured), one_each)

    assert [cost.cost for cost in result.costs.values()] == [1.0] * len(captured.order)
    assert calls == [(n.name, analysis("mlp").costs[n].flops) for n in captured.order]
    assert (result.unit, result.total) == ("cost", 15.0)
    assert result.scale == pytest.approx(15.0 / result.flops)


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_an_invalid_cost_is_refused(cost: float) -> None:
    captured = program("mlp")
    with pytest.raises(
        OptionError, match=rf"cost of node '_0' must be finite and >= 0, got {cost}"
    ):
        measure_costs(captured, observe(captured), lambda node, flops: cost)


def test_measured_seconds_are_positive_and_cover_everything() -> None:
    captured = program("unet")
    result = analyze(captured, observe(captured), "measured")

    assert set(result.costs) == set(captured.order)
    assert all(cost.cost > 0 for cost in result.costs.values() if cost.flops)
    assert result.unit == "seconds"
    assert 1e-5 < result.total < 10
    flops = {n: cost.flops for n, cost in analysis("unet").costs.items()}
    assert {n: cost.flops for n, cost in result.costs.items()} == flops


def test_a_slow_segment_takes_longer() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 8), nn.Linear(8, 8))
    captured = capture(model, (torch.randn(256, 512),))
    timed = measure_seconds(captured, [[n] for n in captured.order])
    first, second, third = (seconds.forward for seconds in timed)

    assert not any(seconds.backward for seconds in timed)
    assert first > second > 0
    assert first > 5 * third > 0
    timed = measure_seconds(captured, [captured.order[:2], captured.order[2:]])
    whole, last = (seconds.total for seconds in timed)
    assert whole > last > 0


class Sleeps(torch.autograd.Function):
    """Sleeps in the backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, seconds: float) -> Tensor:
        context.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(context.seconds)
        return gradients[0], None


class SlowBackward(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        return Sleeps.apply(x, self.seconds)


def test_a_training_step_is_timed_backward_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), SlowBackward(0.01), nn.Linear(4, 4), SlowBackward(0.04))
    module = fx.GraphModule(model, _sequence(model))
    captured = replace(program("mlp"), module=module, args={"x": torch.randn(2, 4)})
    segments = [[n] for n in captured.order]

    timed = measure_seconds(captured, segments, backward=True)
    first, slow, third, slower = (seconds.total for seconds in timed)

    assert 0 < first < slow < slower
    assert 0 < third < slow
    assert slow > 0.01
    assert slower > 0.04
    assert timed[1].forward < 0.01 < timed[1].backward
    assert timed[3].forward < 0.01 < timed[3].backward
    assert sum(seconds.total for seconds in measure_seconds(captured, segments)) < slow
    segments = [segments[0] + segments[1], segments[2] + segments[3]]
    together = [seconds.backward for seconds in measure_seconds(captured, segments, backward=True)]
    assert together[0] > 0.01
    assert together[1] > 0.04
    assert not any(p.grad is not None for p in model.parameters())


def test_the_optimizer_takes_seconds_by_bytes_of_trained_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    model[3].weight = model[2].weight  # tied: counts where it is read first
    model[3].bias.requires_grad = False
    captured = capture(model, (torch.randn(2, 8),))
    segments = [[n] for n in captured.order]

    first, none, second, tied = (
        seconds.optimizer for seconds in measure_seconds(captured, segments, backward=True)
    )
    assert none == tied == 0 < first
    assert second / first == pytest.approx((64 * 64 + 64) / (8 * 64 + 64))
    assert not any(seconds.optimizer for seconds in measure_seconds(captured, segments))


def _sequence(model: nn.Sequential) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("x")
    for index in range(len(model)):
        value = graph.call_module(str(index), (value,))
    graph.output(value)
    return graph


def test_segments_without_a_gradient_share_the_time_of_their_neighbors() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            positive = y > 0
            return self.last(y) * positive

    captured = capture(Gated(), (torch.randn(2, 4),))
    timed = measure_seconds(captured, [[n] for n in captured.order], backward=True)
    assert len(timed) == 4
    assert min(seconds.forward for seconds in timed) > 0
    assert min(seconds.backward for seconds in timed) > 0
