"""Keys of tensors that do not depend on which rank a stage is on.

Fine stages and the head go by the keys of the original model under `model.`; guesses and
corrections go by piece and stage under `operators.`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["MODEL", "Names", "key_of"]

MODEL = "model."
"""What the keys of the original model begin with."""

_ORIGINAL = re.compile(r"(?:fine_\d+|head)\.(.+)", re.DOTALL)


def key_of(name: str) -> str:
    """Turn the name of a tensor in a network of pieces (`fine_0.stem.weight`) into its key."""
    original = _ORIGINAL.fullmatch(name)
    return MODEL + original[1] if original else f"operators.{name}"


class Names:
    """The keys of a network; a parameter with several of them goes by the first one.

    Args:
        compiled: The whole network.
    """

    def __init__(self, compiled: Compiled) -> None:
        first: dict[nn.Parameter, str] = {}
        self._first: dict[str, str] = {}
        for name, parameter in compiled.module.named_parameters(remove_duplicate=False):
            key = key_of(name)
            self._first[key] = first.setdefault(parameter, key)

    def parameters(self, network: nn.Module) -> dict[nn.Parameter, str]:
        """The first key of every parameter of a network of pieces."""
        return {
            parameter: self._first[key_of(name)] for name, parameter in network.named_parameters()
        }
