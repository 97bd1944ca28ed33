"""Translate segments to ONNX graphs, all of them in one call of torch's exporter.

The exporter takes a second for whatever it is given, and some more for every operator. So the
segments stand side by side in one joint graph, each over inputs of its own:

    input_0 -> clone -> [segment 0] -> output 0     weights named part_0.conv1.weight, ...
    input_1 -> clone -> [segment 1] -> output 1     weights named part_1.conv1.weight, ...

The exported graph is then taken apart again: a segment's part of it is what its outputs depend on.
The weights of a part become inputs, which makes it a template: segments with the same key share one
and bind their own weights to it.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from passes.coarse.wrappers import Difference
from passes.errors import ExportError
from passes.ir.isolation import exclusive
from passes.ir.program import Provenance, operator_name, resolve
from pnn_compile.export.onnx.pieces import CHILD, Piece, Segment

if TYPE_CHECKING:
    import onnx_ir as ir

_log = logging.getLogger(__name__)

OPSET = 20
"""Version of the default operator set that is written: the default of the exporter."""

OPSETS = range(18, 25)
"""Versions that the exporter writes and ONNX Runtime reads."""

NODE = "pnn.node"
"""Metadata key of an ONNX node: the number, in its segment, of the node that it came from."""

INNER = "pnn.inner"
"""Metadata key: path of the module inside the piece, if the piece is not a graph."""

_TAG = "pnn"
"""Key of the numbers of part and node, in the custom metadata of what the exporter is given."""


@dataclass(frozen=True, eq=False)
class Template:
    """The ONNX graph of a segment, with its weights as inputs.

    Attributes:
        graph: The graph; its inputs are those of the segment, then the weights.
        weights: Names of the weights in the flat graph of the piece, in the order of the inputs.
    """

    graph: ir.Graph
    weights: tuple[str, ...]


class _Entangled(Exception):
    """The exporter made one segment read what belongs to another."""


def translate(
    model: str, pairs: Sequence[tuple[Piece, Segment]], opset: int = OPSET
) -> list[Template]:
    """Translate segments, each with the piece that it belongs to.

    Args:
        model: Name of the model, for errors.
        pairs: The pieces and segments.
        opset: Version of the operator set.

    Raises:
        ExportError: An operator has no ONNX form.
    """
    try:
        return _translate(model, pairs, opset)
    except _Entangled:
        return [_translate(model, [pair], opset)[0] for pair in pairs]


def _translate(model: str, pairs: Sequence[tuple[Piece, Segment]], opset: int) -> list[Template]:
    try:
        joint = _JointGraph()
        for piece, segment in pairs:
            joint.add(piece, segment)
        with exclusive(), _quiet(), torch.no_grad():
            exported = _export(joint, opset)
            templates = [_cut(exported, part) for part in joint.parts]
            return [_simplified(template, exported.ir_version) for template in templates]
    except _Entangled:
        raise
    except Exception as error:
        raise _refusal(model, pairs, error) from error


def _export(joint: _JointGraph, opset: int) -> ir.Model:
    """Run torch's exporter on the joint graph; its nodes say what they came from."""
    import onnx_ir as ir

    program = torch.export.export(
        joint.finish(), tuple(joint.examples), dynamic_shapes=(*joint.shapes,), strict=False
    )
    onnx_program = torch.onnx.export(
        program, (), dynamo=True, optimize=False, verbose=False, opset_version=opset
    )
    assert onnx_program is not None
    model: ir.Model = onnx_program.model
    if model.functions:
        ir.passes.common.InlinePass()(model)
    _tag(model)
    return model


