"""`Feed`: one rank has the batches, and gives every other rank what its pieces read of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from passes.errors import RuntimeFault
from pnn_compile.runtime.passing import Passing, Pending
from pnn_compile.runtime.rank import RankNetwork

__all__ = ["Feed", "reads"]


@dataclass(frozen=True)
class _Blank:
    """A tensor of a batch without its data."""

    shape: torch.Size
    dtype: torch.dtype


class Feed:
    """Hands the batches of rank 0 out; what a rank does not read comes without data.

    The rank of the last stage gets everything, for the loss may read it.

    Args:
        network: What this rank owns.
        arguments: Names of the arguments of the model.
        group: Process group with one process a rank.
    """

    def __init__(
        self,
        network: RankNetwork,
        arguments: list[str],
        group: dist.ProcessGroup,
    ) -> None:
        self._network = network
        self._arguments = arguments
        self._group = group
        self._passing = Passing(group)
        own = None if network.last in network.own else reads(network, arguments)
        self._needs: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(self._needs, own, group=group)

    def __call__(self, batch: Any) -> Any:
        """Give this rank its batch; all ranks call it, and that of rank 0 counts."""
        rank, source = dist.get_rank(self._group), dist.get_global_rank(self._group, 0)
        outline = [pytree.tree_map(_blank, batch) if rank == 0 else None]
        dist.broadcast_object_list(outline, source, self._group)
        if rank == 0:
            self._send(batch)
            return batch
        # What is needed is begun in the order in which rank 0 sends it.
        pending = self._map(outline[0], self._needs[rank], self._begin)
        return pytree.tree_map(
            lambda leaf: leaf.wait() if isinstance(leaf, Pending) else leaf, pending
        )

    def _send(self, batch: Any) -> None:
        sent = []
        for rank in range(1, len(self._needs)):
            for tensor in _tensors(self._map(batch, self._needs[rank], self._ready)):
                sent.append(self._passing.send(rank, tensor))
        for each in sent:
            each.wait()

    def _map(self, batch: Any, needed: set[str] | None, make: Callable[..., Any]) -> Any:
        """Make every leaf of a batch, knowing whether it is needed."""

        def column(name: str | None, value: Any) -> Any:
            wanted = needed is None or name in needed
            return pytree.tree_map(lambda leaf: make(leaf, wanted), value)

        names = self._arguments
        if isinstance(batch, Mapping):
            return {name: column(name, value) for name, value in batch.items()}
        if isinstance(batch, (tuple, list)):
            padded = [*names, *[None] * len(batch)]
            return tuple(column(n, v) for n, v in zip(padded, batch, strict=False))
        return column(names[0], batch)

    def _begin(self, leaf: Any, wanted: bool) -> Any:
        if not isinstance(leaf, _Blank):
            if isinstance(leaf, torch.Tensor):
                raise RuntimeFault("a batch holds a tensor in a container that torch cannot open")
            return leaf
        like = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        return self._passing.receive(0, like, self._network.device) if wanted else like

    def _ready(self, leaf: Any, wanted: bool) -> Any:
        if not wanted or not isinstance(leaf, torch.Tensor):
            return None
        return leaf.detach().to(self._network.device)


def reads(network: RankNetwork, arguments: list[str]) -> set[str]:
    """Names of the arguments of the model that the pieces of a rank read."""
    executor, found = network.executor, set[str]()
    same = {name: name for name in arguments}
    for piece, _ in network.named_children():
        kind, _, number = piece.rpartition("_")
        if kind == "fine":
            inputs = network.plan.stages[int(number)].inputs
        elif kind == "preprocess":
            inputs = executor.guesses[int(number)].spec.options.inputs
        elif kind == "coarse":
            inputs = executor.corrections[int(number)].spec.options.inputs
        else:
            inputs = network.plan.head.inputs
        found.update(executor.given(inputs, same))
    return found


def _blank(leaf: Any) -> Any:
    return _Blank(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    """The tensors with data, in an order that is the same on both sides."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            yield leaf
