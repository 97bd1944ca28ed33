"""`pnn-compile forecast` as a user meets it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pnn_compile as pnn
from passes.errors import OptionError
from pnn_compile.cli import main
from pnn_compile.cli.forecasting import device_counts
from tests.models import loops


def test_numbers_of_devices_are_read() -> None:
    assert device_counts("2..5") == [2, 3, 4, 5]
    assert device_counts("2,4,8..9") == [2, 4, 8, 9]
    with pytest.raises(OptionError, match="is empty"):
        device_counts("5..2")
    with pytest.raises(OptionError, match="-n must be numbers"):
        device_counts("2..")


ARGUMENTS = [
    "forecast", "examples/decoder.py", "--arg", "layers=4", "--arg", "width=32",
    "--devices", "h100", "--micro-batches", "2",
]  # fmt: skip


def test_a_forecast_as_tables_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "-n", "2..3"]) == 0
    text = capsys.readouterr().out
    assert "on h100 by roofline" in text
    assert "parareal, collapsed sweep" in text
    assert "speed-up gpipe:2" in text
    assert main([*ARGUMENTS, "-n", "2", "--json", "--inference"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["rows"]] == ["chain", "collapsed", "gpipe:2", "ddp"]
    assert result["verdict"]
    assert result["training"] is False


def test_mistakes_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "examples/decoder.py", "--devices", "h1"]) == 2
    assert "no built-in device profile is called 'h1'" in capsys.readouterr().err


def test_iterations_of_a_tolerance_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    compiled = pnn.compile(loops.DDIM().eval(), loops.inputs(loops.DDIM), stages=4, tolerance=1e-2)
    compiled.save(tmp_path / "sampler")
    noise = torch.randn(24, 8)
    save_file({"x": noise}, samples := tmp_path / "noise.safetensors")
    arguments = ["forecast", str(tmp_path / "sampler"), str(samples)]
    assert main([*arguments, "--tolerance", "1e-5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    alone = Counter(
        compiled.iterate(noise[i : i + 1], tolerance=1e-5).iterations for i in range(len(noise))
    )
    assert {row["iterations"]: row["samples"] for row in rows} == dict(alone)
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0.01 takes K = 1 of 4 on 24 samples: " in text
    assert main([*arguments, "--tolerance", "1e-5"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"1e-05 takes K = {min(alone)} to {max(alone)} of 4, median " in text
    for wrong, reason in (
        ([*arguments, "-n", "4"], "-n does not go with samples"),
        (["forecast", "examples/decoder.py", str(samples)], "counted for an artifact"),
        (["forecast", str(tmp_path / "sampler"), "--tolerance", "0.1"], "needs samples"),
    ):
        assert main(wrong) == 2
        assert reason in " ".join(capsys.readouterr().err.split())