@dataclass(frozen=True)
class _JointPart:
    """Place of a segment in the joint graph.

    Attributes:
        number: Number of the segment.
        inputs: Its inputs among those of the joint graph.
        outputs: Its outputs among those of the joint graph.
        dims: Symbolic sizes of its inputs.
        module: Flat graph of the piece that it belongs to.
    """

    number: int
    inputs: slice
    outputs: slice
    dims: tuple[tuple[int | str, ...], ...]
    module: nn.Module

    @property
    def prefix(self) -> str:
        """Prefix of the names of its weights in the joint graph."""
        return f"part_{self.number}."

    def owns(self, name: str) -> bool:
        """Whether an initializer is a tensor of the piece, not one that the exporter made."""
        if not name.startswith(self.prefix):
            return False
        try:
            tensor = resolve(self.module, name.removeprefix(self.prefix))
        except AttributeError:
            return False
        return isinstance(tensor, torch.Tensor)


class _JointGraph:
    """Segments side by side in one graph."""

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.examples: list[torch.Tensor] = []
        self.shapes: list[dict[int, Any]] = []
        self.parts: list[_JointPart] = []
        self._pending: list[tuple[Piece, Segment, list[fx.Node]]] = []
        self._outputs = 0

    def add(self, piece: Piece, segment: Segment) -> None:
        """Add the placeholders of a segment; those of all segments precede the first copy."""
        start = len(self.examples)
        device = next(piece.module.parameters(), torch.empty(0, device="cpu")).device
        placeholders = []
        for value in segment.inputs:
            spec = piece.specs[value]
            placeholders.append(self.graph.placeholder(f"input_{len(self.examples)}"))
            self.examples.append(torch.empty(spec.shape, dtype=spec.dtype, device=device))
            self.shapes.append(dict.fromkeys(spec.dynamic, torch.export.Dim.AUTO))
        self._pending.append((piece, segment, placeholders))
        outputs = slice(self._outputs, self._outputs + len(segment.outputs))
        self._outputs = outputs.stop
        dims = tuple(piece.specs[value].dims for value in segment.inputs)
        inputs = slice(start, len(self.examples))
        self.parts.append(_JointPart(len(self.parts), inputs, outputs, dims, piece.module))

    def finish(self) -> fx.GraphModule:
        """Copy the nodes of all segments, and build the module."""
        outputs: list[fx.Node] = []
        for part, (piece, segment, placeholders) in zip(self.parts, self._pending, strict=True):
            outputs += self._copy(part, piece, segment, placeholders)
        self.graph.output(tuple(outputs))
        return fx.GraphModule(self.root, self.graph).eval()

    def _copy(
        self, part: _JointPart, piece: Piece, segment: Segment, placeholders: list[fx.Node]
    ) -> list[fx.Node]:
        copies: dict[fx.Node, fx.Node] = {}
        memo: dict[int, Any] = {}
        for value, placeholder in zip(segment.inputs, placeholders, strict=True):
            # A segment may write into its inputs; that must not reach those of the joint graph.
            copies[value] = self.graph.call_function(torch.clone, (placeholder,))
        for number, node in enumerate(segment.nodes):
            copied = self.graph.node_copy(node, lambda n: copies[n])
            copied.meta = {"custom": {_TAG: (part.number, number)}}
            if node.op in ("call_module", "get_attr"):
                copied.target = part.prefix + str(node.target)
                self._install(copied.target, resolve(piece.module, str(node.target)), memo)
            copies[node] = copied
        return [copies[value] for value in segment.outputs]

    def _install(self, path: str, value: Any, memo: dict[int, Any]) -> None:
        """Put a copy of a module or tensor under a path; parameters are copied without data.

        Args:
            path: The path in the joint module.
            value: A module, a tensor or a constant.
            memo: Copies by the id of the original, as `copy.deepcopy` takes them; tied weights
                remain tied.
        """
        parent, _, name = path.rpartition(".")
        owner = self.root
        for atom in parent.split("."):
            if atom not in owner._modules:
                owner.add_module(atom, nn.Module())
            owner = owner.get_submodule(atom)
        if isinstance(value, nn.Module):
            for parameter in value.parameters():
                memo.setdefault(id(parameter), _blank(parameter))
            module = copy.deepcopy(value, memo)
            for child in module.modules():
                if isinstance(child, Difference):
                    child.separate()
            owner.add_module(name, module)
        elif isinstance(value, nn.Parameter):
            owner.register_parameter(name, memo.setdefault(id(value), _blank(value)))
        elif isinstance(value, torch.Tensor):
            owner.register_buffer(name, memo.setdefault(id(value), value.detach().clone()))
        else:
            setattr(owner, name, value)


