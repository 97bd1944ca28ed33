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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch
from torch import fx, nn

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position, requirements
from passes.analysis.loops import describe
from passes.coarse.spec import (
    CoarseOptions,
    NodeName,
    PreprocessOptions,
    Site,
    SourceSpec,
    Span,
    ValueName,
)
from passes.coarse.step_graph import CoarseSteps, StepWriter, held_offsets
from passes.coarse.step_rules import demand_loop, find_rule
from passes.errors import SynthesisError
from passes.ir.program import Program
from passes.ir.tensor_spec import Value

if TYPE_CHECKING:
    from passes.options import Options

_SHOWN = 3
"""Step constants that a note lists."""
_STAGES = 4
"""Number of stages for which coarse steps are tried, if it is not chosen yet."""


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


def build_time_step(options: TimeStepOptions, site: Site) -> fx.GraphModule:
    """Build the coarse propagator of a stage; it shares the weights of the program."""
    writer = StepWriter(site.program, options.entering, options.inputs)
    writer.copy(writer.by_name[name] for name in options.sides)
    writer.steps(options.steps)
    return writer.finish(options.leaving, "TimeStep")


def build_start(program: Program, options: StartOptions) -> fx.GraphModule:
    """Build the coarse chain from the inputs to an interface; it shares the weights."""
    writer = StepWriter(program, [], options.inputs)
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


def for_loop(analysis: Analysis, options: Options) -> tuple[Options, str]:
    """Choose coarse steps where they imitate the loop of a program, if that is left open.

    Returns:
        The options, and a note for the plan; "" without a loop.

    Raises:
        SynthesisError: Coarse steps are asked for, and do not fit.
    """
    asked = options.coarse == "time_step" or options.preprocess == "time_step"
    if not asked and (
        options.coarse != "auto" or options.sweep == "collapsed" or options.windows > 1
    ):
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
    constants = describe(analysis.program, loop, analysis.frontiers.order)
    shown = f" (constants: {'; '.join(constants[:_SHOWN])})" if constants else ""
    note = (
        f"a loop of {loop.steps} steps{shown}; one step in place of a stage ({trial.rule}) misses "
        f"{trial.error:.1%} of what a stage does on the example inputs, {trial.shorter:.1%} in "
        "place of half a stage"
    )
    return options, note
