"""Types of the tensors that cross a cut."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TensorSpec", "Value"]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor.

    Attributes:
        shape: Sizes at the example inputs.
        dtype: Name of the torch dtype, such as "float32".
        batch_axis: Dimension that follows the batch size, or None.
        channel_axis: Dimension that layers mix (1 in images, the last one in token sequences).
    """

    shape: tuple[int, ...]
    dtype: str
    batch_axis: int | None
    channel_axis: int

    @property
    def elements(self) -> int:
        """Number of elements at the example inputs."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes at the example inputs."""
        return self.elements * _ITEM_BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        sizes = ["B" if axis == self.batch_axis else str(n) for axis, n in enumerate(self.shape)]
        return f"[{', '.join(sizes)}] {self.dtype}"


_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8}


@dataclass(frozen=True)
class Value:
    """One tensor of an interface's state: a node of the program and its type."""

    name: str
    spec: TensorSpec
