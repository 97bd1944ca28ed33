"""Convert a `Program` to JSON data and tensors, and back: no code, no pickles, listed names only.

Graphs are written by `nodes.py`, modules by `modules.py`, tensors by `tensors.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NotRequired, TypedDict

import torch
from torch import fx, nn

from passes.capture.train_eval import ByMode
from passes.cost.node_facts import observe
from passes.errors import ArtifactError
from passes.ir.checked_json import decode as decode_json
from passes.ir.checked_json import parse
from passes.ir.module_walk import named_tensors
from passes.ir.observer import memory_of
from passes.ir.output_types import OutputType, ordered_dict, ordered_dicts
from passes.ir.program import (
    DIMENSIONS,
    CaptureReport,
    Program,
    Validation,
    graph_module,
    has_gradient_hooks,
    verify_graph,
)
from pnn_compile.artifact.modules import (
    ModuleWriter,
    Parametrization,
    build,
    is_container,
    set_training_modes,
    training_modes,
)
from pnn_compile.artifact.nodes import Node, read_graph, write_node
from pnn_compile.artifact.tensors import (
    Record,
    TensorReader,
    TensorRecord,
    TensorWriter,
    assign,
    describe_no_tensor,
)
from pnn_compile.artifact.values import (
    UnsupportedError,
    check_identifier,
    check_path,
    decode,
    encode,
    few,
)

SCHEMA = 1

Data = dict[str, Any]

_Modes = TypedDict("_Modes", {"default": bool, "except": list[str]})


_Module = TypedDict(
    "_Module",
    {
        "path": str,
        "same_as": NotRequired[str],
        "class": NotRequired[str],
        "arguments": NotRequired[dict[str, Any]],
        "parametrizations": NotRequired[dict[str, list[Parametrization]]],
        "by_mode": NotRequired[dict[str, list[Node]]],
    },
)


class _Network(TypedDict):
    training: _Modes
    tensors: list[TensorRecord]


class _Capture(TypedDict):
    rung: str
    rejected: tuple[str, ...]
    notes: tuple[str, ...]
    validation: NotRequired[Validation]


class _Program(TypedDict):
    name: str
    dynamic_batch: bool
    sequence: NotRequired[int | None]
    capture: _Capture
    unknown: list[str]
    inputs: dict[str, Any]
    fixed: NotRequired[dict[str, Any]]
    ordered_outputs: NotRequired[list[Any]]
    training: _Modes
    modules: list[_Module] | None
    tensors: list[TensorRecord]
    nodes: list[Node] | None


class _SavedProgram(_Program):
    network: _Network


def read_data(text: str) -> Data:
    """Read the text of a program, and check the types of all that it holds.

    Raises:
        ArtifactError: It is not JSON, has another schema, or a value is of another type.
    """
    try:
        data = parse(text)
    except ArtifactError as error:
        raise ArtifactError(f"the program is {error}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"should hold a JSON object, holds a {type(data).__name__}")
    _check_schema(data)
    checked: Data = decode_json(_SavedProgram, data, "program")
    return checked


def program_to_data(program: Program) -> tuple[Data, dict[str, torch.Tensor]]:
    """Convert a program to JSON data and tensors.

    The result is read back before it is returned. If the program contains something unsupported,
    `modules` and `nodes` are None and `unknown` names it; inputs and tensors are stored all the
    same.

    Returns:
        The data, and the tensors by key.

    Raises:
        ArtifactError: An example input or a tensor cannot be stored.
    """
    # Runs the network, for the few that have several buffers in one memory.
    written = functools.cache(lambda: _written_memory(program))
    writer = TensorWriter(lambda buffer: memory_of(buffer) in written())
    _write_tensors(program, writer)
    data: Data = {
        "schema": SCHEMA,
        "torch": torch.__version__,
        "name": program.name,
        "dynamic_batch": "batch" in program.dynamic,
        "sequence": program.sequence,
        "capture": {
            "rung": program.capture.rung,
            "rejected": list(program.capture.rejected),
            "notes": list(program.capture.notes),
            "validation": program.capture.validation,
        },
        "unknown": [],
        "inputs": _write_inputs(program, writer),
        "fixed": _write_fixed(program),
        "training": training_modes(program.module),
        "ordered_outputs": _write_ordered_outputs(program),
    }
    unknown: list[str] = []
    modules = [*_write_modules(program.module, "", {}, ModuleWriter(), unknown)]
    nodes = [write_node(node, unknown) for node in program.graph.nodes]
    hooked = [n for n, p in program.module.named_parameters() if has_gradient_hooks(p)]
    unknown += [f"{name}: a hook on its gradient" for name in hooked]
    data |= {"modules": modules, "tensors": writer.records, "nodes": nodes}
    if not unknown:
        unknown += _round_trip_errors(program, data, writer.values)
    if unknown:
        data |= {"unknown": sorted(set(unknown)), "modules": None, "nodes": None}
    return data, writer.values


def _round_trip_errors(
    program: Program, data: Data, values: Mapping[str, torch.Tensor]
) -> list[str]:
    """Read the data back on the meta device, and compare the program with the original."""
    try:
        shapes = {key: value.to("meta") for key, value in values.items()}
        again = program_from_data(data, shapes)
    except ArtifactError as error:
        return [f"a graph that cannot be read back ({error})"]
    return (
        []
        if again.fingerprint == program.fingerprint
        else ["a graph that differs when it is read back"]
    )


def _write_inputs(program: Program, writer: TensorWriter) -> Data:
    def add(tensor: torch.Tensor) -> str:
        return writer.add(f"example_inputs/{len(writer.records)}", "input", tensor)

    try:
        return {name: encode(value, add) for name, value in program.args.items()}
    except UnsupportedError as error:
        raise ArtifactError(
            f"the example inputs contain what an artifact cannot ({error}): compile with tensors, "
            "lists, tuples, dicts and plain values"
        ) from error


def _write_fixed(program: Program) -> Data:
    """Encode the arguments without tensors, apart from unsupported ones."""
    values = {}
    for name, value in program.fixed.items():
        with suppress(UnsupportedError):
            values[name] = encode(value)
    return values


def _write_ordered_outputs(program: Program) -> list[Any]:
    """Encode the paths of the OrderedDicts in the output, which need no code of the model."""
    output = program.output.args[0]
    paths = [path for path in ordered_dicts(program.output_types) if _is_dict(output, path)]
    encoded = []
    for path in paths:
        with suppress(UnsupportedError):
            encoded.append(encode(path))
    return encoded


def _written_memory(program: Program) -> frozenset[int]:
    """Return the memory that a program writes into, in either mode."""
    return frozenset[int]().union(*(fact.writes for fact in observe(program).values()))


def _write_tensors(program: Program, writer: TensorWriter) -> None:
    saved = program.module.state_dict(keep_vars=True).keys()
    for name, parameter in program.module.named_parameters(remove_duplicate=False):
        writer.add(name, "parameter", parameter)
    for name, buffer in program.module.named_buffers(remove_duplicate=False):
        writer.add(name, "buffer", buffer, persistent=name in saved)
    for name, value in program.unused.items():
        if not isinstance(value, torch.Tensor):
            raise ArtifactError(describe_no_tensor(program, name, value))
        writer.add(name, "unused", value)


def _write_modules(
    module: nn.Module, path: str, paths: dict[int, str], writer: ModuleWriter, unknown: list[str]
) -> Iterator[Data]:
    """Describe all modules below one, apart from plain containers.

    Args:
        module: The module.
        path: Its path.
        paths: Path of each module described so far, by identity; extended.
        writer: Writer for the modules of torch.
        unknown: Messages about unsupported modules; extended.
    """
    for name, child in module._modules.items():
        child_path = f"{path}.{name}".lstrip(".")
        if child is None:
            continue
        if id(child) in paths:
            yield {"path": child_path, "same_as": paths[id(child)]}
            continue
        paths[id(child)] = child_path
        if isinstance(child, ByMode):
            yield _write_by_mode(child, child_path, unknown)
            for part, graph in child.named_children():
                yield from _write_modules(graph, f"{child_path}.{part}", paths, writer, unknown)
            continue
        if is_container(child):
            yield from _write_modules(child, child_path, paths, writer, unknown)
            continue
        try:
            yield {"path": check_path(child_path), **writer.write(child)}
        except UnsupportedError as error:
            unknown.append(f"{child_path}: {error}")


def _write_by_mode(module: ByMode, path: str, unknown: list[str]) -> Data:
    parts = {"in_training": module.in_training, "in_evaluation": module.in_evaluation}
    graphs = {
        name: [write_node(node, unknown) for node in part.graph.nodes]
        for name, part in parts.items()
    }
    return {"path": check_path(path), "by_mode": graphs}


def program_from_data(data: Data, tensors: Mapping[str, torch.Tensor]) -> Program:
    """Rebuild a program from the data of `program_to_data`.

    Raises:
        ArtifactError: The data has another schema, is incomplete or malformed, contains an
            operator or a module outside the lists, does not fit the tensors, or was stored without
            its graph.
    """
    _check_schema(data)
    if data.get("unknown") or data.get("nodes") is None or data.get("modules") is None:
        raise ArtifactError(f"the program contains {few(data['unknown'])}, which has no form here")
    try:
        return _read_program(decode_json(_Program, data, "program"), tensors)
    except UnsupportedError as error:
        raise ArtifactError(f"{error} is not among what an artifact may contain") from error
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"malformed program ({type(error).__name__}: {error})") from error


def _read_program(data: Data, tensors: Mapping[str, torch.Tensor]) -> Program:
    reader = TensorReader(data["tensors"], tensors)
    root = _read_modules(data["modules"], len(data["tensors"]))
    _set_tensors(root, data["tensors"], reader)
    name = check_identifier(data["name"])
    module = graph_module(root, read_graph(data["nodes"]), name)
    set_training_modes(module, data["training"])
    verify_graph(module)
    for node in module.graph.find_nodes(op="call_module"):
        if is_container(module.get_submodule(str(node.target))):
            raise ArtifactError(f"node {node.name!r} calls {node.target}, which is not described")
    inputs = inputs_from_data(data, tensors)
    expected = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    if sorted(inputs) != sorted(expected):
        raise ArtifactError(f"the example inputs are not those of the graph ({few(expected)})")
    report = data["capture"]
    return Program(
        module=module,
        args=inputs,
        dynamic=dynamic_from_data(data),
        capture=CaptureReport(
            report["rung"], report["rejected"], report["notes"], report.get("validation", "full")
        ),
        name=name,
        unused={r["name"]: reader.read(r["name"]) for r in _of_kind(data, "unused")},
        fixed=fixed_from_data(data),
        output_types=_read_ordered_outputs(data, module),
    )


def _read_ordered_outputs(data: Data, module: fx.GraphModule) -> tuple[OutputType, ...]:
    paths = [decode(path) for path in data.get("ordered_outputs", [])]
    for path in paths:
        if not isinstance(path, tuple) or not _is_dict(module.graph.output_node().args[0], path):
            raise ArtifactError(f"the outputs have no dict at {str(path)[:80]!r}")
    return tuple(map(ordered_dict, paths))


def _is_dict(output: Any, path: tuple[Any, ...]) -> bool:
    """Whether a path leads to a dict in the output of a graph."""
    for key in path:
        keys: Any = output if isinstance(output, dict) else ()
        if isinstance(output, list | tuple) and type(key) is int:
            keys = range(len(output))
        if key not in keys:
            return False
        output = output[key]
    return isinstance(output, dict)


def _check_schema(data: Data) -> None:
    schema = data.get("schema")
    if schema != SCHEMA:
        raise ArtifactError(f"the program has schema {schema!r}, this version reads {SCHEMA}")


def _of_kind(data: Data, *kinds: str) -> list[Record]:
    return [record for record in data["tensors"] if record["kind"] in kinds]


def _read_modules(records: list[Data], tensors: int) -> nn.Module:
    """Build the modules on the meta device, in the order of the records.

    Args:
        records: The records.
        tensors: How many tensors there are: no module has more layers than that.
    """
    root = nn.Module()
    for record in records:
        parent, _, name = check_path(record["path"]).rpartition(".")
        if "by_mode" in record:
            continue
        if "same_as" in record:
            module = root.get_submodule(check_path(record["same_as"]))
        else:
            layers = record["arguments"].get("num_layers", 1)
            if isinstance(layers, int) and layers > tensors:  # each of them takes its time
                raise ArtifactError(f"{record['path']} has {layers} layers and {tensors} tensors")
            module = build(record["class"], record["arguments"], record.get("parametrizations"))
        _container(root, parent).add_module(name, module)
    for record in records:
        if "by_mode" in record:
            _read_by_mode(root, record)
    return root


def _read_by_mode(root: nn.Module, record: Data) -> None:
    """Build a `ByMode` of two graphs from a record; the modules below it exist already."""
    path = record["path"]
    graphs = []
    for name in ("in_training", "in_evaluation"):
        owner = _container(root, f"{path}.{name}")
        graph = graph_module(owner, read_graph(record["by_mode"][name]), "Branch")
        verify_graph(graph)
        graphs.append(graph)
    parent, _, name = path.rpartition(".")
    _container(root, parent).add_module(name, ByMode(*graphs))


def _container(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; create plain containers where there is none."""
    for atom in path.split(".") if path else ():
        if atom not in root._modules:
            root.add_module(atom, nn.Module())
        child = root._modules[atom]
        assert child is not None
        root = child
    return root


