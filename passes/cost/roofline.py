"""Seconds of every node on a device that is not at hand, by the roofline model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from passes.cost.device_profile import DeviceProfile
from passes.cost.flops import Cost
from passes.cost.node_facts import Fact

__all__ = ["roofline"]

_BACK = 2
"""Operators and bytes of the way back per one of the way forward: a gradient for each operand."""


def roofline(
    costs: Mapping[fx.Node, Cost],
    facts: Mapping[fx.Node, Fact],
    profile: DeviceProfile,
    *,
    backward: bool,
) -> dict[fx.Node, Cost]:
    """Weigh nodes by the seconds that a device would take.

    A node takes what its FLOPs need at the rate of its dtype or what its bytes need in memory,
    whichever is more, and the launches of its operators (`DeviceProfile.seconds`). The way back
    launches twice the operators and moves twice the bytes.

    Args:
        costs: What every node costs.
        facts: What was observed of it.
        profile: The device.
        backward: Whether the way back counts too.
    """
    found = {}
    for node, cost in costs.items():
        spec = facts[node].spec
        dtype = spec.dtype if spec is not None else "float32"
        forward = profile.seconds(cost.flops, cost.moved, dtype, cost.operators)
        back = 0.0
        if backward and cost.operators:
            back = profile.seconds(
                cost.backward_flops, _BACK * cost.moved, dtype, _BACK * cost.operators
            )
        found[node] = dataclasses.replace(cost, weight=forward + back, backward=back)
    return found
