"""The nodes of a stage as a tree of its modules, and the partition graph collapsed along it.

The page of the report, DOT and Mermaid show the same boxes. Only neighbors in the order of
execution form a group, so that groups depend on each other in one direction:

    nodes      a.x  a.y  b.x  a.x  a.y
    top level  a         b.x  a             a group of two nodes, a node, a group of two nodes
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

import networkx as nx

COLORS = {
    "fine": "#0072b2", "preprocess": "#c98500", "coarse": "#00855f", "correct": "#c44e00",
    "residual": "#c44e00", "head": "#a3527f", "input": "#6b7079", "output": "#6b7079",
}  # fmt: skip
"""Color of each role in drawings; those of `report/assets/style.css`."""

IN_LANES = ("fine", "head")
"""Roles of the nodes that form trees."""

_MAX_CHILDREN = 30
"""Largest number of children of a group; longer runs are divided into groups of neighbors."""

_MAX_DEPTH = 40
"""Largest number of levels; the nodes of deeper modules form one flat list."""


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


def collapsed(graph: nx.DiGraph[str], depth: int) -> nx.DiGraph[str]:
    """Collapse a partition graph to the boxes that the page shows.

    Args:
        graph: A graph of `pnn_compile.export.partition_graph.partition_graph`.
        depth: Levels of modules that are open: 1 for the outermost modules of a stage, 0 for one
            box of a stage; every node is a box of its own from the depth of the model on.

    Returns:
        A graph whose nodes have role, stage, label, size (number of nodes), op (of a single node)
        and flops; and whose edges have bytes, shape and crosses, summed over those of the nodes.
    """
    boxes: nx.DiGraph[str] = nx.DiGraph(name=graph.name)
    box_of: dict[str, str] = {}
    for label, members in _boxes(graph, depth):
        first = graph.nodes[members[0]]
        box = members[0] if len(members) == 1 else f"box {len(boxes)} of {members[0]}"
        boxes.add_node(
            box,
            role=first["role"],
            stage=first["stage"],
            label=label,
            size=len(members),
            op=first["op"] if len(members) == 1 else "",
            flops=sum(graph.nodes[name]["flops"] for name in members),
        )
        box_of.update(dict.fromkeys(members, box))
    for source, target, flow in graph.edges(data=True):
        ends = box_of[source], box_of[target]
        if ends[0] == ends[1]:
            continue
        if not boxes.has_edge(*ends):
            boxes.add_edge(*ends, bytes=0, shape="", crosses=False)
        edge = boxes.edges[ends]
        edge["bytes"] += flow["bytes"]
        edge["crosses"] = edge["crosses"] or flow["crosses"]
        edge["shape"] = " + ".join(filter(None, (edge["shape"], flow["shape"])))
    return boxes


def _boxes(graph: nx.DiGraph[str], depth: int) -> Iterator[tuple[str, list[str]]]:
    """Yield label and nodes of every box."""
    lanes: dict[int, list[str]] = {}
    for name, data in graph.nodes(data=True):
        if data["role"] in IN_LANES:
            lanes.setdefault(data["stage"], []).append(name)
        else:
            yield name.removeprefix(":"), [name]
    for lane in lanes.values():
        if depth < 1:
            yield graph.nodes[lane[0]]["role"], lane
            continue
        paths = [str(graph.nodes[name]["path"]) for name in lane]
        labels = [path or name for name, path in zip(lane, paths, strict=True)]
        for tree in _opened(module_trees(paths), depth):
            inside = [*_leaves(tree)]
            label = labels[inside[0]]
            if isinstance(tree, ModuleGroup):
                ends = labels[inside[0]], labels[inside[-1]]
                label = tree.path if tree.label else f"{ends[0]} … {ends[1]}"
            yield label, [lane[index] for index in inside]


def _opened(trees: Sequence[ModuleTree], depth: int) -> Iterator[ModuleTree]:
    """Yield what is seen where `depth - 1` levels are open."""
    for tree in trees:
        if isinstance(tree, ModuleGroup) and depth > 1:
            yield from _opened(tree.children, depth - 1)
        else:
            yield tree


def _leaves(tree: ModuleTree) -> Iterator[int]:
    if isinstance(tree, ModuleGroup):
        for child in tree.children:
            yield from _leaves(child)
    else:
        yield tree
