"""Structure of a program: legal cuts, repeated blocks, side values, dependence on inputs.

In: a `Program` with facts and costs. Out: an `Analysis`, which decides nothing. Read
`cut_points.py` first: it defines which cuts are legal.
"""

from passes.analysis.analysis import MEASURED, ROOFLINE, Analysis, CostSource, analyze
from passes.analysis.blocks import Block
from passes.analysis.cut_points import Frontiers, Position, requirements
from passes.analysis.sources import PreprocessingSource

__all__ = [
    "MEASURED",
    "ROOFLINE",
    "Analysis",
    "Block",
    "CostSource",
    "Frontiers",
    "Position",
    "PreprocessingSource",
    "analyze",
    "requirements",
]
