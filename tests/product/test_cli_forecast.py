"""`pnn-compile forecast` as a user meets it."""

from __future__ import annotations

import json

import pytest

from passes.errors import OptionError
from pnn_compile.cli import main
from pnn_compile.cli.forecasting import device_counts


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
