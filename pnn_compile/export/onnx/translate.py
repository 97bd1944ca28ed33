"""Segments of pieces to ONNX graphs, all of them in one call of torch's exporter.

The exporter takes a second for whatever it is given, and then some for every operator. So the
segments stand side by side in one graph, each over inputs of its own, and are taken apart again.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from passes.coarse.wrappers import Difference
from passes.ir.isolation import exclusive
from passes.ir.program import resolve
from pnn_compile.export.onnx.blocks import Segment
from pnn_compile.export.onnx.flat import CHILD, Piece

if TYPE_CHECKING:
    import onnx_ir as ir

_log = logging.getLogger(__name__)

__all__ = ["INNER", "NODE", "OPSET", "TAG", "Block", "quiet", "translate"]

OPSET = 20
"""Version of the default operator set that is written: the exporter's own default."""

NODE = "pnn.node"
"""Key under which an ONNX node holds the number, in its segment, of the node it came from."""

INNER = "pnn.inner"
"""Key of the path of the module inside the piece, where the piece is no graph."""

TAG = "pnn"
"""Key of the numbers of segment and node, in the custom metadata of what the exporter is given."""


@dataclass(frozen=True, eq=False)
class Block:
    """What a segment became in ONNX.

    Attributes:
        graph: The graph; inputs are those of the segment, then the weights that it reads.
        weights: Names of those weights in the piece's flat graph, in the order of the inputs.
    """

    graph: ir.Graph
    weights: tuple[str, ...]


class Entangled(Exception):
    """The exporter made one segment read what belongs to another."""


def translate(pairs: Sequence[tuple[Piece, Segment]]) -> list[Block]:
    """Translate segments, each with the piece that it belongs to.

    Raises:
        Exception: What torch's exporter raises; see `pnn_compile.export.onnx.blame`.
    """
    try:
        return _translate(pairs)
    except Entangled:
        return [_translate([pair])[0] for pair in pairs]


def _translate(pairs: Sequence[tuple[Piece, Segment]]) -> list[Block]:
    import onnx_ir as ir

    joint = _Joint()
    for piece, segment in pairs:
        joint.add(piece, segment)
    with exclusive(), quiet(), torch.no_grad():
        module = joint.finish()
        exported = torch.export.export(
            module, tuple(joint.examples), dynamic_shapes=(*joint.shapes,), strict=False
        )
        program = torch.onnx.export(
            exported, (), dynamo=True, optimize=False, verbose=False, opset_version=OPSET
        )
        assert program is not None
        model: ir.Model = program.model
        if model.functions:
            ir.passes.common.InlinePass()(model)
        _tag(model)
        blocks = [_cut(model, part) for part in joint.parts]
        return [_simplified(block, model.ir_version) for block in blocks]


@dataclass(frozen=True)
class _Part:
    """Where a segment stands in the joint graph."""

    number: int
    inputs: slice
    outputs: slice
    dims: tuple[tuple[int | str, ...], ...]
    module: nn.Module

    def owns(self, name: str) -> bool:
        """Whether an initializer is a tensor of the piece, not one that the exporter made."""
        if not name.startswith(self.prefix):
            return False
        try:
            found = resolve(self.module, name.removeprefix(self.prefix))
        except AttributeError:
            return False
        return isinstance(found, torch.Tensor)

    @property
    def prefix(self) -> str:
        """What the names of its weights start with."""
        return f"part_{self.number}."


