"""Write coarse steps of a loop in time as a graph: the graph of its steps, with fewer evaluations.

`passes.coarse.time_step` says what the two rules mean. With two steps of an Euler method in one
coarse step of length 2:

    program       t = full(n, 0.0)     e = net(x, t)     y = mul(e, 0.1)     x1 = add(x, y)
                  t1 = full(n, 0.1)    e1 = net(x1, t1)  y1 = mul(e1, 0.1)   x2 = add(x1, y1)
    "constants"   t = full(n, 0.0)     e = net(x, t)     y = mul(e, 0.2)     x2 = add(x, y)
    held          t = full(n, 0.0)     e = net(x, t)     y = mul(e, 0.1)     x1 = add(x, y)
                                                         y1 = mul(e, 0.1)    x2 = add(x1, y1)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import fx

from passes.analysis.loops import holds_weights, leaves
from passes.coarse.spec import NON_EMPTY, Count, NodeName
from passes.errors import SynthesisError
from passes.ir.program import Program, graph_module


@dataclass(frozen=True)
class MovedConstant:
    """A step constant of a coarse step that is not the one of its first step.

    Attributes:
        offset: Number of the node in its step.
        leaf: Number of the leaf among the arguments of the node.
        rule: "end": that of the last step; "sum": the sum over the steps.
    """

    offset: int
    leaf: int
    rule: Literal["end", "sum"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a coarse step follows from the steps that it stands for; see `time_step.py`."""

    held: bool
    moved: tuple[MovedConstant, ...] = ()

    def __str__(self) -> str:
        return "evaluations are held" if self.held else "at larger constants"


@dataclass(frozen=True, kw_only=True)
class CoarseSteps:
    """Coarse steps of a loop, one after another.

    Attributes:
        first: First node of the first step.
        period: Number of nodes of a step.
        lengths: Number of steps that every coarse step stands for.
        rule: How it follows from them.
    """

    first: NodeName
    period: Count
    lengths: Annotated[tuple[Count, ...], NON_EMPTY]
    rule: Rule


def held_offsets(program: Program, step: Sequence[fx.Node]) -> frozenset[int]:
    """Return which nodes of a step belong to the evaluation: from its first layer to its last.

    In `y = a * x; e = net(y); z = e / 2; x' = x + z` that is `net` alone.
    """
    number = {node: offset for offset, node in enumerate(step)}
    layers = {offset for offset, node in enumerate(step) if holds_weights(program, node)}
    after, before = set(layers), set(layers)
    for offset, node in enumerate(step):
        if any(number.get(source) in after for source in node.all_input_nodes):
            after.add(offset)
    for offset in reversed(range(len(step))):
        if any(number.get(user) in before for user in step[offset].users):
            before.add(offset)
    return frozenset(after & before)


class StepWriter:
    """Writer of the graph of coarse steps.

    Args:
        program: The program.
        entering: Names of the values that become the first placeholders.
        inputs: Names of the inputs of the program that become the next ones.
    """

    def __init__(self, program: Program, entering: Iterable[str], inputs: Iterable[str]) -> None:
        self.program, self.order = program, program.order
        self.by_name = {node.name: node for node in program.graph.nodes}
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        for name in (*entering, *inputs):
            self.copies[self.by_name[name]] = self.graph.placeholder(name)

    def value(self, node: fx.Node) -> fx.Node:
        """Return the copy of a node that was copied before."""
        if node not in self.copies and node.op == "get_attr":
            self.copies[node] = self.graph.node_copy(node)
        if node not in self.copies:
            raise SynthesisError(f"a coarse step reads {node.name!r}, which does not reach it")
        return self.copies[node]

    def copy(self, nodes: Iterable[fx.Node]) -> None:
        """Copy nodes in order, unless they were copied before."""
        for node in nodes:
            if node not in self.copies:
                self.copies[node] = self.graph.node_copy(node, self.value)

    def steps(self, steps: CoarseSteps) -> None:
        """Write coarse steps."""
        start, period = self.order.index(self.by_name[steps.first]), steps.period
        if start + period * sum(steps.lengths) > len(self.order):
            raise SynthesisError(f"the coarse steps from {steps.first!r} leave the program")
        held = held_offsets(self.program, self.order[start : start + period])
        for length in steps.lengths:
            if steps.rule.held:
                self._hold(start, period, length, held)
            else:
                self._move(start, period, length, steps.rule.moved)
            start += length * period

    def _hold(self, start: int, period: int, length: int, held: frozenset[int]) -> None:
        """Copy steps, the evaluations of the first one in place of those of the others."""
        self.copy(self.order[start : start + period])
        for step in range(1, length):
            for offset in range(period):
                node = self.order[start + step * period + offset]
                if offset in held:
                    self.copies[node] = self.copies[self.order[start + offset]]
                else:
                    self.copy([node])

    def _move(self, start: int, period: int, length: int, moved: Sequence[MovedConstant]) -> None:
        """Copy the first of some steps, with other constants."""
        last = start + (length - 1) * period
        for offset in range(period):
            node = self.order[start + offset]
            rules = {one.leaf: one.rule for one in moved if one.offset == offset}
            new = {
                leaf: self._constant(rule, leaf, range(start + offset, last + offset + 1, period))
                for leaf, rule in rules.items()
            }
            copied = self.graph.node_copy(node, self.value)
            if new:
                copied.args, copied.kwargs = _with_leaves(copied, new)
            self.copies[node] = copied
        if length > 1:
            for offset in range(period):
                self.copies[self.order[last + offset]] = self.copies[self.order[start + offset]]

    def _constant(self, rule: str, leaf: int, numbers: range) -> Any:
        """Return the constant of a coarse step, given the numbers of its nodes in the program."""
        values = [leaves(self.order[number])[leaf] for number in numbers]
        if rule == "end":
            return self.value(values[-1]) if isinstance(values[-1], fx.Node) else values[-1]
        return sum(values)

    def finish(self, leaving: Sequence[str], name: str) -> fx.GraphModule:
        """Return the values of these names, and drop what they do not depend on."""
        results = tuple(self.value(self.by_name[one]) for one in leaving)
        output = self.graph.output(results[0] if len(results) == 1 else results)
        needed, pending = {output}, [output]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in needed:
                    needed.add(source)
                    pending.append(source)
        for node in reversed(self.graph.nodes):
            if node not in needed and node.op != "placeholder":
                self.graph.erase_node(node)
        self.graph.lint()
        return graph_module(self.program.module, self.graph, name)


def _with_leaves(node: fx.Node, new: dict[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a node with other leaves, by their numbers."""
    counter = itertools.count()

    def replaced(leaf: Any) -> Any:
        number = next(counter)
        return new.get(number, leaf)

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replaced)
    return args, kwargs
