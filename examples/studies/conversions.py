"""The ways to convert a trained original, and how each is fitted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["ATTEMPTS", "AUTO", "CONVERSIONS", "Conversion"]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Options of the compiler, and of the fit that follows.

    Attributes:
        options: Options of `pnn.compile`.
        epochs: Epochs of the fit.
        rate: Peak learning rate of the fit over the preset's.
        dropout: Whether dropout is active in the fit.
        interfaces: Whether every interface trains by itself first, for one epoch.
        controls: Whether the controls are given the same fit, beside it.
    """

    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 1
    rate: float = 1.0
    dropout: bool = False
    interfaces: bool = False
    controls: bool = False


AUTO = Conversion(options={"prologue": 0.07})
"""The measured choice within a coarse budget of 5 %, 7 % of first layers copied into guesses."""

CONVERSIONS = {
    "parareal, fixed rank": Conversion(
        options={"coarse": "lowrank+linear", "preprocess": "lowrank+linear"}
    ),
    "parareal, auto": AUTO,
}
"""Guesses from the input and rank 32 everywhere, or the measured choice."""

_AT_POOLING = {"cuts": ["features.14", "features.24"]}

ATTEMPTS = {
    "auto": replace(AUTO, controls=True),
    "all together": Conversion(
        options={"prologue": 0.15, **_AT_POOLING}, controls=True
    ),
    "cut at poolings": Conversion(options={**AUTO.options, **_AT_POOLING}),
    "with dropout in the fit": replace(AUTO, dropout=True, controls=True),
    "twice the first layers": Conversion(options={"prologue": 0.15}),
    "unit in difference form": Conversion(
        options={
            **AUTO.options, "coarse": "lowrank+linear+conv", "correction": "difference",
            "coarse_budget": 0.5,
        }
    ),
    "interfaces first": Conversion(options=AUTO.options, interfaces=True),
    "smaller steps": Conversion(options=AUTO.options, rate=0.25),
    "three epochs": Conversion(options=AUTO.options, epochs=3, controls=True),
}  # fmt: skip
"""What was tried to convert VGG-16 at three stages."""
