"""The oracles pass on sound networks, and fail when something is broken on purpose."""

import dataclasses

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import decoder, unet, vgg16


def _compiled() -> pnn.Compiled:
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)]
    return pnn.compile(nn.Sequential(*layers), torch.randn(3, 6), stages=3)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (vgg16.build_model(width=8), vgg16.example_inputs()),
        (unet.build_model(), unet.example_inputs()),
        (decoder.build_model(layers=6, width=32), decoder.example_inputs()),
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
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)]
    compiled = pnn.compile(
        nn.Sequential(*layers),
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


class Table(nn.Module):
    """Reads a buffer of its own, beside layers that have some."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()) for _ in range(6)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("table", torch.ones(3, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x + self.table[:1])
        return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_is_verified_in_the_precision_that_it_was_converted_to(
    dtype: torch.dtype,
) -> None:
    compiled = pnn.compile(Table(), torch.randn(4, 16), stages=3)
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
