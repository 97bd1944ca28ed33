"""The oracles pass on sound networks, and fail when something is broken on purpose."""

import copy
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import pnn_compile as pnn
from examples import decoder, unet, vgg16
from tests.models.builders import Table, block_chain, residual_chain
from tests.support.parameters import grid


def _compiled() -> pnn.Compiled:
    return pnn.compile(block_chain(6, 6), torch.randn(3, 6), stages=3)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (vgg16.build_model(width=8), vgg16.example_inputs()),
        (unet.build_model(depth=3, width=4), unet.example_inputs()),
        (decoder.build_model(layers=4, width=16), decoder.example_inputs()),
    ],
    ids=["vgg16", "unet", "decoder"],
)
def test_every_oracle_holds_on_real_models(
    model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    compiled = pnn.compile(model, inputs, stages=3)
    report = compiled.verify(strict=True)
    assert all(check.passed for check in report.checks)


@pytest.mark.parametrize("correction", ["residual", "difference"])
def test_the_oracles_hold_for_both_forms(correction: str) -> None:
    compiled = pnn.compile(
        block_chain(6, 6),
        torch.randn(3, 6),
        stages=3,
        correction=correction,  # type: ignore[arg-type]
    )
    assert compiled.verify().ok


def test_a_stage_that_computes_something_else_is_caught() -> None:
    compiled = _compiled()
    stage = compiled.stages.fine[1]
    layer = next(node for node in stage.graph.nodes if node.op == "call_module")
    layer.replace_all_uses_with(layer.all_input_nodes[0])
    stage.recompile()
    report = compiled.verify()
    failed = {check.name.split(",")[0] for check in report.checks if not check.passed}
    assert "stages in sequence = original" in failed
    assert "coarse = fine" in failed
    with pytest.raises(pnn.VerificationError, match="relative error"):
        compiled.verify(strict=True)


def test_lost_checkpoint_keys_are_caught() -> None:
    compiled = _compiled()
    program = dataclasses.replace(compiled.program, unused={"ghost": torch.zeros(1)})
    broken = dataclasses.replace(compiled, program=program)
    assert broken.verify().ok
    head = broken.stages.head
    head.register_parameter("stranger", nn.Parameter(torch.zeros(1)))
    failed = [check for check in broken.verify().checks if not check.passed]
    assert ["stranger" in check.reason for check in failed] == [True]


def test_verify_leaves_modes_buffers_and_gradients_alone() -> None:
    model = vgg16.build_model(width=8)
    compiled = pnn.compile(model, vgg16.example_inputs(), stages=3)
    compiled.module.train()
    before = {key: value.clone() for key, value in compiled.module.state_dict().items()}
    compiled.verify(strict=True)
    assert all(module.training for module in compiled.module.modules())
    assert all(parameter.grad is None for parameter in compiled.module.parameters())
    for key, value in compiled.module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_is_verified_in_the_precision_that_it_was_converted_to(
    dtype: torch.dtype,
) -> None:
    model = Table(block_chain(6, 16, norm=True), 16)  # buffers of its own and of its layers
    compiled = pnn.compile(model, torch.randn(4, 16), stages=3)
    compiled.module.to(dtype)
    assert compiled.module(torch.randn(4, 16, dtype=dtype)).dtype == dtype
    compiled.verify(strict=True)


class Vanishing(nn.Module):
    """States of magnitude 1e-12 behind a first one of 1, with a precision asked for on the way."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh()) for _ in range(6)]
        self.layers = nn.Sequential(*layers)
        with torch.no_grad():
            for layer in layers:
                layer.get_parameter("0.weight").mul_(1e-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y.float() * torch.ones(6, dtype=torch.float32)


def _vanishing() -> pnn.Compiled:
    torch.manual_seed(0)
    return pnn.compile(Vanishing(), torch.randn(3, 6), stages=3)


def test_rounding_where_a_guess_is_far_larger_than_its_state_is_no_error() -> None:
    compiled = _vanishing()
    check = compiled.verify(strict=True).checks[2]
    assert "in float64" in check.name
    assert check.limit is not None
    assert check.limit < 1e-7


def test_wrong_wiring_among_states_that_vanish_is_caught() -> None:
    compiled = _vanishing()
    stage = compiled.stages.fine[1]
    layer = next(node for node in stage.graph.nodes if node.op == "call_module")
    layer.replace_all_uses_with(layer.all_input_nodes[0])
    stage.recompile()
    check = compiled.verify().checks[2]
    assert check.name.startswith("coarse = fine")
    assert "in float64" in check.reason


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + 0.1 * torch.randn_like(x)
        return x


def test_oracles_that_compute_a_stage_twice_are_not_run_where_every_call_draws() -> None:
    report = pnn.compile(Noisy(), torch.randn(3, 6), stages=3).verify(strict=True)
    skipped = [check.name for check in report.checks if "draws random numbers" in check.name]
    assert len(skipped) == 2


def _chain(blocks: int) -> nn.Module:
    return residual_chain(blocks, 6, scale=0.25)


class Centred(nn.Module):
    """Its second output, a sum over a normalized axis, is rounding noise and nothing else."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = _chain(blocks)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(self.blocks(x))
        return y, y.sum(-1)


class OnlyNoise(Centred):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)[1]


