"""Convert the nodes of a graph to JSON data and back; functions and values are listed ones only.

{"name": "relu", "op": "call_function", "path": "blocks.0", "source": "net.py:12",
"target": "torch.relu", "args": [{"node": "conv"}], "kwargs": {}}
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import fx

from passes.errors import ArtifactError
from passes.ir.program import Provenance, provenance, set_provenance
from pnn_compile.artifact.functions import (
    check_attribute,
    check_enums,
    check_method,
    function,
    function_name,
)
from pnn_compile.artifact.values import (
    UnsupportedError,
    check_identifier,
    check_path,
    decode,
    encode,
)


class Node(TypedDict):
    """Record of one node."""

    name: str
    op: str
    path: str
    source: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]


def write_node(node: fx.Node, unknown: list[str]) -> dict[str, Any]:
    """Describe a node; what no artifact may contain goes into `unknown`, a line each."""
    origin = provenance(node)
    data: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "path": origin.path,
        "source": origin.source,
    }
    try:
        check_identifier(node.name)
        data["target"] = _write_target(node)
        data["args"] = [encode(value) for value in node.args]
        data["kwargs"] = {check_identifier(k): encode(v) for k, v in node.kwargs.items()}
    except UnsupportedError as error:
        unknown.append(f"{origin.path or node.name}: {error}")
    return data


def _write_target(node: fx.Node) -> str:
    if node.op == "call_function":
        name = function_name(node.target)
        if node.target is getattr:
            check_attribute(node.args, node.kwargs)
        return name
    return _check_target(node.op, str(node.target))


def _check_target(op: str, target: Any) -> str:
    if op == "call_method":
        return check_method(target)
    if op in ("call_module", "get_attr"):
        return check_path(target)
    if op in ("placeholder", "output"):
        return check_identifier(target)
    raise UnsupportedError(f"operation {op!r}")


def read_graph(records: list[dict[str, Any]]) -> fx.Graph:
    """Rebuild a graph from the records of its nodes.

    Raises:
        ArtifactError: A name is not a valid one.
        UnsupportedError: A target or a value is not listed.
    """
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for record in records:
        op, name = record["op"], check_identifier(record["name"])
        args = tuple(decode(value, nodes) for value in record["args"])
        kwargs = {check_identifier(k): decode(v, nodes) for k, v in record["kwargs"].items()}
        target: Any = record["target"]
        if op == "call_function":
            target = function(target)
            if target is getattr:
                check_attribute(args, kwargs)
            check_enums(target, args, kwargs)
        else:
            target = _check_target(op, target)
        node = nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise ArtifactError(f"{name!r} is not a valid name of a node, or occurs twice")
        set_provenance(node, Provenance(record["path"], record["source"]))
    return graph
