"""Format numbers for readers: counts, bytes and seconds with a prefix."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P")


def count(number: float) -> str:
    """Format a count with a decimal prefix.

    >>> count(1234567)
    '1.23M'
    """
    power = 0
    while abs(number) >= 999.5 and power < len(_PREFIXES) - 1:  # 999.5 would print as 1e+03
        number /= 1000
        power += 1
    return f"{number:.3g}{_PREFIXES[power]}"


def flops(number: float) -> str:
    """Format a number of FLOPs; "" for 0.

    >>> flops(2.5e9)
    '2.5G'
    """
    return count(number) if number else ""


def size(number: float) -> str:
    """Format a number of bytes.

    >>> size(131072)
    '131kB'
    """
    return f"{count(number)}B"


def seconds(number: float) -> str:
    """Format a duration that is given in seconds.

    >>> seconds(0.0123)
    '12.3ms'
    """
    if number >= 1 or number == 0:
        return f"{number:.3g}s"
    return f"{number * 1e3:.3g}ms" if number >= 1e-3 else f"{number * 1e6:.3g}us"
