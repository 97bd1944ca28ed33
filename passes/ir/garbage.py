"""Look for cyclic garbage less often while many objects are made that live on."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rare_collection() -> Iterator[None]:
    """Make Python look for cyclic garbage less often, in all threads.

    Modules and nodes of a deep model are a million objects that live on: to look through them every
    700 allocations takes an eighth of a compilation.
    """
    with _COLLECTION:
        _THRESHOLDS.append(before := gc.get_threshold())
        if before[0]:  # 0: never
            gc.set_threshold(max(before[0], _ALLOCATIONS), *before[1:])
    try:
        yield
    finally:
        with _COLLECTION:  # blocks of other threads may go on: the last to end puts back the first
            if len(_THRESHOLDS) == 1:
                gc.set_threshold(*_THRESHOLDS[0])
            _THRESHOLDS.pop()


_COLLECTION, _THRESHOLDS = threading.Lock(), list[tuple[int, int, int]]()
"""A lock, and what every block of `rare_collection` that is at work found."""
_ALLOCATIONS = 100_000
"""Allocations between two searches for garbage, by `rare_collection`."""
