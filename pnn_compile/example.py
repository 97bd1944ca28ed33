"""Example inputs, in the ways in which users give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from passes.errors import OptionError

__all__ = ["example"]


def example(
    model: nn.Module,
    example_inputs: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Bring example inputs, as users give them, to positional and keyword arguments.

    Raises:
        OptionError: There are none, or they are given in two ways.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module (got {type(model).__name__})")
    if example_inputs is None and not args and not kwargs:
        raise OptionError(
            f"{type(model).__name__} needs example inputs: "
            "pnn.compile(model, torch.randn(2, 3, 32, 32)), or args=..., kwargs=..."
        )
    if example_inputs is None:
        return tuple(args), dict(kwargs or {})
    if args or kwargs:
        raise OptionError("give either example_inputs or args and kwargs, not both")
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}
