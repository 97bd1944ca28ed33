"""Export a network: lower it, write it as one file or as stage models, and verify what was written.

The files are drafted in a temporary directory beside their destination and move there once all
checks have passed, so that a failed export leaves what was there before. The checks are onnx's
checker, the types of all values, and the outputs of ONNX Runtime against torch at batch sizes 1, 2
and 5 if the batch is dynamic: an exporter that takes the batch of the example for a constant fails
at one of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from passes.capture.model_notes import join_few
from passes.errors import ArtifactError, ExportError, OptionError, first_line, why
from passes.ir.isolation import preserved, same_values
from passes.ir.program import clone_tensors, tensor_leaves
from passes.ir.run_step import output_tensors, relative_error
from pnn_compile.atomic import replace_entries
from pnn_compile.export.onnx.lower import Lowered, lower_network
from pnn_compile.export.onnx.manifest import MANIFEST
from pnn_compile.export.onnx.run import StageExecutor, session
from pnn_compile.export.onnx.sizes import Runs
from pnn_compile.export.onnx.stages import write_stages
from pnn_compile.export.onnx.translate import OPSET
from pnn_compile.export.onnx.write import IR_VERSION, save_model, write_model
from pnn_compile.fit.metrics import Agreement, main_output
from pnn_compile.inputs import argument_names, batch_size, resized

if TYPE_CHECKING:
    import numpy as np

    from pnn_compile.compiled import Compiled


LIMIT = 1e-3
"""Largest relative error of ONNX Runtime against torch that passes, float32."""

LIMIT_FP16 = 2e-2
"""The same in half precision."""

BATCHES = (1, 2, 5)
"""Batch sizes of the comparison if the batch is dynamic."""

_Run = Callable[[Mapping[str, "np.ndarray"]], Sequence["np.ndarray"]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checked:
    """Difference between ONNX Runtime and torch.

    Attributes:
        batches: Batch sizes that were compared.
        error: Largest error of an output over its largest magnitude, at any batch size.
        agreement: Share of samples with the same top-1 class; None if the output has no classes.
    """

    batches: tuple[int, ...]
    error: float
    agreement: float | None


@dataclass(frozen=True)
class Exported:
    """Files of an export.

    Attributes:
        path: The model file; of stage models, their manifest.
        files: All files.
        nodes: Number of ONNX nodes.
        opset: Version of the default operator set.
        ir_version: Version of the ONNX format.
        checked: Difference between ONNX Runtime and torch; None without verification.
    """

    path: Path
    files: tuple[Path, ...]
    nodes: int
    opset: int
    ir_version: int
    checked: Checked | None

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.nodes} nodes, opset {self.opset}, IR {self.ir_version}"]
        if self.checked is None:
            return f"{parts[0]}, not verified"
        sizes = ", ".join(map(str, self.checked.batches))
        parts.append(f"ONNX Runtime within {self.checked.error:.1e} of torch at batch {sizes}")
        if self.checked.agreement is not None:
            parts.append(f"top-1 equal on {self.checked.agreement:.1%}")
        return ", ".join(parts)


def export_onnx(
    compiled: Compiled,
    path: str | Path,
    *,
    per_stage: bool = False,
    verify: bool = True,
    opset: int = OPSET,
    fp16: bool = False,
    bf16: bool = False,
    lowered: Lowered | None = None,
) -> Exported:
    """Write the network in evaluation mode, with a dynamic batch if the program has one.

    Args:
        compiled: The network.
        path: File to write; per stage, the directory of `manifest.json` and `stages/`. What is
            there is replaced as a whole once everything has been checked.
        per_stage: Whether to write a model per stage and their manifest, instead of one model.
        verify: Whether to check form, types and values of what was written.
        opset: Version of the operator set, 18 to 24.
        fp16: Whether to write the network in half precision; inputs and outputs are so too.
        bf16: Whether to store the weights in bfloat16; the network computes in float32.
        lowered: Result of `lower_network` for the same network, if it is written twice.

    Raises:
        ExportError: A package is missing, an operator has no ONNX form, the network keeps state
            from call to call, the files cannot be written, or ONNX Runtime disagrees with torch.
        OptionError: The version of the operator set is none that is supported, or both fp16 and
            bf16 are asked for.
    """
    if fp16 and bf16:
        raise OptionError("fp16 and bf16 exclude each other: choose one")
    if fp16 or bf16:
        compiled = in_half_precision(compiled, bf16=bf16)
    lowered = lowered or lower_network(compiled, opset, bf16=bf16)
    write = _export_stages if per_stage else _export_whole
    with preserved(compiled.module), torch.no_grad():
        compiled.module.eval()
        _check_stateless(compiled)
        return write(compiled, lowered, Path(path), verify)


def in_half_precision(compiled: Compiled, *, bf16: bool = False) -> Compiled:
    """Return a copy of a network in half precision, with example inputs in it.

    Args:
        compiled: The network.
        bf16: Whether to round its weights to bfloat16 instead, of which few runtimes have more than
            the conversion.

    Raises:
        ExportError: The network does not run in it.
    """
    if bf16:
        rounded = copy.deepcopy(compiled)
        with torch.no_grad():
            for parameter in filter(lambda p: p.dtype == torch.float32, rounded.parameters()):
                parameter.copy_(parameter.bfloat16())
        return rounded
    half = copy.deepcopy(compiled).to(torch.float16)
    half = replace(half, program=half.current_program())
    try:
        with torch.no_grad():
            half.eval().module(**clone_tensors(dict(half.program.args)))
    except Exception as error:
        raise ExportError(
            f"{compiled.plan.model} does not run in half precision: {_first_line(error)}"
        ) from error
    return half


def _check_stateless(compiled: Compiled) -> None:
    """Refuse a network whose calls change what its next calls return: no ONNX model can.

    Raises:
        ExportError: Its second call has other outputs than the first, after writes to buffers.
    """
    with preserved(compiled.module):
        runs: list[list[torch.Tensor]] = []
        changed: list[str] = []
        while len(runs) < 2:
            before = {n: (id(b), b._version) for n, b in compiled.module.named_buffers()}
            outputs = compiled.module(**clone_tensors(dict(compiled.program.args)))
            runs.append([tensor.clone() for tensor in output_tensors(outputs)])
            after = {n: (id(b), b._version) for n, b in compiled.module.named_buffers()}
            changed = [name for name in after if after[name] != before.get(name)]
            if not changed:
                return
    if not all(map(same_values, *runs)):
        raise ExportError(
            f"forward changes {join_few(changed)} in evaluation mode, its outputs depend on that, "
            "and an ONNX model keeps nothing from call to call: take such a state as an input and "
            "return it, or write to it under `if self.training` alone"
        )


def _export_whole(compiled: Compiled, lowered: Lowered, target: Path, verify: bool) -> Exported:
    name = compiled.module.__class__.__name__
    model = write_model(
        compiled.plan, lowered, lowered.operations, lowered.inputs, lowered.outputs, name
    )
    nodes = sum(1 for _ in model.graph.all_nodes())
    if target.is_dir():
        raise ExportError(f"{target} is a directory: name a file in it, such as model.onnx")
    checked = None
    with drafting(target.parent) as folder:
        files = save_model(model, folder / target.name)
        del model  # its weights are on disk
        if verify:
            check_form(files[0])
            opened = _opened(lambda: session(files[0]))
            outputs = [public for public, _ in lowered.outputs]
            checked = check_values(compiled, lambda x: opened.run(outputs, dict(x)), lowered.inputs)
            del opened  # closes the file before it moves
    written = tuple(target.parent / file.name for file in files)
    return Exported(target, written, nodes, lowered.opset, IR_VERSION, checked)


def _export_stages(compiled: Compiled, lowered: Lowered, target: Path, verify: bool) -> Exported:
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file: name a directory for the stage models")
    checked = None
    with drafting(target) as folder:
        manifest, nodes = write_stages(compiled.plan, lowered, folder)
        if verify:
            for model in manifest.models:
                check_form(folder / model.files[0].path)
            with _opened(lambda: StageExecutor(folder, check=False)) as executor:
                checked = check_values(
                    compiled, lambda x: [*executor.run(x).values()], lowered.inputs
                )
    files = [target / file.path for model in manifest.models for file in model.files]
    written = (target / MANIFEST, *files)
    return Exported(written[0], written, nodes, lowered.opset, IR_VERSION, checked)


def _opened(opening: Callable[[], _T]) -> _T:
    """Open what was written; a runtime that cannot is an error of the export."""
    try:
        return opening()
    except ArtifactError as error:
        raise ExportError(
            f"{error}; --no-verify (verify=False) keeps the files all the same"
        ) from error


@contextmanager
def drafting(folder: Path) -> Iterator[Path]:
    """Provide an empty directory whose contents move to `folder` if the block succeeds.

    A directory replaces the directory of the same name, a file the file.

    Raises:
        ExportError: Something cannot be written.
    """
    try:
        with replace_entries(folder) as draft:
            yield draft
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {why(error)}") from error


def check_form(path: Path) -> None:
    """Check a model file, including the types and shapes of its values.

    Raises:
        ExportError: The checker of onnx rejects it, or shape inference leaves a value untyped.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as error:
        raise ExportError(
            f"onnx refuses {path.name}: {_first_line(error)}; the file was not kept"
        ) from error
    typed = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    computed = [name for node in inferred.graph.node for name in node.output]
    untyped = [name for name in computed if name and name not in typed]
    if untyped:
        raise ExportError(
            f"shape inference finds no type for {len(untyped)} values of {path.name} "
            f"({', '.join(untyped[:3])}); the file was not kept"
        )


