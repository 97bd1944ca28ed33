"""Watch a graph node by node while it runs: shapes, shared memory, writes, random numbers.

Memory is identified by the storage of tensors. In `y = x.view(-1); y.add_(1)` the nodes `x`, `view`
and `add_` have one storage in common, and `add_` writes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from passes.ir.module_walk import named_tensors, submodule
from passes.ir.program import Interpreter, Program, tensors_in
from passes.ir.tensor_spec import TensorSpec

_MAYBE_VIEWS = ("contiguous", "flatten", "ravel", "reshape")
"""Operators that copy or make a view depending on the strides of their operand. The strides of a
preprocessing operator's output may differ from those observed."""
TRUSTED_PACKAGES = ("torch.nn.", "passes.")
"""Packages whose modules alias memory in the same way for all values of their inputs."""


class Work(NamedTuple):
    """Work of some operators.

    Attributes:
        registered: FLOPs of operators that torch's registry knows.
        other: FLOPs of the others.
        moved: Bytes read and written.
        operators: Number of operators, views excluded.
        selections: Number of operators the size of whose result is data, as of `nonzero`.
    """

    registered: int = 0
    other: int = 0
    moved: int = 0
    operators: int = 0
    selections: int = 0


_NONE = Work()


class Own(NamedTuple):
    """What a causal value shows of an input at the position that it stands for itself.

    In `y = f(F.pad(x, (1, -1)))` position t of y depends on x before t, and not on x at t.

    Attributes:
        leaf: The input.
        axis: The axis of the input of which all values at this position count; None if the position
            has to be the same along all axes.
    """

    leaf: fx.Node
    axis: int | None


@dataclass(frozen=True)
class Fact:
    """Observed facts of one node.

    Attributes:
        spec: Type of its value if that is a single tensor, else None.
        storages: Identities of the memory that its value occupies, or may occupy if the strides of
            its operands decide whether it is a view.
        writes: Identities of the memory that it wrote, in either mode.
        random: Whether it drew random numbers in training mode.
        unaligned: Whether it holds a causal sequence whose positions do not lie along an axis, as
            after padding.
        hides: What it does not show of a sequence that it follows from, as after a shift.
        bytes: Bytes of the tensors in its value.
        work: Work of its operators in evaluation mode.
    """

    spec: TensorSpec | None
    storages: frozenset[int]
    writes: frozenset[int]
    random: bool
    bytes: int
    work: Work = _NONE
    unaligned: bool = False
    hides: frozenset[Own] = frozenset()


@dataclass(frozen=True)
class Observations:
    """What runs that compared a graph with its model showed of its nodes, besides.

    Attributes:
        graph: The graph.
        args: The example inputs of its program; the runs were on these and on larger ones.
        larger: Shapes of all tensors at a larger batch, in evaluation mode; None if not seen.
        trained: Facts of all nodes in training mode, without specs; None if not seen.
    """

    graph: fx.Graph
    args: Mapping[str, Any] | None = None
    larger: Mapping[fx.Node, torch.Size] | None = None
    trained: Mapping[fx.Node, Fact] | None = None

    def are_of(self, program: Program) -> bool:
        """Whether a program still has this graph and these inputs."""
        return self.graph is program.graph and self.args is program.args


class ShapeRecorder(Interpreter):
    """Record the shape of every value that is a tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and record its shape."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = value.shape
        return value


class Observer(Interpreter):
    """Record one `Fact` per node.

    Weak references keep the identity of memory from being used again, and let its content go.
    """

    def __init__(self, module: fx.GraphModule, garbage_collect_values: bool = True) -> None:
        super().__init__(module, garbage_collect_values)
        self._memories: dict[int, StorageWeakRef] = {}
        self._facts: dict[fx.Node, Fact] = {}
        self._random_state: list[torch.Tensor] = []

    def facts(self) -> dict[fx.Node, Fact]:
        """Return the facts, in which memory that dies with this observer has a number of its own.

        The next run may get the same memory again, and its nodes would seem to share it with these.
        """
        state = {memory_of(tensor) for _, tensor in named_tensors(self.module)}
        names = {memory: memory for memory in state}
        memories = {m for fact in self._facts.values() for m in (*fact.storages, *fact.writes)}
        names |= {memory: next(_NUMBERS) for memory in memories - names.keys()}

        def renamed(memory: frozenset[int]) -> frozenset[int]:
            return frozenset([names[identity] for identity in memory])

        return {
            node: Fact(
                fact.spec, renamed(fact.storages), renamed(fact.writes),
                fact.random, fact.bytes, fact.work,
            )
            for node, fact in self._facts.items()
        }  # fmt: skip

    def compute(self, n: fx.Node) -> tuple[Any, Work]:
        """Run a node; return its value, and its work if this observer counts it."""
        return super().run_node(n), _NONE

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and record its fact."""
        if not self._facts:
            self._random_state = _random_state()
        # Every tensor that the node reads, with the memory that it may occupy.
        reads = [
            (self._facts[source].storages, tensor)
            for source in n.all_input_nodes
            for tensor in tensors_in(self.env[source])
        ]
        if n.op == "call_module":
            owner = submodule(self.module, str(n.target))
            state = [tensor for _, tensor in named_tensors(owner)]
            reads += [(frozenset({memory_of(tensor)}), tensor) for tensor in state]
        versions = [tensor._version for _, tensor in reads]
        value, work = self.compute(n)
        random_state = _random_state()
        random = not all(map(torch.equal, self._random_state, random_state))
        self._random_state = random_state
        written = [
            memory
            for (memory, tensor), version in zip(reads, versions, strict=True)
            if tensor._version != version
        ]
        tensors = tensors_in(value)
        storages = frozenset(map(self._identify, tensors))
        uncertain = self._may_be_view(n)
        shared = [memory for memory, _ in reads if uncertain or memory & storages]
        self._facts[n] = Fact(
            spec=None,
            storages=storages.union(*shared),
            writes=frozenset[int]().union(*written),
            random=random,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            work=work,
        )
        return value

    def _identify(self, tensor: torch.Tensor) -> int:
        memory = memory_of(tensor)
        if memory not in self._memories:
            storage = _dense(tensor).untyped_storage()
            self._memories[memory] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return memory

    def _may_be_view(self, n: fx.Node) -> bool:
        """Whether strides or values decide if the result of a node shares memory with an input."""
        if n.op == "call_module":
            layer = submodule(self.module, str(n.target))
            # An opaque module may return its argument or a copy, depending on values.
            trusted = type(layer).__module__.startswith(TRUSTED_PACKAGES)
            return isinstance(layer, nn.Flatten) or not trusted
        name = getattr(n.target, "__name__", str(n.target))
        return name.partition(".")[0] in _MAYBE_VIEWS


_NUMBERS = itertools.count(-1, -1)
"""Identities of memory that is gone; those of memory that is there are addresses."""


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def memory_of(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's memory; of a sparse one, that of its values."""
    return int(_dense(tensor).untyped_storage()._cdata)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
