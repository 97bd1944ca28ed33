"""Build a `Plan` from an analysis and its cuts: stages, operators, forecast and notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position, requirements
from passes.coarse.copied_blocks import UnitsOptions
from passes.coarse.family import in_time, is_fine, rows_of
from passes.coarse.last_layers import LayersOptions
from passes.coarse.select import choose_coarse, choose_preprocess, stage_budget
from passes.coarse.spec import CoarseSpec, PreprocessSpec, Span
from passes.cost.device_profile import DeviceProfile
from passes.cost.flops import parameters
from passes.cost.memory import Memory
from passes.errors import OptionError, PnnError
from passes.ir.example_inputs import bind
from passes.ir.program import Program, provenance
from passes.ir.run_step import run_one_step
from passes.ir.tensor_spec import Value
from passes.options import Options
from passes.partition.choose_cuts import Cut, choose_cut
from passes.plan.estimate import forecast_step
from passes.plan.schema import (
    Forecast,
    Head,
    Interface,
    OperatorOptions,
    Plan,
    Stage,
    corrected_values,
    entering_values,
    windows_of,
)

_WIDE_GAP = 0.01
"""Relative distance from the proven optimum above which the plan gets a note."""
_CHEAPER: Mapping[str, Mapping[str, Any]] = {
    "sweep='collapsed'": {"sweep": "collapsed"},
    "coarse_width=0.25": {"coarse_width": 0.25},
    "coarse='linear' with sweep='collapsed'": {"coarse": "linear", "sweep": "collapsed"},
}
"""Options whose corrections cost less than copied blocks."""
_CHEAPER_NOTE = "cheaper corrections, "
SPEED = "times the original's speed"
"""Words of a note whose numbers depend on the operators."""
_BEFORE = " (with the operators that it had before the calibration)"
_MUCH_FASTER = 1.1
"""Factor in speed below which cheaper corrections are not worth a note."""


def make_plan(analysis: Analysis, cut: Cut, options: Options) -> Plan:
    """Describe every stage, choose its operators, and forecast the step time.

    Args:
        analysis: The facts about the program.
        cut: Where the stages end.
        options: Options of the compilation.

    Raises:
        OptionError: Stages would be computed more than once, and the model does not allow that.
        SynthesisError: A preprocessing operator or coarse propagator cannot be built.
    """
    if options.sweep == "auto":
        return _plan_faster_sweep(analysis, cut, options)
    if options.count > 1 or options.tolerance is not None or is_fine(options.coarse):
        _check_repeatable(analysis.program)
    positions = cut.positions
    reasons = (*cut.why, *[""] * (len(positions) - len(cut.why)))
    interfaces = tuple(
        dataclasses.replace(_interface(analysis, position), why=why)
        for position, why in zip(positions, reasons, strict=True)
    )
    stages = [_stage(analysis, cut, number) for number in range(len(positions))]
    for window in windows_of(len(stages), options.windows):
        before = cut.positions[window[0] - 1] if window[0] else None
        for number in window[1:]:  # the first one reads a state that is there
            stages[number] = _with_operators(
                analysis, cut, stages, interfaces, number, options, before
            )
    if any(cut.devices):
        stages = _with_memory(analysis, cut, stages, interfaces, options)
    head = _head(analysis, positions[-1], cut.devices[-1] if cut.devices else None)
    forecast = forecast_step(analysis, stages, interfaces, options, cut.gap)
    return Plan(
        model=analysis.program.name,
        correction=options.correction,
        sweep=options.sweep,
        iterations=options.count,
        stages=tuple(stages),
        interfaces=interfaces,
        head=head,
        forecast=forecast,
        cost=options.cost if isinstance(options.cost, str) else _name(options.cost),
        seed=options.seed,
        fingerprint=analysis.program.fingerprint,
        ties=_ties(analysis, positions),
        notes=(*filter(None, (cut.note,)), *_notes(analysis, options, forecast, stages)),
        tolerance=options.tolerance,
        windows=options.windows,
        asked=OperatorOptions(
            options.coarse, options.coarse_budget, options.units, options.rank,
            options.preprocess, options.prologue, options.coarse_width,
        ),
    )  # fmt: skip


def _with_operators(
    analysis: Analysis,
    cut: Cut,
    stages: Sequence[Stage],
    interfaces: Sequence[Interface],
    number: int,
    options: Options,
    window: Position | None,
) -> Stage:
    """Return a stage with its preprocessing operator and coarse propagator.

    `window` is the cut before its window; None in the first one.
    """
    stage, start, stop = stages[number], cut.positions[number - 1], cut.positions[number]
    entering = entering_values(stages, interfaces, number)
    leaving = corrected_values(stages, interfaces, number, options.sweep)
    if options.sweep == "collapsed":  # straight to the last state
        stop = cut.positions[-1]
    span = Span(analysis, options, start, stop, entering, leaving)
    guess = choose_preprocess(analysis, options, start, entering, window)
    budget = stage_budget(analysis, options, len(stages))
    coarse = choose_coarse(span, budget, guess.family)
    return dataclasses.replace(stage, preprocess=guess, coarse=coarse)


def _plan_faster_sweep(analysis: Analysis, cut: Cut, options: Options) -> Plan:
    """Plan a chain and, if its families are as accurate without one, a collapsed sweep.

    Linear maps are, as a chain of them is a sum of products. Each sweep has cuts of its own, as the
    cost of a cut depends on the sweep.

    Returns:
        The faster of the two.
    """
    chain = make_plan(analysis, cut, dataclasses.replace(options, sweep="chain"))
    rows = [row for s in chain.stages if s.coarse for row in rows_of(s.coarse.family)]
    collapsible = chain.correction == "residual" and chain.iterations == 1
    if not collapsible or not all("auto" in row.sweeps for row in rows):
        return chain
    other = dataclasses.replace(options, sweep="collapsed")
    collapsed = make_plan(analysis, choose_cut(analysis, other), other)
    return collapsed if collapsed.forecast.time < chain.forecast.time else chain


def copies_whole(plan: Plan) -> bool:
    """Return whether every correction copies blocks or layers at all their channels."""
    corrections = (stage.coarse.options for stage in plan.stages if stage.coarse)
    return all(
        isinstance(one, UnitsOptions | LayersOptions) and one.width is None for one in corrections
    )


def operators_of(plan: Plan) -> tuple[object, ...]:
    """Return what tells two plans of one program apart: cuts, families and their sizes."""
    specs = [(stage.first, stage.preprocess, stage.coarse) for stage in plan.stages]
    sizes = [(first, *((s.family, s.flops) for s in both if s)) for first, *both in specs]
    return (plan.sweep, *sizes)


def note_on_cheaper(analysis: Analysis, options: Options, plan: Plan) -> str:
    """Say what cheaper corrections would give, where the default's take much of the time."""
    asked = options.coarse_budget is not None or options.coarse_width is not None
    several = options.count * options.windows > 1
    if asked or several or options.coarse not in {"auto", "units", "layers"}:
        return ""
    if plan.forecast.serial_share <= options.fit_budget:
        return ""
    faster = dict[object, str]()  # by what they are: of equal plans, the last and plainest name
    for name, choices in _CHEAPER.items():
        with suppress(PnnError):  # it does not fit this model
            other = dataclasses.replace(options, stages=len(plan.stages), **choices)
            cheaper = make_plan(analysis, choose_cut(analysis, other), other)
            speedup = cheaper.forecast.speedup
            if speedup > _MUCH_FASTER * plan.forecast.speedup:
                faster[operators_of(cheaper)] = f"{name} {speedup:.2f}"
    if not faster:
        return ""
    names = ", ".join(faster.values())
    return (
        f"{_CHEAPER_NOTE}which may keep less accuracy, would give: {names} {SPEED}, "
        f"instead of {plan.forecast.speedup:.2f}"
    )


