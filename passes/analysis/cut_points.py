"""Find the legal cuts of a program and the values that cross each of them.

A cut falls between two consecutive nodes. Its frontier is the set of live values: those computed
before the cut and read after it. Side values are exempt, because every stage recomputes them from
the inputs:

    mask  = lengths > 0          side value: depends on the inputs alone, and is cheap
    a     = embed(tokens)
    b     = block(a, mask)
    ------------------------     a legal cut: b crosses, mask does not
    c     = block(b, mask)
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from passes.analysis.dependence import (
    FLOAT_DTYPES,
    Recomputable,
    find_recomputable,
    input_dependence,
    shifted,
    sized_by_values,
)
from passes.analysis.masks import find_weights, without_dropout
from passes.analysis.sources import preprocessing_sources, with_sources
from passes.cost.flops import NodeCost
from passes.ir.module_walk import submodule
from passes.ir.observer import Fact, memory_of
from passes.ir.program import Program, provenance
from passes.ir.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Position:
    """A legal cut between two consecutive nodes.

    Attributes:
        index: Number of compute nodes before the cut.
        state: The tensors that cross, in the order of their definition.
        specs: Their types.
        boundary: Whether a block begins after the cut: it falls neither inside a unit of a repeated
            structure, nor between a convolution or matrix product and the normalization,
            activation and dropout that complete it.
    """

    index: int
    state: tuple[fx.Node, ...]
    specs: tuple[TensorSpec, ...]
    boundary: bool

    @property
    def bytes(self) -> int:
        """Bytes that cross the cut at the example inputs."""
        return sum(spec.bytes for spec in self.specs)


@dataclass(frozen=True)
class Frontiers:
    """Legal cuts of a program.

    Attributes:
        order: The compute nodes in topological order.
        positions: The legal cuts, in order; the last one is the end of the graph.
        recomputable: For every side value, the nodes that recompute it from the inputs, itself
            included, in order.
        guessable: The same for all that guesses may be made of: values computed by way of a
            dropout count too, with the dropout left out.
        refused: Number of illegal positions by reason.
    """

    order: tuple[fx.Node, ...]
    positions: tuple[Position, ...]
    recomputable: Recomputable
    guessable: Recomputable
    refused: Mapping[str, int]


def find_frontiers(
    program: Program, facts: Mapping[fx.Node, Fact], costs: Mapping[fx.Node, NodeCost]
) -> Frontiers:
    """Find every legal cut of a program and the state that crosses it.

    A cut is legal if at least one value is live, side values aside, every live value is a
    floating-point tensor with a batch axis, and no memory that is live or used on both sides is
    written after the cut.

    Args:
        program: The program.
        facts: Observed facts by node.
        costs: Costs by node.
    """
    order = tuple(program.order)
    number = {node: index for index, node in enumerate(order)}
    persistent = _persistent_memory(program, facts)
    recompute, quietly = (
        functools.partial(find_recomputable, order, observed, costs, persistent)
        for observed in (facts, without_dropout(facts))
    )
    recomputable, guessable = with_sources(program, facts, recompute, quietly)
    unguessable = _unguessable(program, facts, recomputable, guessable)
    last_use = {
        node: max((number.get(user, len(order)) for user in node.users), default=number[node])
        for node in order
    }
    memory_conflicts = _memory_conflicts(order, facts, persistent)
    units = _repeated_units(order)
    parents = {path for node in order for path in _enclosing_modules(node)[:-1]}
    positions: list[Position] = []
    refused: dict[str, int] = {}
    live: dict[fx.Node, None] = {}
    for index in range(1, len(order) + 1):
        node = order[index - 1]
        if last_use[node] >= index and node not in recomputable:
            live[node] = None
        for dead in [n for n in live if last_use[n] < index]:
            del live[dead]
        reason = _why_illegal(live, facts, unguessable) or memory_conflicts[index]
        if reason:
            refused[reason] = refused.get(reason, 0) + 1
            continue
        specs = tuple(spec for n in live if (spec := facts[n].spec) is not None)
        boundary = _is_boundary(order, index, units) and (
            index == len(order)
            or _begins_unit(order, index, units & parents)
            or not _completes(program, order[index], costs)
        )
        positions.append(Position(index, tuple(live), specs, boundary))
    return Frontiers(order, tuple(positions), recomputable, guessable, refused)


def _unguessable(
    program: Program,
    facts: Mapping[fx.Node, Fact],
    recomputable: Recomputable,
    guessable: Recomputable,
) -> Mapping[fx.Node, str]:
    """Return the values that no guess could stand for, and why."""
    depends = input_dependence(program, facts)
    sources = preprocessing_sources(program, facts, recomputable, guessable)
    starts = [facts[node] for node in guessable if facts[node].unaligned]
    started = {fact.spec.shape for fact in starts if fact.spec is not None}
    found: dict[fx.Node, str] = {}
    for node in program.order:
        spec, inputs = facts[node].spec, depends[node]
        if facts[node].unaligned and spec is not None and spec.shape not in started:
            found[node] = "a causal sequence crosses with its positions padded or rearranged"
        if shifted(inputs, depends) and not any(
            depends[source.node] <= inputs for source in sources
        ):
            found[node] = "a causal sequence crosses after a shift that no stage can repeat cheaply"
    for node in find_weights(program, facts, depends):
        found[node] = "a mask, or weights that one makes zero, would have to be guessed"
    for node in sized_by_values(facts, depends):
        found[node] = "a tensor crosses whose number of samples follows from values"
    return found


def _why_illegal(
    live: Mapping[fx.Node, None], facts: Mapping[fx.Node, Fact], unguessable: Mapping[fx.Node, str]
) -> str:
    """Return why the live values forbid a cut, "" if they do not."""
    if not live:
        return "nothing crosses"
    for node in live:
        spec = facts[node].spec
        if spec is None or spec.dtype not in FLOAT_DTYPES:
            return "a value that is not a floating-point tensor crosses"
        if spec.batch_axis is None:
            return "a tensor without a batch axis crosses"
        if node in unguessable:
            return unguessable[node]
    return ""


def _persistent_memory(program: Program, facts: Mapping[fx.Node, Fact]) -> frozenset[int]:
    """Return the memory that outlives a run: inputs, parameters and buffers, also of layers."""
    owners = (*program.inputs, *program.graph.find_nodes(op="get_attr"))
    memory = frozenset(memory for node in owners for memory in facts[node].storages)
    layers = [
        submodule(program.module, str(node.target))
        for node in program.order
        if node.op == "call_module"
    ]
    state = (tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    return memory.union(map(memory_of, state))


def _memory_conflicts(
    order: Sequence[fx.Node], facts: Mapping[fx.Node, Fact], persistent: frozenset[int]
) -> list[str]:
    """Return, for each position, why memory that one side writes forbids a cut, else "".

    Args:
        order: The compute nodes.
        facts: Observed facts by node.
        persistent: Memory that outlives a run.
    """
    touched: dict[int, list[int]] = {}  # by memory: the first and the last node that uses it
    writes: dict[int, int] = {}  # by memory: the last node that writes it
    for index, node in enumerate(order):
        memory = facts[node].storages | facts[node].writes
        for source in node.all_input_nodes:
            memory |= facts[source].storages
        for storage in memory:
            span = touched.setdefault(storage, [index, index])
            span[1] = index
        for storage in facts[node].writes:
            writes[storage] = index
    conflicts = [""] * (len(order) + 1)
    for storage, last_write in writes.items():
        first, last = touched[storage]
        # A temporary may cross after its last write, when its value no longer changes. Persistent
        # memory (an input, a parameter, a buffer) does not cross a cut: one side would miss the
        # writes of the other, so that all its uses must be on one side.
        stop = last if storage in persistent else last_write
        for index in range(first + 1, stop + 1):
            conflicts[index] = "memory written on one side is used on the other"
    return conflicts


def _is_boundary(order: Sequence[fx.Node], index: int, units: frozenset[str]) -> bool:
    """Whether no unit of a repeated structure has nodes on both sides of a cut."""
    if index >= len(order):
        return True
    before, after = (_enclosing_modules(order[i]) for i in (index - 1, index))
    return not units.intersection(before).intersection(after)


def _begins_unit(order: Sequence[fx.Node], index: int, units: frozenset[str]) -> bool:
    """Whether a unit of a repeated structure begins right after a cut, whatever it begins with."""
    before, after = (units.intersection(_enclosing_modules(order[i])) for i in (index - 1, index))
    return not after <= before


def _completes(program: Program, node: fx.Node, costs: Mapping[fx.Node, NodeCost]) -> bool:
    """Whether a node normalizes, activates or drops what a convolution or matrix product computes.

    Not if anything else lies between the two: a normalization that reads a sum begins a block.
    """
    if not _is_companion(program, node):
        return False
    source = node.all_input_nodes[0]
    while source in costs and _is_companion(program, source):
        source = source.all_input_nodes[0]
    # Convolutions and matrix products have twice the FLOPs in the backward pass.
    return source in costs and costs[source].backward_flops > costs[source].flops


_COMPANIONS = ("norm", "activation", "dropout")
"""Modules of torch.nn, by parts of their names, whose layers complete a convolution."""
_COMPANION_NAME = re.compile(
    r"(batch|layer|group|instance|rms)_?norm|dropout|softmax|relu|elu|silu|gelu|mish|tanh|sigmoid"
    r"|hardswish|softplus",
)


def _is_companion(program: Program, node: fx.Node) -> bool:
    """Whether a node is a normalization, an activation or a dropout, of one tensor."""
    if not node.all_input_nodes or node.op not in ("call_module", "call_function", "call_method"):
        return False
    if node.op == "call_module":
        layer = submodule(program.module, str(node.target))
        if isinstance(layer, nn.MultiheadAttention):
            return False
        home = type(layer).__module__.rpartition(".")[2]
        if any(part in home for part in _COMPANIONS):
            return True
        name = type(layer).__name__
    else:
        name = getattr(node.target, "__name__", str(node.target))
    return _COMPANION_NAME.search(name.lower()) is not None


def _repeated_units(order: Sequence[fx.Node]) -> frozenset[str]:
    """Return the numbered modules (`blocks.3`) with a sibling that has a child of the same name.

    The condition excludes the children of a model that is itself a sequence of an embedding (`0`),
    a container of blocks (`1`) and a head (`2`).
    """
    children: dict[str, set[str]] = {}
    for paths in map(_enclosing_modules, order):
        for outer, inner in itertools.pairwise([*paths, ""]):
            children.setdefault(outer, set()).add(inner.removeprefix(outer))
    siblings: dict[str, list[str]] = {}
    for path in children:
        container, _, name = path.rpartition(".")
        if name.isdigit():
            siblings.setdefault(container, []).append(path)
    return frozenset(
        path
        for paths in siblings.values()
        for path in paths
        if any(other != path and children[path] & children[other] for other in paths)
    )


def _enclosing_modules(node: fx.Node) -> list[str]:
    """Return the qualified names of the modules that a node is in, from the outermost."""
    atoms = provenance(node).path.split(".")
    return [".".join(atoms[: depth + 1]) for depth in range(len(atoms))]


def requirements(
    program: Program,
    nodes: Sequence[fx.Node],
    recomputable: Recomputable,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Find the inputs and side values that consecutive nodes need.

    Args:
        program: The program.
        nodes: The nodes.
        recomputable: For every side value, the nodes that recompute it.

    Returns:
        Names of the placeholders to read, and names of the nodes to recompute, in order.
    """
    inside = set(nodes)
    sides: set[fx.Node] = set()
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source in recomputable:
                sides.update(recomputable[source])
    sides -= inside
    sources = {source for node in (*nodes, *sides) for source in node.all_input_nodes}
    inputs = tuple(node.name for node in program.inputs if node in sources)
    return inputs, tuple(node.name for node in program.order if node in sides)
