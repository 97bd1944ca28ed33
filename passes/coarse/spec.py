"""What a plan says of a guess or a coarse propagator: family, options, cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CoarseSpec", "Trial"]


@dataclass(frozen=True)
class Trial:
    """A network that calibration tried for one place of the plan.

    Attributes:
        name: Family, rank and what it reads.
        flops: Forward FLOPs of one call at the example inputs.
        error: Error that it leaves on held-out samples, relative to the state.
    """

    name: str
    flops: int
    error: float


@dataclass(frozen=True)
class CoarseSpec:
    """A cheap network and what it costs: a preprocessing operator or a coarse propagator.

    Attributes:
        family: Name of the family in `passes.coarse`.
        options: What the family needs to build the same network again.
        flops: Forward FLOPs of one call at the example inputs.
        parameters: Number of parameters that it does not share with the fine stages.
        linear: Whether it is a linear map of its state.
        why: Why this family was chosen.
        tried: What it was chosen from, where calibration chose it.
        seconds: Of one call, as of a `Stage`: measured by itself, or by roofline; else None.
        backward_seconds: The part of `seconds` on the way back.
    """

    family: str
    options: Mapping[str, Any]
    flops: int
    parameters: int
    linear: bool
    why: str = ""
    tried: tuple[Trial, ...] = ()
    seconds: float | None = None
    backward_seconds: float | None = None
