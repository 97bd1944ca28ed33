"""Iterations one by one: the numbers of the assembled network, the estimate, the dial."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree as pytree

import pnn_compile as pnn
from examples import resnet110
from passes.ir.isolation import preserved
from passes.transform.assemble import assemble
from pnn_compile.cli import main
from pnn_compile.evaluate.error_estimate import estimated_errors
from pnn_compile.evaluate.iterate import DialRow
from tests.models.builders import residual_chain
from tests.models.zoo import by_name
from tests.support.parameters import grid
from tests.support.programs import call, copies

STAGES = 4
MODELS = (
    "resnet", "unet", "dense_block", "many_inputs_outputs", "keyword_arguments", "lstm",
    "boolean_mask_encoder", "encoder_decoder",
)  # fmt: skip


@functools.cache
def _compiled(name: str, **options: Any) -> pnn.Compiled:
    case = by_name(name)
    torch.manual_seed(0)
    return pnn.compile(
        case.build(), args=case.args(2), kwargs=case.kwargs(2), stages=STAGES, **options
    )


def _flow(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*residual_chain(12, 8, scale=0.5), *last)


def _rows(count: int = 512) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(0))


def _calibrated(model: nn.Module, x: torch.Tensor, **options: Any) -> pnn.Compiled:
    compiled = pnn.compile(
        model, x[:2], stages=STAGES, coarse="linear", coarse_budget=1.0, **options
    )
    pnn.calibrate(compiled, list(x.split(64)))
    compiled.module.eval()
    return compiled


@copies
def _calibrated_flow(*, head: bool = True) -> pnn.Compiled:
    return _calibrated(_flow(nn.Linear(8, 3)) if head else _flow(), _rows())


# --- the numbers of the network -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "correction", "train"), grid(MODELS, ("residual", "difference"), (False, True))
)
def test_k_iterations_are_those_of_the_assembled_network(
    name: str, correction: str, train: bool
) -> None:
    coarse = "conv" if name in ("resnet", "unet") else "auto"
    compiled = _compiled(name, correction=correction, coarse=coarse)
    compiled.module.train(train)
    inputs = call(name, 3)
    before = {key: value.clone() for key, value in compiled.module.state_dict().items()}
    for iterations in range(1, STAGES + 2):
        plan = dataclasses.replace(compiled.plan, iterations=iterations)
        network = assemble(compiled.program, plan, compiled.stages, compiled.operators)
        torch.manual_seed(0)
        with preserved(network), torch.no_grad():
            wanted = network.train(train)(**call(name, 3))
        torch.manual_seed(0)
        found = compiled.iterate(inputs, iterations=iterations)
        assert found.iterations == min(iterations, STAGES)
        assert found.exact == (iterations >= STAGES)
        assert found.estimates.shape == found.increments.shape == (found.iterations, 3)
        pairs = zip(pytree.tree_leaves(found.outputs), pytree.tree_leaves(wanted), strict=True)
        for a, b in pairs:
            assert torch.equal(a, b)
    for key, value in compiled.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(module.training == train for module in compiled.module.modules())


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_it_does_not_matter_for_how_many_iterations_it_was_compiled(iterations: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, 8)
    compiled = _compiled("resnet", iterations=iterations)
    compiled.module.eval()
    with torch.no_grad():
        assert torch.equal(pnn.iterate(compiled, x).outputs, compiled.module(x))
    one = _compiled("resnet")
    one.module.eval()
    found = compiled.iterate(x, iterations=STAGES)
    assert torch.equal(found.increments, one.iterate(x, iterations=STAGES).increments)
    assert torch.equal(found.outputs, compiled.sequential(x))


def test_a_collapsed_sweep_is_run_once() -> None:
    x = torch.randn(5, 3, 8, 8)
    compiled = _compiled("resnet", sweep="collapsed", coarse="linear")
    compiled.module.eval()
    found = compiled.iterate(x)
    with torch.no_grad():
        assert torch.equal(found.outputs, compiled.module(x))
    assert found.iterations == 1
    assert (found.increments > 0).all()
    refused: list[dict[str, Any]] = [{"iterations": 2}, {"tolerance": 0.1}]
    for options in refused:
        with pytest.raises(pnn.OptionError, match=r"one iteration.*compile with sweep='chain'"):
            compiled.iterate(x, **options)
    assert [row.iterations for row in compiled.dial([x])] == [1]


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"iterations": 0}, "iterations must be at least 1 .got 0."),
    ({"tolerance": 0.0}, "tolerance must be above 0 .got 0.0."),
    ({"tolerance": float("nan")}, "tolerance must be above 0 .got nan."),
)


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    compiled = pnn.compile(_flow(), _rows(2), stages=2)
    with pytest.raises(pnn.OptionError, match=message):
        compiled.iterate(_rows(2), **options)


# --- the estimate ---------------------------------------------------------------------------------


def test_increments_are_what_each_iteration_changed() -> None:
    model, x = _flow(), _rows(6)
    outputs = []
    for iterations in range(1, STAGES + 1):
        options: dict[str, Any] = {"coarse": "linear", "iterations": iterations}
        outputs.append(pnn.compile(model, x, stages=STAGES, **options).module(x).detach())
    outputs.insert(0, pnn.compile(model, x, stages=STAGES, coarse="zero").module(x).detach())
    compiled = pnn.compile(model, x, stages=STAGES, coarse="linear")
    assert not compiled.plan.head.nodes  # the outputs are the last state
    found = compiled.iterate(x, iterations=STAGES)
    for k in range(STAGES):
        change = (outputs[k + 1] - outputs[k]).double().norm(dim=1)
        wanted = change / outputs[k + 1].double().norm(dim=1)
        torch.testing.assert_close(found.increments[k], wanted, rtol=1e-4, atol=1e-6)


def test_each_sample_is_judged_by_itself() -> None:
    compiled = _calibrated_flow()
    together = compiled.iterate(_rows(4), iterations=3)
    for sample in range(4):
        alone = compiled.iterate(_rows(4)[sample : sample + 1], iterations=3)
        torch.testing.assert_close(
            alone.estimates[:, 0], together.estimates[:, sample], rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize(
    ("increments", "estimates"),
    [
        ([0.5], [0.5]),
        ([0.5, 0.1], [0.5, 0.1 * 0.25]),  # contracts by 5: 0.1 (0.2 + 0.04 + ...)
        ([0.5, 0.4], [0.5, 0.4]),  # hardly contracts
        ([0.5, 0.6], [0.5, 0.6]),
        ([0.5, 0.1, 0.1, 0.3], [0.5, 0.025, 0.1, 0.0]),  # iterate N is exact
        ([0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.1], [0.0, 0.1]),
    ],
)
def test_the_estimate_sums_the_increments_to_come(
    increments: list[float], estimates: list[float]
) -> None:
    found = estimated_errors(torch.tensor(increments)[:, None], stages=4)
    torch.testing.assert_close(found[:, 0], torch.tensor(estimates))


def _spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_the_estimate_follows_the_true_error_where_it_contracts() -> None:
    compiled = _calibrated_flow(head=False)
    x = _rows(200) * torch.linspace(0.2, 2, 200)[:, None]
    original = compiled.sequential(x).detach()
    found = compiled.iterate(x, iterations=STAGES - 1)
    means = []
    for k in range(1, STAGES):
        outputs = compiled.iterate(x, iterations=k).outputs
        true = (outputs - original).norm(dim=1) / original.norm(dim=1)
        means.append(float(true.mean()))
        estimate = found.estimates[k - 1].to(true.dtype)
        assert _spearman(estimate, true) > 0.55
        assert 0.5 < (estimate / true).median() < 10
    assert means[2] < 0.2 * means[1] < 0.2 * means[0]


def test_the_estimate_tells_hard_samples_where_it_does_not_contract() -> None:
    torch.manual_seed(0)
    small = torch.randn(520, 3, 4, 4)
    x = nn.functional.interpolate(small, size=(8, 8), mode="bilinear")
    model = resnet110.build_model(units_per_group=3, width=4).eval()
    compiled = _calibrated(model, x[:320], preprocess="lowrank+linear")
    exact = compiled.iterate(x[320:], iterations=STAGES)
    estimates = exact.estimates
    assert (estimates[STAGES - 1] == 0).all()
    # The last increment is the true error of the iterate before it, up to rounding.
    true = exact.increments[STAGES - 1]
    assert _spearman(estimates[STAGES - 2], true) > 0.4
    assert 0.5 < (estimates[STAGES - 2] / true).median() < 3


def test_a_tolerance_stops_as_soon_as_every_sample_is_below_it() -> None:
    compiled = _calibrated_flow(head=False)
    x = _rows(32)
    estimates = compiled.iterate(x, iterations=STAGES).estimates
    worst = estimates.max(1).values.tolist()
    assert worst[0] > worst[1] > worst[2] > worst[3] == 0
    for k in range(STAGES - 1):
        found = compiled.iterate(x, tolerance=worst[k] * 1.001)
        assert found.iterations == k + 1
        assert torch.equal(found.estimates, estimates[: k + 1])
    to_the_end = compiled.iterate(x, tolerance=1e-30)
    assert to_the_end.exact
    assert torch.equal(to_the_end.outputs, compiled.sequential(x))
    assert compiled.iterate(x, tolerance=1e-30, iterations=2).iterations == 2
    assert compiled.iterate(x).iterations == compiled.plan.iterations == 1


# --- times and the dial ---------------------------------------------------------------------------


@functools.cache
def _plan(stages: int, iterations: int, cost: Any) -> pnn.Plan:
    options: dict[str, Any] = {"correction": "difference", "coarse": "conv"}
    model = resnet110.build_model(units_per_group=1, width=4)
    return pnn.compile(
        model, torch.randn(2, 3, 8, 8), stages=stages, cost=cost, iterations=iterations,
        coarse_budget=1.0, **options,
    ).plan  # fmt: skip


def _one_more(node: object, flops: float) -> float:
    return 1.0 + flops


@pytest.mark.parametrize(
    ("stages", "compiled_for", "cost"), grid((3, 1, 2), (1, 2, 3), ("flops", _one_more))
)
def test_forecasts_are_those_of_a_network_compiled_for_k(
    stages: int, compiled_for: int, cost: Any
) -> None:
    found = _plan(stages, compiled_for, cost).forecasts(stages)
    for iterations, forecast in enumerate(found, 1):
        wanted = _plan(stages, iterations, cost).forecast
        assert forecast.unit == wanted.unit
        figures = [dataclasses.astuple(one)[1:] for one in (forecast, wanted)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-9)


def test_the_dial_ends_at_the_original() -> None:
    compiled = _calibrated_flow()
    compiled.module.train()
    rows = compiled.dial(batch for batch in _rows(96).split(32))  # a generator will do
    assert compiled.module.training
    assert [row.iterations for row in rows] == [1, 2, 3, 4]
    errors = [row.output_error for row in rows]
    assert errors == sorted(errors, reverse=True)
    last = rows[-1]
    assert (last.estimate_mean, last.estimate_p95, last.output_error) == (0, 0, 0)
    assert last.agreement == 1
    for row in rows[:-1]:
        assert 0 < row.estimate_mean < row.estimate_p95
        assert row.samples == 96
    speedups = [row.speedup for row in rows]
    assert speedups == sorted(speedups, reverse=True)
    assert rows[0].speedup == pytest.approx(compiled.plan.forecast.speedup)
    times = compiled.iterate(_rows(2), iterations=STAGES).times
    wanted = [compiled.plan.forecast.sequential / row.speedup for row in rows]
    assert times == pytest.approx(wanted)


class WritingHead(nn.Module):
    """A head that writes into the state that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _flow()
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x).relu_())


def test_the_dial_counts_outputs_as_iterate_gives_them() -> None:
    compiled = _calibrated(WritingHead(), _rows())
    x = _rows(16)
    original = compiled.sequential(x).detach()
    for row in compiled.dial([x]):
        outputs = compiled.iterate(x, iterations=row.iterations).outputs
        error = (outputs - original).norm() / original.norm()
        assert row.output_error == pytest.approx(float(error), rel=1e-4, abs=1e-9)


def test_the_dial_needs_samples() -> None:
    compiled = pnn.compile(_flow(), _rows(2), stages=2)
    with pytest.raises(pnn.OptionError, match="at least one batch"):
        compiled.dial([])


def test_the_dial_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "out", tmp_path / "data.safetensors"
    _calibrated_flow().save(out)
    save_file({"input": _rows(96)}, data)
    assert main(["dial", str(out), str(data), "--batch", "32"]) == 0
    text = capsys.readouterr().out
    assert "on 96 samples" in text
    assert "100.0%" in text
    assert main(["dial", str(out), str(data), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["iterations"] for row in document] == [1, 2, 3, 4]
    assert set(document[0]) == {field.name for field in dataclasses.fields(DialRow)}
    assert main(["dial", str(out), str(tmp_path / "none.npz")]) == 2
