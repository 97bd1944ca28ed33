"""One run of the program that notes what static analysis cannot: shapes, aliases and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from passes.errors import CaptureError
from passes.ir.example_inputs import ExampleInputs, bind
from passes.ir.interpreter import Interpreter
from passes.ir.isolation import preserved
from passes.ir.program import Program, provenance
from passes.ir.tensor_spec import TensorSpec

__all__ = ["Fact", "memory_of", "observe"]

_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm,
)  # fmt: skip
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)
_MAYBE_VIEWS = ("contiguous", "flatten", "ravel", "reshape")
"""Operators that copy or not as the strides of their operand are: those of a guess may differ."""
_KNOWN = ("torch.nn.", "passes.")
_NEAR = 4
"""How many nodes away a layer may be that tells which axis of a tensor holds the channels."""


@dataclass(frozen=True)
class Fact:
    """What was seen of one node.

    Attributes:
        spec: Type of its value if that is one tensor, else None.
        storages: Identities of the memory that its value occupies, or may occupy where the strides
            of its operands decide whether it is a view.
        writes: Identities of the memory that running it changed, in training mode.
        random: Whether it drew random numbers, in training mode.
        bytes: Bytes of the tensors in its value.
    """

    spec: TensorSpec | None
    storages: frozenset[int]
    writes: frozenset[int]
    random: bool
    bytes: int

    @property
    def pure(self) -> bool:
        """Whether running it twice gives the same value and changes nothing."""
        return not self.writes and not self.random


class _Observer(Interpreter):
    """Interpreter that records one `Fact` per node and keeps every value alive meanwhile."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.facts: dict[fx.Node, Fact] = {}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        # What is read, with the memory that it may share.
        reads = [
            (self.facts[source].storages, tensor)
            for source in n.all_input_nodes
            for tensor in _tensors(self.env[source])
        ]
        if n.op == "call_module":
            owner = self.module.get_submodule(str(n.target))
            held = (*owner.parameters(), *owner.buffers())
            reads += [(frozenset({memory_of(tensor)}), tensor) for tensor in held]
        versions = [tensor._version for _, tensor in reads]
        state = _random_state()
        value = super().run_node(n)
        written = [
            memory
            for (memory, tensor), version in zip(reads, versions, strict=True)
            if tensor._version != version
        ]
        found = _tensors(value)
        storages = frozenset(map(memory_of, found))
        unsure = self._may_be_view(n)
        shared = [memory for memory, _ in reads if unsure or memory & storages]
        self.values[n] = value
        self.facts[n] = Fact(
            spec=None,
            storages=storages.union(*shared),
            writes=frozenset[int]().union(*written),
            random=not all(map(torch.equal, state, _random_state())),
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in found),
        )
        return value

    def _may_be_view(self, n: fx.Node) -> bool:
        if n.op == "call_module":
            layer = self.module.get_submodule(str(n.target))
            # What a module that was kept whole returns may depend on its values.
            return isinstance(layer, nn.Flatten) or not type(layer).__module__.startswith(_KNOWN)
        name = getattr(n.target, "__name__", str(n.target))
        return name.partition(".")[0] in _MAYBE_VIEWS


def observe(program: Program) -> Mapping[fx.Node, Fact]:
    """Run the program and return what was seen of every node.

    It runs in evaluation mode and, if it can, in training mode, where layers update statistics and
    draw random numbers: memory is shared if it is in one of them. It runs once more with another
    batch size where that is free, to see which axes follow the batch.
    """
    arguments = bind(program.module, (), dict(program.args))
    first = _run(program, arguments, train=False)
    other = None
    if program.dynamic_batch:
        other = _run(program, arguments.varied(grow=True), train=False)
    trained = _train(program, arguments) or first
    facts: dict[fx.Node, Fact] = {}
    for node, fact in trained.facts.items():
        value = first.values[node]
        still = first.facts[node]
        fact = replace(
            fact,
            storages=fact.storages | still.storages,
            writes=fact.writes | still.writes,
            bytes=still.bytes,
        )
        spec = None
        if isinstance(value, torch.Tensor):
            grown = other.values[node].shape if other is not None else None
            spec = _spec(program, node, value, grown, arguments.batch_size)
        facts[node] = replace(fact, spec=spec)
    return facts


def _train(program: Program, arguments: ExampleInputs) -> _Observer | None:
    """Run in training mode; a batch of one sample may be too small for it, so try one more."""
    for attempt in (arguments, arguments.varied(grow=program.dynamic_batch)):
        try:
            return _run(program, attempt, train=True)
        except (RuntimeError, ValueError):
            continue
    return None


def _run(program: Program, arguments: ExampleInputs, *, train: bool) -> _Observer:
    observer = _Observer(program.module)
    values = [tensor.detach().clone() for tensor in arguments.tensors()]
    _, kwargs = arguments.with_leaves(values)
    with preserved(program.module), torch.no_grad():
        program.module.train(train)
        observer.run(*(kwargs[str(node.target)] for node in program.inputs))
    return observer


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        return leaf

    map_aggregate(value, visit)
    return found


def memory_of(tensor: torch.Tensor) -> int:
    """Identity of the memory of a tensor."""
    return int(tensor.untyped_storage()._cdata)


def _spec(
    program: Program,
    node: fx.Node,
    value: torch.Tensor,
    grown: torch.Size | None,
    batch: int | None,
) -> TensorSpec:
    axis: int | None = 0 if value.dim() and value.shape[0] == batch else None
    if grown is not None and len(grown) != value.dim():
        raise CaptureError(
            f"the rank of {node.name!r} ({provenance(node).source or 'no source'}) depends on the "
            "batch size: give an example of at least two samples"
        )
    if grown is not None:
        changed = [i for i, (a, b) in enumerate(zip(value.shape, grown, strict=True)) if a != b]
        axis = changed[0] if changed else None
    return TensorSpec(
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        batch_axis=axis,
        channel_axis=_channel_axis(program, node, value.dim()),
    )


def _channel_axis(program: Program, node: fx.Node, rank: int) -> int:
    """Find the axis that layers mix, from the nearest layer that says it."""
    if rank < 3:
        return max(rank - 1, 0)
    frontier, seen = [node], {node}
    for _ in range(_NEAR):
        for candidate in frontier:
            if (axis := _mixes(program.module, candidate, rank)) is not None:
                return axis
        around = [
            n for c in frontier for n in (*c.users, *c.all_input_nodes)
            if n not in seen and n.op not in ("placeholder", "get_attr", "output")
        ]  # fmt: skip
        frontier = list(dict.fromkeys(around))
        seen.update(frontier)
    return 1 if rank >= 4 else rank - 1


def _mixes(module: fx.GraphModule, node: fx.Node, rank: int) -> int | None:
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if isinstance(layer, _CHANNELS_FIRST):
            return 1
        if isinstance(layer, _CHANNELS_LAST):
            return rank - 1
    name = getattr(node.target, "__name__", str(node.target))
    if "conv" in name or "batch_norm" in name:
        return 1
    if "linear" in name or "layer_norm" in name or "embedding" in name:
        return rank - 1
    return None
