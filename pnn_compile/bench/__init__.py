"""`bench`: a parareal network beside what else N processes could do with the model, in one run."""

from pnn_compile.bench.measure import bench
from pnn_compile.bench.result import Bench, Parts, Timing

__all__ = ["Bench", "Parts", "Timing", "bench"]
