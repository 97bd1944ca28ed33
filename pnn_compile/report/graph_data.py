"""Turn the partition graph into compact data for the page, with the modules of a stage as a tree.

People open the tree branch by branch. Only neighbors in the order of execution form a group, so
that groups depend on each other in one direction:

    nodes      a.x  a.y  b.x  a.x  a.y
    top level  a         b.x  a             a group of two nodes, a node, a group of two nodes
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx as nx

_NUMBERS = ("stage", "flops", "backward_flops", "parameter_bytes", "bytes")
_TEXTS = ("role", "op", "path", "source", "shape")
_IN_LANES = ("fine", "head")

_MAX_CHILDREN = 30
"""Largest number of children of a group; longer runs are divided into groups of neighbors."""

_MAX_DEPTH = 40
"""Largest number of levels; the nodes of deeper modules form one flat list."""


def graph_data(graph: nx.DiGraph[str], stages: int) -> dict[str, Any]:
    """Describe a partition graph for the page.

    Args:
        graph: A graph of `pnn_compile.export.partition_graph.partition_graph`.
        stages: Number of stages.

    Returns:
        A dict of lists: "texts", every text once; "nodes", one column per attribute, where texts
        are indices into "texts"; "edges", five numbers per edge (source, target, bytes, whether it
        crosses stages, index of its shapes in "texts"); "lanes", one tree per stage and one for the
        head, where a node is its index and a group is [label, path, children].
    """
    texts = _TextTable()
    names = list(graph)
    positions = {name: position for position, name in enumerate(names)}
    attributes = [graph.nodes[name] for name in names]
    nodes: dict[str, Any] = {"name": names}
    for key in _NUMBERS:
        nodes[key] = [values[key] for values in attributes]
    for key in _TEXTS:
        nodes[key] = [texts.index(values[key]) for values in attributes]
    if any("seconds" in values for values in attributes):
        nodes["seconds"] = [values.get("seconds") for values in attributes]
    edges: list[int] = []
    for source, target, flow in graph.edges(data=True):
        shape = texts.index(flow["shape"])
        edges += [positions[source], positions[target], flow["bytes"], int(flow["crosses"]), shape]
    lanes: list[list[int]] = [[] for _ in range(stages + 1)]
    for position, values in enumerate(attributes):
        if values["role"] in _IN_LANES:
            lanes[values["stage"]].append(position)  # the head has stage -1: the last lane
    trees = [
        _plain(module_trees([attributes[position]["path"] for position in lane]), lane, texts)
        for lane in lanes
    ]
    return {"nodes": nodes, "edges": edges, "lanes": trees, "texts": texts.texts}


class _TextTable:
    """Distinct texts, in the order of their first use."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._indices: dict[str, int] = {}

    def index(self, text: str) -> int:
        if text not in self._indices:
            self._indices[text] = len(self.texts)
            self.texts.append(text)
        return self._indices[text]


def _plain(trees: Iterable[ModuleTree], lane: list[int], texts: _TextTable) -> list[Any]:
    """Write trees as lists; `lane` has the index in the graph of every leaf."""
    return [
        [texts.index(tree.label), texts.index(tree.path), _plain(tree.children, lane, texts)]
        if isinstance(tree, ModuleGroup)
        else lane[tree]
        for tree in trees
    ]


@dataclass(frozen=True)
class ModuleGroup:
    """Neighbors in the order of execution that belong together.

    Attributes:
        label: Module path relative to the group around it; "" for a mere run of neighbors.
        path: Qualified name of the module; for a run of neighbors, of the module around it.
        children: Groups and indices of nodes, in the order of execution.
    """

    label: str
    path: str
    children: tuple[ModuleTree, ...]


ModuleTree = ModuleGroup | int
"""A group, or the index of a node."""

_Item = tuple[tuple[str, ...], int]
"""Module path, split at the dots, and index of a node."""


def module_trees(paths: Sequence[str], *, limit: int = _MAX_CHILDREN) -> tuple[ModuleTree, ...]:
    """Group nodes by their module paths.

    A module that is called twice becomes two groups; a group of one node becomes that node.

    Args:
        paths: Qualified module name of each node, in the order of execution; "" for the model.
        limit: Largest number of children of a group.

    Returns:
        The top level.

    >>> [getattr(item, "label", item) for item in module_trees(["a.x", "a.y", "b", "a.x", "a.y"])]
    ['a', 2, 'a']
    """
    items = [(tuple(path.split(".")) if path else (), i) for i, path in enumerate(paths)]
    return _level(items, (), 0, limit)


def _level(
    items: Sequence[_Item], prefix: tuple[str, ...], depth: int, limit: int
) -> tuple[ModuleTree, ...]:
    """Group items whose paths all start with `prefix`."""
    start = len(prefix)
    trees: list[ModuleTree] = []
    # Neighbors with the same next name belong together; () is the module `prefix` itself.
    for name, group in groupby(items, key=lambda item: item[0][start : start + 1]):
        run = list(group)
        indices = [index for _, index in run]
        if len(run) == 1 or not name:
            trees += indices
            continue
        shared = _common_prefix([path for path, _ in run])
        label, path = ".".join(shared[start:]), ".".join(shared)
        if depth < _MAX_DEPTH:
            children = _level(run, shared, depth + 1, limit)
        else:
            children = _divide(indices, path, limit)
        trees.append(ModuleGroup(label, path, children))
    return _divide(trees, ".".join(prefix), limit)


def _common_prefix(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the leading names that all paths share: those of the first and the last in order."""
    pairs = zip(min(paths), max(paths), strict=False)  # of different lengths
    return tuple(name for name, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _divide(children: Sequence[ModuleTree], path: str, limit: int) -> tuple[ModuleTree, ...]:
    """Gather neighbors in groups of about equal size until no more than `limit` are left."""
    while len(children) > limit:
        parts = math.ceil(len(children) / limit)
        size = math.ceil(len(children) / parts)
        slices = [children[start : start + size] for start in range(0, len(children), size)]
        children = [ModuleGroup("", path, tuple(part)) for part in slices]
    return tuple(children)
