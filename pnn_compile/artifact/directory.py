"""Save a compiled network as a directory, and load it without unpickling or running its code.

The files of an artifact:

    plan.json            every decision
    program.json         the captured program as a typed graph, and training modes
    program.safetensors  parameters, buffers and constants of the program, and the example inputs
    weights.safetensors  weights of the preprocessing operators and the coarse propagators
    report.html          the report, for people; ignored on loading
"""

from __future__ import annotations

import dataclasses
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
from torch.utils import _pytree as pytree

from passes.capture.ladder import capture
from passes.capture.model_copy import unwrap
from passes.errors import ArtifactError, CaptureError, PnnError, why
from passes.ir.example_inputs import call_signature
from passes.ir.module_walk import named_tensors
from passes.ir.program import Program
from passes.pipeline import REPLAY, Compilation, PassResult, run_passes
from passes.plan.schema import Plan
from passes.plan.validate import check_replayed
from pnn_compile.artifact.check_plan import check_operators, check_states, operator_tensors
from pnn_compile.artifact.modules import set_training_modes, training_modes
from pnn_compile.artifact.program_json import (
    dynamic_from_data,
    fixed_from_data,
    inputs_from_data,
    program_from_data,
    program_to_data,
    read_data,
    restore_tensors,
)
from pnn_compile.artifact.tensors import TensorFile, TensorReader, TensorWriter, assign
from pnn_compile.artifact.values import few
from pnn_compile.atomic import recover, replace_directory
from pnn_compile.compiled import Compiled, gather

if TYPE_CHECKING:
    from pnn_compile.forecast.table import ForecastTable

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_PLAN, _PROGRAM = "plan.json", "program.json"
_TENSORS, _WEIGHTS = "program.safetensors", "weights.safetensors"
_REPORT = "report.html"
_ARTIFACT_FILES = frozenset({_PLAN, _PROGRAM, _TENSORS, _WEIGHTS, _REPORT})
_EXPORTED_FILES = ("model.onnx", "model.onnx.stage_*.data", "stages", "manifest.json")
"""Files that the command line exports into an artifact; stale once the artifact is replaced."""
_ADVICE = "restore the file, or save the artifact again"


def save(compiled: Compiled, path: str | Path, forecast: ForecastTable | None = None) -> Path:
    """Write the artifact directory `path`, atomically; an older one is replaced.

    A failure at any point, even of the process, leaves an older artifact unchanged. Files of the
    user in it stay; exported ONNX files are removed, since they describe the older network. Tensors
    are stored on the CPU. A program that contains something unsupported is stored without its
    graph: the log warns, and `load` then needs the model.

    Args:
        compiled: The network.
        path: The directory.
        forecast: Forecast of other numbers of devices, for the report; computing one takes too
            long for every save.

    Returns:
        The directory, as an absolute path.

    Raises:
        ArtifactError: The directory cannot be written, `path` is something other than an artifact,
            or a tensor cannot be stored.
    """
    target = Path(path).resolve()
    check_replaceable(target)
    _check_modules(compiled)
    program = compiled.current_program()
    # The network may have been converted since it was compiled, by half() for example.
    plan = dataclasses.replace(compiled.plan, fingerprint=program.fingerprint)
    data, values = program_to_data(program)
    writer = TensorWriter()
    for name, kind, tensor in operator_tensors(
        compiled.program, compiled.stages, compiled.operators
    ):
        writer.add(name, kind, tensor)
    data["network"] = {"training": training_modes(compiled.module), "tensors": writer.records}
    report = _report(compiled, forecast)
    stale = [*filter(_is_exported, target.iterdir())] if target.exists() else []
    with _write_errors(target), replace_directory(target, _is_users) as folder:
        if report is not None:
            (folder / _REPORT).write_text(report, encoding="utf-8")
        (folder / _PLAN).write_text(plan.to_json(), encoding="utf-8")
        (folder / _PROGRAM).write_text(_to_json(data), encoding="utf-8")
        for name, tensors in ((_TENSORS, values), (_WEIGHTS, writer.values)):
            save_file(tensors, folder / name)
            shutil.copymode(folder / _PLAN, folder / name)  # save_file sets owner-only permissions
    for entry in stale:
        _log.warning("%s is removed with the older network: export it again", entry)
    if data["unknown"]:
        _log.warning(
            "%s is saved without its program (%s): load it with pnn.load(%r, model=...)",
            program.name, few(data["unknown"]), str(path),
        )  # fmt: skip
    return target


