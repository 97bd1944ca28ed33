"""Choose a family for every preprocessing operator and coarse propagator, by its cost.

"auto" takes the families of the paper: a strided convolution from an image, and copies of the
repeating block, which kept the accuracy in training (`Family.evidence`). In a chain it copies the
last layers of a stage where no block of one tensor repeats, or copies of blocks are the whole
stage. Where copies would still cost more than the stage, or exceed a `coarse_budget`, it takes
those of a quarter of the channels, and where these do so too, channel maps. With samples,
`pnn_compile.fit.calibrate` chooses among the candidates of this file by their errors.

The budget of a coarse propagator is an even share of the sweep's: with `coarse_budget=0.05`, a
model of 1e9 FLOPs and 6 stages, each of the 5 coarse propagators may take 0.05 * 1e9 / 5 = 1e7.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import fx, nn

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position
from passes.coarse.convolution import convolution_fits, convolution_flops, fitting_width
from passes.coarse.family import (
    between,
    build_coarse,
    build_preprocess,
    copies_blocks,
    evidence_of,
    in_time,
    is_fine,
    options_of,
    rows_of,
)
from passes.coarse.last_layers import LayersOptions, last_layers_flops
from passes.coarse.linear import linear_flops
from passes.coarse.measure import failing_by_name, measure_call, stage_work, sum_work
from passes.coarse.prologue import (
    PreprocessOrigin,
    front_estimate,
    is_narrow,
    options_from,
    origin_of,
    too_expensive,
)
from passes.coarse.spec import (
    CoarseOptions,
    CoarseSpec,
    OperatorSpec,
    PreprocessSpec,
    Span,
    dependence,
)
from passes.coarse.step_rules import demand_loop
from passes.coarse.time_step import (
    StartOptions,
    TimeStepOptions,
    start_options,
    work_of,
)
from passes.errors import SynthesisError
from passes.ir.isolation import seeded
from passes.ir.module_walk import num_parameters
from passes.ir.program import provenance
from passes.ir.tensor_spec import TensorSpec, Value

if TYPE_CHECKING:
    from passes.options import Options

_Spec = TypeVar("_Spec", bound=OperatorSpec)

_REASONS = {
    "convolution": "strided convolution from the input",
    "linear": "channel map from the source",
}
_GUESS_SHARE = 0.1
"""Share of an even stage that a convolution as preprocessing operator may take."""
_NARROW = 0.25
"""Share of the channels at which "auto" copies where whole copies are too expensive."""
_RANKS = (16, 32, 64, 128)
"""Ranks among which calibration chooses."""


def preprocess_estimate(analysis: Analysis, options: Options, position: Position) -> float:
    """Estimate the FLOPs of a preprocessing operator of the state at a position."""
    if in_time(options.preprocess):
        # The chain of guesses takes one step longer than the sweep, which a stage waits for anyway;
        # a prediction follows.
        flops = analysis.flops_between(0, demand_loop(analysis).start)
        return flops + 2 * options.units * _step_flops(analysis)
    if options.windows > 1:
        return linear_flops(position.specs, position.specs)
    if copies_blocks(options.preprocess):
        mapped = linear_flops(position.specs, position.specs)
        return front_estimate(analysis, options, position) + mapped
    origin = origin_of(analysis, options, position)
    if _convolves(origin, options, position.specs):
        width = _convolution_width(analysis, options, origin, position.specs)
        return origin.flops + convolution_flops(origin.specs[0], position.specs, width)
    return origin.flops + linear_flops(origin.specs, position.specs)


def coarse_estimate(
    analysis: Analysis,
    options: Options,
    position: Position,
    last: Position,
    budget: float = math.inf,
) -> float:
    """Estimate the FLOPs of a coarse propagator at a position, within the budget of a stage.

    In a chain it leads to a state that is not known yet, and taken to be like the one at the
    position; in a collapsed sweep to that at `last`.
    """
    if in_time(options.coarse):
        return options.units * _step_flops(analysis)
    collapsed, auto = options.sweep == "collapsed", options.coarse == "auto"
    leaving = last.specs if collapsed else position.specs
    block, maps = options.units * analysis.trunk_flops, 0.0
    last_layers = auto and not collapsed
    last_layers = last_layers and (len(position.specs) > 1 or not analysis.trunk_flops)
    if options.coarse == "layers" or last_layers:
        # Those of the stage are not known yet; one number for all leaves the cuts to the stages.
        block = last_layers_flops(analysis, last, len(position.state))
        block = min(block, analysis.flops / (options.num_stages or 1))  # they cost less than it
        maps = min(block, linear_flops(position.specs, leaving))
    elif collapsed and auto and len(position.specs) > 1:
        block = 0.0
    elif collapsed and block:
        block += analysis.down_sampling(position)
    copies = copies_blocks(options.coarse)
    for width in (1.0, _NARROW) if options.coarse_width is None else (options.coarse_width,):
        flops = block * width**2 + maps
        if block and (copies or (auto and flops <= budget)):
            return flops
    rows = rows_of(options.coarse if not auto else "linear")
    return sum(row.flops(position.specs, leaving, options.rank) for row in rows)


def _step_flops(analysis: Analysis) -> float:
    """Return the FLOPs of a step of the loop."""
    loop = demand_loop(analysis)
    return analysis.flops_between(loop.start, loop.positions[-1].index) / loop.steps


def stage_budget(analysis: Analysis, options: Options, stages: int) -> float:
    """Return the FLOPs that one coarse propagator may take.

    In a chain, an even share of the sweep's budget; in a collapsed sweep, where all run at once,
    all of it.
    """
    if options.coarse_budget is None:
        return math.inf
    serial = 1 if options.sweep == "collapsed" else max(1, stages - 1)
    return options.coarse_budget * analysis.flops / serial


def choose_preprocess(
    analysis: Analysis,
    options: Options,
    cut: Position,
    state: Sequence[Value],
    window: Position | None = None,
) -> PreprocessSpec:
    """Choose the preprocessing operator of a state.

    Args:
        analysis: The facts about the program.
        options: Options of the compilation.
        cut: Where the stage begins.
        state: The components that it reads.
        window: The cut before its window; None if the guess starts from the inputs.

    Raises:
        SynthesisError: The state depends on no usable source, or the family of the options does
            not fit.
    """
    if in_time(options.preprocess):
        return _choose_start(analysis, options, cut, state)
    origin = origin_of(analysis, options, cut, window)
    if not origin.sources:
        raise SynthesisError(
            f"{analysis.program.name} has no floating-point input that follows the batch, and no "
            f"cheap embedding of its inputs, that {cut.state[0].name} depends on: the interfaces "
            "cannot be guessed (prologue=0.1 guesses from a copy of the first layers)"
        )
    reads = dependence(analysis, [source.node.name for source in origin.sources], state)
    types = [value.spec for value in state]
    convolves = reads is None and _convolves(origin, options, types)
    family = between(options.preprocess, origin.specs, types)
    if copies_blocks(family) and not origin.steps:
        node = cut.state[0]
        raise SynthesisError(too_expensive(options, f"before {provenance(node).path or node.name}"))
    if family == "auto":
        family = "convolution" if convolves and window is None else "linear"
    elif "convolution" in family.split("+") and not convolves:
        raise SynthesisError(
            "preprocess='convolution' needs one image-like input of no lower resolution than the "
            f"state ({', '.join(map(str, types))}); use preprocess='linear' or 'auto'"
        )
    settings = options_from(analysis, options, origin, reads)
    if "convolution" in family.split("+"):
        width = _convolution_width(analysis, options, origin, types)
        settings = dataclasses.replace(settings, width=width)
    draft = PreprocessSpec(
        family=family,
        options=settings,
        flops=0,
        parameters=0,
        linear=False,
        why="asked for" if options.preprocess == family else _REASONS[family],
    )
    # Equal networks are measured once; the share `prologue` changes nothing in the network.
    key = family, dataclasses.replace(draft.options, prologue=None), tuple(types)
    if key not in analysis.measured:
        analysis.measured[key] = _measure_preprocess(analysis, draft, origin, types)
    return dataclasses.replace(draft, **analysis.measured[key])


def _choose_start(
    analysis: Analysis, options: Options, cut: Position, state: Sequence[Value]
) -> PreprocessSpec:
    """Guess a state of a loop in time by the coarse steps before it."""
    draft = PreprocessSpec(
        family=options.preprocess,
        options=start_options(analysis, options, cut, state),
        flops=0,
        parameters=0,
        linear=False,
        why="the coarse steps before it",
    )
    return dataclasses.replace(draft, **_step_work(analysis, draft))


def _measure_preprocess(
    analysis: Analysis, draft: PreprocessSpec, origin: PreprocessOrigin, types: Sequence[TensorSpec]
) -> dict[str, Any]:
    """Build the operator and measure one call, including the layers that are copied for it."""
    with failing_by_name("preprocess", draft.family, types):
        with seeded(0):
            module = build_preprocess(analysis.program, draft, types)
        if is_narrow(draft.family):
            inputs = analysis.program.examples(draft.options.inputs)
            work = measure_call(analysis, module, [], inputs)
            return work | {"parameters": num_parameters(module)}
        work = measure_call(analysis, module.operator, origin.specs, [])
    copied = [analysis.costs[node] for node in origin.copied]
    work["flops"] += origin.flops
    if "seconds" in work:
        work["seconds"] += sum(cost.cost for cost in copied)
        work["backward_seconds"] += sum(cost.backward for cost in copied)
    # A prologue that is no copy is the embedding of the program itself.
    counted = module if origin.copied else module.operator
    return work | {"parameters": num_parameters(counted)}


def _convolves(origin: PreprocessOrigin, options: Options, state: Sequence[TensorSpec]) -> bool:
    """Return whether the options allow for a convolution and the source and the state fit it."""
    family = options.preprocess
    if (family != "auto" and "convolution" not in family.split("+")) or len(origin.sources) != 1:
        return False
    return all(convolution_fits(origin.sources[0].spec, spec) for spec in state)


def _convolution_width(
    analysis: Analysis, options: Options, origin: PreprocessOrigin, state: Sequence[TensorSpec]
) -> int | None:
    """Return the width of a convolution that takes a tenth of an even stage; None for any."""
    budget = _GUESS_SHARE * analysis.flops / (options.num_stages or 1)
    return fitting_width(origin.specs[0], state, budget)


def preprocess_candidates(
    analysis: Analysis,
    options: Options,
    stages: int,
    cut: Position,
    state: Sequence[Value],
    window: Position | None = None,
) -> list[PreprocessSpec]:
    """List the preprocessing operators among which a closed-form fit chooses.

    All devices preprocess at the same time, so each may spend the whole coarse budget, and
    `options.prologue` on a copy of the first layers; candidates come with and without a copy.
    """
    share = options.prologue or 0.0
    specs = [
        choose_preprocess(
            analysis,
            dataclasses.replace(options, preprocess=family, rank=rank, prologue=share),
            cut,
            state,
            window,
        )
        for share in sorted({0.0, share} if window is None else {0.0})
        for family, rank in _variants(options)
    ]
    # An operator that takes longer than half a stage would consume the speed-up.
    most = min(options.fit_budget + share, max(share, 0.5 / stages))
    return _affordable(specs, most * analysis.flops)


def coarse_candidates(span: Span, stages: int) -> list[CoarseSpec]:
    """List the coarse propagators among which a closed-form fit chooses, within one budget."""
    specs = []
    for family, rank in _variants(span.options):
        options = dataclasses.replace(span.options, rank=rank)
        ranked = dataclasses.replace(span, options=options)
        draft = dataclasses.replace(_draft(ranked, family), why="")
        specs.append(_measure(ranked, draft))
    if span.options.correction == "difference":
        # A thinned stage needs no fit in difference form.
        with contextlib.suppress(SynthesisError):
            specs.append(_measure(span, _draft(span, "thinned")))
    limited = dataclasses.replace(span.options, coarse_budget=span.options.fit_budget)
    return _affordable(specs, stage_budget(span.analysis, limited, stages))


def _variants(options: Options) -> list[tuple[str, int]]:
    return [("linear", options.rank), *(("lowrank+linear", rank) for rank in _RANKS)]


def _affordable(specs: Sequence[_Spec], limit: float) -> list[_Spec]:
    """Return the specs within a number of FLOPs, one per cost and family; else the cheapest."""
    by_cost = {(s.flops, s.family): s for s in sorted(specs, key=lambda s: s.flops)}
    within = [spec for spec in by_cost.values() if spec.flops <= limit]
    return within or [next(iter(by_cost.values()))]


def choose_coarse(span: Span, budget: float, guess: str) -> CoarseSpec:
    """Choose the coarse propagator of a stage.

    Args:
        span: The stage.
        budget: FLOPs that this propagator may take.
        guess: Family of its preprocessing operator.

    Raises:
        SynthesisError: The family of the options does not fit the stage.
    """
    entering, leaving = ([value.spec for value in s] for s in (span.entering, span.leaving))
    family = between(span.options.coarse, entering, leaving)
    if family != "auto":
        try:
            draft = _draft(span, family)
        except SynthesisError as obstacle:
            raise SynthesisError(
                f"coarse={family!r} does not fit the stage: {obstacle}; cut it from whole "
                "blocks (cuts=... names the modules that stages begin with), ask for another "
                "number of stages, or use coarse='linear' or 'auto'"
            ) from obstacle
        if family != span.options.coarse:
            draft = dataclasses.replace(draft, why="channel map, as the stage changes the type")
        spec = _measure(span, draft)
        why = filter(None, (spec.why, _evidence(span, spec, guess)))
        return dataclasses.replace(spec, why="; ".join(why))
    return _copies_or_maps(span, budget, guess)


def _copies_or_maps(span: Span, budget: float, guess: str) -> CoarseSpec:
    """Choose copies of blocks or of last layers, else channel maps.

    The copies are whole if those are within the budget and, in a chain, cost no more than the
    stage: a correction that takes longer than its stage cannot pay. Else they are narrow. Maps are
    left, unless whole copies cost less than these.

    Raises:
        SynthesisError: A share of the channels was asked for, but a block has no such copy.
    """
    asked, family, found, reason = span.options.coarse_width, "", "", ""
    limit = budget
    if asked is None and span.options.sweep != "collapsed":
        limit = min(budget, stage_work(span)["flops"])
    try:
        family, found = _copies(span)
    except SynthesisError as obstacle:
        reason = str(obstacle)
    dear = list[tuple[CoarseSpec, Span, str]]()
    for width in ((None, _NARROW) if asked is None else (asked,)) if family else ():
        options = dataclasses.replace(span.options, coarse_width=width)
        sized = dataclasses.replace(span, options=options)
        try:
            copies = _measure(sized, _draft(sized, family))
        except SynthesisError as error:
            if asked is not None:
                raise
            reason = reason or str(error)
            continue
        why = found if copies.parameters else "a copy of layers without weights"
        if copies.parameters and width != asked:
            why += ", of which narrow ones alone are cheap enough here"
        if copies.flops <= (limit if copies.parameters else budget):
            return _because(sized, copies, budget, why, guess)
        dear.append((copies, sized, why))
        reason = reason or f"{family} would take {copies.flops:,} FLOPs of {limit:,.0f}"
    maps = _measure(span, _draft(span, "linear"))
    if dear and dear[0][0].flops < maps.flops:
        copies, sized, why = dear[0]
        return _because(sized, copies, budget, why, guess)
    return _because(span, maps, budget, reason, guess)


def _copies(span: Span) -> tuple[str, str]:
    """Choose what to copy, the repeating block or the last layers, and say why.

    Returns:
        The family and the reason.

    Raises:
        SynthesisError: No block can be copied in a collapsed sweep.
    """
    collapsed = span.options.sweep == "collapsed"
    try:
        draft = _draft(span, "units")
    except SynthesisError as obstacle:
        if collapsed:  # last layers lost much in a star
            raise
        return "layers", f"{obstacle}: copies of the last layers"
    if not collapsed:
        with contextlib.suppress(SynthesisError):  # the loop over widths says so
            units = _measure(span, draft)
            if units.parameters and units.flops >= stage_work(span)["flops"]:
                return "layers", "copied blocks would be the whole stage: copies of the last layers"
    return "units", "repeating block found"


def _evidence(span: Span, spec: CoarseSpec, guess: str) -> str:
    """Return what is known of the accuracy that a propagator keeps; nothing without weights."""
    options = spec.options
    if not spec.parameters or (isinstance(options, LayersOptions) and options.straight):
        return ""
    return evidence_of(spec.family, [value.spec for value in span.leaving], guess, span.options)


def _because(span: Span, spec: CoarseSpec, budget: float, reason: str, guess: str) -> CoarseSpec:
    """Fill in why a propagator was chosen, and what is known of the accuracy that it keeps."""
    why = [reason]
    if budget < math.inf:
        verdict = "within" if spec.flops <= budget else "OVER"
        why.append(f"{verdict} the budget ({spec.flops:,} of {budget:,.0f} FLOPs)")
    why.append(_evidence(span, spec, guess) or "accuracy not measured for networks like this one")
    return dataclasses.replace(spec, why="; ".join(why))


def _draft(span: Span, family: str) -> CoarseSpec:
    """Specify a coarse propagator without building it: FLOPs and parameters are 0.

    Raises:
        SynthesisError: The family does not fit the stage.
    """
    kind = options_of("coarse", family)
    assert issubclass(kind, CoarseOptions)
    options = kind.choose(span)
    linear = all(row.linear for row in rows_of(family)) and not options.bias
    return CoarseSpec(family, options, 0, 0, linear, options.why)


def _measure(span: Span, draft: CoarseSpec) -> CoarseSpec:
    """Build the network, unless an equal one was built before, and fill in its costs.

    Raises:
        SynthesisError: It cannot be built or run.
    """
    analysis = span.analysis
    if is_fine(draft.family):
        return dataclasses.replace(draft, **stage_work(span))
    if in_time(draft.family):
        return dataclasses.replace(draft, **_step_work(analysis, draft))
    sources, targets = ([value.spec for value in state] for state in (span.entering, span.leaving))
    made_of = draft.options.made_of(analysis)
    key = draft.family, made_of, tuple(sources), tuple(targets)
    if key not in analysis.measured:
        inputs = analysis.program.examples(draft.options.inputs)
        with failing_by_name("coarse", draft.family, sources):
            with seeded(0):
                module = build_coarse(analysis.program, draft, sources, targets, nn.Identity())
            work = measure_call(analysis, module, sources, inputs, corrects=True)
        work["parameters"] = num_parameters(module)
        analysis.measured[key] = work
    return dataclasses.replace(draft, **analysis.measured[key])


def _step_work(analysis: Analysis, draft: OperatorSpec) -> dict[str, Any]:
    """Return FLOPs and seconds of coarse steps, which have no weights of their own."""
    nodes: list[fx.Node] = []
    if isinstance(draft.options, StartOptions):
        nodes += analysis.frontiers.order[: demand_loop(analysis).start]
    assert isinstance(draft.options, StartOptions | TimeStepOptions)
    return sum_work(analysis, [*nodes, *work_of(analysis, draft.options.steps)])
