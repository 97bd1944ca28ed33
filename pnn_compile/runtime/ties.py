"""`Ties`: parameters that several ranks hold, kept equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from pnn_compile.runtime.rank import RankNetwork

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["Ties"]


class Ties:
    """Parameters that several ranks hold; they get the values of the first of these ranks.

    Args:
        compiled: The whole network.
        placement: Rank of every stage.
        group: Process group with one process a rank.
    """

    def __init__(
        self, compiled: Network, placement: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        owners: dict[nn.Parameter, list[int]] = {}
        for rank in range(max(placement) + 1):
            for parameter in RankNetwork(compiled, placement, rank).parameters():
                owners.setdefault(parameter, []).append(rank)
        rank = dist.get_rank(group)
        self._counted = {p for p, ranks in owners.items() if ranks[0] == rank}
        self._shared: list[tuple[nn.Parameter, dist.ProcessGroup]] = []
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for parameter, ranks in owners.items():
            key = tuple(ranks)
            if len(key) < 2 or rank not in key:
                continue
            if key not in groups:
                members = [dist.get_global_rank(group, each) for each in key]
                # Ranks of other replicas, and those that share nothing, do not take part.
                groups[key] = dist.new_group(members, use_local_synchronization=True)
            self._shared.append((parameter, groups[key]))
        self.share_values()

    def share_values(self) -> None:
        """Give every shared parameter the value of the first rank that holds it."""
        with torch.no_grad():
            for parameter, among in self._shared:
                dist.broadcast(parameter, dist.get_global_rank(among, 0), among)

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the one that counts a parameter where all are counted once."""
        return parameter in self._counted

    def sum_gradients(self) -> None:
        """Add up the gradients of every shared parameter over the ranks that hold it."""
        for parameter, group in self._shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
