"""A training run in which one rank dies or stops where it is told to.

TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \\
torchrun --standalone --nproc-per-node 3 --max-restarts 1 \\
    -m tests.distributed.faults FOLDER RANK PHASE

trains the network of the tests in three stages; rank RANK is killed in phase PHASE of the third
step, torchrun starts all ranks again, and they go on from the last checkpoint.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem

import pnn_compile as pnn
from passes.schedule.instruction import Instruction, Kind
from pnn_compile.runtime.engine import Engine
from tests.models.distributed_models import batches, loss, network

__all__ = ["FAULT_STEP", "PHASES", "RANKS", "train"]

RANKS, STEPS, FAULT_STEP = 3, 4, 2

INSTRUCTIONS = {"forward": Kind.FINE, "sweep": Kind.CORRECT, "backward": Kind.FINE_BACKWARD}
PHASES = (*INSTRUCTIONS, "optimizer", "checkpoint")


class Fault:
    """Sends a signal to its own process in a phase of a step.

    Args:
        phase: One of `PHASES`.
        number: The signal.
        module: The network of this rank, which knows the step.
        optimizer: Its optimizer.
        step: The step, from 0.
    """

    def __init__(
        self,
        phase: str,
        number: int,
        module: pnn.runtime.RankModule,
        optimizer: torch.optim.Optimizer,
        step: int,
    ) -> None:
        self._step = step
        self._number = number
        self._module = module
        if phase == "optimizer":
            optimizer.register_step_pre_hook(lambda *_: self._fire(1))
        elif phase == "checkpoint":
            self._in_the_write()
        else:
            self._at(INSTRUCTIONS[phase])

    def _fire(self, already: int) -> None:
        if self._module.steps == self._step + already:
            os.kill(os.getpid(), self._number)

    def _at(self, kind: Kind) -> None:
        run = Engine.run

        def faulty(engine: Engine, instruction: Instruction) -> None:
            if instruction.kind is kind:
                self._fire(1)  # it counts before it runs
            run(engine, instruction)

        Engine.run = faulty  # type: ignore[method-assign, assignment]

    def _in_the_write(self) -> None:
        write = filesystem._write_item

        def faulty(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            self._fire(1)
            return result

        filesystem._write_item = faulty


def train(
    rank: int,
    folder: str,
    victim: int | None = None,
    phase: str = "",
    number: int = signal.SIGKILL,
    step: int = FAULT_STEP,
    kind: str = "blocks",
    micro: int = 1,
) -> dict[str, Tensor]:
    """Train to the end, from where the checkpoint in the folder stands; give the weights."""
    module = pnn.runtime.distribute(network(RANKS, kind), batches=micro).train()
    optimizer = torch.optim.AdamW(module.parameters(), 0.01)
    if rank == victim:
        Fault(phase, number, module, optimizer, step)
    checkpoints = pnn.runtime.Checkpoints(folder, module, optimizer)
    for batch in batches(STEPS)[checkpoints.resume() :]:
        module.train_step(batch, loss, optimizer)
        checkpoints.save()
    return module.network.state_dict()


def main() -> None:
    """Train as torchrun says, with a fault in the first attempt."""
    folder, victim, phase = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    torch.manual_seed(5)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    rank = dist.get_rank()
    state = train(rank, f"{folder}/run", int(victim) if first else None, phase)
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
