"""Guesses that a thinned copy of all that lies before an interface makes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import resnet110, vgg16
from passes.capture.ladder import capture
from passes.coarse.thinned_blocks import Front, FrontOptions
from passes.errors import ArtifactError, SynthesisError
from passes.ir.program import Program
from passes.plan.schema import Plan
from passes.plan.validate import check_plan
from pnn_compile.compiled import gather
from tests.support.programs import compile_program, copies


def _model() -> tuple[nn.Module, torch.Tensor]:
    """A ResNet deep enough to be thinned."""
    torch.manual_seed(0)
    return resnet110.build_model(6, 4), torch.randn(2, 3, 16, 16)


@cache
def _captured() -> Program:
    model, x = _model()
    return capture(model, (x,))


@copies
def deep(**options: Any) -> pnn.Compiled:
    """Three stages of it, whose guesses are thinned."""
    if "cuts" not in options:
        options["stages"] = 3
    return gather(compile_program(_captured(), preprocess="thinned", **options), ())


def guess_of(network: pnn.Compiled, stage: int) -> tuple[Front, FrontOptions]:
    spec, guess = network.plan.stages[stage].preprocess, network.operators.preprocess[stage]
    assert spec is not None
    front = guess.prologue
    assert isinstance(front, Front)
    assert isinstance(spec.options, FrontOptions)
    return front, spec.options


def test_a_guess_is_made_by_a_thinned_copy_of_all_that_lies_before() -> None:
    network = deep(cuts=("trunk.6", "trunk.13"))
    images = torch.randn(3, 3, 16, 16)
    for stage in (1, 2):
        front, options = guess_of(network, stage)
        assert 0 < len(options.blocks) <= (5, 12)[stage - 1] // 2
        module = network.operators.preprocess[stage].eval()
        front.eval()
        with torch.no_grad():
            state = front.stem(images)
            for unit in front.units.units:
                state = unit(state)
        torch.testing.assert_close(front(images), state)
        [entering] = network.plan.interfaces[stage - 1].state
        assert module(images).shape[1:] == torch.Size(entering.spec.shape[1:])
        fine = {id(p) for p in network.stages.fine[0].parameters()}
        assert not fine & {id(p) for p in front.parameters()}
    assert all(check.passed for check in network.verify().checks)


def test_more_may_be_copied_and_too_little_is_refused() -> None:
    small, large = (len(guess_of(network, 2)[1].blocks) for network in (deep(), deep(prologue=0.4)))
    assert small < large
    with pytest.raises(SynthesisError, match="give it a larger prologue"):
        deep(prologue=0.01)
    with pytest.raises(SynthesisError, match="one of every kind of block"):
        pnn.compile(
            vgg16.build_model(width=4), torch.randn(2, 3, 32, 32), stages=3, preprocess="thinned"
        )


def test_calibration_measures_the_statistics_of_a_thinned_front_where_that_helps() -> None:
    images = [torch.randn(16, 3, 16, 16) for _ in range(5)]
    network = deep(cut_inside_blocks=True)
    right = pnn.calibrate(network, images)
    norms = [
        module
        for module in guess_of(network, 2)[0].units.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var *= 1e-6  # the branches drown the state
    again = pnn.calibrate(network, images)
    assert again.recalibrated == ("preprocess_2",)
    assert again.interfaces[1].guess_after < again.interfaces[1].guess_before
    assert again.interfaces[1].guess_after < 2.5 * right.interfaces[1].guess_after


def test_a_thinned_guess_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    samples = [torch.randn(16, 3, 16, 16) for _ in range(3)]
    network = pnn.compile(*_model(), stages=3, preprocess="thinned", calibration=samples)
    pnn.fit(network, [torch.randn(8, 3, 16, 16) for _ in range(4)], interface_epochs=0.5)
    loaded = pnn.load(network.save(tmp_path / "out"))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(network.module.eval()(images), loaded.module.eval()(images))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("leaving", "nowhere", r"stem\.leaving is 'nowhere'"),
        ("inputs", ["labels"], r"stem\.inputs\[0\] is 'labels'"),
        ("inputs", 5, r"stem\.inputs should be list, found int"),
    ],
)
def test_the_stem_of_a_thinned_guess_is_checked(field: str, value: Any, message: str) -> None:
    network = deep()
    data = json.loads(network.plan.to_json())
    data["stages"][1]["preprocess"]["options"]["stem"][field] = value
    with pytest.raises(ArtifactError, match=message):
        check_plan(network.program, Plan.from_json(json.dumps(data)))


def test_the_search_cuts_where_the_front_can_be_thinned() -> None:
    model, images = resnet110.build_model(4, 4), torch.randn(2, 3, 16, 16)
    network = pnn.compile(model, images, stages=3, preprocess="thinned")
    for stage in (1, 2):
        assert guess_of(network, stage)[1].blocks


def test_moved_cuts_keep_the_share_that_may_be_copied() -> None:
    network = deep(cuts=("trunk.6", "trunk.12"), prologue=0.4)
    data = json.loads(network.plan.to_json())
    moved = json.loads(deep(cuts=("trunk.6", "trunk.13"), prologue=0.4).plan.to_json())
    for stage, other in zip(data["stages"], moved["stages"], strict=True):
        stage |= {name: other[name] for name in ("first", "last")}
    again = pnn.compile(*_model(), plan=Plan.from_json(json.dumps(data)))
    assert [stage.first for stage in again.plan.stages] == [s["first"] for s in moved["stages"]]
    assert guess_of(again, 2)[1].prologue == 0.4
