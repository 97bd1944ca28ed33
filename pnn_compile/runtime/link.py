"""`DistributedLink`: messages between ranks over torch.distributed."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["DistributedLink"]

_Pending = list[tuple[dist.Work | None, torch.Tensor]]


class DistributedLink:
    """The end of the links that a rank holds, for one step.

    Args:
        group: Process group with one process a rank.
        device: Where messages are received.

    Attributes:
        bytes: Size of everything that was sent.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._sent: _Pending = []
        self._expected: dict[int, deque[_Pending]] = defaultdict(deque)
        self.bytes = 0

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send without waiting; the tensors are kept until `wait`."""
        for tensor in tensors:
            ready = tensor.detach().contiguous()
            work = dist.isend(ready, group=self._group, group_dst=peer)
            self._sent.append((work, ready))  # alive until it is sent
            self.bytes += ready.nbytes

    def expect(self, peer: int, like: Sequence[torch.Tensor]) -> None:
        """Give room for tensors of these shapes and types; `receive` waits for them, in order."""
        self._expected[peer].append(self._begin(peer, like))

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Wait for tensors of these shapes and types."""
        ahead = self._expected[peer]
        pending = ahead.popleft() if ahead else self._begin(peer, like)
        for work, _ in pending:
            if work is not None:
                work.wait()
        return [tensor for _, tensor in pending]

    def wait(self) -> None:
        """Wait until everything is sent."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()

    def _begin(self, peer: int, like: Sequence[torch.Tensor]) -> _Pending:
        found: _Pending = []
        for each in like:
            tensor = torch.empty_like(each, device=self._device)
            found.append((dist.irecv(tensor, group=self._group, group_src=peer), tensor))
        return found
