"""Distribute a network over the ranks of a group or mesh: the entry of the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from passes.errors import RuntimeFault, first_line
from passes.ir.module_walk import named_tensors
from pnn_compile.runtime.data_parallel import Groups
from pnn_compile.runtime.rank_module import RankModule
from pnn_compile.runtime.rank_pieces import PieceOptions, RankPieces
from pnn_compile.runtime.tied_weights import check_memory, check_shardable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pnn_compile.compiled import Compiled


def place(stages: int, ranks: int, windows: int = 1) -> tuple[int, ...]:
    """Place stages on ranks, neighbors together, as evenly as possible; return their ranks.

    Every window is placed on all ranks.

    Raises:
        RuntimeFault: There are more ranks than stages.
    """
    size = stages // windows
    if ranks > size:
        inside = f" in {windows} windows" if windows > 1 else ""
        raise RuntimeFault(
            f"{ranks} ranks for {stages} stages{inside}: compile with stages={ranks * windows}, or "
            f"start {size} ranks"
        )
    return tuple(stage % size * ranks // size for stage in range(stages))


def distribute(
    compiled: Compiled | str | Path,
    *,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    placement: Sequence[int] | None = None,
    batches: int = 1,
    autocast: torch.dtype | None = None,
    recompute: bool = False,
    compile_backend: str | Callable[..., Any] | None = None,
    shard: bool = False,
    device: torch.device | str | None = None,
    inputs: Literal["every rank", "rank 0"] = "every rank",
) -> RankModule:
    """Return this rank's part of a network, on every rank of a process group or mesh.

    On a mesh of dimensions ("data", "stage"), several replicas of the network, each on the ranks
    along "stage", run different batches. Along "data" it is DistributedDataParallel: gradients are
    averaged over the replicas, which is the gradient of the mean loss over all samples if the
    batches are equally large, or if the loss returns a sum and its weight; BatchNorm normalizes by
    the batch of its replica, and all replicas continue with the running statistics of the first
    one.

    Args:
        compiled: The whole network, the same on every rank; or the directory of an artifact, of
            which every rank reads the weights of its stages only.
        group: Process group with one process per rank; the default one if None. A rank whose step
            fails closes the connections of the group, so that no other waits for it: pass
            `dist.new_group()`, on all ranks, if the script has collectives of its own after that.
        mesh: Instead of a group, `init_device_mesh("cpu", (replicas, ranks),
            mesh_dim_names=("data", "stage"))`.
        placement: Rank of every stage; neighbors together, evenly, if None.
        batches: Number of micro-batches of a step; more than one for models that treat every
            sample alone (but for BatchNorm in training), which the first step checks.
        autocast: Precision of torch.autocast around every piece, and of the states that cross
            between ranks: torch.bfloat16, or torch.float16 with `RankModule.grad_scaler`.
        recompute: Whether fine stages save only their inputs and run again in the backward pass
            (activation checkpointing).
        compile_backend: Backend of torch.compile, which compiles every piece separately.
        shard: Whether every replica stores a shard of the weights only (FSDP2, a unit per piece).
        device: Device of this rank's pieces and batches; that of the weights if None, which for an
            artifact is the CPU.
        inputs: Ranks that pass the batches: every rank the same one, or rank 0 of a network alone,
            which sends every rank the tensors that its stages read.

    Returns:
        The module of this rank; train it with `RankModule.train_step`.

    Raises:
        RuntimeFault: torch.distributed is not initialized, the ranks have different networks, the
            placement does not fit, there is no such device, or different parameters share memory.
        ArtifactError: As `pnn.load`.
    """
    groups, home = Groups.of(group, mesh), _device(device)
    folder = None
    if isinstance(compiled, (str, Path)):
        from pnn_compile.artifact.directory import load

        folder = Path(compiled)
        compiled = load(folder, without_data=True)
    elif any(tensor.is_meta for _, tensor in named_tensors(compiled.module)):
        raise RuntimeFault(
            f"{compiled.plan.model} has weights on the meta device, without data: compile it with "
            "its weights and save it; distribute() of that artifact reads on every rank what it "
            "needs alone"
        )
    ranks = dist.get_world_size(groups.stages)
    if placement is None:
        placement = place(len(compiled.plan.stages), ranks, compiled.plan.windows)
    if max(placement) + 1 != ranks:
        raise RuntimeFault(f"{max(placement) + 1} ranks are placed, the group has {ranks}")
    check_memory(compiled, placement)
    if folder is not None:
        compiled = load_part(compiled, placement, dist.get_rank(groups.stages), folder)
    if shard:
        check_shardable(compiled)
    if inputs not in ("every rank", "rank 0"):
        raise RuntimeFault(f"inputs must be 'every rank' or 'rank 0' (got {inputs!r})")
    return RankModule(
        compiled,
        placement,
        groups,
        batches,
        PieceOptions(autocast, recompute, compile_backend),
        shard=shard,
        scatter=inputs == "rank 0",
        device=home,
    )


def _device(name: torch.device | str | None) -> torch.device | None:
    """Return the device of that name, with its number, if there is one."""
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RuntimeFault(f"device {str(name)!r} cannot be used: {first_line(error)}") from error


def load_part(compiled: Compiled, placement: Sequence[int], rank: int, folder: Path) -> Compiled:
    """Read the tensors of one rank's pieces from an artifact, and no others.

    The network was loaded without data, on the meta device. It is changed: wherever it contains a
    tensor of the pieces, the tensor is replaced by that of the file.

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
    from pnn_compile.artifact.directory import tensor_readers

    of_program, of_operators = tensor_readers(folder)
    stages = (*compiled.stages.fine, compiled.stages.head, compiled.program.module)
    operators = compiled.operators.named()
    in_program = {
        id(tensor): name for piece in stages for name, tensor in named_tensors(piece, repeats=True)
    }
    in_operators = {id(tensor): name for name, tensor in named_tensors(operators, repeats=True)}
    values: dict[int, torch.Tensor] = {}
    for _, tensor in named_tensors(RankPieces(compiled, placement, rank)):
        if not tensor.is_meta:
            continue
        if id(tensor) in in_program:
            values[id(tensor)] = of_program.read(in_program[id(tensor)])
        else:
            values[id(tensor)] = of_operators.read(in_operators[id(tensor)])
    _replace((*stages, operators), values)
    if rank or not compiled.program.unused:
        return compiled
    # Weights of the model that no stage reads belong to the first rank.
    unused = {name: of_program.read(name) for name in compiled.program.unused}
    return replace(compiled, program=replace(compiled.program, unused=unused))


def _replace(roots: Iterable[nn.Module], values: Mapping[int, torch.Tensor]) -> None:
    """Replace tensors by identity, so that tied weights stay tied."""
    for module in {module for root in roots for module in root.modules()}:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None and id(tensor) in values:
                    # Not into the dict alone: modules may keep lists of their tensors.
                    setattr(module, name, values[id(tensor)])