def _blank(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter), requires_grad=False)


def _tag(model: ir.Model) -> None:
    """Replace the exporter's notes by the number of the segment's node that a node came from."""
    last = 0
    for node in model.graph.all_nodes():
        source = node.meta.get("node")
        custom = source.meta.get("custom") if source is not None else None
        # A node that the exporter added by itself belongs to the one before.
        _, last = (custom or {}).get(_TAG, (0, last))
        node.metadata_props.clear()
        node.metadata_props[NODE] = str(last)
        if inner := _inner_path(source):
            node.metadata_props[INNER] = inner
        for value in node.outputs:
            value.metadata_props.clear()


def _inner_path(source: Any) -> str:
    """Return the path, below the child of a flat graph, of the module whose forward made a node."""
    stack = source.meta.get("nn_module_stack") if source is not None else None
    path = [*stack.values()][-1][0] if stack else ""
    return str(path).partition(f".{CHILD}.")[2]


def _cut(model: ir.Model, part: _JointPart) -> Template:
    """Take one segment out of the exported joint graph; its weights become inputs."""
    import onnx_ir as ir

    inputs = model.graph.inputs[part.inputs]
    outputs = model.graph.outputs[part.outputs]
    nodes, values = _dependencies(outputs, inputs)
    initializers = [v for v in model.graph.initializers.values() if v in values]
    weights = [v for v in initializers if part.owns(v.name or "")]
    constants = [v for v in initializers if v not in weights]
    foreign = [v for v in constants if not (v.name or part.prefix).startswith(part.prefix)]
    if any((v.name or "").startswith("part_") for v in foreign):
        raise _Entangled
    ordered = [node for node in model.graph if node in nodes]
    view = ir.GraphView([*inputs, *weights], outputs, nodes=ordered, initializers=constants)
    graph = view.clone()
    graph.opset_imports.update(model.graph.opset_imports)
    for value in graph.inputs[len(inputs) :]:
        value.const_value = None
    symbols, fixed = _symbols(graph, part.dims)
    for node in graph.all_nodes():
        for value in node.outputs:
            _rename_dims(value, symbols, fixed)
    for value, sizes in zip(graph.inputs, part.dims, strict=False):
        value.shape = ir.Shape(sizes)  # the optimizer infers and folds sizes from these
    return Template(graph, tuple((v.name or "").removeprefix(part.prefix) for v in weights))


def _dependencies(
    outputs: Sequence[ir.Value], inputs: Sequence[ir.Value]
) -> tuple[set[ir.Node], set[ir.Value]]:
    """Return the nodes and values that outputs depend on.

    Raises:
        _Entangled: An input of another segment is among them.
    """
    nodes: set[ir.Node] = set()
    values: set[ir.Value] = set()
    pending = list(outputs)
    while pending:
        value = pending.pop()
        if value in values:
            continue
        values.add(value)
        node = value.producer()
        if node is None:
            # The inputs of a loop's body are no inputs of the model.
            outside = value.graph is inputs[0].graph if inputs else True
            if value.is_graph_input() and outside and value not in inputs:
                raise _Entangled
        elif node not in nodes:
            nodes.add(node)
            pending += [v for v in node.inputs if v is not None]
            # Branches and loops read values of the graph around them without listing them.
            pending += [
                v
                for inner in inner_nodes(node)
                for v in inner.inputs
                if v is not None and v.graph is not inner.graph
            ]
    return nodes, values


def inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """Iterate over the nodes of the subgraphs of a node (branches, loops)."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def _symbols(
    graph: ir.Graph, dims: Sequence[tuple[int | str, ...]]
) -> tuple[Mapping[str, str], AbstractSet[int]]:
    """Map the exporter's names of dimensions to sizes over the batch, from the inputs' shapes.

    An input of sizes ("batch", 16, "4*batch") that the exporter calls [s77, 16, s26] yields
    {"s77": "batch", "s26": "4*batch"}, and one of sizes ("batch", "sequence") that it calls
    [s77, 12], as it holds the length of an LSTM fixed, the set {12} as well.
    """
    symbols: dict[str, str] = {}
    fixed: set[int] = set()
    for value, sizes in zip(graph.inputs, dims, strict=False):  # the weights follow the inputs
        assert value.shape is not None
        for axis, size in zip(value.shape, sizes, strict=True):
            name = str(axis) if isinstance(axis, int) else axis.value
            if isinstance(size, str) and name:
                symbols[name] = size
                if name.isdigit():
                    fixed.add(int(name))
    return symbols, fixed


def _rename_dims(value: ir.Value, symbols: Mapping[str, str], fixed: AbstractSet[int]) -> None:
    """Express the sizes of a value over the batch; a size that cannot be becomes unknown.

    So does a number that the exporter takes for the size of a free dimension.
    """
    if value.shape is None:
        return
    for axis, size in enumerate(value.shape):
        if isinstance(size, int) and size in fixed:
            value.shape[axis] = None
        name = None if isinstance(size, int) else size.value
        if name is None:
            continue
        words = re.findall(r"[A-Za-z_]\w*", name)
        if name in symbols:
            value.shape[axis] = symbols[name]
        elif all(word in symbols for word in words):
            value.shape[axis] = re.sub(
                r"[A-Za-z_]\w*", lambda match: _term(symbols[match[0]]), name
            )
        else:
            value.shape[axis] = None


def _term(size: str) -> str:
    return size if size.isidentifier() else f"({size})"


def _simplified(template: Template, ir_version: int) -> Template:
    """Fold what depends on neither inputs nor weights, and drop nodes without effect."""
    import onnx_ir as ir
    from onnxscript import optimizer

    graph = template.graph.clone()
    for number, value in enumerate(graph.inputs):
        value.name = f"given_{number}"
    try:
        optimizer.optimize(ir.Model(graph, ir_version=ir_version))
    except Exception as error:  # the graph is correct without being optimized
        _log.debug("the optimizer of onnxscript failed: %s", error)
        return template
    return Template(graph, template.weights)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress messages and warnings of the exporter; errors still raise."""
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


def _refusal(model: str, pairs: Sequence[tuple[Piece, Segment]], error: Exception) -> ExportError:
    """Return the error that names the operator at which the exporter failed, and its line."""
    advice = "replace that operator, or keep the model in torch"
    tag = next(_tags(error), None)
    if tag is None or tag[0] >= len(pairs):
        return ExportError(f"{model} has no ONNX form: {_reason(error)}; {advice}")
    piece, segment = pairs[tag[0]]
    node = segment.nodes[tag[1]]
    origin = piece.origins.get(node, Provenance())
    op = operator_name(node)
    if node.op == "call_module":
        op = type(piece.module.get_submodule(str(node.target))).__name__
    where = f"module {origin.path}" if origin.path else f"the top level of {piece.name}"
    line = f" ({origin.source})" if origin.source else ""
    return ExportError(
        f"{model} has no ONNX form: {op} in {where}{line} cannot be exported: {_reason(error)}; "
        f"{advice}"
    )


def _tags(error: BaseException | None) -> Iterator[tuple[int, int]]:
    """Iterate over the tags of the nodes that were being exported, innermost first.

    The exporter's messages do not name a node of the graph that it was given; its frames hold it.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for cause in reversed(chain):
        frames = []
        entry = cause.__traceback__
        while entry is not None:
            frames.append(entry.tb_frame)
            entry = entry.tb_next
        for frame in reversed(frames):
            for value in [*frame.f_locals.values()]:
                if isinstance(value, fx.Node):
                    custom: Any = value.meta.get("custom") or {}
                    if _TAG in custom:
                        yield custom[_TAG]


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [re.sub(r"\x1b\[\d+m", "", line).strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:300]
