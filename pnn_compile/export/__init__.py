"""Write a compiled network in the formats of other programs.

In: a compiled network. Out: ONNX files (`onnx/`), or the partition graph as a networkx graph, DOT,
Mermaid, GraphML or JSON. Read `partition_graph.py` first, then `onnx/__init__.py`.
"""

from pnn_compile.export.graph_formats import to_dot, to_graphml, to_mermaid, to_node_link
from pnn_compile.export.partition_graph import partition_graph

__all__ = ["partition_graph", "to_dot", "to_graphml", "to_mermaid", "to_node_link"]
