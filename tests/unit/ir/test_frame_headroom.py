"""Calls from a large frame have headroom, wherever the frame of the caller ends."""

import resource
import sys
from types import FunctionType

import pytest

from passes.ir.direct_call import with_frame_headroom

_CALLS = 500


def _leaf() -> None:
    return None


def _loop() -> int:
    """Page faults of many calls."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(_CALLS):
        _leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _loops() -> list[FunctionType]:
    """The loop in frames of growing size: one of them ends where a chunk ends."""
    code = _loop.__code__
    return [
        FunctionType(code.replace(co_stacksize=words), globals()) for words in range(8, 2_080, 4)
    ]


def test_no_call_maps_memory_after_a_large_frame() -> None:
    assert max(with_frame_headroom(loop) for loop in _loops()) < _CALLS


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="newer versions may keep a chunk")
def test_without_headroom_some_frame_ends_where_every_call_maps_memory() -> None:
    assert max(loop() for loop in _loops()) >= _CALLS


def test_arguments_results_and_errors_pass_through() -> None:
    assert with_frame_headroom(divmod, 7, 2) == (3, 1)
    assert with_frame_headroom(sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(ZeroDivisionError):
        with_frame_headroom(divmod, 1, 0)
