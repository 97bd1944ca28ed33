"""Scatter inputs: cut a batch into micro-batches, and send it from rank 0 to the other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from passes.errors import RuntimeFault
from pnn_compile.inputs import batch_size
from pnn_compile.runtime.rank_pieces import RankPieces
from pnn_compile.runtime.transport import PointToPoint


def divide(batch: Any, count: int) -> list[Any]:
    """Cut a batch into micro-batches along dimension 0 of the tensors that have its samples.

    A leaf without samples (a tensor whose dimension 0 has another size, a number) goes into all of
    them as it is. Their sizes differ by one sample at most.

    Raises:
        RuntimeFault: The batch has too few samples.
    """
    if count == 1:
        return [batch]
    samples = batch_size({"batch": batch})
    if samples < count:
        raise RuntimeFault(
            f"a batch of {samples} does not divide into {count} micro-batches: pass at least "
            f"{count} samples, best a multiple"
        )

    def piece(number: int) -> Any:
        def cut(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == samples:
                return torch.tensor_split(leaf, count)[number]
            return leaf

        return pytree.tree_map(cut, batch)

    return [piece(number) for number in range(count)]


def arguments_read(pieces: RankPieces, arguments: list[str]) -> set[str]:
    """Return the arguments of the model that the pieces of a rank read."""
    plan, executor = pieces.plan, pieces.executor
    inputs = [name for stage in pieces.stages for name in plan.stages[stage].inputs]
    for stage in pieces.guessed:
        inputs += executor.guesses[stage].spec.options.inputs
    for stage in pieces.corrected:
        inputs += executor.corrections[stage].spec.options.inputs
    if pieces.holds_head:
        inputs += plan.head.inputs
    return {*executor.given(inputs, {name: name for name in arguments})}


@dataclass(frozen=True)
class _Blank:
    """A tensor of a batch without its data."""

    shape: torch.Size
    dtype: torch.dtype


class InputScatter:
    """Send every rank the tensors of rank 0's batch that it reads; the others come without data.

    The rank of the last stage gets everything, for the loss may read it. Messages, not
    `scatter_object_list`, which pickles the tensors and pads every part to the largest.

    Args:
        pieces: The pieces of this rank.
        arguments: Names of the arguments of the model.
        group: Process group with one process a rank.
    """

    def __init__(self, pieces: RankPieces, arguments: list[str], group: dist.ProcessGroup) -> None:
        self._pieces = pieces
        self._arguments = arguments
        self._group = group
        needs = None if pieces.holds_head else arguments_read(pieces, arguments)
        self._needs: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(self._needs, needs, group=group)

    def __call__(self, batch: Any) -> Any:
        """Return this rank's batch; all ranks call it, and only the batch of rank 0 is used."""
        rank, source = dist.get_rank(self._group), dist.get_global_rank(self._group, 0)
        outline = [pytree.tree_map(_blank, batch) if rank == 0 else None]
        dist.broadcast_object_list(outline, source, self._group)
        device = self._pieces.device
        transport = PointToPoint(self._group, device)
        if rank == 0:
            leaves = pytree.tree_leaves(batch)
            for peer in range(1, len(self._needs)):
                places = self._places(outline[0], peer)
                transport.send(peer, [leaves[place].to(device) for place in places])
            transport.wait()
            return batch
        leaves, structure = pytree.tree_flatten(outline[0])
        leaves = [_without_data(leaf) for leaf in leaves]
        places = self._places(outline[0], rank)
        received = transport.receive(0, [leaves[place] for place in places])
        for place, tensor in zip(places, received, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, structure)

    def _places(self, outline: Any, rank: int) -> list[int]:
        """Return the positions, among the leaves of a batch, of the tensors that a rank reads."""
        if isinstance(outline, Mapping):
            columns = [*outline.items()]
        elif isinstance(outline, (tuple, list)):
            # Labels may follow the arguments.
            names = [*self._arguments, *[None] * len(outline)]
            columns = [*zip(names, outline, strict=False)]
        else:
            columns = [(self._arguments[0], outline)]
        leaves = [(name, leaf) for name, value in columns for leaf in pytree.tree_leaves(value)]
        needs = self._needs[rank]
        return [
            place
            for place, (name, leaf) in enumerate(leaves)
            if isinstance(leaf, _Blank) and (needs is None or name in needs)
        ]


def _blank(leaf: Any) -> Any:
    return _Blank(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _without_data(leaf: Any) -> Any:
    if isinstance(leaf, _Blank):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return leaf
