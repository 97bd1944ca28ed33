"""Steps of a network in groups that run without a pause: what becomes one stage model each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pnn_compile.export.onnx.steps import Step, Steps

__all__ = ["Task", "tasks"]


@dataclass(frozen=True)
class Task:
    """A group of steps of one stage.

    Attributes:
        kind: "stage" (guess and fine stage), "fine" (a fine stage again, in a later iteration),
            "correct" (residual, coarse propagator and correction) or "head".
        stage: The stage.
        iteration: The parareal iteration.
        steps: The steps, in order.
        inputs: Values from outside that they read.
        outputs: Values that others read.
    """

    kind: str
    stage: int
    iteration: int
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """What the steps do, in order."""
        return tuple(dict.fromkeys(step.place.role for step in self.steps))

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for tasks that compute the same of other values: they share a model."""
        number: dict[str, int] = {}
        for name in self.inputs:
            number[name] = len(number)
        lines = []
        for step in self.steps:
            read = tuple(number[name] for name in step.inputs)
            for name in step.outputs:
                number[name] = len(number)
            lines.append((step.target, read, len(step.outputs)))
        return self.kind, self.stage, tuple(lines), tuple(number[n] for n in self.outputs)


def tasks(network: Steps, *, collapsed: bool) -> list[Task]:
    """Group the steps, in an order in which the groups can run.

    Args:
        network: The steps.
        collapsed: Whether the sweep is collapsed: then the corrections of all stages are added
            up at the last one, and the head begins with that.
    """
    groups: dict[tuple[str, int, int], list[Step]] = {}
    for step in network.steps:
        kind = _KINDS[step.place.role]
        if step.place.role == "correct" and collapsed:
            kind = "head"
        if step.place.role == "fine" and step.place.iteration:
            kind = "fine"
        groups.setdefault((kind, step.place.stage, step.place.iteration), []).append(step)
    readers: dict[str, set[tuple[str, int, int]]] = {}
    for key, steps in groups.items():
        for name in (name for step in steps for name in step.inputs):
            readers.setdefault(name, set()).add(key)
    public = {value for _, value in network.outputs}
    return [_task(key, steps, readers, public) for key, steps in groups.items()]


_KINDS = {
    "preprocess": "stage", "fine": "stage", "residual": "correct", "coarse": "correct",
    "correct": "correct", "head": "head",
}  # fmt: skip


def _task(
    key: tuple[str, int, int],
    steps: Iterable[Step],
    readers: Mapping[str, set[tuple[str, int, int]]],
    public: set[str],
) -> Task:
    steps = tuple(steps)
    made = [name for step in steps for name in step.outputs]
    read = dict.fromkeys(name for step in steps for name in step.inputs)
    inputs = tuple(name for name in read if name not in made)
    outputs = tuple(n for n in made if n in public or readers.get(n, set()) - {key})
    return Task(*key, steps, inputs, outputs)
