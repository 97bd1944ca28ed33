"""Estimate the seconds of every node on a device that is not at hand, by the roofline model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from passes.cost.device_profile import DeviceProfile
from passes.cost.flops import NodeCost
from passes.cost.node_facts import Fact

_BACKWARD_FACTOR = 2
"""Operators and bytes of the backward pass per one of the forward pass: a gradient per operand."""


def roofline_costs(
    costs: Mapping[fx.Node, NodeCost],
    facts: Mapping[fx.Node, Fact],
    profile: DeviceProfile,
    *,
    backward: bool,
) -> dict[fx.Node, NodeCost]:
    """Replace the cost of every node by its seconds on a device.

    A node takes the time of its FLOPs at the rate of its dtype or the time of its bytes in memory,
    whichever is longer, and the launches of its operators (`DeviceProfile.seconds`). The backward
    pass launches twice the operators and moves twice the bytes.

    Args:
        costs: Counted costs by node.
        facts: Observed facts by node.
        profile: The device.
        backward: Whether the backward pass counts too.
    """
    estimated = {}
    for node, cost in costs.items():
        spec = facts[node].spec
        dtype = spec.dtype if spec is not None else "float32"
        forward = profile.seconds(cost.flops, cost.moved, dtype, cost.operators)
        backward_seconds = 0.0
        if backward and cost.operators:
            backward_seconds = profile.seconds(
                cost.backward_flops,
                _BACKWARD_FACTOR * cost.moved,
                dtype,
                _BACKWARD_FACTOR * cost.operators,
            )
        estimated[node] = dataclasses.replace(
            cost, cost=forward + backward_seconds, backward=backward_seconds
        )
    return estimated
