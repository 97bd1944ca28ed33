"""Lower a network: operations over named values, and the ONNX graphs of the pieces they call.

`lower_network` does most of the work of an export, in four steps:

1. Run the assembled network at two batch sizes and record the type of every value.
2. Read its operations off its graph, whose nodes say which step of the sweep they belong to.
3. Flatten the pieces that the operations call and divide them into segments (`pieces.py`).
4. Translate one segment of every key to ONNX (`translate.py`); the others instantiate it.

Two stages with two tensors in the state between them become

    preprocess_1  x -> x_1_a, x_1_b             fine_1    x_1_a, x_1_b -> y_1
    fine_0        x -> y_0_a, y_0_b             coarse_1  r_1_a, r_1_b -> c_1
    Sub           y_0_a, x_1_a -> r_1_a         Add       y_1, c_1 -> u_1
    Sub           y_0_b, x_1_b -> r_1_b         head      u_1 -> output_0
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.errors import ExportError, OptionError
from passes.ir.example_inputs import as_plain
from passes.ir.isolation import preserved
from passes.ir.program import Interpreter
from passes.ir.run_step import output_tensors
from passes.transform.assemble import step_of
from passes.transform.network import check_mode
from passes.transform.sweep import Step
from pnn_compile.export.onnx.pieces import (
    Piece,
    Segment,
    SymbolicSpec,
    flatten,
    segments,
    spec_leaves,
)
from pnn_compile.export.onnx.sizes import Runs, merge
from pnn_compile.export.onnx.translate import OPSET, OPSETS, Template, translate
from pnn_compile.inputs import resized

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_ARITHMETIC: dict[Any, str] = {operator.add: "Add", operator.sub: "Sub"}


@dataclass(frozen=True)
class Operation:
    """A call of a piece, or a sum or difference of two tensors.

    Attributes:
        step: The step of the sweep that it belongs to: role, stage and iteration.
        target: Name of the piece, "Add" or "Sub".
        inputs: Names of the values that it reads.
        outputs: Names of the values that it computes.
    """

    step: Step
    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Instance:
    """A segment of a piece, and the template that computes it.

    Attributes:
        segment: The segment.
        template: Its ONNX graph.
        weights: Names in the flat graph of the weights that the template is bound to.
    """

    segment: Segment
    template: Template
    weights: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LoweredPiece:
    """A piece, and the templates that compute it one after another."""

    piece: Piece
    instances: tuple[Instance, ...]


@dataclass(frozen=True, eq=False)
class Lowered:
    """A network that can be written as one ONNX file or as stage models.

    Attributes:
        inputs: Names of the values that the network reads.
        outputs: Public names of its outputs, each with the value that it stands for.
        operations: What it computes, in an order in which that can be done; the head is last.
        specs: Types of all values, by name.
        pieces: The pieces that the operations call, by name.
        opset: Version of the operator set.
        bf16: Whether weights that bfloat16 holds exactly are stored in it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]
    operations: tuple[Operation, ...]
    specs: Mapping[str, SymbolicSpec]
    pieces: Mapping[str, LoweredPiece]
    opset: int = OPSET
    bf16: bool = False


def lower_network(compiled: Compiled, opset: int = OPSET, *, bf16: bool = False) -> Lowered:
    """Translate a network to ONNX, in evaluation mode.

    Args:
        compiled: The network.
        opset: Version of the operator set.
        bf16: Whether the weights are those of `in_half_precision(compiled, bf16=True)`.

    Raises:
        ExportError: A package is missing, or an operator has no ONNX form.
        OptionError: The version is none that is supported, or the graph is of training mode alone.
    """
    if opset not in OPSETS:
        raise OptionError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]} (got {opset})")
    _require_packages()
    program = compiled.program
    check_mode(program.name, program.capture.only_mode, training=False)
    with preserved(compiled.module), torch.no_grad():
        compiled.module.eval()
        types = _record_types(compiled)
        reader = _OperationReader(compiled.module.graph, types)
        operations = reader.read()
        pieces = _lower_pieces(compiled, types, operations, opset)
    public = _unlike([name for name, _ in types.outputs], reader.specs)
    outputs = tuple(zip(public, operations[-1].outputs, strict=True))
    return Lowered(tuple(reader.inputs), outputs, operations, reader.specs, pieces, opset, bf16)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"ONNX export needs the package {error.name}: pip install 'pnn-compile[onnx]'"
        ) from error


