"""Choice of a family for every guess and every correction, by its cost under the budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position, requirements
from passes.coarse.copied_blocks import choose_blocks, unit_options
from passes.coarse.family import build_coarse, build_guess
from passes.coarse.linear import linear_flops
from passes.coarse.prologue import Origin, described, front_estimate, origin_of, too_dear
from passes.coarse.spec import CoarseSpec
from passes.coarse.strided_conv import convolution_fits, convolution_flops
from passes.coarse.thinned_blocks import THINNED, thin, thinned_options
from passes.cost.flops import count_work
from passes.cost.measured import Seconds, measure_network
from passes.errors import SynthesisError
from passes.ir.isolation import seeded
from passes.ir.program import provenance
from passes.ir.tensor_spec import TensorSpec, Value
from passes.options import BLOCK_FAMILIES, Options

__all__ = [
    "choose_coarse",
    "choose_guess",
    "coarse_candidates",
    "coarse_estimate",
    "guess_candidates",
    "guess_estimate",
    "stage_budget",
]


_GUESS_REASONS = {
    "convolution": "strided convolution from the input",
    "linear": "channel map from the source",
}


def guess_estimate(analysis: Analysis, options: Options, position: Position) -> float:
    """Estimate the FLOPs of guessing the state at a position."""
    if options.preprocess == THINNED:
        mapped = linear_flops(position.specs, position.specs)
        return front_estimate(analysis, options, position) + mapped
    origin = origin_of(analysis, options, position)
    if _convolves(origin, options, position.specs):
        return origin.flops + convolution_flops(origin.specs[0], position.specs)
    return origin.flops + linear_flops(origin.specs, position.specs)


def coarse_estimate(
    analysis: Analysis, options: Options, position: Position, budget: float = math.inf
) -> float:
    """Estimate the FLOPs of correcting the state at a position, under the budget of a stage."""
    if options.coarse == "zero":
        return 0.0
    copies = options.coarse in BLOCK_FAMILIES
    units = options.units * analysis.trunk_flops if copies or options.coarse == "auto" else 0.0
    if units and (copies or units <= budget):
        return units
    return linear_flops(position.specs, position.specs)


def stage_budget(analysis: Analysis, options: Options, stages: int) -> float:
    """FLOPs that one coarse propagator may take: an even share of the budget of the sweep."""
    return options.coarse_budget * analysis.flops / max(1, stages - 1)


def choose_guess(
    analysis: Analysis, options: Options, cut: Position, state: Sequence[Value]
) -> CoarseSpec:
    """Choose the preprocessing operator that guesses a state.

    Args:
        analysis: What is known of the program.
        options: What was asked for.
        cut: Where the stage begins.
        state: The components that it reads.

    Raises:
        SynthesisError: There is nothing to guess from, or the family asked for does not fit.
    """
    origin = origin_of(analysis, options, cut)
    if not origin.sources:
        raise SynthesisError(
            f"{analysis.program.name} has no floating-point input that follows the batch, and no "
            f"cheap embedding of its inputs, that {cut.state[0].name} depends on: the interfaces "
            "cannot be guessed"
        )
    reads = _reads(analysis, [source.node.name for source in origin.sources], state)
    types = [value.spec for value in state]
    convolves = not reads and _convolves(origin, options, types)
    family = options.preprocess
    if family == THINNED and not origin.steps:
        node = cut.state[0]
        raise SynthesisError(too_dear(options, f"before {provenance(node).path or node.name}"))
    if family == "auto":
        family = "convolution" if convolves else "linear"
    elif "convolution" in family.split("+") and not convolves:
        raise SynthesisError(
            "preprocess='convolution' needs one image-like input of no lower resolution than the "
            f"state ({', '.join(map(str, types))}); use preprocess='linear' or 'auto'"
        )
    draft = CoarseSpec(
        family=family,
        options={"rank": options.rank, **described(analysis, origin), **_share(options), **reads},
        flops=0,
        parameters=0,
        linear=False,
        why="asked for" if options.preprocess != "auto" else _GUESS_REASONS[family],
    )
    made_of = (
        family, options.rank, origin.copied, tuple(origin.specs), tuple(types), str(reads)
    )  # fmt: skip
    if made_of not in analysis.measured:
        with seeded(0):
            module = build_guess(analysis.program, draft, types)
        assert isinstance(module.operator, nn.Module)
        found = _run(analysis, module.operator, origin.specs, [])
        copied = [analysis.costs[node] for node in origin.copied]
        found["flops"] += origin.flops
        if "seconds" in found:
            found["seconds"] += sum(cost.weight for cost in copied)
            found["backward_seconds"] += sum(cost.backward for cost in copied)
        owned = module if origin.copied else module.operator
        found["parameters"] = sum(p.numel() for p in owned.parameters())
        analysis.measured[made_of] = found
    return dataclasses.replace(draft, **analysis.measured[made_of])


def _reads(
    analysis: Analysis, entering: Sequence[str], leaving: Sequence[Value]
) -> dict[str, list[list[int]]]:
    """Which entering values each leaving one may depend on; nothing where that is all of them."""
    reads = [
        [number for number, name in enumerate(entering) if analysis.may_read(value.name, name)]
        for value in leaving
    ]
    return {} if all(len(row) == len(entering) for row in reads) else {"reads": reads}


def _share(options: Options) -> dict[str, float]:
    """What a plan notes of the share that may be copied, for when its cuts are moved."""
    return {} if options.prologue is None else {"prologue": options.prologue}


def _convolves(origin: Origin, options: Options, state: Sequence[TensorSpec]) -> bool:
    asked = options.preprocess
    if (asked != "auto" and "convolution" not in asked.split("+")) or len(origin.sources) != 1:
        return False
    return all(convolution_fits(origin.sources[0].spec, spec) for spec in state)


_RANKS = (16, 32, 64, 128)
"""Ranks that calibration tries."""


def guess_candidates(
    analysis: Analysis,
    options: Options,
    stages: int,
    cut: Position,
    state: Sequence[Value],
) -> list[CoarseSpec]:
    """Guesses that a closed-form fit may choose from, within the coarse budget.

    Every device makes its guess at the same time, so each may take the whole budget, and
    `options.prologue` for a copy of the first layers, which is tried with and without.
    """
    share = options.prologue or 0.0
    found = [
        choose_guess(
            analysis,
            dataclasses.replace(options, preprocess=family, rank=rank, prologue=share),
            cut,
            state,
        )
        for share in sorted({0.0, share})
        for family, rank in _variants(options)
    ]
    # A guess that takes longer than half a stage would eat the speed-up.
    most = min(options.coarse_budget + share, max(share, 0.5 / stages))
    return _affordable(found, most * analysis.flops)


def coarse_candidates(
    analysis: Analysis,
    options: Options,
    stages: int,
    span: tuple[Position, Position],
    entering: Sequence[Value],
    leaving: Sequence[Value],
) -> list[CoarseSpec]:
    """Corrections that a closed-form fit may choose from, within the budget of one stage."""
    found = [
        _measure(
            analysis, _draft(dataclasses.replace(options, rank=rank), family), entering, leaving
        )
        for family, rank in _variants(options)
    ]
    if options.correction == "difference":
        # In its natural form it needs no fit.
        thinned = dataclasses.replace(options, coarse="thinned")
        found += filter(None, [_copied(analysis, thinned, span, entering, leaving)[0]])
    return _affordable(found, stage_budget(analysis, options, stages))


def _variants(options: Options) -> list[tuple[str, int]]:
    return [("linear", options.rank), *(("lowrank+linear", rank) for rank in _RANKS)]


def _affordable(found: Sequence[CoarseSpec], limit: float) -> list[CoarseSpec]:
    """Those within a number of FLOPs, each cost once; the cheapest one if none is."""
    by_cost = {(s.flops, s.family): s for s in sorted(found, key=lambda s: s.flops)}
    within = [spec for spec in by_cost.values() if spec.flops <= limit]
    return within or [next(iter(by_cost.values()))]


def choose_coarse(
    analysis: Analysis,
    options: Options,
    span: tuple[Position, Position],
    entering: Sequence[Value],
    leaving: Sequence[Value],
    budget: float,
) -> CoarseSpec:
    """Choose the coarse propagator of a stage.

    Args:
        analysis: What is known of the program.
        options: What was asked for.
        span: The cuts where the stage begins and ends.
        entering: The components that it reads.
        leaving: The components that it produces.
        budget: FLOPs that this propagator may take.

    Raises:
        SynthesisError: The family asked for by name does not fit the stage.
    """
    if options.coarse == "exact":
        return _exact(analysis, span)
    if options.coarse not in ("auto", *BLOCK_FAMILIES):
        draft = _draft(options, options.coarse, "asked for")
        return _measure(analysis, draft, entering, leaving)
    linear = _measure(analysis, _draft(options, "linear"), entering, leaving)
    if options.sweep == "collapsed":
        return dataclasses.replace(linear, why=_fit(linear, budget, "collapsed sweep"))
    units, obstacle = _copied(analysis, options, span, entering, leaving)
    if units is None:
        if options.coarse in BLOCK_FAMILIES:
            raise SynthesisError(
                f"coarse={options.coarse!r} does not fit the stage: {obstacle}; cut it from whole "
                "blocks (cuts=... names the modules that stages begin with), ask for another "
                "number of stages, or use coarse='linear' or 'auto'"
            )
        return dataclasses.replace(linear, why=_fit(linear, budget, obstacle))
    if options.coarse in BLOCK_FAMILIES:
        return units
    if units.flops <= budget:
        return dataclasses.replace(units, why=_fit(units, budget, "repeating block found"))
    over = f"units would take {units.flops:.2e} FLOPs of {budget:.2e}"
    return dataclasses.replace(linear, why=_fit(linear, budget, over))


def _fit(spec: CoarseSpec, budget: float, reason: str) -> str:
    verdict = "within" if spec.flops <= budget else "OVER"
    return f"{reason}; {verdict} the budget ({spec.flops:.2e} of {budget:.2e} FLOPs)"


def _exact(analysis: Analysis, span: tuple[Position, Position]) -> CoarseSpec:
    nodes = analysis.frontiers.order[span[0].index : span[1].index]
    inputs, _ = requirements(analysis.program, nodes, analysis.frontiers.cones)
    costs = [analysis.costs[node] for node in nodes]
    flops = sum(cost.flops for cost in costs)
    spec = CoarseSpec("exact", {"inputs": list(inputs)}, flops, 0, False, "the oracle")
    if analysis.unit != "seconds":
        return spec
    seconds, back = (
        sum(each) for each in zip(*((c.weight, c.backward) for c in costs), strict=True)
    )
    return dataclasses.replace(spec, seconds=seconds, backward_seconds=back)


def _copied(
    analysis: Analysis,
    options: Options,
    span: tuple[Position, Position],
    entering: Sequence[Value],
    leaving: Sequence[Value],
) -> tuple[CoarseSpec | None, str]:
    """Copies of blocks, of family units unless thinned is asked for, or why there are none."""
    if len(entering) != 1 or len(leaving) != 1:
        return None, "the state has several components"
    start, stop = span
    place = start.index, stop.index, options.units
    program, cones, why = analysis.program, analysis.frontiers.cones, "asked for"
    if options.coarse == "thinned":
        steps = thin(analysis.blocks, *place)
        made_of = tuple((block.signature, step) for group, step in steps for block in group)
        described = thinned_options(program, steps, cones)
        why += f"; steps of {', '.join(str(step) for _, step in steps)} blocks"
    else:
        blocks = choose_blocks(analysis.blocks, analysis.trunk_blocks, *place)
        made_of = tuple((block.signature, 1) for block in blocks)
        described = unit_options(program, blocks, cones)
    if not described["blocks"]:
        return None, "the stage is not made of repeating blocks"
    if not all(analysis.may_read(leaving[0].name, b["leaving"]) for b in described["blocks"]):
        return None, "its blocks read an input that the state behind it does not depend on"
    family = "thinned" if options.coarse == "thinned" else "units"
    draft = CoarseSpec(family, described, 0, 0, False, why)
    return _measure(analysis, draft, entering, leaving, made_of), ""


def _draft(options: Options, family: str, why: str = "") -> CoarseSpec:
    """A family without inputs of its own; low rank in residual form may fit a mean error too."""
    parts = family.split("+")
    bias = "lowrank" in parts and options.correction == "residual"
    linear = not bias and "conv" not in parts
    described: dict[str, Any] = {"inputs": []}
    if "lowrank" in parts:
        described |= {"rank": options.rank, "bias": bias}
    return CoarseSpec(family, described, 0, 0, linear, why)


def _measure(
    analysis: Analysis,
    draft: CoarseSpec,
    entering: Sequence[Value],
    leaving: Sequence[Value],
    blocks: tuple[tuple[str, int], ...] = (),
) -> CoarseSpec:
    """Build the network once, unless it was before, and note what one call costs."""
    copies = draft.family in BLOCK_FAMILIES  # of one tensor, into one that depends on it
    reads = {} if copies else _reads(analysis, [value.name for value in entering], leaving)
    draft = dataclasses.replace(draft, options={**draft.options, **reads})
    sources, targets = ([value.spec for value in state] for state in (entering, leaving))
    plain = draft.options.get("rank"), draft.options.get("bias"), str(reads)
    made_of = draft.family, plain, blocks, tuple(sources), tuple(targets)
    if made_of not in analysis.measured:
        with seeded(0):
            module = build_coarse(analysis.program, draft, sources, targets, nn.Identity())
        given = {n.name: analysis.program.args[str(n.target)] for n in analysis.program.inputs}
        inputs = [given[name] for name in draft.options.get("inputs", ())]
        found = _run(analysis, module, sources, inputs, corrects=True)
        found["parameters"] = sum(p.numel() for p in module.parameters())
        analysis.measured[made_of] = found
    return dataclasses.replace(draft, **analysis.measured[made_of])


def _run(
    analysis: Analysis,
    module: nn.Module,
    state: Sequence[TensorSpec],
    inputs: Sequence[Any],
    *,
    corrects: bool = False,
) -> dict[str, Any]:
    """What one call takes: FLOPs and, where nodes are weighed in seconds, those.

    A correction takes a residual and is added to a state besides: two passes over memory, which
    its FLOPs leave out and its seconds do not.
    """
    device = analysis.program.device
    values = [
        torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in state
    ]
    module.to(device).eval()

    def call(*given: torch.Tensor) -> Any:
        return module(*given, *inputs)

    def around(*given: torch.Tensor) -> Any:
        found = call(*(one - other for one, other in zip(given, values, strict=True)))
        return [x + x.detach() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]

    flops, moved, operators = count_work(lambda: call(*values))
    found: dict[str, Any] = {"flops": flops}
    if analysis.unit != "seconds":
        return found
    backward = bool(analysis.backward)
    if analysis.device is None:
        seconds = measure_network(around if corrects else call, values, backward=backward)
    else:
        if corrects:
            _, moved, operators = count_work(lambda: around(*values))
        dtype = state[0].dtype if state else "float32"
        once = analysis.device.seconds(flops, moved, dtype, operators)
        back = analysis.device.seconds(2 * flops, 2 * moved, dtype, 2 * operators)
        seconds = Seconds(once, back if backward else 0.0)
    return found | {"seconds": seconds.total, "backward_seconds": seconds.backward}
