"""`Groups`: which processes share a network, and which hold replicas of the same stages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from passes.errors import RuntimeFault
from pnn_compile.runtime.passing import backend_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pnn_compile.compiled import Compiled

__all__ = ["Groups"]

DATA, STAGE = "data", "stage"
"""Names of the dimensions of a mesh."""


@dataclass(frozen=True)
class Groups:
    """Process groups of one rank.

    Attributes:
        stages: Its network: one process a rank of the placement.
        replicas: Those that hold the same stages and see other data; None where there are none.
        everyone: All processes of the run.
        data: The dimension of the replicas; None where there are none.
    """

    stages: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    everyone: dist.ProcessGroup
    data: DeviceMesh | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> Groups:
        """Take the groups of a mesh, or one group for everything (the default one if None).

        Raises:
            RuntimeFault: torch.distributed is not initialised, both are given, or the mesh has
                other dimensions than "data" and "stage".
        """
        if not dist.is_initialized():
            raise RuntimeFault(
                "torch.distributed is not initialised: call dist.init_process_group() first, in a "
                "script that torchrun starts"
            )
        world = dist.group.WORLD
        assert world is not None
        if mesh is None:
            return cls(group or world, None, group or world)
        names = mesh.mesh_dim_names or ()
        if group is not None or STAGE not in names or not set(names) <= {DATA, STAGE}:
            raise RuntimeFault(
                f"a mesh has the dimensions ({DATA!r}, {STAGE!r}), or {STAGE!r} alone, and stands "
                f"in place of a group (it has {tuple(names)}): make it with "
                'init_device_mesh("cpu", (replicas, ranks), mesh_dim_names=("data", "stage"))'
            )
        members = sorted(mesh.mesh.flatten().tolist())
        everyone = world
        if len(members) < dist.get_world_size():
            everyone = dist.new_group(members, use_local_synchronization=True)
        data = mesh[DATA] if DATA in names and mesh[DATA].size() > 1 else None
        replicas = None if data is None else data.get_group()
        return cls(mesh[STAGE].get_group(), replicas, everyone, data)

    @property
    def replica(self) -> int:
        """Number of this replica of the network."""
        return 0 if self.replicas is None else dist.get_rank(self.replicas)

    def check_backend(self, device: torch.device) -> None:
        """Refuse weights that the ranks could not send each other.

        Raises:
            RuntimeFault: The group has no backend for this kind of device.
        """
        if backend_of(self.stages, device) is None:
            raise RuntimeFault(
                f"the weights are on {device}, and the process group sends nothing from there "
                f"(backend {dist.get_backend(self.stages)}): give distribute(device=...), or start "
                'it with init_process_group("cpu:gloo,cuda:nccl")'
            )

    def common_seed(self) -> int:
        """The seed of the first process, for all of them."""
        found = [torch.initial_seed() % 2**48]
        dist.broadcast_object_list(found, dist.get_global_rank(self.everyone, 0), self.everyone)
        return found[0]

    def compare(self, compiled: Compiled) -> None:
        """Refuse processes that hold different networks.

        Raises:
            RuntimeFault: The plans differ.
        """
        found: list[Any] = [None] * dist.get_world_size(self.everyone)
        dist.all_gather_object(found, plan_digest(compiled), group=self.everyone)
        if len(set(found)) > 1:
            different = [rank for rank, each in enumerate(found) if each != found[0]]
            raise RuntimeFault(
                f"ranks {different} hold another plan than rank 0: compile with the same model, "
                "options and seed on all of them, or load one artifact"
            )


def plan_digest(compiled: Compiled) -> str:
    """A short text that differs where plans do."""
    return hashlib.sha256(compiled.plan.to_json().encode()).hexdigest()
