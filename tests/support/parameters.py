"""Parameters of tests: a few combinations that hold every value; all others are slow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.models.zoo import CAPTURABLE, SIMILAR


def quick(names: Iterable[str] = CAPTURABLE) -> list[Any]:
    """Return names of cases of the zoo; those that resemble others are slow."""
    return [pytest.param(name, marks=_slow(name in SIMILAR)) for name in names]


def grid(*axes: Sequence[Any]) -> list[Any]:
    """Return all combinations of values; those beyond a few that hold every value are slow.

    A value that is a tuple stands for several arguments.

    >>> [p.values for p in grid("abc", "xy") if not p.marks]
    [('a', 'x'), ('b', 'y'), ('c', 'x')]
    """
    strides, longest = [], max(range(len(axes)), key=lambda axis: len(axes[axis]))
    stride = 1
    for number, axis in enumerate(axes):
        strides.append(1 if number == longest else stride)
        stride *= 1 if number == longest else len(axis)
    count = max(s * (len(axis) - 1) + 1 for s, axis in zip(strides, axes, strict=True))
    few = {
        tuple(i // s % len(axis) for s, axis in zip(strides, axes, strict=True))
        for i in range(count)
    }
    parameters = []
    for indices in itertools.product(*(range(len(axis)) for axis in axes)):
        values = (axis[i] for axis, i in zip(axes, indices, strict=True))
        flat = itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in values)
        parameters.append(pytest.param(*flat, marks=_slow(indices not in few)))
    return parameters


def _slow(is_slow: bool) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if is_slow else ()
