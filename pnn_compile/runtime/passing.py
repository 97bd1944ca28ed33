"""Sends and receives single tensors, by way of the host where a backend cannot do otherwise.

Gloo takes tensors on a GPU in its collectives and in no message between two ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Passing", "Pending", "backend_of"]


@dataclass
class Pending:
    """A message under way.

    Attributes:
        tensor: What it is sent from or received into.
        work: What torch.distributed gave; None where there is nothing to wait for.
        device: Where a received tensor belongs.
    """

    tensor: torch.Tensor
    work: dist.Work | None
    device: torch.device

    def wait(self) -> torch.Tensor:
        """Wait until it is there, and give it where it belongs."""
        if self.work is not None:
            self.work.wait()
        return self.tensor.to(self.device)


class Passing:
    """Messages between the ranks of a group.

    Args:
        group: Process group with one process a rank.
        through_host: Whether messages go by way of the host; None if the backend needs it.
    """

    def __init__(self, group: dist.ProcessGroup, *, through_host: bool | None = None) -> None:
        self._group = group
        self._through_host = through_host

    def send(self, peer: int, tensor: torch.Tensor) -> Pending:
        """Begin to send a tensor; it may be written again once the message was waited for."""
        ready = tensor.detach().contiguous()
        if self._by_host(ready.device):
            ready = ready.to("cpu")
        return Pending(ready, dist.isend(ready, group=self._group, group_dst=peer), ready.device)

    def receive(self, peer: int, like: torch.Tensor, device: torch.device | None = None) -> Pending:
        """Begin to receive a tensor of that shape and type.

        Args:
            peer: The sender.
            like: What it is like.
            device: Where it belongs; where `like` is if None.
        """
        home = device or like.device
        room = torch.empty(like.shape, dtype=like.dtype, device=self._room(home))
        return Pending(room, dist.irecv(room, group=self._group, group_src=peer), home)

    def _room(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self._by_host(device) else device

    def _by_host(self, device: torch.device) -> bool:
        if self._through_host is not None:
            return self._through_host
        return device.type != "cpu" and backend_of(self._group, device) == "gloo"


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Name of the backend that a group has for a kind of device; None if there is none."""
    pairs = (each.partition(":") for each in dist.get_backend_config(group).split(","))
    return {kind: backend for kind, _, backend in pairs}.get(device.type)
