"""All ranks in one process, taking turns: the oracle of the distributed runtime."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from passes.errors import RuntimeFault
from passes.schedule.instruction import Instruction
from passes.schedule.verify import in_order
from pnn_compile.runtime.step import Step
from pnn_compile.runtime.workspace import Link

__all__ = ["LocalNetwork", "run_together"]


class LocalNetwork:
    """Queues between ranks of one process."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], deque[list[torch.Tensor]]] = {}

    def link(self, rank: int) -> Link:
        """The end that a rank holds."""
        return _LocalLink(self, rank)

    def queue(self, sender: int, receiver: int) -> deque[list[torch.Tensor]]:
        """Messages on their way from one rank to another."""
        return self._queues.setdefault((sender, receiver), deque())


class _LocalLink:
    def __init__(self, network: LocalNetwork, rank: int) -> None:
        self._network = network
        self._rank = rank

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        copies = [tensor.detach().clone() for tensor in tensors]
        self._network.queue(self._rank, peer).append(copies)

    def expect(self, peer: int, like: Sequence[torch.Tensor]) -> None:
        """Nothing: queues give room."""

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = self._network.queue(peer, self._rank).popleft()
        for tensor, wanted in zip(found, like, strict=True):
            if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise RuntimeFault(
                    f"rank {self._rank} expected {list(wanted.shape)} {wanted.dtype} from rank "
                    f"{peer} and got {list(tensor.shape)} {tensor.dtype}"
                )
        return found


def run_together(
    network: LocalNetwork, steps: Sequence[Step], programs: Sequence[Sequence[Instruction]]
) -> None:
    """Run the programs of all ranks, each as far as its messages allow, until all are done."""
    for rank, instruction in in_order(programs):
        steps[rank].run(instruction)
