"""Family `thinned`: every m-th block of the trained trunk, its branch scaled by m.

A residual block `B(x) = x + b(x)` is one step of Euler's method for `x' = b(x)`; the coarse network
takes fewer and larger ones, `x + m b(x) = x + m (B(x) - x)`, with the weights of the block in the
middle of the m that it stands for (classical parareal's coarse propagator: Lions, Maday, Turinici
2001). Blocks that change the shape of the state, and those that do not repeat, stay as they are.

It copies weights and buffers as they are at compilation, so the model must be trained by then. It
is not linear. Its natural form is the difference form, where it is a good propagator from the
start; in residual form its answer to a residual of zero is not zero, a bias that training has to
remove. A network with BatchNorm wants its statistics recalibrated (`passes.coarse.batchnorm`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from passes.analysis.blocks import Block
from passes.coarse.copied_blocks import Units, copied_blocks, unit_options, whole_blocks
from passes.ir.program import Program
from passes.ir.subgraph import extract, nodes_between

__all__ = ["THINNED", "Front", "Step", "build_front", "build_thinned", "thin", "thinned_options"]

THINNED = "thinned"
"""Name of the family."""

Step = tuple[tuple[Block, ...], int]
"""The neighbouring blocks that are kept, one unless they alternate, and how many such it is for."""


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


def thinned_options(
    program: Program, steps: Sequence[Step], cones: Mapping[fx.Node, tuple[fx.Node, ...]]
) -> dict[str, Any]:
    """Describe the kept blocks as plain data, as for `units`, each with its step."""
    described = unit_options(program, [_joined(group) for group, _ in steps], cones)
    for block, (_, step) in zip(described["blocks"], steps, strict=True):
        block["step"] = step
    return described


def _joined(group: Sequence[Block]) -> Block:
    first, last = group[0], group[-1]
    return Block(first.start, last.stop, first.entering, last.leaving, first.signature)


def build_thinned(program: Program, options: Mapping[str, Any]) -> Units:
    """Copy the blocks that the options name, with their weights, and let them take their steps."""
    steps = [int(block["step"]) for block in options["blocks"]]
    return Units(copied_blocks(program, options), options["inputs"], steps)


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


def build_front(program: Program, options: Mapping[str, Any]) -> Front:
    """Copy the first layers and the blocks that the options of a guess name."""
    blocks, first = options["blocks"], options["stem"]
    stem = extract(
        program,
        nodes_between(program, *options["copied"]),
        [],
        [first["leaving"]],
        inputs=first["inputs"],
        sides=options["sides"],
        name="Stem",
    )
    inputs = options["inputs"]
    reads = [name for name in inputs if any(name in block["inputs"] for block in blocks)]
    units = build_thinned(program, {"blocks": blocks, "inputs": reads})
    return Front(copy.deepcopy(stem).requires_grad_(), units, inputs, first["inputs"], reads)
