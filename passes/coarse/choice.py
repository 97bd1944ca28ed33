"""Choice of a family for every guess and every correction, by its cost under the budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from passes.analysis import Analysis
from passes.coarse.build import build_coarse, build_guess
from passes.coarse.convolution import convolution_fits, convolution_flops
from passes.coarse.linear import linear_flops
from passes.coarse.units import choose_blocks, unit_options
from passes.cost import count_flops
from passes.errors import SynthesisError
from passes.frontier import Position, requirements
from passes.options import Options
from passes.plan import CoarseSpec, TensorSpec

__all__ = [
    "choose_coarse",
    "choose_guess",
    "coarse_estimate",
    "guess_estimate",
    "stage_budget",
]


_GUESS_REASONS = {
    "convolution": "strided convolution from the input",
    "linear": "channel map from the source",
}


def guess_estimate(analysis: Analysis, options: Options, position: Position) -> float:
    """Estimate the FLOPs of guessing the state at a position."""
    sources = [source.spec for source in analysis.sources]
    if _convolves(analysis, options, position.specs):
        return convolution_flops(sources[0], position.specs)
    return linear_flops(sources, position.specs)


def coarse_estimate(
    analysis: Analysis, options: Options, position: Position, budget: float = math.inf
) -> float:
    """Estimate the FLOPs of correcting the state at a position, under the budget of a stage."""
    if options.coarse == "zero":
        return 0.0
    if options.coarse in ("auto", "units") and (blocks := analysis.trunk_blocks):
        mean = sum(analysis.block_flops(block) for block in blocks) / len(blocks)
        if options.coarse == "units" or options.units * mean <= budget:
            return options.units * mean
    return linear_flops(position.specs, position.specs)


def stage_budget(analysis: Analysis, options: Options, stages: int) -> float:
    """FLOPs that one coarse propagator may take: an even share of the budget of the sweep."""
    return options.coarse_budget * analysis.flops / max(1, stages - 1)


def choose_guess(analysis: Analysis, options: Options, state: Sequence[TensorSpec]) -> CoarseSpec:
    """Choose the preprocessing operator that guesses a state.

    Raises:
        SynthesisError: There is nothing to guess from, or the family asked for does not fit.
    """
    sources = analysis.sources
    if not sources:
        raise SynthesisError(
            f"{analysis.program.name} has no floating-point input that follows the batch, and no "
            "cheap embedding of its inputs: the interfaces cannot be guessed"
        )
    nodes = [source.node for source in sources]
    placeholders = all(node.op == "placeholder" for node in nodes)
    cones = analysis.frontiers.cones
    sides = {member for node in nodes if node in cones for member in cones[node]}
    read = {s for node in (*sides, *nodes) for s in (node, *node.all_input_nodes)}
    inputs = [node.name for node in analysis.program.inputs if node in read]
    convolves = _convolves(analysis, options, state)
    family = options.preprocess
    if family == "auto":
        family = "convolution" if convolves else "linear"
    elif "convolution" in family.split("+") and not convolves:
        raise SynthesisError(
            "preprocess='convolution' needs one image-like input of no lower resolution than the "
            f"state ({', '.join(map(str, state))}); use preprocess='linear' or 'auto'"
        )
    described = [{"name": s.node.name, **dataclasses.asdict(s.spec)} for s in sources]
    draft = CoarseSpec(
        family=family,
        options={
            "rank": options.rank,
            "sources": [{**item, "shape": list(item["shape"])} for item in described],
            "inputs": [node.name for node in nodes] if placeholders else inputs,
            "sides": [node.name for node in analysis.program.order if node in sides],
        },
        flops=0,
        parameters=0,
        linear=False,
        why="asked for" if options.preprocess != "auto" else _GUESS_REASONS[family],
    )
    with torch.random.fork_rng():
        module = build_guess(analysis.program, draft, list(state))
    assert isinstance(module.operator, nn.Module)
    flops = _run(analysis, module.operator, [source.spec for source in sources], [])
    count = sum(p.numel() for p in module.operator.parameters())
    return dataclasses.replace(draft, flops=flops, parameters=count)


def _convolves(analysis: Analysis, options: Options, state: Sequence[TensorSpec]) -> bool:
    asked = options.preprocess
    if (asked != "auto" and "convolution" not in asked.split("+")) or len(analysis.sources) != 1:
        return False
    return all(convolution_fits(analysis.sources[0].spec, spec) for spec in state)


def choose_coarse(
    analysis: Analysis,
    options: Options,
    span: tuple[Position, Position],
    entering: Sequence[TensorSpec],
    leaving: Sequence[TensorSpec],
    budget: float,
) -> CoarseSpec:
    """Choose the coarse propagator of a stage.

    Args:
        analysis: What is known of the program.
        options: What was asked for.
        span: The cuts where the stage begins and ends.
        entering: Types of the components that it reads.
        leaving: Types of the components that it produces.
        budget: FLOPs that this propagator may take.

    Raises:
        SynthesisError: The family asked for by name does not fit the stage.
    """
    if options.coarse == "exact":
        return _exact(analysis, span)
    if options.coarse not in ("auto", "units"):
        draft = _draft(options, options.coarse, "asked for")
        return _measure(analysis, draft, entering, leaving)
    linear = _measure(analysis, _draft(options, "linear"), entering, leaving)
    if options.sweep == "collapsed":
        return dataclasses.replace(linear, why=_fit(linear, budget, "collapsed sweep"))
    units, obstacle = _units(analysis, options, span, entering, leaving)
    if units is None:
        if options.coarse == "units":
            raise SynthesisError(f"coarse='units' does not fit the stage: {obstacle}")
        return dataclasses.replace(linear, why=_fit(linear, budget, obstacle))
    if options.coarse == "units":
        return dataclasses.replace(units, why="asked for")
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
    flops = sum(analysis.costs[node].flops for node in nodes)
    return CoarseSpec("exact", {"inputs": list(inputs)}, flops, 0, False, "the oracle")


def _units(
    analysis: Analysis,
    options: Options,
    span: tuple[Position, Position],
    entering: Sequence[TensorSpec],
    leaving: Sequence[TensorSpec],
) -> tuple[CoarseSpec | None, str]:
    if len(entering) != 1 or len(leaving) != 1:
        return None, "the state has several components"
    start, stop = span
    trunk = analysis.trunk_blocks
    blocks = choose_blocks(analysis.blocks, trunk, start.index, stop.index, options.units)
    if not blocks:
        return None, "the stage is not made of repeating blocks"
    described = unit_options(analysis.program, blocks, analysis.frontiers.cones)
    draft = CoarseSpec("units", described, 0, 0, False)
    return _measure(analysis, draft, entering, leaving), ""


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
    entering: Sequence[TensorSpec],
    leaving: Sequence[TensorSpec],
) -> CoarseSpec:
    """Build the network once and note what one call costs."""
    with torch.random.fork_rng():
        module = build_coarse(analysis.program, draft, list(entering), list(leaving), nn.Identity())
    given = {n.name: analysis.program.args[str(n.target)] for n in analysis.program.inputs}
    inputs = [given[name] for name in draft.options.get("inputs", ())]
    return dataclasses.replace(
        draft,
        flops=_run(analysis, module, entering, inputs),
        parameters=sum(p.numel() for p in module.parameters()),
    )


def _run(
    analysis: Analysis, module: nn.Module, state: Sequence[TensorSpec], inputs: Sequence[Any]
) -> int:
    """Count the FLOPs of one call on zeros."""
    device = analysis.program.device
    values = [
        torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in state
    ]
    module.to(device).eval()
    return count_flops(lambda: module(*values, *inputs))