def _report(compiled: Compiled, forecast: ForecastTable | None) -> str | None:
    """Return the report, or None if it fails: nothing else of the artifact depends on it."""
    from pnn_compile.report.html import html_report

    try:
        return html_report(compiled, forecast=forecast)
    except Exception as error:
        # A converted network, for example, may no longer run on its example inputs.
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
        model: Replay the plan over this model instead of the stored program; needed if the program
            could not be stored. It is copied, and the stored weights are loaded into the copy.
        without_data: Leave all weights on the meta device; `tensor_readers` reads them later.

    Raises:
        ArtifactError: The directory is not an artifact, a file is missing or damaged, or the plan
            belongs to another model.
    """
    start = time.perf_counter()
    folder = Path(path)
    plan = load_plan(folder)
    data = _read(folder / _PROGRAM, _read_program_file)
    read_tensors = TensorFile if without_data else load_file
    values: Mapping[str, torch.Tensor] = _read(folder / _TENSORS, read_tensors)
    weights: Mapping[str, torch.Tensor] = _read(folder / _WEIGHTS, read_tensors)
    if without_data:
        _drop_data(data)
    if model is not None:
        program = _capture(folder, data, values, model)
    else:
        if unknown := data["unknown"]:
            raise ArtifactError(
                f"{folder} has no program, because an artifact cannot store all of it "
                f"({few(unknown)}): "
                f"use pnn.load({str(folder)!r}, model=...)"
            )
        with _file_errors(folder / _PROGRAM):
            program = program_from_data(data, values)
    load_pass = PassResult("load", time.perf_counter() - start)
    fits = _file_errors(folder / _PLAN) if model is None else _model_errors(folder)
    with fits:
        check_replayed(program, plan)
        check_states(program, plan)
    with _file_errors(folder / _WEIGHTS):
        check_operators(program, plan, data["network"]["tensors"], weights)
    with _file_errors(folder / _PLAN):
        compilation, results = run_passes(Compilation(program=program, plan=plan), REPLAY)
        compiled = gather(compilation, (load_pass, *results))
    if model is not None:
        with _file_errors(folder / _TENSORS):
            restore_tensors(program, data, values)
    with _file_errors(folder / _WEIGHTS):
        _restore_network(compiled, data["network"], weights)
    if program.capture.validation != "full":
        _log.warning(
            "the graph of %s was compared with its model by less than validate='full' (%s)",
            folder, program.capture.compared,
        )  # fmt: skip
    return compiled


def load_plan(path: str | Path) -> Plan:
    """Load only the plan of an artifact.

    Raises:
        ArtifactError: The directory is not an artifact, or its plan is missing or damaged.
    """
    folder = Path(path)
    _check_artifact(folder)
    return _read(folder / _PLAN, lambda file: Plan.from_json(file.read_text(encoding="utf-8")))


def tensor_readers(path: str | Path) -> tuple[TensorReader, TensorReader]:
    """Open the tensors of the program and of the operators, to read them one by one.

    Returns:
        Reader of the program's tensors, reader of the operators' tensors.

    Raises:
        ArtifactError: The directory is not an artifact, or a file is missing or damaged.
    """
    folder = Path(path)
    _check_artifact(folder)
    data = _read(folder / _PROGRAM, _read_program_file)
    values, weights = _read(folder / _TENSORS, TensorFile), _read(folder / _WEIGHTS, TensorFile)
    with _file_errors(folder / _PROGRAM):
        return (
            TensorReader(data["tensors"], values),
            TensorReader(data["network"]["tensors"], weights),
        )


def _drop_data(data: dict[str, Any]) -> None:
    """Mark all weights as without data; example inputs keep theirs."""
    for record in (*data["tensors"], *data["network"]["tensors"]):
        if record["kind"] != "input":
            record["meta"] = True


def check_replaceable(path: str | Path) -> None:
    """Check that an artifact can be written to `path`.

    Raises:
        ArtifactError: It is a file, or a directory with other contents.
    """
    target = Path(path).resolve()
    with _write_errors(target):
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
            f"{target} is a directory with something else than an artifact (no "
            f"{missing[0]}), and is left unchanged: give another path, or empty it first"
        )


def _check_artifact(folder: Path) -> None:
    recover(folder.resolve(), _is_users)
    if not folder.exists():
        raise ArtifactError(
            f"artifact {folder} does not exist: write it with compiled.save({str(folder)!r}), or "
            f"pnn-compile MODEL -o {folder}"
        )
    if not (folder / _PLAN).is_file():
        raise ArtifactError(
            f"{folder} is not an artifact ({_PLAN} is missing): give the directory that "
            "compiled.save or pnn-compile -o wrote"
        )


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Turn errors of the file system into an ArtifactError with advice."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot write {target} ({why(error)}): check permissions and free space of "
            f"{target.parent}, or save to another directory"
        ) from error


def _is_users(entry: Path) -> bool:
    """Return whether an entry of an artifact was not written by the compiler."""
    return entry.name not in _ARTIFACT_FILES and not _is_exported(entry)


def _is_exported(entry: Path) -> bool:
    return any(entry.match(pattern) for pattern in _EXPORTED_FILES)


def _to_json(data: Mapping[str, Any]) -> str:
    """Write one record per line, so that artifacts can be compared line by line."""

    def dump(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    def lines(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return dump(value)
        return "[\n" + ",\n".join(map(dump, value)) + "\n]"

    return "{\n" + ",\n".join(f"{dump(k)}: {lines(v)}" for k, v in data.items()) + "\n}\n"


def _check_modules(compiled: Compiled) -> None:
    """Reject a network in which a module was replaced after the compilation."""
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


def _restore_network(
    compiled: Compiled, network: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    records = network["tensors"]
    targets = dict(named_tensors(compiled.operators.named(), repeats=True))
    reader = TensorReader(records, weights)
    assign(targets, records, reader, "the network of the plan")
    set_training_modes(compiled.module, network["training"])


def _capture(
    folder: Path, data: dict[str, Any], values: Mapping[str, torch.Tensor], model: nn.Module
) -> Program:
    """Capture the user's model on the example inputs of the artifact."""
    with _file_errors(folder / _PROGRAM):
        inputs = fixed_from_data(data) | inputs_from_data(data, values)
        dynamic, notes = dynamic_from_data(data), data["capture"]["notes"]
    args, kwargs = _call(model, inputs)
    _check_data(folder, model, inputs, stored=not data["unknown"])
    try:
        return capture(model, args, kwargs, dynamic=dynamic)
    except CaptureError as error:
        compile_notes = "".join(f"\n  when it was compiled: {note}" for note in notes)
        raise ArtifactError(
            f"the model does not take the example inputs of {folder}: {error}{compile_notes}"
        ) from error


