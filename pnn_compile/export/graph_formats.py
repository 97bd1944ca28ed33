"""Write the partition graph in the formats of other programs, and numbers for readers.

These take what `pnn_compile.export.partition_graph.partition_graph` builds:

    to_dot        Graphviz; one cluster per stage, nodes colored by role
    to_mermaid    Markdown pages; modules are collapsed to what a page can show
    to_graphml    Gephi, yEd, Cytoscape; reads back equal with `networkx.parse_graphml`
    to_node_link  JSON; reads back equal with `networkx.node_link_graph`

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

_COLORS = {
    "input": "#d9d9d9", "preprocess": "#fdd0a2", "fine": "#c6dbef", "residual": "#fcbba1",
    "coarse": "#a1d99b", "correct": "#fcbba1", "head": "#dadaeb", "output": "#d9d9d9",
}  # fmt: skip
_CROSSING = "#cb181d"

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_dot(graph: nx.DiGraph[str]) -> str:
    """Return the partition graph in the DOT language.

    Raises:
        ExportError: The package pydot is not installed.
    """
    try:
        import pydot
    except ImportError as error:
        raise ExportError(
            "DOT needs the package pydot: pip install 'pnn-compile[report]'"
        ) from error
    drawing = pydot.Dot(
        _dot_quoted(graph.name), graph_type="digraph", rankdir="TB", fontname="sans-serif"
    )
    clusters = {
        number: pydot.Cluster(f"stage_{number}", label=f"stage {number}", style="rounded")
        for number in sorted({data["stage"] for _, data in graph.nodes(data=True)} - {-1})
    }
    for name, data in graph.nodes(data=True):
        parent = clusters.get(data["stage"], drawing)
        lines = [data["path"] or name.removeprefix(":"), data["op"], format_count(data["flops"])]
        parent.add_node(
            pydot.Node(
                _dot_quoted(name),
                label=_dot_label(lines),
                shape="box",
                style="filled",
                fillcolor=_dot_quoted(_COLORS[data["role"]]),
            )
        )
    for cluster in clusters.values():
        drawing.add_subgraph(cluster)  # type: ignore[arg-type]  # a Cluster is a subgraph
    for source, target, data in graph.edges(data=True):
        edge = pydot.Edge(_dot_quoted(source), _dot_quoted(target))
        if data["crosses"]:
            edge.set("color", _dot_quoted(_CROSSING))
            edge.set("penwidth", "2")
            edge.set("label", _dot_label([data["shape"], format_size(data["bytes"])]))
        drawing.add_edge(edge)
    return str(drawing.to_string())


def _dot_label(lines: Iterable[str]) -> str:
    """Join lines, without empty ones and the "0" of nodes that cost nothing."""
    # A backslash of the text must not join the line breaks that Graphviz writes with one.
    safe = [line.replace("\\", "\\\\") for line in lines if line and line != "0"]
    return _dot_quoted("\\n".join(safe))


def _dot_quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def to_mermaid(graph: nx.DiGraph[str], depth: int = 1) -> str:
    """Return the partition graph as a Mermaid flowchart, one subgraph per stage.

    Args:
        graph: The partition graph.
        depth: Number of leading names of a module path that tell boxes apart; the modules of a
            stage that agree in them share a box. 0 makes one box of a stage. Boxes of modules that
            run in turns depend on each other in both directions.
    """
    boxes = _Boxes(graph, depth)
    lines = ["flowchart TB"]
    for stage in sorted({box["stage"] for box in boxes.boxes.values()} - {-1}):
        lines.append(f'  subgraph stage{stage} ["stage {stage}"]')
        lines += [f"    {text}" for text in boxes.lines(stage)]
        lines.append("  end")
    lines += [f"  {text}" for text in boxes.lines(-1)]
    for (source, target), (bytes_, crosses) in boxes.flows(graph).items():
        arrow = f'== "{format_size(bytes_)}" ==>' if crosses else "-->"
        lines.append(f"  {source} {arrow} {target}")
    roles = {box["role"] for box in boxes.boxes.values()}
    lines += [
        f"  classDef {role} fill:{color},stroke:#555555,color:#111111"
        for role, color in _COLORS.items()
        if role in roles
    ]
    return "\n".join(lines) + "\n"


class _Boxes:
    """Nodes of one module in one stage, under names that Mermaid cannot misread.

    Attributes:
        boxes: Stage, role, label and FLOPs of every box, by its name.
        box_of: Name of the box of every node.
    """

    def __init__(self, graph: nx.DiGraph[str], depth: int) -> None:
        self.boxes: dict[str, dict[str, Any]] = {}
        self.box_of: dict[str, str] = {}
        names: dict[tuple[int, str, str], str] = {}
        for node, data in graph.nodes(data=True):
            label = node.removeprefix(":")
            if data["role"] in ("fine", "head"):
                label = ".".join(data["path"].split(".")[:depth]) or data["role"]
            name = names.setdefault((data["stage"], data["role"], label), f"n{len(names)}")
            box = self.boxes.setdefault(
                name, {"stage": data["stage"], "role": data["role"], "label": label, "flops": 0}
            )
            box["flops"] += data["flops"]
            self.box_of[node] = name

    def lines(self, stage: int) -> list[str]:
        """Write the boxes of a stage."""
        return [
            f'{name}["{_mermaid_escaped(box["label"])}{_mermaid_cost(box["flops"])}"]'
            f":::{box['role']}"
            for name, box in self.boxes.items()
            if box["stage"] == stage
        ]

    def flows(self, graph: nx.DiGraph[str]) -> dict[tuple[str, str], tuple[int, bool]]:
        """Sum the bytes between two boxes, and say whether any of them cross stages."""
        flows: dict[tuple[str, str], tuple[int, bool]] = {}
        for source, target, data in graph.edges(data=True):
            ends = self.box_of[source], self.box_of[target]
            if ends[0] != ends[1]:
                bytes_, crosses = flows.get(ends, (0, False))
                flows[ends] = bytes_ + data["bytes"], crosses or data["crosses"]
        return flows


def _mermaid_cost(number: int) -> str:
    return f"<br/>{format_count(number)} FLOPs" if number else ""


def _mermaid_escaped(text: str) -> str:
    """Write what Mermaid or a page would take for markup as character codes."""
    safe = "".join(c if c.isalnum() or c in "._- :/" else f"#{ord(c)};" for c in text)
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
