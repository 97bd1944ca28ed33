"""Point-to-point transport of tensors between ranks: torch.distributed, or queues in one process.

Messages of two ranks arrive in the order in which they were sent, so they carry no tags.
"""

from __future__ import annotations

import atexit
import functools
import gc
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from passes.errors import RuntimeFault


class GroupReference:
    """A process group of torch.distributed, until `dist.destroy_process_group()`.

    An object that keeps the group itself keeps its threads, too. Those of Gloo would still run when
    the interpreter ends, which aborts the process if one of them frees a tensor then. Reference
    cycles may keep it, too, and are collected before the interpreter ends.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        _collect_at_exit()

    def __call__(self) -> dist.ProcessGroup:
        """Return the group.

        Raises:
            RuntimeFault: It is destroyed.
        """
        group = self._group()
        with suppress(KeyError):  # something else may keep it
            if group is not None:
                dist.get_process_group_ranks(group)
                return group
        raise RuntimeFault(
            "the process group of this network is destroyed: call dist.destroy_process_group() "
            "after the last step"
        )


@functools.cache
def _collect_at_exit() -> None:
    atexit.register(gc.collect)


class Transport(Protocol):
    """Send and receive the messages of one rank."""

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Start to send tensors, without waiting for the receiver."""

    def expect(self, peer: int, like: Sequence[torch.Tensor]) -> None:
        """Post a receive for tensors of these shapes and types, without waiting for them."""

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Wait for tensors of these shapes and types, posted before or not."""


class _Posted(NamedTuple):
    """A pending receive: the tensor it fills, its request, and the device for the result."""

    tensor: torch.Tensor
    work: dist.Work | None
    device: torch.device


class PointToPoint:
    """Messages over a process group of torch.distributed.

    Tensors go through the host where the backend requires it: Gloo accepts tensors on a GPU in its
    collectives, but not in messages between two ranks.

    Args:
        group: Process group with one process a rank.
        device: Device of received tensors; that of `like` if None.
        through_host: Whether messages go through the host; None if only where required.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device | None = None,
        *,
        through_host: bool | None = None,
    ) -> None:
        self._group = GroupReference(group)
        self._device = device
        self._through_host = through_host
        self._sent: list[tuple[torch.Tensor, dist.Work | None]] = []
        self._expected: dict[int, deque[list[_Posted]]] = defaultdict(deque)

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Start to send tensors; they may be overwritten after `wait`."""
        for tensor in tensors:
            ready = tensor.detach().contiguous()
            if self._through_host_memory(ready.device):
                ready = ready.to("cpu")
            self._sent.append((ready, dist.isend(ready, group=self._group(), group_dst=peer)))

    def expect(self, peer: int, like: Sequence[torch.Tensor]) -> None:
        """Post a receive; `receive` waits for posted ones in order."""
        self._expected[peer].append(self._post(peer, like))

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Wait for tensors of these shapes and types."""
        posted = self._expected[peer]
        received = []
        for tensor, work, device in posted.popleft() if posted else self._post(peer, like):
            if work is not None:
                work.wait()
            received.append(tensor.to(device))
        return received

    def wait(self) -> None:
        """Wait until all tensors are sent."""
        for _, work in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()

    def _post(self, peer: int, like: Sequence[torch.Tensor]) -> list[_Posted]:
        posted = []
        for expected in like:
            home = self._device or expected.device
            device = torch.device("cpu") if self._through_host_memory(home) else home
            tensor = torch.empty(expected.shape, dtype=expected.dtype, device=device)
            work = dist.irecv(tensor, group=self._group(), group_src=peer)
            posted.append(_Posted(tensor, work, home))
        return posted

    def _through_host_memory(self, device: torch.device) -> bool:
        if self._through_host is not None:
            return self._through_host
        return device.type != "cpu" and backend_of(self._group(), device) == "gloo"


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Return the backend of a group for a kind of device; None if there is none."""
    pairs = (part.partition(":") for part in dist.get_backend_config(group).split(","))
    return {kind: backend for kind, _, backend in pairs}.get(device.type)


_Queues = defaultdict[tuple[int, int], deque[list[torch.Tensor]]]
"""Messages in transit, by sender and receiver."""


class InProcess:
    """Messages between ranks that take turns in one process: for tests, timings and simulation.

    Args:
        rank: This rank.
        queues: The messages of all ranks.
    """

    def __init__(self, rank: int, queues: _Queues) -> None:
        self._rank = rank
        self._queues = queues

    @classmethod
    def of(cls, ranks: int) -> list[InProcess]:
        """Connect a number of ranks; return one transport per rank."""
        queues: _Queues = defaultdict(deque)
        return [cls(rank, queues) for rank in range(ranks)]

    def send(self, peer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Put copies into the queue of the peer."""
        self._queues[self._rank, peer].append([tensor.detach().clone() for tensor in tensors])

    def expect(self, peer: int, like: Sequence[torch.Tensor]) -> None:
        """Do nothing: queues are unbounded."""

    def receive(self, peer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Take the next message of the peer.

        Raises:
            RuntimeFault: It has other shapes or types.
        """
        tensors = self._queues[peer, self._rank].popleft()
        for tensor, expected in zip(tensors, like, strict=True):
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise RuntimeFault(
                    f"rank {self._rank} expected {list(expected.shape)} {expected.dtype} from rank "
                    f"{peer} and got {list(tensor.shape)} {tensor.dtype}"
                )
        return tensors
