"""Types of the tensors that cross a cut.

>>> spec = TensorSpec((2, 8, 4, 4), "float16", batch_axis=0, channel_axis=1)
>>> str(spec), spec.elements, spec.bytes
('[B, 8, 4, 4] float16', 256, 512)
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, and the meaning of its axes.

    Attributes:
        shape: Sizes at the example inputs.
        dtype: Name of the torch dtype, such as "float32".
        batch_axis: Dimension that follows the batch size; None if no dimension does.
        channel_axis: Dimension that layers mix (1 in images, the last one in token sequences). It
            counts from the end (-2 of `[B, C, T]`) if no position may be mixed with later ones.
    """

    shape: tuple[int, ...]
    dtype: str
    batch_axis: int | None
    channel_axis: int

    @property
    def elements(self) -> int:
        """Number of elements at the example inputs."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes at the example inputs."""
        return self.elements * _ITEM_BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        sizes = ["B" if axis == self.batch_axis else str(n) for axis, n in enumerate(self.shape)]
        return f"[{', '.join(sizes)}] {self.dtype}"


_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8}


@dataclass(frozen=True)
class Value:
    """One tensor of an interface's state.

    Attributes:
        name: Name of the node of the program that computes it.
        spec: Its type.
    """

    name: str
    spec: TensorSpec
