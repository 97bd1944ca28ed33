"""Windows: runs of stages one after another, each of which guesses from the state before it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import resnet110, unet
from examples.studies.networks import build_resnet
from passes.cost.device_profile import DeviceProfile
from passes.errors import ArtifactError, OptionError, RuntimeFault, SynthesisError
from passes.plan.schema import Plan
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Times, simulate
from passes.transform.executor import Executor
from passes.transform.sweep import Role, sweep
from pnn_compile.export.onnx import export_onnx, lower_network
from pnn_compile.inputs import named_batch
from pnn_compile.report.compare import compare
from pnn_compile.report.html import quick_forecast
from pnn_compile.report.page_data import timeline_data
from pnn_compile.runtime.engine import run_in_one_process
from pnn_compile.runtime.rank_pieces import RankPieces


class Residual(nn.Module):
    """Twelve residual layers of small branches, as a trained deep network has."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(12))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        result: torch.Tensor = self.head(x)
        return result


def _compiled(
    stages: int = 3, windows: int = 2, *, moved: bool = True, **options: Any
) -> tuple[pnn.Compiled, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Residual().double().eval(), torch.randn(6, 16).double()
    options = {"coarse": "linear"} | options
    compiled = pnn.compile(model, x, stages=stages, windows=windows, **options)
    for operator in compiled.operators.named().values() if moved else ():
        for parameter in operator.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return compiled, x


def test_guesses_read_the_state_before_their_window() -> None:
    reads = {
        step.stage: [*map(str, step.reads)]
        for step in sweep(6, windows=2)
        if step.role is Role.PREPROCESS
    }
    assert reads == {1: [], 2: [], 4: ["u_2"], 5: ["u_2"]}
    compiled, _ = _compiled()
    plan = compiled.plan
    assert (len(plan.stages), plan.windows, plan.devices) == (6, 2, 3)
    assert [n for n, stage in enumerate(plan.stages) if stage.preprocess is None] == [0, 3]
    [value] = plan.interfaces[2].state
    for number in (4, 5):
        spec = plan.stages[number].preprocess
        assert spec is not None
        assert spec.options.state == (value.name,)
        assert not spec.options.inputs


def test_formulas() -> None:
    compiled, x = _compiled()
    executor, inputs = Executor(compiled), named_batch(compiled, x)
    state = executor.fine(0, {}, inputs)
    corrected: dict[str, torch.Tensor] = {}
    for number in range(6):
        before, stage = corrected, compiled.plan.stages[number]
        if number in (0, 3):
            window = before
            corrected = executor.advance(number, before, executor.fine(number, before, inputs))
            continue
        guess = executor.guess(number, inputs, window)
        produced = executor.fine(number, guess, inputs)
        residual = [before[name] - guess[name] for name in stage.consumes]
        change = executor.correction(number, guess, residual, inputs)
        corrected = {name: produced[name] + value for name, value in change.items()}
    assert not torch.equal(*state.values(), *corrected.values())
    torch.testing.assert_close(compiled.module(x), executor.head(corrected, inputs))


@pytest.mark.parametrize("build", [resnet110.build_model, unet.build_model])
def test_every_oracle_holds(build: Any) -> None:
    torch.manual_seed(0)
    if build is unet.build_model:
        model, x = build(width=4), torch.randn(2, 1, 32, 32)
    else:
        model, x = build(3, 4), torch.randn(2, 3, 16, 16)
    compiled = pnn.compile(model, x, stages=2, windows=2, coarse="linear")
    assert compiled.verify().ok


def test_more_windows_keep_more() -> None:
    batches = [torch.randn(32, 16).double() for _ in range(10)]
    errors = []
    for windows in (1, 2, 4):
        compiled, _ = _compiled(3, windows, moved=False, calibration=batches)
        assert compiled.calibration is not None
        errors.append(compiled.calibration.output_error_after)
        assert compiled.calibration.output_error_after < compiled.calibration.output_error_before
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]


