"""The partition graph as a Mermaid flowchart, with modules collapsed to what a page can show."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from pnn_compile.export.format import count, size

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["to_mermaid"]

_COLOURS = {
    "input": "#d9d9d9", "preprocess": "#fdd0a2", "fine": "#c6dbef", "residual": "#fcbba1",
    "coarse": "#a1d99b", "correct": "#fcbba1", "head": "#dadaeb", "output": "#d9d9d9",
}  # fmt: skip


def to_mermaid(graph: nx.DiGraph[str], depth: int = 1) -> str:
    """Return the partition graph as a Mermaid flowchart, one subgraph a stage.

    Args:
        graph: A graph of `pnn_compile.export.partition_graph.partition_graph`.
        depth: Levels of the module path that are told apart; a module of a stage is one box. 0
            makes one box of a stage. Boxes of modules that run in turns depend on each other both
            ways.
    """
    boxes = _Boxes(graph, depth)
    lines = ["flowchart TB"]
    stages = sorted({box["stage"] for box in boxes.found.values()} - {-1})
    for stage in stages:
        lines.append(f'  subgraph stage{stage} ["stage {stage}"]')
        lines += [f"    {boxes.text(key)}" for key in boxes.of_stage(stage)]
        lines.append("  end")
    lines += [f"  {boxes.text(key)}" for key in boxes.of_stage(-1)]
    for (source, target), (bytes_, crosses) in boxes.flows(graph).items():
        arrow = f"== {_quoted(size(bytes_))} ==>" if crosses else "-->"
        lines.append(f"  {source} {arrow} {target}")
    lines += [
        f"  classDef {role} fill:{colour},stroke:#555555,color:#111111"
        for role, colour in _COLOURS.items()
        if any(box["role"] == role for box in boxes.found.values())
    ]
    return "\n".join(lines) + "\n"


class _Boxes:
    """Nodes of one module in one stage, under names that Mermaid cannot misread."""

    def __init__(self, graph: nx.DiGraph[str], depth: int) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.holder: dict[str, str] = {}
        names: dict[tuple[int, str, str], str] = {}
        for name, data in graph.nodes(data=True):
            label = name.removeprefix(":")
            if data["role"] in ("fine", "head"):
                label = ".".join(data["path"].split(".")[:depth]) or data["role"]
            key = names.setdefault((data["stage"], data["role"], label), f"n{len(names)}")
            box = self.found.setdefault(
                key, {"stage": data["stage"], "role": data["role"], "label": label, "flops": 0}
            )
            box["flops"] += data["flops"]
            self.holder[name] = key

    def of_stage(self, stage: int) -> list[str]:
        return [key for key, box in self.found.items() if box["stage"] == stage]

    def text(self, key: str) -> str:
        box = self.found[key]
        cost = f"<br/>{count(box['flops'])} FLOPs" if box["flops"] else ""
        return f"{key}[{_quoted(_escaped(box['label']) + cost)}]:::{box['role']}"

    def flows(self, graph: nx.DiGraph[str]) -> dict[tuple[str, str], tuple[int, bool]]:
        found: dict[tuple[str, str], tuple[int, bool]] = {}
        for source, target, data in graph.edges(data=True):
            ends = self.holder[source], self.holder[target]
            if ends[0] != ends[1]:
                bytes_, crosses = found.get(ends, (0, False))
                found[ends] = bytes_ + data["bytes"], crosses or data["crosses"]
        return found


def _quoted(text: str) -> str:
    return f'"{text}"'


def _escaped(text: str) -> str:
    """Write what Mermaid or a page would take for markup by numbers, as Mermaid wants them."""
    safe = "".join(c if c.isalnum() or c in "._- :/" else f"#{ord(c)};" for c in text)
    return escape(safe, quote=False)
