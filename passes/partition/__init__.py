"""Choose the cuts: the step-time objective as pure numbers, and a search that proves its answer.

In: an `Analysis` and options. Out: a `Cut`, with the proof of how good it is. Read `problem.py`
first, then `dp.py` and `search.py`; `choose_cuts.py` builds the problem from an analysis.
"""

from passes.partition.choose_cuts import Cut, choose_cut
from passes.partition.problem import CutProblem, PositionCosts, makespan, serial
from passes.partition.search import CutSolution, DoesNotFit, solve

__all__ = [
    "Cut",
    "CutProblem",
    "CutSolution",
    "DoesNotFit",
    "PositionCosts",
    "choose_cut",
    "makespan",
    "serial",
    "solve",
]
