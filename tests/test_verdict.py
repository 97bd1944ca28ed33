"""The verdict: parareal networks beside early exits of the same latency, and what to try next."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from pnn_compile.batches import CalibrationBatches
from pnn_compile.cli import main
from pnn_compile.early_exit import fit_early_exit
from pnn_compile.verdict import _advice, _sentence

WIDTH = 16


class Deep(nn.Module):
    """Residual blocks of equal cost; the later ones can be made to do nothing."""

    def __init__(self, *, idle_from: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8 * WIDTH), nn.Tanh(), nn.Linear(8 * WIDTH, WIDTH))
            for _ in range(12)
        )
        self.head = nn.Linear(WIDTH, 5)
        with torch.no_grad():
            for block in list(self.trunk)[idle_from:]:
                for parameter in block.parameters():
                    parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.trunk:
            x = x + block(x)
        result: Tensor = self.head(x)
        return result


BATCHES = list(torch.randn(800, WIDTH, generator=torch.Generator().manual_seed(1)).split(80))


def _compiled(model: nn.Module, stages: int = 3) -> pnn.Compiled:
    return pnn.compile(
        model.eval(), BATCHES[0][:2], stages=stages, coarse_budget=0.3, calibration=BATCHES
    )


def test_every_size_stands_beside_an_exit_of_its_latency() -> None:
    compiled = _compiled(Deep())
    verdict = compiled.assess(BATCHES, stages=[2, 4], coarse_budget=0.3)
    assert [(row.stages, row.iterations) for row in verdict.rows] == [
        (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2),
    ]  # fmt: skip
    assert verdict.held_out == 160
    for row in verdict.rows:
        assert 0 <= row.agreement <= 1
        if row.exit_share is not None:
            assert row.exit_share < 1 / row.speedup
    exact = verdict.rows[1]
    assert exact.agreement == 1  # K = N
    assert exact.output_error < 1e-5
    row = verdict.rows[2]
    calibration = compiled.calibration
    assert calibration is not None
    assert row.agreement == pytest.approx(calibration.agreement_after)
    assert f"N = 4 agrees with the original on {verdict.rows[4].agreement:.1%}" in verdict.sentence


def test_a_network_that_idles_is_told_to_be_cut_short() -> None:
    verdict = _compiled(Deep(idle_from=3)).assess(BATCHES)
    row = verdict.rows[0]
    assert row.exit_agreement == 1
    if row.agreement < 0.99:
        assert "try the shorter network first" in verdict.advice[0]


def test_an_early_exit_behind_all_that_matters_is_the_original() -> None:
    model = Deep(idle_from=3).eval()
    compiled = _compiled(model)
    exit_ = fit_early_exit(compiled, CalibrationBatches(compiled, BATCHES), 0.4)
    assert exit_ is not None
    with torch.no_grad():
        torch.testing.assert_close(exit_(BATCHES[0]), model(BATCHES[0]), rtol=1e-3, atol=1e-3)
    exit_(BATCHES[0]).sum().backward()
    assert all(p.grad is None for p in compiled.module.parameters())  # its layers are copies
    assert fit_early_exit(compiled, CalibrationBatches(compiled, BATCHES), 0.01) is None


def test_what_the_sentence_says_follows_from_the_numbers() -> None:
    compiled = _compiled(Deep())
    (row, _) = compiled.assess(BATCHES).rows
    cases = (
        ({"agreement": 0.995, "exit_agreement": 0.9}, "can be run in parallel as it is"),
        ({"agreement": 0.95, "exit_agreement": 0.5}, "keeps more of them than leaving them out"),
        ({"agreement": 0.5, "exit_agreement": 0.5}, "gains nothing here"),
        ({"agreement": 0.5, "exit_agreement": None}, "no early exit is that quick"),
    )
    for figures, words in cases:
        assert words in _sentence([replace(row, **figures)], 1000)


def test_the_advice_names_what_did_better() -> None:
    compiled = _compiled(Deep())
    (row, _) = compiled.assess(BATCHES).rows
    row = replace(row, agreement=0.7, exit_agreement=0.6)
    rows = [
        replace(row, stages=2, agreement=0.9, speedup=1.9),
        row,
        replace(row, iterations=2, agreement=0.8, speedup=1.4),
    ]
    advice = "\n".join(_advice(rows, {2: compiled, 3: compiled}))
    assert "N = 2 agrees on 90.0% at 1.9 times" in advice
    assert "K = 2 agrees on 80.0% at 1.4 times" in advice
    assert "shorter network" not in advice
    slow = [row, replace(row, iterations=2, agreement=0.8, speedup=0.9)]
    assert "iterate" not in "\n".join(_advice(slow, {3: compiled}))


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(pnn.OptionError, match="cuttings"):
        _compiled(Deep()).assess(BATCHES, stages=[2], cuttings=3)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model file and a file of samples."""
    from safetensors.torch import save_file

    model, data = tmp_path / "deep.py", tmp_path / "data.safetensors"
    model.write_text(
        "import torch\nfrom tests.test_verdict import Deep\n"
        "def build_model():\n    return Deep()\n"
        "def example_inputs():\n    return torch.randn(2, 16)\n"
    )
    save_file({"x": torch.cat(BATCHES)}, data)
    return model, data


def test_on_the_command_line(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, data = map(str, files)
    assert main(["assess", model, data, "-n", "2,3", "--coarse-budget", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "early exit" in out
    assert "N = 3 agrees with the original" in out.replace("\n", " ")
    assert main(["assess", model, data, "-n", "2", "--coarse-budget", "0.3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    assert main([model, "-n", "2", "--coarse-budget", "0.3", "--calibrate", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["rows"][0]["stages"] == 2
    assert any(step["name"] == "calibrate" for step in found["passes"])
    assert main(["assess", model, data, "-n", "two"]) == 2
    assert "-n must be numbers by comma" in capsys.readouterr().err
