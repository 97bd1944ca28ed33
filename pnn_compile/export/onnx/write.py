"""Write operations as an ONNX model in which every node says its stage, role and origin.

A node of the model, as ONNX prints it:

    name                  stage_1/fine/layers.3.conv1/Conv (after the role: iteration_0, if K > 1)
    device_configurations {configuration_id: "pnn", pipeline_stage: 1}
    metadata_props        {pnn.stage: 1, pnn.role: fine, pnn.iteration: 0,
                           pnn.module: layers.3.conv1, pnn.source: model.py:41}

A piece is a row of templates, each copied and bound to its values and weights. A tensor that
several pieces read is one initializer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from passes.ir.program import Provenance, resolve
from passes.plan.schema import Plan
from passes.transform.sweep import Step, steps_of
from pnn_compile.export.onnx.lower import Instance, Lowered, LoweredPiece, Operation
from pnn_compile.export.onnx.pieces import SymbolicSpec
from pnn_compile.export.onnx.translate import INNER, NODE, inner_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 11
"""The first version of the format with device configurations; few runtimes read later ones."""

CONFIGURATION = "pnn"
"""Name of the device configuration: stage j of a window on device j."""

LARGE = 100 * 2**20
"""Bytes of weights from which on they are stored beside the model; protobuf ends at 2 GiB."""

_INLINE = 1024
"""Bytes up to which a tensor stays in the model: shape inference may need its values."""

_INLINE_INTEGERS = 2**20
"""The same of integers, such as tables of indices, whose values shape inference follows further."""

_MERGED = 1024
"""Bytes up to which equal constants become one."""

_PRODUCER = "pnn-compile"


def write_model(
    plan: Plan,
    lowered: Lowered,
    operations: Iterable[Operation],
    inputs: Iterable[str],
    outputs: Sequence[tuple[str, str]],
    name: str,
) -> ir.Model:
    """Write operations as a model.

    Args:
        plan: The plan, which goes into the metadata of the model.
        lowered: The network that the operations belong to.
        operations: What to write.
        inputs: Names of the values that the operations read and do not compute.
        outputs: Public names of the outputs, each with the value that it stands for.
        name: Name of the graph.
    """
    writer = _ModelWriter(plan, lowered, {public for public, _ in outputs})
    for value in inputs:
        writer.add_input(value, lowered.specs[value])
    for operation in operations:
        writer.add_operation(operation)
    return writer.finish(outputs, name)


class _ModelWriter:
    """Writes operations one after another.

    Attributes:
        inputs: The inputs of the model.
        nodes: Its nodes, each with the step that it belongs to and its origin.
        initializers: Its weights and constants.
    """

    def __init__(self, plan: Plan, lowered: Lowered, reserved: set[str]) -> None:
        self.plan = plan
        self.pieces = lowered.pieces
        self.inputs: list[ir.Value] = []
        self.nodes: list[tuple[ir.Node, Step, Provenance]] = []
        self.initializers: list[ir.Value] = []
        self._values: dict[str, ir.Value] = {}
        self._weights: dict[int, ir.Value] = {}
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self._names = reserved  # of outputs, which are named last
        self._public: set[str] = set()
        self._weight_names = _weight_names(lowered)
        self._opset, self._bf16 = lowered.opset, lowered.bf16
        self._wide: dict[tuple[str | None, Step], ir.Value] = {}

    def add_input(self, name: str, spec: SymbolicSpec) -> None:
        """Declare a value that is read from outside."""
        import onnx_ir as ir

        data_type = ir.tensor_adapters.from_torch_dtype(spec.dtype)
        value = ir.Value(name=name, shape=ir.Shape(spec.dims), type=ir.TensorType(data_type))
        self._names.add(name)
        self.inputs.append(value)
        self._values[name] = value

    def add_operation(self, operation: Operation) -> None:
        """Write a call, a sum or a difference."""
        read = [self._values[name] for name in operation.inputs]
        if operation.target in ("Add", "Sub"):
            results = [self._arithmetic(operation, read)]
        else:
            results = self._call(self.pieces[operation.target], read, operation.step)
        for name, value in zip(operation.outputs, results, strict=True):
            self._values[name] = value
            if value.producer() is not None:  # not an input or a weight that a piece passes on
                value.name = self._unique(name)

    def _arithmetic(self, operation: Operation, read: list[ir.Value]) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(operation.target, read)
        (result,) = node.outputs
        result.type = read[0].type
        result.shape = read[0].shape.copy() if read[0].shape else None
        self.nodes.append((node, operation.step, Provenance()))
        return result

    def _call(self, lowered: LoweredPiece, read: list[ir.Value], step: Step) -> list[ir.Value]:
        """Write the instances of a piece one after another."""
        piece = lowered.piece
        values = dict(zip(piece.inputs, read, strict=True))
        for instance in lowered.instances:
            arguments = [values[node] for node in instance.segment.inputs]
            arguments += [self._weight(lowered, name, step) for name in instance.weights]
            results = self._instantiate(instance, arguments, lowered, step)
            values.update(zip(instance.segment.outputs, results, strict=True))
        for node in piece.outputs:
            if node.op == "get_attr":  # a parameter or a buffer that forward returns
                values[node] = self._weight(lowered, str(node.target), step)
        return [values[node] for node in piece.outputs]

    def _instantiate(
        self, instance: Instance, arguments: list[ir.Value], lowered: LoweredPiece, step: Step
    ) -> list[ir.Value]:
        """Write a copy of a template over other inputs and weights."""
        import onnx_ir as ir

        graph = instance.template.graph.clone()
        outputs = [*graph.outputs]
        graph.outputs.clear()
        bound = dict(zip(graph.inputs, arguments, strict=True))
        graph.inputs.clear()
        for value in [*graph.initializers.values()]:
            graph.initializers.pop(value.name or "")
            bound[value] = self._constant(value)
        ir.convenience.replace_all_uses_with([*bound], [*bound.values()])
        nodes = [*graph]
        graph.remove(nodes)
        for node in nodes:
            self.nodes.append((node, step, _origin(node, instance, lowered)))
        return [bound.get(value, value) for value in outputs]

    def _weight(self, lowered: LoweredPiece, name: str, step: Step) -> ir.Value:
        """Return the initializer of a parameter or buffer; one for all that read the tensor."""
        tensor = resolve(lowered.piece.module, name)
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = self._initializer(self._weight_names[id(tensor)], tensor)
        value = self._weights[id(tensor)]
        return value if not self._is_narrow(tensor) else self._widened(value, step)

    def _is_narrow(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of float32 is stored in bfloat16."""
        if not self._bf16 or tensor.dtype != torch.float32 or tensor.nbytes <= _INLINE:
            return False
        return torch.equal(tensor.bfloat16().float(), tensor)

    def _widened(self, weight: ir.Value, step: Step) -> ir.Value:
        """Convert a weight to float32 in a step that reads it."""
        import onnx_ir as ir

        if (weight.name, step) not in self._wide:
            node = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})
            (value,) = node.outputs
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), weight.shape
            self.nodes.append((node, step, Provenance()))
            self._wide[weight.name, step] = value
        return self._wide[weight.name, step]

    def _initializer(self, name: str, tensor: torch.Tensor) -> ir.Value:
        import onnx_ir as ir

        name = self._unique(name)
        stored = tensor.detach().cpu()
        if self._is_narrow(tensor):
            stored = stored.bfloat16()
        data = ir.tensor_adapters.TorchTensor(stored, name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(tuple(data.shape)),
            type=ir.TensorType(data.dtype),
            const_value=data,
        )
        self.initializers.append(value)
        return value

    def _constant(self, value: ir.Value) -> ir.Value:
        """Return the initializer of a constant of a template; small ones are written once."""
        import onnx_ir as ir

        data = value.const_value
        assert data is not None
        key: tuple[object, ...] = (id(data),)
        if data.nbytes <= _MERGED:
            key = (data.dtype, tuple(data.shape), data.tobytes())
        if key not in self._constants:
            name = self._unique(f"constant_{len(self._constants)}")
            array = data.numpy()
            constant = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(data.dtype),
                const_value=ir.tensor(array, name=name, dtype=data.dtype),
            )
            self._constants[key] = constant
            self.initializers.append(constant)
        return self._constants[key]

    def finish(self, outputs: Sequence[tuple[str, str]], name: str) -> ir.Model:
        """Name and annotate everything, and return the model."""
        import onnx_ir as ir

        graph_outputs = [self._output(*pair) for pair in outputs]
        graph = ir.Graph(
            self.inputs,
            graph_outputs,
            nodes=[node for node, _, _ in self.nodes],
            initializers=self.initializers,
            opset_imports={"": self._opset},
            name=name,
        )
        model = ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name=_PRODUCER,
            producer_version=version(_PRODUCER),
        )
        devices = [f"device_{number}" for number in range(self.plan.devices)]
        configuration = model.add_device_configuration(CONFIGURATION, device_names=devices)
        for node, step, origin in self.nodes:
            self._annotate(node, step, origin)
            for part in (node, *inner_nodes(node)):
                part.set_pipeline_stage(configuration, self.plan.placement[step.stage])
        model.metadata_props.update(_model_metadata(self.plan))
        return model

    def _output(self, public: str, name: str) -> ir.Value:
        """Give a value its public name; an input, or a value with a public name, is copied."""
        import onnx_ir as ir

        value = self._values[name]
        if value.producer() is None or value.name in self._public:
            # The head makes the copy; K may exceed the iterations that the sweep needs.
            head = steps_of(self.plan)[-1]
            step = replace(head, iteration=self.plan.iterations - 1)
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            self.nodes.append((node, step, Provenance()))
            value = node.outputs[0]
        value.name = public
        self._public.add(public)
        return value

    def _annotate(self, node: ir.Node, step: Step, origin: Provenance) -> None:
        """Name a node and its values after the place that it belongs to, and write its metadata."""
        words: list[str] = [f"stage_{step.stage}", step.role]
        if self.plan.iterations > 1:
            words.append(f"iteration_{step.iteration}")
        words += [origin.path] if origin.path else []
        node.name = self._unique("/".join([*words, node.op_type]))
        for index, value in enumerate(node.outputs):
            if value.name not in self._names:
                value.name = self._unique(node.name + (f"_{index}" if index else "") + "_out")
        metadata = {
            "pnn.stage": str(step.stage),
            "pnn.role": str(step.role),
            "pnn.iteration": str(step.iteration),
        }
        if origin.path:
            metadata["pnn.module"] = origin.path
        if origin.source:
            metadata["pnn.source"] = origin.source
        for part in (node, *inner_nodes(node)):
            part.metadata_props.clear()
            part.metadata_props.update(metadata)
        for number, inner in enumerate(inner_nodes(node)):
            inner.name = f"{node.name}/{number}_{inner.op_type}"
            for value in (*(inner.graph.inputs if inner.graph else ()), *inner.outputs):
                if not (value.name or "").startswith(node.name):
                    value.name = f"{node.name}/{value.name}"

    def _unique(self, name: str) -> str:
        """Return a name that no value and no node has yet, and take it."""
        unique, number = name, 1
        while unique in self._names:
            number += 1
            unique = f"{name}_{number}"
        self._names.add(unique)
        return unique


