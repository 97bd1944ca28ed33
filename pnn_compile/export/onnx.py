"""The parareal network as one ONNX file, held against torch in ONNX Runtime."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from passes.errors import ExportError
from passes.validate import preserved, relative_error

if TYPE_CHECKING:
    from pnn_compile.network import Network

__all__ = ["LIMIT", "export_onnx"]

LIMIT = 1e-3
"""Largest error over the largest magnitude that ONNX Runtime may differ from torch by, float32."""


def export_onnx(compiled: Network, path: str | Path) -> Path:
    """Write the network in evaluation mode, with a dynamic batch where the program has one.

    Args:
        compiled: The network.
        path: File to write; replaced as a whole once the check has passed.

    Returns:
        The file.

    Raises:
        ExportError: A package is missing, an operator has no ONNX form, the file cannot be
            written, or ONNX Runtime disagrees with torch.
    """
    target = Path(path)
    _require_packages()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder) / target.name
        with preserved(compiled.module), torch.no_grad():
            compiled.module.eval()
            _write(compiled, draft)
            _check(compiled, draft)
        for file in Path(folder).iterdir():
            os.replace(file, target.parent / file.name)
    return target


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"ONNX export needs the package {error.name}: pip install 'pnn-compile[onnx]'"
        ) from error


def _inputs(compiled: Network) -> dict[str, Any]:
    """Example inputs by name; copies, so that nothing that runs on them changes the program's."""

    def fresh(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    copied: dict[str, Any] = pytree.tree_map(fresh, dict(compiled.program.args))
    return copied


def _write(compiled: Network, path: Path) -> None:
    inputs = _inputs(compiled)
    shapes = None
    if compiled.program.dynamic_batch:
        batch = next(t.shape[0] for t in pytree.tree_leaves(inputs) if t.dim())
        shapes = pytree.tree_map(
            lambda t: {0: "batch"} if t.dim() and t.shape[0] == batch else None, inputs
        )
    try:
        with _quiet():
            program = torch.onnx.export(
                compiled.module,
                (),
                kwargs=inputs,
                input_names=list(inputs),
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            program.save(str(path))
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}") from error
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[0] if lines else type(error).__name__
        raise ExportError(f"{compiled.plan.model} has no ONNX form: {detail}") from error


def _check(compiled: Network, path: Path) -> None:
    """Run the file in ONNX Runtime on the example inputs and compare every output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = _inputs(compiled)
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    feeds = {
        slot.name: leaf.numpy() for slot, leaf in zip(session.get_inputs(), leaves, strict=True)
    }
    found = session.run(None, feeds)
    wanted = [t for t in pytree.tree_leaves(compiled.module(**inputs)) if t is not None]
    for index, (value, reference) in enumerate(zip(found, wanted, strict=True)):
        error = relative_error(torch.from_numpy(value), reference)
        if error > LIMIT:
            raise ExportError(
                f"ONNX Runtime disagrees with torch on output {index}: relative error {error:.1e}, "
                f"limit {LIMIT:.0e}; the file was not kept"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress and warnings to itself; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
