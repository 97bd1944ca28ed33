"""Run the stages of a loop in time that one device computes together: in lockstep, as one batch.

Every stage of a loop takes the same steps, with the same weights, from a state of its own. Node
number `o` of a step is one call for all of them, over states that are stacked on a new axis
(`torch.vmap`). Three stages of two Euler steps:

    stage 0    e = net(x0, 0.0)   x = x0 + h e   e = net(x, 0.1)   x = x + h e
    stage 1    e = net(x1, 0.2)   x = x1 + h e   e = net(x, 0.3)   x = x + h e
    stage 2    e = net(x2, 0.4)   x = x2 + h e   e = net(x, 0.5)   x = x + h e
    together   E = net(X, [0.0, 0.2, 0.4])  ...  two evaluations in place of six

A node of a step is one of three kinds. What reads no state and differs from stage to stage (a time,
a table look-up) is computed for each stage; what is alike in all of them, once; all else is
batched. Where stages have different numbers of steps, the longer ones go on in a smaller batch.
torch calls an operator that it cannot batch once a stage, and warns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import fx, nn

from passes.analysis.dependence import name_of
from passes.analysis.loops import is_number, leaves
from passes.coarse.time_step import StartOptions, TimeStepOptions
from passes.errors import OptionError, first_line
from passes.ir.isolation import with_plain_transformers
from passes.ir.program import resolve
from passes.plan.schema import Plan
from passes.transform.split import Stages

_Row = tuple[Any, ...]
"""A node, or a leaf among the arguments of a node, of every stage."""
_SHOWN = 3
"""Nodes that an error lists."""
_SIZES = {
    "size", "dim", "numel", "shape", "ndim", "dtype", "device", "is_cuda", "sym_size", "sym_numel",
}  # fmt: skip
"""What can be asked of a tensor without its values."""
_FILLS = {"new_full", "full_like"}
"""What fills a tensor of another one's type with a number, and reads no values of that one."""


def chained_stages(plan: Plan) -> frozenset[int]:
    """Return the stages whose guess is the prediction of the stage before, from its own guess.

    One process computes that prediction anyway. On ranks, every guess starts from the inputs.
    """
    chained = set()
    for number in range(2, len(plan.stages)):
        before, stage = plan.stages[number - 1 : number + 1]
        if before.preprocess is None or before.coarse is None or stage.preprocess is None:
            continue
        first, step, both = before.preprocess, before.coarse, stage.preprocess
        if (
            isinstance(first.options, StartOptions)
            and isinstance(step.options, TimeStepOptions)
            and isinstance(both.options, StartOptions)
            and first.options.steps.rule == step.options.steps.rule == both.options.steps.rule
            and first.options.steps.lengths + step.options.steps.lengths
            == both.options.steps.lengths
            and {*stage.consumes} <= {value.name for value in plan.corrects(number - 1)}
        ):
            chained.add(number)
    return frozenset(chained)


def first_steps(plan: Plan) -> list[tuple[str, int, int]]:
    """Return the first node of the loop in every stage, the nodes of a step, and its steps.

    Raises:
        OptionError: The stages are not made of steps of a loop.
    """
    found = []
    for number, stage in enumerate(plan.stages):
        spec = stage.coarse if number else plan.stages[min(1, len(plan.stages) - 1)].preprocess
        options = spec.options if spec is not None else None
        if not isinstance(options, TimeStepOptions | StartOptions):
            raise refusal("only stages of coarse='time_step' and preprocess='time_step' can")
        steps = options.steps
        found.append((steps.first, steps.period, sum(steps.lengths)))
    return found


def refusal(reason: str) -> OptionError:
    """Say why stages do not run as one batch."""
    return OptionError(f"the stages cannot run as one batch: {reason}; leave out batched=True")


class _Kind(Enum):
    SHARED = auto()  # one value for all stages
    EACH = auto()  # a value a stage
    BATCHED = auto()  # one tensor with all stages on a mapped axis


@dataclass(frozen=True)
class _Segment:
    """Some steps of some stages as one batched call.

    Attributes:
        call: The graph under `torch.vmap`.
        entering: By argument of the call, the node of every stage that it stands for.
        leaving: By result, the same.
        stages: Number of the stages.
        numbers: Names of nodes that read numbers as tensors, as they differ from stage to stage.
    """

    call: Callable[..., Any]
    entering: tuple[tuple[fx.Node, ...], ...]
    leaving: tuple[tuple[fx.Node, ...], ...]
    stages: int
    numbers: str

    def run(self, values: Mapping[fx.Node, Any]) -> tuple[torch.Tensor, ...]:
        """Call it: with what all stages share as it is, and with stacks of what they do not."""
        arguments = [
            values[row[0]] if len(row) == 1 else torch.stack([values[node] for node in row])
            for row in self.entering
        ]
        device = next((a.device for a in arguments if isinstance(a, torch.Tensor)), None)
        results: tuple[torch.Tensor, ...] = self.call(
            torch.arange(self.stages, device=device), *arguments
        )
        return results


