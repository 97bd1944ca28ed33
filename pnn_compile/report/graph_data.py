"""The partition graph as compact plain data for the page: columns, and every text once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pnn_compile.report.hierarchy import Group, Tree, hierarchy

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["graph_data"]

_NUMBERS = ("stage", "flops", "backward_flops", "parameter_bytes", "bytes")
_TEXTS = ("role", "op", "path", "source", "shape")
_COMPUTED = ("fine", "head")


def graph_data(graph: nx.DiGraph[str], stages: int) -> dict[str, Any]:
    """Describe a partition graph for the page.

    Args:
        graph: A graph of `pnn_compile.export.partition_graph.partition_graph`.
        stages: Number of stages.

    Returns:
        "texts", to which the columns of texts point; "nodes" with a column for every attribute;
        "edges", of which every five numbers are source, target, bytes, whether it crosses and the
        place of its shapes in "texts"; and "lanes": the tree of each stage, then of the head.
    """
    texts = _Texts()
    names = list(graph)
    places = {name: place for place, name in enumerate(names)}
    data = [graph.nodes[name] for name in names]
    nodes: dict[str, Any] = {"name": names}
    for key in _NUMBERS:
        nodes[key] = [attributes[key] for attributes in data]
    for key in _TEXTS:
        nodes[key] = [texts.place(attributes[key]) for attributes in data]
    if any("seconds" in attributes for attributes in data):
        nodes["seconds"] = [attributes.get("seconds") for attributes in data]
    edges: list[int] = []
    for source, target, flow in graph.edges(data=True):
        shape = texts.place(flow["shape"])
        edges += [places[source], places[target], flow["bytes"], int(flow["crosses"]), shape]
    lanes: list[list[int]] = [[] for _ in range(stages + 1)]
    for place, attributes in enumerate(data):
        if attributes["role"] in _COMPUTED:
            lanes[attributes["stage"]].append(place)  # the head has stage -1: the last lane
    trees = [
        _plain(hierarchy([data[place]["path"] for place in lane]), lane, texts) for lane in lanes
    ]
    return {"nodes": nodes, "edges": edges, "lanes": trees, "texts": texts.known}


class _Texts:
    """Texts in the order of their first use."""

    def __init__(self) -> None:
        self.known: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """Where a text stands."""
        if text not in self._places:
            self._places[text] = len(self.known)
            self.known.append(text)
        return self._places[text]


def _plain(trees: Iterable[Tree], lane: list[int], texts: _Texts) -> list[Any]:
    """Trees as lists: a node by its number, a group as label, path and children."""
    return [
        [texts.place(tree.label), texts.place(tree.path), _plain(tree.children, lane, texts)]
        if isinstance(tree, Group)
        else lane[tree]
        for tree in trees
    ]
