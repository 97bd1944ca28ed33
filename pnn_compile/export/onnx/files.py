"""ONNX files on disk: large weights beside the model, one file a stage; all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LARGE", "data_name", "drafting", "save"]

LARGE = 100 * 2**20
"""Bytes of weights from which on they are stored beside the model; protobuf ends at 2 GiB."""

_INLINE = 1024
"""Bytes of a tensor that always stays in the model: shape inference may need it."""
_INLINE_INTEGERS = 2**20
"""The same of integers, such as tables of indices, which it follows further."""


def data_name(model: str, stage: int) -> str:
    """Name of the file that holds the weights of a stage of the model in file `model`."""
    return f"{model}.stage_{stage}.data"


def save(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write a model, and its weights beside it where they are large.

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
            if size > _inline(value):
                by_stage.setdefault(_first_stage(value), []).append(value)
        for stage, values in sorted(by_stage.items()):
            name = data_name(path.name, stage)
            tensors = [value.const_value for value in values if value.const_value is not None]
            moved = ir.external_data.convert_tensors_to_external(tensors, path.parent, name)
            for value, tensor in zip(values, moved, strict=True):
                value.const_value = tensor
            files.append(path.parent / name)
    ir.save(model, path)
    return tuple(files)


def _inline(value: ir.Value) -> int:
    floating = value.dtype is not None and value.dtype.is_floating_point()
    return _INLINE if floating else _INLINE_INTEGERS


def _first_stage(value: ir.Value) -> int:
    readers = [int(node.metadata_props.get("pnn.stage", 0)) for node, _ in value.uses()]
    return min(readers, default=0)


@contextmanager
def drafting(folder: Path) -> Iterator[Path]:
    """Give an empty directory; what is in it moves to `folder` if the block succeeds.

    A directory replaces the directory of the same name, a file the file.

    Raises:
        ExportError: Something cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx.") as name:
            draft = Path(name)
            yield draft
            for entry in sorted(draft.iterdir()):
                target = folder / entry.name
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                os.replace(entry, target)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error
