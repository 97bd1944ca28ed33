"""Count the FLOPs, bytes and operators of every node.

FLOPs come from torch's registry of operators (`torch.utils.flop_counter`). Any other operator
counts one FLOP per element that it writes, and none if it only makes a view. Backward FLOPs are
twice the forward FLOPs for operators of the registry (one gradient per operand), and equal to them
for others.

>>> x, weight = torch.randn(2, 4), torch.randn(4, 8)
>>> flops, moved, operators = count_work(lambda: (x @ weight).relu())
>>> flops, operators  # 2 * 2 * 4 * 8 of the product and 2 * 8 of the ReLU
(144, 2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from passes.errors import OptionError
from passes.ir.isolation import LOCK, DispatchMode
from passes.ir.module_walk import named_parameters, submodule, submodules
from passes.ir.observer import Fact, Work
from passes.ir.program import Program, is_compute, resolve, tensor_leaves

_VIEWS = (torch.ops.aten._unsafe_view,)
"""Operators that only make a view although torch does not mark them as such."""


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node at the example inputs.

    Attributes:
        flops: Forward FLOPs.
        backward_flops: Backward FLOPs.
        parameter_bytes: Bytes of the parameters that the node reads.
        activation_bytes: Bytes of the tensors that it writes.
        cost: The quantity that the partition balances: FLOPs, seconds, or the user's own number.
        backward: Part of the cost that belongs to the backward pass and the optimizer, if seconds
            of a training step were measured or estimated; else 0.
        optimizer: Part of `backward` that is the optimizer's, if it was measured; else 0.
        moved: Bytes that its operators read and write.
        operators: Number of operators that it launches, views excluded.
    """

    flops: int
    backward_flops: int
    parameter_bytes: int
    activation_bytes: int
    cost: float
    backward: float = 0.0
    optimizer: float = 0.0
    moved: int = 0
    operators: int = 0

    @property
    def forward(self) -> float:
        """Part of the cost that belongs to the forward pass."""
        return self.cost - self.backward


class WorkMode(DispatchMode):
    """Count the FLOPs, bytes and operators of everything that runs inside the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.registered = 0
        self.other = 0
        self.moved = 0
        self.operators = 0
        self.selections = 0

    @property
    def work(self) -> Work:
        """The work so far."""
        return Work(self.registered, self.other, self.moved, self.operators, self.selections)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count its work."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func._overloadpacket in _VIEWS:
            return result
        written, read = tensor_leaves(result), tensor_leaves((args, kwargs))
        self.moved += sum(t.numel() * t.element_size() for t in (*read, *written))
        self.operators += 1
        self.selections += _selects(func, args)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.registered += int(formula(*args, **kwargs, out_val=result))
        else:
            self.other += sum(t.numel() for t in written)
        return result


def _selects(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether values decide the size of what an operator returns."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func._overloadpacket is not torch.ops.aten.index:
        return True
    masks = [index for index in args[1] if index is not None]
    return any(index.dtype in (torch.bool, torch.uint8) for index in masks)


_RECURRENT = ("lstm", "gru", "rnn")


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch from fusing attention into one operator, whose FLOPs cannot be counted."""
    with LOCK:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def plain_recurrence() -> Iterator[None]:
    """Keep mkldnn and cuDNN from fusing recurrent layers into one operator."""
    # Set as properties: the context managers of these modules also set TF32, which warns on a CPU.
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    with LOCK:
        enabled = [library.enabled for library in libraries]
        for library in libraries:
            library.enabled = False
        try:
            yield
        finally:
            for library, flag in zip(libraries, enabled, strict=True):
                library.enabled = flag


def is_recurrent(module: torch.nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a recurrent layer."""
    if node.op == "call_module":
        children = submodules(submodule(module, str(node.target)))
        return any(isinstance(child, torch.nn.RNNBase) for child in children)
    return any(name in str(node.target) for name in _RECURRENT)


def count_work(function: Callable[[], Any]) -> tuple[int, int, int]:
    """Run a function and return the FLOPs, bytes moved and number of its operators."""
    with torch.no_grad(), plain_attention(), plain_recurrence(), WorkMode() as mode:
        function()
        return int(mode.registered + mode.other), mode.moved, mode.operators


def measure_costs(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    cost_function: Callable[[fx.Node, int], float] | None = None,
) -> dict[fx.Node, NodeCost]:
    """Return the cost of every node, by the work that was observed.

    Args:
        program: The program.
        facts: Observed facts by node.
        cost_function: Called with a node and its forward FLOPs; returns the cost that the partition
            balances. None to balance the FLOPs.

    Raises:
        OptionError: `cost_function` returned a negative or non-finite number.
    """
    costs: dict[fx.Node, NodeCost] = {}
    for node, fact in facts.items():
        work = fact.work
        if not is_compute(node):
            continue
        flops = work.registered + work.other
        cost = float(flops) if cost_function is None else float(cost_function(node, flops))
        if not 0 <= cost < float("inf"):
            raise OptionError(f"cost of node {node.name!r} must be finite and >= 0, got {cost}")
        costs[node] = NodeCost(
            flops=flops,
            backward_flops=2 * work.registered + work.other,
            parameter_bytes=sum(p.numel() * p.element_size() for p in parameters(program, node)),
            activation_bytes=fact.bytes,
            cost=cost,
            moved=work.moved,
            operators=work.operators,
        )
    return costs


def parameters(program: Program, node: fx.Node) -> list[torch.nn.Parameter]:
    """Return the parameters that a node reads, without repeats."""
    weights: list[torch.nn.Parameter] = []
    if node.op == "call_module":
        layer = submodule(program.module, str(node.target))
        weights += [parameter for _, parameter in named_parameters(layer)]
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            value = resolve(program.module, str(source.target))
            if isinstance(value, torch.nn.Parameter):
                weights.append(value)
    return list({id(weight): weight for weight in weights}.values())
