"""What every node costs: shapes and aliases, FLOPs, bytes, seconds, memory.

In: a `Program`, and a device profile where seconds are asked for. Out: facts and costs by node.
Read `node_facts.py` first, then `flops.py`, which says what an operator costs.
"""
