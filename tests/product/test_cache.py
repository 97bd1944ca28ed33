"""Measured seconds that are kept: by content, where users can see and delete them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from passes.capture.ladder import capture
from passes.cost.measured import Seconds
from passes.ir.program import Program
from pnn_compile.cli import main
from pnn_compile.forecast import timing_cache as cache
from pnn_compile.forecast.timing_cache import TimingCache, default_folder
from tests.models.builders import linear_chain


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every measurement that is really made, by whether it was of a training step."""
    built: list[bool] = []

    def measure(_: Program, segments: Sequence[Any], *, backward: bool = False) -> list[Seconds]:
        built.append(backward)
        return [Seconds(index + 1.0, float(backward)) for index in range(len(segments))]

    monkeypatch.setattr(cache, "measure_seconds", measure)
    return built


def captured(width: int = 8, batch: int = 4) -> Program:
    return capture(nn.Sequential(nn.Linear(8, width), nn.ReLU()), (torch.randn(batch, 8),))


def timed(timings: TimingCache, program: Program, backward: bool = False) -> list[Seconds]:
    return timings(program, [[node] for node in program.order], backward=backward)


def test_the_same_measurement_is_made_once(tmp_path: Path, measured: list[bool]) -> None:
    timings = TimingCache(tmp_path / "new")
    first = timed(timings, captured())
    again = timed(timings, captured())
    assert again == first == [Seconds(1.0, 0.0), Seconds(2.0, 0.0)]
    assert measured == [False]
    assert timings.path is not None
    stored = json.loads(timings.path.read_text())
    assert stored["conditions"]["torch"] == torch.__version__
    assert [path.name for path in (tmp_path / "new").iterdir()] == [timings.path.name]


def test_whatever_the_seconds_depend_on_makes_another(
    tmp_path: Path, measured: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = TimingCache(tmp_path)
    paths = set()
    for program, backward in (
        (captured(), False), (captured(), True), (captured(width=9), False),
        (captured(batch=5), False),
    ):  # fmt: skip
        timed(timings, program, backward)
        paths.add(timings.path)
    program = captured()
    timings(program, [program.order])
    paths.add(timings.path)
    monkeypatch.setattr(torch, "__version__", "0.0")
    timed(timings, captured())
    monkeypatch.setattr(cache, "processor_name", lambda _: "another one")
    timed(timings, captured())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    timed(timings, captured())
    assert len(paths) == 5
    assert len(measured) == 8


@pytest.mark.parametrize("text", ["", "{}", '{"seconds": [[1]], "conditions": {}}', "[]"])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, measured: list[bool], text: str) -> None:
    timings = TimingCache(tmp_path)
    first = timed(timings, captured())
    assert timings.path is not None
    timings.path.write_text(text)
    assert timed(timings, captured()) == first
    assert timed(timings, captured()) == first
    assert len(measured) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, measured: list[bool]) -> None:
    (tmp_path / "file").touch()
    timings = TimingCache(tmp_path / "file")
    assert len(timed(timings, captured())) == 2
    assert timings.path is None


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PNN_COMPILE_CACHE", "/somewhere")
    assert default_folder() == Path("/somewhere")
    monkeypatch.delenv("PNN_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_folder() == Path("/xdg/pnn-compile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "pnn-compile"


def test_compile_and_forecast_share_what_was_measured(tmp_path: Path, measured: list[bool]) -> None:
    model, x = linear_chain(4, 8), torch.randn(4, 8)
    compiled = pnn.compile(model, x, stages=2, cost="measured", cache=tmp_path)
    assert compiled.timings is not None
    assert str(tmp_path) in compiled.report(200)
    result = pnn.forecast(model, x, stages=[2], cache=tmp_path)
    assert any(str(compiled.timings) in note for note in result.notes)
    assert measured == [True]
    again = pnn.compile(model, x, stages=2, cost="measured", cache=False)
    assert again.timings is None
    assert measured == [True, True]
    assert pnn.compile(model, x, stages=2).timings is None


def test_the_command_line_keeps_nothing_if_told_so(
    tmp_path: Path, measured: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["examples/decoder.py", "--arg", "layers=2", "--arg", "width=16", "-n", "2"]
    assert main(["forecast", *words, "--no-cache", "--micro-batches", "2"]) == 0
    assert not (tmp_path / "cache").exists()
    assert main(["forecast", *words]) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1
    capsys.readouterr()
