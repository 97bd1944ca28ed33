"""Save a compiled network as a directory, and load it: nothing is unpickled, no code of it runs.

- plan.json: every decision.
- program.json: the captured program as a typed graph, and the modes of the network.
- program.safetensors: its parameters, buffers and constants, and the example inputs.
- weights.safetensors: the weights of the preprocessing operators and the coarse propagators.
- report.html: the report, for people; loading does not look at it.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from passes.capture.ladder import capture
from passes.errors import ArtifactError, CaptureError, PnnError
from passes.ir.program import Program
from passes.pipeline import PassResult
from passes.plan.schema import Plan
from pnn_compile.artifact.atomic import recover, replacing
from pnn_compile.artifact.modules import named_tensors
from pnn_compile.artifact.program_json import (
    few,
    fixed_from_data,
    inputs_from_data,
    modes,
    program_from_data,
    program_to_data,
    restore_tensors,
    set_modes,
)
from pnn_compile.artifact.tensor_file import TensorFile
from pnn_compile.artifact.tensors import TensorReader, TensorWriter, assign
from pnn_compile.compiled import Compiled, replay

if TYPE_CHECKING:
    from pnn_compile.forecast.table import ForecastTable

__all__ = ["check_replaceable", "load", "load_plan", "save", "tensor_readers"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_PLAN, _PROGRAM = "plan.json", "program.json"
_VALUES, _WEIGHTS = "program.safetensors", "weights.safetensors"
_REPORT = "report.html"
_OURS = frozenset({_PLAN, _PROGRAM, _VALUES, _WEIGHTS, _REPORT})
_DERIVED = ("model.onnx", "model.onnx.stage_*.data", "stages", "manifest.json")
"""What the command line exports into an artifact, and what is stale once it is replaced."""
_AGAIN = "restore the file, or save the artifact again"


def save(compiled: Compiled, path: str | Path, forecast: ForecastTable | None = None) -> Path:
    """Write the artifact directory `path`, atomically, replacing an older one.

    The directory is written beside its place and then takes it: whatever fails on the way, or
    kills the process, leaves an older artifact whole. Files of the user in it stay; what was
    exported to ONNX goes, for it shows the older network. Tensors are stored on the CPU. A program
    that holds something that has no form as data is stored without its graph; the log says so, and
    `load` then needs the model.

    Args:
        compiled: The network.
        path: The directory.
        forecast: What other numbers of devices would give, for the report; it takes too long to
            compute it at every save.

    Returns:
        The directory, as an absolute path.

    Raises:
        ArtifactError: The directory cannot be written, something else is in its place, or a
            tensor cannot be stored.
    """
    target = Path(path).resolve()
    check_replaceable(target)
    _check_modules(compiled)
    program = compiled.current_program()
    # The network may have been converted, by half() for example, since it was compiled.
    plan = dataclasses.replace(compiled.plan, fingerprint=program.fingerprint)
    data, values = program_to_data(program)
    writer = TensorWriter()
    for own in _operator_tensors(compiled):
        writer.add(*own)
    data["network"] = {"training": modes(compiled.module), "tensors": writer.records}
    report = _report(compiled, forecast)
    dropped = [*filter(_is_derived, target.iterdir())] if target.exists() else []
    with _writing(target), replacing(target, _is_users) as folder:
        if report is not None:
            (folder / _REPORT).write_text(report, encoding="utf-8")
        (folder / _PLAN).write_text(plan.to_json(), encoding="utf-8")
        (folder / _PROGRAM).write_text(_to_json(data), encoding="utf-8")
        for name, tensors in ((_VALUES, values), (_WEIGHTS, writer.values)):
            save_file(tensors, folder / name)
            shutil.copymode(folder / _PLAN, folder / name)  # it writes for the owner alone
    for entry in dropped:
        _log.warning("%s is dropped with the older network: export it again", entry)
    if data["unknown"]:
        _log.warning(
            "%s is saved without its program (%s): load it with pnn.load(%r, model=...)",
            program.name, few(data["unknown"]), str(path),
        )  # fmt: skip
    return target


def _report(compiled: Compiled, forecast: ForecastTable | None) -> str | None:
    """The report for people, which nothing else of the artifact depends on."""
    from pnn_compile.report.html import html_report

    try:
        return html_report(compiled, forecast=forecast)
    except Exception as error:
        # A network that was converted, say, may not run on its example inputs any more.
        _log.warning(
            "%s is saved without %s (%s: %s)",
            compiled.plan.model, _REPORT, type(error).__name__, error,
        )  # fmt: skip
        return None


def load(
    path: str | Path, model: nn.Module | None = None, *, without_data: bool = False
) -> Compiled:
    """Load an artifact directory, on the CPU.

    Args:
        path: The directory.
        model: Replay the plan over this model instead of the stored program; for a program that
            could not be stored. It is copied, and the stored weights are loaded into the copy.
        without_data: Make a stored program with all weights on the meta device; see
            `tensor_readers`.

    Raises:
        ArtifactError: The directory is no artifact, a file is missing or damaged, or the model
            is not the one that the plan was made for.
    """
    start = time.perf_counter()
    folder = Path(path)
    plan = load_plan(folder)
    data = _read(folder / _PROGRAM, _read_json)
    read_tensors = TensorFile if without_data else load_file
    values: Mapping[str, torch.Tensor] = _read(folder / _VALUES, read_tensors)
    weights: Mapping[str, torch.Tensor] = _read(folder / _WEIGHTS, read_tensors)
    if without_data:
        with _blaming(folder / _PROGRAM):
            _drop_data(data)
    if model is not None:
        program = _capture(folder, data, values, model)
    else:
        unknown = data.get("unknown")
        if isinstance(unknown, list) and unknown:
            raise ArtifactError(
                f"{folder} holds no program, for it has what an artifact cannot hold "
                f"({few(list(map(str, unknown)))}): "
                f"use pnn.load({str(folder)!r}, model=...)"
            )
        with _blaming(folder / _PROGRAM):
            program = program_from_data(data, values)
    read = PassResult("load", time.perf_counter() - start)
    if model is None:
        with _blaming(folder / _PLAN):
            compiled = replay(program, plan, read)
    else:
        compiled = _replay_over(folder, program, plan, read)
        with _blaming(folder / _VALUES):
            restore_tensors(program, data, values)
    with _blaming(folder / _PROGRAM):
        network = data["network"]
    with _blaming(folder / _WEIGHTS):
        _restore_network(compiled, network, weights)
    return compiled


def load_plan(path: str | Path) -> Plan:
    """Load the plan of an artifact alone.

    Raises:
        ArtifactError: The directory is no artifact, or its plan is missing or damaged.
    """
    folder = Path(path)
    _check_artifact(folder)
    return _read(folder / _PLAN, lambda file: Plan.from_json(file.read_text(encoding="utf-8")))


def tensor_readers(path: str | Path) -> tuple[TensorReader, TensorReader]:
    """Open the tensors of the program and those of the operators, to read one by one.

    Raises:
        ArtifactError: The directory is no artifact, or a file is missing or damaged.
    """
    folder = Path(path)
    _check_artifact(folder)
    data = _read(folder / _PROGRAM, _read_json)
    values, weights = _read(folder / _VALUES, TensorFile), _read(folder / _WEIGHTS, TensorFile)
    with _blaming(folder / _PROGRAM):
        return (
            TensorReader(data["tensors"], values),
            TensorReader(data["network"]["tensors"], weights),
        )


def _drop_data(data: dict[str, Any]) -> None:
    """Leave weights without data; example inputs keep theirs."""
    for record in (*data["tensors"], *data["network"]["tensors"]):
        if record["kind"] != "input":
            record["meta"] = True


def check_replaceable(path: str | Path) -> None:
    """Check that an artifact can take the place of what is at `path`.

    Raises:
        ArtifactError: A file is there, or a directory that holds something else.
    """
    target = Path(path).resolve()
    with _writing(target):
        recover(target, _is_users)
        _check_replaceable(target)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file: an artifact is a directory, give another path")
    missing = [name for name in (_PLAN, _PROGRAM) if not (target / name).is_file()]
    if missing and any(target.iterdir()):
        raise ArtifactError(
            f"{target} is a directory that holds something else than an artifact (no "
            f"{missing[0]}), and is left as it is: give another path, or empty it first"
        )


def _check_artifact(folder: Path) -> None:
    recover(folder.resolve(), _is_users)
    if not folder.exists():
        raise ArtifactError(
            f"{folder} does not exist: write it with compiled.save({str(folder)!r})"
        )
    if not (folder / _PLAN).is_file():
        raise ArtifactError(
            f"{folder} is no artifact ({_PLAN} is missing): give the directory that "
            "compiled.save or pnn-compile -o wrote"
        )


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot write {target} ({error}): check permissions and free space of "
            f"{target.parent}, or save to another directory"
        ) from error


def _is_users(entry: Path) -> bool:
    """Whether an entry of an artifact's directory is none that the compiler wrote."""
    return entry.name not in _OURS and not _is_derived(entry)


