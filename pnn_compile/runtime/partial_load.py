"""Partial load: reads from an artifact the tensors of one rank's pieces, and no others.

The network is first made without data, on the meta device; then the tensors of the rank's pieces
take their values from the file. What other ranks hold is never read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pnn_compile.artifact.directory import tensor_readers
from pnn_compile.artifact.modules import named_tensors
from pnn_compile.compiled import Compiled
from pnn_compile.runtime.rank_pieces import RankPieces


def load_part(compiled: Compiled, placement: Sequence[int], rank: int, folder: Path) -> Compiled:
    """Give the tensors of a rank's pieces their values, wherever the network has them.

    The network is changed.

    Args:
        compiled: What `artifact.load(folder, without_data=True)` returned.
        placement: Rank of every stage.
        rank: This rank.
        folder: The artifact.

    Returns:
        The network.

    Raises:
        ArtifactError: The artifact is damaged.
        RuntimeFault: The placement does not fit the network.
    """
    of_program, of_operators = tensor_readers(folder)
    stages = (*compiled.stages.fine, compiled.stages.head, compiled.program.module)
    operators = compiled.operators.named()
    in_program = {id(tensor): name for piece in stages for name, tensor in named_tensors(piece)}
    in_operators = {id(tensor): name for name, tensor in named_tensors(operators)}
    values: dict[int, torch.Tensor] = {}
    for _, tensor in named_tensors(RankPieces(compiled, placement, rank)):
        if not tensor.is_meta or id(tensor) in values:
            continue
        if id(tensor) in in_program:
            values[id(tensor)] = of_program.read(in_program[id(tensor)])
        else:
            values[id(tensor)] = of_operators.read(in_operators[id(tensor)])
    _replace((*stages, operators), values)
    if rank or not compiled.program.unused:
        return compiled
    # Weights of the model that no stage reads are with the first rank.
    unused = {name: of_program.read(name) for name in compiled.program.unused}
    return replace(compiled, program=replace(compiled.program, unused=unused))


def _replace(roots: Iterable[nn.Module], values: Mapping[int, torch.Tensor]) -> None:
    """Put tensors in place of others, by identity, so that what is shared stays so."""
    for module in {module for root in roots for module in root.modules()}:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None and id(tensor) in values:
                    setattr(module, name, values[id(tensor)])  # modules may keep lists of them
