"""The interpreter of torch.fx, giving functions what the code of a graph gives them."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

__all__ = ["Interpreter"]


class Interpreter(fx.Interpreter):
    """Runs a graph node by node.

    Lists and dicts that stand in a node are copied, for a function may change what it is given.
    """

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node, with the values of the nodes that it reads."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_own, args)), {key: _own(value) for key, value in kwargs.items()}


def _own(value: Any) -> Any:
    if isinstance(value, immutable_list):
        return [_own(part) for part in value]
    if isinstance(value, immutable_dict):
        return {key: _own(part) for key, part in value.items()}
    return tuple(map(_own, value)) if type(value) is tuple else value
