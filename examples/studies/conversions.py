"""The ways to convert a trained original, and how each is fitted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["ATTEMPTS", "AT_CONVERGENCE", "AUTO", "CONVERSIONS", "LENGTHS", "Conversion"]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Options of the compiler, and of the fit that follows.

    Attributes:
        options: Options of `pnn.compile`.
        epochs: Epochs of the fit, end to end.
        interfaces: Epochs before that in which every guess and correction learns by itself.
        rate: Peak learning rate of the fit over the preset's.
        dropout: Whether dropout is active in the fit.
        controls: Whether the controls are given the same fit, beside it.
        labels: Weight of the loss on labels, beside the distance from the original's outputs.
        slow: Learning rate of the stages over that of guesses and corrections.
    """

    options: dict[str, Any] = field(default_factory=dict)
    epochs: float = 1
    interfaces: float = 0
    rate: float = 1.0
    dropout: bool = False
    controls: bool = False
    labels: float = 0.0
    slow: float = 1.0


AUTO = Conversion(options={"prologue": 0.07}, controls=True)
"""The measured choice within a coarse budget of 5 %, 7 % of first layers copied into guesses."""

CONVERSIONS = {
    "parareal, fixed rank": Conversion(
        options={"coarse": "lowrank+linear", "preprocess": "lowrank+linear"}
    ),
    "parareal, auto": AUTO,
    "parareal, thinned": Conversion(
        options={"preprocess": "thinned"}, interfaces=0.5, epochs=0.5, controls=True
    ),
    "parareal, narrow": Conversion(
        options={"preprocess": "narrow"}, interfaces=0.5, epochs=0.5, controls=True
    ),
    "copied blocks, narrow": Conversion(
        options={"preprocess": "narrow", "coarse": "units", "coarse_budget": 1.0},
        interfaces=0.5,
        epochs=0.5,
    ),
    "copied blocks, first layers": Conversion(
        options={"prologue": 0.07, "coarse": "units", "coarse_budget": 1.0}
    ),
}
"""Guesses from the input and rank 32 everywhere; the measured choice; or thinned or narrow copies
of all before as guesses, which learn by themselves for half of the one epoch that all have. The
last two correct by copied blocks, whose weights are fresh."""

_THINNED = CONVERSIONS["parareal, thinned"]
_IDENTITY = {"preprocess": "identity", "coarse": "identity"}
_MAPS = {"preprocess": "linear", "coarse": "linear", "prologue": 0.02}

AT_CONVERGENCE = CONVERSIONS | {
    "one state for all": Conversion(options={**_IDENTITY, "prologue": 0.15}),
    "larger thinned guesses": replace(_THINNED, options=_THINNED.options | {"prologue": 0.2}),
    "thinned in difference form": replace(
        _THINNED,
        options=_THINNED.options | {"coarse": "thinned", "correction": "difference"},
    ),
    "thinned to labels": replace(_THINNED, labels=1.0),
    "thinned, slow stages": replace(_THINNED, slow=0.1),
    "thinned of two stages": replace(_THINNED, options=_THINNED.options | {"stages": 2}),
    "thinned of two iterations": replace(_THINNED, options=_THINNED.options | {"iterations": 2}),
    **{
        f"in {count} windows": Conversion(options={**_MAPS, "windows": count})
        for count in (2, 3, 6, 9)
    },
    **{
        f"{count} windows, one state each": Conversion(options={**_IDENTITY, "windows": count})
        for count in (3, 4, 6, 9)
    },
    "6 windows, one state and maps": Conversion(
        options={**_IDENTITY, "coarse": "linear", "windows": 6}
    ),
    "6 windows, auto": Conversion(options={**AUTO.options, "windows": 6}),
}
"""What was tried beside them on originals that are trained to convergence.

"One state for all" is layers in parallel as a parareal network of N stages, which exists where the
state keeps its shape, and "one state each" the same in windows, which copy what changes it. The
other windows take channel maps as guesses and corrections, or the measured choice.
"""

LENGTHS = (0.1, 0.01, 0.03, 0.3, 0.005)
"""Fits as shares of the training of the original; the ones that decide first."""

_AT_POOLING = {"cuts": ["features.14", "features.24"]}

ATTEMPTS = {
    "auto": AUTO,
    "all together": Conversion(
        options={"prologue": 0.15, **_AT_POOLING}, controls=True
    ),
    "cut at poolings": Conversion(options={**AUTO.options, **_AT_POOLING}),
    "with dropout in the fit": replace(AUTO, dropout=True),
    "twice the first layers": Conversion(options={"prologue": 0.15}),
    "unit in difference form": Conversion(
        options={
            **AUTO.options, "coarse": "lowrank+linear+conv", "correction": "difference",
            "coarse_budget": 0.5,
        }
    ),
    "interfaces first": Conversion(options=AUTO.options, interfaces=1),
    "smaller steps": Conversion(options=AUTO.options, rate=0.25),
    "three epochs": Conversion(options=AUTO.options, epochs=3, controls=True),
}  # fmt: skip
"""What was tried to convert VGG-16 at three stages."""
