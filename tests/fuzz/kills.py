"""Kill a rank in each phase of a step: the others end and name it, and the run resumes.

`python -m tests.fuzz.kills --count 45` trains small networks on three ranks, sends SIGKILL to one
of them in a phase of a step (forward, sweep, backward, optimizer, checkpoint), and prints a table.
In every trial the other ranks must end within seconds, each with one error that names the lost
rank; and a run that resumes from the last checkpoint must end with the weights, bit by bit, of a
run that nothing interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed import faults
from tests.distributed.faults import PHASES, RANKS
from tests.distributed.ranks import begin, start

LIMIT = 30.0
"""Seconds in which the other ranks must end."""

RUNS = (("blocks", 1, 2), ("tied", 2, 1), ("blocks", 2, 3))
"""Kinds of runs: network, number of micro-batches, and the step that is disturbed."""


@dataclass(frozen=True)
class Trial:
    """One kill.

    Attributes:
        phase: The phase of the step.
        victim: The rank.
        network: Kind of the network.
        micro: Number of micro-batches.
        step: The step, from 0.
    """

    phase: str
    victim: int
    network: str
    micro: int
    step: int


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        seconds: Seconds from the death to the end of all other ranks.
        named: Whether every other rank ended with an error that names the lost rank.
        resumed: Whether the resumed run ended with the weights of an uninterrupted one.
        problem: The first error that is not as it should be.
    """

    seconds: float
    named: bool
    resumed: bool
    problem: str = ""


def trials() -> Iterator[Trial]:
    """List trials without end: every phase and rank, of one kind of run after the other."""
    for network, micro, step in itertools.cycle(RUNS):
        for phase, victim in itertools.product(PHASES, range(RANKS)):
            yield Trial(phase, victim, network, micro, step)


def attempt(trial: Trial, folder: Path) -> Outcome:
    """Run a trial in an empty folder."""
    run, shape = str(folder / "run"), (trial.step, trial.network, trial.micro)
    context, _ = begin(
        train_seeded, RANKS, folder, run, trial.victim, trial.phase, signal.SIGKILL, *shape
    )
    victim = context.processes[trial.victim]
    victim.join(120)
    died = time.monotonic()
    for process in context.processes:
        process.join(LIMIT)
    seconds = time.monotonic() - died
    problem = _problem(context, trial)
    for process in context.processes:
        process.kill()
    _check_checkpoints(Path(run), trial)
    weights = start(train_seeded, RANKS, folder, run, None, "", signal.SIGKILL, *shape)
    return Outcome(seconds, not problem, equal(weights, uninterrupted(*shape[1:])), problem)


def _problem(context: Any, trial: Trial) -> str:
    """Return what is wrong with the ends of the processes; "" if nothing is."""
    expected = f"passes.errors.RuntimeFault: rank {trial.victim} (process "
    for rank, process in enumerate(context.processes):
        if rank == trial.victim:
            if process.exitcode != -signal.SIGKILL:
                return f"rank {rank} was not killed ({process.exitcode})"
            continue
        if process.exitcode != 1:
            return f"rank {rank} did not end with an error ({process.exitcode})"
        lines = pickle.loads(Path(context.error_files[rank]).read_bytes()).strip().splitlines()
        if not lines[-1].startswith(expected):
            return f"rank {rank}: {lines[-1]}"
    return ""


def _check_checkpoints(run: Path, trial: Trial) -> None:
    """Check that the last checkpoint is that of the step before."""
    names = sorted(entry.name for entry in run.iterdir() if entry.name.startswith("step-"))
    assert names[-1] == f"step-{trial.step:08d}", names


def train_seeded(rank: int, *arguments: Any) -> dict[str, Tensor]:
    """Train as `faults.train` does, with a seed."""
    torch.manual_seed(5)
    return faults.train(rank, *arguments)


@cache
def uninterrupted(network: str, micro: int) -> list[dict[str, Tensor]]:
    """Train without a fault, and return the weights of every rank."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (None, "", signal.SIGKILL, 0, network, micro)
        return start(train_seeded, RANKS, Path(folder), f"{folder}/run", *arguments)


def equal(weights: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    """Whether all ranks have the same weights, bit by bit."""
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(weights, expected, strict=True)
    )


def table(outcomes: list[tuple[Trial, Outcome]]) -> str:
    """Return a row for every phase: kills, what came of them, and the slowest end."""
    rows = [
        "| phase | kills | lost rank named | resumed alike | slowest end |",
        "|---|---|---|---|---|",
    ]
    for phase in (*PHASES, "all"):
        some = [outcome for trial, outcome in outcomes if phase in (trial.phase, "all")]
        if some:
            named, resumed = sum(o.named for o in some), sum(o.resumed for o in some)
            slowest = max(outcome.seconds for outcome in some)
            rows.append(f"| {phase} | {len(some)} | {named} | {resumed} | {slowest:.1f} s |")
    return "\n".join(rows)


def main() -> None:
    """Run trials and print the table; exit with 1 if one went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=45, help="number of kills")
    outcomes = []
    for trial in itertools.islice(trials(), parser.parse_args().count):
        with tempfile.TemporaryDirectory() as folder:
            outcome = attempt(trial, Path(folder))
        outcomes.append((trial, outcome))
        if not (outcome.named and outcome.resumed):
            sys.stderr.write(f"{trial}: {outcome}\n")
    sys.stdout.write(table(outcomes) + "\n")
    sys.exit(not all(outcome.named and outcome.resumed for _, outcome in outcomes))


if __name__ == "__main__":
    main()
