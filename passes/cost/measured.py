"""Seconds of the segments of a program on this machine, forward and backward."""

from __future__ import annotations

import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.ir.direct_call import DirectCaller, with_frame_headroom
from passes.ir.isolation import preserved
from passes.ir.program import Program, graph_module

__all__ = ["Measure", "Seconds", "measure_network", "measure_seconds"]

_WARM_UP = 1
_FEWEST, _MOST = 3, 30
_CALLS = 7
_LONG = 6.0
"""Seconds after which no more runs are made, if there are enough."""


class Seconds(NamedTuple):
    """Seconds of a segment on the way forward and on the way back."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


class Measure(Protocol):
    """Times segments as `measure_seconds` does."""

    def __call__(
        self, program: Program, segments: Sequence[Sequence[fx.Node]], *, backward: bool = False
    ) -> list[Seconds]:
        """Seconds of each segment."""


def measure_seconds(
    program: Program, segments: Sequence[Sequence[fx.Node]], *, backward: bool = False
) -> list[Seconds]:
    """Time each segment of the program on this machine.

    Args:
        program: The program.
        segments: Its compute nodes, split where the clock is to be read; nothing may be left out.
        backward: Time a training step, forward and backward, in training mode (in evaluation mode
            where the example is too small a batch for it); else the forward pass alone, in
            evaluation mode and without gradients.

    Returns:
        Seconds of each segment: medians of several runs after a warm-up, which add up to the
        median of the whole. (Medians alone add up to less: what disturbs a run now and then is in
        none of them, but some of it in every run.)
    """
    runs: list[list[Seconds]] = []
    with preserved(program.module), torch.set_grad_enabled(backward), _no_collection():
        program.module.train(backward and _trains(program))
        clock = _Clock(program, segments)
        start = time.perf_counter()
        while len(runs) < _WARM_UP + _MOST:
            if len(runs) >= _WARM_UP + _FEWEST and time.perf_counter() - start > _LONG:
                break
            runs.append(clock.time(program.fresh_inputs(), backward=backward))
            program.module.zero_grad(set_to_none=True)
    ways = [_typical([[each[way] for each in run] for run in runs[_WARM_UP:]]) for way in (0, 1)]
    return list(map(Seconds, *ways))


def measure_network(
    run: Callable[..., Any], inputs: Sequence[torch.Tensor], *, backward: bool
) -> Seconds:
    """Time a small network by itself, on this machine.

    Args:
        run: Calls it.
        inputs: What it is called with; gradients flow to all of them.
        backward: Whether to time the way back too.
    """
    read = _events if any(x.is_cuda for x in inputs) else time.perf_counter
    found = []
    with torch.set_grad_enabled(backward), _no_collection():
        for _ in range(_WARM_UP + _CALLS):
            leaves = [x.detach().requires_grad_(backward) for x in inputs]
            marks = [read()]
            outputs = [
                x
                for x in pytree.tree_leaves(with_frame_headroom(run, *leaves))
                if isinstance(x, torch.Tensor)
            ]
            marks.append(read())
            ends = [x for x in outputs if x.requires_grad]
            if backward and ends:
                torch.autograd.backward(ends, [torch.ones_like(x) for x in ends])
            marks.append(read())
            found.append(_apart(marks))
    ways = zip(*found[_WARM_UP:], strict=True)
    return Seconds(*map(statistics.median, ways))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from collecting garbage in the middle of a segment, as timeit does."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _apart(marks: Sequence[Any]) -> list[float]:
    """Seconds between readings of the clock."""
    if isinstance(marks[0], float):
        return [b - a for a, b in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def _typical(runs: Sequence[Sequence[float]]) -> list[float]:
    """The medians of every segment, brought to the median of the sums."""
    medians = [statistics.median(values) for values in zip(*runs, strict=True)]
    whole, total = statistics.median(map(sum, runs)), sum(medians)
    return [value * whole / total for value in medians] if total else medians


def _trains(program: Program) -> bool:
    """Whether the program runs on its example in training mode."""
    try:
        with preserved(program.module):
            program.module.train()
            program.module(*program.fresh_inputs())
    except ValueError:  # BatchNorm over a single value
        return False
    return True


class _Clock:
    """Reads the clock at the end of every segment, on the way forward and on the way back.

    What runs is what a rank runs of a stage, with a call that reads the clock behind every segment:
    an interpreter would add its own time to every node.

    On the way back a segment begins when the gradient of its last value is complete, and ends where
    that of the segment before begins. Segments whose last value has no gradient are timed with
    their neighbours behind, and get their share by what they took forward.
    """

    def __init__(self, program: Program, segments: Sequence[Sequence[fx.Node]]) -> None:
        self._read = _events if program.device.type == "cuda" else time.perf_counter
        self._module = self._marked(program, segments)
        self._passed: list[Any] = []
        self._complete: dict[int, Any] = {}

    def _marked(self, program: Program, segments: Sequence[Sequence[fx.Node]]) -> DirectCaller:
        """The program with a call behind the last node of every segment."""
        graph = copy.deepcopy(program.graph)
        copies = dict(zip(program.graph.nodes, graph.nodes, strict=True))

        def start() -> None:
            self._passed = [self._read()]

        def mark(value: Any, index: int) -> None:
            self._mark(value, index)

        with graph.inserting_before(copies[segments[0][0]]):
            graph.call_function(start)
        for index, segment in enumerate(segments):
            node = copies[segment[-1]]
            with graph.inserting_after(node):
                graph.call_function(mark, (node, index))
        return DirectCaller(graph_module(program.module, graph, "Clocked"))

    def time(self, inputs: Sequence[Any], *, backward: bool) -> list[Seconds]:
        """Run once and give the seconds of every segment."""
        self._complete = {}
        outputs = with_frame_headroom(self._module, *inputs)
        returned = self._back(outputs) if backward else []
        passed = self._seconds(self._passed)
        forward = [b - a for a, b in itertools.pairwise(passed)]
        return list(map(Seconds, forward, self._shared(forward, returned)))

    def _back(self, outputs: Any) -> list[Any]:
        """Go back: when that began and ended; nothing if nothing has a gradient."""
        floating = [
            leaf
            for leaf in pytree.tree_leaves(outputs)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        if not floating:
            return []
        loss = torch.stack([leaf.float().sum() for leaf in floating]).sum()
        start = self._read()
        loss.backward()  # type: ignore[no-untyped-call]
        return [start, self._read()]

    def _mark(self, value: Any, index: int) -> None:
        """Read the clock, and have it read again when the gradient of the value is complete."""

        def complete(_: torch.Tensor) -> None:
            self._complete[index] = self._read()

        self._passed.append(self._read())
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(complete)  # type: ignore[no-untyped-call]

    def _seconds(self, readings: Sequence[Any]) -> list[float]:
        """Readings as seconds since the first one of the run."""
        if self._read is time.perf_counter:
            return [reading - self._passed[0] for reading in readings]
        torch.cuda.synchronize()
        return [self._passed[0].elapsed_time(reading) / 1e3 for reading in readings]

    def _shared(self, forward: Sequence[float], returned: Sequence[Any]) -> list[float]:
        """Seconds of every segment on the way back."""
        found = [0.0] * len(forward)
        if not returned:
            return found
        start, stop = self._seconds(returned)
        order = list(self._complete)
        complete = dict(zip(order, self._seconds([self._complete[i] for i in order]), strict=True))
        group: list[int] = []
        began = complete.get(len(found) - 1, start)
        for index in reversed(range(len(found))):
            group.append(index)
            ended = complete.get(index - 1) if index else stop
            if ended is None:
                continue
            spent = max(0.0, ended - began)
            whole = sum(forward[each] for each in group)
            for each in group:
                found[each] = spent * (forward[each] / whole if whole else 1 / len(group))
            group, began = [], max(began, ended)
        return found


def _events() -> torch.cuda.Event:
    """A reading of the GPU's own clock: nobody waits for it, so that launches stay ahead."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
