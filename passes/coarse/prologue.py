"""Choose the sources of a preprocessing operator: inputs, or copies of layers before the interface.

"thinned" is how classical parareal begins, with the coarse propagator run from the start (Lions,
Maday, Turinici 2001): every m-th block of all that lies before the interface. Each device runs its
front at the same time as the others. With an interface at `|`, stem S and blocks A, and s and a at
few channels:

    original      S A A A A A A | A A A
    inputs                      -> map to the state at |
    first layers  S A           -> map to the state at |
    thinned       S   A     A   -> map to the state at |
    narrow        s a a a a a a -> map to the state at |
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position, requirements
from passes.analysis.sources import PreprocessingSource
from passes.coarse.family import copies_blocks, options_of, rows_of
from passes.coarse.narrow import narrow_spec
from passes.coarse.narrow_guess import NarrowOptions
from passes.coarse.spec import PreprocessOptions, Reads, SourceSpec
from passes.coarse.thinned_blocks import FrontOptions, Stem, SteppedBlocks, stepped_copies, thin
from passes.ir.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from passes.options import Options


_SHARE = 0.1
"""Default share of the cost of the original that a thinned or narrow front may take."""
_SHARE_OF_STAGE = 0.5
"""Default share of an even stage that a narrow front may take."""
_MOST_CHANNELS = 0.5
"""Largest share of the channels of a narrow front."""


@dataclass(frozen=True)
class PreprocessOrigin:
    """Sources of a preprocessing operator, and the nodes to copy that compute them.

    Attributes:
        sources: The values that the preprocessing operator reads.
        nodes: The first layers, to be copied; empty if the sources are inputs, or embeddings.
        steps: The blocks after them that are copied too, each with its step.
        copied: All nodes that are copied.
        flops: FLOPs of the copies.
        share: Share of the channels at which the copies of `nodes` work.
        window: Whether the sources are the state before a window, or follow from it.
        entering: The values of that state that the copied nodes read; None if there are none.
    """

    sources: tuple[PreprocessingSource, ...]
    nodes: tuple[fx.Node, ...] = ()
    steps: tuple[SteppedBlocks, ...] = ()
    copied: tuple[fx.Node, ...] = ()
    flops: int = 0
    share: float = 1.0
    window: bool = False
    entering: tuple[str, ...] | None = None

    @property
    def specs(self) -> list[TensorSpec]:
        """Types of the sources; at a share of the channels, what they are about."""
        specs = [source.spec for source in self.sources]
        return specs if self.share == 1 else [narrow_spec(spec, self.share) for spec in specs]


def origin_of(
    analysis: Analysis, options: Options, cut: Position, window: Position | None = None
) -> PreprocessOrigin:
    """Choose the sources of the state at a cut, within the share of the cost that may be copied.

    They are the inputs, or the state before the window, if nothing may be copied, or nothing fits
    into the share. Sources that depend on an input that no component of the state depends on are
    left out.

    Args:
        analysis: The facts about the program.
        options: Options of the compilation: `preprocess` and `prologue`.
        cut: Where the stage begins.
        window: The cut before its window, whose state is the source then; None in the first one.
    """
    limit = (options.prologue or 0.0) * analysis.total
    origin = None
    if options.windows > 1 and any(row.of_one_type for row in rows_of(options.preprocess)):
        origin = _of_one_type(analysis, options, cut, window)
    if window is not None:
        origin = origin or PreprocessOrigin(_sources(window), window=True)
    elif copies_blocks(options.preprocess):
        origin = _thinned(analysis, cut, limit if options.prologue is not None else None)
    elif is_narrow(options.preprocess):
        origin = _narrow(analysis, options, cut)
    elif limit and origin is None:
        origin = _first_layers(analysis, limit, cut)
    origin = origin or PreprocessOrigin(analysis.sources)
    usable = _usable(analysis, origin.sources, cut)
    flops = origin.share**2 * sum(analysis.costs[node].flops for node in origin.copied)
    return dataclasses.replace(origin, sources=usable, flops=round(flops))


def _of_one_type(
    analysis: Analysis, options: Options, cut: Position, window: Position | None
) -> PreprocessOrigin | None:
    """Copy the layers of a window that lead to the first state of the type of a cut.

    Returns:
        None if the state before the window has that type, or they cost more than an even stage.
    """
    frontiers, start = analysis.frontiers, 0 if window is None else window.index
    given = _sources(window) if window is not None else _usable(analysis, analysis.sources, cut)
    if [source.spec for source in given] == [*cut.specs]:
        return None
    first = next(
        (
            position
            for position in frontiers.positions
            if start < position.index <= cut.index
            if position.boundary and position.specs == cut.specs
        ),
        cut,
    )
    nodes = frontiers.order[start : first.index]
    cost = sum(analysis.costs[node].cost for node in nodes)
    if cost > analysis.total / (options.num_stages or 1):
        return None
    read = {source for node in nodes for source in node.all_input_nodes} | {*first.state}
    state = () if window is None else window.state
    return PreprocessOrigin(
        _sources(first), nodes, copied=nodes, window=window is not None,
        entering=tuple(node.name for node in state if node in read) or None,
    )  # fmt: skip


def _usable(
    analysis: Analysis, sources: Sequence[PreprocessingSource], cut: Position
) -> tuple[PreprocessingSource, ...]:
    """Keep the sources that a component of a state may read, and none that follow from others."""
    usable = [
        source
        for source in sources
        if any(analysis.may_read(node.name, source.node.name) for node in cut.state)
    ]
    return tuple(s for s in usable if not any(_follows(analysis, s, other) for other in usable))


def _follows(analysis: Analysis, source: PreprocessingSource, other: PreprocessingSource) -> bool:
    """Whether a source is computed from another one, and shows no more of the inputs."""
    members = analysis.frontiers.guessable.get(source.node, ())
    computed = source != other and any(other.node in node.all_input_nodes for node in members)
    return computed and analysis.may_read(other.node.name, source.node.name)


def is_narrow(family: str) -> bool:
    """Return whether preprocessing operators of a family are narrow copies of the layers before."""
    return family != "auto" and issubclass(options_of("preprocess", family), NarrowOptions)


def can_be_guessed(analysis: Analysis, options: Options, cut: Position) -> bool:
    """Return whether the `preprocess` family of the options can guess the state at a cut."""
    if not copies_blocks(options.preprocess):
        return True
    limit = None if options.prologue is None else options.prologue * analysis.total
    return _thinned(analysis, cut, limit, most=1) is not None


def too_expensive(options: Options, where: str) -> str:
    """Explain why the layers before a place cannot be thinned."""
    option = f"preprocess={options.preprocess!r}"
    if options.prologue is not None:
        return (
            f"{option} cannot thin what lies {where} to a share of {options.prologue} "
            "of the cost: give it a larger prologue, or leave that out"
        )
    return (
        f"{option} copies one of every kind of block, which would take more than half "
        f"of what lies {where}: use preprocess='auto', or cut later where cuts are given"
    )


def front_estimate(analysis: Analysis, options: Options, cut: Position) -> float:
    """Estimate the FLOPs of the thinned front of a cut: its share, or its minimum if larger."""
    share = _SHARE if options.prologue is None else options.prologue
    least = _thinned(analysis, cut, None, most=1)
    needed = sum(analysis.costs[node].flops for node in least.copied) if least else 0
    return max(share * analysis.flops, needed)


def _first_layers(analysis: Analysis, limit: float, cut: Position) -> PreprocessOrigin | None:
    """Copy the first layers up to the last block boundary within a cost limit."""
    total, best = 0.0, None
    ends = {p.index: p for p in analysis.frontiers.positions if p.boundary and p.index < cut.index}
    for index, node in enumerate(analysis.frontiers.order, 1):
        total += analysis.costs[node].cost
        if total > limit:
            break
        if index in ends and _usable(analysis, _sources(ends[index]), cut):
            best = ends[index]
    if best is None:
        return None
    nodes = tuple(analysis.frontiers.order[: best.index])
    return PreprocessOrigin(_sources(best), nodes, copied=nodes)


def _narrow(analysis: Analysis, options: Options, cut: Position) -> PreprocessOrigin:
    """Copy all layers before a cut at the channels that the cost of the front allows."""
    share = options.prologue
    if share is None:
        share = min(_SHARE, _SHARE_OF_STAGE / (options.num_stages or 1))
    nodes = tuple(analysis.frontiers.order[: cut.index])
    cost = sum(analysis.costs[node].cost for node in nodes) or 1.0
    width = min(_MOST_CHANNELS, math.sqrt(share * analysis.total / cost))
    # Eighths where possible: heads of attention, and groups, stay whole.
    width = math.floor(8 * width) / 8 or width
    return PreprocessOrigin(_sources(cut), nodes, copied=nodes, share=width)


def _sources(position: Position) -> tuple[PreprocessingSource, ...]:
    return tuple(
        PreprocessingSource(*pair) for pair in zip(position.state, position.specs, strict=True)
    )


def _thinned(
    analysis: Analysis, cut: Position, limit: float | None, most: int | None = None
) -> PreprocessOrigin | None:
    """Thin the blocks before a cut until they cost no more than a limit.

    Args:
        analysis: The facts about the program.
        cut: Where the stage begins.
        limit: Largest cost. None: a tenth of the cost of the original; if even the thinnest front
            costs more, then up to half of the blocks before the cut.
        most: Largest number of repeated blocks to keep; None for any.

    Returns:
        The front that keeps most blocks; None if none fits, or there are no blocks.
    """
    blocks, order = analysis.blocks, analysis.frontiers.order
    before = [block.stop for block in blocks if block.stop.index <= cut.index]
    if not before:
        return None
    start, end = blocks[0].start.index, before[-1]
    stem, best = tuple(order[:start]), None
    allowed = _SHARE * analysis.total if limit is None else limit
    half = 0.5 * sum(analysis.costs[node].cost for node in order[: end.index])
    for kept in range(1, (most or len(blocks)) + 1):
        steps = tuple(thin(blocks, start, end.index, kept))
        if not steps or (best is not None and steps == best.steps and kept > len(steps)):
            break
        copied = (*stem, *_nodes(order, steps))
        cost = sum(analysis.costs[node].cost for node in copied)
        if cost > allowed and (best is not None or limit is not None or cost > half):
            break
        best = PreprocessOrigin(_sources(end), stem, steps, copied)
    return best


def _nodes(order: Sequence[fx.Node], steps: Sequence[SteppedBlocks]) -> list[fx.Node]:
    blocks = itertools.chain.from_iterable(group for group, _ in steps)
    return [node for block in blocks for node in order[block.start.index : block.stop.index]]


def options_from(
    analysis: Analysis, options: Options, origin: PreprocessOrigin, reads: Reads | None
) -> PreprocessOptions:
    """Describe the sources of a preprocessing operator, and how inputs lead to them."""
    used, sides = _requirements(analysis, origin)
    plain = PreprocessOptions(
        rank=options.rank,
        sources=tuple(SourceSpec(**vars(s.spec), name=s.node.name) for s in origin.sources),
        copied=(origin.nodes[0].name, origin.nodes[-1].name) if origin.nodes else None,
        inputs=_in_order(analysis, used),
        sides=tuple(sides),
        prologue=options.prologue,
        reads=reads,
        window=origin.window or None,
        entering=origin.entering,
    )
    if origin.share != 1:
        return NarrowOptions(**vars(plain), share=origin.share)
    if not origin.steps:
        return plain
    # With a step of 1 the error was smaller: the map after the blocks scales anyway.
    blocks = stepped_copies(analysis, [(group, 1) for group, _ in origin.steps])
    return FrontOptions(
        **vars(plain)
        | {"inputs": _in_order(analysis, {*used, *(n for block in blocks for n in block.inputs)})},
        blocks=blocks,
        stem=Stem(inputs=tuple(used), leaving=analysis.blocks[0].start.state[0].name),
    )


def _in_order(analysis: Analysis, names: Collection[str]) -> tuple[str, ...]:
    return tuple(node.name for node in analysis.program.inputs if node.name in names)


def _requirements(analysis: Analysis, origin: PreprocessOrigin) -> tuple[Sequence[str], list[str]]:
    """Return the inputs and side values from which the sources, or first layers, follow."""
    program, recomputable = analysis.program, analysis.frontiers.recomputable
    if origin.window and not origin.nodes:
        return (), []
    if origin.nodes:
        inputs, sides = requirements(program, origin.nodes, recomputable)
        return inputs, list(sides)
    nodes, guessable = [source.node for source in origin.sources], analysis.frontiers.guessable
    members = {member for node in nodes for member in guessable.get(node, ())}
    read = {s for node in (*members, *nodes) for s in (node, *node.all_input_nodes)}
    if all(node.op == "placeholder" for node in nodes):
        read = set(nodes)
    inputs = tuple(node.name for node in program.inputs if node in read)
    return inputs, [node.name for node in program.order if node in members]
