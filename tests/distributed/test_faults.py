"""A rank that dies, hangs or fails ends all others, and the run goes on from its checkpoint.

`pytest -m "slow or not slow" tests/distributed/test_faults.py` kills every rank in every phase.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pnn_compile as pnn
from tests.distributed.faults import FAULT_STEP, PHASES, RANKS
from tests.distributed.ranks import begin, start
from tests.fuzz.kills import LIMIT, Trial, attempt, equal, train_seeded, uninterrupted
from tests.models.distributed_models import batches, loss, network

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


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


def _go_on(rank: int, where: str) -> list[str]:
    """Train in a script that catches every error and goes on; return what each step said.

    With `where="own group"`, the network has a group of its own, and the script goes on to use the
    default one.
    """
    own, where = where == "own group", "loss" if where == "own group" else where
    group = dist.new_group() if own else None
    module = pnn.runtime.distribute(network(2), group=group, batches=2).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    messages = []
    for number, batch in enumerate(batches(4)):
        disturbed = number == 1

        def maybe_failing(outputs: Any, batch: Any, here: bool = disturbed) -> Any:
            if here and where in ("loss", "interrupt"):
                raise ValueError("no labels") if where == "loss" else KeyboardInterrupt
            return loss(outputs, batch)

        if disturbed and (where == "every batch" or (where == "batch" and rank == 0)):
            batch = batch[:, :3]
        if disturbed and where == "optimizer" and rank == 0:
            optimizer.register_step_pre_hook(_fail)
        if number == 2 and where == "optimizer" and rank == 1:
            time.sleep(2)  # by now the script of rank 0 is over
        try:
            module.train_step(batch, maybe_failing, optimizer)
            messages.append("")
        except (Exception, KeyboardInterrupt) as error:
            messages.append(f"{type(error).__name__}: {error}")
    if own:
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 2
    return messages


@pytest.mark.parametrize(
    ("where", "culprit", "own"),
    [
        ("loss", 1, "ValueError: no labels"),
        ("own group", 1, "ValueError: no labels"),
        ("interrupt", 1, "KeyboardInterrupt"),
        ("batch", 0, "x is [2, 3]"),
        ("optimizer", 0, "ZeroDivisionError"),
    ],
)
def test_a_failed_step_ends_all_ranks_though_the_script_goes_on(
    where: str, culprit: int, own: str, tmp_path: Path
) -> None:
    begun = time.monotonic()
    messages = start(_go_on, 2, tmp_path, where)
    assert time.monotonic() - begun < 30
    first, *later = [message for message in messages[culprit] if message]
    assert own in first
    cause = f"RuntimeFault: rank {culprit} ended with an error of its own ("
    told = [*later, *[message for message in messages[1 - culprit] if message]]
    assert len(told) >= 3
    assert all(message.startswith(cause) and own in message for message in told)


def test_a_batch_that_all_ranks_refuse_is_skipped(tmp_path: Path) -> None:
    for messages in start(_go_on, 2, tmp_path, "every batch"):
        assert [bool(message) for message in messages] == [False, True, False, False]
        assert "x is [2, 3]" in messages[1]


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