class Lockstep:
    """Batched calls of the fine stages of a loop.

    Args:
        plan: The plan.
        stages: Its stages.

    Raises:
        OptionError: The stages are not made of steps of a loop.
    """

    def __init__(self, plan: Plan, stages: Stages) -> None:
        self.plan, self.modules = plan, stages.fine
        self.period = 0
        self.steps: list[list[fx.Node]] = []
        self.before: list[list[fx.Node]] = []
        for module, (first, self.period, count) in zip(stages.fine, first_steps(plan), strict=True):
            order = [n for n in module.graph.nodes if n.op.startswith("call")]
            start = next((i for i, node in enumerate(order) if node.name == first), len(order))
            if start + count * self.period != len(order):
                raise refusal(f"stage {len(self.steps)} does not end with a step")
            self.before.append(order[:start])
            self.steps.append(order[start:])
        self._segments: dict[tuple[int, ...], list[_Segment]] = {}

    def run(
        self, numbers: Sequence[int], arguments: Sequence[Sequence[Any]]
    ) -> list[tuple[torch.Tensor, ...]]:
        """Run stages together.

        Args:
            numbers: Their numbers.
            arguments: The arguments of each.

        Returns:
            What each stage produces.

        Raises:
            OptionError: An operation of a step cannot be batched.
        """
        key = tuple(numbers)
        if key not in self._segments:
            self._segments[key] = self._divide(key)
        values: dict[fx.Node, Any] = {}
        for number, given in zip(key, arguments, strict=True):
            values |= self._start(number, given)
        for segment in self._segments[key]:
            try:
                # The fast path of torch's transformer layers cannot be batched.
                with with_plain_transformers():
                    results = segment.run(values)
            except (RuntimeError, TypeError) as error:
                reason = first_line(error)
                if segment.numbers:
                    reason += f" (numbers differ from stage to stage in {segment.numbers})"
                raise refusal(reason) from error
            for row, result in zip(segment.leaving, results, strict=True):
                values |= zip(row, result, strict=True)
        return [tuple(values[node] for node in self._results(number)) for number in key]

    def _placeholders(self, number: int) -> list[fx.Node]:
        return [n for n in self.modules[number].graph.nodes if n.op == "placeholder"]

    def _results(self, number: int) -> list[fx.Node]:
        return [*self.modules[number].graph.output_node().all_input_nodes]

    def _start(self, number: int, given: Sequence[Any]) -> dict[fx.Node, Any]:
        """Return the values of a stage before its steps: arguments, attributes, side values."""
        module, runner = self.modules[number], fx.Interpreter(self.modules[number])
        runner.extra_traceback = False
        runner.env = dict(zip(self._placeholders(number), given, strict=True))
        for node in module.graph.nodes:
            if node.op == "get_attr":
                runner.env[node] = resolve(module, str(node.target))
        for node in self.before[number]:
            runner.env[node] = runner.run_node(node)
        return runner.env

    def _divide(self, numbers: tuple[int, ...]) -> list[_Segment]:
        """Divide the steps of stages into batched calls, by the stages that still go on."""
        segments, start, states = [], 0, set[fx.Node]()
        for number in numbers:
            consumed = self.plan.stages[number].consumes
            states |= {n for n in self._placeholders(number) if n.name in consumed}
            states |= {*self.before[number]} if not number else set()
        for stop in sorted({len(self.steps[number]) for number in numbers}):
            alive = [number for number in numbers if len(self.steps[number]) >= stop]
            rows = zip(*(self.steps[number][start:stop] for number in alive), strict=True)
            segments.append(_segment(self.modules[alive[0]], [*rows], states))
            states |= {node for number in alive for node in self.steps[number][start:stop]}
            start = stop
        return segments


def _segment(
    module: nn.Module, rows: Sequence[tuple[fx.Node, ...]], states: AbstractSet[fx.Node]
) -> _Segment:
    """Write rows of nodes, that of every stage beside those of the others, as a batched call."""
    writer = _Writer(module, states)
    for row in rows:
        writer.add(row)
    inside = {node for row in rows for node in row}
    leaving = tuple(row for row in rows if any(u not in inside for n in row for u in n.users))
    writer.graph.output(tuple(writer.batched(row) for row in leaving))
    writer.graph.lint()
    graph = fx.GraphModule(module, writer.graph, "Lockstep")
    dims = (0, *(None if len(row) == 1 else 0 for row in writer.arguments))
    return _Segment(
        call=torch.vmap(graph.forward, in_dims=dims),
        entering=tuple(writer.arguments),
        leaving=leaving,
        stages=len(rows[0]),
        numbers=", ".join(writer.numbers[:_SHOWN]),
    )


