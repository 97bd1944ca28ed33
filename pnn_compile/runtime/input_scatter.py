"""Scatter inputs: send a batch from rank 0 to the other ranks, each what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from passes.ir.program import Program
from pnn_compile.inputs import argument_names, arguments_of
from pnn_compile.runtime.rank_pieces import RankPieces
from pnn_compile.runtime.transport import GroupReference, PointToPoint


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
        program: The program that the pieces belong to.
        group: Process group with one process a rank.
    """

    def __init__(self, pieces: RankPieces, program: Program, group: dist.ProcessGroup) -> None:
        self._pieces = pieces
        self._program = program
        self._group = GroupReference(group)
        needs = None if pieces.holds_head else arguments_read(pieces, argument_names(program))
        self._needs: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(self._needs, needs, group=group)

    def __call__(self, batch: Any) -> Any:
        """Return this rank's batch; all ranks call it, and only the batch of rank 0 is used."""
        rank, source = dist.get_rank(self._group()), dist.get_global_rank(self._group(), 0)
        message: list[Any] = [None, None]
        if rank == 0:
            message = [pytree.tree_map(_blank, batch), self._columns(batch)]
        dist.broadcast_object_list(message, source, self._group())
        outline, columns = message
        device = self._pieces.device
        transport = PointToPoint(self._group(), device)
        if rank == 0:
            leaves = pytree.tree_leaves(batch)
            for peer in range(1, len(self._needs)):
                places = self._places(outline, columns, peer)
                transport.send(peer, [leaves[place].to(device) for place in places])
            transport.wait()
            return batch
        leaves, structure = pytree.tree_flatten(outline)
        leaves = [_without_data(leaf) for leaf in leaves]
        places = self._places(outline, columns, rank)
        received = transport.receive(0, [leaves[place] for place in places])
        for place, tensor in zip(places, received, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, structure)

    def _columns(self, batch: Any) -> list[str | None]:
        """Return the argument that every leaf of a batch belongs to; None for labels."""
        if isinstance(batch, Mapping):
            named = [*batch.items()]
        elif isinstance(batch, (tuple, list)):
            named = [*zip(arguments_of(self._program, batch), batch, strict=True)]
        else:
            named = [(argument_names(self._program)[0], batch)]
        return [name for name, value in named for _ in pytree.tree_leaves(value)]

    def _places(self, outline: Any, columns: list[str | None], rank: int) -> list[int]:
        """Return the positions, among the leaves of a batch, of the tensors that a rank reads."""
        needs = self._needs[rank]
        leaves = zip(columns, pytree.tree_leaves(outline), strict=True)
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
