"""Where the graph can be cut: positions, their frontiers, side values, repeated blocks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from passes.cones import find_cones
from passes.cost import Cost
from passes.dependence import input_leaves
from passes.observe import Fact, memory_of
from passes.plan import TensorSpec
from passes.program import Program, provenance

__all__ = [
    "SIDE_SHARE",
    "Block",
    "Frontiers",
    "Position",
    "Source",
    "analyze",
    "preprocessing_sources",
    "repeated_blocks",
    "requirements",
]

SIDE_SHARE = 0.01
"""Largest share of all FLOPs that may be spent to recompute one side value in a stage."""

_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Position:
    """A legal cut, between two nodes that follow each other.

    Attributes:
        index: Number of compute nodes before the cut.
        state: The tensors that cross, in the order of their definition.
        specs: Their types.
        boundary: Whether the cut falls between two calls of the modules of a repeated structure.
    """

    index: int
    state: tuple[fx.Node, ...]
    specs: tuple[TensorSpec, ...]
    boundary: bool

    @property
    def bytes(self) -> int:
        """Bytes that cross at the example inputs."""
        return sum(spec.bytes for spec in self.specs)


@dataclass(frozen=True)
class Frontiers:
    """What the analysis of a program found.

    Attributes:
        order: The compute nodes in topological order.
        positions: The legal cuts, in order; the last one is the end of the graph.
        cones: For every cheap, pure value that depends on the inputs alone: the nodes to
            recompute it from them, itself included, in order.
        refused: How many positions each reason made illegal.
    """

    order: tuple[fx.Node, ...]
    positions: tuple[Position, ...]
    cones: Mapping[fx.Node, tuple[fx.Node, ...]]
    refused: Mapping[str, int]


def analyze(
    program: Program, facts: Mapping[fx.Node, Fact], costs: Mapping[fx.Node, Cost]
) -> Frontiers:
    """Find every legal cut of a program and the state that crosses it.

    A cut is legal where every live value is a floating-point tensor that follows the batch, no
    side value left aside, at least one such tensor is live, and no memory that is live, or shared
    by both sides, is written behind the cut.
    """
    order = tuple(program.order)
    number = {node: index for index, node in enumerate(order)}
    kept = _kept(program, facts)
    cones = find_cones(order, facts, costs, kept, SIDE_SHARE)
    last_use = {
        node: max((number.get(user, len(order)) for user in node.users), default=number[node])
        for node in order
    }
    barred = _barred(order, facts, kept)
    units = _units(order)
    positions: list[Position] = []
    refused: dict[str, int] = {}
    live: dict[fx.Node, None] = {}
    for index in range(1, len(order) + 1):
        node = order[index - 1]
        if last_use[node] >= index and node not in cones:
            live[node] = None
        for gone in [n for n in live if last_use[n] < index]:
            del live[gone]
        reason = _illegal(live, facts) or barred[index]
        if reason:
            refused[reason] = refused.get(reason, 0) + 1
            continue
        specs = tuple(_require(facts[n].spec) for n in live)
        positions.append(Position(index, tuple(live), specs, _is_boundary(order, index, units)))
    return Frontiers(order, tuple(positions), cones, refused)


def _require(spec: TensorSpec | None) -> TensorSpec:
    assert spec is not None
    return spec


def _illegal(live: Mapping[fx.Node, None], facts: Mapping[fx.Node, Fact]) -> str:
    if not live:
        return "nothing crosses"
    for node in live:
        spec = facts[node].spec
        if spec is None or spec.dtype not in _FLOATS:
            return "a value that is not a floating-point tensor crosses"
        if spec.batch_axis is None:
            return "a tensor without a batch axis crosses"
    return ""


def _kept(program: Program, facts: Mapping[fx.Node, Fact]) -> frozenset[int]:
    """Memory that outlives the run: of inputs, parameters and buffers, of called modules too."""
    owners = (*program.inputs, *_attributes(program))
    given = frozenset(memory for node in owners for memory in facts[node].storages)
    layers = [
        program.module.get_submodule(str(node.target))
        for node in program.order
        if node.op == "call_module"
    ]
    held = (tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    return given.union(map(memory_of, held))


def _barred(
    order: Sequence[fx.Node], facts: Mapping[fx.Node, Fact], kept: frozenset[int]
) -> list[str]:
    """For each position, why memory written on one side and touched on the other forbids it."""
    touched: dict[int, list[int]] = {}
    writes: dict[int, int] = {}
    for index, node in enumerate(order):
        memory = facts[node].storages | facts[node].writes
        for source in node.all_input_nodes:
            memory |= facts[source].storages
        for storage in memory:
            span = touched.setdefault(storage, [index, index])
            span[1] = index
        for storage in facts[node].writes:
            writes[storage] = index
    barred = [""] * (len(order) + 1)
    for storage, written in writes.items():
        first, last = touched[storage]
        # Before the write the memory may not be carried over; what owns memory for good (an
        # input, a parameter, a buffer) may not be touched on another side at all.
        stop = last if storage in kept else written
        for index in range(first + 1, stop + 1):
            barred[index] = "memory written on one side is used on the other"
    return barred


def _attributes(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "get_attr"]


def _is_boundary(order: Sequence[fx.Node], index: int, units: frozenset[str]) -> bool:
    """Whether a cut leaves no unit of a repeated structure open on both of its sides."""
    if index >= len(order):
        return True
    before, behind = (_prefixes(order[i]) for i in (index - 1, index))
    return not units.intersection(before).intersection(behind)


def _units(order: Sequence[fx.Node]) -> frozenset[str]:
    """Numbered modules (`blocks.3`) that repeat: a sibling has a part of the same name.

    So a container is none, in a model that is a sequence of an embedding, a container and a head.
    """
    parts: dict[str, set[str]] = {}
    for prefixes in map(_prefixes, order):
        for outer, inner in itertools.pairwise([*prefixes, ""]):
            parts.setdefault(outer, set()).add(inner.removeprefix(outer))
    siblings: dict[str, list[str]] = {}
    for path in parts:
        container, _, name = path.rpartition(".")
        if name.isdigit():
            siblings.setdefault(container, []).append(path)
    return frozenset(
        path
        for paths in siblings.values()
        for path in paths
        if any(other != path and parts[path] & parts[other] for other in paths)
    )


def _prefixes(node: fx.Node) -> list[str]:
    """Qualified names of the modules that a node is in, from the outermost."""
    atoms = provenance(node).path.split(".")
    return [".".join(atoms[: depth + 1]) for depth in range(len(atoms))]


def requirements(
    program: Program,
    nodes: Sequence[fx.Node],
    cones: Mapping[fx.Node, tuple[fx.Node, ...]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the placeholders that a run of nodes reads and the side values it recomputes."""
    inside = set(nodes)
    sides: set[fx.Node] = set()
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source in cones:
                sides.update(cones[source])
    sides -= inside
    read = {s for node in (*nodes, *sides) for s in node.all_input_nodes if s.op == "placeholder"}
    inputs = tuple(node.name for node in program.inputs if node in read)
    return inputs, tuple(node.name for node in program.order if node in sides)


