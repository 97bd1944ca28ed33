"""Seconds of the segments of a program on this machine, forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.interpreting import Interpreter
from passes.program import Program
from passes.validate import preserved

__all__ = ["Seconds", "measure_seconds"]

_WARM_UP = 1
_REPEATS = 3


class Seconds(NamedTuple):
    """Seconds of a segment on the way forward and on the way back."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


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
        Seconds of each segment: the medians of several runs after a warm-up.
    """
    runs: list[list[Seconds]] = []
    with preserved(program.module), torch.set_grad_enabled(backward):
        program.module.train(backward and _trains(program))
        for _ in range(_WARM_UP + _REPEATS):
            clock = _Clock(program.module, segments)
            runs.append(clock.time(program.fresh_inputs(), backward=backward))
            program.module.zero_grad(set_to_none=True)
    return [
        Seconds(*map(statistics.median, zip(*values, strict=True)))
        for values in zip(*runs[_WARM_UP:], strict=True)
    ]


def _trains(program: Program) -> bool:
    """Whether the program runs on its example in training mode."""
    try:
        with preserved(program.module):
            program.module.train()
            program.module(*program.fresh_inputs())
    except ValueError:  # BatchNorm over a single value
        return False
    return True


class _Clock(Interpreter):
    """Reads the clock at the end of every segment, on the way forward and on the way back.

    On the way back a segment begins when the gradient of its last value is complete, and ends where
    that of the segment before begins. Segments whose last value has no gradient are timed with
    their neighbours behind, and get their share by what they took forward.
    """

    def __init__(self, module: fx.GraphModule, segments: Sequence[Sequence[fx.Node]]) -> None:
        super().__init__(module)
        self._ends: Mapping[fx.Node, int] = {
            segment[-1]: index for index, segment in enumerate(segments)
        }
        self._forward = [0.0] * len(segments)
        self._start: float | None = None
        self._complete: dict[int, float] = {}

    def time(self, inputs: Sequence[Any], *, backward: bool) -> list[Seconds]:
        """Run once and give the seconds of every segment."""
        outputs = self.run(*inputs)
        returned = (self._back(outputs) if backward else []) or [0.0] * len(self._forward)
        return list(map(Seconds, self._forward, returned))

    def _back(self, outputs: Any) -> list[float]:
        """Go back and give the seconds of every segment; none if nothing has a gradient."""
        floating = [
            leaf
            for leaf in pytree.tree_leaves(outputs)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        if not floating:
            return []
        loss = torch.stack([leaf.float().sum() for leaf in floating]).sum()
        start = _now()
        loss.backward()  # type: ignore[no-untyped-call]
        return self._backward(start, _now())

    def run_node(self, n: fx.Node) -> Any:
        if self._start is None and n.op not in ("placeholder", "get_attr"):
            self._start = _now()
        value = super().run_node(n)
        if (index := self._ends.get(n)) is not None and self._start is not None:
            self._mark(index, value)
            now = _now()
            self._forward[index] = now - self._start
            self._start = now
        return value

    def _mark(self, index: int, value: Any) -> None:
        """Have the clock read when the gradient of a value is complete."""

        def complete(_: torch.Tensor) -> None:
            self._complete[index] = _now()

        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(complete)  # type: ignore[no-untyped-call]

    def _backward(self, start: float, stop: float) -> list[float]:
        found = [0.0] * len(self._forward)
        group: list[int] = []
        began = self._complete.get(len(found) - 1, start)
        for index in reversed(range(len(found))):
            group.append(index)
            ended = self._complete.get(index - 1) if index else stop
            if ended is None:
                continue
            spent = max(0.0, ended - began)
            forward = sum(self._forward[each] for each in group)
            for each in group:
                share = self._forward[each] / forward if forward else 1 / len(group)
                found[each] = spent * share
            group, began = [], max(began, ended)
        return found


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
