"""Repeated blocks of a piece: what has the same structure is translated to ONNX once.

Translating a node takes a hundred times as long as copying what it became, and deep networks
repeat themselves: of the 333 units of ResNet-1001 eight differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from passes.ir.program import resolve
from passes.ir.structure_hash import digest, node_lines
from pnn_compile.export.onnx.flat import Piece

__all__ = ["Segment", "segments"]

_WORTH = 24
"""Nodes that need not be translated, from which on a block is treated as a repeated one."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of nodes of a piece.

    Attributes:
        nodes: The compute nodes and the attributes that they read, in order.
        entering: Values from before, in the order in which they are first read.
        leaving: Values that later nodes or the output read.
        key: Equal for segments that differ in the values of their weights alone; None if unique.
    """

    nodes: tuple[fx.Node, ...]
    entering: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]
    key: Hashable = None


def segments(pieces: Iterable[Piece]) -> list[list[Segment]]:
    """Divide every piece into repeated blocks and what is between them.

    Blocks start and end where a single tensor is alive, so that no memory is shared across.
    """
    divided = [_atoms(piece) for piece in pieces]
    counts = Counter(key for _, atoms in divided for _, key in atoms)
    result = []
    for piece, atoms in divided:
        runs: list[tuple[list[fx.Node], Hashable]] = []
        for nodes, key in atoms:
            if key is not None and (counts[key] - 1) * len(nodes) >= _WORTH:
                runs.append((nodes, key))
            elif runs and runs[-1][1] is None:
                runs[-1] = (runs[-1][0] + nodes, None)
            else:
                runs.append((list(nodes), None))
        result.append(_bounded(piece, runs))
    return result


def _atoms(piece: Piece) -> tuple[Piece, list[tuple[list[fx.Node], Hashable]]]:
    """The shortest runs of nodes that may be blocks, each with its key."""
    order = piece.nodes
    ends = [-1, *_narrow(piece, order), len(order) - 1]
    atoms = [order[a + 1 : b + 1] for a, b in pairwise(ends)]
    return piece, [(atom, _key(piece, atom)) for atom in atoms if atom]


def _narrow(piece: Piece, order: Sequence[fx.Node]) -> list[int]:
    """Positions behind which one tensor is alive and nothing else."""
    position = {node: index for index, node in enumerate(order)}
    ends = _last_uses(piece, position, len(order))
    alive: set[fx.Node] = {node for node in piece.inputs if ends.get(node, -1) >= 0}
    found = []
    dying: dict[int, list[fx.Node]] = {}
    for node, last in ends.items():
        dying.setdefault(last, []).append(node)
    for index, node in enumerate(order[:-1]):
        if ends.get(node, -1) > index:
            alive.add(node)
        alive.difference_update(dying.get(index, ()))
        if len(alive) == 1 and next(iter(alive)) in piece.specs:
            found.append(index)
    return found


def _last_uses(piece: Piece, position: dict[fx.Node, int], end: int) -> dict[fx.Node, int]:
    """Position of the last reader of every value; the output reads at `end`."""
    return {
        node: max(position.get(user, end) for user in node.users)
        for node in piece.module.graph.nodes
        if node.users and node.op != "get_attr"
    }


def _bounded(piece: Piece, runs: Sequence[tuple[list[fx.Node], Hashable]]) -> list[Segment]:
    """Find what enters and leaves every run."""
    order = piece.nodes
    position = {node: index for index, node in enumerate(order)}
    ends = _last_uses(piece, position, len(order))
    result, start = [], 0
    for nodes, key in runs:
        stop = start + len(nodes)
        own = set(nodes)
        read = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes))
        outside = tuple(n for n in read if n.op != "get_attr" and n not in own)
        attributes = [n for n in read if n.op == "get_attr"]
        leaving = tuple(n for n in nodes if ends.get(n, -1) >= stop)
        if key is not None:
            key = key, tuple(position[n] - start for n in leaving)
        result.append(Segment((*attributes, *nodes), outside, leaving, key))
        start = stop
    return result


def _key(piece: Piece, nodes: Sequence[fx.Node]) -> Hashable:
    """Describe consecutive nodes up to names and values of weights; None if that is impossible."""
    modules = {
        node: resolve(piece.module, str(node.target)) for node in nodes if node.op == "call_module"
    }
    if not all(map(_is_describable, modules.values())):
        return None
    number = {node: f"%{index}" for index, node in enumerate(nodes)}
    entering: dict[fx.Node, str] = {}
    weights: dict[int, int] = {}

    def describe_target(node: fx.Node) -> str:
        if node.op == "call_module":
            return repr(_describe_module(modules[node], weights))
        return node.target if isinstance(node.target, str) else f"{node.target} {id(node.target)}"

    def describe_source(node: fx.Node) -> str:
        if node.op == "get_attr":
            return repr(_describe_weight(resolve(piece.module, str(node.target)), weights))
        if node in number:
            return number[node]
        return entering.setdefault(node, f"entering {len(entering)} {piece.specs.get(node)}")

    return digest(node_lines(nodes, describe_target, describe_source))


def _is_describable(module: nn.Module) -> bool:
    """Whether a module consists of modules of torch and of the compiler, without hooks."""
    return all(
        type(child).__module__.startswith(("torch.nn.", "passes."))
        and not child._forward_hooks
        and not child._forward_pre_hooks
        for child in module.modules()
    )


def _describe_module(module: nn.Module, weights: dict[int, int]) -> tuple[Any, ...]:
    """Describe a module by the classes and options of its submodules and by its weights."""
    facts: list[Any] = []
    for name, child in module.named_modules():
        options = sorted(
            (key, repr(value))
            for key, value in vars(child).items()
            if not key.startswith("_") and not isinstance(value, torch.Tensor)
        )
        facts.append((name, type(child), options))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        facts.append((name, _describe_weight(tensor, weights)))
    return tuple(facts)


def _describe_weight(tensor: Any, weights: dict[int, int]) -> tuple[Any, ...]:
    """Describe a weight by shape, dtype and the number of its first appearance in the block."""
    if not isinstance(tensor, torch.Tensor):
        return (repr(tensor),)
    return tuple(tensor.shape), tensor.dtype, weights.setdefault(id(tensor), len(weights))
