"""Benchmarks: measure a parareal network beside other ways to run its model, on the same devices.

In: a compiled network. Out: timings, as plain data. Read `contenders.py` first, then
`processes.py` (one process a rank) and `gpu_streams.py` (all stages on one GPU).
"""

from pnn_compile.bench.measurements import Bench, Parts, Timing
from pnn_compile.bench.processes import bench

__all__ = ["Bench", "Parts", "Timing", "bench"]
