"""stages="auto": how many, how expensive the sweep, and what the plan says about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import vgg16
from passes.analysis.analysis import Analysis
from passes.coarse.copied_blocks import UnitsOptions
from passes.coarse.last_layers import LayersOptions
from passes.errors import PartitionError
from passes.options import Options
from passes.plan.estimate import BOTTLENECKS, find_bottleneck
from passes.plan.num_stages import cut_and_plan
from tests.models.builders import ResidualMLP
from tests.support.programs import analyze_model


def trunk(blocks: int, width: int = 16, wide: int = 128) -> Analysis:
    model = nn.Sequential(*[ResidualMLP(width, wide) for _ in range(blocks)])
    return analyze_model(model, torch.randn(4, width))


def test_the_plan_says_where_more_stages_stop_paying() -> None:
    options, plan = cut_and_plan(trunk(24), Options())
    note = plan.notes[-1]
    assert options.stages == len(plan.stages) > 1
    assert f"{len(plan.stages)} stages chosen" in note
    assert f"{plan.forecast.speedup:.2f} times" in note
    assert "more do not pay" in note
    assert any(words in note for words in BOTTLENECKS.values())


def test_copied_blocks_are_kept_at_any_number_unless_a_budget_is_asked_for() -> None:
    # Copies of a wide block make every interface of the sweep expensive.
    wide = trunk(24, wide=512)
    copied = cut_and_plan(wide, Options())[1]
    assert {stage.coarse.family for stage in copied.stages if stage.coarse} == {"units"}
    cheap = cut_and_plan(wide, Options(coarse_budget=0.02))[1]
    assert {stage.coarse.family for stage in cheap.stages if stage.coarse} == {"linear"}
    assert cheap.forecast.time < copied.forecast.time


@pytest.mark.parametrize("stages", ["auto", 6, 12])
def test_whole_copies_are_taken_where_a_stage_is_a_single_block(stages: Any) -> None:
    analysis = analyze_model(vgg16.build_model(width=8), torch.randn(2, 3, 32, 32))
    plan = cut_and_plan(analysis, Options(stages=stages))[1]
    corrections = [stage.coarse for stage in plan.stages if stage.coarse]
    assert all(spec.parameters > 100 for spec in corrections)  # more than a pooling
    options = [spec.options for spec in corrections]
    whole = (isinstance(one, UnitsOptions | LayersOptions) and one.width is None for one in options)
    assert all(whole)
    if stages != "auto":  # they cost much: more speed is asked for by name
        assert "coarse_width=0.25" in plan.notes[-1]
        assert "sweep='collapsed'" in plan.notes[-1]


def test_a_fixed_number_keeps_the_budget_and_has_no_note() -> None:
    options, plan = cut_and_plan(trunk(8), Options(stages=2, coarse_budget=0.5))
    assert options.coarse_budget == 0.5
    assert not any("chosen" in note for note in plan.notes)


def test_a_model_that_cannot_be_cut_says_why() -> None:
    class Whole(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(-1).cumsum(0)

    with pytest.raises(PartitionError, match="no legal cut"):
        cut_and_plan(analyze_model(Whole(), torch.randn(4, 3)), Options())


def test_calibration_keeps_the_note_and_the_budget() -> None:
    model = nn.Sequential(*[ResidualMLP(8, 64) for _ in range(8)])
    samples = [torch.randn(16, 8) for _ in range(5)]
    compiled = pnn.compile(model, torch.randn(4, 8), calibration=samples)
    assert sum("stages chosen" in note for note in compiled.plan.notes) == 1


@pytest.mark.parametrize(
    ("parts", "bottleneck"),
    [
        ({"fine": 2.5, "coarse": 0.01, "head": 0.0}, "none"),
        ({"fine": 2.5, "coarse": 0.9, "head": 0.0}, "coarse"),
        ({"fine": 5.0, "coarse": 0.9, "head": 0.0}, "fine"),
        ({"fine": 2.0, "coarse": 0.9, "head": 2.0}, "head"),
        ({"fine": 2.5, "coarse": 0.9, "head": 0.0, "link": 1.0}, "link"),
    ],
)
def test_the_bottleneck_is_what_is_lost_most(parts: dict[str, float], bottleneck: str) -> None:
    assert find_bottleneck(parts, 10.0, 4) == bottleneck
