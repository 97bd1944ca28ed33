"""From a module to a `Program`: front ends from the best to the last, each held against the model.

In: a module with example inputs. Out: a validated `Program`. Read `ladder.py` first, then
`equivalence.py` for what makes the compiler believe a graph.
"""

from passes.capture.ladder import capture

__all__ = ["capture"]
