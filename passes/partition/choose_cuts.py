"""Choose where to cut: state the analysis as a problem of pure numbers, and solve it.

`choose_cut` looks for the head, lists the candidate positions in front of it, builds the problem
(`passes.partition.build_problem`), solves it (`passes.partition.search`), and reports for every cut
what its next best position would cost.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position
from passes.coarse.family import copies_blocks, in_time, of_one_tensor
from passes.coarse.prologue import can_be_guessed, too_expensive
from passes.coarse.time_step import between_steps
from passes.cost.device_profile import DeviceProfile
from passes.errors import PartitionError, SynthesisError, suggest
from passes.ir.program import provenance
from passes.options import Options
from passes.partition.build_problem import ProblemBuilder
from passes.partition.infeasible import explain_misfit
from passes.partition.problem import CutProblem, Phases, makespan, serial
from passes.partition.search import CutSolution, DoesNotFit, solve

_SHOWN = 12
"""Legal cuts that an error message lists."""


@dataclass(frozen=True)
class Cut:
    """The positions of the interfaces, the last of which leads into the head.

    Attributes:
        positions: One per stage.
        gap: Relative distance from the proven optimum of the objective, also of cuts that the user
            names.
        devices: Device of each stage; empty if no devices were named.
        why: For each position but the last, the next best one and what it would cost.
        note: What it costs to cut only where blocks begin, or that this was not possible.
        inside_blocks: Whether that was not possible.
    """

    positions: tuple[Position, ...]
    gap: float
    devices: tuple[DeviceProfile | None, ...] = ()
    why: tuple[str, ...] = ()
    note: str = ""
    inside_blocks: bool = False


def choose_cut(analysis: Analysis, options: Options) -> Cut:
    """Choose the cuts of least predicted time, or check those that the user names.

    Raises:
        PartitionError: The graph has too few legal cuts, a named cut is not legal, or a stage
            would be no link of the chain.
        DoesNotFit: No stages, or not the named ones, fit into the memory of the devices.
        SynthesisError: No preprocessing operator that was asked for can be built at enough cuts.
    """
    head = _head(analysis, options)
    candidates = _candidates(analysis, options, head)
    if options.cuts is not None:
        named = _named(analysis, candidates, head, options.cuts)
        solution = _named_solution(analysis, options, candidates, [*named, head])
        return _check_chain(analysis, _cut(analysis, options, candidates, head, solution))
    candidates = _distinct(candidates, head)
    stages = options.num_stages
    if stages is None:
        raise PartitionError(
            "choose_cut needs a number of stages: `passes.plan.num_stages` chooses one"
        )
    between = _between_blocks(candidates, options)
    if len(between) == len(candidates):
        return _search(analysis, options, candidates, head, stages)[0]
    try:
        cut, slowest = _search(analysis, options, between, head, stages)
    except PartitionError:  # too few blocks, or too large ones
        cut, _ = _search(analysis, options, candidates, head, stages)
        return dataclasses.replace(cut, note=_INSIDE, inside_blocks=True)
    _, free = _search(analysis, options, candidates, head, stages)
    more = slowest / free - 1 if free else 0.0
    note = _PRICE.format(more) if more > _CHEAP else ""
    return dataclasses.replace(cut, note=note)


_CHEAP = 0.01
"""Price of cuts between blocks, over cuts anywhere, that needs no note."""
_PRICE = (
    "cuts lie where blocks begin, so that the slowest stage takes {:.1%} longer than with cuts "
    "anywhere, which cut_inside_blocks=True allows"
)
_INSIDE = (
    "a cut lies inside a block, between a layer and its normalization or activation, as no cuts "
    "between blocks make that many stages"
)


def _between_blocks(candidates: list[Position], options: Options) -> list[Position]:
    """Keep the candidates where a block begins, unless the options allow for others."""
    return [p for p in candidates if p.boundary or options.cut_inside_blocks]


def _search(
    analysis: Analysis, options: Options, candidates: list[Position], head: Position, stages: int
) -> tuple[Cut, float]:
    """Find the best cut among candidates, and the time of its slowest stage."""
    if stages - 1 > len(candidates):
        raise PartitionError(_too_few(analysis, options, candidates, stages))
    solution = _solve(analysis, options, candidates, head, stages)
    # The solver does not know which stages are connected: drop a candidate that a disconnected
    # stage begins at, and solve again.
    candidates = list(candidates)
    while len(candidates) >= stages and (
        start := _disconnected(analysis, _positions(candidates, head, solution))
    ):
        candidates.remove(start)
        solution = _solve(analysis, options, candidates, head, stages)
    cut = _check_chain(analysis, _cut(analysis, options, candidates, head, solution))
    return cut, solution.makespan


def problem_builder(analysis: Analysis, options: Options) -> ProblemBuilder:
    """Return the builder of the problems that `choose_cut` solves, one position per state."""
    head = _head(analysis, options)
    candidates = _distinct(_candidates(analysis, options, head), head)
    candidates = _between_blocks(candidates, options)
    return ProblemBuilder(analysis, options, candidates, head)


def _candidates(analysis: Analysis, options: Options, head: Position) -> list[Position]:
    """List where cuts may be: before the head, and between whole blocks that are copied.

    For coarse steps, between the steps of the loop.
    """
    if in_time(options.coarse) or in_time(options.preprocess):
        return [p for p in between_steps(analysis) if p.index < head.index]
    candidates = [
        position
        for position in analysis.frontiers.positions
        if position.index < head.index and can_be_guessed(analysis, options, position)
    ]
    needed = 1 if options.cuts is not None else max(1, (options.num_stages or 0) - 1)
    if copies_blocks(options.preprocess) and len(candidates) < needed:
        raise SynthesisError(too_expensive(options, f"before {needed} cuts"))
    if copies_blocks(options.coarse):
        single = of_one_tensor(options.coarse)
        return [p for p in candidates if p.boundary and (len(p.state) == 1 or not single)]
    return candidates


def _positions(
    candidates: list[Position], head: Position, solution: CutSolution
) -> tuple[Position, ...]:
    return tuple([*candidates, head][index] for index in solution.cuts)


def _distinct(candidates: list[Position], head: Position) -> list[Position]:
    """Keep one position per state, a block boundary if there is one.

    Between two positions of one state nothing is computed that crosses.
    """
    by_state: dict[tuple[fx.Node, ...], Position] = {}
    for position in candidates:
        other = by_state.get(position.state)
        if other is None or (position.boundary and not other.boundary):
            by_state[position.state] = position
    by_state.pop(head.state, None)
    return sorted(by_state.values(), key=lambda position: position.index)


def _check_chain(analysis: Analysis, cut: Cut) -> Cut:
    """Return the cut if every stage maps its entering state to its leaving state.

    Raises:
        PartitionError: A stage does not.
    """
    if start := _disconnected(analysis, cut.positions):
        raise PartitionError(
            f"the stage that begins at {_label(analysis, start)} would read nothing of the state "
            "before it, or add nothing to the state after it: it is a branch of its own, no link "
            "of a chain; name other cuts, or ask for another number of stages"
        )
    return cut


def _disconnected(analysis: Analysis, positions: Sequence[Position]) -> Position | None:
    """Return where the first stage begins that does not map its entering state to its leaving."""
    for start, stop in itertools.pairwise(positions):
        nodes = analysis.frontiers.order[start.index : stop.index]
        read = {source for node in nodes for source in node.all_input_nodes}
        if read.isdisjoint(start.state) or set(nodes).isdisjoint(stop.state):
            return start
    return None


def _head(analysis: Analysis, options: Options) -> Position:
    """Return where the head begins: after the trunk, at the state of the fewest tensors.

    A block that the trunk ends with is completed.
    Coarse steps imitate the loop alone: what follows it is the head.

    If no cut lies before it, because most of the work is in the first layers (a large table that
    small layers follow), everything counts as trunk.
    """
    if in_time(options.coarse):
        return between_steps(analysis)[-1]
    positions = analysis.frontiers.positions
    if not positions:
        refused = ", ".join(f"{count} x {why}" for why, count in analysis.frontiers.refused.items())
        raise PartitionError(
            f"{analysis.program.name} has no legal cut at all ({refused}); "
            "compile a submodule whose layers follow each other instead"
        )
    end = analysis.trunk_end
    after = [p for p in positions if p.index >= end] or [positions[-1]]
    head = min(after, key=lambda p: (len(p.state), not p.boundary, p.index))
    before = [position for position in positions if position.index < head.index]
    return head if _distinct(before, head) else positions[-1]


def _solve(
    analysis: Analysis, options: Options, candidates: list[Position], head: Position, stages: int
) -> CutSolution:
    builder = ProblemBuilder(analysis, options, candidates, head)
    devices = builder.devices(stages)
    try:
        return dataclasses.replace(solve(builder.build(devices)), devices=devices)
    except DoesNotFit as error:
        raise DoesNotFit(explain_misfit(builder, devices)) from error


def _named_solution(
    analysis: Analysis, options: Options, candidates: list[Position], positions: list[Position]
) -> CutSolution:
    """Return the cost of cuts that the user names, and the gap to the optimum."""
    builder = ProblemBuilder(analysis, options, candidates, positions[-1])
    by_index = {position.index: number for number, position in enumerate(builder.positions)}
    cuts = tuple(by_index[position.index] for position in positions)
    devices = builder.devices(len(positions))
    problem = builder.build(devices)
    spans = zip(problem.devices, itertools.pairwise([None, *cuts]), strict=True)
    for number, (costs, (begin, end)) in enumerate(spans):
        if end is not None and not costs.fits(begin, end, last=number + 1 == len(positions)):
            raise DoesNotFit(explain_misfit(builder, devices, cuts))
    time = makespan(problem, cuts) + serial(problem, cuts)
    return CutSolution(
        cuts=cuts,
        makespan=makespan(problem, cuts),
        serial=serial(problem, cuts),
        # The named cuts may have twins of the same state that cost less.
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
    """Describe a solution, with the next best position of every cut."""
    builder = ProblemBuilder(analysis, options, candidates, head)
    problem = builder.build(solution.devices)
    why = []
    for move in next_best_moves(problem, solution.cuts):
        if move is None:
            why.append("the only place that leaves a cut on both sides")
            continue
        place = _label(analysis, builder.positions[move.candidate])
        more = (move.time - solution.time) / solution.time if solution.time else 0.0
        why.append(f"next best in front of {place}: {more:+.2%} time")
    return Cut(
        positions=_positions(candidates, head, solution),
        gap=solution.gap,
        devices=solution.devices,
        why=tuple(why),
    )


class CutMove(NamedTuple):
    """Another candidate for one cut, and the step time if that cut alone moves there."""

    candidate: int
    time: float


def next_best_moves(problem: CutProblem, cuts: Sequence[int]) -> list[CutMove | None]:
    """Find the next best candidate of every cut but the last, while the other cuts stay.

    Args:
        problem: The costs.
        cuts: A partition.

    Returns:
        For each cut the best of the candidates between its neighbors; None if none fits.
    """
    devices, count = problem.devices, problem.stages
    others = _slowest_without_pair(problem.stage_costs(cuts))
    total = serial(problem, cuts)
    moves: list[CutMove | None] = []
    for number in range(count - 1):
        begin = cuts[number - 1] if number else None
        cut, end = cuts[number], cuts[number + 1]
        before, after = devices[number], devices[number + 1]
        best: CutMove | None = None
        for place in range(0 if begin is None else begin + 1, end):
            last = number + 2 == count
            if place == cut or not (
                before.fits(begin, place, last=False) and after.fits(place, end, last=last)
            ):
                continue
            pair = before.stage_cost(begin, place), after.stage_cost(place, end)
            slowest = [max(values) for values in zip(others[number], *pair, strict=True)]
            time = sum(slowest) + total - after.hop[cut] + after.hop[place]
            if best is None or time < best.time:
                best = CutMove(place, time)
        moves.append(best)
    return moves


def _slowest_without_pair(costs: Sequence[Phases]) -> list[Phases]:
    """Return for each stage but the last: the slowest of all stages but it and the next one."""

    def slower(one: Phases, other: Phases) -> Phases:
        return Phases.slowest((one, other))

    none = Phases(0.0, 0.0)
    front = [none, *itertools.accumulate(costs, slower)]
    back = [none, *itertools.accumulate(reversed(costs), slower)][::-1]
    return [slower(front[i], back[i + 2]) for i in range(len(costs) - 1)]


def _named(
    analysis: Analysis, candidates: list[Position], head: Position, names: tuple[str, ...]
) -> list[Position]:
    """Find the position in front of each named node or module.

    Raises:
        PartitionError: A name is unknown, out of order, in the head, or at no legal cut.
    """
    order = analysis.frontiers.order
    by_index = {position.index: position for position in candidates}
    positions: list[Position] = []
    for name in names:
        index = next(
            (
                i for i, node in enumerate(order)
                if node.name == name or f"{provenance(node).path}.".startswith(f"{name}.")
            ),
            None,
        )  # fmt: skip
        if index is None:
            paths = [provenance(order[position.index]).path for position in candidates]
            advice = suggest(name, [path for path in paths if path])
            raise PartitionError(
                f"no node or module is called {name!r} in {analysis.program.name}; {advice}"
            )
        if index >= head.index:
            raise PartitionError(
                f"{name!r} lies in the head, after the last correction: the last stage ends in "
                f"front of {_label(analysis, head)}"
            )
        if index not in by_index:
            near = min(candidates, key=lambda p: abs(p.index - index), default=None)
            hint = (
                f"; the nearest legal cut is in front of {_label(analysis, near)}" if near else ""
            )
            raise PartitionError(f"the graph cannot be cut in front of {name!r}{hint}")
        if positions and index <= positions[-1].index:
            raise PartitionError(
                f"cuts must be in the order of the graph ({name!r} comes too late)"
            )
        positions.append(by_index[index])
    return positions


def _label(analysis: Analysis, position: Position) -> str:
    node = analysis.frontiers.order[position.index]
    path = provenance(node).path
    return f"{path} (node {node.name})" if path else f"node {node.name}"


def _too_few(analysis: Analysis, options: Options, candidates: list[Position], stages: int) -> str:
    places = [_label(analysis, position) for position in candidates[:_SHOWN]]
    more = f" and {len(candidates) - _SHOWN} more" if len(candidates) > _SHOWN else ""
    refused = [f"{n} where {why}" for why, n in analysis.frontiers.refused.items()]
    several = sum(p.boundary and len(p.state) > 1 for p in analysis.frontiers.positions)
    if of_one_tensor(options.coarse) and several:
        refused.append(
            f"{several} where the state is several tensors, which coarse={options.coarse!r} cannot "
            "copy a block between (coarse='layers' and 'linear' can be cut there)"
        )
    return (
        f"{analysis.program.name} has {len(candidates)} legal cuts, but {stages} stages need "
        f"{stages - 1}: ask for at most {len(candidates) + 1} stages\n"
        f"  legal in front of: {'; '.join(places)}{more}\n"
        f"  not legal: {', '.join(refused) or 'none'}\n"
        f"  widest run without a legal cut: {_widest(analysis, candidates)}"
    )


def _widest(analysis: Analysis, candidates: list[Position]) -> str:
    """Describe the most expensive run of nodes between two legal cuts, by module path."""
    order = analysis.frontiers.order
    ends = [0, *(position.index for position in candidates), len(order)]

    def cost(span: tuple[int, int]) -> float:
        return sum(analysis.costs[node].cost for node in order[slice(*span)])

    start, stop = max(itertools.pairwise(ends), key=cost)
    first, last = (provenance(node).path or node.name for node in (order[start], order[stop - 1]))
    share = cost((start, stop)) / analysis.total if analysis.total else 1.0
    names = first if first == last else f"{first} to {last}"
    return f"{names} ({stop - start} nodes, {share:.0%} of the cost)"
