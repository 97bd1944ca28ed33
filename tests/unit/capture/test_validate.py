"""How much of a captured graph is compared with the model, and what says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from passes.capture.ladder import capture
from passes.ir.program import VALIDATIONS, Validation
from pnn_compile.cli.compiling import compile_command

X = torch.randn(2, 4)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


class Twice(nn.Module):
    """Its gradient is not that of its outputs: an export drops it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 9:  # a trace refuses this
            return x
        return _Doubled.apply(self.layer(x))


class Modes(nn.Module):
    """Two modes, of which a trace sees one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y * 2 if self.training else y


@pytest.mark.parametrize(("validate", "runs"), [("full", 8), ("fast", 5), ("off", 3)])
def test_less_validation_takes_fewer_runs_and_no_gradients(
    validate: Validation, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    differentiated: list[bool] = []
    gradients = torch.autograd.grad

    def grad(*args: Any, **options: Any) -> Any:
        differentiated.append(True)
        return gradients(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    report = capture(nn.Sequential(nn.Linear(4, 4)), (X,), validate=validate).capture

    assert (report.validation, report.runs) == (validate, runs)
    assert report.compared.startswith(f"{validate}: {VALIDATIONS[validate]}; {runs} runs in ")
    assert bool(differentiated) == (validate == "full")


@pytest.mark.parametrize("validate", ["full", "fast", "off"])
def test_modes_and_batch_sizes_are_right_in_any_case(validate: Validation) -> None:
    model = Modes()
    program = capture(model, (X,), validate=validate)

    assert program.dynamic == ("batch",)
    for mode in (True, False):
        torch.testing.assert_close(
            program.module.train(mode)(torch.ones(5, 4)), model.train(mode)(torch.ones(5, 4))
        )


@pytest.mark.parametrize("validate", ["full", "fast", "off"])
def test_a_backward_of_its_own_is_kept_in_any_case(validate: Validation) -> None:
    model = Twice()
    program = capture(model, (X,), validate=validate)

    for module in (model, program.module):
        module(X).sum().backward()
    torch.testing.assert_close(
        program.module.get_parameter("layer.weight").grad, model.layer.weight.grad
    )


def test_an_artifact_says_that_less_was_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    full = pnn.compile(layers, X, stages=2)
    fast = pnn.compile(layers, X, stages=2, validate="fast")
    full.save(tmp_path / "full")
    fast.save(tmp_path / "fast")

    assert "full: outputs, buffers and gradients" in pnn.load(tmp_path / "full").report()
    assert not caplog.text
    assert "fast: outputs and buffers" in pnn.load(tmp_path / "fast").report()
    assert "by less than validate='full' (fast: outputs and buffers" in caplog.text
    assert fast.verify().ok


def test_other_words_are_refused() -> None:
    with pytest.raises(pnn.OptionError, match="validate must be full, fast, off"):
        pnn.compile(nn.Linear(4, 4), X, validate="some")  # type: ignore[arg-type]


def test_the_command_line_has_the_same_words() -> None:
    (option,) = (option for option in compile_command.params if option.name == "validate")
    assert list(option.type.choices) == list(VALIDATIONS)  # type: ignore[attr-defined]
