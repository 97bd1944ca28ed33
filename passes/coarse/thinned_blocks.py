"""Family `thinned`: every m-th block of the trained trunk, its residual branch scaled by m.

A residual block `B(x) = x + b(x)` is one step of the Euler method for `x' = b(x)`. The coarse
network takes fewer and larger steps, `x + m b(x) = x + m (B(x) - x)`, with the weights of the block
in the middle of the m blocks that it replaces (the coarse propagator of classical parareal: Lions,
Maday, Turinici 2001). For three blocks B(x) = 1.1 x, the stage returns 1.1^3 x = 1.331 x, and one
block with m = 3 returns x + 3 * 0.1 x = 1.3 x.

Blocks that change the shape of the state, and blocks that do not repeat, keep m = 1. With D a block
that halves the resolution, and three repeated blocks to keep (N_c = 3):

    stage            A0 A1 A2 A3 A4  D  B0 B1 B2
    runs             A x 5           D  B x 3         equal neighbors
    blocks per run   2               1  1             3 of A and B: the run with the largest step,
                                                      5 / 1 against 3 / 1, gets the third
    kept, with m     A0:2  A3:3     D:1 B1:3          A0 replaces A0 A1, A3 replaces A2 A3 A4

The steps add up to the number of blocks, 2 + 3 + 1 + 3 = 9.

The family copies weights and buffers at compilation, so the model must be trained by then. It is
not linear. In difference form it is a good propagator from the start. In residual form its
correction of a zero residual is not zero, a bias that training has to remove. A network with
BatchNorm carries the statistics of the trunk, but it takes larger steps and is called on guesses
and residuals: `recalibrate` replaces them by the average over sample calls.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
from passes.ir.program import Program, extract, nodes_between

SteppedBlocks = tuple[tuple[Block, ...], int]
"""A group of neighboring blocks to keep (one block, unless blocks alternate), and the number m of
such groups that it replaces."""


@dataclass(frozen=True, kw_only=True)
class SteppedCopy(BlockCopy):
    """A block to copy, and the number m of such blocks that the copy replaces."""

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
        """Keep `units` of the repeated blocks, and all others.

        Raises:
            SynthesisError: The stage is not made of whole blocks, or its state is not one tensor.
        """
        check_single(span)
        analysis = span.analysis
        steps = thin(analysis.blocks, span.start.index, span.stop.index, span.options.units)
        copies = stepped_copies(analysis, steps)
        check_copies(span, copies)
        return cls(blocks=copies, inputs=read_by(analysis.program, copies))

    def made_of(self, analysis: Analysis) -> Hashable:
        """Return the digests of the blocks, and their steps."""
        return signatures(analysis, self.blocks), tuple(block.step for block in self.blocks)

    @property
    def why(self) -> str:
        """Reason for the plan, with the steps."""
        return f"asked for; steps of {', '.join(str(block.step) for block in self.blocks)} blocks"


@dataclass(frozen=True, kw_only=True)
class Stem:
    """The first layers, in front of the first block.

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


def thin(blocks: Sequence[Block], start: int, stop: int, kept: int) -> list[SteppedBlocks]:
    """Choose which blocks of the stage between two cuts to keep, and the step of each.

    Equal neighbors form a run; so do alternating blocks such as A B A B, where A B counts as one.
    Every run keeps at least one block; the rest of `kept` goes to the runs with the largest steps.

    Args:
        blocks: All blocks of the graph, in order.
        start: Index of the cut where the stage begins.
        stop: Index of the cut where it ends.
        kept: N_c, the number of repeated blocks to keep.

    Returns:
        The kept blocks in order with their steps, which add up to the number of blocks; empty if
        the stage is not made of whole blocks.
    """
    runs = _runs(whole_blocks(blocks, start, stop))
    counts = _share([len(run) for run in runs], kept)
    pairs = zip(runs, counts, strict=True)
    return [step for run, count in pairs for step in _spread(run, count)]


def _runs(blocks: Sequence[Block]) -> list[list[tuple[Block, ...]]]:
    """Divide blocks into runs of equal groups; each run repeats the shortest possible group."""
    runs: list[list[tuple[Block, ...]]] = []
    index = 0
    while index < len(blocks):
        # A block that changes the shape ends a run, and is a run of its own.
        following = list(itertools.takewhile(_keeps_shape, blocks[index:]))
        size, count = _repetition([block.signature for block in following])
        starts = range(index, index + size * count, size)
        runs.append([tuple(blocks[at : at + size]) for at in starts])
        index += size * count
    return runs