def _weight_names(lowered: Lowered) -> dict[int, str]:
    """Name the tensors that the pieces read, by their ids.

    A tensor that a preprocessing operator shares with the model has the name that it has in the
    model.
    """
    names: dict[int, str] = {}
    for piece in sorted(lowered.pieces.values(), key=lambda lowered: bool(lowered.piece.prefix)):
        bound = [name for instance in piece.instances for name in instance.weights]
        bound += [str(node.target) for node in piece.piece.outputs if node.op == "get_attr"]
        for name in bound:
            tensor = resolve(piece.piece.module, name)
            names.setdefault(id(tensor), piece.piece.onnx_name(name))
    return names


def _origin(node: ir.Node, instance: Instance, lowered: LoweredPiece) -> Provenance:
    """Return where a node of a copied template came from."""
    origin = Provenance()
    if nodes := instance.segment.nodes:
        number = int(node.metadata_props.get(NODE, 0))
        origin = lowered.piece.origins.get(nodes[min(number, len(nodes) - 1)], origin)
    return origin if origin.path else Provenance(node.metadata_props.get(INNER, ""))


def _model_metadata(plan: Plan) -> dict[str, str]:
    return {
        "pnn.stages": str(len(plan.stages)),
        "pnn.correction": plan.correction,
        "pnn.sweep": plan.sweep,
        "pnn.iterations": str(plan.iterations),
        "pnn.plan": json.dumps(json.loads(plan.to_json())),  # on one line
    }


