"""Numbers for people: counts, bytes and seconds with a prefix."""

from __future__ import annotations

__all__ = ["count", "flops", "seconds", "size"]

_PREFIXES = ("", "k", "M", "G", "T", "P")


def count(number: float) -> str:
    """Write a count with a decimal prefix.

    >>> count(1234567)
    '1.23M'
    """
    step = 0
    while abs(number) >= 999.5 and step < len(_PREFIXES) - 1:
        number /= 1000
        step += 1
    text = f"{number:.3g}"
    return f"{text}{_PREFIXES[step]}"


def flops(number: float) -> str:
    """Write a number of FLOPs; empty for none.

    >>> flops(2.5e9)
    '2.5G'
    """
    return count(number) if number else ""


def size(number: float) -> str:
    """Write a number of bytes.

    >>> size(131072)
    '131kB'
    """
    return f"{count(number)}B"


def seconds(number: float) -> str:
    """Write a duration.

    >>> seconds(0.0123)
    '12.3ms'
    """
    if number >= 1 or number == 0:
        return f"{number:.3g}s"
    return f"{number * 1e3:.3g}ms" if number >= 1e-3 else f"{number * 1e6:.3g}us"