class _Joint:
    """Segments side by side in one graph."""

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.examples: list[torch.Tensor] = []
        self.shapes: list[dict[int, Any]] = []
        self.parts: list[_Part] = []
        self._todo: list[tuple[Piece, Segment, list[fx.Node]]] = []
        self._outputs = 0

    def add(self, piece: Piece, segment: Segment) -> None:
        """Make the placeholders of a segment; all of them stand in front."""
        start = len(self.examples)
        device = next(piece.module.parameters(), torch.empty(0)).device
        placeholders = []
        for value in segment.entering:
            spec = piece.specs[value]
            placeholders.append(self.graph.placeholder(f"input_{len(self.examples)}"))
            self.examples.append(torch.empty(spec.shape, dtype=spec.dtype, device=device))
            self.shapes.append(dict.fromkeys(spec.dynamic, torch.export.Dim.AUTO))
        self._todo.append((piece, segment, placeholders))
        outputs = slice(self._outputs, self._outputs + len(segment.leaving))
        self._outputs = outputs.stop
        dims = tuple(piece.specs[value].dims for value in segment.entering)
        inputs = slice(start, len(self.examples))
        self.parts.append(_Part(len(self.parts), inputs, outputs, dims, piece.module))

    def finish(self) -> fx.GraphModule:
        """Copy the nodes of all segments, and make the module."""
        given = [self._copy(part, *todo) for part, todo in zip(self.parts, self._todo, strict=True)]
        self.graph.output(tuple(node for nodes in given for node in nodes))
        return fx.GraphModule(self.root, self.graph).eval()

    def _copy(
        self, part: _Part, piece: Piece, segment: Segment, placeholders: list[fx.Node]
    ) -> list[fx.Node]:
        mapping: dict[fx.Node, fx.Node] = {}
        memo: dict[int, Any] = {}
        for value, placeholder in zip(segment.entering, placeholders, strict=True):
            # A segment may write into its inputs, and then what was written belongs to it alone.
            mapping[value] = self.graph.call_function(torch.clone, (placeholder,))
        for number, node in enumerate(segment.nodes):
            copied = self.graph.node_copy(node, lambda n: mapping[n])
            copied.meta = {"custom": {TAG: (part.number, number)}}
            if node.op in ("call_module", "get_attr"):
                copied.target = part.prefix + str(node.target)
                self._own(copied.target, resolve(piece.module, str(node.target)), memo)
            mapping[node] = copied
        return [mapping[value] for value in segment.leaving]

    def _own(self, path: str, value: Any, memo: dict[int, Any]) -> None:
        """Put a copy of a module or tensor into the joint module; weights are left without data."""
        parent, _, name = path.rpartition(".")
        owner = self.root
        for atom in parent.split("."):
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module())
            owner = owner.get_submodule(atom)
        if isinstance(value, nn.Module):
            for parameter in value.parameters():
                memo.setdefault(id(parameter), _blank(parameter))
            copied = copy.deepcopy(value, memo)
            for child in copied.modules():
                if isinstance(child, Difference):
                    child.separate()
            owner.add_module(name, copied)
        elif isinstance(value, nn.Parameter):
            owner.register_parameter(name, memo.setdefault(id(value), _blank(value)))
        elif isinstance(value, torch.Tensor):
            owner.register_buffer(name, memo.setdefault(id(value), value.detach().clone()))
        else:
            setattr(owner, name, value)


def _blank(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter), requires_grad=False)


def _tag(model: ir.Model) -> None:
    """Leave of the exporter's notes the number of the node alone."""
    last = 0
    for node in model.graph.all_nodes():
        source = node.meta.get("node")
        custom = source.meta.get("custom") if source is not None else None
        _, last = (custom or {}).get(TAG, (0, last))
        node.metadata_props.clear()
        node.metadata_props[NODE] = str(last)
        if inner := _inner_path(source):
            node.metadata_props[INNER] = inner
        for value in node.outputs:
            value.metadata_props.clear()


def _inner_path(source: Any) -> str:
    """Path below the child of a flat graph whose forward made a node."""
    stack = source.meta.get("nn_module_stack") if source is not None else None
    path = [*stack.values()][-1][0] if stack else ""
    return str(path).partition(f".{CHILD}.")[2]


