"""Write a network as stage models: groups of operations that run without waiting for other stages.

The operations of a stage form groups, each of which becomes one model:

    stage_1          preprocess_1, fine_1       needs inputs of the network alone
    stage_1_correct  residual, coarse, correct  needs the state after stage 0
    stage_1_fine     fine_1 on a corrected state, in iterations after the first
    head             head, at the last stage; in a collapsed sweep it adds the corrections first

Groups that compute the same of other values, such as `correct` in every iteration, share a model.
The manifest lists the models, and the runs in an order in which one thread could do all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from passes.plan.schema import Plan
from passes.transform.sweep import Role
from pnn_compile.export.onnx.lower import Lowered, Operation
from pnn_compile.export.onnx.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    ModelEntry,
    RunEntry,
    TensorEntry,
    checksum,
)
from pnn_compile.export.onnx.write import IR_VERSION, save_model, write_model

STAGES = "stages"
"""Directory of the stage models, beside their manifest."""

_GROUPS = {
    Role.PREPROCESS: "stage", Role.FINE: "stage", Role.RESIDUAL: "correct",
    Role.COARSE: "correct", Role.CORRECT: "correct", Role.HEAD: "head",
}  # fmt: skip


@dataclass(frozen=True)
class OperationGroup:
    """Operations of one stage that run without a pause.

    Attributes:
        kind: "stage" (preprocessing operator and fine stage), "fine" (a fine stage in a later
            iteration), "correct" (residual, coarse propagator and correction) or "head".
        stage: Number of the stage.
        iteration: Number of the iteration.
        operations: The operations, in order.
        inputs: Values from outside that they read.
        outputs: Values that other groups or the user read.
    """

    kind: str
    stage: int
    iteration: int
    operations: tuple[Operation, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the operations, in order."""
        return tuple(dict.fromkeys(operation.step.role for operation in self.operations))

    @property
    def structure(self) -> tuple[object, ...]:
        """What it computes, up to names of values; groups with equal structures share a model."""
        number: dict[str, int] = {}
        for name in self.inputs:
            number[name] = len(number)
        lines = []
        for operation in self.operations:
            read = tuple(number[name] for name in operation.inputs)
            for name in operation.outputs:
                number[name] = len(number)
            lines.append((operation.target, read, len(operation.outputs)))
        return self.kind, self.stage, tuple(lines), tuple(number[n] for n in self.outputs)


def group_operations(lowered: Lowered, *, collapsed: bool) -> list[OperationGroup]:
    """Group the operations of a network, in an order in which the groups can run.

    Args:
        lowered: The network.
        collapsed: Whether the sweep is collapsed: the last stage adds the corrections of all
            stages, in the group of the head.
    """
    members: dict[tuple[str, int, int], list[Operation]] = {}
    for operation in lowered.operations:
        step = operation.step
        kind = _GROUPS[step.role]
        if step.role is Role.CORRECT and collapsed:
            kind = "head"
        if step.role is Role.FINE and step.iteration:
            kind = "fine"
        if step.writes.letter == "p":  # a prediction that waits for no other stage
            kind = "stage"
        members.setdefault((kind, step.stage, step.iteration), []).append(operation)
    readers: dict[str, set[tuple[str, int, int]]] = {}
    for key, operations in members.items():
        for name in (name for operation in operations for name in operation.inputs):
            readers.setdefault(name, set()).add(key)
    public = {value for _, value in lowered.outputs}
    groups = []
    for key, operations in members.items():
        computed = [name for operation in operations for name in operation.outputs]
        read = dict.fromkeys(name for operation in operations for name in operation.inputs)
        inputs = tuple(name for name in read if name not in computed)
        outputs = tuple(n for n in computed if n in public or readers.get(n, set()) - {key})
        groups.append(OperationGroup(*key, tuple(operations), inputs, outputs))
    return groups


def write_stages(plan: Plan, lowered: Lowered, folder: Path) -> tuple[Manifest, int]:
    """Write the models and the manifest into a directory.

    Returns:
        The manifest, and the number of ONNX nodes of all models.
    """
    writer = _StageWriter(plan, lowered, folder)
    return writer.write(), writer.nodes


class _StageWriter:
    """Writes a model per group, one for groups of the same structure."""

    def __init__(self, plan: Plan, lowered: Lowered, folder: Path) -> None:
        self.plan = plan
        self.lowered = lowered
        self.folder = folder
        self.nodes = 0
        self.models: dict[tuple[object, ...], ModelEntry] = {}
        # Outputs of the network have their public names in the models as well.
        self.public = {value: name for name, value in lowered.outputs}

    def write(self) -> Manifest:
        (self.folder / STAGES).mkdir()
        groups = group_operations(self.lowered, collapsed=self.plan.sweep == "collapsed")
        runs = tuple(self._run(group) for group in groups)
        manifest = Manifest(
            network=self.plan.model,
            stages=len(self.plan.stages),
            correction=self.plan.correction,
            sweep=self.plan.sweep,
            iterations=self.plan.iterations,
            opset=self.lowered.opset,
            ir_version=IR_VERSION,
            inputs=self._tensors([(name, name) for name in self.lowered.inputs]),
            outputs=self._tensors(self.lowered.outputs),
            models=tuple(self.models.values()),
            runs=runs,
        )
        (self.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _run(self, group: OperationGroup) -> RunEntry:
        if group.structure not in self.models:
            self.models[group.structure] = self._model(group)
        model = self.models[group.structure]
        outputs = tuple(self.public.get(name, name) for name in group.outputs)
        return RunEntry(model.name, group.stage, group.iteration, group.inputs, outputs)

    def _model(self, group: OperationGroup) -> ModelEntry:
        name = self._model_name(group)
        outputs = [(self.public.get(value, value), value) for value in group.outputs]
        model = write_model(self.plan, self.lowered, group.operations, group.inputs, outputs, name)
        self.nodes += sum(1 for _ in model.graph.all_nodes())
        files = save_model(model, self.folder / STAGES / f"{name}.onnx")
        return ModelEntry(
            name=name,
            stage=group.stage,
            roles=group.roles,
            inputs=self._tensors([(value, value) for value in group.inputs]),
            outputs=self._tensors(outputs),
            files=tuple(
                FileEntry(f"{STAGES}/{file.name}", file.stat().st_size, checksum(file))
                for file in files
            ),
        )

    def _model_name(self, group: OperationGroup) -> str:
        names = {"stage": f"stage_{group.stage}", "head": "head"}
        name = names.get(group.kind, f"stage_{group.stage}_{group.kind}")
        taken = {model.name for model in self.models.values()}
        # The first iteration may read other values than later ones, and then has its own model.
        return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in taken)

    def _tensors(self, names: Sequence[tuple[str, str]]) -> tuple[TensorEntry, ...]:
        entries = []
        for public, value in names:
            spec = self.lowered.specs[value]
            dtype = str(spec.dtype).removeprefix("torch.")
            entries.append(TensorEntry(public, spec.dims, dtype))
        return tuple(entries)
