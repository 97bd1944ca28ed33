"""Run replicas of a network on other samples: process groups, averages, and shards (FSDP2).

A run is a grid of processes: along "stage" the ranks of one network, along "data" the processes
with the same pieces and other samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from passes.errors import RuntimeFault
from pnn_compile.runtime.transport import GroupReference, backend_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pnn_compile.compiled import Compiled
    from pnn_compile.runtime.rank_pieces import RankPieces

DATA, STAGE = "data", "stage"
"""Names of the dimensions of a mesh."""

_BUCKET = 25 * 2**20
"""Bytes of one message, as in DistributedDataParallel."""


class Groups:
    """Process groups of one rank.

    Args:
        stages: Processes of its network, one per rank of the placement.
        replicas: Processes with the same stages and other samples; None without replicas.
        everyone: All processes of the run.
        data: Mesh dimension of the replicas; None without replicas.
    """

    def __init__(
        self,
        stages: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        everyone: dist.ProcessGroup,
        data: DeviceMesh | None = None,
    ) -> None:
        self._stages = GroupReference(stages)
        self._replicas = None if replicas is None else GroupReference(replicas)
        self._everyone = GroupReference(everyone)
        self.data = data

    @property
    def stages(self) -> dist.ProcessGroup:
        """Processes of its network."""
        return self._stages()

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """Processes with the same stages and other samples; None without replicas."""
        return None if self._replicas is None else self._replicas()

    @property
    def everyone(self) -> dist.ProcessGroup:
        """All processes of the run."""
        return self._everyone()

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> Groups:
        """Return the groups of a mesh, or one group for everything (the default one if None).

        Raises:
            RuntimeFault: torch.distributed is not initialized, both are passed, or the mesh has
                other dimensions than "data" and "stage".
        """
        if not dist.is_initialized():
            raise RuntimeFault(
                "torch.distributed is not initialized: call dist.init_process_group() first, in a "
                "script that torchrun starts"
            )
        world = dist.group.WORLD
        assert world is not None
        if mesh is None:
            return cls(group or world, None, group or world)
        names = mesh.mesh_dim_names or ()
        if group is not None or STAGE not in names or not set(names) <= {DATA, STAGE}:
            raise RuntimeFault(
                f"a mesh has the dimensions ({DATA!r}, {STAGE!r}), or {STAGE!r} alone, and "
                f"replaces a group (it has {tuple(names)}): create it with "
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
        """Check that the ranks can send each other tensors on this device.

        Raises:
            RuntimeFault: The group has no backend for this kind of device.
        """
        if backend_of(self.stages, device) is None:
            raise RuntimeFault(
                f"the weights are on {device}, and the process group cannot send from there "
                f"(backend {dist.get_backend(self.stages)}): pass distribute(device=...), or start "
                'it with init_process_group("cpu:gloo,cuda:nccl")'
            )

    def common_seed(self) -> int:
        """Return the seed of the first process, on all processes."""
        seed = [torch.initial_seed() % 2**48]
        dist.broadcast_object_list(seed, dist.get_global_rank(self.everyone, 0), self.everyone)
        return seed[0]

    def check_plan(self, digest: str) -> None:
        """Check that all processes have the same network.

        Raises:
            RuntimeFault: The digests of the plans differ.
        """
        digests: list[Any] = [None] * dist.get_world_size(self.everyone)
        dist.all_gather_object(digests, digest, group=self.everyone)
        if len(set(digests)) > 1:
            different = [rank for rank, other in enumerate(digests) if other != digests[0]]
            raise RuntimeFault(
                f"ranks {different} have another plan than rank 0: compile with the same model, "
                "options and seed on all of them, or load one artifact"
            )


def plan_digest(compiled: Compiled) -> str:
    """Return a digest of the plan, to compare those of several processes."""
    return hashlib.sha256(compiled.plan.to_json().encode()).hexdigest()


class Replicas:
    """Keep the pieces of a rank equal to those of other processes, which run other samples.

    They start with the weights of the first replica, average their gradients after every backward
    pass, and take the buffers of the first replica (statistics of BatchNorm) before every forward
    pass.

    Args:
        module: The pieces of this rank.
        group: The processes with the same pieces; None without replicas.
        sharded: Whether FSDP2 shards the weights and averages their gradients.
    """

    def __init__(
        self, module: nn.Module, group: dist.ProcessGroup | None, *, sharded: bool = False
    ) -> None:
        self._module = module
        self._group = None if group is None else GroupReference(group)
        self._sharded = sharded
        if group is not None:
            with torch.no_grad():
                self._broadcast(module.parameters())
                self._broadcast(module.buffers())

    def share_buffers(self) -> None:
        """Copy the buffers of the first replica to all others."""
        if self._group is not None:
            self._broadcast(self._module.buffers())

    def average_gradients(self) -> None:
        """Average gradients over the replicas, of every parameter that has one on any replica."""
        if self._group is None or self._sharded:
            return
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        device = next((p.device for p in parameters), torch.device("cpu"))
        flags = torch.tensor(
            [p.grad is not None for p in parameters], dtype=torch.uint8, device=device
        )
        dist.all_reduce(flags, dist.ReduceOp.MAX, self._group())
        gradients = []
        for parameter, has_gradient in zip(parameters, flags.tolist(), strict=True):
            if has_gradient:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat, group=self._group())
            flat /= dist.get_world_size(self._group())
            for gradient, mean in zip(bucket, _split(flat, bucket), strict=True):
                gradient.copy_(mean)

    def combine(self, loss: Any) -> torch.Tensor:
        """Return the loss of this replica, so that the mean over the replicas is that of all.

        Args:
            loss: What the loss function returned: a scalar, or a pair of a sum and its weight.

        Raises:
            RuntimeFault: It is something else.
        """
        total, weight = loss if isinstance(loss, (tuple, list)) and len(loss) == 2 else (loss, None)
        if not isinstance(total, torch.Tensor) or total.numel() != 1:
            raise RuntimeFault(
                "the loss function must return a scalar, or a pair of a sum and its weight "
                f"(got {list(total.shape) if isinstance(total, torch.Tensor) else total!r})"
            )
        if weight is None:
            return total.reshape(())
        share = torch.as_tensor(weight, dtype=torch.float32, device=total.device).detach()
        return total.reshape(()) / self.mean(share.reshape(()).clone())

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Average a value over the replicas."""
        if self._group is None:
            return value
        dist.all_reduce(value, group=self._group())
        return value / dist.get_world_size(self._group())

    def _broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy tensors of the first replica to all others."""
        assert self._group is not None
        source = dist.get_global_rank(self._group(), 0)
        for bucket in _buckets([tensor.detach() for tensor in tensors]):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            # As bytes: not all types can be sent.
            dist.broadcast(flat.view(torch.uint8), source, self._group())
            for tensor, value in zip(bucket, _split(flat, bucket), strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group tensors of one type until a message is full."""
    open_buckets: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        bucket = open_buckets.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(member.nbytes for member in bucket) >= _BUCKET:
            yield open_buckets.pop(tensor.dtype)
    yield from open_buckets.values()


