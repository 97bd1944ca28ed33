"""Sizes of tensors as text over the free dimensions, from runs at several of them.

A network is run at two numbers of samples and, if its sequences are free, at two lengths. A size is
then a function of both, a*batch*sequence + b*batch + c*sequence + d.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from passes.errors import ExportError
from passes.ir.program import Program
from pnn_compile.export.onnx.pieces import SymbolicSpec, spec_leaves
from pnn_compile.inputs import batch_size

BATCH = "batch"
"""Name of the dimension that counts the samples."""

SEQUENCE = "sequence"
"""Name of the dimension that counts the positions of a sequence."""

_SIZES = ((3, 5), (7, 9), (11, 13))
"""Batch sizes that are compared; no exporter takes them for constants, as it may do with 1."""


@dataclass(frozen=True)
class Runs:
    """Sizes at which a network is run.

    Attributes:
        batches: Two numbers of samples, or the only one.
        lengths: Two lengths of the sequences, or (0,) if they are not free.
    """

    batches: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, program: Program) -> Runs:
        """Choose the sizes for a program; a batch size must not look like a length."""
        length = program.sequence
        lengths = (0,) if length is None else (length, length - 1 if length > 2 else length + 1)
        if "batch" not in program.dynamic:
            return cls((batch_size(program.args),), lengths)
        return cls(next(pair for pair in _SIZES if not {*pair} & {*lengths}), lengths)

    @property
    def points(self) -> list[tuple[int, int]]:
        """Pairs of a number of samples and a length, in the order of the runs."""
        return [*itertools.product(self.batches, self.lengths)]


def merge(runs: Runs, sketches: Sequence[Any]) -> Any:
    """Merge the sketches of all runs; sizes that differ become text over the free dimensions.

    Raises:
        ExportError: Their structure differs, or a size is no such function.
    """
    leaves, structure = pytree.tree_flatten(
        sketches[0], is_leaf=lambda leaf: isinstance(leaf, SymbolicSpec)
    )
    others = [spec_leaves(sketch) for sketch in sketches[1:]]
    if any(len(other) != len(leaves) for other in others):
        counts = [len(leaves), *map(len, others)]
        raise ExportError(
            "the structure of what flows through the network changes with the batch size "
            f"({counts[0]} values at {runs.points[0][0]}, {counts[-1]} at {runs.points[-1][0]}): "
            "leave 'batch' out of dynamic"
        )
    merged = [_merge_leaf(runs, values) for values in zip(leaves, *others, strict=True)]
    return pytree.tree_unflatten(merged, structure)


def _merge_leaf(runs: Runs, values: Sequence[Any]) -> Any:
    first = values[0]
    if not all(isinstance(value, SymbolicSpec) for value in values):
        return first
    sizes = zip(*(value.shape for value in values), strict=True)
    return SymbolicSpec(first.shape, first.dtype, tuple(_dimension(runs, s) for s in sizes))


def _dimension(runs: Runs, sizes: Sequence[int]) -> int | str:
    """Write a size as a function of the free dimensions, from its values at all points.

    >>> [_dimension(Runs((3, 5), (0,)), s) for s in [(7, 7), (3, 5), (48, 80), (7, 11)]]
    [7, 'batch', '16*batch', '2*batch + 1']
    >>> [_dimension(Runs((3, 5), (8, 7)), s) for s in [(8, 7, 8, 7), (24, 21, 40, 35)]]
    ['sequence', 'batch*sequence']
    """
    if len(set(sizes)) == 1:
        return sizes[0]
    batches, lengths = runs.batches, runs.lengths
    by_length = [sizes[index :: len(lengths)] for index in range(len(lengths))]
    slopes = [_slope(values, batches) for values in by_length]  # in the batch, at each length
    offsets = [
        values[0] - slope * batches[0] for values, slope in zip(by_length, slopes, strict=True)
    ]
    product, constant = _slope(slopes, lengths), _slope(offsets, lengths)
    terms = {
        f"{BATCH}*{SEQUENCE}": product,
        BATCH: slopes[0] - product * lengths[0],
        SEQUENCE: constant,
        "": offsets[0] - constant * lengths[0],
    }
    if any(value != int(value) for value in terms.values()):
        named = ", ".join(
            f"{size} at batch {batch}" + (f", length {length}" if length else "")
            for size, (batch, length) in zip(sizes, runs.points, strict=True)
        )
        raise ExportError(
            f"a size does not follow the batch ({named}): leave 'batch' out of dynamic"
        )
    text = " + ".join(_term(int(value), name) for name, value in terms.items() if value)
    return text.replace("+ -", "- ")


def _slope(values: Sequence[float], at: Sequence[int]) -> float:
    return (values[1] - values[0]) / (at[1] - at[0]) if len(at) > 1 else 0.0


def _term(factor: int, name: str) -> str:
    if not name:
        return str(factor)
    return name if factor == 1 else f"{factor}*{name}"
