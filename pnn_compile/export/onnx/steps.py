"""A parareal network as a list of steps over named values: what runs, where, and what it reads.

The list is read off the assembled network and decides nothing. One ONNX file holds all of its
steps; a file per stage holds those of the stage that can run without a pause.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from passes.transform.assemble import step_of
from passes.transform.sweep import Role
from pnn_compile.export.onnx.observe import Observed, Spec, leaves

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["ROLES", "Place", "Step", "Steps", "read_steps"]

ROLES: tuple[str, ...] = tuple(Role)
"""What a node may do, in the order of the sweep."""


@dataclass(frozen=True)
class Place:
    """Where a step belongs.

    Attributes:
        stage: Number of the stage from 0; the head belongs to the last one.
        role: One of `ROLES`.
        iteration: Number of the parareal iteration from 0.
    """

    stage: int
    role: str
    iteration: int


@dataclass(frozen=True)
class Step:
    """A call of a piece, or a difference or sum of two tensors.

    Attributes:
        target: Name of the piece, "Sub" or "Add".
        inputs: Names of the values that it reads.
        outputs: Names of the values that it gives.
        place: Where it belongs.
    """

    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    place: Place


@dataclass(frozen=True)
class Steps:
    """A network.

    Attributes:
        inputs: Names of the values that it is given.
        steps: What it does, in an order in which it can be done.
        outputs: Public names of what it gives, and the values that they stand for.
        specs: Types of all values.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, str], ...]
    specs: Mapping[str, Spec]


def read_steps(compiled: Compiled, observed: Observed) -> Steps:
    """Read the steps off the assembled network."""
    return _Reader(compiled, observed).read()


class _Reader:
    def __init__(self, compiled: Compiled, observed: Observed) -> None:
        self.graph = compiled.module.graph
        self.observed = observed
        self.values = observed.values[""]
        self.names: dict[fx.Node, list[str]] = {}
        self.specs: dict[str, Spec] = {}

    def read(self) -> Steps:
        inputs: list[str] = []
        steps: list[Step] = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = [*self._leaf_names(node)]
                inputs += self.names[node]
            elif node.op == "call_function" and node.target is operator.getitem:
                source: Any = node.args[0]
                self.names[node] = [self.names[source][int(str(node.args[1]))]]
            elif node.op != "output":
                steps.append(self._step(node))
        head = steps[-1]
        public = [name for name, _ in self.observed.outputs]
        outputs = tuple(zip(public, head.outputs, strict=True))
        return Steps(tuple(inputs), tuple(steps), outputs, self.specs)

    def _step(self, node: fx.Node) -> Step:
        sources: list[Any] = list(node.args)
        read = [name for source in sources for name in self.names[source]]
        step = step_of(node)
        assert step is not None
        place = Place(step.stage, step.role, step.iteration)
        if node.target == "head":
            specs = [spec for _, spec in self.observed.outputs]
            given = [f"output_{index}" for index in range(len(specs))]
        else:
            specs = [leaf for leaf in leaves(self.values[node.name]) if isinstance(leaf, Spec)]
            given = self._given(node, len(specs))
        self.names[node] = given
        self.specs.update(zip(given, specs, strict=True))
        arithmetic: dict[Any, str] = {operator.add: "Add", operator.sub: "Sub"}
        target = arithmetic.get(node.target, str(node.target))
        return Step(target, tuple(read), tuple(given), place)

    def _leaf_names(self, node: fx.Node) -> Iterator[str]:
        """Names of the tensors of an argument, which may be nested."""
        value = self.values[node.name]
        found = leaves(value)
        for index, leaf in enumerate(found):
            if isinstance(leaf, Spec):
                name = str(node.target) if value is leaf else f"{node.target}.{index}"
                self.specs[name] = leaf
                yield name

    @staticmethod
    def _given(node: fx.Node, count: int) -> list[str]:
        """Names of what a call gives: the node's own, or those of the nodes that take its items."""
        if count == 1:
            return [node.name]
        names = [f"{node.name}_{index}" for index in range(count)]
        for user in node.users:
            if user.target is operator.getitem:
                names[int(str(user.args[1]))] = user.name
        return names
