"""Cuts as other tools choose them, to set beside: equal counts, and balance by block partitions."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["block_partition", "equal_count"]


def equal_count(count: int, parts: int) -> list[int]:
    """Where parts of (nearly) equal numbers of elements end."""
    return [count * (part + 1) // parts for part in range(parts)]


def block_partition(costs: Sequence[float], parts: int) -> list[int]:
    """Where parts of nearly equal cost end, by moving one element at a time.

    The algorithm of Bárány and Grinberg, "Block partitions of sequences" (2015), that torchgpipe's
    `balance_by_time` uses, on costs brought to [0, 1] as there: while the largest part exceeds the
    smallest one by more than the largest element can be, the smallest takes an element from its
    neighbor on the side of the largest.

    Args:
        costs: What the elements cost, at least as many as there are parts.
        parts: How many parts.

    Returns:
        For each part the number of elements up to its end.
    """
    least = min(costs)
    spread = max(costs) - least
    scaled = [(cost - least) / spread if spread else 0.0 for cost in costs]
    ends = [len(costs) // parts * (part + 1) for part in range(parts - 1)] + [len(costs)]

    def sizes() -> list[float]:
        return [sum(scaled[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    largest, giver = -1, -1
    while True:
        found = sizes()
        if giver in (-1, largest):  # it gave away: look for the largest anew
            largest = max(range(parts), key=lambda part: (found[part], part))
            most = found[largest]
        smallest = min(range(parts), key=lambda part: (found[part], part))
        if most <= found[smallest] + 1:
            return ends
        if largest < smallest:
            giver = smallest - 1
            ends[giver] -= 1
        else:
            giver = smallest + 1
            ends[smallest] += 1