def with_operators(
    analysis: Analysis,
    plan: Plan,
    options: Options,
    preprocess: Mapping[int, PreprocessSpec],
    coarse: Mapping[int, CoarseSpec],
) -> Plan:
    """Return the plan with other operators, by stage number, and the forecast with them."""
    options = dataclasses.replace(options, sweep=plan.sweep)
    stages = [
        dataclasses.replace(stage, preprocess=preprocess.get(number), coarse=coarse.get(number))
        for number, stage in enumerate(plan.stages)
    ]
    forecast = forecast_step(analysis, stages, plan.interfaces, options, plan.forecast.gap)
    # Notes that do not depend on the operators stay.
    stale = _notes(analysis, options, plan.forecast, plan.stages)
    kept = [n for n in plan.notes if n not in stale and not n.startswith(_CHEAPER_NOTE)]
    kept = [n + _BEFORE if SPEED in n and not n.endswith(_BEFORE) else n for n in kept]
    notes = (*_notes(analysis, options, forecast, stages), *kept)
    return dataclasses.replace(plan, stages=tuple(stages), forecast=forecast, notes=notes)


def _check_repeatable(program: Program) -> None:
    """Refuse to compute stages repeatedly if every call changes their buffers.

    Raises:
        OptionError: The buffers change in evaluation mode too.
    """
    arguments = bind(program.module, (), dict(program.args))
    module = program.module
    result = run_one_step(
        module, lambda c: module(**c.tensor_arguments()), arguments, train=False, grad=False
    )
    if changed := sorted(result.changed):
        raise OptionError(
            f"{program.name} changes {len(changed)} buffers at every call, in evaluation mode "
            f"too ({', '.join(changed[:3])}): its stages cannot be computed again as "
            "iterations > 1 and coarse='exact' need; use iterations=1 and another coarse family"
        )


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _interface(analysis: Analysis, position: Position) -> Interface:
    order = analysis.frontiers.order
    after = order[position.index] if position.index < len(order) else analysis.program.output
    values = zip(position.state, position.specs, strict=True)
    return Interface(
        after=order[position.index - 1].name,
        before=after.name,
        module=provenance(after).path,
        state=tuple(Value(node.name, spec) for node, spec in values),
    )