class _Writer:
    """Writer of the graph of a batched call.

    Args:
        module: Owner of the layers.
        states: Nodes outside of the call that depend on the state of their stage.

    Attributes:
        graph: The graph; its first argument is the number of a stage among those of the call.
        arguments: By further argument, the nodes that it stands for: one for a value that all
            stages share.
        numbers: Names of nodes that read numbers as tensors.
    """

    def __init__(self, module: nn.Module, states: AbstractSet[fx.Node]) -> None:
        self.module, self.graph, self._states = module, fx.Graph(), states
        self.arguments: list[tuple[fx.Node, ...]] = []
        self.numbers: list[str] = []
        self._stage = self._last = self.graph.placeholder("stage")
        self._kinds: dict[_Row, _Kind] = {}
        self._values: dict[_Row, list[fx.Node]] = {}
        self._picked: dict[_Row, fx.Node] = {}

    def add(self, row: tuple[fx.Node, ...]) -> None:
        """Write a node of all stages."""
        node, columns = row[0], [*zip(*map(leaves, row), strict=True)]
        kinds = {self._kind(leaf) for leaf in columns}
        kind = _Kind.SHARED
        if _Kind.EACH in kinds and name_of(node) in _FILLS:
            kind = _Kind.EACH
        elif _Kind.BATCHED in kinds or (_Kind.EACH in kinds and self._has_weights(node)):
            kind = _Kind.SHARED if _asks_size(node) else _Kind.BATCHED
        elif _Kind.EACH in kinds:
            kind = _Kind.EACH
        self._kinds[row] = kind
        if kind is _Kind.EACH:
            self._values[row] = [
                self._copy(one, [self._of_stage(leaf, stage) for leaf in columns])
                for stage, one in enumerate(row)
            ]
        else:
            if any(not isinstance(leaf[0], fx.Node) and not _is_alike(leaf) for leaf in columns):
                self.numbers.append(node.name)
            self._values[row] = [self._copy(node, [self._of_all(leaf) for leaf in columns])]

    def batched(self, row: _Row) -> fx.Node:
        """Return the value of a row with all stages on the mapped axis."""
        kind, values = self._kinds[row], self._values[row]
        if kind is _Kind.BATCHED:
            return values[0]
        stages = values if kind is _Kind.EACH else values * len(row)
        return self._pick(row, self.graph.call_function(torch.stack, (stages,)))

    def _has_weights(self, node: fx.Node) -> bool:
        """Whether a node is a layer, or reads a parameter: worth one call for all stages."""
        return node.op == "call_module" or any(
            source.op == "get_attr"
            and isinstance(resolve(self.module, str(source.target)), nn.Parameter)
            for source in node.all_input_nodes
        )

    def _kind(self, leaf: _Row) -> _Kind:
        """Say what a leaf of the arguments is; one that comes from outside becomes an argument."""
        if not isinstance(leaf[0], fx.Node):
            return _Kind.SHARED if _is_alike(leaf) else _Kind.EACH
        if leaf not in self._kinds:
            names = {str(one.target) if one.op == "get_attr" else one.name for one in leaf}
            kind = _Kind.SHARED
            if len(names) > 1:
                kind = _Kind.BATCHED if self._states & {*leaf} else _Kind.EACH
            self._kinds[leaf] = kind
            each = [(one,) for one in leaf] if kind is _Kind.EACH else [leaf[: len(names)]]
            self._values[leaf] = [self._argument(nodes) for nodes in each]
        return self._kinds[leaf]

    def _argument(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        with self.graph.inserting_after(self._last):
            self._last = self.graph.placeholder(nodes[0].name)
        self.arguments.append(nodes)
        return self._last

    def _of_stage(self, leaf: _Row, stage: int) -> Any:
        """Return the value of a leaf for one stage."""
        if not isinstance(leaf[0], fx.Node):
            return leaf[stage]
        return self._values[leaf][stage if self._kinds[leaf] is _Kind.EACH else 0]

    def _of_all(self, leaf: _Row) -> Any:
        """Return the value of a leaf for all stages at once."""
        if isinstance(leaf[0], fx.Node):
            each = self._kinds[leaf] is _Kind.EACH
            return self.batched(leaf) if each else self._values[leaf][0]
        if _is_alike(leaf):
            return leaf[0]
        if not all(map(is_number, leaf)):
            raise refusal(f"an argument differs from stage to stage: {leaf[0]!r}")
        return self._pick(leaf, self.graph.call_function(_table, (self._stage, [*leaf])))

    def _pick(self, row: _Row, table: fx.Node) -> fx.Node:
        """Pick the own value of a stage from a table of all."""
        if row not in self._picked:
            self._picked[row] = self.graph.call_function(_pick, (table, self._stage))
        return self._picked[row]

    def _copy(self, node: fx.Node, new: Sequence[Any]) -> fx.Node:
        counter = itertools.count()
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda _: new[next(counter)])
        return self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)


def _is_alike(leaf: _Row) -> bool:
    return all(type(one) is type(leaf[0]) and one == leaf[0] for one in leaf)


def _asks_size(node: fx.Node) -> bool:
    """Whether a node asks for what a tensor is, not for its values."""
    return (node.args[1] if node.target is getattr else name_of(node)) in _SIZES


def _table(stage: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    kind = torch.float64 if any(isinstance(number, float) for number in numbers) else torch.int64
    return torch.tensor(numbers, dtype=kind, device=stage.device)


def _pick(table: torch.Tensor, stage: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, stage.reshape(1)).squeeze(0)
