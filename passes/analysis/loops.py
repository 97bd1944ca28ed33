"""Find the loop in time of an unrolled program: equal steps with shared weights, in a row.

A sampler, an ODE solver and a layer that is applied repeatedly unroll to runs of nodes that call
the same modules in the same order. Numbers, tables and values from outside of the loop may differ
from step to step; those are the *step constants*. With h = 0.25:

    node                          of step 0    of step 1    of step 2
    t  = full(n, #)               0.0          0.25         0.5          a step constant
    e  = net(x, t)                net          net          net          shared weights
    y  = mul(e, #)                0.25         0.25         0.25
    x' = add(x, y)                             a legal cut, through x' alone

The steps of a loop have the same number of nodes, the *period*: node number `o` of one step does
what node number `o` of every other step does.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from passes.analysis.cut_points import Frontiers, Position
from passes.analysis.dependence import name_of
from passes.cost.flops import NodeCost, parameters
from passes.ir.observer import Fact
from passes.ir.program import Program, provenance, resolve

_LEAST_STEPS = 3
"""A loop has at least this many steps."""
_MOST_CALLS = 8
"""Largest number of calls of one module in a step."""
_LEAST_SHARE = 0.5
"""Smallest share of all FLOPs that the steps of a loop take."""

Leaf = Any
"""A number, a node, or anything else among the arguments of a node."""


@dataclass(frozen=True)
class StepConstant:
    """A leaf among the arguments of a node that differs from step to step.

    Attributes:
        offset: Number of the node in its step.
        leaf: Number of the leaf among the arguments of the node, as `leaves` lists them.
        values: Its values, by step: numbers, or nodes outside of the loop.
        ends: Whether it is the constant of the end of a step: another one has the same values one
            step later.
    """

    offset: int
    leaf: int
    values: tuple[Leaf, ...]
    ends: bool


@dataclass(frozen=True)
class Loop:
    """A loop in time.

    Attributes:
        start: Number of nodes before its first step.
        period: Number of nodes of a step.
        positions: The cut after every step.
        constants: The step constants.
    """

    start: int
    period: int
    positions: tuple[Position, ...]
    constants: tuple[StepConstant, ...]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.positions)

    def step_at(self, index: int) -> int | None:
        """Return how many steps lie before a cut; None if it is inside a step or outside."""
        count, rest = divmod(index - self.start, self.period)
        return count if not rest and 0 <= count <= self.steps else None


def leaves(node: fx.Node) -> list[Leaf]:
    """Return the leaves of the arguments of a node, in the order in which fx visits them."""
    result: list[Leaf] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: result.append(leaf))
    return result


def is_number(leaf: Leaf) -> bool:
    """Whether a leaf is a number, and no truth value."""
    return isinstance(leaf, int | float) and not isinstance(leaf, bool)


def holds_weights(program: Program, node: fx.Node) -> bool:
    """Whether a node reads parameters: a layer, or an operator with one among its arguments."""
    return bool(parameters(program, node))


def find_loop(
    program: Program,
    frontiers: Frontiers,
    facts: Mapping[fx.Node, Fact],
    costs: Mapping[fx.Node, NodeCost],
) -> Loop | None:
    """Find the loop in time that takes most of the work of a program.

    Args:
        program: The program.
        frontiers: Its legal cuts.
        facts: Observed facts by node.
        costs: Costs by node.

    Returns:
        The loop; None if no part of at least half of the work repeats with shared weights.
    """
    finder = _Finder(program, frontiers, facts)
    least = _LEAST_SHARE * sum(cost.flops for cost in costs.values())

    def flops(loop: Loop) -> int:
        inside = frontiers.order[loop.start : loop.positions[-1].index]
        return sum(costs[node].flops for node in inside)

    loops = [(flops(loop), loop) for loop in finder.loops()]
    most, best = max(loops, key=lambda pair: pair[0], default=(0, None))
    if best is None or most < max(least, 1):
        return None
    return replace(best, constants=finder.constants(best))


class _Finder:
    """Search for loops in the sequence of nodes."""

    def __init__(
        self, program: Program, frontiers: Frontiers, facts: Mapping[fx.Node, Fact]
    ) -> None:
        self.program, self.facts, self.order = program, facts, frontiers.order
        self.index = {node: number for number, node in enumerate(self.order)}
        self.cuts = {position.index: position for position in frontiers.positions}
        self.keys = [self._key(node) for node in self.order]
        self.leaves = [leaves(node) for node in self.order]

    def _key(self, node: fx.Node) -> str:
        """Describe what a node does; numbers and sources stand for any others of their type."""

        def blank(leaf: Leaf) -> Leaf:
            return "#" if is_number(leaf) else leaf

        def source(other: fx.Node) -> str:
            if other.op == "get_attr" and isinstance(
                resolve(self.program.module, str(other.target)), nn.Parameter
            ):
                return f"weight {other.target}"
            return f"<{self.facts[other].spec}>"

        blanked = fx.node.map_aggregate((node.args, node.kwargs), blank)
        text = repr(fx.node.map_arg(blanked, source))
        return f"{node.op} {node.target} {text} {self.facts[node].spec}"

    def loops(self) -> Iterator[Loop]:
        """Yield the longest loop of every possible period, without its constants.

        Steps of two steps each are a loop too: a multiple of the period of a loop is not a period.
        """
        periods: list[int] = []
        for period in self._periods():
            if any(period % shorter == 0 for shorter in periods):
                continue
            for begin, end in self._regions(period):
                loop = self._longest(begin, period, end)
                if loop is not None:
                    periods.append(period)
                    yield loop

    def _longest(self, begin: int, period: int, end: int) -> Loop | None:
        """Return the loop of a region; a step ends where the fewest tensors cross.

        In a long loop the first steps are cheap enough to be side values: it begins after them. A
        state that holds evaluations of earlier steps is that of every step only after as many.
        """
        runs: dict[int, list[Position]] = {}
        for start in range(begin, min(begin + period, end - 2 * period + 1)):
            best, longest = start, list[Position]()
            while start + _LEAST_STEPS * period <= end and len(longest) < _LEAST_STEPS:
                positions = self._positions(start, period, end)
                if len(positions) > len(longest):
                    best, longest = start, positions
                start += period
            runs[best] = longest
        starts = [start for start, positions in runs.items() if len(positions) >= _LEAST_STEPS]
        starts.sort(key=lambda start: (len(runs[start][0].state), -len(runs[start]), start))
        for start in starts:
            steps = self._connected(start, period, len(runs[start]))
            if steps >= _LEAST_STEPS:
                return Loop(start, period, tuple(runs[start][:steps]), ())
        return None

    def _periods(self) -> list[int]:
        """Return the distances between calls of the module that is called most often."""
        calls: dict[str, list[int]] = {}
        for number, node in enumerate(self.order):
            if holds_weights(self.program, node):
                calls.setdefault(self.keys[number], []).append(number)
        numbers = max(calls.values(), key=len, default=[])
        if len(numbers) < _LEAST_STEPS:
            return []
        periods: dict[int, None] = {}
        for count in range(1, min(_MOST_CALLS, len(numbers) - 1) + 1):
            distances = Counter(b - a for a, b in zip(numbers, numbers[count:], strict=False))
            periods |= dict.fromkeys(d for d, _ in distances.most_common(2))
        return sorted(periods)

    def _regions(self, period: int) -> list[tuple[int, int]]:
        """Return the runs of nodes that repeat with a period, of at least the fewest steps."""
        keys = self.keys
        equal = [a == b for a, b in zip(keys, keys[period:], strict=False)]
        regions, number = [], 0
        for same, run in itertools.groupby(equal):
            length = len(list(run))
            if same and length >= (_LEAST_STEPS - 1) * period:
                regions.append((number, number + length + period))
            number += length
        return regions

    def _positions(self, start: int, period: int, end: int) -> list[Position]:
        """Return the cuts after the steps of a loop whose first step begins at `start`."""
        positions: list[Position] = []
        for stop in range(start + period, end + 1, period):
            position = self.cuts.get(stop)
            if position is None or not self._continues(positions, position, period):
                break
            positions.append(position)
        return positions

    def _continues(self, before: Sequence[Position], position: Position, period: int) -> bool:
        """Whether a state is the one before it, a step later."""
        if not before:
            return True
        last = before[-1]
        return len(last.state) == len(position.state) and all(
            a is b or self.index.get(b, -1) - self.index.get(a, 0) == period
            for a, b in zip(last.state, position.state, strict=True)
        )

    def _connected(self, start: int, period: int, steps: int) -> int:
        """Return for how many steps the nodes read each other alike."""
        for step in range(2, steps):
            for offset in range(period):
                number = start + step * period + offset
                pairs = zip(self.leaves[number - period], self.leaves[number], strict=True)
                if not all(self._alike(a, b, start, period) for a, b in pairs):
                    return step
        return steps

    def _alike(self, a: Leaf, b: Leaf, start: int, period: int) -> bool:
        """Whether leaves of two steps are the same node of their step, or not of any step."""
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return isinstance(a, fx.Node) == isinstance(b, fx.Node)
        one, other = self.index.get(a, -1), self.index.get(b, -1)
        if one < start and other < start:
            return True
        return other - one == period

    def constants(self, loop: Loop) -> tuple[StepConstant, ...]:
        """Return the leaves that differ from step to step."""
        constants = []
        for offset in range(loop.period):
            begin = loop.start + offset
            numbers = range(begin, loop.positions[-1].index, loop.period)
            rows = zip(*(self.leaves[number] for number in numbers), strict=True)
            for leaf, values in enumerate(rows):
                if self._is_constant(values, loop.start) and not self._equal(
                    values[1:], values[:-1]
                ):
                    constants.append(StepConstant(offset, leaf, values, ends=False))
        return tuple(
            StepConstant(one.offset, one.leaf, one.values, self._ends(one, constants))
            for one in constants
        )

    def _is_constant(self, values: Sequence[Leaf], start: int) -> bool:
        if all(map(is_number, values)):
            return True
        return all(
            isinstance(value, fx.Node) and self.index.get(value, -1) < start for value in values
        )

    def _ends(self, constant: StepConstant, others: Sequence[StepConstant]) -> bool:
        return any(
            other is not constant and self._equal(constant.values[:-1], other.values[1:])
            for other in others
        )

    def _equal(self, one: Sequence[Leaf], other: Sequence[Leaf]) -> bool:
        return all(itertools.starmap(self._same, zip(one, other, strict=True)))

    def _same(self, a: Leaf, b: Leaf) -> bool:
        if a is b or (is_number(a) and is_number(b) and a == b):
            return True
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return False
        if a.op != "get_attr" or b.op != "get_attr":
            return False
        first, second = (resolve(self.program.module, str(node.target)) for node in (a, b))
        tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        return tensors and first.device.type != "meta" and torch.equal(first, second)


def describe(program: Program, loop: Loop, order: Sequence[fx.Node]) -> tuple[str, ...]:
    """Describe the step constants of a loop, one line each: `full[1]: 0.0, 0.25 ... 0.75`."""
    lines = []
    for constant in loop.constants:
        node = order[loop.start + constant.offset]
        where = provenance(node).path
        values = [_text(program, value) for value in constant.values]
        shown = f"{values[0]}, {values[1]} ... {values[-1]}"
        kind = ", of the end of a step" if constant.ends else ""
        lines.append(f"{_label(node)}{f' in {where}' if where else ''}: {shown}{kind}")
    return tuple(lines)


def _label(node: fx.Node) -> str:
    """Name what reads a step constant: an entry of a table, a function, or a layer."""
    table = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(table, fx.Node) and table.op == "get_attr":
        return f"{table.target}[i]"
    return name_of(node) or str(node.target)


def _text(program: Program, value: Leaf) -> str:
    if not isinstance(value, fx.Node):
        return f"{value:.6g}"
    if value.op == "get_attr":
        tensor = resolve(program.module, str(value.target))
        if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and not tensor.is_meta:
            return f"{tensor.item():.6g}"
    return str(value.target) if value.op in ("placeholder", "get_attr") else name_of(value)
