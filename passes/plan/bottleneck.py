"""What keeps a step from being N times as fast, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from passes.analysis.analysis import Analysis
from passes.plan.schema import Plan

__all__ = ["LIMITS", "find_limit", "is_block"]

LIMITS = {
    "block": "the largest piece that cannot be cut",
    "imbalance": "stages that legal cuts leave unequal",
    "preprocessing": "the guesses of the states",
    "coarse": "the coarse sweep",
    "link": "the links",
    "head": "the head, which one device computes alone",
    "bubble": "devices that wait for their first and last micro-batch",
    "none": "nothing but the number of devices",
}
_LITTLE = 0.01
"""Share of an equal part of the original below which a loss is none."""


def find_limit(parts: Mapping[str, float], sequential: float, count: int) -> str:
    """What costs most beyond an equal share of the original on every device.

    Args:
        parts: What a step on `count` devices is made of: "fine", "head" and anything else.
        sequential: What the original takes on one device.
        count: Number of devices.

    Returns:
        A key of `LIMITS`, or "fine" where a device computes more of the original than its share.
    """
    lost = dict(parts)
    head = lost.get("head", 0.0)
    lost["head"] = head * (1 - 1 / count)
    lost["fine"] -= (sequential - head) / count
    worst = max(lost, key=lambda name: lost[name])
    return worst if lost[worst] > _LITTLE * sequential / count else "none"


def is_block(analysis: Analysis, plan: Plan, weigh: Callable[[fx.Node], float]) -> bool:
    """Whether no legal cut lies inside the slowest fine stage of a plan."""
    order = analysis.frontiers.order
    place = {node.name: index for index, node in enumerate(order)}
    spans = [(place[stage.first], place[stage.last] + 1) for stage in plan.stages]
    start, stop = max(spans, key=lambda span: sum(map(weigh, order[slice(*span)])))
    return not any(start < p.index < stop for p in analysis.frontiers.positions)
