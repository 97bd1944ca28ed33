"""Exports a network: lowers it once, writes one file or one per stage, checks what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from passes.errors import ArtifactError, ExportError
from passes.ir.isolation import preserved
from pnn_compile.export.onnx.check import Checked, check_form, check_values
from pnn_compile.export.onnx.executor import StageExecutor, session
from pnn_compile.export.onnx.files import drafting, save
from pnn_compile.export.onnx.lower import LoweredPiece, lower
from pnn_compile.export.onnx.manifest import (
    MANIFEST,
    File,
    Manifest,
    ModelEntry,
    Run,
    Tensor,
    checksum,
)
from pnn_compile.export.onnx.observe import Spec, observe
from pnn_compile.export.onnx.steps import Steps, read_steps
from pnn_compile.export.onnx.tasks import Task, tasks
from pnn_compile.export.onnx.translate import OPSET
from pnn_compile.export.onnx.write import IR_VERSION, write

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

_T = TypeVar("_T")

__all__ = ["STAGES", "Exported", "Lowered", "export_onnx", "lower_network"]

STAGES = "stages"
"""Directory of the stage models, beside their manifest."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The model file; of stage models, their manifest.
        files: All files.
        nodes: Number of ONNX nodes.
        opset: Version of the default operator set.
        ir_version: Version of the ONNX format.
        checked: How far ONNX Runtime is from torch; None without verification.
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


@dataclass(frozen=True, eq=False)
class Lowered:
    """A network in ONNX, to be written as one file or as stage models: most of the work.

    Attributes:
        steps: What it does.
        pieces: What its pieces became.
    """

    steps: Steps
    pieces: Mapping[str, LoweredPiece]


def lower_network(compiled: Compiled) -> Lowered:
    """Translate a network to ONNX, in evaluation mode.

    Raises:
        ExportError: A package is missing, or an operator has no ONNX form.
    """
    _require_packages()
    with preserved(compiled.module), torch.no_grad():
        compiled.module.eval()
        observed = observe(compiled)
        steps = read_steps(compiled, observed)
        return Lowered(steps, lower(compiled, observed, steps))


def export_onnx(
    compiled: Compiled,
    path: str | Path,
    *,
    per_stage: bool = False,
    verify: bool = True,
    lowered: Lowered | None = None,
) -> Exported:
    """Write the network in evaluation mode, with a dynamic batch where the program has one.

    Args:
        compiled: The network.
        path: File to write; per stage, the directory of `manifest.json` and `stages/`. What is
            there is replaced as a whole once everything has been checked.
        per_stage: Whether to write a model per stage and what runs them in order, instead of one.
        verify: Whether to check form, types and values of what was written.
        lowered: What `lower_network` made of the same network, where it is written twice.

    Raises:
        ExportError: A package is missing, an operator has no ONNX form, the files cannot be
            written, or ONNX Runtime disagrees with torch.
    """
    lowered = lowered or lower_network(compiled)
    write_files = _export_stages if per_stage else _export_whole
    with preserved(compiled.module), torch.no_grad():
        compiled.module.eval()
        return write_files(compiled, lowered, Path(path), verify)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"ONNX export needs the package {error.name}: pip install 'pnn-compile[onnx]'"
        ) from error


def _export_whole(compiled: Compiled, lowered: Lowered, target: Path, verify: bool) -> Exported:
    steps = lowered.steps
    inputs = {name: steps.specs[name] for name in steps.inputs}
    name = compiled.module.__class__.__name__
    model = write(compiled.plan, lowered.pieces, steps.steps, inputs, steps.outputs, name)
    nodes = sum(1 for _ in model.graph.all_nodes())
    if target.is_dir():
        raise ExportError(f"{target} is a directory: name a file in it, such as model.onnx")
    checked = None
    with drafting(target.parent) as folder:
        files = save(model, folder / target.name)
        del model
        if verify:
            check_form(files[0])
            opened = _opened(lambda: session(files[0]))
            outputs = [public for public, _ in steps.outputs]
            checked = check_values(compiled, lambda x: opened.run(outputs, dict(x)), steps.inputs)
            del opened
    written = tuple(target.parent / file.name for file in files)
    return Exported(target, written, nodes, OPSET, IR_VERSION, checked)


