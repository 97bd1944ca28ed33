"""Calibration and fit on a small model that is trained first."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import pnn_compile as pnn
from examples import decoder, resnet110
from passes.coarse.regression import Moments
from pnn_compile.cli import main
from pnn_compile.fit import regression_sweep
from pnn_compile.fit.metrics import agreement
from pnn_compile.inputs import device_of, named_batch
from pnn_compile.report.terminal import calibration_table, to_text
from tests.models.builders import Shifts, block_list
from tests.support.programs import copies


@cache
def _samples() -> torch.Tensor:
    """Smooth images, so that there is something to learn from few samples."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(320, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")


@pytest.fixture
def samples() -> torch.Tensor:
    return _samples()


def _network() -> nn.Module:
    torch.manual_seed(0)
    return resnet110.build_model(units_per_group=2, width=4).eval()


@copies
def _compiled(**options: Any) -> pnn.Compiled:
    options = {"stages": 3, "coarse_budget": 1.0} | options
    return pnn.compile(_network(), _samples()[:2], **options)


@pytest.mark.parametrize(
    ("family", "correction"),
    [
        ("linear", "residual"),
        ("lowrank", "difference"),
        pytest.param("linear+lowrank", "residual", marks=pytest.mark.slow),
        pytest.param("lowrank+linear+conv", "residual", marks=pytest.mark.slow),
        ("lowrank+linear+conv", "difference"),
    ],
)
def test_every_stage_gets_closer_to_the_original(
    samples: torch.Tensor, family: str, correction: str
) -> None:
    compiled = _compiled(coarse=family, preprocess="lowrank+linear", correction=correction, rank=16)
    report = pnn.calibrate(compiled, list(samples.split(32)))
    for face in report.interfaces:
        assert face.guess_after < 0.9 * face.guess_before
        assert face.corrected_after < face.uncorrected
        assert face.corrected_after < face.corrected_before
    assert report.output_error_after < 0.5 * report.output_error_before
    assert (report.fitted, report.held_out) == (256, 64)
    assert compiled.verify().ok


def test_a_collapsed_sweep_is_calibrated_too(samples: torch.Tensor) -> None:
    compiled = _compiled(
        coarse="lowrank+linear", preprocess="lowrank+linear", sweep="collapsed", rank=16
    )
    report = pnn.calibrate(compiled, list(samples.split(32)))
    *middle, last = report.interfaces
    assert all(face.corrected_after == face.uncorrected for face in middle)
    assert last.corrected_after < 0.9 * last.uncorrected
    assert last.corrected_after < last.corrected_before
    assert report.output_error_after < 0.5 * report.output_error_before
    with torch.no_grad():
        result = compiled.module.eval()(samples[-32:])
        expected = compiled.sequential.eval()(samples[-32:])
    error = ((result - expected).norm() / expected.norm()).item()
    assert error == pytest.approx(report.output_error_after, rel=0.5)
    assert compiled.verify().ok


def test_the_fine_stages_and_modes_are_left_alone(samples: torch.Tensor) -> None:
    compiled = _compiled(coarse="linear+lowrank")
    before = {key: value.clone() for key, value in compiled.original_state_dict().items()}
    compiled.module.train()
    pnn.calibrate(compiled, list(samples.split(32)))
    assert compiled.module.training
    for key, value in compiled.original_state_dict().items():
        assert torch.equal(value, before[key]), key


def test_calibration_is_deterministic(samples: torch.Tensor) -> None:
    reports = [
        pnn.calibrate(_compiled(coarse="lowrank"), list(samples.split(32))) for _ in range(2)
    ]
    assert reports[0] == reports[1]


