"""The partition graph as DOT text: one cluster a stage, coloured by role."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from passes.errors import ExportError
from pnn_compile.export.format import flops, size

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["to_dot"]

_COLOURS = {
    "input": "#d9d9d9",
    "preprocess": "#fdd0a2",
    "fine": "#c6dbef",
    "residual": "#fcbba1",
    "coarse": "#a1d99b",
    "correct": "#fcbba1",
    "head": "#dadaeb",
    "output": "#d9d9d9",
}


def to_dot(graph: nx.DiGraph[str]) -> str:
    """Return the partition graph in the DOT language.

    Args:
        graph: A graph of `pnn_compile.export.partition_graph.partition_graph`.

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
        _quote(graph.name), graph_type="digraph", rankdir="TB", fontname="sans-serif"
    )
    clusters = {
        number: pydot.Cluster(f"stage_{number}", label=f"stage {number}", style="rounded")
        for number in sorted({data["stage"] for _, data in graph.nodes(data=True)} - {-1})
    }
    for name, data in graph.nodes(data=True):
        holder = clusters.get(data["stage"], drawing)
        holder.add_node(
            pydot.Node(
                _quote(name),
                label=_quote(_label(name, data)),
                shape="box",
                style="filled",
                fillcolor=_quote(_COLOURS[data["role"]]),
            )
        )
    for cluster in clusters.values():
        drawing.add_subgraph(cluster)  # type: ignore[arg-type]  # a Cluster is a subgraph
    for source, target, data in graph.edges(data=True):
        edge = pydot.Edge(_quote(source), _quote(target))
        if data["crosses"]:
            edge.set("color", _quote("#cb181d"))
            edge.set("penwidth", "2")
            lines = _present([data["shape"], size(data["bytes"])])
            edge.set("label", _quote("\\n".join(lines)))
        drawing.add_edge(edge)
    return str(drawing.to_string())


def _label(name: str, data: dict[str, Any]) -> str:
    where = data["path"] or name.removeprefix(":")
    return "\\n".join(_present([where, data["op"], flops(data["flops"])]))


def _present(lines: Iterable[str]) -> list[str]:
    return [line.replace("\\", "\\\\") for line in lines if line and line != "0"]


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
