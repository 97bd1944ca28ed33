"""Costs of every node: shapes and aliases, FLOPs, bytes, seconds, memory.

In: a `Program`, and a device profile for seconds on another device. Out: facts and costs by node.
Read `node_facts.py` first, then `axes.py`, which tells samples and positions apart, and `flops.py`,
which defines the cost of an operator.
"""

from passes.cost.device_profile import DeviceProfile, read_profile, roofline_costs, write_profile
from passes.cost.flops import NodeCost, count_work, measure_costs
from passes.cost.measured import Seconds, measure_network, measure_seconds
from passes.cost.memory import Memory, last_fitting_ends
from passes.cost.node_facts import observe
from passes.ir.observer import Fact

__all__ = [
    "DeviceProfile",
    "Fact",
    "Memory",
    "NodeCost",
    "Seconds",
    "count_work",
    "last_fitting_ends",
    "measure_costs",
    "measure_network",
    "measure_seconds",
    "observe",
    "read_profile",
    "roofline_costs",
    "write_profile",
]