def _with_memory(
    analysis: Analysis,
    cut: Cut,
    stages: Sequence[Stage],
    interfaces: Sequence[Interface],
    options: Options,
) -> list[Stage]:
    """Fill in the memory of every stage in bytes; the last stage includes the head."""
    memory = Memory(analysis.program, analysis.costs, training=options.training)
    starts = [0, *(position.index for position in cut.positions[:-1])]
    stops = [*starts[1:], len(analysis.frontiers.order)]
    filled = []
    for number, (stage, start, stop) in enumerate(zip(stages, starts, stops, strict=True)):
        size = memory.span(start, stop)
        if stage.preprocess is not None:
            size += memory.entry(stage.operator_parameters, interfaces[number - 1].bytes)
        filled.append(dataclasses.replace(stage, memory=round(size)))
    return filled


def _stage(analysis: Analysis, cut: Cut, number: int) -> Stage:
    positions = cut.positions
    device = cut.devices[number] if cut.devices else None
    start = positions[number - 1].index if number else 0
    stop = positions[number].index
    nodes = analysis.frontiers.order[start:stop]
    recomputable = analysis.frontiers.recomputable
    before = positions[number - 1].state if number else ()
    read = {source for node in nodes for source in node.all_input_nodes}
    inputs, sides = requirements(analysis.program, nodes, recomputable)
    inside = set(nodes)
    weights = _parameters(analysis, nodes)
    costs = [analysis.on(device)[node] for node in nodes]
    return Stage(
        first=nodes[0].name,
        last=nodes[-1].name,
        first_module=next(_paths(nodes), ""),
        last_module=next(_paths(reversed(nodes)), ""),
        nodes=len(nodes),
        inputs=inputs,
        sides=sides,
        consumes=tuple(node.name for node in before if node in read),
        produces=tuple(node.name for node in positions[number].state if node in inside),
        flops=sum(cost.flops for cost in costs),
        backward_flops=sum(cost.backward_flops for cost in costs),
        seconds=sum(c.cost for c in costs) if analysis.unit == "seconds" else None,
        backward_seconds=sum(c.backward for c in costs) if analysis.backward else None,
        parameters=sum(parameter.numel() for parameter in weights),
        parameter_bytes=sum(p.numel() * p.element_size() for p in weights),
        activation_bytes=sum(cost.activation_bytes for cost in costs),
        device=device.name if device else None,
    )


