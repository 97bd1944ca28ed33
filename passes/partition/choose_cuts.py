"""Where to cut: the analysis as a problem of pure numbers, and the positions that solve it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position
from passes.coarse.family import copies_blocks
from passes.coarse.prologue import can_be_guessed, too_expensive
from passes.cost.device_profile import DeviceProfile
from passes.errors import PartitionError, SynthesisError
from passes.ir.program import provenance
from passes.options import Options
from passes.partition.alternatives import alternatives
from passes.partition.build_problem import Pricing
from passes.partition.infeasible import explain
from passes.partition.problem import makespan, serial
from passes.partition.search import CutSolution, DoesNotFit, solve

__all__ = ["Cut", "choose_cut", "pricing_of"]

_SHOWN = 12


@dataclass(frozen=True)
class Cut:
    """The positions of the interfaces, the last of which leads into the head.

    Attributes:
        positions: One per stage.
        gap: Relative distance from the proven optimum of the objective, of given cuts too.
        devices: What each stage runs on; empty where no devices were named.
        why: For each position but the last, the next best one and what it would cost.
    """

    positions: tuple[Position, ...]
    gap: float
    devices: tuple[DeviceProfile | None, ...] = ()
    why: tuple[str, ...] = ()


def choose_cut(analysis: Analysis, options: Options) -> Cut:
    """Choose the cuts that minimise the predicted time, or take those that the user names.

    Raises:
        PartitionError: The graph has too few legal cuts, a named cut is not legal, or a stage
            would be no link of the chain.
    """
    head = _head(analysis)
    candidates = _candidates(analysis, options, head)
    if options.cuts is not None:
        named = _named(analysis, candidates, head, options.cuts)
        solution = _given(analysis, options, candidates, [*named, head])
        return _linked(analysis, _cut(analysis, options, candidates, head, solution))
    candidates = _distinct(candidates, head)
    stages = options.stages
    if stages == "auto":
        raise PartitionError(
            "choose_cut needs a number of stages: `passes.plan.num_stages` chooses one"
        )
    if stages - 1 > len(candidates):
        raise PartitionError(_too_few(analysis, candidates, stages))
    solution = _solve(analysis, options, candidates, head, stages)
    while len(candidates) >= stages and (
        start := _idle(analysis, _positions(candidates, head, solution))
    ):
        candidates.remove(start)
        solution = _solve(analysis, options, candidates, head, stages)
    return _linked(analysis, _cut(analysis, options, candidates, head, solution))


def pricing_of(analysis: Analysis, options: Options) -> Pricing:
    """The prices that `choose_cut` searches, one position per state that can cross."""
    head = _head(analysis)
    candidates = _distinct(_candidates(analysis, options, head), head)
    return Pricing(analysis, options, candidates, head)


def _candidates(analysis: Analysis, options: Options, head: Position) -> list[Position]:
    """Where cuts may be: in front of the head, and for copied blocks at the ends of whole ones."""
    found = [
        position
        for position in analysis.frontiers.positions
        if position.index < head.index and can_be_guessed(analysis, options, position)
    ]
    wanted = 1 if options.cuts is not None or options.stages == "auto" else options.stages - 1
    if copies_blocks(options.preprocess) and len(found) < wanted:
        raise SynthesisError(too_expensive(options, f"before {wanted} cuts"))
    if copies_blocks(options.coarse):
        return [p for p in found if p.boundary and len(p.state) == 1]
    return found


def _positions(
    candidates: list[Position], head: Position, solution: CutSolution
) -> tuple[Position, ...]:
    return tuple([*candidates, head][index] for index in solution.cuts)


def _distinct(candidates: list[Position], head: Position) -> list[Position]:
    """One position per state, a boundary if there is one: between two of them nothing happens."""
    chosen: dict[tuple[fx.Node, ...], Position] = {}
    for position in candidates:
        known = chosen.get(position.state)
        if known is None or (position.boundary and not known.boundary):
            chosen[position.state] = position
    chosen.pop(head.state, None)
    return sorted(chosen.values(), key=lambda position: position.index)


def _linked(analysis: Analysis, cut: Cut) -> Cut:
    if start := _idle(analysis, cut.positions):
        raise PartitionError(
            f"the stage that begins at {_label(analysis, start)} would read nothing of the state "
            "before it, or add nothing to the state behind it: it is a branch of its own, no link "
            "of a chain; name other cuts, or ask for another number of stages"
        )
    return cut


def _idle(analysis: Analysis, positions: Sequence[Position]) -> Position | None:
    """Where a stage begins that does not lead from its entering to its leaving state."""
    for start, stop in itertools.pairwise(positions):
        nodes = analysis.frontiers.order[start.index : stop.index]
        read = {source for node in nodes for source in node.all_input_nodes}
        if read.isdisjoint(start.state) or set(nodes).isdisjoint(stop.state):
            return start
    return None


def _head(analysis: Analysis) -> Position:
    """The position that the head starts at: right behind the trunk, through the fewest tensors."""
    positions = analysis.frontiers.positions
    if not positions:
        refused = ", ".join(f"{count} x {why}" for why, count in analysis.frontiers.refused.items())
        raise PartitionError(
            f"{analysis.program.name} has no legal cut at all ({refused}); "
            "compile a submodule whose layers follow each other instead"
        )
    end = analysis.trunk_end()
    behind = [p for p in positions if p.index >= end] or [positions[-1]]
    return min(behind, key=lambda position: (len(position.state), position.index))


def _solve(
    analysis: Analysis, options: Options, candidates: list[Position], head: Position, stages: int
) -> CutSolution:
    pricing = Pricing(analysis, options, candidates, head)
    try:
        devices = pricing.devices(stages)
        return dataclasses.replace(solve(pricing.problem(devices)), devices=devices)
    except DoesNotFit as error:
        raise DoesNotFit(explain(pricing, pricing.devices(stages))) from error


def _given(
    analysis: Analysis, options: Options, candidates: list[Position], positions: list[Position]
) -> CutSolution:
    """The price of cuts that the user names, on devices that hold them."""
    pricing = Pricing(analysis, options, candidates, positions[-1])
    places = {position.index: number for number, position in enumerate(pricing.ends)}
    chosen = tuple(places[position.index] for position in positions)
    devices = pricing.devices(len(positions))
    problem = pricing.problem(devices)
    spans = zip(problem.devices, itertools.pairwise([None, *chosen]), strict=True)
    for number, (prices, (begin, end)) in enumerate(spans):
        if end is not None and not prices.fits(begin, end, last=number + 1 == len(positions)):
            raise DoesNotFit(explain(pricing, devices, chosen))
    time = makespan(problem, chosen) + serial(problem, chosen)
    return CutSolution(
        cuts=chosen,
        makespan=makespan(problem, chosen),
        serial=serial(problem, chosen),
        # What any other cuts would take at least; those chosen may lie at a dearer twin.
        lower_bound=min(time, solve(problem).lower_bound),
        evaluations=0,
        devices=devices,
    )


def _cut(
    analysis: Analysis,
    options: Options,
    candidates: list[Position],
    head: Position,
    solution: CutSolution,
) -> Cut:
    """What was chosen, with the next best place of every cut."""
    pricing = Pricing(analysis, options, candidates, head)
    problem = pricing.problem(solution.devices)
    why = []
    for found in alternatives(problem, solution.cuts):
        if found is None:
            why.append("the only place that leaves a cut on both sides")
            continue
        place = _label(analysis, pricing.ends[found.candidate])
        more = (found.time - solution.time) / solution.time if solution.time else 0.0
        why.append(f"next best in front of {place}: {more:+.2%} time")
    return Cut(
        positions=_positions(candidates, head, solution),
        gap=solution.gap,
        devices=solution.devices,
        why=tuple(why),
    )


def _named(
    analysis: Analysis, candidates: list[Position], head: Position, names: tuple[str, ...]
) -> list[Position]:
    """Find the position in front of each named node or module."""
    order = analysis.frontiers.order
    by_index = {position.index: position for position in candidates}
    chosen: list[Position] = []
    for name in names:
        index = next(
            (
                i for i, node in enumerate(order)
                if node.name == name or f"{provenance(node).path}.".startswith(f"{name}.")
            ),
            None,
        )  # fmt: skip
        if index is None:
            raise PartitionError(f"no node or module is called {name!r} in {analysis.program.name}")
        if index >= head.index:
            raise PartitionError(
                f"{name!r} lies in the head, behind the last correction: the last stage ends in "
                f"front of {_label(analysis, head)}"
            )
        if index not in by_index:
            near = min(candidates, key=lambda p: abs(p.index - index), default=None)
            hint = (
                f"; the nearest legal cut is in front of {_label(analysis, near)}" if near else ""
            )
            raise PartitionError(f"the graph cannot be cut in front of {name!r}{hint}")
        if chosen and index <= chosen[-1].index:
            raise PartitionError(
                f"cuts must be in the order of the graph ({name!r} comes too late)"
            )
        chosen.append(by_index[index])
    return chosen


def _label(analysis: Analysis, position: Position) -> str:
    node = analysis.frontiers.order[position.index]
    return f"{provenance(node).path or node.name} (node {node.name})"


def _too_few(analysis: Analysis, candidates: list[Position], stages: int) -> str:
    places = [_label(analysis, position) for position in candidates[:_SHOWN]]
    more = f" and {len(candidates) - _SHOWN} more" if len(candidates) > _SHOWN else ""
    refused = ", ".join(f"{n} where {why}" for why, n in analysis.frontiers.refused.items())
    return (
        f"{analysis.program.name} has {len(candidates)} legal cuts, but {stages} stages need "
        f"{stages - 1}: ask for at most {len(candidates) + 1} stages\n"
        f"  legal in front of: {'; '.join(places)}{more}\n"
        f"  not legal: {refused or 'none'}\n"
        f"  widest run without a legal cut: {_widest(analysis, candidates)}"
    )


def _widest(analysis: Analysis, candidates: list[Position]) -> str:
    """The run of nodes between two legal cuts that costs most, by module path."""
    order = analysis.frontiers.order
    ends = [0, *(position.index for position in candidates), len(order)]

    def weight(span: tuple[int, int]) -> float:
        return sum(analysis.costs[node].cost for node in order[slice(*span)])

    start, stop = max(itertools.pairwise(ends), key=weight)
    first, last = (provenance(node).path or node.name for node in (order[start], order[stop - 1]))
    share = weight((start, stop)) / analysis.total if analysis.total else 1.0
    names = first if first == last else f"{first} to {last}"
    return f"{names} ({stop - start} nodes, {share:.0%} of the cost)"
