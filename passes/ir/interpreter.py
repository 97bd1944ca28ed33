"""The one fx interpreter: `torch.fx.Interpreter`, with fresh lists and dicts as arguments.

torch.fx stores list and dict arguments of a node as immutable containers. The code that it
generates for a graph passes a fresh list or dict at every call; its interpreter passes the stored
container itself, which a function that changes its argument cannot write to:

>>> def append_one(values):
...     values.append(1)
...     return len(values)
>>> graph = fx.Graph()
>>> _ = graph.output(graph.call_function(append_one, ([5, 6],)))
>>> module = fx.GraphModule({}, graph)
>>> Interpreter(module).run(), Interpreter(module).run()
(3, 3)
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list


class Interpreter(fx.Interpreter):
    """Run a graph node by node, as its generated code would."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node, with values for nodes and fresh lists and dicts."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {key: _mutable(value) for key, value in kwargs.items()}


def _mutable(value: Any) -> Any:
    """Copy immutable lists and dicts, nested ones included, to plain ones."""
    if isinstance(value, immutable_list):
        return [_mutable(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: _mutable(item) for key, item in value.items()}
    return tuple(map(_mutable, value)) if type(value) is tuple else value
