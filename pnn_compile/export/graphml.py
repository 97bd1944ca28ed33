"""The partition graph as GraphML and as node-link JSON, which most graph programs read."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from typing import Any

__all__ = ["to_graphml", "to_node_link"]

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_graphml(graph: nx.DiGraph[str]) -> str:
    """Return a graph as GraphML text; `networkx.parse_graphml` gives an equal graph.

    What XML cannot hold, such as a control character in a name, becomes U+FFFD.
    """
    clean: nx.DiGraph[str] = nx.DiGraph(name=_clean(graph.name))
    for name, data in graph.nodes(data=True):
        clean.add_node(_clean(name), **{key: _clean(value) for key, value in data.items()})
    for source, target, data in graph.edges(data=True):
        values = {key: _clean(value) for key, value in data.items()}
        clean.add_edge(_clean(source), _clean(target), **values)
    return "\n".join(nx.generate_graphml(clean)) + "\n"


def _clean(value: Any) -> Any:
    return _NOT_XML.sub("\ufffd", value) if isinstance(value, str) else value


def to_node_link(graph: nx.DiGraph[str]) -> str:
    """Return a graph as node-link JSON; `networkx.node_link_graph(..., edges="edges")` reads it."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=2) + "\n"
