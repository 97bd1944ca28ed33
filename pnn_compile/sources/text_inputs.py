"""Example inputs from `--input` texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from passes.errors import SourceError
from pnn_compile.sources.errors import first_line
from pnn_compile.sources.source import Inputs

__all__ = ["parse_input", "parse_inputs"]

FLOATS = ("float32", "float64", "float16", "bfloat16", "complex64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
GRAMMAR = "[name=]SIZExSIZE...[:dtype[<bound]], as in 2x3x32x32, 2x128:int64<50, mask=2x128:bool"

_INPUT = re.compile(
    r"(?:([^\W\d]\w*)=)?(?:([1-9]\d*(?:x[1-9]\d*)*)(?::([a-z]\w*)(?:<([1-9]\d{,18}))?)?)?"
)


def parse_input(text: str, *, seed: int = 0) -> tuple[str | None, torch.Tensor]:
    """Make the tensor that an `--input` text describes: `[name=]SIZExSIZE...[:dtype[<bound]]`.

    Floating-point numbers are standard normal and `bool` is a fair coin; integers are drawn from
    [0, bound), and from [0, 2) without a bound. The same text and seed give the same tensor.

    Returns:
        The name of the keyword argument, or None for a positional one, and the tensor.

    Raises:
        SourceError: The text does not follow the grammar, or the dtype is unknown.
    """
    match = _INPUT.match(text)
    assert match is not None  # all of it is optional
    name, sizes, word, digits = match.groups()
    if (rest := text[match.end() :]) or not sizes:
        raise SourceError(
            f"bad --input {text!r}: cannot read {repr(rest) if rest else 'the end'} at character "
            f"{match.end() + 1}; the grammar is {GRAMMAR}"
        )
    # integers are indices into tables of unknown size: 2 is the least bound that still varies
    word, bound = word or "float32", int(digits or 2)
    if word not in (*FLOATS, *INTEGERS, "bool"):
        known = ", ".join((*FLOATS, *INTEGERS, "bool"))
        raise SourceError(f"unknown dtype {word!r} in --input {text!r}: use one of {known}")
    if digits and (word not in INTEGERS or bound > torch.iinfo(getattr(torch, word)).max + 1):
        raise SourceError(f"--input {text!r}: {word} cannot be drawn below {digits}; use int64")
    shape, dtype = [int(size) for size in sizes.split("x")], getattr(torch, word)
    generator = torch.Generator().manual_seed(seed)
    try:
        if word in FLOATS:
            return name, torch.randn(shape, dtype=dtype, generator=generator)
        return name, torch.randint(bound, shape, generator=generator).to(dtype)
    except (RuntimeError, TypeError, OverflowError) as exc:
        raise SourceError(f"--input {text!r} is too large: {first_line(exc)}") from exc


def parse_inputs(texts: Sequence[str]) -> Inputs | None:
    """Sort `--input` texts into positional and keyword arguments; None if there are none."""
    parsed = [parse_input(text, seed=seed) for seed, text in enumerate(texts)]  # all differ
    args = tuple(tensor for name, tensor in parsed if name is None)
    kwargs = {name: tensor for name, tensor in parsed if name is not None}
    if len(args) + len(kwargs) < len(parsed):
        raise SourceError(f"--input gives a name twice ({' '.join(texts)}): drop one of them")
    return (args, kwargs) if parsed else None
