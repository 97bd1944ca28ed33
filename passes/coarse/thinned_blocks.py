"""Family `thinned`: every m-th block of the trained trunk, its branch scaled by m.

A residual block `B(x) = x + b(x)` is one step of Euler's method for `x' = b(x)`; the coarse network
takes fewer and larger ones, `x + m b(x) = x + m (B(x) - x)`, with the weights of the block in the
middle of the m that it stands for (classical parareal's coarse propagator: Lions, Maday, Turinici
2001). Blocks that change the shape of the state, and those that do not repeat, stay as they are.

It copies weights and buffers as they are at compilation, so the model must be trained by then. It
is not linear. Its natural form is the difference form, where it is a good propagator from the
start; in residual form its answer to a residual of zero is not zero, a bias that training has to
remove. A network with BatchNorm wants its statistics recalibrated (`passes.coarse.batchnorm`).

By letter, with D a block that halves the resolution:

    stage           A A A A A D B B B    N_c = 3
    coarse network  2A   3A   D   3B     3B is x + 3 (B(x) - x), with the weights of the middle B
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import torch
from torch import fx, nn

from passes.analysis.analysis import Analysis
from passes.analysis.blocks import Block
from passes.coarse.copied_blocks import (
    BlockCopy,
    Units,
    check_copies,
    check_single,
    copied_blocks,
    read_by,
    signatures,
    whole_blocks,
)
from passes.coarse.spec import (
    NON_EMPTY,
    CoarseOptions,
    Count,
    InputName,
    NodeName,
    PreprocessOptions,
    Site,
    Span,
    ValueName,
)
from passes.ir.program import Program
from passes.ir.subgraph import extract, nodes_between

Step = tuple[tuple[Block, ...], int]
"""The neighbouring blocks that are kept, one unless they alternate, and how many such it is for."""


@dataclass(frozen=True, kw_only=True)
class SteppedCopy(BlockCopy):
    """Nodes to copy, and how many such runs of nodes the copy stands for."""

    step: Count


@dataclass(frozen=True, kw_only=True)
class ThinnedOptions(CoarseOptions):
    """Options of family `thinned`.

    Attributes:
        blocks: The blocks to copy, in order.
    """

    blocks: Annotated[tuple[SteppedCopy, ...], NON_EMPTY]

    @classmethod
    def choose(cls, span: Span) -> Self:
        """Keep the block in the middle of all that it stands for."""
        check_single(span)
        analysis = span.analysis
        steps = thin(analysis.blocks, span.start.index, span.stop.index, span.options.units)
        copies = stepped_copies(analysis, steps)
        check_copies(span, copies)
        return cls(blocks=copies, inputs=read_by(analysis.program, copies))

    def made_of(self, analysis: Analysis) -> Hashable:
        """Digests of the blocks, and their steps."""
        return signatures(analysis, self.blocks), tuple(block.step for block in self.blocks)

    @property
    def why(self) -> str:
        """Say how large the steps are."""
        return f"asked for; steps of {', '.join(str(block.step) for block in self.blocks)} blocks"


@dataclass(frozen=True, kw_only=True)
class Stem:
    """The first layers.

    Attributes:
        inputs: Inputs of the program that they read.
        leaving: The value that they compute, which the first block reads.
    """

    inputs: tuple[InputName, ...]
    leaving: ValueName


@dataclass(frozen=True, kw_only=True)
class FrontOptions(PreprocessOptions):
    """Options of a preprocessing operator that reads what a `Front` computes.

    Attributes:
        copied: First and last node of the first layers.
        blocks: The blocks to copy after them, in order.
        stem: What the first layers read and compute.
    """

    copied: tuple[NodeName, NodeName] = field()
    blocks: Annotated[tuple[SteppedCopy, ...], NON_EMPTY]
    stem: Stem


def thin(blocks: Sequence[Block], start: int, stop: int, kept: int) -> list[Step]:
    """Choose which blocks of the stage between two cuts to keep, and how far each one steps.

    Equal neighbours form a run (so do blocks that alternate, such as A B A B: then A B counts as
    one). Every run keeps at least one; what remains of `kept` goes where the largest steps are.

    Args:
        blocks: Every block of the graph, in order.
        start: Index of the cut where the stage begins.
        stop: Index of the cut where it ends.
        kept: N_c, how many of the repeated blocks to keep.

    Returns:
        The kept blocks in order with their steps, which add up to the number of blocks; empty if
        the stage is not made of whole blocks.
    """
    runs = _runs(whole_blocks(blocks, start, stop))
    counts = _share([len(run) for run in runs], kept)
    pairs = zip(runs, counts, strict=True)
    return [step for run, count in pairs for step in _spread(run, count)]


def _runs(blocks: Sequence[Block]) -> list[list[tuple[Block, ...]]]:
    """Divide blocks into runs of equal groups, each with the shortest group that repeats."""
    runs: list[list[tuple[Block, ...]]] = []
    index = 0
    while index < len(blocks):
        ahead = list(itertools.takewhile(_keeps_shape, blocks[index:]))
        size, count = _repetition([block.signature for block in ahead])
        starts = range(index, index + size * count, size)
        runs.append([tuple(blocks[at : at + size]) for at in starts])
        index += size * count
    return runs


def _keeps_shape(block: Block) -> bool:
    return block.entering == block.leaving


def _repetition(names: Sequence[str]) -> tuple[int, int]:
    """Size of the shortest group that the names begin with at least twice, and how often."""
    for size in range(1, len(names) // 2 + 1):
        count = 1
        while names[count * size : (count + 1) * size] == names[:size]:
            count += 1
        if count > 1:
            return size, count
    return 1, 1


def _share(lengths: Sequence[int], kept: int) -> list[int]:
    """Share out `kept` over the runs that repeat, so that the largest step is small."""
    counts = [1] * len(lengths)
    repeated = [i for i, length in enumerate(lengths) if length > 1]
    for _ in range(kept - len(repeated)):
        growing = [i for i in repeated if counts[i] < lengths[i]]
        if not growing:
            break
        counts[max(growing, key=lambda i: lengths[i] / counts[i])] += 1
    return counts


def _spread(run: Sequence[tuple[Block, ...]], count: int) -> list[Step]:
    """Divide a run into parts as equal as can be; the middle of each stands for all of it."""
    bounds = [len(run) * part // count for part in range(count + 1)]
    return [(run[(low + high - 1) // 2], high - low) for low, high in itertools.pairwise(bounds)]


def stepped_copies(analysis: Analysis, steps: Sequence[Step]) -> tuple[SteppedCopy, ...]:
    """Describe the kept blocks, each with its step."""
    return tuple(SteppedCopy.of(analysis, _joined(group), step=step) for group, step in steps)


def _joined(group: Sequence[Block]) -> Block:
    first, last = group[0], group[-1]
    return Block(first.start, last.stop, first.entering, last.leaving, first.signature)


def build_thinned(options: ThinnedOptions, site: Site) -> Units:
    """Copy the blocks that the options name, with their weights, and let them take their steps."""
    return _units(site.program, options.blocks, options.inputs)


def _units(program: Program, blocks: Sequence[SteppedCopy], inputs: Sequence[str]) -> Units:
    return Units(copied_blocks(program, blocks), inputs, [block.step for block in blocks])


class Front(nn.Module):
    """All that lies before an interface, thinned: the first layers, then every m-th block.

    Args:
        stem: From inputs to the state that the first block reads.
        units: The blocks.
        inputs: Names of the inputs, in the order in which they are given.
        stem_reads: Those that the stem reads.
        unit_reads: Those that the blocks read.
    """

    def __init__(
        self,
        stem: fx.GraphModule,
        units: Units,
        inputs: Sequence[str],
        stem_reads: Sequence[str],
        unit_reads: Sequence[str],
    ) -> None:
        super().__init__()
        self.stem = stem
        self.units = units
        self._stem = [list(inputs).index(name) for name in stem_reads]
        self._units = [list(inputs).index(name) for name in unit_reads]

    def forward(self, *inputs: Any) -> torch.Tensor:
        """Guess the state from inputs in the order given at construction."""
        state = self.stem(*(inputs[index] for index in self._stem))
        guess: torch.Tensor = self.units(state, *(inputs[index] for index in self._units))
        return guess


def build_front(program: Program, options: FrontOptions) -> Front:
    """Copy the first layers and the blocks that the options name."""
    stem = extract(
        program,
        nodes_between(program, *options.copied),
        [],
        [options.stem.leaving],
        inputs=options.stem.inputs,
        sides=options.sides,
        name="Stem",
    )
    stem = copy.deepcopy(stem).requires_grad_()
    reads = [name for name in options.inputs if name in read_by(program, options.blocks)]
    units = _units(program, options.blocks, reads)
    return Front(stem, units, options.inputs, options.stem.inputs, reads)
