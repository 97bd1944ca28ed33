"""A rank that dies or hangs ends all others, and the run goes on from its checkpoint.

`pytest -m "slow or not slow" tests/distributed/test_faults.py` kills every rank in every phase.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.faults import FAULT_STEP, PHASES, RANKS
from tests.distributed.ranks import begin
from tests.fuzz.kills import LIMIT, Trial, attempt, equal, train_seeded, uninterrupted

QUICK = {(0, "sweep"), (2, "checkpoint")}
CASES = [
    pytest.param(rank, phase, marks=() if (rank, phase) in QUICK else pytest.mark.slow)
    for phase in PHASES
    for rank in range(RANKS)
]


@pytest.mark.parametrize(("victim", "phase"), CASES)
def test_a_killed_rank_ends_the_run_which_resumes(victim: int, phase: str, tmp_path: Path) -> None:
    outcome = attempt(Trial(phase, victim, "blocks", 1, FAULT_STEP), tmp_path)
    assert not outcome.problem
    assert outcome.resumed
    assert outcome.seconds < LIMIT


def test_a_rank_that_hangs_ends_the_others(tmp_path: Path) -> None:
    begun = time.monotonic()
    context, _ = begin(
        train_seeded, RANKS, tmp_path, str(tmp_path / "run"), 1, "sweep", signal.SIGSTOP, limit=10
    )
    try:
        for rank in (0, 2):
            context.processes[rank].join(60)
            assert context.processes[rank].exitcode == 1
        assert time.monotonic() - begun < 60
    finally:
        context.processes[1].kill()


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
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
    weights = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert equal(weights, uninterrupted("blocks", 1))
