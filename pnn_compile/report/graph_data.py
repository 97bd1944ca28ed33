"""Turn the partition graph into compact data for the page, with the modules of a stage as a tree.

People open the tree (`pnn_compile.export.module_trees`) branch by branch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pnn_compile.export.module_trees import IN_LANES, ModuleGroup, ModuleTree, module_trees

if TYPE_CHECKING:
    import networkx as nx

_NUMBERS = ("stage", "flops", "backward_flops", "parameter_bytes", "bytes")
_TEXTS = ("role", "op", "path", "source", "shape")


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
        if values["role"] in IN_LANES:
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
