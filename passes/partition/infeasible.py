"""Why a model does not fit its devices: by how much, on which stage, and how many would do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from passes.cost.device_profile import DeviceProfile
from passes.ir.program import provenance
from passes.partition.build_problem import Pricing
from passes.partition.dp import Bounds, Cheapest

__all__ = ["explain", "held"]

_CLOSE = 1e-3
"""Share of the bytes too many to which they are told."""
_ANY = Bounds(0.0, math.inf, math.inf)


def held(pricing: Pricing, cuts: Sequence[int]) -> list[float]:
    """Bytes that every device holds, by the estimates that cuts are chosen with."""
    places = [0, *(pricing.ends[cut].index for cut in cuts[:-1])]
    stops = [*places[1:], len(pricing.analysis.frontiers.order)]
    nodes = pricing.memory.nodes(torch.tensor(places), torch.tensor(stops)).tolist()
    entry = pricing.entry_bytes()
    extra = [0.0, *(entry[cut] for cut in cuts[:-1])]
    return [a + b for a, b in zip(nodes, extra, strict=True)]


def explain(
    pricing: Pricing,
    devices: Sequence[DeviceProfile | None],
    cuts: Sequence[int] | None = None,
) -> str:
    """Say that a model does not fit, on which stage and by how much, and what number would do.

    Args:
        pricing: Its prices.
        devices: By stage.
        cuts: Those that were asked for; None for those that come closest to fitting.
    """
    cuts = cuts or _closest(pricing, devices)
    needs = held(pricing, cuts)
    over = [
        need - (device.memory if device else math.inf)
        for need, device in zip(needs, devices, strict=True)
    ]
    worst = max(range(len(over)), key=lambda number: over[number])
    device = devices[worst]
    assert device is not None
    start = pricing.ends[cuts[worst - 1]].index if worst else 0
    stop = pricing.ends[cuts[worst]].index
    order = pricing.analysis.frontiers.order
    first, last = (provenance(node).path or node.name for node in (order[start], order[stop - 1]))
    head = " with the head" if worst == len(cuts) - 1 else ""
    what = "a training step" if pricing.training else "inference"
    return (
        f"{pricing.analysis.program.name} does not fit {len(cuts)} devices: in {what}, stage "
        f"{worst} ({first} .. {last}{head}) needs {_size(needs[worst])}, "
        f"{_size(over[worst])} more than the {_size(device.memory)} of {device.name!r}; "
        f"{_advice(pricing, len(cuts))}, or take a smaller batch"
    )


def _closest(pricing: Pricing, devices: Sequence[DeviceProfile | None]) -> tuple[int, ...]:
    """The cuts that go beyond the memory of any device by as little as possible."""

    def cuts(extra: float) -> tuple[int, ...]:
        return Cheapest(pricing.problem(devices, extra))(_ANY).cuts

    low, high = 0.0, 1e6
    while not (found := cuts(high)):
        low, high = high, 4 * high
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        if closer := cuts(middle):
            found, high = closer, middle
        else:
            low = middle
    return found


def _advice(pricing: Pricing, stages: int) -> str:
    listed = pricing.options.devices
    most = len(pricing.ends) if len(listed) == 1 else min(len(listed), len(pricing.ends))

    def fits(count: int) -> bool:
        return bool(Cheapest(pricing.problem(pricing.devices(count)))(_ANY).cuts)

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
    """Numbers of stages above one, in steps that grow, up to the most."""
    found, step = [], 1
    while (stages := stages + step) < most:
        found.append(stages)
        step *= 2
    return [*found, most] if stages - step < most else found


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
