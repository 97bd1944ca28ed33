"""Turn an analysis and its cuts into a `Plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position, requirements
from passes.coarse.family import is_fine, rows_of
from passes.coarse.select import choose_coarse, choose_preprocess, stage_budget
from passes.coarse.spec import CoarseSpec, PreprocessSpec, Span
from passes.cost.device_profile import DeviceProfile
from passes.cost.flops import parameters
from passes.cost.memory import Memory
from passes.errors import OptionError
from passes.ir.example_inputs import bind
from passes.ir.program import Program, provenance
from passes.ir.run_step import run_one_step
from passes.ir.tensor_spec import Value
from passes.options import Options
from passes.partition.choose_cuts import Cut, choose_cut
from passes.plan.estimate import predict
from passes.plan.schema import Asked, Forecast, Head, Interface, Plan, Stage

__all__ = ["make_plan", "with_operators"]

_WIDE_GAP = 0.01
"""Relative distance from the proven optimum that is worth a note."""


def make_plan(analysis: Analysis, cut: Cut, options: Options) -> Plan:
    """Describe every stage, choose its guess and its correction, and forecast the time.

    Raises:
        OptionError: Stages would be computed more than once, and the model does not allow it.
        SynthesisError: A guess or a correction cannot be made.
    """
    if options.sweep == "auto":
        return _faster_sweep(analysis, cut, options)
    if options.iterations > 1 or is_fine(options.coarse):
        _check_repeatable(analysis.program)
    positions = cut.positions
    reasons = (*cut.why, *[""] * (len(positions) - len(cut.why)))
    interfaces = tuple(
        dataclasses.replace(_interface(analysis, position), why=why)
        for position, why in zip(positions, reasons, strict=True)
    )
    stages = [_stage(analysis, cut, number) for number in range(len(positions))]
    budget = stage_budget(analysis, options, len(stages))
    for number in range(1, len(stages)):
        known = {value.name: value for value in interfaces[number - 1].state}
        entering = tuple(known[name] for name in stages[number].consumes)
        produced = set(stages[number].produces)
        last = number
        if options.sweep == "collapsed":
            produced = {name for stage in stages[number:] for name in stage.produces}
            last = len(stages) - 1
        leaving = tuple(value for value in interfaces[last].state if value.name in produced)
        start, stop = positions[number - 1], positions[number]
        span = Span(analysis, options, start, stop, entering, leaving)
        stages[number] = dataclasses.replace(
            stages[number],
            preprocess=choose_preprocess(analysis, options, start, entering),
            coarse=choose_coarse(span, budget),
        )
    if any(cut.devices):
        stages = _with_memory(analysis, cut, stages, interfaces, options)
    head = _head(analysis, positions[-1], cut.devices[-1] if cut.devices else None)
    forecast = predict(analysis, stages, interfaces, head, options, cut.gap)
    return Plan(
        model=analysis.program.name,
        correction=options.correction,
        sweep=options.sweep,
        iterations=options.iterations,
        stages=tuple(stages),
        interfaces=interfaces,
        head=head,
        forecast=forecast,
        cost=options.cost if isinstance(options.cost, str) else _name(options.cost),
        seed=options.seed,
        fingerprint=analysis.program.fingerprint,
        ties=_ties(analysis, positions),
        notes=_notes(analysis, options, forecast),
        asked=Asked(
            options.coarse, options.coarse_budget, options.units, options.rank,
            options.preprocess, options.prologue,
        ),
    )  # fmt: skip


def _faster_sweep(analysis: Analysis, cut: Cut, options: Options) -> Plan:
    """The collapsed sweep where it is the faster one of two that linear maps can do, else a chain.

    Only linear maps collapse: their chain is a sum of products. One of low rank may have a bias.
    Either has cuts of its own, as what a cut costs depends on the sweep.
    """
    chain = make_plan(analysis, cut, dataclasses.replace(options, sweep="chain"))
    rows = [row for s in chain.stages if s.coarse for row in rows_of(s.coarse.family)]
    once = chain.correction == "residual" and chain.iterations == 1
    if not once or not all("auto" in row.sweeps for row in rows):
        return chain
    other = dataclasses.replace(options, sweep="collapsed")
    collapsed = make_plan(analysis, choose_cut(analysis, other), other)
    return collapsed if collapsed.forecast.time < chain.forecast.time else chain


def with_operators(
    analysis: Analysis,
    plan: Plan,
    options: Options,
    guesses: Mapping[int, PreprocessSpec],
    corrections: Mapping[int, CoarseSpec],
) -> Plan:
    """The plan with other guesses and corrections, by stage number, and the forecast for them."""
    options = dataclasses.replace(options, sweep=plan.sweep)
    stages = [
        dataclasses.replace(stage, preprocess=guesses.get(number), coarse=corrections.get(number))
        for number, stage in enumerate(plan.stages)
    ]
    forecast = predict(analysis, stages, plan.interfaces, plan.head, options, plan.forecast.gap)
    # What was noted for other reasons than these operators stays.
    stale = _notes(analysis, options, plan.forecast)
    kept = [note for note in plan.notes if note not in stale]
    notes = (*_notes(analysis, options, forecast), *kept)
    return dataclasses.replace(plan, stages=tuple(stages), forecast=forecast, notes=notes)


def _check_repeatable(program: Program) -> None:
    """Refuse to compute stages again whose buffers are another after every call."""
    arguments = bind(program.module, (), dict(program.args))
    module = program.module
    done = run_one_step(
        module, lambda c: module(**c.tensor_arguments()), arguments, train=False, grad=False
    )
    if done.changed:
        raise OptionError(
            f"{program.name} changes {len(done.changed)} buffers at every call, in evaluation mode "
            f"too ({', '.join(sorted(done.changed)[:3])}): its stages cannot be computed again as "
            "iterations > 1 and coarse='exact' need; use iterations=1 and another coarse family"
        )


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _interface(analysis: Analysis, position: Position) -> Interface:
    order = analysis.frontiers.order
    behind = order[position.index] if position.index < len(order) else analysis.program.output
    values = zip(position.state, position.specs, strict=True)
    return Interface(
        after=order[position.index - 1].name,
        before=behind.name,
        module=provenance(behind).path,
        state=tuple(Value(node.name, spec) for node, spec in values),
    )


def _with_memory(
    analysis: Analysis,
    cut: Cut,
    stages: Sequence[Stage],
    interfaces: Sequence[Interface],
    options: Options,
) -> list[Stage]:
    """Note what every device holds; the last one holds the head too."""
    memory = Memory(analysis.program, analysis.costs, training=options.training)
    starts = [0, *(position.index for position in cut.positions[:-1])]
    stops = [*starts[1:], len(analysis.frontiers.order)]
    found = []
    for number, (stage, start, stop) in enumerate(zip(stages, starts, stops, strict=True)):
        held = memory.span(start, stop)
        if number:
            held += memory.entry(stage.operator_parameters, interfaces[number - 1].bytes)
        found.append(dataclasses.replace(stage, memory=round(held)))
    return found


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
    owned = _parameters(analysis, nodes)
    costs = [analysis.on(device)[node] for node in nodes]
    return Stage(
        first=nodes[0].name,
        last=nodes[-1].name,
        first_module=provenance(nodes[0]).path,
        last_module=provenance(nodes[-1]).path,
        nodes=len(nodes),
        inputs=inputs,
        sides=sides,
        consumes=tuple(node.name for node in before if node in read),
        produces=tuple(node.name for node in positions[number].state if node in inside),
        flops=sum(cost.flops for cost in costs),
        backward_flops=sum(cost.backward_flops for cost in costs),
        seconds=sum(c.cost for c in costs) if analysis.unit == "seconds" else None,
        backward_seconds=sum(c.backward for c in costs) if analysis.backward else None,
        parameters=sum(parameter.numel() for parameter in owned),
        parameter_bytes=sum(p.numel() * p.element_size() for p in owned),
        activation_bytes=sum(cost.activation_bytes for cost in costs),
        device=device.name if device else None,
    )


def _parameters(analysis: Analysis, nodes: Sequence[fx.Node]) -> list[torch.nn.Parameter]:
    found = {id(p): p for node in nodes for p in parameters(analysis.program, node)}
    return list(found.values())


def _head(analysis: Analysis, position: Position, device: DeviceProfile | None) -> Head:
    nodes = analysis.frontiers.order[position.index :]
    recomputable = analysis.frontiers.recomputable
    inputs, sides = requirements(analysis.program, [*nodes, analysis.program.output], recomputable)
    costs = [analysis.on(device)[node] for node in nodes]
    return Head(
        first_module=provenance(nodes[0]).path if nodes else "",
        nodes=len(nodes),
        inputs=inputs,
        sides=sides,
        flops=sum(cost.flops for cost in costs),
        seconds=sum(c.cost for c in costs) if analysis.unit == "seconds" else None,
        backward_seconds=sum(c.backward for c in costs) if analysis.backward else None,
    )


def _ties(analysis: Analysis, positions: Sequence[Position]) -> dict[str, tuple[int, ...]]:
    """Parameters that several stages read; the head counts as one stage more."""
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


def _notes(analysis: Analysis, options: Options, forecast: Forecast) -> tuple[str, ...]:
    notes = [*analysis.program.capture.notes]
    if options.cuts:
        named = (f"{name} in stage {number}" for number, name in enumerate(options.cuts, 1))
        notes.append(f"cuts are where they were named: first is {', '.join(named)}")
    elif forecast.gap > _WIDE_GAP:
        notes.append(
            "the cuts are not proven to be the best: the search was stopped, and another cut "
            f"could be faster by up to {forecast.gap:.1%}"
        )
    if forecast.serial_share > options.coarse_budget and not is_fine(options.coarse):
        notes.append(
            f"the serial part takes {forecast.serial_share:.1%} of the original's cost, more than "
            f"the coarse budget of {options.coarse_budget:.1%}: fewer stages or a cheaper coarse "
            "family would help"
        )
    stateful = any(analysis.facts[node].writes for node in analysis.frontiers.order)
    if options.iterations > 1 and stateful:
        notes.append(
            f"with K = {options.iterations} iterations, layers that keep statistics (BatchNorm) "
            "update them more than once per training step, and some of it on guessed states"
        )
    if forecast.speedup < 1:
        notes.append(
            f"no gain: the parareal network needs {1 / forecast.speedup:.1f} times the original's "
            "time even with one device per stage"
        )
    return tuple(notes)
