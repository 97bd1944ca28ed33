"""Measuring a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from passes.errors import OptionError
from pnn_compile.bench import measure_device as profiling
from pnn_compile.cli import main
from pnn_compile.forecast.forecast import load_profile

CPU = torch.device("cpu")


@pytest.mark.usefixtures("_forked_ranks")
def test_the_device_at_hand_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.toml"
    code = main(["profile", "--device", "cpu", "--name", "here", "-o", str(path), "--json"])
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    result = load_profile(path)
    assert result.name == printed["name"] == "here"
    assert 1e8 < result.flops["float32"] < 1e14
    assert 1e8 < result.bandwidth < 1e13
    assert 1e-7 < result.launch < 1e-2
    assert 1e-7 < result.link_latency < 1
    assert result.link_bandwidth > 1e6
    assert result.memory > 2**28
    assert not result.asynchronous


def test_dtypes_without_kernels_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError('"addmm_impl_cpu_" not implemented for this dtype')

    monkeypatch.setattr(torch, "mm", fail)
    assert profiling._products(CPU, torch.float32, 8) is None


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="torch finds no CUDA device here"):
        profiling.measure_device("cuda")
    with pytest.raises(OptionError, match="'cpu' or 'cuda'"):
        profiling.measure_device("tpu")
