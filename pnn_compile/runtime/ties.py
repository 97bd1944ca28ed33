"""`Ties`: parameters that several ranks hold, kept equal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from passes.errors import RuntimeFault
from pnn_compile.runtime.passing import Passing
from pnn_compile.runtime.rank import RankNetwork

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["Ties"]


class Ties:
    """Parameters that several ranks hold; they get the values of the first of these ranks.

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
            for parameter in RankNetwork(compiled, placement, rank).parameters():
                owners.setdefault(parameter, []).append(rank)
        self._passing = Passing(group)
        self._rank = dist.get_rank(group)
        self._counted = {p for p, ranks in owners.items() if ranks[0] == self._rank}
        # In the same order on all ranks, so that messages meet.
        self._shared: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter, ranks in owners.items():
            if len(ranks) > 1 and self._rank in ranks:
                self._shared.setdefault(tuple(ranks), []).append(parameter)
        for holders, parameters in self._shared.items():
            for parameter in parameters:
                self._give(parameter.detach(), holders)

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the one that counts a parameter where all are counted once."""
        return parameter in self._counted

    def set_aside(self) -> dict[nn.Parameter, torch.Tensor]:
        """Take away the gradients of earlier steps, which are summed already, and give them."""
        earlier = {}
        for parameter in itertools.chain.from_iterable(self._shared.values()):
            if parameter.grad is not None:
                earlier[parameter], parameter.grad = parameter.grad, None
        return earlier

    def sum_gradients(self, earlier: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Add up the gradients of every shared parameter over the ranks that hold it.

        A parameter that got no gradient on any rank is left without.

        Args:
            earlier: What `set_aside` gave before the step; it is added to the sums.

        Raises:
            RuntimeFault: A parameter is frozen on some of its ranks only.
        """
        for ranks, parameters in self._shared.items():
            for parameter in self._trained(parameters, ranks):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._sum(parameter.grad, ranks)
        for parameter, gradient in earlier.items():
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _trained(
        self, parameters: Sequence[nn.Parameter], ranks: Sequence[int]
    ) -> list[nn.Parameter]:
        """Those of the parameters that have a gradient on some of the ranks."""
        flags = [[p.grad is not None, not p.requires_grad] for p in parameters]
        counts = torch.tensor(flags, dtype=torch.int32, device=parameters[0].device)
        self._sum(counts, ranks)
        found = []
        for parameter, (trained, frozen) in zip(parameters, counts.tolist(), strict=True):
            if 0 < frozen < len(ranks):
                raise RuntimeFault(
                    f"a tied parameter of shape {list(parameter.shape)} is frozen on {frozen} of "
                    f"the ranks {list(ranks)}: set its requires_grad alike on all of them"
                )
            if trained:
                found.append(parameter)
        return found

    def _sum(self, tensor: torch.Tensor, ranks: Sequence[int]) -> None:
        """Add tensors up on the first of the ranks, in their order, and give all the sum.

        Messages need no process group for every set of ranks, whose creation all processes of the
        run would have to take part in.
        """
        if self._rank == ranks[0]:
            for peer in ranks[1:]:
                tensor += self._passing.receive(peer, tensor).wait()
        else:
            self._passing.send(ranks[0], tensor).wait()
        self._give(tensor, ranks)

    def _give(self, tensor: torch.Tensor, ranks: Sequence[int]) -> None:
        """Give all ranks the tensor of the first one."""
        if self._rank == ranks[0]:
            for peer in ranks[1:]:
                self._passing.send(peer, tensor).wait()
            return
        tensor.copy_(self._passing.receive(ranks[0], tensor).wait())
