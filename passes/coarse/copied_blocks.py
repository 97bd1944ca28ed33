"""Family `units`: the coarse network of the paper, copies of the repeating block of the trunk.

For a stage of whole blocks: a copy of every block that changes the shape of the state
(down-sampling), and N_c copies of the block that the stage repeats most. The copies draw fresh
weights with the standard deviations of the originals (Lee, Lee, Park 2022, section IV). With D a
block that halves the resolution:

    stage          A A A D B B B B      N_c = 2
    coarse network       D B B          B has the shape of the leaving state

In a collapsed sweep the "stage" of a residual reaches to the last state: a copy of all the
down-sampling that lies between, and then N_c blocks. The sweep is one such network deep, the chain
as deep as all of its networks one after another, so it costs no more for the same N_c. With a
`width` the copies work at a share of the channels (`narrow.py`), in either sweep.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from torch import fx, nn

from passes.analysis.analysis import Analysis
from passes.analysis.blocks import Block
from passes.analysis.cut_points import requirements
from passes.coarse.narrow import Bottleneck, narrow, narrow_spec, redraw
from passes.coarse.spec import (
    NON_EMPTY,
    CoarseOptions,
    InputName,
    NodeName,
    Share,
    Site,
    Span,
    ValueName,
    zeros,
)
from passes.errors import SynthesisError
from passes.ir.program import Program, extract, nodes_between


@dataclass(frozen=True, kw_only=True)
class BlockCopy:
    """A block to copy, by the names of its nodes.

    Attributes:
        first: Its first node.
        last: Its last node.
        entering: The value that it reads.
        leaving: The value that it computes.
        inputs: Inputs of the program that it reads.
        sides: Side values that it recomputes.
    """

    first: NodeName
    last: NodeName
    entering: ValueName
    leaving: NodeName
    inputs: tuple[InputName, ...]
    sides: tuple[NodeName, ...]

    @classmethod
    def of(cls, analysis: Analysis, block: Block, **more: Any) -> Self:
        """Describe a block; `more` holds the fields of a subclass."""
        nodes = analysis.frontiers.order[block.start.index : block.stop.index]
        inputs, sides = requirements(analysis.program, nodes, analysis.frontiers.recomputable)
        return cls(
            first=nodes[0].name,
            last=nodes[-1].name,
            entering=block.start.state[0].name,
            leaving=block.stop.state[0].name,
            inputs=inputs,
            sides=sides,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class UnitsOptions(CoarseOptions):
    """Options of family `units`.

    Attributes:
        blocks: The blocks to copy, in order.
        width: Share of the channels at which the copies work; None for all.
    """

    blocks: Annotated[tuple[BlockCopy, ...], NON_EMPTY]
    width: Share | None = None

    @classmethod
    def choose(cls, span: Span) -> Self:
        """Choose the blocks that change the shape of the state, and the most frequent one.

        Raises:
            SynthesisError: The stage is not made of whole blocks, or its state is not one tensor.
        """
        check_single(span)
        analysis = span.analysis
        blocks = choose_blocks(analysis, span.start.index, span.stop.index, span.options.units)
        copies = tuple(BlockCopy.of(analysis, block) for block in blocks)
        check_copies(span, copies)
        width = span.options.coarse_width
        return cls(
            blocks=copies,
            inputs=read_by(analysis.program, copies),
            width=None if width == 1 else width,
        )

    def made_of(self, analysis: Analysis) -> Hashable:
        """Return the digests of the blocks, and their width."""
        return signatures(analysis, self.blocks), self.width


class Units(nn.Module):
    """A sequence of blocks, each called with the state and the inputs that it reads.

    Args:
        units: The blocks.
        inputs: Names of the inputs, in the order of the arguments of `forward`.
        steps: For every block B, the number m of blocks that it stands for: x + m (B(x) - x), which
            scales its residual branch by m. Default: 1 for all.
    """

    def __init__(
        self, units: Sequence[fx.GraphModule], inputs: Sequence[str], steps: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.steps = tuple(steps) or (1,) * len(units)
        self._inputs = tuple(inputs)
        self._reads = [
            [n.name for n in unit.graph.nodes if n.op == "placeholder"][1:] for unit in units
        ]

    def forward(self, x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        """Propagate the state.

        Args:
            x: The state.
            inputs: Inputs of the program, in the order of the constructor's `inputs`.
        """
        by_name = dict(zip(self._inputs, inputs, strict=True))
        for unit, reads, step in zip(self.units, self._reads, self.steps, strict=True):
            y = unit(x, *(by_name[name] for name in reads))
            x = y if step == 1 else x + step * (y - x)
        return x

    def extra_repr(self) -> str:
        """Show the steps in the repr of the module."""
        return f"steps={self.steps}"


def whole_blocks(blocks: Sequence[Block], start: int, stop: int) -> list[Block]:
    """Return the blocks between two cuts; empty unless they cover exactly these nodes."""
    inside = [block for block in blocks if block.start.index >= start and block.stop.index <= stop]
    if not inside or inside[0].start.index != start or inside[-1].stop.index != stop:
        return []
    return inside


def choose_blocks(analysis: Analysis, start: int, stop: int, repeats: int) -> list[Block]:
    """Choose the blocks to copy for the stage between two cuts.

    Args:
        analysis: All blocks of the graph, and those that the trunk repeats.
        start: Index of the cut where the stage begins.
        stop: Index of the cut where it ends.
        repeats: N_c, the number of copies of the repeated block.

    Returns:
        The blocks in the order in which to chain them; empty if the stage is not made of whole
        blocks. Where no block has the shape of the leaving state, those that change the shape; if
        that is mere pooling, after the block that the stage repeats most.
    """
    inside = whole_blocks(analysis.blocks, start, stop)
    if not inside:
        return []
    changing = [block for block in inside if block.entering.shape != block.leaving.shape]
    keeping = [block for block in inside if block not in changing]
    final = [block for block in keeping if block.leaving.shape == inside[-1].leaving.shape]
    if not final and (not keeping or any(analysis.is_significant(block) for block in changing)):
        return changing
    repeated = {block.signature for block in analysis.trunk_blocks}
    candidates = final or keeping
    candidates = [b for b in candidates if b.signature in repeated] or candidates
    common, _ = Counter(block.signature for block in candidates).most_common(1)[0]
    repeating = next(block for block in candidates if block.signature == common)
    return sorted([*changing, *[repeating] * repeats], key=lambda block: block.start.index)


def check_single(span: Span) -> None:
    """Refuse a state of several tensors, as a block has one.

    Raises:
        SynthesisError: The entering or the leaving state has several components.
    """
    if len(span.entering) != 1 or len(span.leaving) != 1:
        raise SynthesisError("the state has several components")


def check_copies(span: Span, copies: Sequence[BlockCopy]) -> None:
    """Refuse a stage without blocks, and blocks that read what the leaving state must not.

    Raises:
        SynthesisError: There are no blocks, or a block reads an input that the leaving state does
            not depend on.
    """
    if not copies:
        raise SynthesisError("the stage is not made of repeating blocks")
    [leaving] = span.leaving
    if not all(span.analysis.may_read(leaving.name, block.leaving) for block in copies):
        raise SynthesisError("its blocks read an input that the state after it does not depend on")


def read_by(program: Program, copies: Sequence[BlockCopy]) -> tuple[str, ...]:
    """Return the inputs that any of the blocks reads, in the order of the program."""
    used = {name for block in copies for name in block.inputs}
    return tuple(node.name for node in program.inputs if node.name in used)


def signatures(analysis: Analysis, copies: Sequence[BlockCopy]) -> tuple[tuple[str, ...], ...]:
    """Return the digests of the blocks of every copy: equal for copies that compute the same."""
    order, blocks = analysis.frontiers.order, analysis.blocks
    first = {order[block.start.index].name: number for number, block in enumerate(blocks)}
    last = {order[block.stop.index - 1].name: number for number, block in enumerate(blocks)}
    inside = (blocks[first[block.first] : last[block.last] + 1] for block in copies)
    return tuple(tuple(block.signature for block in group) for group in inside)


def build_units(options: UnitsOptions, site: Site) -> Units | Bottleneck:
    """Copy the blocks that the options name and draw fresh weights for them.

    Raises:
        SynthesisError: A block has no narrower copy, but a width is asked for.
    """
    copies = copied_blocks(site.program, options.blocks)
    if options.width is None:
        for unit in copies:
            redraw(unit)
        return Units(copies, options.inputs)
    [entering], [leaving] = site.entering, site.leaving
    state = zeros(narrow_spec(entering, options.width), site.program.device)
    for block, unit in zip(options.blocks, copies, strict=True):
        inputs = site.program.examples(block.inputs)
        state = narrow(unit, options.width, [state, *inputs])
    if state.shape != narrow_spec(leaving, options.width).shape:
        raise SynthesisError(
            f"at a share of {options.width} the blocks leave {tuple(state.shape)} of "
            f"{leaving.shape}: choose another coarse_width, or leave it out"
        )
    return Bottleneck(Units(copies, options.inputs), entering, leaving, options.width)


def copied_blocks(program: Program, blocks: Sequence[BlockCopy]) -> list[fx.GraphModule]:
    """Copy blocks deeply; the copies are trainable even if the originals are frozen."""
    copies = []
    for block in blocks:
        original = extract(
            program,
            nodes_between(program, block.first, block.last),
            [block.entering],
            [block.leaving],
            inputs=block.inputs,
            sides=block.sides,
            name="Unit",
        )
        copies.append(copy.deepcopy(original).requires_grad_())
    return copies