# 1. Types of all values.


@dataclass(frozen=True)
class _Types:
    """What flows through a network, tensors replaced by their `SymbolicSpec`.

    Attributes:
        values: Values of the nodes of the network, by name.
        inner_values: Values of the nodes of each child that is a graph.
        arguments: Arguments of each child.
        outputs: The tensors that the network returns, in order, each with a readable name.
    """

    values: Mapping[str, Any]
    inner_values: Mapping[str, Mapping[str, Any]]
    arguments: Mapping[str, tuple[Any, ...]]
    outputs: tuple[tuple[str, SymbolicSpec], ...]


def _record_types(compiled: Compiled) -> _Types:
    """Run the network in the mode it is in, at two sizes of every free dimension.

    Raises:
        ExportError: A size is not a function of them, as `sizes.py` says.
    """
    sizes = Runs.of(compiled.program)
    runs = []
    for batch, length in sizes.points:
        inputs = resized(compiled, batch, compiled.program.device, length)
        recorder = _NetworkRecorder(compiled.module)
        with torch.no_grad():
            recorder.run_by_name(inputs)
        runs.append((recorder.values, recorder.inner, recorder.arguments, tuple(recorder.outputs)))
    return _Types(*merge(sizes, runs))


class _ValueRecorder(Interpreter):
    """Runs a graph and records the types of its values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.op != "output":
            self.values[n.name] = _sketch(value)
        return value


class _NetworkRecorder(_ValueRecorder):
    """Runs a network; records what its children take, and the values inside them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.inner: dict[str, dict[str, Any]] = {}
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.outputs: list[tuple[str, Any]] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a child, node by node if it is a graph."""
        child: nn.Module = self.fetch_attr(target)
        self.arguments[target] = tuple(_sketch(list(args)))
        if not isinstance(child, fx.GraphModule):
            return super().call_module(target, args, kwargs)
        recorder = _ValueRecorder(child)
        result = recorder.run(*args)
        self.inner[target] = recorder.values
        return result

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the outputs of the network."""
        result = super().output(target, args, kwargs)
        self.outputs = _named_outputs(result)
        return result


def _named_outputs(output: Any) -> list[tuple[str, Any]]:
    """Name the tensors of an output by their keys in it, such as "output.0" or "logits"."""
    paths, _ = pytree.tree_flatten_with_path(output)
    if all(isinstance(leaf, torch.Tensor) or as_plain(leaf) is leaf for _, leaf in paths):
        pairs = [(path, leaf) for path, leaf in paths if isinstance(leaf, torch.Tensor)]
    else:
        leaves = enumerate(output_tensors(output))
        pairs = [((pytree.SequenceKey(index),), leaf) for index, leaf in leaves]
    return [(_path_name(path), _sketch(leaf)) for path, leaf in pairs]


def _unlike(names: Sequence[str], taken: Collection[str]) -> list[str]:
    """Make names of outputs differ from each other and from all other values.

    >>> _unlike(["x", "y", "y"], {"x"})
    ['output.x', 'y', 'y_2']
    """
    unique: list[str] = []
    for name in names:
        stem = candidate = f"output.{name}" if name in taken else name
        number = 1
        while candidate in taken or candidate in unique:
            number += 1
            candidate = f"{stem}_{number}"
        unique.append(candidate)
    return unique


def _path_name(path: tuple[Any, ...]) -> str:
    words = [_word(key) for key in path]
    if not words or words[0].isdigit():
        words.insert(0, "output")
    return ".".join(words)


def _word(key: Any) -> str:
    """Return the name or number that an entry has in its container."""
    names = (getattr(key, attribute, None) for attribute in ("key", "idx", "name"))
    return str(next((name for name in names if name is not None), key))


