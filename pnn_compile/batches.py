"""Batches of inputs as users give them, brought to the arguments of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from passes.errors import OptionError

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["named_batch"]


def named_batch(compiled: Network, batch: Any) -> dict[str, Any]:
    """Name the arguments of one batch.

    Args:
        compiled: The network.
        batch: A tensor, a tuple of positional arguments (labels may follow; they are dropped), or
            a dict of arguments by name.

    Raises:
        OptionError: An argument of the network is missing.
    """
    names = [node.name for node in compiled.program.inputs]
    if isinstance(batch, Mapping):
        named = dict(batch)
    elif isinstance(batch, (tuple, list)):
        named = dict(zip(names, batch, strict=False))
    else:
        named = {names[0]: batch}
    missing = [name for name in names if name not in named]
    if missing:
        raise OptionError(
            f"a batch lacks {', '.join(missing)}: give ({', '.join(names)}) or a dict of them"
        )
    return {name: named[name] for name in names}
