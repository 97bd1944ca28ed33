"""Counts what a step sends, by watching the calls that reach the backend of torch.distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["sent"]


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that this rank sends while it is active.

    A message counts with its size. A collective counts with this rank's share of what it sends at
    least: an all-reduce of B bytes on R ranks 2 (R - 1) / R B (a ring), a broadcast (R - 1) / R B.

    Args:
        ranks: Number of ranks of the group.

    Attributes:
        bytes: The sum.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        share = (ranks - 1) / ranks
        self._weights = {"send": 1.0, "broadcast_": share, "allreduce_": 2 * share}
        self.bytes = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count a call of a collective or message, and let it through."""
        if func.namespace == "c10d":
            weight = self._weights.get(func.__name__.partition(".")[0], 0.0)
            tensors = [x for x in pytree.tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
            self.bytes += weight * sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


def sent(step: Callable[[], object]) -> int:
    """Take a step, on every rank, and give the bytes that all of them sent together."""
    ranks = dist.get_world_size()
    with Traffic(ranks) as traffic:
        step()
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, traffic.bytes)
    total: int = math.ceil(sum(found))
    return total
