"""What every node costs: FLOPs, bytes, operators.

FLOPs come from torch's own registry of operators. The rule for an operator that the registry does
not know: one FLOP per element that it writes, none if it only makes a view. Backward FLOPs: twice
the forward ones for operators of the registry (a gradient for either operand), once for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from passes.cost.node_facts import Fact
from passes.errors import OptionError
from passes.ir.interpreter import Interpreter
from passes.ir.isolation import LOCK, preserved
from passes.ir.program import Program

__all__ = ["Cost", "count_flops", "count_work", "measure_costs"]

_VIEWS = (torch.ops.aten._unsafe_view,)
"""Operators that only make a view, which torch does not say of them."""


@dataclass(frozen=True)
class Cost:
    """Cost of one node at the example inputs.

    Attributes:
        flops: Forward FLOPs.
        backward_flops: Backward FLOPs.
        parameter_bytes: Bytes of the parameters that it reads.
        activation_bytes: Bytes of the tensors that it writes.
        weight: What the partition balances: FLOPs, seconds, or the user's own number.
        backward: The part of the weight that falls on the way back: of measured seconds of a
            training step.
        moved: Bytes that its operators read and write.
        operators: How many operators it launches, views not counted.
    """

    flops: int
    backward_flops: int
    parameter_bytes: int
    activation_bytes: int
    weight: float
    backward: float = 0.0
    moved: int = 0
    operators: int = 0

    @property
    def forward(self) -> float:
        """The part of the weight that falls on the way forward."""
        return self.weight - self.backward


class _FlopMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Counts the FLOPs, bytes and operators of everything that runs inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = 0
        self.other = 0
        self.moved = 0
        self.operators = 0

    @property
    def count(self) -> tuple[int, int, int, int]:
        """FLOPs of known and of other operators, bytes that they move, and how many they are."""
        return self.known, self.other, self.moved, self.operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func._overloadpacket in _VIEWS:
            return result
        written = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.moved += sum(t.numel() * t.element_size() for t in (*read, *written))
        self.operators += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.known += int(formula(*args, **kwargs, out_val=result))
        else:
            self.other += sum(t.numel() for t in written)
        return result


_RECURRENT = ("lstm", "gru", "rnn")


@contextmanager
def _plain_kernels(recurrent: bool) -> Iterator[None]:
    """Keep torch from fusing layers into one operator whose inside cannot be counted."""
    # Properties of these modules; their own context managers also set TF32, which warns on a CPU.
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    libraries = backends if recurrent else ()
    with LOCK:
        fast = torch.backends.mha.get_fastpath_enabled()
        enabled = [library.enabled for library in libraries]
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for library, was in zip(libraries, enabled, strict=True):
                library.enabled = was


def _is_recurrent(module: torch.nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        inside = module.get_submodule(str(node.target)).modules()
        return any(isinstance(child, torch.nn.RNNBase) for child in inside)
    return any(name in str(node.target) for name in _RECURRENT)


def count_flops(function: Callable[[], Any]) -> int:
    """Run a function and return the forward FLOPs of what it called."""
    return count_work(function)[0]


def count_work(function: Callable[[], Any]) -> tuple[int, int, int]:
    """Run a function and return FLOPs, bytes moved and operators of what it called."""
    with torch.no_grad(), _plain_kernels(recurrent=True), _FlopMode() as mode:
        function()
        return int(mode.known + mode.other), mode.moved, mode.operators


class _Counter(Interpreter):
    def __init__(self, module: fx.GraphModule, mode: _FlopMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.mode.count
        with _plain_kernels(_is_recurrent(self.module, n)):
            value = super().run_node(n)
        self.found[n] = tuple(b - a for a, b in zip(before, self.mode.count, strict=True))
        return value


def measure_costs(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    weigh: Callable[[fx.Node, int], float] | None = None,
) -> dict[fx.Node, Cost]:
    """Count the cost of every node by running the program once.

    Args:
        program: The program.
        facts: What was observed of it.
        weigh: Called with a node and its forward FLOPs; returns what the partition balances.
            FLOPs themselves if None.

    Raises:
        OptionError: `weigh` returned a negative or non-finite number.
    """
    with _evaluating(program) as inputs, _FlopMode() as mode:
        counter = _Counter(program.module, mode)
        counter.run(*inputs)
    costs: dict[fx.Node, Cost] = {}
    for node, (known, other, moved, operators) in counter.found.items():
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        flops = known + other
        weight = float(flops) if weigh is None else float(weigh(node, flops))
        if not 0 <= weight < float("inf"):
            raise OptionError(f"cost of node {node.name!r} must be finite and >= 0, got {weight}")
        costs[node] = Cost(
            flops=flops,
            backward_flops=2 * known + other,
            parameter_bytes=sum(p.numel() * p.element_size() for p in parameters(program, node)),
            activation_bytes=facts[node].bytes,
            weight=weight,
            moved=moved,
            operators=operators,
        )
    return costs


def parameters(program: Program, node: fx.Node) -> list[torch.nn.Parameter]:
    """Return the parameters that a node reads, each once."""
    found: list[torch.nn.Parameter] = []
    if node.op == "call_module":
        found += program.module.get_submodule(str(node.target)).parameters()
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            value = program.module
            for atom in str(source.target).split("."):
                value = getattr(value, atom)
            if isinstance(value, torch.nn.Parameter):
                found.append(value)
    return list({id(parameter): parameter for parameter in found}.values())


@contextmanager
def _evaluating(program: Program) -> Iterator[list[Any]]:
    """Run in evaluation mode without gradients, on copies of the example inputs."""
    inputs = program.fresh_inputs()
    with preserved(program.module), torch.no_grad():
        program.module.eval()
        yield inputs
