"""Shards the weights of every piece over the replicas, by FSDP2's `fully_shard`.

The hooks of FSDP2 gather the weights of a piece before it runs, forward and backward, and scatter
the averaged gradients behind its backward pass. They work on modules, so the explicit backward of
the ranks meets them as any backward does: every piece is one unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from passes.errors import RuntimeFault

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pnn_compile.compiled import Compiled
    from pnn_compile.runtime.rank import RankNetwork

__all__ = ["full", "local", "shard"]


def shard(compiled: Compiled, network: RankNetwork, mesh: DeviceMesh | None) -> None:
    """Shard the pieces of a rank over a dimension of a mesh.

    Args:
        compiled: The whole network.
        network: The pieces of the rank; their parameters become DTensors of the same names.
        mesh: The dimension of the replicas.

    Raises:
        RuntimeFault: There are no replicas, or a parameter is in several pieces, which FSDP2 would
            take for several parameters.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        raise RuntimeFault(
            "weights are sharded over replicas, and there are none: give a mesh with a dimension "
            '"data" of at least two, or leave shard=False'
        )
    seen: dict[nn.Parameter, str] = {}
    for piece, child in compiled.module.named_children():
        for name, parameter in child.named_parameters():
            if parameter in seen:
                raise RuntimeFault(
                    f"{seen[parameter]} and {piece}.{name} are one tied parameter, which cannot be "
                    "sharded piece by piece: leave shard=False"
                )
            seen[parameter] = f"{piece}.{name}"
    for child in network.children():
        # Every piece is a root, which would otherwise stay gathered after a forward pass, and an
        # optimizer made then would take parameters that nobody trains.
        fully_shard(child, mesh=mesh, reshard_after_forward=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, which shares its memory; the tensor itself if it has none."""
    found: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; all ranks that have a shard of it call this alike."""
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found
