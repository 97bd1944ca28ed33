"""What a stage holds in the memory of its device, in bytes.

A device that trains holds every parameter of its stage four times (weight, gradient and the two
moments of Adam), all that its nodes write until the way back has used it, and the tensors of the
sweep: of the entering state the guess, what arrives, the residual and the correction, and the
gradient of each. In inference it holds the parameters once, twice what the largest node writes,
and the four tensors of the sweep. The parameters of its guess and its correction count like those
of the stage; what these two compute inside is small beside a stage and does not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from passes.cost.flops import Cost, parameters
from passes.ir.program import Program

__all__ = ["Memory", "fitting"]

_COPIES = 4
_SWEEP = 4
_ITEM = 4


class Memory:
    """Bytes of runs of nodes, many at once."""

    def __init__(self, program: Program, costs: Mapping[fx.Node, Cost], *, training: bool) -> None:
        """Note what every node reads and writes.

        Args:
            program: The program; its order numbers the nodes.
            costs: What every node costs.
            training: Whether the devices train.
        """
        self.copies, self.sweep = (_COPIES, 2 * _SWEEP) if training else (1, _SWEEP)
        self.training = training
        order = program.order
        sizes: dict[int, int] = {}
        readers: dict[int, list[int]] = defaultdict(list)
        for index, node in enumerate(order):
            for parameter in parameters(program, node):
                sizes[id(parameter)] = parameter.numel() * parameter.element_size()
                readers[id(parameter)].append(index)
        read = [0.0] * len(order)
        shared: dict[tuple[int, ...], float] = defaultdict(float)
        for key, places in readers.items():
            for place in places:
                read[place] += sizes[key]
            if len(places) > 1:
                shared[tuple(places)] += sizes[key]
        written = [float(costs[node].activation_bytes) for node in order]
        self._read = _sums(read)
        self._shared = [(torch.tensor(places), size) for places, size in shared.items()]
        self._written = _sums(written)
        self._most = _Most(torch.tensor(written, dtype=torch.float64))

    def nodes(self, begin: Tensor, end: Tensor) -> Tensor:
        """Bytes that a device holds for the nodes from `begin` to before `end`, pair by pair."""
        owned = self._read[end] - self._read[begin]
        for places, size in self._shared:
            first, stop = (torch.searchsorted(places, at) for at in (begin, end))
            owned = owned - size * (stop - first - 1).clamp(min=0)
        if self.training:
            return self.copies * owned + self._written[end] - self._written[begin]
        return self.copies * owned + 2 * self._most(begin, end)

    def span(self, begin: int, end: int) -> float:
        """Bytes that a device holds for the nodes from `begin` to before `end`."""
        return float(self.nodes(torch.tensor([begin]), torch.tensor([end])))

    def entry(self, parameters: int, state: int) -> float:
        """Bytes for the guess and the correction of a stage.

        Args:
            parameters: Number of parameters of both.
            state: Bytes of the entering state.
        """
        return float(self.copies * _ITEM * parameters + self.sweep * state)


def fitting(
    memory: Memory, begins: Sequence[int], entry: Sequence[float], ends: Sequence[int], limit: float
) -> list[int]:
    """For each begin: the last of the ends up to which the nodes fit; -1 where none does.

    Args:
        memory: What nodes hold.
        begins: First nodes of stages.
        entry: Bytes of the guess and the correction of each.
        ends: Nodes behind the stages, in order.
        limit: Bytes of the device.
    """
    first, extra = torch.tensor(begins), torch.tensor(entry, dtype=torch.float64)
    behind = torch.tensor(ends)
    # More nodes never hold less: a binary search for all begins at once.
    low, high = torch.zeros_like(first), torch.full_like(first, len(ends))
    while bool((low < high).any()):
        middle = (low + high) // 2
        stop = torch.maximum(behind[middle.clamp(max=len(ends) - 1)], first)
        fits = memory.nodes(first, stop) + extra <= limit
        open_ = low < high
        low = torch.where(open_ & fits, middle + 1, low)
        high = torch.where(open_ & ~fits, middle, high)
    return [int(place) - 1 for place in low]


def _sums(values: Sequence[float]) -> Tensor:
    return torch.cat([torch.zeros(1), torch.tensor(values, dtype=torch.float64).cumsum(0)])


class _Most:
    """The largest of a run of values, for many runs at once: a sparse table."""

    def __init__(self, values: Tensor) -> None:
        self.levels = [values]
        while (half := 1 << (len(self.levels) - 1)) * 2 <= len(values):
            below = self.levels[-1]
            self.levels.append(torch.maximum(below[:-half], below[half:]))
        size = len(values)
        self.table = torch.stack(
            [torch.cat([row, row.new_zeros(size - len(row))]) for row in self.levels]
        )

    def __call__(self, begin: Tensor, end: Tensor) -> Tensor:
        length = end - begin
        level = (torch.frexp(length.clamp(min=1).double()).exponent.long() - 1).clamp(min=0)
        last = self.table.shape[1] - 1
        left = self.table[level, begin.clamp(max=last)]
        right = self.table[level, (end - (1 << level)).clamp(min=0)]
        return torch.where(length > 0, torch.maximum(left, right), left.new_zeros(()))
