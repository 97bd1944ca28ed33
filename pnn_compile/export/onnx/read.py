"""Read exported ONNX files back, and summarize their nodes by stage and role."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import ArtifactError, ExportError, why
from passes.transform.sweep import Role
from pnn_compile.export.onnx.manifest import MANIFEST, Manifest

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class RoleSummary:
    """Nodes of one stage and role.

    Attributes:
        stage: The stage.
        role: The role.
        nodes: Number of nodes.
        operators: Number of occurrences of each operator, the most frequent one first.
        modules: The first and the last module that they come from, if known.
        weight_bytes: Bytes of the weights that they read; one that several roles read counts once.
    """

    stage: int
    role: str
    nodes: int
    operators: tuple[tuple[str, int], ...]
    modules: tuple[str, ...]
    weight_bytes: int


@dataclass(frozen=True)
class OnnxSummary:
    """Contents of an exported network.

    Attributes:
        path: The file that was read.
        files: The models: one, or those of the manifest.
        ir_version: Version of the format.
        opset: Version of the default operator set.
        stages: Number of stages.
        nodes: Number of nodes.
        placed: Number of nodes with a device configuration and a pipeline stage.
        inputs: Names, shapes and types of the inputs.
        outputs: Names, shapes and types of the outputs.
        metadata: Metadata of the model, without the plan.
        parts: Its nodes by stage and role.
    """

    path: str
    files: tuple[str, ...]
    ir_version: int
    opset: int
    stages: int
    nodes: int
    placed: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, str]
    parts: tuple[RoleSummary, ...]


def read_summary(path: Path) -> OnnxSummary:
    """Read an exported model, or the models of a manifest, without their weights.

    Raises:
        ExportError: The package onnx is missing.
        ArtifactError: The file is missing, damaged, or was not exported by pnn-compile.
    """
    if path.name != MANIFEST:
        model = _load(path)
        inputs = tuple(map(_value_text, model.graph.input))
        outputs = tuple(map(_value_text, model.graph.output))
        return _summary(path, {path: model}, inputs, outputs)
    manifest = Manifest.read(path)
    files = [path.parent / entry.files[0].path for entry in manifest.models]
    return _summary(
        path,
        {file: _load(file) for file in files},
        tuple(_text(t.name, t.shape, t.dtype) for t in manifest.inputs),
        tuple(_text(t.name, t.shape, t.dtype) for t in manifest.outputs),
    )


def load_proto(path: Path) -> onnx.ModelProto:
    """Read a model without the weights beside it.

    Raises:
        ExportError: The package onnx is missing.
        ArtifactError: The file is missing or is no model.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError(
            "reading ONNX files needs the package onnx: pip install 'pnn-compile[onnx]'"
        ) from error
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {why(error)}") from error
    except Exception as error:
        raise ArtifactError(f"{path} is not an ONNX model ({type(error).__name__})") from error


def _load(path: Path) -> onnx.ModelProto:
    model = load_proto(path)
    if "pnn.stages" not in node_metadata(model):
        raise ArtifactError(
            f"{path} says nothing of stages: inspect reads what `pnn-compile export` wrote"
        )
    return model


def node_metadata(proto: Any) -> dict[str, str]:
    """Return the metadata of a node or a model."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def _summary(
    path: Path,
    models: dict[Path, onnx.ModelProto],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> OnnxSummary:
    first = next(iter(models.values()))
    metadata = node_metadata(first)
    nodes = [node for model in models.values() for node in _nodes(model.graph)]
    placed = [node for node in nodes if any(map(_is_placed, node.device_configurations))]
    return OnnxSummary(
        path=str(path),
        files=tuple(str(file) for file in models),
        ir_version=first.ir_version,
        opset=next(o.version for o in first.opset_import if not o.domain),
        stages=int(metadata["pnn.stages"]),
        nodes=len(nodes),
        placed=len(placed),
        inputs=inputs,
        outputs=outputs,
        metadata={key: value for key, value in metadata.items() if key != "pnn.plan"},
        parts=tuple(_role_summaries(models)),
    )


def _is_placed(configuration: onnx.NodeDeviceConfigurationProto) -> bool:
    return bool(configuration.configuration_id) and configuration.HasField("pipeline_stage")


def _role_summaries(models: dict[Path, onnx.ModelProto]) -> Iterator[RoleSummary]:
    groups: dict[tuple[int, str], list[onnx.NodeProto]] = {}
    weights: dict[tuple[int, str], int] = {}
    for model in models.values():
        sizes = {t.name: _bytes(t) for t in model.graph.initializer}
        for node in _nodes(model.graph):
            metadata = node_metadata(node)
            key = int(metadata.get("pnn.stage", -1)), metadata.get("pnn.role", "")
            groups.setdefault(key, []).append(node)
            for name in node.input:
                weights[key] = weights.get(key, 0) + sizes.pop(name, 0)
    order: dict[str, int] = {role: index for index, role in enumerate(Role)}
    for key in sorted(groups, key=lambda key: (key[0], order.get(key[1], -1))):
        nodes = groups[key]
        modules = [m for node in nodes if (m := node_metadata(node).get("pnn.module"))]
        yield RoleSummary(
            stage=key[0],
            role=key[1],
            nodes=len(nodes),
            operators=tuple(Counter(node.op_type for node in nodes).most_common()),
            modules=(modules[0], modules[-1]) if modules else (),
            weight_bytes=weights.get(key, 0),
        )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Iterate over the nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _bytes(tensor: onnx.TensorProto) -> int:
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims) * dtype.itemsize)


def _value_text(value: onnx.ValueInfoProto) -> str:
    import onnx

    kind = value.type.tensor_type
    sizes = [d.dim_param if d.HasField("dim_param") else d.dim_value for d in kind.shape.dim]
    return _text(value.name, sizes, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)


def _text(name: str, sizes: Iterable[int | str], dtype: str) -> str:
    return f"{name} [{', '.join(map(str, sizes))}] {dtype}"
