"""A model with its example inputs, and how `--input` texts describe those.

>>> name, mask = parse_input("mask=2x128:bool")
>>> name, tuple(mask.shape), mask.dtype
('mask', (2, 128), torch.bool)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from passes.errors import SourceError
from pnn_compile.sources.user_code import brief

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

FLOATS = ("float32", "float64", "float16", "bfloat16", "complex64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
GRAMMAR = "[name=]SIZExSIZE...[:dtype[<bound]], as in 2x3x32x32, 2x128:int64<50, mask=2x128:bool"

_INPUT = re.compile(
    r"(?:([^\W\d]\w*)=)?(?:([1-9]\d*(?:x[1-9]\d*)*)(?::([a-z]\w*)(?:<([1-9]\d{,18}))?)?)?"
)


@dataclass(frozen=True)
class Source:
    """A model and its example inputs.

    Attributes:
        model: The model, newly built.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        origin: Where the model comes from, as a text for `load_source`: `file.py:build_model`.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str


def parse_input(text: str, *, seed: int = 0) -> tuple[str | None, torch.Tensor]:
    """Create the tensor that an `--input` text describes: `[name=]SIZExSIZE...[:dtype[<bound]]`.

    Floating-point numbers are standard normal, and `bool` is a fair coin. Integers are drawn from
    [0, bound), or from [0, 2) without a bound.

    Args:
        text: The text.
        seed: Seed of the random numbers; the same text and seed return the same tensor.

    Returns:
        The name of the keyword argument, or None for a positional one, and the tensor.

    Raises:
        SourceError: The text does not follow the grammar, or the dtype is unknown.
    """
    match = _INPUT.match(text)
    assert match is not None  # every part of the pattern is optional
    name, sizes, dtype_name, digits = match.groups()
    if (unread := text[match.end() :]) or not sizes:
        raise SourceError(
            f"bad --input {text!r}: cannot read {repr(unread) if unread else 'the end'} at "
            f"character {match.end() + 1}; the grammar is {GRAMMAR}"
        )
    # Integers index tables of unknown size: 2 is the smallest bound that still varies.
    dtype_name, bound = dtype_name or "float32", int(digits or 2)
    if dtype_name not in (*FLOATS, *INTEGERS, "bool"):
        choices = ", ".join((*FLOATS, *INTEGERS, "bool"))
        raise SourceError(f"unknown dtype {dtype_name!r} in --input {text!r}: use one of {choices}")
    dtype = getattr(torch, dtype_name)
    if digits and (dtype_name not in INTEGERS or bound > torch.iinfo(dtype).max + 1):
        raise SourceError(
            f"--input {text!r}: {dtype_name} cannot be drawn below {digits}; use int64"
        )
    shape = [int(size) for size in sizes.split("x")]
    generator = torch.Generator().manual_seed(seed)
    try:
        if dtype_name in FLOATS:
            return name, torch.randn(shape, dtype=dtype, generator=generator)
        return name, torch.randint(bound, shape, generator=generator).to(dtype)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise SourceError(f"--input {text!r} is too large: {brief(error)}") from error


def parse_inputs(texts: Sequence[str]) -> Inputs | None:
    """Sort `--input` texts into positional and keyword arguments; None if there are none.

    Raises:
        SourceError: As `parse_input`; or a name occurs twice.
    """
    # Every input has a seed of its own: equal ones would hide which of them a model reads.
    parsed = [parse_input(text, seed=seed) for seed, text in enumerate(texts)]
    args = tuple(tensor for name, tensor in parsed if name is None)
    kwargs = {name: tensor for name, tensor in parsed if name is not None}
    if len(args) + len(kwargs) < len(parsed):
        raise SourceError(f"--input repeats a name ({' '.join(texts)}): drop one of them")
    return (args, kwargs) if parsed else None