@dataclass(frozen=True)
class Block:
    """A run of nodes between two legal cuts through one tensor.

    Attributes:
        start: Index of the cut that it begins at.
        stop: Index of the cut that it ends at.
        entering: Type of the tensor that enters.
        leaving: Type of the tensor that leaves.
        signature: Digest of its operators, options and shapes; equal for isomorphic blocks.
    """

    start: Position
    stop: Position
    entering: TensorSpec
    leaving: TensorSpec
    signature: str


def repeated_blocks(
    program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
) -> list[Block]:
    """Find the blocks that the trunk repeats: equal neighbours between module boundaries.

    Returns:
        Every run between two neighbouring single-tensor module boundaries, in order.
    """
    single = [p for p in frontiers.positions if len(p.state) == 1 and p.boundary]
    blocks = []
    for start, stop in itertools.pairwise(single):
        nodes = frontiers.order[start.index : stop.index]
        blocks.append(
            Block(start, stop, start.specs[0], stop.specs[0], _signature(program, nodes, facts))
        )
    return blocks


def _signature(program: Program, nodes: Sequence[fx.Node], facts: Mapping[fx.Node, Fact]) -> str:
    """Digest of a run of nodes that does not depend on names."""
    number = {node: index for index, node in enumerate(nodes)}

    def reference(node: fx.Node) -> str:
        return f"%{number[node]}" if node in number else f"<{facts[node].spec}>"

    lines = []
    for node in nodes:
        if node.op == "call_module":
            operator = repr(program.module.get_submodule(str(node.target)))
        else:
            operator = f"{node.op} {node.target}"
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: reference(n))
        lines.append(f"{operator} {arguments} {facts[node].spec}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A value that preprocessing operators read.

    Attributes:
        node: A floating-point input, or a learned value that follows from inputs at once (an
            embedding).
        spec: Its type.
    """

    node: fx.Node
    spec: TensorSpec


def preprocessing_sources(
    program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
) -> list[Source]:
    """Find what the guesses of the interfaces are made from.

    Every floating-point input that follows the batch; for other inputs (token ids) the first
    learned value that the trunk reads, if recomputing it in every stage is cheap.
    """
    sources: list[Source] = []
    for leaf in input_leaves(program, facts):
        spec = facts[leaf].spec
        if spec is None or spec.batch_axis is None:
            continue
        if spec.dtype in _FLOATS:
            sources.append(Source(leaf, spec))
        else:
            sources += _learned(leaf, program, frontiers, facts)
    return list({source.node: source for source in sources}.values())


def _learned(
    leaf: fx.Node, program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
) -> list[Source]:
    found: list[Source] = []
    for node, cone in frontiers.cones.items():
        spec = facts[node].spec
        if spec is None or spec.batch_axis is None or spec.dtype not in _FLOATS:
            continue
        learned = any(_looks_up(leaf, member, frontiers) for member in cone)
        leads_on = any(user not in frontiers.cones for user in node.users)
        known = any(source.node in cone for source in found)
        if learned and leads_on and not known:
            found.append(Source(node, spec))
    return found


def _looks_up(leaf: fx.Node, member: fx.Node, frontiers: Frontiers) -> bool:
    """Whether a node reads parameters and the values of a leaf, as an embedding does.

    A table of positions that only meets a mask of the leaf says nothing of what the leaf holds.
    """
    if member.op != "call_module" and all(n.op != "get_attr" for n in member.all_input_nodes):
        return False
    return any(leaf in each.all_input_nodes for each in frontiers.cones.get(member, (member,)))
