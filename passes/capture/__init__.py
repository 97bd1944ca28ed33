"""From a module to a `Program`: front ends from the best to the last, each validated.

In: a module with example inputs. Out: a validated `Program`. Read `ladder.py` first, then
`equivalence.py`, which decides whether a graph equals the model.
"""

from passes.capture.ladder import capture
from passes.capture.train_eval import ByMode

__all__ = ["ByMode", "capture"]
