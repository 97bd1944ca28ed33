"""Where the graph can be cut: positions, their frontiers, side values, repeated blocks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from passes.analysis.recomputable import find_cones
from passes.cost.flops import Cost
from passes.cost.node_facts import Fact, memory_of
from passes.ir.program import Program, provenance
from passes.ir.tensor_spec import TensorSpec

__all__ = ["SIDE_SHARE", "Frontiers", "Position", "analyze", "requirements"]

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
