"""The verdict: parareal networks beside early exits of the same latency, and what to try next."""

import functools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from passes.cost.flops import count_work
from pnn_compile.cli import main
from pnn_compile.evaluate.assess import Fidelity, VerdictRow, _advice, _sentence
from pnn_compile.fit.early_exit import fit_early_exit
from pnn_compile.inputs import CalibrationBatches
from pnn_compile.report.tables import verdict_table
from pnn_compile.report.terminal import to_text

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


@functools.cache
def _compiled(stages: int = 3, idle_from: int = 12) -> pnn.Compiled:
    model = Deep(idle_from=idle_from).eval()
    return pnn.compile(model, BATCHES[0][:2], stages=stages, coarse_budget=0.3, calibration=BATCHES)


@functools.cache
def _assessed() -> tuple[VerdictRow, ...]:
    return _compiled().assess(BATCHES).rows


def test_every_size_stands_beside_an_exit_of_its_latency() -> None:
    compiled = _compiled()
    verdict = compiled.assess(BATCHES, stages=[2, 4], coarse_budget=0.3)
    assert [(row.stages, row.iterations) for row in verdict.rows] == [
        (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2),
    ]  # fmt: skip
    assert verdict.held_out == 160
    for row in verdict.rows:
        assert row.fidelity.agreement is not None
        assert 0 <= row.fidelity.agreement <= 1
        if row.exit_share is not None:
            assert row.exit_share < 1 / row.speedup
    exact = verdict.rows[1]
    assert exact.fidelity.agreement == 1  # K = N
    assert exact.fidelity.error < 1e-5
    row = verdict.rows[2]
    calibration = compiled.calibration
    assert calibration is not None
    assert row.fidelity.agreement == pytest.approx(calibration.agreement_after)
    assert f"N = 4: {verdict.rows[4].fidelity.agreement:.1%} agreement" in verdict.sentence


def test_a_network_that_idles_is_told_to_be_cut_short() -> None:
    verdict = _compiled(idle_from=3).assess(BATCHES)
    row = verdict.rows[0]
    assert row.exit is not None
    assert row.exit.agreement == 1
    assert "does not use its depth: a shorter one does the same" in verdict.sentence
    assert "try the shorter network first" in verdict.advice[0]


def test_an_early_exit_behind_all_that_matters_is_the_original() -> None:
    model = Deep(idle_from=3).eval()
    compiled = _compiled(idle_from=3)
    exit_ = fit_early_exit(compiled, CalibrationBatches(compiled, BATCHES), 0.4)
    assert exit_ is not None
    with torch.no_grad():
        torch.testing.assert_close(exit_(BATCHES[0]), model(BATCHES[0]), rtol=1e-3, atol=1e-3)
    exit_(BATCHES[0]).sum().backward()
    assert all(p.grad is None for p in compiled.module.parameters())  # its layers are copies
    assert fit_early_exit(compiled, CalibrationBatches(compiled, BATCHES), 0.01) is None


def test_what_the_sentence_says_follows_from_the_numbers() -> None:
    (row, _) = _assessed()
    good, fair, poor = (Fidelity(share, 0.1) for share in (0.995, 0.95, 0.5))
    cases: list[tuple[Fidelity, Fidelity | None, float, str]] = [
        (good, fair, 2.0, "can be run in parallel as it is"),
        (good, good, 2.0, "does not use its depth"),
        (fair, poor, 2.0, "closer to the original than leaving them out"),
        (poor, poor, 2.0, "shorter network is as good here"),
        (poor, None, 2.0, "no early exit is that fast"),
        (good, poor, 0.9, "not faster"),
        (Fidelity(None, 0.001), Fidelity(None, 0.2), 2.0, "within 0.10% of the original's outputs"),
        (Fidelity(None, 0.001), Fidelity(None, 0.2), 2.0, "can be run in parallel as it is"),
        (Fidelity(None, 0.3), Fidelity(None, 0.2), 2.0, "shorter network is as good here"),
    ]
    for fidelity, exit_, speedup, words in cases:
        changed = replace(row, fidelity=fidelity, exit=exit_, speedup=speedup)
        assert words in _sentence([changed], 1000)


