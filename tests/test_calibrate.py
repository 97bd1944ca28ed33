"""Calibration and fit on a small model that is trained first."""

from pathlib import Path

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import decoder, resnet110
from pnn_compile.cli import main


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    """Smooth images, so that there is something to learn from few samples."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(640, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return resnet110.build_model(units_per_group=3, width=4).eval()


def _compiled(samples: torch.Tensor, **options: object) -> pnn.Compiled:
    return pnn.compile(
        _network(),
        samples[:2],
        stages=3,
        coarse_budget=1.0,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("family", ["linear", "lowrank", "linear+lowrank", "lowrank+linear+conv"])
@pytest.mark.parametrize("correction", ["residual", "difference"])
def test_every_stage_gets_closer_to_the_original(
    samples: torch.Tensor, family: str, correction: str
) -> None:
    compiled = _compiled(
        samples, coarse=family, preprocess="lowrank+linear", correction=correction, rank=16
    )
    report = pnn.calibrate(compiled, list(samples.split(64)))
    for face in report.interfaces:
        assert face.guess_after < 0.9 * face.guess_before
        assert face.corrected_after < face.uncorrected
        assert face.corrected_after < face.corrected_before
    assert report.output_error_after < 0.5 * report.output_error_before
    assert (report.fitted, report.held_out) == (512, 128)
    assert compiled.verify().ok


def test_the_fine_stages_and_modes_are_left_alone(samples: torch.Tensor) -> None:
    compiled = _compiled(samples, coarse="linear+lowrank")
    before = {key: value.clone() for key, value in compiled.original_state_dict().items()}
    compiled.module.train()
    pnn.calibrate(compiled, list(samples.split(64)))
    assert compiled.module.training
    for key, value in compiled.original_state_dict().items():
        assert torch.equal(value, before[key]), key


def test_calibration_is_deterministic(samples: torch.Tensor) -> None:
    reports = [
        pnn.calibrate(_compiled(samples, coarse="lowrank"), list(samples.split(64)))
        for _ in range(2)
    ]
    assert reports[0] == reports[1]


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
        pnn.calibrate(_compiled(samples), [samples])


def test_a_fit_brings_the_outputs_closer(samples: torch.Tensor) -> None:
    compiled = _compiled(samples, coarse="linear")
    batches = list(samples.split(64))
    pnn.calibrate(compiled, batches)
    report = pnn.fit(compiled, batches, epochs=3)
    assert report.steps == 30
    assert report.samples == 3 * len(samples)
    assert report.last_loss < report.first_loss


def test_an_interrupted_fit_goes_on_bit_for_bit(samples: torch.Tensor, tmp_path: Path) -> None:
    batches = list(samples.split(64))
    whole = _compiled(samples, coarse="linear")
    pnn.fit(whole, batches, epochs=2)

    class Interrupted(Exception):
        pass

    def stop(step: int, total: int, loss: float) -> None:
        if step == 13:
            raise Interrupted

    file = tmp_path / "fit.pt"
    halved = _compiled(samples, coarse="linear")
    with pytest.raises(Interrupted):
        pnn.fit(halved, batches, epochs=2, checkpoint=file, checkpoint_every=5, progress=stop)
    again = _compiled(samples, coarse="linear")
    report = pnn.fit(again, batches, epochs=2, checkpoint=file)
    assert report.steps == 20
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[key]), key


def test_a_fit_takes_any_loss_and_refuses_nonsense(samples: torch.Tensor) -> None:
    compiled = _compiled(samples)
    batches = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in samples.split(64)]

    def task_loss(outputs: torch.Tensor, wanted: torch.Tensor, batch: object) -> torch.Tensor:
        assert isinstance(batch, tuple)
        return nn.functional.cross_entropy(outputs, batch[1])

    assert pnn.fit(compiled, batches, loss=task_loss).last_loss < 2.3
    with pytest.raises(pnn.OptionError, match="empty"):
        pnn.fit(compiled, [])
    with pytest.raises(pnn.OptionError, match="nan"):
        pnn.fit(compiled, batches, loss=lambda *_: torch.tensor(float("nan")))


def test_calibrate_and_fit_on_the_command_line(
    samples: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    data, out = tmp_path / "data.safetensors", tmp_path / "out"
    save_file({"images": samples.contiguous()}, data)
    model = tmp_path / "small.py"
    model.write_text(
        "from examples import resnet110\n"
        "def build_model():\n    return resnet110.build_model(units_per_group=3, width=4)\n"
        "def example_inputs():\n    return resnet110.example_inputs(size=16)\n"
    )
    words = [str(model), "-n", "3", "--coarse", "linear+lowrank", "--calibrate", str(data)]
    assert main([*words, "-o", str(out)]) == 0
    assert "agreement of the outputs" in capsys.readouterr().out
    assert main(["fit", str(out), str(data)]) == 0
    assert "10 steps on 640 samples" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
