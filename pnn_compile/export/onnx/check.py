"""Holds ONNX models against torch: their form, their types, and what ONNX Runtime computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from passes.errors import ExportError
from passes.ir.run_step import output_leaves, relative_error
from pnn_compile.fit.metrics import Agreement, main_output
from pnn_compile.inputs import batch_size, resized

if TYPE_CHECKING:
    import numpy as np

    from pnn_compile.compiled import Compiled

__all__ = ["BATCHES", "LIMIT", "Checked", "check_form", "check_values", "named_inputs"]

LIMIT = 1e-3
"""Largest error over the largest magnitude that ONNX Runtime may differ from torch by, float32."""

BATCHES = (1, 2, 5)
"""Batch sizes of the comparison, where the batch is free."""

_Run = Callable[[Mapping[str, "np.ndarray"]], Sequence["np.ndarray"]]


@dataclass(frozen=True)
class Checked:
    """How far ONNX Runtime is from torch.

    Attributes:
        batches: Batch sizes that were compared.
        error: Largest error over the largest magnitude of an output, over all of them.
        agreement: Share of samples with the same largest output; None where there is none.
    """

    batches: tuple[int, ...]
    error: float
    agreement: float | None


def check_form(path: Path) -> None:
    """Check a model file, its types and shapes included.

    Raises:
        ExportError: The checker of onnx refuses it, or the types of some values do not follow.
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
    known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    untyped = [name for node in inferred.graph.node for name in node.output if name not in known]
    untyped = [name for name in untyped if name]
    if untyped:
        raise ExportError(
            f"shape inference finds no type for {len(untyped)} values of {path.name} "
            f"({', '.join(untyped[:3])}); the file was not kept"
        )


def check_values(compiled: Compiled, run: _Run, names: Sequence[str]) -> Checked:
    """Compare with the network, in the mode it is in, on the example inputs at several batch sizes.

    Args:
        compiled: The network.
        run: Runs the model on inputs by name, and gives its outputs in order.
        names: Names of the inputs.

    Raises:
        ExportError: They disagree, or the runtime cannot run the model.
    """
    sizes = BATCHES if compiled.program.dynamic_batch else (batch_size(compiled.program.args),)
    worst, agreed = 0.0, Agreement()
    for size in sizes:
        inputs = resized(compiled, size, compiled.program.device)
        feeds = named_inputs(compiled, inputs, names)
        try:
            found = [torch.from_numpy(value) for value in run(feeds)]
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot run the model at batch {size}: {_first_line(error)}; "
                "--no-verify (verify=False) keeps the file all the same"
            ) from error
        with torch.no_grad():
            output = compiled.module(**_copied(inputs))
        wanted = [leaf.cpu() for leaf in output_leaves(output) if isinstance(leaf, torch.Tensor)]
        for index, (value, reference) in enumerate(zip(found, wanted, strict=True)):
            worst = max(worst, _error(index, size, value, reference))
        agreed.add(main_output(found), main_output(wanted), size)
    return Checked(sizes, worst, agreed.share)


def _error(index: int, size: int, value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error of an output."""
    what = f"output {index} at batch {size}"
    if value.shape != reference.shape or value.dtype != reference.dtype:
        raise ExportError(
            f"ONNX Runtime gives {what} as {[*value.shape]} {value.dtype}, torch as "
            f"{[*reference.shape]} {reference.dtype}; the file was not kept"
        )
    error = relative_error(value, reference)
    if not error <= LIMIT or math.isnan(error):
        raise ExportError(
            f"ONNX Runtime disagrees with torch on {what}: relative error {error:.1e}, "
            f"limit {LIMIT:.0e}; the file was not kept"
        )
    return error


def named_inputs(
    compiled: Compiled, inputs: Mapping[str, Any], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The tensors of a network's inputs as arrays, by the names that they have in ONNX."""
    order = [str(node.target) for node in compiled.program.inputs]
    leaves = pytree.tree_leaves([inputs[name] for name in order])
    arrays = [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return dict(zip(names, arrays, strict=True))


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    def fresh(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    return {name: pytree.tree_map(fresh, value) for name, value in inputs.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
