"""Keep tied weights equal: parameters that several ranks own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from passes.errors import RuntimeFault
from passes.ir.program import has_gradient_hooks, share_memory, storage_id
from pnn_compile.runtime.rank_pieces import RankPieces
from pnn_compile.runtime.transport import PointToPoint

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled


def check_memory(compiled: Compiled, placement: Sequence[int]) -> None:
    """Refuse different parameters over one memory (`a.weight.data = b.weight.data`) on two ranks.

    Raises:
        RuntimeFault: There are such parameters.
    """
    holders: dict[int | None, list[tuple[int, str, nn.Parameter]]] = {}
    for rank in range(max(placement) + 1):
        for name, parameter in RankPieces(compiled, placement, rank).named_parameters():
            others = holders.setdefault(storage_id(parameter), [])
            for other_rank, other_name, other in others:
                if rank != other_rank and parameter is not other and share_memory(parameter, other):
                    raise RuntimeFault(
                        f"{other_name} of rank {other_rank} and {name} of rank {rank} are two "
                        "parameters over one memory, which ranks cannot keep equal: make them one "
                        "Parameter (a.weight = b.weight) and compile again, or place their stages "
                        "on one rank"
                    )
            others.append((rank, name, parameter))


def check_shardable(compiled: Compiled) -> None:
    """Refuse to shard what sharding would lose: hooks on gradients, parameters over one memory.

    Raises:
        RuntimeFault: The network has either.
    """
    by_storage: dict[int | None, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in compiled.module.named_parameters():
        if has_gradient_hooks(parameter):
            raise RuntimeFault(f"{name} has a hook on its gradient, which shard=True would lose")
        others = by_storage.setdefault(storage_id(parameter), [])
        for other_name, other in others:
            if share_memory(parameter, other):
                raise RuntimeFault(
                    f"{other_name} and {name} are two parameters over one memory, which shard=True "
                    "would separate: make them one Parameter (a.weight = b.weight)"
                )
        others.append((name, parameter))


class TiedWeights:
    """Parameters that several ranks own; they start with the values of the first of these ranks.

    Messages between the owners, not collectives: those would need a process group for every set
    of ranks, whose creation all processes of the run would have to take part in.

    Args:
        compiled: The whole network.
        placement: Rank of every stage.
        group: Process group with one process a rank.
    """

    def __init__(
        self, compiled: Compiled, placement: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        owners: dict[nn.Parameter, list[int]] = {}
        for rank in range(max(placement) + 1):
            for parameter in RankPieces(compiled, placement, rank).parameters():
                owners.setdefault(parameter, []).append(rank)
        self._transport = PointToPoint(group)
        self._rank = dist.get_rank(group)
        self._counted = {p for p, ranks in owners.items() if ranks[0] == self._rank}
        # In the same order on all ranks, so that messages meet.
        self._tied: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter, ranks in owners.items():
            if len(ranks) > 1 and self._rank in ranks:
                self._tied.setdefault(tuple(ranks), []).append(parameter)
        for members, parameters in self._tied.items():
            for parameter in parameters:
                self._broadcast(parameter.detach(), members)

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts a parameter, in sums that count every parameter once."""
        return parameter in self._counted

    def set_aside(self) -> dict[nn.Parameter, torch.Tensor]:
        """Remove and return the gradients of earlier passes, which are summed already."""
        earlier = {}
        for parameter in itertools.chain.from_iterable(self._tied.values()):
            if parameter.grad is not None:
                earlier[parameter], parameter.grad = parameter.grad, None
        return earlier

    def sum_gradients(self, earlier: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Sum the gradients of every tied parameter over the ranks that own it.

        A parameter without a gradient on all ranks stays without.

        Args:
            earlier: What `set_aside` returned before the pass; it is added to the sums.

        Raises:
            RuntimeFault: A parameter is frozen on some of its ranks only.
        """
        for ranks, parameters in self._tied.items():
            for parameter in self._trained(parameters, ranks):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._sum(parameter.grad, ranks)
        for parameter, gradient in earlier.items():
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _trained(
        self, parameters: Sequence[nn.Parameter], ranks: Sequence[int]
    ) -> list[nn.Parameter]:
        """Select the parameters that have a gradient on some of the ranks."""
        flags = [[p.grad is not None, not p.requires_grad] for p in parameters]
        counts = torch.tensor(flags, dtype=torch.int32, device=parameters[0].device)
        self._sum(counts, ranks)
        selected = []
        for parameter, (trained, frozen) in zip(parameters, counts.tolist(), strict=True):
            if 0 < frozen < len(ranks):
                raise RuntimeFault(
                    f"a tied parameter of shape {list(parameter.shape)} is frozen on {frozen} of "
                    f"the ranks {list(ranks)}: set its requires_grad alike on all of them"
                )
            if trained:
                selected.append(parameter)
        return selected

    def _sum(self, tensor: torch.Tensor, ranks: Sequence[int]) -> None:
        """Sum tensors on the first of the ranks, in rank order, and copy the sum to all."""
        if self._rank == ranks[0]:
            for peer in ranks[1:]:
                tensor += self._transport.receive(peer, [tensor])[0]
        else:
            self._transport.send(ranks[0], [tensor])
            self._transport.wait()
        self._broadcast(tensor, ranks)

    def _broadcast(self, tensor: torch.Tensor, ranks: Sequence[int]) -> None:
        """Copy the tensor of the first rank to all others."""
        if self._rank == ranks[0]:
            for peer in ranks[1:]:
                self._transport.send(peer, [tensor])
            self._transport.wait()
        else:
            tensor.copy_(self._transport.receive(ranks[0], [tensor])[0])
