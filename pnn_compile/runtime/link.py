"""`DistributedLink`: messages between ranks over torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["DistributedLink"]


class DistributedLink:
    """The end of the links that a rank holds, for one step.

    Args:
        group: Process group with one process a rank.
        device: Where messages are received.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._sent: list[tuple[dist.Work | None, torch.Tensor]] = []

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send without waiting; the tensors are kept until `wait`."""
        for tensor in tensors:
            ready = tensor.detach().contiguous()
            work = dist.isend(ready, group=self._group, group_dst=peer)
            self._sent.append((work, ready))  # alive until it is sent

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Wait for tensors of these shapes and types."""
        found = [torch.empty_like(each, device=self._device) for each in like]
        for tensor in found:
            work = dist.irecv(tensor, group=self._group, group_src=peer)
            if work is not None:
                work.wait()
        return found

    def wait(self) -> None:
        """Wait until everything is sent."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()
