"""Families of cheap networks: preprocessing operators C_j and coarse propagators F_j.

In: types of the states, and a `CoarseSpec`. Out: modules, their costs, and closed-form fits. Read
`family.py` first: it lists the families.
"""

from passes.coarse.family import FAMILIES, Family, build_coarse, build_preprocess
from passes.coarse.spec import CoarseOptions, CoarseSpec, PreprocessOptions, PreprocessSpec

__all__ = [
    "FAMILIES",
    "CoarseOptions",
    "CoarseSpec",
    "Family",
    "PreprocessOptions",
    "PreprocessSpec",
    "build_coarse",
    "build_preprocess",
]