def test_the_advice_names_what_did_better() -> None:
    compiled = _compiled()
    (row, _) = _assessed()
    row = replace(row, fidelity=Fidelity(0.7, 0.3), exit=Fidelity(0.6, 0.4))
    twice = replace(row, iterations=2, fidelity=Fidelity(0.8, 0.2), speedup=1.4)
    rows = [replace(row, stages=2, fidelity=Fidelity(0.9, 0.1), speedup=1.9), row, twice]
    advice = "\n".join(_advice(rows, {(3, 1): compiled}))
    assert "take fewer stages: N = 2, K = 1: 90.0% agreement with the original at 1.9" in advice
    assert "iterate: N = 3, K = 2: 80.0% agreement with the original at 1.4" in advice
    assert "shorter network" not in advice
    assert "windows=[2, 4]" in advice
    cut = replace(row, windows=4, fidelity=Fidelity(0.95, 0.05), speedup=1.8)
    advice = "\n".join(_advice([row, cut], {(3, 1): compiled}))
    assert "cut it into windows: N = 3, W = 4, K = 1: 95.0% agreement" in advice
    slow = [row, replace(twice, speedup=0.9)]
    assert "iterate" not in "\n".join(_advice(slow, {(3, 1): compiled}))


class Regression(nn.Module):
    """One number a sample, which has no largest one; BatchNorm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.trunk:
            x = x + self.drop(torch.tanh(block(x)))
        result: Tensor = self.head(self.norm(x))
        return result


def test_single_numbers_are_judged_by_their_error_and_nothing_is_changed() -> None:
    model = Regression().train()
    compiled = pnn.compile(model, BATCHES[0][:4], stages=3, coarse_budget=0.5, calibration=BATCHES)
    assert compiled.calibration is not None
    assert compiled.calibration.agreement_after is None
    pieces = (compiled.module, compiled.sequential)
    before = [{k: v.clone() for k, v in piece.state_dict().items()} for piece in pieces]
    modes = [[m.training for m in piece.modules()] for piece in pieces]
    torch.manual_seed(5)
    verdict = compiled.assess(BATCHES)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert verdict.rows[0].fidelity.agreement is None
    assert "of the original's outputs" in verdict.sentence
    assert "error" in to_text(verdict_table(verdict))
    for piece, state, mode in zip(pieces, before, modes, strict=True):
        assert [m.training for m in piece.modules()] == mode
        for key, value in piece.state_dict().items():
            assert torch.equal(value, state[key]), key


def test_assess_makes_the_networks_that_compile_makes() -> None:
    compiled = _compiled(stages=2)
    verdict = compiled.assess(BATCHES, stages=[3], coarse_budget=0.3)
    again = _compiled()
    row = verdict.rows[2]
    assert (row.stages, row.iterations) == (3, 1)
    assert row.speedup == again.plan.forecast.speedup
    assert again.calibration is not None
    assert row.fidelity.error == pytest.approx(again.calibration.output_error_after)


def test_an_early_exit_takes_no_longer_than_it_may() -> None:
    compiled = _compiled()
    for share in (0.4, 0.6, 0.8):
        exit_ = fit_early_exit(compiled, CalibrationBatches(compiled, BATCHES), share)
        assert exit_ is not None
        assert count_work(partial(exit_, BATCHES[0][:2]))[0] <= share * compiled.analysis.flops


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(pnn.OptionError, match="cuttings"):
        _compiled().assess(BATCHES, stages=[2], cuttings=3)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model file and a file of samples."""
    from safetensors.torch import save_file

    model, data = tmp_path / "deep.py", tmp_path / "data.safetensors"
    model.write_text(
        "import torch\nfrom tests.product.test_verdict import Deep\n"
        "def build_model(idle_from=12):\n    return Deep(idle_from=idle_from)\n"
        "def example_inputs():\n    return torch.randn(2, 16)\n"
    )
    save_file({"x": torch.cat(BATCHES)}, data)
    return model, data


def test_on_the_command_line(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, data = map(str, files)
    assert main(["assess", model, data, "-n", "2,3", "--coarse-budget", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "early exit" in out
    assert "N = 3: " in out
    idle = ["--arg", "idle_from=3"]
    assert main(["assess", model, data, "-n", "2", "--coarse-budget", "0.3", "--json", *idle]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 2
    assert "does not use its depth" in document["sentence"]
    assert main([model, "-n", "2", "--coarse-budget", "0.3", "--calibrate", data, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"]["rows"][0]["stages"] == 2
    assert any(step["name"] == "calibrate" for step in document["passes"])
    assert main(["assess", model, data, "-n", "two"]) == 2
    assert "-n must be numbers by comma" in capsys.readouterr().err