def _split(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def shard_weights(compiled: Compiled, pieces: RankPieces, mesh: DeviceMesh | None) -> None:
    """Shard the weights of a rank over the replicas, every piece as one unit of FSDP2.

    FSDP2's hooks gather the weights of a piece before it runs, forward and backward, and scatter
    the averaged gradients after its backward pass. They belong to modules, so they also
    run in the explicit backward of the engine.

    Args:
        compiled: The whole network.
        pieces: The pieces of the rank; their parameters become DTensors of the same names.
        mesh: Mesh dimension of the replicas.

    Raises:
        RuntimeFault: There are no replicas, or a parameter is in several pieces, which FSDP2 would
            take for several parameters.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        raise RuntimeFault(
            "weights are sharded over replicas, and there are none: pass a mesh with a dimension "
            '"data" of at least two, or shard=False'
        )
    owners: dict[nn.Parameter, str] = {}
    for piece, child in compiled.module.named_children():
        for name, parameter in child.named_parameters():
            if parameter in owners:
                raise RuntimeFault(
                    f"{owners[parameter]} and {piece}.{name} are one tied parameter, which cannot "
                    "be sharded piece by piece: pass shard=False"
                )
            owners[parameter] = f"{piece}.{name}"
    for child in pieces.children():
        # Every piece is a root, which would stay gathered after a forward pass by default; an
        # optimizer created then would get parameters that are not trained.
        fully_shard(child, mesh=mesh, reshard_after_forward=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor, which shares its memory; a plain tensor as it is."""
    shard: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor; all ranks with a shard of it must call this."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole
