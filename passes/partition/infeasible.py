"""Explain why a model does not fit its devices: which stage, by how much, and how many would do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from passes.cost.device_profile import DeviceProfile
from passes.ir.program import provenance
from passes.partition.build_problem import ProblemBuilder
from passes.partition.dp import DynamicProgram, StageBounds

_TOLERANCE = 1e-3
"""Relative tolerance of the reported memory excess."""
_NO_BOUNDS = StageBounds(0.0, math.inf, math.inf)


def memory_by_device(builder: ProblemBuilder, cuts: Sequence[int]) -> list[float]:
    """Return the bytes on every device, by the estimates that cuts are chosen with."""
    starts = [0, *(builder.positions[cut].index for cut in cuts[:-1])]
    stops = [*starts[1:], len(builder.analysis.frontiers.order)]
    nodes = builder.memory.nodes(
        torch.tensor(starts, device="cpu"), torch.tensor(stops, device="cpu")
    ).tolist()
    entry = builder.entry_bytes()
    extra = [0.0, *(entry[cut] for cut in cuts[:-1])]
    return [a + b for a, b in zip(nodes, extra, strict=True)]


def explain_misfit(
    builder: ProblemBuilder,
    devices: Sequence[DeviceProfile | None],
    cuts: Sequence[int] | None = None,
) -> str:
    """Say which stage exceeds its memory and by how much, and how many stages would fit.

    Args:
        builder: Builder of the cut problems.
        devices: By stage.
        cuts: The cuts that the user named; None for those that come closest to fitting.
    """
    cuts = cuts or _closest(builder, devices)
    needs = memory_by_device(builder, cuts)
    excess = [
        need - (device.memory if device else math.inf)
        for need, device in zip(needs, devices, strict=True)
    ]
    worst = max(range(len(excess)), key=lambda number: excess[number])
    device = devices[worst]
    assert device is not None
    start = builder.positions[cuts[worst - 1]].index if worst else 0
    stop = builder.positions[cuts[worst]].index
    order = builder.analysis.frontiers.order
    first, last = (provenance(node).path or node.name for node in (order[start], order[stop - 1]))
    head = " with the head" if worst == len(cuts) - 1 else ""
    what = "a training step" if builder.options.training else "inference"
    return (
        f"{builder.analysis.program.name} does not fit {len(cuts)} devices: in {what}, stage "
        f"{worst} ({first} .. {last}{head}) needs {_size(needs[worst])}, "
        f"{_size(excess[worst])} more than the {_size(device.memory)} of {device.name!r}; "
        f"{_advice(builder, len(cuts))}, or take a smaller batch"
    )


def _closest(builder: ProblemBuilder, devices: Sequence[DeviceProfile | None]) -> tuple[int, ...]:
    """Find the cuts whose largest memory excess is least, by bisection."""

    def cuts(extra_memory: float) -> tuple[int, ...]:
        return DynamicProgram(builder.build(devices, extra_memory)).solve(_NO_BOUNDS).cuts

    low, high = 0.0, 1e6
    while not (closest := cuts(high)):
        low, high = high, 4 * high
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        if closer := cuts(middle):
            closest, high = closer, middle
        else:
            low = middle
    return closest


def _advice(builder: ProblemBuilder, stages: int) -> str:
    """Say how many stages would fit, by steps that grow and then bisection."""
    listed, positions = builder.options.devices, len(builder.positions)
    most = positions if len(listed) == 1 else min(len(listed), positions)

    def fits(count: int) -> bool:
        problem = builder.build(builder.devices(count))
        return bool(DynamicProgram(problem).solve(_NO_BOUNDS).cuts)

    count = next((n for n in _growing(stages, most) if fits(n)), None)
    if count is None:
        return (
            f"no number of these devices up to {most} holds it: take devices of more memory"
            if len(listed) == 1
            else f"nor do {most} of the listed devices hold it: list more, or larger ones"
        )
    low = stages
    while count - low > 1:
        middle = (low + count) // 2
        low, count = (low, middle) if fits(middle) else (middle, count)
    return f"{count} stages would fit"


def _growing(stages: int, most: int) -> list[int]:
    """List numbers of stages above `stages`, in steps that double, up to `most`.

    >>> _growing(2, 12)
    [3, 5, 9, 12]
    """
    counts, step = [], 1
    while (stages := stages + step) < most:
        counts.append(stages)
        step *= 2
    return [*counts, most] if stages - step < most else counts


def _size(count: float) -> str:
    """Format a number of bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
