"""Family `time_step`: the step of a loop in time itself, at a larger step.

A stage of a loop runs from step i to step j. Its coarse propagator calls the network once (or m
times) with the weights of the trunk, as the same sampler or solver would on a coarser schedule (the
coarse propagator of classical parareal: Lions, Maday, Turinici 2001; of samplers: Selvam et al.,
NeurIPS 2024). Take Euler steps x + h f(x, t), and a stage of three of them:

    rule           the stage returns
    none           x1 + h f(x1, t + h) ...            three evaluations
    "constants"    x + (h + h + h) f(x, t)            h is summed, the end of a step becomes that of
                                                      the last one, all else is the first step's
    "held"         x1 = x + h e, x2 = x1 + h e, ...   e = f(x, t) is held, and the rest of all steps
                                                      is computed: exact but for the evaluation

"held" fits every update that is written out, whatever its coefficients are, and noise that is an
input. "constants" has larger steps of higher order (Heun, Runge-Kutta) and the fewest operations.

Which rule fits is not guessed but tried on the example inputs: the one-step error must be a part of
what the stage does, and must fall as the stage gets shorter. With as many coarse steps as steps,
both equal the stage.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from torch import fx, nn

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position, requirements
from passes.analysis.loops import Loop, holds_weights, is_number, leaves
from passes.coarse.spec import (
    NON_EMPTY,
    CoarseOptions,
    Count,
    NodeName,
    PreprocessOptions,
    Site,
    SourceSpec,
    Span,
    ValueName,
)
from passes.errors import SynthesisError
from passes.ir.isolation import preserved
from passes.ir.program import Interpreter, Program, graph_module, tensor_leaves
from passes.ir.tensor_spec import Value

if TYPE_CHECKING:
    from passes.options import Options

_USEFUL = 0.5
"""Largest error of a coarse step, relative to the change of the state over the stage."""
_STAGES = 4
"""Number of stages for which coarse steps are tried, if it is not chosen yet."""
_BETTER = 0.9
"""Another rule must lower the error at least to this share."""


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
    """How a coarse step follows from the steps that it stands for; see the head of this file."""

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


@dataclass(frozen=True, kw_only=True)
class TimeStepOptions(CoarseOptions):
    """Options of family `time_step`.

    Attributes:
        steps: The coarse steps.
        entering: The values that the stage reads.
        leaving: The values that it computes.
        sides: Side values that it recomputes.
    """

    steps: CoarseSteps
    entering: tuple[ValueName, ...]
    leaving: tuple[NodeName, ...]
    sides: tuple[NodeName, ...]

    @classmethod
    def choose(cls, span: Span) -> Self:
        """Take `units` coarse steps.

        Raises:
            SynthesisError: The stage is not made of whole steps of a loop.
        """
        analysis = span.analysis
        loop = demand_loop(analysis)
        start, stop = loop.step_at(span.start.index), loop.step_at(span.stop.index)
        if start is None or stop is None or stop <= start:
            raise SynthesisError("the stage is not made of whole steps of the loop")
        inside = analysis.frontiers.order[span.start.index : span.stop.index]
        inputs, sides = requirements(analysis.program, inside, analysis.frontiers.recomputable)
        return cls(
            inputs=inputs,
            steps=coarse_steps(analysis, span.options, start, stop, span.options.units),
            entering=tuple(value.name for value in span.entering),
            leaving=tuple(value.name for value in span.leaving),
            sides=sides,
        )

    @property
    def why(self) -> str:
        """Reason for the plan."""
        lengths = ", ".join(map(str, self.steps.lengths))
        return f"the step itself, for {lengths} steps, {self.steps.rule}"


@dataclass(frozen=True, kw_only=True)
class StartOptions(PreprocessOptions):
    """Options of a preprocessing operator that runs coarse steps from the inputs.

    Attributes:
        before: First and last node before the loop; None if there are none.
        steps: The coarse steps up to the interface.
    """

    before: tuple[NodeName, NodeName] | None = None
    steps: CoarseSteps = field()


def demand_loop(analysis: Analysis) -> Loop:
    """Return the loop of a program that coarse steps can imitate.

    Raises:
        SynthesisError: There is none, or its steps cannot be computed repeatedly.
    """
    loop = analysis.loop
    if loop is None:
        raise SynthesisError(
            "the model has no loop in time: no part of half its work repeats with the same weights"
        )
    for node in analysis.frontiers.order[loop.start : loop.positions[-1].index]:
        if analysis.facts[node].random:
            raise SynthesisError(
                f"a step draws random numbers ({node.name}): pass the noise as an input"
            )
        if analysis.facts[node].writes and not node.users:
            raise SynthesisError(f"a step writes in place ({node.name})")
    return loop


def between_steps(analysis: Analysis) -> list[Position]:
    """Return the cuts after the steps of the loop; the last one is its end.

    Raises:
        SynthesisError: There is no loop.
    """
    return [*demand_loop(analysis).positions]


def stage_steps(analysis: Analysis, options: Options) -> int:
    """Return the number of steps of an equal stage, rounded up."""
    count: int = _STAGES
    if options.cuts is not None:
        count = len(options.cuts) + 1
    elif options.stages != "auto":
        count = options.stages
    return -(-demand_loop(analysis).steps // max(1, count))


def coarse_steps(
    analysis: Analysis, options: Options, start: int, stop: int, count: int
) -> CoarseSteps:
    """Divide the steps between two cuts into nearly equal coarse steps.

    Raises:
        SynthesisError: Coarse steps do not imitate the loop.
    """
    loop = demand_loop(analysis)
    bounds = [(stop - start) * part // count for part in range(count + 1)]
    first = analysis.frontiers.order[loop.start + start * loop.period].name
    lengths = tuple(high - low for low, high in itertools.pairwise(bounds) if high > low)
    rule = find_rule(analysis, stage_steps(analysis, options)).rule
    return CoarseSteps(first=first, period=loop.period, lengths=lengths, rule=rule)


def start_options(
    analysis: Analysis, options: Options, cut: Position, state: Sequence[Value]
) -> StartOptions:
    """Describe the coarse steps from the inputs to a cut, as long as those of the stages.

    Raises:
        SynthesisError: The cut is not between two steps.
    """
    loop = demand_loop(analysis)
    stop = loop.step_at(cut.index)
    if not stop:
        raise SynthesisError("the stage does not begin at a step of the loop")
    order, program = analysis.frontiers.order, analysis.program
    count = -(-stop // stage_steps(analysis, options)) * options.units
    inputs, _ = requirements(program, order[: cut.index], {})
    return StartOptions(
        rank=options.rank,
        sources=tuple(SourceSpec(**vars(value.spec), name=value.name) for value in state),
        inputs=inputs,
        sides=(),
        before=(order[0].name, order[loop.start - 1].name) if loop.start else None,
        steps=coarse_steps(analysis, options, 0, stop, min(count, stop)),
    )


def work_of(analysis: Analysis, steps: CoarseSteps) -> list[fx.Node]:
    """Return the nodes that coarse steps compute, each as often as it is computed."""
    order = analysis.frontiers.order
    start = next(i for i, node in enumerate(order) if node.name == steps.first)
    step = order[start : start + steps.period]
    held = held_offsets(analysis.program, step)
    rest = [node for offset, node in enumerate(step) if offset not in held]
    result: list[fx.Node] = []
    for length in steps.lengths:
        result += step
        result += rest * (length - 1 if steps.rule.held else 0)
    return result


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


class _Writer:
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


def build_time_step(options: TimeStepOptions, site: Site) -> fx.GraphModule:
    """Build the coarse propagator of a stage; it shares the weights of the program."""
    writer = _Writer(site.program, options.entering, options.inputs)
    writer.copy(writer.by_name[name] for name in options.sides)
    writer.steps(options.steps)
    return writer.finish(options.leaving, "TimeStep")


def build_start(program: Program, options: StartOptions) -> fx.GraphModule:
    """Build the coarse chain from the inputs to an interface; it shares the weights."""
    writer = _Writer(program, [], options.inputs)
    if options.before is not None:
        names = [node.name for node in writer.order]
        first, last = map(names.index, options.before)
        writer.copy(writer.order[first : last + 1])
    writer.steps(options.steps)
    return writer.finish([source.name for source in options.sources], "Start")


class Unchanged(nn.Module):
    """The map after a coarse chain: none."""

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the state (a tensor if there is one)."""
        return state[0] if len(state) == 1 else state