def save_model(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Save a model, with its weights beside it, one file a stage, if they are large.

    A weight that several stages read is stored with the first of them.

    Returns:
        The files, the model first.
    """
    import onnx_ir as ir

    weights = [*model.graph.initializers.values()]
    sizes = {value: value.const_value.nbytes for value in weights if value.const_value is not None}
    files = [path]
    if sum(sizes.values()) > LARGE:
        by_stage: dict[int, list[ir.Value]] = {}
        for value, size in sizes.items():
            if size > _inline_limit(value):
                by_stage.setdefault(_first_stage(value), []).append(value)
        for stage, values in sorted(by_stage.items()):
            name = f"{path.name}.stage_{stage}.data"
            tensors = [value.const_value for value in values if value.const_value is not None]
            external = ir.external_data.convert_tensors_to_external(tensors, path.parent, name)
            for value, tensor in zip(values, external, strict=True):
                value.const_value = tensor
            files.append(path.parent / name)
    ir.save(model, path)
    return tuple(files)


def _inline_limit(value: ir.Value) -> int:
    floating = value.dtype is not None and value.dtype.is_floating_point()
    return _INLINE if floating else _INLINE_INTEGERS


def _first_stage(value: ir.Value) -> int:
    readers = [int(node.metadata_props.get("pnn.stage", 0)) for node, _ in value.uses()]
    return min(readers, default=0)
