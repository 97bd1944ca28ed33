"""The terminal report: what it says, and that it fits."""

import dataclasses

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import decoder
from pnn_compile.export.graph_formats import format_count
from pnn_compile.report.terminal import checks_table, stage_tree, to_text
from tests.models.builders import linear_chain


@pytest.mark.parametrize("width", [50, 80, 100, 160])
def test_the_report_fits_the_terminal(unet_compiled: pnn.Compiled, width: int) -> None:
    assert all(len(line) <= width for line in unet_compiled.report(width).splitlines())


def test_the_report_says_what_was_decided(unet_compiled: pnn.Compiled) -> None:
    text = unet_compiled.report(160)
    for stage in unet_compiled.plan.stages:
        assert stage.first_module in text
        assert format_count(stage.flops) in text
    for word in ("imbalance", "serial share", "speed-up", "bound", "linear", "convolution"):
        assert word in text


def test_measured_costs_add_a_column_of_times() -> None:
    model = linear_chain(8, 64)
    compiled = pnn.compile(model, torch.randn(8, 64), stages=2, cost="measured")
    assert " time " in compiled.report(160)
    assert compiled.plan.forecast.unit == "seconds"


def test_shared_parameters_are_named() -> None:
    model = decoder.build_model(layers=4, width=32)
    compiled = pnn.compile(model, decoder.example_inputs(), stages=2)
    assert "token_embedding.weight (stages 0, head)" in compiled.report(160)


def test_the_tree_shows_each_stage_with_its_operators(unet_compiled: pnn.Compiled) -> None:
    text = to_text(stage_tree(unet_compiled), 120)
    for name in ("fine_0", "preprocess_1", "coarse_2", "head", "up.0"):
        assert name in text


def test_the_table_of_checks_shows_failures(unet_compiled: pnn.Compiled) -> None:
    assert to_text(checks_table(unet_compiled.verify())).count("passed") == 7


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (999.7, "1k"), (1e6, "1M"), (1.234e9, "1.23G")]
)
def test_counts_carry_a_prefix(number: float, text: str) -> None:
    assert format_count(number) == text


HOSTILE = "a[/bold]b[red]\x1b[2J:smile:"


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.get_submodule(HOSTILE)(x))


def test_names_are_neither_markup_nor_codes() -> None:
    compiled = pnn.compile(
        nn.Sequential(*(_Named() for _ in range(4))), torch.randn(2, 8), stages=2
    )
    hostile = dataclasses.replace(compiled.plan, model=HOSTILE, notes=(HOSTILE,))
    compiled = dataclasses.replace(compiled, plan=hostile)
    shown = r"a[/bold]b[red]\x1b[2J:smile:"
    for text in (compiled.report(160), to_text(stage_tree(compiled, 3), 120), repr(compiled)):
        assert shown in text
        assert all(line.isprintable() for line in text.splitlines())
    assert shown in str(pnn.PnnError(f"no module {HOSTILE}"))