def _set_tensors(root: nn.Module, records: list[Record], reader: TensorReader) -> None:
    """Set all recorded parameters and buffers.

    Raises:
        ArtifactError: A module has a tensor without a record, or one of another shape.
    """
    expected = dict(named_tensors(root, repeats=True))
    for record in records:
        name = record["name"]
        if record["kind"] not in ("parameter", "buffer"):
            continue
        value = reader.read(name)
        path, _, leaf = name.rpartition(".")
        owner = _container(root, path)
        target = expected.pop(name, None)
        if target is None and not is_container(owner):
            raise ArtifactError(f"{name} is not a tensor of a {type(owner).__name__}")
        if target is not None and target.shape != value.shape:
            raise ArtifactError(f"{name} should be {list(target.shape)}, is {list(value.shape)}")
        if record["kind"] == "parameter":
            setattr(owner, leaf, value)
        else:
            owner.register_buffer(leaf, value, persistent=record.get("persistent", True))
    if expected:
        raise ArtifactError(f"no values are recorded for {few(sorted(expected))}")
    for module in root.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # it keeps a list of its weights, which were replaced


def inputs_from_data(data: Data, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the example inputs by argument name.

    Raises:
        ArtifactError: The data has another schema or does not fit the tensors.
    """
    _check_schema(data)
    reader = TensorReader(data["tensors"], tensors)
    values = {r["name"]: reader.read(r["name"]) for r in _of_kind(data, "input")}
    return {name: decode(value, None, values) for name, value in data["inputs"].items()}


def dynamic_from_data(data: Data) -> tuple[str, ...]:
    """Return the dimensions that are free."""
    free = {"batch": data["dynamic_batch"], "sequence": data.get("sequence") is not None}
    return tuple(name for name in DIMENSIONS if free[name])


def fixed_from_data(data: Data) -> dict[str, Any]:
    """Return the arguments without tensors by name, apart from unsupported ones."""
    return {name: decode(value) for name, value in data.get("fixed", {}).items()}


def restore_tensors(program: Program, data: Data, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the tensors of a program that was captured again to the stored values.

    Raises:
        ArtifactError: A tensor is missing or has another shape; the program is unchanged then.
    """
    reader = TensorReader(data["tensors"], tensors)
    targets = dict(named_tensors(program.module, repeats=True)) | dict(program.unused)
    assign(targets, _of_kind(data, "parameter", "buffer", "unused"), reader, program.name)