DEEP = pytest.param(50, marks=pytest.mark.slow)


@pytest.mark.parametrize("stages", [3, 25, DEEP])
@pytest.mark.parametrize("build", [_chain, Centred, OnlyNoise])
def test_the_oracles_hold_for_many_stages_and_for_outputs_that_are_noise(
    build: Callable[[int], nn.Module], stages: int
) -> None:
    report = pnn.compile(build(stages), torch.randn(4, 6), stages=stages).verify(strict=True)
    for check in report.checks:
        assert check.error is None or check.limit is None or check.error <= check.limit
    consistency = next(check for check in report.checks if "consistency" in check.name)
    assert consistency.error is not None
    assert consistency.error < 1e-12


def _nodes(network: fx.GraphModule, function: Callable[..., Any]) -> list[fx.Node]:
    return network.graph.find_nodes(op="call_function", target=function)


def _wrong_edge(network: fx.GraphModule) -> None:
    """Let the last correction read the state of the stage before."""
    *_, before, last = _nodes(network, operator.sub)
    last.args = (before.args[0], last.args[1])


def _wrong_sign(network: fx.GraphModule) -> None:
    _nodes(network, operator.add)[-1].target = operator.sub


def _wrong_weight(network: fx.GraphModule) -> None:
    """Change one weight of one stage, in this network alone."""
    names = [name for name, _ in network.named_children() if name.startswith("fine_")]
    name = names[len(names) // 2]
    stage = copy.deepcopy(network.get_submodule(name))
    setattr(network, name, stage)
    with torch.no_grad():
        weight = next(p for p in stage.parameters() if p.dim() > 1)
        weight[0, 0] += 0.1


MUTATIONS = (
    (_wrong_edge, ["coarse", "K", "linear"]),
    (_wrong_sign, ["coarse", "linear"]),  # after N iterations, whatever is corrected is zero
    (_wrong_weight, ["coarse", "K", "linear"]),
)


@pytest.mark.parametrize("stages", [3, 12, DEEP])
@pytest.mark.parametrize(
    ("build", "mutate", "seen_by"), grid((_chain, Centred, OnlyNoise), MUTATIONS)
)
def test_every_oracle_sees_one_wrong_edge_sign_or_weight(
    build: Callable[[int], nn.Module],
    mutate: Callable[[fx.GraphModule], None],
    seen_by: list[str],
    stages: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from passes.transform.assemble import assemble

    compiled = pnn.compile(build(stages), torch.randn(4, 6), stages=stages)

    def assemble_wrongly(*arguments: Any, **options: Any) -> fx.GraphModule:
        network = assemble(*arguments, **options)
        mutate(network)
        network.recompile()
        return network

    for place in ("pnn_compile.evaluate.verify.assemble", "passes.pipeline.assemble"):
        monkeypatch.setattr(place, assemble_wrongly)
    failed = [check.name for check in compiled.verify().checks if not check.passed]
    assert [name.split(" ")[0] for name in failed] == seen_by


class Selection(nn.Module):
    """Returns the samples of positive sum: how many, the values say."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y[y.sum(1) > 0]


def test_outputs_whose_shape_is_data_may_have_another() -> None:
    torch.manual_seed(0)
    compiled = pnn.compile(Selection(), torch.randn(5, 8), stages=2)
    with torch.no_grad():
        for parameter in compiled.operators.named().parameters():
            parameter.fill_(-3.0)
    compiled.verify(strict=True)


class DoubleInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.body(x), -1, dtype=torch.float64)


def test_a_converted_network_may_have_had_states_of_two_precisions() -> None:
    compiled = pnn.compile(DoubleInside(), torch.randn(3, 8), stages=3)
    states = {value.spec.dtype for face in compiled.plan.interfaces for value in face.state}
    assert states == {"float32", "float64"}
    compiled.to(torch.double).verify(strict=True)
