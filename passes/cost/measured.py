"""Measure the seconds of segments of a program on this machine: forward, backward, optimizer.

The clock is read inside one run of the whole program, at the end of every segment, because segments
that run alone would find their inputs in the cache, and their seconds would not add up.
"""

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

from passes.cost.flops import parameters
from passes.ir.direct_call import DirectCaller, with_frame_headroom
from passes.ir.isolation import preserved
from passes.ir.program import Program, graph_module, tensor_leaves

_WARM_UP_RUNS = 1
_MIN_RUNS, _MAX_RUNS = 3, 30
_NETWORK_RUNS = 7
_OPTIMIZER_RUNS = 5
_TIME_LIMIT = 6.0
"""Seconds after which no further run starts, once there are `_MIN_RUNS`."""


class Seconds(NamedTuple):
    """Seconds of a segment in the forward and backward pass, and of the optimizer's step."""

    forward: float
    backward: float
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of both passes and the optimizer."""
        return sum(self)


class Measure(Protocol):
    """Measures segments like `measure_seconds`."""

    def __call__(
        self, program: Program, segments: Sequence[Sequence[fx.Node]], *, backward: bool = False
    ) -> list[Seconds]:
        """Return the seconds of each segment."""


def measure_seconds(
    program: Program, segments: Sequence[Sequence[fx.Node]], *, backward: bool = False
) -> list[Seconds]:
    """Measure the seconds of each segment of a program on this machine.

    Args:
        program: The program.
        segments: All its compute nodes, split where the clock is to be read.
        backward: Whether to time a training step, forward, backward and the optimizer, in training
            mode (in evaluation mode if the example is too small a batch for it). Otherwise the
            forward pass is timed, in evaluation mode and without gradients.

    Returns:
        Seconds of each segment: medians of several runs after a warm-up, scaled so that they add up
        to the median of the whole run. (Medians alone add up to less, because every run contains
        some rare disturbances, and no median does.)
    """
    runs: list[list[Seconds]] = []
    with preserved(program.module), torch.set_grad_enabled(backward), _no_collection():
        program.module.train(backward and _can_train(program))
        clock = _Clock(program, segments)
        start = time.perf_counter()
        while len(runs) < _WARM_UP_RUNS + _MAX_RUNS:
            enough = len(runs) >= _WARM_UP_RUNS + _MIN_RUNS
            if enough and time.perf_counter() - start > _TIME_LIMIT:
                break
            runs.append(clock.time(program.fresh_inputs(), backward=backward))
            program.module.zero_grad(set_to_none=True)
    timed = runs[_WARM_UP_RUNS:]
    forward = _scaled_medians([[seconds.forward for seconds in run] for run in timed])
    back = _scaled_medians([[seconds.backward for seconds in run] for run in timed])
    optimizer = _optimizer_seconds(program, segments) if backward else [0.0] * len(segments)
    return list(map(Seconds, forward, back, optimizer))


def _optimizer_seconds(program: Program, segments: Sequence[Sequence[fx.Node]]) -> list[float]:
    """Measure a step of SGD with momentum; segments share its seconds by bytes of parameters.

    Parameters that are tied count in the first segment that reads them, frozen ones nowhere. The
    step changes copies. Other optimizers cost more by a factor that is the same for all segments.
    """
    seen: set[torch.Tensor] = set()
    sizes = []
    for segment in segments:
        read = {p for node in segment for p in parameters(program, node) if p.requires_grad}
        sizes.append(sum(p.nbytes for p in read - seen))
        seen |= read
    copies = [p.detach().clone().requires_grad_() for p in seen if p.is_floating_point()]
    if not copies:
        return [0.0] * len(segments)
    for p in copies:
        p.grad = torch.zeros_like(p)
    step = torch.optim.SGD(copies, lr=0.0, momentum=0.9, fused=True).step
    read_clock = _record_event if program.device.type == "cuda" else time.perf_counter
    runs = []
    with _no_collection():
        for _ in range(_WARM_UP_RUNS + _OPTIMIZER_RUNS):
            readings = [read_clock()]
            step()
            runs += _intervals([*readings, read_clock()])
    seconds, total = statistics.median(runs[_WARM_UP_RUNS:]), sum(sizes)
    return [seconds * size / total for size in sizes]


def measure_network(
    run: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    device: torch.device,
    *,
    backward: bool,
) -> Seconds:
    """Measure the seconds of a small network by itself, on this machine.

    Args:
        run: Calls the network.
        inputs: Its arguments; gradients flow to all of them.
        device: Where it runs.
        backward: Whether to time the backward pass too.

    Returns:
        Medians of several runs after a warm-up.
    """
    read = _record_event if device.type == "cuda" else time.perf_counter
    runs = []
    with torch.set_grad_enabled(backward), _no_collection():
        for _ in range(_WARM_UP_RUNS + _NETWORK_RUNS):
            leaves = [x.detach().requires_grad_(backward) for x in inputs]
            readings = [read()]
            outputs = tensor_leaves(with_frame_headroom(run, *leaves))
            readings.append(read())
            ends = [x for x in outputs if x.requires_grad]
            if backward and ends:
                torch.autograd.backward(ends, [torch.ones_like(x) for x in ends])
            readings.append(read())
            runs.append(_intervals(readings))
    return Seconds(*map(statistics.median, zip(*runs[_WARM_UP_RUNS:], strict=True)))


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


def _intervals(readings: Sequence[Any]) -> list[float]:
    """Return the seconds between readings of the clock: numbers or CUDA events."""
    if isinstance(readings[0], float):
        return [b - a for a, b in itertools.pairwise(readings)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(readings)]


def _scaled_medians(runs: Sequence[Sequence[float]]) -> list[float]:
    """Return the median of every segment, scaled so that they add up to the median of the sums.

    >>> _scaled_medians([[1, 1], [1, 3], [4, 1]])
    [2.0, 2.0]
    """
    medians = [statistics.median(values) for values in zip(*runs, strict=True)]
    whole, total = statistics.median(map(sum, runs)), sum(medians)
    return [value * whole / total for value in medians] if total else medians


def _can_train(program: Program) -> bool:
    """Whether the program runs on its example inputs in training mode."""
    try:
        with preserved(program.module):
            program.module.train()
            program.module(*program.fresh_inputs())
    except ValueError:  # BatchNorm refuses a single value per channel
        return False
    return True


class _Clock:
    """Read the clock at the end of every segment, in the forward and in the backward pass.

    The generated code of the graph runs, as on a rank, with a call that reads the clock after every
    segment: an interpreter would add its own time to every node.

    In the backward pass a segment begins when the gradient of its last value is complete, and ends
    where the segment before it begins. A segment whose last value has no gradient is timed together
    with the segments after it; they share the seconds in proportion to their forward seconds.
    """

    def __init__(self, program: Program, segments: Sequence[Sequence[fx.Node]]) -> None:
        self._read = _record_event if program.device.type == "cuda" else time.perf_counter
        self._module = self._instrument(program, segments)
        self._forward_readings: list[Any] = []
        self._gradient_readings: dict[int, Any] = {}

    def _instrument(self, program: Program, segments: Sequence[Sequence[fx.Node]]) -> DirectCaller:
        """Return the program with a call after the last node of every segment."""
        graph = copy.deepcopy(program.graph)
        copies = dict(zip(program.graph.nodes, graph.nodes, strict=True))

        def start() -> None:
            self._forward_readings = [self._read()]

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
        """Run once and return the seconds of every segment."""
        self._gradient_readings = {}
        outputs = with_frame_headroom(self._module, *inputs)
        readings = self._run_backward(outputs) if backward else []
        ends = self._seconds(self._forward_readings)
        forward = [b - a for a, b in itertools.pairwise(ends)]
        return list(map(Seconds, forward, self._backward_seconds(forward, readings)))

    def _run_backward(self, outputs: Any) -> list[Any]:
        """Run the backward pass; return the readings before and after it, [] without gradients."""
        differentiable = [leaf for leaf in tensor_leaves(outputs) if leaf.requires_grad]
        if not differentiable:
            return []
        loss = torch.stack([leaf.float().sum() for leaf in differentiable]).sum()
        start = self._read()
        loss.backward()  # type: ignore[no-untyped-call]
        return [start, self._read()]

    def _mark(self, value: Any, index: int) -> None:
        """Read the clock now, and again when the gradient of the value is complete."""

        def complete(_: torch.Tensor) -> None:
            self._gradient_readings[index] = self._read()

        self._forward_readings.append(self._read())
        for leaf in tensor_leaves(value):
            if leaf.requires_grad:
                leaf.register_hook(complete)  # type: ignore[no-untyped-call]

    def _seconds(self, readings: Sequence[Any]) -> list[float]:
        """Convert readings to seconds since the first one of the run."""
        first = self._forward_readings[0]
        if self._read is time.perf_counter:
            return [reading - first for reading in readings]
        torch.cuda.synchronize()
        return [first.elapsed_time(reading) / 1e3 for reading in readings]

    def _backward_seconds(self, forward: Sequence[float], readings: Sequence[Any]) -> list[float]:
        """Return the backward seconds of every segment.

        Args:
            forward: Forward seconds of every segment.
            readings: Readings before and after the backward pass; empty if there was none.
        """
        backward = [0.0] * len(forward)
        if not readings:
            return backward
        start, stop = self._seconds(readings)
        gradient_times = self._seconds(list(self._gradient_readings.values()))
        complete = dict(zip(self._gradient_readings, gradient_times, strict=True))
        group: list[int] = []  # segments whose backward seconds are known only together
        began = complete.get(len(backward) - 1, start)
        for index in reversed(range(len(backward))):
            group.append(index)
            ended = complete.get(index - 1) if index else stop
            if ended is None:
                continue
            elapsed = max(0.0, ended - began)
            total = sum(forward[member] for member in group)
            for member in group:
                share = forward[member] / total if total else 1 / len(group)
                backward[member] = elapsed * share
            group, began = [], max(began, ended)
        return backward


def _record_event() -> torch.cuda.Event:
    """Read the clock of the GPU without waiting for it, so that launches stay ahead."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
