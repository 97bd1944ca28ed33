"""What every kind of source gives: a model and what to call it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Inputs", "Source"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


@dataclass(frozen=True)
class Source:
    """A model and what to call it with.

    Attributes:
        model: The model, freshly built.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        origin: What was taken, in the form that `load_source` takes: `file.py:build_model`.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str