@pytest.mark.parametrize(
    ("stages", "windows", "ranks"), [(3, 2, 3), (2, 3, 2), (3, 4, 2), (3, 2, 1)]
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_ranks_equal_the_network(stages: int, windows: int, ranks: int, micro_batches: int) -> None:
    compiled, x = _compiled(stages, windows)
    _run_on_ranks(compiled, x, ranks, micro_batches)


def test_ranks_copy_what_changes_the_type() -> None:
    torch.manual_seed(0)
    model, x = build_resnet(9, 4, 3).double().eval(), torch.randn(4, 3, 16, 16).double()
    compiled = pnn.compile(model, x, stages=3, windows=3, preprocess="identity", coarse="identity")
    guess = compiled.plan.stages[4].preprocess
    assert guess is not None
    assert guess.options.entering == ("add_2",)
    compiled.module.eval()
    _run_on_ranks(compiled, x, 3, 2)


def _run_on_ranks(compiled: pnn.Compiled, x: torch.Tensor, ranks: int, micro_batches: int) -> None:
    """Check that ranks in one process give the outputs and gradients of the network."""
    expected = compiled.module(x)
    expected.square().mean().backward()
    gradients = {n: copy.copy(p.grad) for n, p in compiled.module.named_parameters()}
    compiled.module.zero_grad()
    plan = compiled.plan
    placement = pnn.runtime.place(len(plan.stages), ranks, plan.windows)
    engines = run_in_one_process(
        compiled,
        [RankPieces(compiled, placement, rank) for rank in range(ranks)],
        [named_batch(compiled, part) for part in x.chunk(micro_batches)],
        lambda outputs: torch.cat(outputs).square().mean(),
    )
    assert not any(engine.states or engine.adjoints for engine in engines)
    outputs = engines[placement[-1]].outputs
    torch.testing.assert_close(torch.cat([outputs[n] for n in range(micro_batches)]), expected)
    for name, parameter in compiled.module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_forecast_is_that_of_the_simulation() -> None:
    compiled, _ = _compiled(3, 4)
    plan, forecast = compiled.plan, compiled.plan.forecast
    step = simulate(schedule(plan.placement, Sweep.of(plan), backward=False), Times.of(plan))
    assert 0.9 * forecast.time < step.time <= 1.001 * forecast.time
    assert forecast.bound == pytest.approx(3, rel=0.1)
    with pytest.raises(RuntimeFault, match=r"in 4 windows: compile with stages=16, or start 3"):
        pnn.runtime.place(12, 4, 4)


def test_assess_sets_windows_beside_each_other() -> None:
    batches = [torch.randn(32, 16).double() for _ in range(10)]
    compiled, _ = _compiled(3, 1, moved=False, calibration=batches)
    verdict = compiled.assess(batches, windows=[2], iterations=1, coarse="linear")
    one, two = verdict.rows
    assert (one.windows, two.windows) == (1, 2)
    assert two.fidelity.error < one.fidelity.error
    assert two.speedup < one.speedup


def test_a_fit_learns_every_guess() -> None:
    batches = [torch.randn(32, 16).double() for _ in range(4)]
    compiled, _ = _compiled()
    report = pnn.fit(compiled, batches, epochs=1, interface_epochs=3)
    assert [row.stage for row in report.interfaces] == [1, 2, 4, 5]
    assert all(row.guess_last < row.guess_first for row in report.interfaces)


def test_artifact_and_onnx(tmp_path: Path) -> None:
    compiled, x = _compiled()
    expected = compiled.module(x).detach()
    folder = compiled.save(tmp_path / "net")
    loaded = pnn.load(folder)
    assert loaded.plan == compiled.plan
    assert torch.equal(loaded.module(x), expected)
    assert "6 stages in 2 windows" in repr(loaded)

    torch.manual_seed(0)
    single = Residual().eval()
    network = pnn.compile(single, x.float(), stages=3, windows=2, coarse="linear")
    lowered = lower_network(network)
    export_onnx(network, tmp_path / "net.onnx", lowered=lowered)  # which runs it, and compares
    export_onnx(network, tmp_path / "stages", per_stage=True, lowered=lowered)
    stored = onnx.load(tmp_path / "net.onnx")
    assert [*stored.configuration[0].device] == ["device_0", "device_1", "device_2"]
    for node in stored.graph.node:
        [place] = node.device_configurations
        [stage] = [int(p.value) for p in node.metadata_props if p.key == "pnn.stage"]
        assert place.pipeline_stage == network.plan.placement[stage]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    [found] = session.run(None, {"x": x.float().numpy()})
    np.testing.assert_allclose(found, network.module(x.float()).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("devices", [[], [pnn.load_profile("h100")] * 3])
def test_forecast_counts_the_devices_of_a_window(devices: list[DeviceProfile]) -> None:
    _, x = _compiled()
    cost = "roofline" if devices else "flops"
    table = pnn.forecast(
        Residual().double(), x, stages=[3], windows=2, coarse="linear", devices=devices, cost=cost
    )
    [row] = table.of("chain")
    assert (table.windows, row.stages, len(row.memory)) == (2, 3, 3)
    assert 1 < row.bound <= 3 or devices
    assert any("windows need sweep='chain'" in problem for problem in table.problems)
    once = pnn.forecast(
        Residual().double(), x, stages=[3], coarse="linear", devices=devices, cost=cost
    )
    assert once.windows == 1
    assert row.time > once.of("chain")[0].time


def test_a_plan_is_checked() -> None:
    compiled, _ = _compiled()
    text = json.loads(compiled.plan.to_json())
    for windows, problem in ((4, "plan.windows is 4: it should divide 6"), (3, "must be null")):
        text["windows"] = windows
        edited = Plan.from_json(json.dumps(text))
        with pytest.raises(ArtifactError, match=problem):
            pnn.compile(Residual().double(), torch.randn(6, 16).double(), plan=edited)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("window", None, "options.window is None; possible here: True"),
        ("inputs", ["x"], r"options.inputs\[0\] is 'x'; possible here: nothing"),
        ("sides", ["tanh"], r"options.sides\[0\] is 'tanh'; possible here: nothing"),
        ("copied", ["tanh", "tanh_1"], "options.copied is .* possible here: null"),
        ("sources", [{"shape": [6, 8]}], r"shape is \[6, 8\], and add_5 has the shape \[6, 16\]"),
    ],
)
def test_guesses_of_a_plan_take_the_state_alone(field: str, value: Any, problem: str) -> None:
    compiled, x = _compiled()
    text = json.loads(compiled.plan.to_json())
    options = text["stages"][4]["preprocess"]["options"]
    options[field] = [options[field][0] | value[0]] if field == "sources" else value
    edited = Plan.from_json(json.dumps(text))
    with pytest.raises(ArtifactError, match=problem):
        pnn.compile(Residual().double(), x, plan=edited)


