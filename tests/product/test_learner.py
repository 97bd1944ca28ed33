"""Optimizer steps, scaled in float16."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import pnn_compile as pnn
from pnn_compile.fit.optimizer import OptimizerStep
from tests.models.builders import block_chain


def _trainer(
    parameters: Sequence[nn.Parameter], total: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    return optimizer, LambdaLR(optimizer, lambda step: 1.0 - step / total)


def _learner(weight: nn.Parameter, **options: object) -> OptimizerStep:
    return OptimizerStep([weight], _trainer, 100, **options)  # type: ignore[arg-type]


def test_small_gradients_reach_the_weights_in_half_precision() -> None:
    """2^-24 is the smallest number of float16: half of it is zero unless the loss is scaled."""
    moved = {}
    for precision in (None, torch.float16):
        weight = nn.Parameter(torch.zeros(4))
        half = weight.half() * 2.0**-12  # what comes back through it is half too
        _learner(weight, autocast=precision).step((half.float() * 2.0**-14).sum())
        moved[precision] = weight.detach().abs().max().item()
    assert moved == {None: 0.0, torch.float16: 2.0**-26}


def test_a_step_that_overflows_is_left_out_and_the_scale_falls() -> None:
    weight = nn.Parameter(torch.zeros(4))
    learner = _learner(weight, autocast=torch.float16, clip_norm=1.0)
    before = learner.state_dict()["scaler"]["scale"]
    learner.step((weight * float("inf")).sum())
    assert torch.equal(weight, torch.zeros(4))
    state = learner.state_dict()
    assert state["scaler"]["scale"] == before / 2
    assert state["schedule"]["last_epoch"] == 0
    learner.step((weight * 3.0).sum())
    assert weight.norm().item() == pytest.approx(1.0)
    assert learner.state_dict()["schedule"]["last_epoch"] == 1


def test_the_scale_is_part_of_the_state() -> None:
    weight = nn.Parameter(torch.zeros(4))
    learner = _learner(weight, autocast=torch.float16)
    learner.step((weight * float("inf")).sum())
    again = _learner(nn.Parameter(torch.zeros(4)), autocast=torch.float16)
    again.load_state_dict(learner.state_dict())
    assert again.state_dict() == learner.state_dict()


def test_without_parameters_nothing_happens() -> None:
    learner = OptimizerStep([], _trainer, 10)
    learner.step(torch.ones(()))
    assert learner.state_dict() == {}


def test_a_fit_in_half_precision_brings_the_outputs_closer() -> None:
    compiled = pnn.compile(block_chain(6, 8), torch.randn(4, 8), stages=2)
    batches = [torch.randn(16, 8) for _ in range(20)]
    report = pnn.fit(compiled, batches, epochs=5, autocast=torch.float16, interface_epochs=1)
    assert report.last_loss < 0.7 * report.first_loss
