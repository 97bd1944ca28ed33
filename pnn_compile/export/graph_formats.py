"""Write the partition graph in the formats of other programs, and numbers for readers.

These take what `pnn_compile.export.partition_graph.partition_graph` builds:

    to_dot        Graphviz; one cluster per stage
    to_mermaid    Markdown pages
    to_graphml    Gephi, yEd, Cytoscape; reads back equal with `networkx.parse_graphml`
    to_node_link  JSON; reads back equal with `networkx.node_link_graph`

DOT and Mermaid show the boxes and colors of the report's page (`module_trees.py`).

`format_count`, `format_size` and `format_seconds` write the numbers in them and in all reports.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from typing import Any

import networkx as nx

from passes.errors import ExportError
from pnn_compile.export.module_trees import COLORS, collapsed

_CROSSING = COLORS["correct"]

_FILL = "26"
"""Opacity of the fill of a box, hexadecimal: the text on it stays dark."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_dot(graph: nx.DiGraph[str], depth: int = 1) -> str:
    """Return the partition graph in the DOT language, one cluster per stage.

    Args:
        graph: The partition graph.
        depth: Levels of modules that are open, as in `module_trees.collapsed`.

    Raises:
        ExportError: The package pydot is not installed.
    """
    try:
        import pydot
    except ImportError as error:
        raise ExportError(
            "DOT needs the package pydot: pip install 'pnn-compile[report]'"
        ) from error
    boxes = collapsed(graph, depth)
    drawing = pydot.Dot(
        _dot_quoted(boxes.name), graph_type="digraph", rankdir="TB", fontname="sans-serif"
    )
    clusters = {
        number: pydot.Cluster(f"stage_{number}", label=f"stage {number}", style="rounded")
        for number in sorted({data["stage"] for _, data in boxes.nodes(data=True)} - {-1})
    }
    for name, data in boxes.nodes(data=True):
        color = COLORS[data["role"]]
        clusters.get(data["stage"], drawing).add_node(
            pydot.Node(
                _dot_quoted(name),
                label=_dot_label([data["label"], _detail(data)]),
                shape="box",
                style="filled",
                color=_dot_quoted(color),
                fillcolor=_dot_quoted(color + _FILL),
            )
        )
    for cluster in clusters.values():
        drawing.add_subgraph(cluster)  # type: ignore[arg-type]  # a Cluster is a subgraph
    for source, target, data in boxes.edges(data=True):
        edge = pydot.Edge(_dot_quoted(source), _dot_quoted(target))
        if data["crosses"]:
            edge.set("color", _dot_quoted(_CROSSING))
            edge.set("penwidth", "2")
            edge.set("label", _dot_label([data["shape"], format_size(data["bytes"])]))
        drawing.add_edge(edge)
    return str(drawing.to_string())


def _detail(box: dict[str, Any]) -> str:
    """Return the second line of a box, as on the page: its operator or its size, and FLOPs."""
    what = f"{box['size']} nodes" if box["size"] > 1 else box["op"]
    cost = f"{format_count(box['flops'])} FLOPs" if box["flops"] else ""
    return " · ".join(filter(None, ("" if what == box["label"] else what, cost)))


def _dot_label(lines: Iterable[str]) -> str:
    """Join lines, without empty ones."""
    # A backslash of the text must not join the line breaks that Graphviz writes with one.
    safe = [line.replace("\\", "\\\\") for line in lines if line]
    return _dot_quoted("\\n".join(safe))


def _dot_quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def to_mermaid(graph: nx.DiGraph[str], depth: int = 1) -> str:
    """Return the partition graph as a Mermaid flowchart, one subgraph per stage.

    Args:
        graph: The partition graph.
        depth: Levels of modules that are open, as in `module_trees.collapsed`.
    """
    boxes = collapsed(graph, depth)
    names = {box: f"n{number}" for number, box in enumerate(boxes)}  # Mermaid misreads others
    lanes: dict[int, list[str]] = {}
    for box, data in boxes.nodes(data=True):
        text = "<br/>".join(map(_mermaid_escaped, filter(None, (data["label"], _detail(data)))))
        lanes.setdefault(data["stage"], []).append(f'{names[box]}["{text}"]:::{data["role"]}')
    lines = ["flowchart TB"]
    for stage in sorted(lanes.keys() - {-1}):
        lines.append(f'  subgraph stage{stage} ["stage {stage}"]')
        lines += [f"    {text}" for text in lanes[stage]]
        lines.append("  end")
    lines += [f"  {text}" for text in lanes.get(-1, [])]
    for source, target, data in boxes.edges(data=True):
        arrow = f'== "{format_size(data["bytes"])}" ==>' if data["crosses"] else "-->"
        lines.append(f"  {names[source]} {arrow} {names[target]}")
    roles = {data["role"] for _, data in boxes.nodes(data=True)}
    lines += [
        f"  classDef {role} fill:{color}{_FILL},stroke:{color},color:#111111"
        for role, color in COLORS.items()
        if role in roles
    ]
    return "\n".join(lines) + "\n"


def _mermaid_escaped(text: str) -> str:
    """Write what Mermaid or a page would take for markup as character codes."""
    safe = "".join(c if c.isalnum() or c in "._- :/·…" else f"#{ord(c)};" for c in text)
    return escape(safe, quote=False)


def to_graphml(graph: nx.DiGraph[str]) -> str:
    """Return a graph as GraphML; `networkx.parse_graphml` returns an equal graph.

    What XML cannot hold, such as a control character in a name, becomes U+FFFD.
    """
    clean: nx.DiGraph[str] = nx.DiGraph(name=_xml_clean(graph.name))
    for name, data in graph.nodes(data=True):
        clean.add_node(_xml_clean(name), **{key: _xml_clean(value) for key, value in data.items()})
    for source, target, data in graph.edges(data=True):
        values = {key: _xml_clean(value) for key, value in data.items()}
        clean.add_edge(_xml_clean(source), _xml_clean(target), **values)
    return "\n".join(nx.generate_graphml(clean)) + "\n"


def _xml_clean(value: Any) -> Any:
    return _NOT_XML.sub("\ufffd", value) if isinstance(value, str) else value


def to_node_link(graph: nx.DiGraph[str]) -> str:
    """Return a graph as JSON; `networkx.node_link_graph(..., edges="edges")` reads it."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=2) + "\n"


_PREFIXES = ("", "k", "M", "G", "T", "P")


def format_count(number: float) -> str:
    """Format a count with a decimal prefix.

    >>> format_count(1234567)
    '1.23M'
    """
    power = 0
    while abs(number) >= 999.5 and power < len(_PREFIXES) - 1:  # 999.5 would print as 1e+03
        number /= 1000
        power += 1
    return f"{number:.3g}{_PREFIXES[power]}"


def format_size(number: float) -> str:
    """Format a number of bytes.

    >>> format_size(131072)
    '131kB'
    """
    return f"{format_count(number)}B"


def format_seconds(number: float) -> str:
    """Format a duration that is given in seconds.

    >>> format_seconds(0.0123)
    '12.3ms'
    """
    if number >= 1 or number == 0:
        return f"{number:.3g}s"
    return f"{number * 1e3:.3g}ms" if number >= 1e-3 else f"{number * 1e6:.3g}us"
