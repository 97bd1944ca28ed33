"""Verify ONNX models: their form, the types of their values, and their outputs against torch.

Outputs are compared at batch sizes 1, 2 and 5 if the batch is dynamic: an exporter that takes the
batch of the example for a constant fails at one of them.
"""

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

LIMIT = 1e-3
"""Largest relative error of ONNX Runtime against torch that passes, float32."""

BATCHES = (1, 2, 5)
"""Batch sizes of the comparison if the batch is dynamic."""

_Run = Callable[[Mapping[str, "np.ndarray"]], Sequence["np.ndarray"]]


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
    sizes = BATCHES if compiled.program.dynamic_batch else (batch_size(compiled.program.args),)
    worst, agreement = 0.0, Agreement()
    for size in sizes:
        inputs = resized(compiled, size, compiled.program.device)
        feeds = _arrays(compiled, inputs, names)
        try:
            outputs = [torch.from_numpy(value) for value in run(feeds)]
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot run the model at batch {size}: {_first_line(error)}; "
                "--no-verify (verify=False) keeps the file all the same"
            ) from error
        with torch.no_grad():
            leaves = output_leaves(compiled.module(**_cloned(inputs)))
        references = [leaf.cpu() for leaf in leaves if isinstance(leaf, torch.Tensor)]
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
    if not error <= LIMIT or math.isnan(error):
        raise ExportError(
            f"ONNX Runtime disagrees with torch on {output}: relative error {error:.1e}, "
            f"limit {LIMIT:.0e}; the file was not kept"
        )
    return error


def _arrays(
    compiled: Compiled, inputs: Mapping[str, Any], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the tensors of a network's inputs as arrays, by their names in ONNX."""
    order = [str(node.target) for node in compiled.program.inputs]
    leaves = pytree.tree_leaves([inputs[name] for name in order])
    arrays = [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return dict(zip(names, arrays, strict=True))


def _cloned(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Clone the inputs, for a model may write into them."""

    def clone(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    return {name: pytree.tree_map(clone, value) for name, value in inputs.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
