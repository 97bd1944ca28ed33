"""Choose the rule by which coarse steps follow from the steps of a loop, on the example inputs.

Every rule is tried: one coarse step runs in place of a stage, from a state of the original network,
and is compared with the state that the original reaches. An Euler method with h = 0.1, one step in
place of four, where the stage moves the state by 0.4:

    constants moved       one step returns        error
    none                  x + 0.1 f               0.30 / 0.4
    h is summed           x + 0.4 f               0.02 / 0.4      taken
    held                  the same                0.02 / 0.4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import requirements
from passes.analysis.loops import Loop, is_number, leaves
from passes.coarse.step_graph import CoarseSteps, MovedConstant, Rule, StepWriter
from passes.errors import SynthesisError
from passes.ir.isolation import preserved
from passes.ir.program import Interpreter, tensor_leaves

_USEFUL = 0.5
"""Largest error of a coarse step, relative to the change of the state over the stage."""
_BETTER = 0.9
"""Another rule must lower the error at least to this share."""


def demand_loop(analysis: Analysis) -> Loop:
    """Return the loop of a program that coarse steps can imitate.

    Raises:
        SynthesisError: There is none, or its steps cannot be computed repeatedly.
    """
    if analysis.loop is None or analysis.loop_obstacle:
        raise SynthesisError(analysis.loop_obstacle)
    return analysis.loop


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
        return value if value < float("inf") else float("inf")  # NaN is not an error that is small

    def _run(
        self, rule: Rule, start: int, stop: int, state: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run one coarse step from a state."""
        analysis, program, loop = self.analysis, self.analysis.program, self.loop
        begin, end = loop.positions[start - 1].index, loop.positions[stop - 1].index
        inside = analysis.frontiers.order[begin:end]
        inputs, sides = requirements(program, inside, analysis.frontiers.recomputable)
        entering, leaving = loop.positions[start - 1].state, loop.positions[stop - 1].state
        writer = StepWriter(program, [node.name for node in entering], inputs)
        writer.copy(writer.by_name[name] for name in sides)
        writer.steps(
            CoarseSteps(
                first=inside[0].name, period=loop.period, lengths=(stop - start,), rule=rule
            )
        )
        with preserved(program.module), torch.no_grad():
            network = writer.finish([node.name for node in leaving], "Trial")
            program.module.eval()
            try:
                result = network(*state, *program.examples(inputs))
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
