"""`Replicas`: data parallelism of one rank, with the semantics of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Replicas"]

BUCKET = 25 * 2**20
"""Bytes of one message; what DistributedDataParallel takes."""


class Replicas:
    """The copies of a rank's pieces that other processes hold and feed with other data.

    They start with the weights of the first replica, average their gradients after every backward
    pass, and take up the buffers of the first replica (statistics of BatchNorm) before every
    forward pass.

    Args:
        module: The pieces of this rank.
        group: The processes that hold the same pieces; None for this one alone.
        sharded: Whether the weights will be sharded, and their gradients come averaged.
    """

    def __init__(
        self, module: nn.Module, group: dist.ProcessGroup | None, *, sharded: bool = False
    ) -> None:
        self._module = module
        self._group = group
        self._sharded = sharded
        if group is not None:
            with torch.no_grad():
                self._share(module.parameters())
                self._share(module.buffers())

    def share_buffers(self) -> None:
        """Give all replicas the buffers of the first one."""
        if self._group is not None:
            self._share(self._module.buffers())

    def average_gradients(self) -> None:
        """Average the gradients; all replicas hold the same ones behind it."""
        if self._group is None or self._sharded:
            return
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        device = next((p.device for p in parameters), torch.device("cpu"))
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        has = has.to(device)
        dist.all_reduce(has, dist.ReduceOp.MAX, self._group)
        gradients = []
        for parameter, somewhere in zip(parameters, has.tolist(), strict=True):
            if somewhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            dist.all_reduce(flat, group=self._group)
            flat /= dist.get_world_size(self._group)
            for gradient, mean in zip(bucket, _split(flat, bucket), strict=True):
                gradient.copy_(mean)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Average a value over the replicas."""
        if self._group is None:
            return value
        dist.all_reduce(value, group=self._group)
        return value / dist.get_world_size(self._group)

    def _share(self, tensors: Iterable[torch.Tensor]) -> None:
        assert self._group is not None
        source = dist.get_global_rank(self._group, 0)
        for bucket in _buckets([tensor.detach() for tensor in tensors]):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            dist.broadcast(flat.view(torch.uint8), source, self._group)  # not all types are sent
            for tensor, value in zip(bucket, _split(flat, bucket), strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group tensors of one type until a message is full."""
    found: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        bucket = found.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(each.nbytes for each in bucket) >= BUCKET:
            yield found.pop(tensor.dtype)
    yield from found.values()


def _split(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = torch.split(flat, [each.numel() for each in like])
    return [piece.view(each.shape) for piece, each in zip(pieces, like, strict=True)]
