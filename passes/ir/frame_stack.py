"""Room for the frames of deep calls, on CPython's stack of frames.

CPython keeps the frames of Python functions in chunks of 16 KiB, maps a new chunk when a call does
not fit into the last one, and unmaps it when that call returns. A long generated `forward` whose
frame ends near the end of a chunk then maps and unmaps memory in every call of a layer: a stage of
ResNet-1001 took twice as long, and the same code was fast a few frames further up or down. Behind a
frame that is itself too large for a chunk there is room for everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["with_room"]

P = ParamSpec("P")
T = TypeVar("T")

_WORDS = 16_000
"""Size of the frame. With the 1,000 words that CPython adds it takes 136,000 bytes, a little over
2**17; the chunk is the next power of two, 2**18 bytes, of which more than 130,000 are left."""


def with_room(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function at the beginning of a large, nearly empty chunk of the stack of frames."""
    return function(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=_WORDS)