@dataclass(frozen=True)
class Trial:
    """Result of coarse steps on the example inputs.

    Attributes:
        rule: The rule of least error.
        error: Error of one coarse step for a stage, relative to the change of the state.
        shorter: The same for half a stage, relative to the same change.
    """

    rule: Rule
    error: float
    shorter: float

    def refusal(self) -> str:
        """Return why coarse steps do not imitate the loop; "" if they do."""
        if not self.error < _USEFUL:
            return (
                f"one step in place of a stage misses {self.error:.0%} of what the stage does on "
                "the example inputs: the loop does not follow a smooth path there"
            )
        if not self.shorter < self.error and self.error > 1e-6:
            return (
                "the error of one step in place of a stage does not fall for shorter stages "
                f"({self.error:.1%}, for half a stage {self.shorter:.1%})"
            )
        return ""


def find_rule(analysis: Analysis, length: int) -> Trial:
    """Find the rule of least error for stages of some steps, on the example inputs.

    It is tried once for an analysis, for the first length that is asked for.

    Raises:
        SynthesisError: There is no loop.
    """
    key = ("time_step",)
    if key not in analysis.measured:
        analysis.measured[key] = _Rules(analysis, length).best()
    trial: Trial = analysis.measured[key]
    return trial


class _Rules:
    """Rules for coarse steps of a loop, and their errors.

    Args:
        analysis: The analysis of the program.
        length: Number of steps of a stage.
    """

    def __init__(self, analysis: Analysis, length: int) -> None:
        self.analysis, self.loop = analysis, demand_loop(analysis)
        self.length = max(1, min(length, self.loop.steps - 1))
        self.starts = sorted({1, self.loop.steps - self.length})

    def best(self) -> Trial:
        """Return the rule of least error."""
        if self.analysis.program.device.type == "meta" or self.length < 2:
            return Trial(Rule(held=True), 0.0, 0.0)  # nothing can be tried, or need not be
        moved = self._moved()
        rule = Rule(held=False, moved=moved)
        error, held = self.error(rule), self.error(Rule(held=True))
        if held < _BETTER * error:
            rule, error = Rule(held=True), held
        return Trial(rule, error, self.error(rule, self.length // 2))

    def _moved(self) -> tuple[MovedConstant, ...]:
        """Move the constants of the end of a step, and sum those that lower the error."""
        constants = self.loop.constants
        moved = tuple(MovedConstant(c.offset, c.leaf, "end") for c in constants if c.ends)
        error = self.error(Rule(held=False, moved=moved))
        candidates = self._summable()
        while candidates:
            trials = {
                group: self.error(Rule(held=False, moved=(*moved, *group))) for group in candidates
            }
            group = min(trials, key=lambda one: trials[one])
            if not trials[group] < _BETTER * error:
                break
            moved, error = (*moved, *group), trials[group]
            candidates.remove(group)
        return moved

    def _summable(self) -> list[tuple[MovedConstant, ...]]:
        """Group the fractional numbers that do not belong to a chain by their values."""
        loop, order = self.loop, self.analysis.frontiers.order
        chained = {(c.offset, c.leaf) for c in loop.constants if c.ends}
        groups: dict[tuple[float, ...], list[MovedConstant]] = {}
        for offset in range(loop.period):
            numbers = range(loop.start + offset, loop.positions[-1].index, loop.period)
            rows = zip(*(leaves(order[number]) for number in numbers), strict=True)
            for leaf, values in enumerate(rows):
                summable = all(is_number(v) and not float(v).is_integer() for v in values)
                if summable and (offset, leaf) not in chained:
                    groups.setdefault(values, []).append(MovedConstant(offset, leaf, "sum"))
        return [tuple(group) for group in groups.values()]

    @cached_property
    def states(self) -> list[list[torch.Tensor]]:
        """The state after every step, on the example inputs."""
        program = self.analysis.program
        names = {node: None for position in self.loop.positions for node in position.state}
        recorder = _Recorder(program.module, names)
        with preserved(program.module), torch.no_grad():
            program.module.eval()
            recorder.run(*program.fresh_inputs())
        values = recorder.values
        return [[values[node] for node in position.state] for position in self.loop.positions]

    def error(self, rule: Rule, length: int | None = None) -> float:
        """Return the error of one coarse step, relative to the change over a whole stage."""
        length = length or self.length
        wrong, change = 0.0, 0.0
        for start in self.starts:
            before, after = self.states[start - 1], self.states[start - 1 + length]
            whole = self.states[start - 1 + self.length]
            results = self._run(rule, start, start + length, before)
            wrong += _distance(results, after)
            change += _distance(before, whole)
        value = wrong / change if change else 0.0
        return value if value < float("inf") else float("inf")  # NaN is no error that is small

    def _run(
        self, rule: Rule, start: int, stop: int, state: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run one coarse step from a state."""
        analysis, program, loop = self.analysis, self.analysis.program, self.loop
        begin, end = loop.positions[start - 1].index, loop.positions[stop - 1].index
        inside = analysis.frontiers.order[begin:end]
        inputs, sides = requirements(program, inside, analysis.frontiers.recomputable)
        entering, leaving = loop.positions[start - 1].state, loop.positions[stop - 1].state
        options = TimeStepOptions(
            inputs=inputs,
            steps=CoarseSteps(
                first=inside[0].name, period=loop.period, lengths=(stop - start,), rule=rule
            ),
            entering=tuple(node.name for node in entering),
            leaving=tuple(node.name for node in leaving),
            sides=sides,
        )
        arguments = {n.name: program.args[str(n.target)] for n in program.inputs}
        with preserved(program.module), torch.no_grad():
            network = build_time_step(options, Site(program, (), ()))
            program.module.eval()
            try:
                result = network(*state, *(arguments[name] for name in inputs))
            except (RuntimeError, IndexError, ValueError):  # a constant that may not be changed
                return [torch.full_like(tensor, float("nan")) for tensor in state]
        return tensor_leaves(result)


class _Recorder(Interpreter):
    """Run a graph, and keep the values of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: dict[fx.Node, None]) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self._nodes = nodes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            self.values[n] = value.detach().clone()
        return value


def _distance(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return float(sum((a.double() - b.double()).norm().item() for a, b in pairs))


def for_loop(analysis: Analysis, options: Options) -> tuple[Options, str]:
    """Choose coarse steps where they imitate the loop of a program, if that is left open.

    Returns:
        The options, and a note for the plan; "" without a loop.

    Raises:
        SynthesisError: Coarse steps are asked for, and do not fit.
    """
    asked = options.coarse == "time_step" or options.preprocess == "time_step"
    if not asked and (options.coarse != "auto" or options.sweep == "collapsed"):
        return options, ""
    if not asked and analysis.loop is None:
        return options, ""
    try:
        trial = find_rule(analysis, stage_steps(analysis, options))
        if not asked and (refusal := trial.refusal()):
            raise SynthesisError(refusal)
    except SynthesisError as obstacle:
        if asked:
            raise SynthesisError(f"coarse='time_step' does not fit: {obstacle}") from obstacle
        assert analysis.loop is not None
        return options, f"a loop of {analysis.loop.steps} steps without coarse steps: {obstacle}"
    loop = demand_loop(analysis)
    preprocess = "time_step" if options.preprocess == "auto" else options.preprocess
    options = dataclasses.replace(
        options, coarse="time_step", preprocess=preprocess, correction="difference", sweep="chain"
    )
    note = (
        f"a loop of {loop.steps} steps; one step in place of a stage ({trial.rule}) misses "
        f"{trial.error:.1%} of what a stage does on the example inputs, {trial.shorter:.1%} in "
        "place of half a stage"
    )
    return options, note