def _export_stages(compiled: Compiled, lowered: Lowered, target: Path, verify: bool) -> Exported:
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file: name a directory for the stage models")
    with drafting(target) as folder:
        writer = _StageWriter(compiled, lowered, folder)
        manifest = writer.write()
        checked = None
        if verify:
            for model in manifest.models:
                check_form(folder / model.files[0].path)
            with _opened(lambda: StageExecutor(folder, check=False)) as executor:
                checked = check_values(
                    compiled, lambda x: [*executor.run(x).values()], lowered.steps.inputs
                )
    files = [target / file.path for model in manifest.models for file in model.files]
    written = (target / MANIFEST, *files)
    return Exported(written[0], written, writer.nodes, OPSET, IR_VERSION, checked)


def _opened(opening: Callable[[], _T]) -> _T:
    """Open what was written; a runtime that cannot is an error of the export."""
    try:
        return opening()
    except ArtifactError as error:
        raise ExportError(
            f"{error}; --no-verify (verify=False) keeps the files all the same"
        ) from error


class _StageWriter:
    """Writes a model per task, one for tasks of the same form, and the manifest."""

    def __init__(
        self,
        compiled: Compiled,
        lowered: Lowered,
        folder: Path,
    ) -> None:
        self.compiled = compiled
        self.steps = lowered.steps
        self.pieces = lowered.pieces
        self.folder = folder
        self.nodes = 0
        self.models: dict[tuple[object, ...], ModelEntry] = {}

    def write(self) -> Manifest:
        (self.folder / STAGES).mkdir()
        plan = self.compiled.plan
        # The network's own names for what it gives take the place of the values' names.
        public = {value: name for name, value in self.steps.outputs}
        runs = [
            self._run(task, public)
            for task in tasks(self.steps, collapsed=plan.sweep == "collapsed")
        ]
        manifest = Manifest(
            network=plan.model,
            stages=len(plan.stages),
            correction=plan.correction,
            sweep=plan.sweep,
            iterations=plan.iterations,
            opset=OPSET,
            ir_version=IR_VERSION,
            inputs=self._tensors([(name, name) for name in self.steps.inputs]),
            outputs=self._tensors(self.steps.outputs),
            models=tuple(self.models.values()),
            runs=tuple(runs),
        )
        (self.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _run(self, task: Task, public: Mapping[str, str]) -> Run:
        if task.form not in self.models:
            self.models[task.form] = self._model(task, public)
        model = self.models[task.form]
        outputs = tuple(public.get(name, name) for name in task.outputs)
        return Run(model.name, task.stage, task.iteration, task.inputs, outputs)

    def _model(self, task: Task, public: Mapping[str, str]) -> ModelEntry:
        name = {"stage": f"stage_{task.stage}", "head": "head"}.get(
            task.kind, f"stage_{task.stage}_{task.kind}"
        )
        taken = {model.name for model in self.models.values()}
        name = next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in taken)
        inputs = {value: self.steps.specs[value] for value in task.inputs}
        outputs = [(public.get(value, value), value) for value in task.outputs]
        plan = self.compiled.plan
        model = write(plan, self.pieces, task.steps, inputs, outputs, name)
        self.nodes += sum(1 for _ in model.graph.all_nodes())
        files = save(model, self.folder / STAGES / f"{name}.onnx")
        return ModelEntry(
            name=name,
            stage=task.stage,
            roles=task.roles,
            inputs=self._tensors([(value, value) for value in task.inputs]),
            outputs=self._tensors(outputs),
            files=tuple(
                File(f"{STAGES}/{file.name}", file.stat().st_size, checksum(file)) for file in files
            ),
        )

    def _tensors(self, names: Sequence[tuple[str, str]]) -> tuple[Tensor, ...]:
        return tuple(_tensor(public, self.steps.specs[value]) for public, value in names)


def _tensor(name: str, spec: Spec) -> Tensor:
    return Tensor(name, spec.dims, str(spec.dtype).removeprefix("torch."))
