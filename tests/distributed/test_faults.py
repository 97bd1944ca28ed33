"""A rank that dies or hangs ends all others, and the run goes on from its checkpoint.

`pytest -m "slow or not slow" tests/distributed/test_faults.py` kills every rank in every phase.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import faults
from tests.distributed.faults import PHASES, RANKS
from tests.distributed.ranks import begin, start

LIMIT = 30
"""Seconds in which all processes are gone; the time-out of the process group is longer."""

QUICK = {(0, "sweep"), (1, "backward"), (2, "checkpoint")}
CASES = [
    pytest.param(rank, phase, marks=() if (rank, phase) in QUICK else pytest.mark.slow)
    for phase in PHASES
    for rank in range(RANKS)
]


def _train(rank: int, *arguments: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return faults.train(rank, *arguments)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Weights of every rank behind a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return start(_train, RANKS, folder, str(folder / "run"))


def _check(result: list[dict[str, Tensor]], reference: list[dict[str, Tensor]]) -> None:
    for actual, expected in zip(result, reference, strict=True):
        assert actual.keys() == expected.keys()
        for key, value in actual.items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(("victim", "phase"), CASES)
def test_a_killed_rank_ends_the_run_which_resumes(
    victim: int, phase: str, reference: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    context, _ = begin(_train, RANKS, tmp_path, str(run), victim, phase)
    context.processes[victim].join(120)
    died = time.monotonic()
    for process in context.processes:
        process.join(LIMIT)
    assert time.monotonic() - died < LIMIT
    assert context.processes[victim].exitcode == -signal.SIGKILL
    for rank, process in enumerate(context.processes):
        if rank != victim:
            assert process.exitcode == 1, rank
            message = pickle.loads(Path(context.error_files[rank]).read_bytes())
            assert f"passes.errors.RuntimeFault: rank {rank} " in message
    assert "step-00000002" in os.listdir(run)
    assert "step-00000003" not in os.listdir(run)
    _check(start(_train, RANKS, tmp_path, str(run)), reference)


def test_a_rank_that_hangs_ends_the_others(tmp_path: Path) -> None:
    begun = time.monotonic()
    context, _ = begin(
        _train, RANKS, tmp_path, str(tmp_path / "run"), 1, "sweep", signal.SIGSTOP, limit=10
    )
    try:
        for rank in (0, 2):
            context.processes[rank].join(60)
            assert context.processes[rank].exitcode == 1
        assert time.monotonic() - begun < 60
    finally:
        context.processes[1].kill()


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(
    reference: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(RANKS), "--max-restarts", "1", "-m", "tests.distributed.faults", str(tmp_path),
        "1", "backward",
    ]  # fmt: skip
    # Gloo finds addresses of dead ranks in a store that torchrun keeps over a restart.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    _check([torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)], reference)