def _is_derived(entry: Path) -> bool:
    return any(entry.match(pattern) for pattern in _DERIVED)


def _to_json(data: Mapping[str, Any]) -> str:
    """Write one record a line, so that two artifacts can be compared."""

    def dump(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    def lines(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return dump(value)
        return "[\n" + ",\n".join(map(dump, value)) + "\n]"

    return "{\n" + ",\n".join(f"{dump(k)}: {lines(v)}" for k, v in data.items()) + "\n}\n"


def _check_modules(compiled: Compiled) -> None:
    """Refuse a network in which a module was replaced after the compilation."""
    program = compiled.program
    for piece in (*compiled.stages.fine, compiled.stages.head):
        for node in piece.graph.nodes:
            target = str(node.target)
            if node.op == "call_module" and piece.get_submodule(
                target
            ) is not program.module.get_submodule(target):
                raise ArtifactError(
                    f"module {target} was replaced after {program.name} was compiled: change the "
                    "model and compile it again"
                )


def _operator_tensors(compiled: Compiled) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield name, kind and value of what the operators do not share with the stages."""
    pieces = (*compiled.stages.fine, compiled.stages.head, compiled.program.module)
    shared = {id(tensor) for piece in pieces for _, tensor in named_tensors(piece)}
    operators = compiled.operators.named()
    for name, parameter in operators.named_parameters():
        if id(parameter) not in shared:
            yield name, "parameter", parameter
    for name, buffer in operators.named_buffers():
        if id(buffer) not in shared:
            yield name, "buffer", buffer


def _restore_network(
    compiled: Compiled, network: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    records = network["tensors"]
    stored = {record["name"] for record in records}
    missing = [name for name, _, _ in _operator_tensors(compiled) if name not in stored]
    if missing:
        raise ArtifactError(f"{len(missing)} weights are missing ({', '.join(missing[:3])})")
    targets = dict(named_tensors(compiled.operators.named()))
    reader = TensorReader(records, weights)
    assign(targets, records, reader, "the network of the plan")
    set_modes(compiled.module, network["training"])


def _capture(
    folder: Path, data: dict[str, Any], values: Mapping[str, torch.Tensor], model: nn.Module
) -> Program:
    """Capture the user's model on the example inputs of the artifact."""
    with _blaming(folder / _PROGRAM):
        inputs = fixed_from_data(data) | inputs_from_data(data, values)
        dynamic, notes = bool(data["dynamic_batch"]), data["capture"]["notes"]
    args, kwargs = _call(model, inputs)
    try:
        return capture(model, args, kwargs, dynamic_batch=dynamic)
    except CaptureError as error:
        said = "".join(f"\n  when it was compiled: {note}" for note in notes)
        raise ArtifactError(
            f"the model does not take the example inputs of {folder}: {error}{said}"
        ) from error


def _replay_over(folder: Path, program: Program, plan: Plan, read: PassResult) -> Compiled:
    try:
        return replay(program, plan, read)
    except PnnError as error:
        raise ArtifactError(f"{folder} does not fit the model that was given: {error}") from error


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn inputs by placeholder name into the arguments of a call of the model."""
    remaining, args = dict(inputs), list[Any]()
    parameters = inspect.signature(model.forward).parameters.values()
    unpacks = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            for index in itertools.count():
                if (name := f"{parameter.name}_{index}") not in remaining:
                    break
                args.append(remaining.pop(name))
        elif parameter.name in remaining and (
            parameter.kind is parameter.POSITIONAL_ONLY
            or (unpacks and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
        ):
            args.append(remaining.pop(parameter.name))
    return tuple(args), remaining


@contextmanager
def _blaming(file: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the contents of a file into an error that names it."""
    try:
        yield
    except ArtifactError as error:
        advice = "" if _AGAIN in str(error) else f"; {_AGAIN}"
        raise ArtifactError(f"{file}: {error}{advice}") from error
    except Exception as error:
        raise ArtifactError(
            f"{file} is damaged or does not fit ({type(error).__name__}: {error}): {_AGAIN}"
        ) from error


def _read(file: Path, read: Callable[[Path], _T]) -> _T:
    if not file.is_file():
        raise ArtifactError(f"{file} is missing: {_AGAIN}")
    with _blaming(file):
        return read(file)


def _read_json(file: Path) -> dict[str, Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ArtifactError(f"should hold a JSON object, holds a {type(data).__name__}: {_AGAIN}")
    return data