def check_values(compiled: Compiled, run: _Run, names: Sequence[str]) -> Checked:
    """Compare a model with the network, in the mode it is in, on the example inputs.

    Args:
        compiled: The network.
        run: Runs the model on arrays by input name, and returns its outputs in order.
        names: Names of the inputs.

    Raises:
        ExportError: An output differs, or the runtime cannot run the model.
    """
    sizes = BATCHES if "batch" in compiled.program.dynamic else (batch_size(compiled.program.args),)
    worst, agreement = 0.0, Agreement()
    other = Runs.of(compiled.program).lengths[1:]
    for size, length in [*((size, 0) for size in sizes), *((sizes[-1], n) for n in other)]:
        inputs = resized(compiled, size, compiled.program.device, length)
        try:
            feeds = _arrays(compiled, inputs, names)  # numpy has no bfloat16
            outputs = [torch.from_numpy(value) for value in run(feeds)]
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot run the model at batch {size}: {_first_line(error)}; "
                "--no-verify (verify=False) keeps the file all the same"
            ) from error
        with torch.no_grad():
            expected = output_tensors(compiled.module(**clone_tensors(inputs)))
        references = [tensor.cpu() for tensor in expected]
        for index, (value, reference) in enumerate(zip(outputs, references, strict=True)):
            worst = max(worst, _error(index, size, value, reference))
        agreement.add(main_output(outputs), main_output(references), size)
    return Checked(sizes, worst, agreement.share)


def _error(index: int, size: int, value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative error of an output, if it is small enough."""
    output = f"output {index} at batch {size}"
    if value.shape != reference.shape or value.dtype != reference.dtype:
        raise ExportError(
            f"ONNX Runtime returns {output} as {[*value.shape]} {value.dtype}, torch as "
            f"{[*reference.shape]} {reference.dtype}; the file was not kept"
        )
    error = relative_error(value, reference)
    limit = LIMIT_FP16 if reference.dtype == torch.float16 else LIMIT
    if not error <= limit or math.isnan(error):
        raise ExportError(
            f"ONNX Runtime disagrees with torch on {output}: relative error {error:.1e}, "
            f"limit {limit:.0e}; the file was not kept"
        )
    return error


def _arrays(
    compiled: Compiled, inputs: Mapping[str, Any], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the tensors of a network's inputs as arrays, by their names in ONNX."""
    tensors = tensor_leaves([inputs[name] for name in argument_names(compiled.program)])
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors]
    return dict(zip(names, arrays, strict=True))


def _first_line(error: Exception) -> str:
    return first_line(error)[:300] or type(error).__name__
