"""`Held`: the parameters of a rank, listed once.

Walking through a thousand modules takes longer than some of their steps, so no step does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from passes.errors import RuntimeFault

__all__ = ["Held", "refuse_conversion"]

_ADVICE = (
    "convert the network before distribute(), or give distribute(autocast=torch.bfloat16), which "
    "keeps the weights as they are"
)


class Held:
    """The parameters of a rank, and the precision that they have for good.

    Args:
        network: What the rank owns.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parameters = tuple(network.parameters())
        self._types = tuple(parameter.dtype for parameter in self.parameters)

    def clear_gradients(self) -> None:
        """Leave every parameter without a gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    def check(self, rank: int) -> None:
        """Refuse parameters of another precision than at first.

        Raises:
            RuntimeFault: One was converted: states would cross in a precision that no other rank
                waits for.
        """
        for parameter, wanted in zip(self.parameters, self._types, strict=True):
            if parameter.dtype is not wanted:
                raise RuntimeFault(
                    f"rank {rank}: weights were converted from {wanted} to {parameter.dtype} "
                    f"behind distribute(): {_ADVICE}"
                )


def refuse_conversion(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Refuse what would change the precision of a module, before it does.

    Args:
        module: The module.
        change: What `nn.Module._apply` applies to its tensors.

    Raises:
        RuntimeFault: It changes the precision.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    for kind in {tensor.dtype for tensor in tensors}:
        found = change(torch.empty(0, dtype=kind)).dtype
        if found != kind:
            raise RuntimeFault(
                f"the ranks agreed on states of {kind}, which cannot become {found} behind "
                f"distribute(): {_ADVICE}"
            )
