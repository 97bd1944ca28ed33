"""`DistributedLink`: messages between ranks over torch.distributed."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import torch

from pnn_compile.runtime.passing import Passing, Pending

__all__ = ["DistributedLink"]


class DistributedLink:
    """The end of the links that a rank holds, for one step.

    Args:
        passing: Messages between the ranks.
        device: Where messages are received.
    """

    def __init__(self, passing: Passing, device: torch.device) -> None:
        self._passing = passing
        self._device = device
        self._sent: list[Pending] = []
        self._expected: dict[int, deque[list[Pending]]] = defaultdict(deque)

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send without waiting; the tensors are kept until `wait`."""
        self._sent += [self._passing.send(peer, tensor) for tensor in tensors]

    def expect(self, peer: int, like: Sequence[torch.Tensor]) -> None:
        """Give room for tensors of these shapes and types; `receive` waits for them, in order."""
        self._expected[peer].append(self._begin(peer, like))

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Wait for tensors of these shapes and types."""
        ahead = self._expected[peer]
        pending = ahead.popleft() if ahead else self._begin(peer, like)
        return [each.wait() for each in pending]

    def wait(self) -> None:
        """Wait until everything is sent."""
        for each in self._sent:
            each.wait()
        self._sent.clear()

    def _begin(self, peer: int, like: Sequence[torch.Tensor]) -> list[Pending]:
        return [self._passing.receive(peer, each, self._device) for each in like]
