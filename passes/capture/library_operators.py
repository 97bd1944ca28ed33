"""Enter operators that libraries define in Python, so that a graph holds what they compute.

torch.export keeps `torch.library.custom_op` as one call, which no artifact can store and which
exists only where the library is imported:

    kept:     y = mine.gate(x, w)
    entered:  y = aten.mul(aten.relu(aten.matmul(x, w)), 2)

An operator may have a backward of its own, or loop over values; such an export is rejected when it
is made or validated, and the operator stays one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode

from passes.capture.opaque_operator import OPERATOR
from passes.capture.refold import is_replaced

_TORCH = ("aten", "prim", "prims")
"""Namespaces of operators that every torch has."""


class Entering(TorchFunctionMode):
    """Run the Python code of library operators in their place."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the code of an operator if it has any, else the function itself."""
        return (_implementation(func) or func)(*args, **(kwargs or {}))


def library_operators(graph: fx.Graph) -> list[str]:
    """Return the names of the operators in a graph whose code can be entered."""
    return [str(target) for target in dict.fromkeys(n.target for n in graph.nodes)
            if _implementation(target) is not None]  # fmt: skip


def _implementation(function: Any) -> Callable[..., Any] | None:
    """Return the code of an operator of a library; None for anything else, and if it has none."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        function = getattr(function, function._overload_names[0] or "default")
    if not isinstance(function, torch._ops.OpOverload) or function is OPERATOR:
        return None
    name = function._schema.name
    if function.namespace in _TORCH or is_replaced(name):
        return None
    if function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return function.decompose
    definition = OPDEFS.get(name)
    return None if definition is None else definition._init_fn