def _paths(nodes: Iterable[fx.Node]) -> Iterator[str]:
    """Yield the modules that nodes belong to; none for what the model's own forward calls."""
    return filter(None, (provenance(node).path for node in nodes))


def _parameters(analysis: Analysis, nodes: Sequence[fx.Node]) -> list[torch.nn.Parameter]:
    by_id = {id(p): p for node in nodes for p in parameters(analysis.program, node)}
    return list(by_id.values())


def _head(analysis: Analysis, position: Position, device: DeviceProfile | None) -> Head:
    nodes = analysis.frontiers.order[position.index :]
    recomputable = analysis.frontiers.recomputable
    inputs, sides = requirements(analysis.program, [*nodes, analysis.program.output], recomputable)
    costs = [analysis.on(device)[node] for node in nodes]
    return Head(
        first_module=next(_paths(nodes), ""),
        nodes=len(nodes),
        inputs=inputs,
        sides=sides,
        flops=sum(cost.flops for cost in costs),
        seconds=sum(c.cost for c in costs) if analysis.unit == "seconds" else None,
        backward_seconds=sum(c.backward for c in costs) if analysis.backward else None,
    )


def _ties(analysis: Analysis, positions: Sequence[Position]) -> dict[str, tuple[int, ...]]:
    """Map every parameter that several stages read to those stages; the head is one more stage."""
    names = {id(p): name for name, p in analysis.program.module.named_parameters()}
    readers: dict[str, list[int]] = {}
    starts = [0, *(position.index for position in positions)]
    stops = [*starts[1:], len(analysis.frontiers.order)]
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        nodes = analysis.frontiers.order[start:stop]
        _, sides = requirements(analysis.program, nodes, analysis.frontiers.recomputable)
        replicated = [n for n in analysis.frontiers.order if n.name in sides]
        for parameter in _parameters(analysis, [*nodes, *replicated]):
            readers.setdefault(names[id(parameter)], []).append(number)
    return {name: tuple(numbers) for name, numbers in readers.items() if len(numbers) > 1}


def small_stages(stages: Sequence[Stage]) -> list[str]:
    """Return number and share of every stage that has less than half the mean work."""
    costs = [s.flops + s.backward_flops if s.seconds is None else s.seconds for s in stages]
    mean = sum(costs) / len(costs)
    return [f"{n} ({c / mean:.0%})" for n, c in enumerate(costs) if c < mean / 2]


def _notes(
    analysis: Analysis, options: Options, forecast: Forecast, stages: Sequence[Stage]
) -> tuple[str, ...]:
    """List what a user should know of a plan."""
    notes = [*analysis.program.capture.notes]
    if options.cuts:
        named = (f"{name} in stage {number}" for number, name in enumerate(options.cuts, 1))
        notes.append(f"cuts are where they were named: first is {', '.join(named)}")
    elif forecast.gap > _WIDE_GAP:
        notes.append(
            "the cuts are not proven to be the best: the search was stopped, and another cut "
            f"could be faster by up to {forecast.gap:.1%}"
        )
    budgeted = not is_fine(options.coarse) and not in_time(options.coarse)
    if forecast.serial_share > options.fit_budget and budgeted:
        serial = f"the serial part takes {forecast.serial_share:.1%} of the original's cost"
        fewer = "fewer windows or stages" if options.windows > 1 else "fewer stages"
        budget = options.coarse_budget
        notes.append(
            f"{serial}: {fewer} would shorten it"
            if budget is None
            else f"{serial}, more than the coarse budget of {budget:.1%}: {fewer}, or "
            "a cheaper coarse family, would help"
        )
    stateful = any(analysis.facts[node].writes for node in analysis.frontiers.order)
    if options.count > 1 and stateful:
        notes.append(
            f"with K = {options.count} iterations, layers that keep statistics (BatchNorm) "
            "update them more than once per training step, partly on guessed states"
        )
    if forecast.speedup < 1:
        notes.append(
            f"no gain: the parareal network needs {1 / forecast.speedup:.2f} times the original's "
            "time even with one device per stage"
        )
    return tuple(notes)