def _sketch(value: Any) -> Any:
    """Replace the tensors in a value by their types."""

    def sketch(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return SymbolicSpec(tuple(leaf.shape), leaf.dtype, tuple(leaf.shape))
        return leaf

    return pytree.tree_map(sketch, value)


# 2. Operations over named values.


class _OperationReader:
    """Reads the operations of a network off its graph, which was walked off the sweep."""

    def __init__(self, graph: fx.Graph, types: _Types) -> None:
        self.graph = graph
        self.types = types
        self.inputs: list[str] = []
        self.specs: dict[str, SymbolicSpec] = {}
        # Names of the tensors that a node stands for.
        self._names: dict[fx.Node, list[str]] = {}

    def read(self) -> tuple[Operation, ...]:
        operations = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._names[node] = [*self._input_names(node)]
                self.inputs += self._names[node]
            elif node.op == "call_function" and node.target is operator.getitem:
                source: Any = node.args[0]
                self._names[node] = [self._names[source][int(str(node.args[1]))]]
            elif node.op != "output":
                operations.append(self._operation(node))
        return tuple(operations)

    def _input_names(self, node: fx.Node) -> Iterator[str]:
        """Name the tensors of an argument, which may be nested."""
        value = self.types.values[node.name]
        for index, leaf in enumerate(spec_leaves(value)):
            if isinstance(leaf, SymbolicSpec):
                name = str(node.target) if value is leaf else f"{node.target}.{index}"
                self.specs[name] = leaf
                yield name

    def _operation(self, node: fx.Node) -> Operation:
        sources: list[Any] = list(node.args)
        inputs = tuple(name for source in sources for name in self._names[source])
        step = step_of(node)
        assert step is not None
        if node.target == "head":
            specs = [spec for _, spec in self.types.outputs]
            outputs = [f"output_{index}" for index in range(len(specs))]
        else:
            leaves = spec_leaves(self.types.values[node.name])
            specs = [leaf for leaf in leaves if isinstance(leaf, SymbolicSpec)]
            outputs = _output_names(node, len(specs))
        self._names[node] = outputs
        self.specs.update(zip(outputs, specs, strict=True))
        target = _ARITHMETIC.get(node.target, str(node.target))
        return Operation(step, target, inputs, tuple(outputs))


def _output_names(node: fx.Node, count: int) -> list[str]:
    """Name the results of a call after the node itself, or after the nodes that unpack it."""
    if count == 1:
        return [node.name]
    names = [f"{node.name}_{index}" for index in range(count)]
    for user in node.users:
        if user.target is operator.getitem:
            names[int(str(user.args[1]))] = user.name
    return names


# 3. and 4. Pieces as rows of instances of templates.


def _lower_pieces(
    compiled: Compiled, types: _Types, operations: tuple[Operation, ...], opset: int
) -> Mapping[str, LoweredPiece]:
    """Flatten, divide and translate all pieces that the operations call."""
    counts = {operation.target: len(operation.outputs) for operation in operations}
    pieces = [
        flatten(
            name,
            compiled.module.get_submodule(name),
            arguments,
            types.inner_values.get(name, {}),
            counts[name],
        )
        for name, arguments in types.arguments.items()
    ]
    divided = segments(pieces)
    # The first segment of every key is translated.
    models: dict[Hashable, tuple[Piece, Segment]] = {}
    for piece, row in zip(pieces, divided, strict=True):
        for segment in row:
            models.setdefault(_template_key(segment), (piece, segment))
    translated = translate(compiled.plan.model, [*models.values()], opset)
    templates = dict(zip(models, translated, strict=True))
    lowered = {}
    for piece, row in zip(pieces, divided, strict=True):
        instances = []
        for segment in row:
            key = _template_key(segment)
            weights = _bound_weights(models[key][1], segment, templates[key])
            instances.append(Instance(segment, templates[key], weights))
        lowered[piece.name] = LoweredPiece(piece, tuple(instances))
    return lowered


def _template_key(segment: Segment) -> Hashable:
    """Return the key under which a segment is translated; without one it is its own."""
    return segment if segment.key is None else segment.key


def _bound_weights(model: Segment, segment: Segment, template: Template) -> tuple[str, ...]:
    """Return the weights of a segment that stand for those of the segment that was translated.

    With "layers.0" in the translated segment where "layers.7" is here, "layers.0.weight" becomes
    "layers.7.weight".
    """
    if model is segment:
        return template.weights
    renamed = {
        str(translated.target): str(node.target)
        for translated, node in zip(model.nodes, segment.nodes, strict=True)
        if node.op in ("call_module", "get_attr")
    }
    return tuple(_renamed(name, renamed) for name in template.weights)


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    """Replace the longest prefix of a name that has another name."""
    prefixes = (prefix for prefix in renamed if name == prefix or name.startswith(f"{prefix}."))
    prefix = max(prefixes, key=len, default=None)
    return name if prefix is None else renamed[prefix] + name.removeprefix(prefix)
