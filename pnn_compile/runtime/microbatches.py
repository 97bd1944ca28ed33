"""Micro-batches: how a batch is divided, and what crosses between stages for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from passes.errors import RuntimeFault
from pnn_compile.inputs import batch_size

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["crossing", "divide"]


def divide(batch: Any, count: int) -> list[Any]:
    """Cut a batch into micro-batches along dimension 0 of the tensors that have its samples.

    What holds no sample (a tensor whose dimension 0 has another size, a number) goes into each of
    them whole. They differ by one sample at most.

    Raises:
        RuntimeFault: It has too few samples.
    """
    if count == 1:
        return [batch]
    samples = batch_size({"batch": batch})
    if samples < count:
        raise RuntimeFault(
            f"a batch of {samples} does not divide into {count} micro-batches: give at least "
            f"{count} samples, best a multiple"
        )

    def piece(number: int) -> Any:
        def cut(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == samples:
                return torch.tensor_split(leaf, count)[number]
            return leaf

        return pytree.tree_map(cut, batch)

    return [piece(number) for number in range(count)]


def crossing(
    compiled: Compiled, inputs: Sequence[Mapping[str, Any]], precision: torch.dtype | None = None
) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Give tensors on the meta device like those that cross behind a stage in a micro-batch.

    Args:
        compiled: The network.
        inputs: Inputs of every micro-batch, by argument name.
        precision: In which they are sent; None for that of the weights.
    """
    example = batch_size(compiled.program.args)
    sizes = [batch_size(each) for each in inputs]
    conversion = compiled.conversion

    def type_of(name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, name)
        if conversion is not None and dtype == conversion[0]:
            dtype = conversion[1]
        return dtype if precision is None else precision

    @cache
    def like(stage: int, batch: int) -> dict[str, torch.Tensor]:
        samples = sizes[batch]
        found = {}
        for value in compiled.plan.interfaces[stage].state:
            shape = list(value.spec.shape)
            axis = value.spec.batch_axis
            if axis is not None and example:
                shape[axis] = shape[axis] * samples // example
            dtype = type_of(value.spec.dtype)
            found[value.name] = torch.empty(shape, dtype=dtype, device="meta")
        return found

    return like
