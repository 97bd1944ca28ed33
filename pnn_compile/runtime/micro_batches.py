"""Cut a batch into micro-batches, put their outputs together again, and check that this is legal.

Samples are the entries of the batch axis that capture tried: dimension 0 of every argument that had
the batch size of the example inputs there. Whether that dimension counts samples is for the model
to say, so the first step runs two micro-batches apart and together, in both modes: if the outputs
differ, the model mixes samples (or dimension 0 is a sequence), and no micro-batches exist.
BatchNorm may mix them in training, as in every pipeline.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from passes.errors import RuntimeFault
from pnn_compile.inputs import batch_size

_ADVICE = (
    "pass distribute(batches=1), or keep dimension 0 of inputs and outputs for samples that do not "
    "read each other"
)


def divide(
    inputs: Mapping[str, Any], count: int, example: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Cut inputs into micro-batches along the batch axis.

    A leaf without samples (a table, a number) goes into all of them as it is. Their sizes differ by
    one sample at most.

    Args:
        inputs: Inputs by argument name.
        count: Number of micro-batches.
        example: Example inputs, which tell the leaves that have samples; `inputs` if None.

    Raises:
        RuntimeFault: The batch has too few samples.
    """
    if count == 1:
        return [dict(inputs)]
    example = inputs if example is None else example
    samples = batch_size(inputs)
    if samples < count:
        raise RuntimeFault(
            f"a batch of {samples} does not divide into {count} micro-batches: pass at least "
            f"{count} samples, best a multiple"
        )
    borders = [0]
    for number in range(count):
        borders.append(borders[-1] + samples // count + (number < samples % count))
    return [part(inputs, *pair, example) for pair in itertools.pairwise(borders)]


def part(
    inputs: Mapping[str, Any], start: int, stop: int, example: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a range of the samples of inputs; `divide` tells which leaves have samples."""
    samples, expected = batch_size(inputs), batch_size(example)

    def cut(leaf: Any, pattern: Any) -> Any:
        return leaf[start:stop] if (_size(leaf), _size(pattern)) == (samples, expected) else leaf

    return {name: pytree.tree_map(cut, value, example[name]) for name, value in inputs.items()}


def _size(leaf: Any) -> int | None:
    return len(leaf) if isinstance(leaf, torch.Tensor) and leaf.dim() else None


class Joiner:
    """Puts the outputs of micro-batches together.

    Args:
        parts: The outputs of two micro-batches.
        sizes: Their numbers of samples.
        whole: The outputs of both in one batch.
        random: Whether the model draws random numbers, so that only shapes can be compared.

    Raises:
        RuntimeFault: The outputs of the micro-batches are not those of the whole batch.
    """

    def __init__(
        self, parts: Sequence[Any], sizes: Sequence[int], whole: Any, *, random: bool = False
    ) -> None:
        leaves, self._structure = pytree.tree_flatten(whole)
        self._axes: list[int | None] = []
        flat = [pytree.tree_leaves(part) for part in parts]
        if any(len(part) != len(leaves) for part in flat):
            raise RuntimeFault(f"the number of outputs depends on the batch size: {_ADVICE}")
        for number, (leaf, *pieces) in enumerate(zip(leaves, *flat, strict=True)):
            self._axes.append(_axis(number, leaf, pieces))
        pairs = zip(self._join(flat, sizes), leaves, strict=True)
        for number, (joined, leaf) in enumerate(pairs):
            if not random and not _close(joined, leaf):
                raise RuntimeFault(
                    f"output {number} of two micro-batches is not that of both in one batch "
                    f"({_distance(joined, leaf):.1e} off): the model mixes samples, or dimension 0 "
                    f"of its inputs does not count samples; {_ADVICE}"
                )

    def __call__(self, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
        """Return the outputs of a batch.

        Args:
            parts: Outputs of the micro-batches.
            sizes: Their numbers of samples: an output without samples becomes the weighted mean.
        """
        flat = [pytree.tree_leaves(part) for part in parts]
        return pytree.tree_unflatten(self._join(flat, sizes), self._structure)

    def _join(self, flat: Sequence[Sequence[Any]], sizes: Sequence[int]) -> list[Any]:
        columns = zip(self._axes, zip(*flat, strict=True), strict=True)
        return [_joined(axis, column, sizes) for axis, column in columns]


def _axis(number: int, whole: Any, pieces: Sequence[Any]) -> int | None:
    """Return the axis along which the pieces of an output make up the whole; None without one."""
    if not isinstance(whole, torch.Tensor):
        return None
    shapes = [piece.shape for piece in pieces]
    sums = [sum(sizes) for sizes in zip(*shapes, strict=True)]
    axes = [a for a, size in enumerate(whole.shape) if any(s[a] != size for s in shapes)]
    if len(axes) > 1 or any(sums[axis] != whole.shape[axis] for axis in axes):
        raise RuntimeFault(
            f"output {number} is {[*map(list, shapes)]} of two micro-batches and "
            f"{[*whole.shape]} of both in one batch, which no axis explains: {_ADVICE}"
        )
    return axes[0] if axes else None


def _joined(axis: int | None, pieces: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = pieces[0]
    if axis is not None:
        return torch.cat([*pieces], axis)
    if not isinstance(first, torch.Tensor) or not first.dtype.is_floating_point:
        return first
    total = sum(sizes)
    return torch.stack([p * (n / total) for p, n in zip(pieces, sizes, strict=True)]).sum(0)


def _close(joined: Any, whole: Any) -> bool:
    """Whether an output is the same but for rounding; labels and indices may flip by rounding."""
    if not isinstance(whole, torch.Tensor) or not whole.dtype.is_floating_point:
        return True
    finite = whole.isfinite()
    if not torch.equal(finite, joined.isfinite()):
        return False
    tolerance = 1e-3 if whole.dtype.itemsize >= 4 else 0.05
    scale = whole[finite].abs().max().item() if finite.any() else 0.0
    return _distance(joined, whole) <= tolerance * (scale + 0.01)


def _distance(joined: torch.Tensor, whole: torch.Tensor) -> float:
    """Return the largest difference of values that are finite."""
    difference = (joined.double() - whole.double()).abs()
    return difference[difference.isfinite()].max().item() if difference.numel() else 0.0