def _keeps_shape(block: Block) -> bool:
    return block.entering == block.leaving


def _repetition(names: Sequence[str]) -> tuple[int, int]:
    """Return the size of the shortest group that the names begin with twice or more, and how often.

    >>> _repetition("AAAB"), _repetition("ABABABC"), _repetition("ABC")
    ((1, 3), (2, 3), (1, 1))
    """
    for size in range(1, len(names) // 2 + 1):
        count = 1
        while names[count * size : (count + 1) * size] == names[:size]:
            count += 1
        if count > 1:
            return size, count
    return 1, 1


def _share(lengths: Sequence[int], kept: int) -> list[int]:
    """Distribute `kept` blocks over the runs that repeat, to make the largest step small.

    >>> _share([5, 1, 3], kept=3)
    [2, 1, 1]
    """
    counts = [1] * len(lengths)
    repeated = [i for i, length in enumerate(lengths) if length > 1]
    for _ in range(kept - len(repeated)):
        growing = [i for i in repeated if counts[i] < lengths[i]]
        if not growing:
            break
        counts[max(growing, key=lambda i: lengths[i] / counts[i])] += 1
    return counts


def _spread(run: Sequence[tuple[Block, ...]], count: int) -> list[SteppedBlocks]:
    """Divide a run into `count` nearly equal parts, and return the middle of each with its size.

    For A0 ... A4 and two parts: [A0, A1] and [A2, A3, A4], so A0 with step 2 and A3 with step 3.
    """
    bounds = [len(run) * part // count for part in range(count + 1)]
    return [(run[(low + high - 1) // 2], high - low) for low, high in itertools.pairwise(bounds)]


def stepped_copies(analysis: Analysis, steps: Sequence[SteppedBlocks]) -> tuple[SteppedCopy, ...]:
    """Describe the kept blocks with their steps."""
    return tuple(SteppedCopy.of(analysis, _joined(group), step=step) for group, step in steps)


def _joined(group: Sequence[Block]) -> Block:
    first, last = group[0], group[-1]
    return Block(first.start, last.stop, first.entering, last.leaving, first.signature)


def build_thinned(options: ThinnedOptions, site: Site) -> Units:
    """Copy the blocks that the options name with their weights, and scale them by their steps."""
    return _units(site.program, options.blocks, options.inputs)


def _units(program: Program, blocks: Sequence[SteppedCopy], inputs: Sequence[str]) -> Units:
    return Units(copied_blocks(program, blocks), inputs, [block.step for block in blocks])


class Front(nn.Module):
    """Thinned layers before an interface: the first layers, then every m-th block.

    Args:
        stem: From inputs to the state that the first block reads.
        units: The blocks.
        inputs: Names of the inputs, in the order of the arguments of `forward`.
        stem_reads: Names of those that the stem reads.
        unit_reads: Names of those that the blocks read.
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
        """Guess the state from inputs, in the order of the constructor's `inputs`."""
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


def recalibrate(network: nn.Module, calls: Iterable[tuple[Any, ...]]) -> int:
    """Set the running statistics of every BatchNorm to their average over calls.

    Each layer normalizes by the statistics of the current batch, so later layers are calibrated on
    the outputs of layers that are calibrated already. Modes, momentum, weights and gradients do not
    change, dropout is off, and layers without running statistics are left alone. Without calls,
    nothing changes.

    Args:
        network: The network, such as a coarse propagator; its BatchNorm layers are changed.
        calls: The positional arguments of each call, one batch each; iterated once, so a generator
            holds one batch at a time.

    Returns:
        The number of layers that were recalibrated.

    Raises:
        ValueError: A batch gives a layer one value per channel only, too few for a variance.
    """
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    called = False
    with _averaging(network, layers), torch.no_grad():
        for arguments in calls:
            if not called:
                for layer in layers:
                    layer.reset_running_stats()
            called = True
            network(*arguments)
    return len(layers) if called else 0


@contextmanager
def _averaging(network: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Put only these layers into training mode, with a cumulative average (momentum None)."""
    modes = {module: module.training for module in network.modules()}
    momenta = [layer.momentum for layer in layers]
    try:
        network.eval()
        for layer in layers:
            layer.train()
            layer.momentum = None
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