def _check_data(folder: Path, model: nn.Module, inputs: Mapping[str, Any], *, stored: bool) -> None:
    """Refuse a model on the meta device for an artifact that is not, and the reverse."""
    name = type(model).__name__
    without_data = any(tensor.is_meta for _, tensor in named_tensors(model))
    if without_data == any(pytree.tree_any(_is_meta, value) for value in inputs.values()):
        return
    if without_data:
        instead = f", or leave it out: {folder} holds the program" if stored else ""
        raise ArtifactError(
            f"the {name} that was given has weights on the meta device, without data: give one "
            "that is built on a device (its values do not matter, those of the artifact are "
            f"loaded into a copy of it){instead}"
        )
    raise ArtifactError(
        f"{folder} was compiled on the meta device, and has no weights for the {name} that was "
        "given: compile that model itself, with plan=pnn.Plan.from_json(...) for the same cuts"
    )


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


@contextmanager
def _model_errors(folder: Path) -> Iterator[None]:
    """Turn an error about a plan into one about the model that was given."""
    try:
        yield
    except PnnError as error:
        raise ArtifactError(f"{folder} does not fit the model that was given: {error}") from error


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert inputs by placeholder name to the arguments of a call of the model.

    Of `forward(first, *others)`, the placeholders are "first", "others_0", "others_1".
    """
    remaining, args = dict(inputs), list[Any]()
    parameters = call_signature(unwrap(model)).parameters.values()
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
def _file_errors(file: Path) -> Iterator[None]:
    """Turn all errors about the contents of a file into an ArtifactError that names it."""
    try:
        yield
    except ArtifactError as error:
        advice = "" if _ADVICE in str(error) else f"; {_ADVICE}"
        raise ArtifactError(f"{file}: {error}{advice}") from error
    except Exception as error:
        raise ArtifactError(
            f"{file} is damaged or does not fit ({type(error).__name__}: {error}): {_ADVICE}"
        ) from error


def _read(file: Path, read: Callable[[Path], _T]) -> _T:
    if not file.is_file():
        raise ArtifactError(f"{file} is missing: {_ADVICE}")
    with _file_errors(file):
        return read(file)


def _read_program_file(file: Path) -> dict[str, Any]:
    return read_data(file.read_text(encoding="utf-8"))
