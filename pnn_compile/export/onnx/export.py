"""Export a network: lower it, write it as one file or as stage models, and verify what was written.

The files are drafted in a temporary directory beside their destination and move there once all
checks have passed, so that a failed export leaves what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from passes.errors import ArtifactError, ExportError
from passes.ir.isolation import preserved
from pnn_compile.atomic import replace_entries
from pnn_compile.export.onnx.lower import Lowered, lower_network
from pnn_compile.export.onnx.manifest import MANIFEST
from pnn_compile.export.onnx.run import StageExecutor, session
from pnn_compile.export.onnx.stages import write_stages
from pnn_compile.export.onnx.translate import OPSET
from pnn_compile.export.onnx.verify import Checked, check_form, check_values
from pnn_compile.export.onnx.write import IR_VERSION, save_model, write_model

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_T = TypeVar("_T")


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
    lowered: Lowered | None = None,
) -> Exported:
    """Write the network in evaluation mode, with a dynamic batch if the program has one.

    Args:
        compiled: The network.
        path: File to write; per stage, the directory of `manifest.json` and `stages/`. What is
            there is replaced as a whole once everything has been checked.
        per_stage: Whether to write a model per stage and their manifest, instead of one model.
        verify: Whether to check form, types and values of what was written.
        lowered: Result of `lower_network` for the same network, if it is written twice.

    Raises:
        ExportError: A package is missing, an operator has no ONNX form, the files cannot be
            written, or ONNX Runtime disagrees with torch.
    """
    lowered = lowered or lower_network(compiled)
    write = _export_stages if per_stage else _export_whole
    with preserved(compiled.module), torch.no_grad():
        compiled.module.eval()
        return write(compiled, lowered, Path(path), verify)


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
    return Exported(target, written, nodes, OPSET, IR_VERSION, checked)


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
    return Exported(written[0], written, nodes, OPSET, IR_VERSION, checked)


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
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error
