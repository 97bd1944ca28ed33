"""Writes steps as an ONNX model in which every node says its stage, its role and its origin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from passes.ir.program import resolve
from passes.plan.schema import Plan
from pnn_compile.export.onnx.flat import Origin
from pnn_compile.export.onnx.lower import Call, LoweredPiece
from pnn_compile.export.onnx.observe import Spec
from pnn_compile.export.onnx.steps import Place, Step
from pnn_compile.export.onnx.translate import INNER, NODE, OPSET

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CONFIGURATION", "IR_VERSION", "write"]

IR_VERSION = 11
"""The first version of the format with device configurations; younger ones few runtimes read."""

CONFIGURATION = "pnn"
"""Name of the device configuration: stage j on device j."""

_PRODUCER = "pnn-compile"
_SMALL = 1024  # bytes


def write(
    plan: Plan,
    lowered: Mapping[str, LoweredPiece],
    steps: Iterable[Step],
    inputs: Mapping[str, Spec],
    outputs: Sequence[tuple[str, str]],
    name: str,
) -> ir.Model:
    """Write steps as a model.

    Args:
        plan: What was decided; it goes into the metadata of the model.
        lowered: The pieces in ONNX.
        steps: What to write.
        inputs: Types of the values that the steps do not compute, by name.
        outputs: Public names of what the model gives, and the values that they stand for.
        name: Name of the graph.
    """
    writer = _Writer(plan, lowered)
    for value, spec in inputs.items():
        writer.add_input(value, spec)
    for step in steps:
        writer.add_step(step)
    return writer.finish(outputs, name)


class _Writer:
    def __init__(self, plan: Plan, lowered: Mapping[str, LoweredPiece]) -> None:
        self.plan = plan
        self.lowered = lowered
        self.inputs: list[ir.Value] = []
        self.nodes: list[tuple[ir.Node, Place, Origin]] = []
        self.values: dict[str, ir.Value] = {}
        self.weights: dict[int, ir.Value] = {}
        self.constants: dict[tuple[object, ...], ir.Value] = {}
        self.initializers: list[ir.Value] = []
        self.taken: set[str] = set()
        self.public: set[str] = set()
        # A tensor that a guess shares with the model has the name that it has in the model.
        self.names: dict[int, str] = {}
        for each in sorted(lowered.values(), key=lambda each: bool(each.piece.prefix)):
            for name in (name for call in each.calls for name in call.weights):
                tensor = resolve(each.piece.module, name)
                self.names.setdefault(id(tensor), each.piece.key(name))

    def add_input(self, name: str, spec: Spec) -> None:
        import onnx_ir as ir

        value = ir.Value(
            name=name, shape=ir.Shape(spec.dims), type=ir.TensorType(_data_type(spec.dtype))
        )
        self.taken.add(name)
        self.inputs.append(value)
        self.values[name] = value

    def add_step(self, step: Step) -> None:
        read = [self.values[name] for name in step.inputs]
        if step.target in ("Add", "Sub"):
            given = [self._arithmetic(step, read)]
        else:
            given = self._call(self.lowered[step.target], read, step.place)
        for name, value in zip(step.outputs, given, strict=True):
            self.values[name] = value
            if value.producer() is not None:
                value.name = self._unique(name)

    def _arithmetic(self, step: Step, read: list[ir.Value]) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(step.target, read)
        node.outputs[0].type = read[0].type
        node.outputs[0].shape = read[0].shape.copy() if read[0].shape else None
        self.nodes.append((node, step.place, Origin()))
        return node.outputs[0]

    def _call(self, lowered: LoweredPiece, read: list[ir.Value], place: Place) -> list[ir.Value]:
        """Write the blocks of a piece one after the other."""
        piece = lowered.piece
        values = dict(zip(piece.inputs, read, strict=True))
        for call in lowered.calls:
            given = [values[node] for node in call.segment.entering]
            given += [self._weight(lowered, name) for name in call.weights]
            found = self._instance(call, given, lowered, place)
            values.update(zip(call.segment.leaving, found, strict=True))
        return [values[node] for node in piece.outputs]

    def _instance(
        self, call: Call, given: list[ir.Value], lowered: LoweredPiece, place: Place
    ) -> list[ir.Value]:
        """Write a copy of a block over other inputs and weights."""
        import onnx_ir as ir

        graph = call.block.graph.clone()
        outputs = [*graph.outputs]
        graph.outputs.clear()
        bound = dict(zip(graph.inputs, given, strict=True))
        graph.inputs.clear()
        for value in [*graph.initializers.values()]:
            graph.initializers.pop(value.name or "")
            bound[value] = self._constant(value)
        ir.convenience.replace_all_uses_with([*bound], [*bound.values()])
        nodes = [*graph]
        graph.remove(nodes)
        for node in nodes:
            number = int(node.metadata_props.get(NODE, 0))
            origin = Origin()
            if call.segment.nodes:
                source = call.segment.nodes[min(number, len(call.segment.nodes) - 1)]
                origin = lowered.piece.origins.get(source, origin)
            if not origin.path:
                origin = Origin(node.metadata_props.get(INNER, ""))
            self.nodes.append((node, place, origin))
        return [bound.get(value, value) for value in outputs]

    def _weight(self, lowered: LoweredPiece, name: str) -> ir.Value:
        """The initializer of a parameter or buffer; one for all that read the same tensor."""
        tensor = resolve(lowered.piece.module, name)
        if id(tensor) not in self.weights:
            self.weights[id(tensor)] = self._initializer(self.names[id(tensor)], tensor)
        return self.weights[id(tensor)]

    def _initializer(self, name: str, tensor: torch.Tensor) -> ir.Value:
        import onnx_ir as ir

        name = self._unique(name)
        data = ir.tensor_adapters.TorchTensor(tensor.detach().cpu(), name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(tuple(data.shape)),
            type=ir.TensorType(data.dtype),
            const_value=data,
        )
        self.initializers.append(value)
        return value

    def _constant(self, value: ir.Value) -> ir.Value:
        """A constant of a block; small ones are written once."""
        import onnx_ir as ir

        data = value.const_value
        assert data is not None
        key: tuple[object, ...] = (id(data),)
        if data.nbytes <= _SMALL:
            key = (data.dtype, tuple(data.shape), data.tobytes())
        if key not in self.constants:
            name = self._unique(f"constant_{len(self.constants)}")
            array = data.numpy()
            kept = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(data.dtype),
                const_value=ir.tensor(array, name=name, dtype=data.dtype),
            )  # fmt: skip
            self.constants[key] = kept
            self.initializers.append(kept)
        return self.constants[key]

    def finish(self, outputs: Sequence[tuple[str, str]], name: str) -> ir.Model:
        """Name and annotate everything, and make the model."""
        import onnx_ir as ir

        given = [self._output(*pair) for pair in outputs]
        graph = ir.Graph(
            self.inputs,
            given,
            nodes=[node for node, _, _ in self.nodes],
            initializers=self.initializers,
            opset_imports={"": OPSET},
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name=_PRODUCER)
        stages = len(self.plan.stages)
        devices = [f"stage_{stage}" for stage in range(stages)]
        configuration = model.add_device_configuration(CONFIGURATION, device_names=devices)
        for node, place, origin in self.nodes:
            self._annotate(node, place, origin)
            for each in (node, *_inside(node)):
                each.set_pipeline_stage(configuration, place.stage)
        model.metadata_props.update(_facts(self.plan))
        return model

    def _output(self, public: str, name: str) -> ir.Value:
        """Give a value its public name; a value that has one already is copied."""
        import onnx_ir as ir

        value = self.values[name]
        if value.producer() is None or value.name in self.public:
            place = Place(len(self.plan.stages) - 1, "head", self.plan.iterations - 1)
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            self.nodes.append((node, place, Origin()))
            value = node.outputs[0]
        if value.name != public:
            value.name = self._unique(public)
        self.public.add(value.name or "")
        return value

    def _annotate(self, node: ir.Node, place: Place, origin: Origin) -> None:
        """Write where a node belongs, and a name that says it."""
        words = [f"stage_{place.stage}", place.role]
        if self.plan.iterations > 1:
            words.append(f"iteration_{place.iteration}")
        words += [origin.path] if origin.path else []
        node.name = self._unique("/".join([*words, node.op_type]))
        for index, value in enumerate(node.outputs):
            if value.name not in self.taken:
                value.name = self._unique(node.name + (f"_{index}" if index else "") + "_out")
        for each in (node, *_inside(node)):
            each.metadata_props.clear()
            each.metadata_props.update(
                {
                    "pnn.stage": str(place.stage),
                    "pnn.role": place.role,
                    "pnn.iteration": str(place.iteration),
                }
            )
            if origin.path:
                each.metadata_props["pnn.module"] = origin.path
            if origin.source:
                each.metadata_props["pnn.source"] = origin.source
        for number, inner in enumerate(_inside(node)):
            inner.name = f"{node.name}/{number}_{inner.op_type}"
            for value in (*(inner.graph.inputs if inner.graph else ()), *inner.outputs):
                if not (value.name or "").startswith(node.name):
                    value.name = f"{node.name}/{value.name}"

    def _unique(self, name: str) -> str:
        """A name that no value and no node has yet."""
        found, number = name, 1
        while found in self.taken:
            number += 1
            found = f"{name}_{number}"
        self.taken.add(found)
        return found


def _inside(node: ir.Node) -> list[ir.Node]:
    """Nodes of the subgraphs of a node."""
    import onnx_ir as ir

    found: list[ir.Node] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found += attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += [inner for graph in attribute.as_graphs() for inner in graph.all_nodes()]
    return found


def _facts(plan: Plan) -> dict[str, str]:
    """What the metadata of a model says of the plan."""
    return {
        "pnn.stages": str(len(plan.stages)),
        "pnn.correction": plan.correction,
        "pnn.sweep": plan.sweep,
        "pnn.iterations": str(plan.iterations),
        "pnn.plan": json.dumps(json.loads(plan.to_json())),
    }


def _data_type(dtype: torch.dtype) -> ir.DataType:
    import onnx_ir as ir

    return ir.tensor_adapters.from_torch_dtype(dtype)