def test_families_of_a_plan_fit() -> None:
    compiled, x = _compiled()
    text = json.loads(compiled.plan.to_json())
    text["stages"][4]["preprocess"]["family"] = "convolution"
    with pytest.raises(SynthesisError, match="'convolution' leads from one image-like tensor"):
        pnn.compile(Residual().double(), x, plan=Plan.from_json(json.dumps(text)))


def test_windows_in_comparison_forecast_and_timeline() -> None:
    three, _ = _compiled(2, 3)
    two, _ = _compiled(3, 2)
    changed = {
        change.name: (change.before, change.after)
        for change in compare(two.plan, three.plan).decisions
    }
    assert changed == {"windows": (2, 3)}
    table = quick_forecast(two)
    assert table is not None
    forecasts = {
        windows: two.forecast(cost="flops", stages=[3], micro_batches=(), windows=windows)
        for windows in (1, 2)
    }
    [found] = [row for row in table.rows if row.method == "chain" and row.stages == 3]
    assert found.time == forecasts[2].of("chain")[0].time > forecasts[1].of("chain")[0].time
    assert "windows: 1 in these rows, 2 in the network" in forecasts[1].notes
    step = timeline_data(two.plan)["steps"][0]
    assert len(step["idle"]) == two.plan.devices == 3


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"iterations": 2}, "iterations=1"),
        ({"sweep": "collapsed"}, "sweep='chain'"),
        ({"tolerance": 0.1}, "no tolerance"),
        ({"preprocess": "thinned"}, "preprocess='thinned' guesses from the inputs"),
        ({"windows": 0}, "windows must be"),
        ({"coarse": "time_step"}, "take iterations, not windows"),
        ({"cuts": ["layers.4", "layers.8"], "stages": "auto"}, "which 2 windows do not divide"),
        ({"devices": pnn.load_profile("h100")}, "leave devices="),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        _compiled(**({"stages": 3} | options))


def test_one_iteration() -> None:
    compiled, x = _compiled()
    with pytest.raises(OptionError, match="one iteration"):
        compiled.iterate(x, iterations=2)
    [row] = compiled.dial([x])
    assert row.iterations == 1
    assert dataclasses.replace(compiled.plan, windows=1).most_iterations == 6