def _cut(model: ir.Model, part: _Part) -> Block:
    """Take one segment out of the joint graph; its weights become inputs."""
    import onnx_ir as ir

    inputs = model.graph.inputs[part.inputs]
    outputs = model.graph.outputs[part.outputs]
    nodes, reached = _behind(outputs, inputs)
    initializers = [v for v in model.graph.initializers.values() if v in reached]
    weights = [v for v in initializers if part.owns(v.name or "")]
    constants = [v for v in initializers if v not in weights]
    if any(not (v.name or part.prefix).startswith(part.prefix) and _is_owned(v) for v in constants):
        raise Entangled
    ordered = [node for node in model.graph if node in nodes]
    view = ir.GraphView([*inputs, *weights], outputs, nodes=ordered, initializers=constants)
    graph = view.clone()
    graph.opset_imports.update(model.graph.opset_imports)
    symbols = _symbols(graph, part.dims)
    for value in graph.inputs[len(inputs) :]:
        value.const_value = None
    for node in graph.all_nodes():
        for value in node.outputs:
            _rename_dims(value, symbols)
    return Block(graph, tuple((v.name or "").removeprefix(part.prefix) for v in weights))


def _is_owned(value: ir.Value) -> bool:
    return (value.name or "").startswith("part_")


def _behind(
    outputs: Sequence[ir.Value], inputs: Sequence[ir.Value]
) -> tuple[set[ir.Node], set[ir.Value]]:
    """Nodes and values that outputs depend on.

    Raises:
        Entangled: An input of another segment is among them.
    """
    nodes: set[ir.Node] = set()
    values: set[ir.Value] = set()
    todo = list(outputs)
    while todo:
        value = todo.pop()
        if value in values:
            continue
        values.add(value)
        node = value.producer()
        if node is None:
            if value.is_graph_input() and value not in inputs:
                raise Entangled
            continue
        if node not in nodes:
            nodes.add(node)
            todo += [v for v in node.inputs if v is not None]
            todo += [
                v
                for inner in _inner_nodes(node)
                for v in inner.inputs
                if v is not None and v.graph is not inner.graph
            ]
    return nodes, values


def _inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes of the subgraphs of a node (branches, loops)."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def _symbols(graph: ir.Graph, dims: Sequence[tuple[int | str, ...]]) -> Mapping[str, str]:
    """What the exporter's names of dimensions mean, from the inputs' shapes."""
    symbols: dict[str, str] = {}
    for value, wanted in zip(graph.inputs, dims, strict=False):
        assert value.shape is not None
        for found, meant in zip(value.shape, wanted, strict=True):
            if isinstance(meant, str) and not isinstance(found, int) and found.value:
                symbols[found.value] = meant
    return symbols


def _rename_dims(value: ir.Value, symbols: Mapping[str, str]) -> None:
    """Say in the batch size what follows it."""
    if value.shape is None:
        return
    for axis, size in enumerate(value.shape):
        name = None if isinstance(size, int) else size.value
        if name is None:
            continue
        words = re.findall(r"[A-Za-z_]\w*", name)
        if name in symbols:
            value.shape[axis] = symbols[name]
        elif all(word in symbols for word in words):
            value.shape[axis] = re.sub(
                r"[A-Za-z_]\w*", lambda found: _term(symbols[found[0]]), name
            )
        else:
            value.shape[axis] = None


def _term(meaning: str) -> str:
    return meaning if meaning.isidentifier() else f"({meaning})"


def _simplified(block: Block, ir_version: int) -> Block:
    """Fold what does not depend on inputs or weights, drop what does nothing."""
    import onnx_ir as ir
    from onnxscript import optimizer

    graph = block.graph.clone()
    for number, value in enumerate(graph.inputs):
        value.name = f"given_{number}"
    try:
        optimizer.optimize(ir.Model(graph, ir_version=ir_version))
    except Exception as error:  # what it cannot fold is right as it is
        _log.debug("the optimizer of onnxscript failed: %s", error)
        return block
    return Block(graph, block.weights)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's own progress and warnings to itself; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