def test_states_in_memory_and_on_disk_give_the_same(
    samples: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pnn.calibrate(_compiled(), list(samples.split(32)))
    for limit in (10**9, 10**6):
        monkeypatch.setattr(regression_sweep, "_memory_limit", lambda device, limit=limit: limit)
        assert pnn.calibrate(_compiled(), list(samples.split(32))) == expected


def test_a_causal_model_stays_causal() -> None:
    torch.manual_seed(0)
    model = decoder.build_model(layers=4, width=16, context=16).eval()
    tokens = torch.randint(256, (64, 16))
    compiled = pnn.compile(
        model, tokens[:2], stages=2, coarse="lowrank+linear", preprocess="lowrank+linear"
    )
    pnn.calibrate(compiled, list(tokens.split(16)))
    changed = tokens[:2].clone()
    changed[:, 8:] = 0
    with torch.no_grad():
        first, second = compiled.module.eval()(tokens[:2]), compiled.module(changed)
    torch.testing.assert_close(first[:, :8], second[:, :8])


def test_one_batch_is_too_few(samples: torch.Tensor) -> None:
    with pytest.raises(pnn.OptionError, match="at least two batches"):
        pnn.calibrate(_compiled(), [samples])


def test_a_generator_is_too_short(samples: torch.Tensor) -> None:
    with pytest.raises(pnn.OptionError, match=r"got a generator.*pass list\(batches\)"):
        pnn.calibrate(_compiled(), (batch for batch in samples.split(32)))


def _plain(*first: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*first, *block_list(4, 8))


def _rows(count: int = 4) -> list[torch.Tensor]:
    return list(torch.randn(16 * count, 8, generator=torch.Generator().manual_seed(0)).split(16))


def test_arguments_go_by_the_names_that_users_see() -> None:
    compiled = pnn.compile(_plain(), torch.randn(2, 8), stages=2)
    assert [node.name for node in compiled.program.inputs] != ["input"]  # fx renames it
    rows = _rows()
    assert pnn.calibrate(compiled, [{"input": x} for x in rows]).held_out == 16
    assert pnn.fit(compiled, rows).samples == 64
    assert pnn.fit(compiled, [{"input": x} for x in rows]).samples == 64
    with pytest.raises(pnn.OptionError, match="a batch lacks input: pass"):
        pnn.calibrate(compiled, [{"input_1": x} for x in rows])


@pytest.mark.parametrize("first", [Shifts(), nn.ReLU(inplace=True)])
def test_batches_are_left_as_they_are(first: nn.Module) -> None:
    compiled = pnn.compile(_plain(first), torch.randn(2, 8), stages=2, coarse="exact")
    batches, expected = _rows(), _rows()
    pnn.calibrate(compiled, batches)
    named_batch(compiled, batches[0])["input"].zero_()

    def close(outputs: torch.Tensor, target: torch.Tensor, batch: object) -> torch.Tensor:
        torch.testing.assert_close(target, compiled.sequential(batch).detach())
        return (outputs - target).square().mean()

    pnn.fit(compiled, batches[:1], loss=close)
    for batch, before in zip(batches, expected, strict=True):
        assert torch.equal(batch, before)


def test_batches_follow_the_network_to_its_device() -> None:
    compiled = pnn.compile(_plain(), torch.randn(2, 8), stages=2)
    compiled.module.to("meta")
    assert named_batch(compiled, torch.randn(2, 8))["input"].device.type == "meta"
    assert device_of(nn.Identity()).type == "cpu"


class Classes(nn.Module):
    """Gives whole numbers, and nothing where there might be something."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _plain()

    def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, self.body(x).argmax(-1)


def test_whole_outputs_agree_where_they_are_equal() -> None:
    compiled = pnn.compile(Classes(), torch.randn(4, 8), stages=2, coarse="linear")
    report = pnn.calibrate(compiled, _rows(10))
    assert report.agreement_before is not None
    assert report.agreement_after is not None
    assert 0 <= report.agreement_before <= report.agreement_after <= 1
    assert report.agreement_after > 0.5


def test_a_fit_brings_the_outputs_closer(samples: torch.Tensor) -> None:
    compiled = _compiled(coarse="linear")
    batches = list(samples.split(32))
    pnn.calibrate(compiled, batches)
    report = pnn.fit(compiled, batches, epochs=3)
    assert report.steps == 30
    assert report.samples == 3 * len(samples)
    assert report.last_loss < report.first_loss


def test_an_interrupted_fit_goes_on_bit_for_bit(samples: torch.Tensor, tmp_path: Path) -> None:
    batches = list(samples.split(32))
    whole = _compiled(coarse="linear")
    pnn.fit(whole, batches, epochs=2)

    class Interrupted(Exception):
        pass

    def stop(step: int, total: int, loss: float) -> None:
        if step == 13:
            raise Interrupted

    file = tmp_path / "fit.pt"
    halved = _compiled(coarse="linear")
    with pytest.raises(Interrupted):
        pnn.fit(halved, batches, epochs=2, checkpoint=file, checkpoint_every=5, progress=stop)
    again = _compiled(coarse="linear")
    report = pnn.fit(again, batches, epochs=2, checkpoint=file)
    assert report.steps == 20
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[key]), key


def test_a_fit_takes_any_loss_and_refuses_nonsense(samples: torch.Tensor) -> None:
    compiled = _compiled()
    batches = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in samples.split(32)]

    def task_loss(outputs: torch.Tensor, wanted: torch.Tensor, batch: object) -> torch.Tensor:
        assert isinstance(batch, tuple)
        return nn.functional.cross_entropy(outputs, batch[1])

    assert pnn.fit(compiled, batches, loss=task_loss).last_loss < 2.3
    with pytest.raises(pnn.OptionError, match="empty"):
        pnn.fit(compiled, [])
    with pytest.raises(pnn.OptionError, match="nan"):
        pnn.fit(compiled, batches, loss=lambda *_: torch.tensor(float("nan")))


def test_a_fit_leaves_modes_gradients_and_random_state(tmp_path: Path) -> None:
    compiled = pnn.compile(_plain(nn.Dropout(0.5)), torch.randn(2, 8), stages=2)
    modes = {name: "fine_0" in name for name, _ in compiled.module.named_modules()}
    for name, module in compiled.module.named_modules():
        module.training = modes[name]
    file = tmp_path / "fit.pt"
    pnn.fit(compiled, _rows(), checkpoint=file)
    assert {n: m.training for n, m in compiled.module.named_modules()} == modes
    assert all(parameter.grad is None for parameter in compiled.module.parameters())

    torch.manual_seed(7)
    before = torch.get_rng_state()
    pnn.fit(compiled, _rows(), epochs=2, checkpoint=file)  # goes on where the other stopped
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fit_follows_a_network_that_was_converted() -> None:
    class Mixes(nn.Module):
        mixing: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.body = _plain()
            self.register_buffer("mixing", torch.eye(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x @ self.mixing)

    compiled = pnn.compile(Mixes(), torch.randn(2, 8), stages=2)
    compiled.module.double()
    assert pnn.fit(compiled, [x.double() for x in _rows()]).steps == 4


def test_a_fit_takes_a_scalar_for_its_first_input() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = _plain()

        def forward(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) * scale

    scale = torch.tensor(2.0)
    compiled = pnn.compile(Scaled(), (scale, torch.randn(4, 8)), stages=2)
    assert pnn.fit(compiled, [(scale, x) for x in _rows()]).samples == 64


def test_a_fit_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    compiled = pnn.compile(_plain(), torch.randn(2, 8), stages=2)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"learning_rate": -1.0}, "learning rate must be above 0"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"epochs": "1"}, "epochs must be above 0, parts of one too .got '1'"),
        ({"clip_norm": 0}, "clip_norm must be above 0, or None"),
        ({"checkpoint_every": 0}, "checkpoint_every must be finite and at least 1"),
        ({"checkpoint": tmp_path / "no" / "fit.pt"}, "no is not a directory, make it first"),
        ({"checkpoint": tmp_path}, "a directory: name a file in it"),
    )
    for options, message in cases:
        with pytest.raises(pnn.OptionError, match=message):
            pnn.fit(compiled, _rows(), **options)
    with pytest.raises(pnn.OptionError, match="calibration needs a list of batches"):
        compiled.calibrate(3)  # type: ignore[arg-type]
    compiled.module.requires_grad_(False)
    with pytest.raises(pnn.OptionError, match="no parameter that requires a gradient"):
        pnn.fit(compiled, _rows())


def test_calibrate_and_fit_on_the_command_line(
    samples: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    data, out = tmp_path / "data.safetensors", tmp_path / "out"
    save_file({"images": samples.contiguous()}, data)
    model = tmp_path / "small.py"
    model.write_text(
        "from examples import resnet110\n"
        "def build_model():\n    return resnet110.build_model(units_per_group=2, width=4)\n"
        "def example_inputs():\n    return resnet110.example_inputs(size=8)\n"
    )
    words = [str(model), "-n", "3", "--coarse", "linear+lowrank", "--calibrate", str(data)]
    assert main([*words, "-o", str(out)]) == 0
    assert "agreement of the outputs" in capsys.readouterr().out
    assert main(["fit", str(out), str(data)]) == 0
    assert "5 steps on 320 samples" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    "correction", [pytest.param("residual", marks=pytest.mark.slow), "difference"]
)
def test_batchnorm_is_recalibrated_where_that_helps_and_the_report_says_so(
    samples: torch.Tensor, correction: Literal["residual", "difference"]
) -> None:
    model = _network().train()
    for _ in range(20):
        model(samples[:128])  # statistics of its own
    compiled = pnn.compile(
        model.eval(), samples[:2], stages=3, coarse="thinned", preprocess="lowrank+linear",
        correction=correction, coarse_budget=1.0,
    )  # fmt: skip
    shifted = [m for m in compiled.operators.coarse[2].modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in shifted:
        assert layer.running_var is not None
        layer.running_var.mul_(1e-3)
    fine = [buffer.clone() for buffer in compiled.stages.fine[1].buffers()]
    report = pnn.calibrate(compiled, list(samples.split(32)))
    assert "coarse_2" in report.recalibrated
    assert "re-estimated: " in to_text(calibration_table(report), 500)
    for before, after in zip(fine, compiled.stages.fine[1].buffers(), strict=True):
        assert torch.equal(before, after)
    again = pnn.calibrate(compiled, list(samples.split(32)))
    assert "coarse_2" not in again.recalibrated
    assert again.output_error_before == pytest.approx(report.output_error_after, rel=1e-3)


def test_the_oracle_family_keeps_the_statistics_of_the_fine_stages(samples: torch.Tensor) -> None:
    compiled = _compiled(coarse="exact", correction="difference")
    before = {key: value.clone() for key, value in compiled.original_state_dict().items()}
    report = pnn.calibrate(compiled, list(samples.split(32)))
    assert not any(name.startswith("coarse") for name in report.recalibrated)
    for key, value in compiled.original_state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_loader_that_shuffles_is_refused(samples: torch.Tensor) -> None:
    loader = DataLoader(list(samples), batch_size=32, shuffle=True)  # type: ignore[arg-type,var-annotated]
    with pytest.raises(pnn.OptionError, match="does not shuffle"):
        pnn.calibrate(_compiled(coarse="linear"), loader)


def test_samples_that_are_not_finite_are_named() -> None:
    rows = _rows()
    rows[0][0, 0] = torch.nan
    with pytest.raises(pnn.OptionError, match="not finite"):
        pnn.compile(_plain(), rows[1][:2], stages=2, coarse_budget=1.0, calibration=rows)


def test_several_iterations_are_judged_as_they_run(samples: torch.Tensor) -> None:
    batches = list(samples.split(32))
    for stages, iterations in ((3, 2), (2, 2)):
        compiled = _compiled(
            stages=stages, coarse="linear", preprocess="lowrank", iterations=iterations
        )
        report = pnn.calibrate(compiled, batches)
        with torch.no_grad():
            result = torch.cat([compiled.module.eval()(x) for x in batches[4::5]])
            expected = torch.cat([compiled.sequential.eval()(x) for x in batches[4::5]])
        error = ((result - expected).norm() / expected.norm()).item()
        assert report.output_error_after == pytest.approx(error, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_few_samples_of_many_features_have_the_solution_of_the_full_decomposition(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(24, 200), torch.randn(24, 7)

    def solve() -> list[torch.Tensor]:
        moments = Moments(200, 7, device=torch.device("cpu"), bias=bias)
        moments.add(x[:20], y[:20])
        moments.add(x[20:], y[20:], held_out=True)
        return [moments.solve(rank).weight for rank in (None, 3)]

    decomposed = torch.linalg.eigh
    sizes: list[int] = []

    def count(matrix: torch.Tensor) -> Any:
        sizes.append(len(matrix))
        return decomposed(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", count)
    few = solve()
    monkeypatch.setattr("passes.coarse.regression._SPARSE", 1000)
    for one, other in zip(few, solve(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert sizes == [28, 200]


def test_features_without_variance_are_fitted() -> None:
    moments = Moments(4, 3, device=torch.device("cpu"))
    x, y = torch.ones(32, 4), torch.randn(32, 3)
    moments.add(x, y)
    solution = moments.solve(2)
    torch.testing.assert_close(
        solution.weight @ x[0].double() + solution.bias, y.double().mean(0), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("shape", [(6, 1), (6,), (6, 5), (6, 4, 3), (6, 3, 2, 2)])
def test_agreement_looks_along_the_classes(shape: tuple[int, ...]) -> None:
    right = torch.randn(shape)
    result = agreement(-right, right)
    if shape in ((6, 1), (6,)):
        assert result is None
        return
    assert agreement(right, right) == 1
    axis = 1 if len(shape) > 3 else -1
    assert result == (right.argmax(axis) == right.argmin(axis)).double().mean().item()
