"""Estimate the memory that a stage needs on its device, in bytes.

A device that trains holds

- every parameter of its stage four times: weight, gradient and the two moments of Adam;
- the outputs of all its nodes, until the backward pass has used them;
- of the entering state the guess x_j, the arriving state, the residual and the correction, and the
  gradient of each.

In inference it holds every parameter once, twice the largest output of a node, and the four tensors
of the entering state.

Parameters of the preprocessing operator C_j and of the coarse propagator F_j count like those of
the stage. Their activations are small beside those of a stage, and do not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from passes.cost.flops import NodeCost, parameters
from passes.ir.program import Program

_TRAINING_COPIES = 4
_SWEEP_TENSORS = 4
_BYTES_PER_PARAMETER = 4


class Memory:
    """Bytes that consecutive nodes need, for many spans of nodes at once.

    Args:
        program: The program; its order numbers the nodes.
        costs: Costs by node.
        training: Whether the devices train.

    Attributes:
        copies: Tensors of the size of each parameter that a device holds.
        sweep: Tensors of the size of the entering state that a device holds.
    """

    def __init__(
        self, program: Program, costs: Mapping[fx.Node, NodeCost], *, training: bool
    ) -> None:
        self.copies = _TRAINING_COPIES if training else 1
        self.sweep = 2 * _SWEEP_TENSORS if training else _SWEEP_TENSORS
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
        for key, positions in readers.items():
            for position in positions:
                read[position] += sizes[key]
            if len(positions) > 1:
                shared[tuple(positions)] += sizes[key]
        written = [float(costs[node].activation_bytes) for node in order]
        self._read = _prefix_sums(read)
        self._shared = [(_numbers(positions), size) for positions, size in shared.items()]
        self._written = _prefix_sums(written)
        self._max_written = _RangeMaximum(_numbers(written, torch.float64))

    def nodes(self, begin: Tensor, end: Tensor) -> Tensor:
        """Return the bytes for the nodes from `begin` to before `end`, pair by pair.

        Args:
            begin: Numbers of first nodes, `[pairs]`.
            end: Numbers of the nodes after the last ones, `[pairs]`.

        Returns:
            Bytes, `[pairs]`, float64.
        """
        owned = self._read[end] - self._read[begin]
        # The prefix sums count a shared parameter once per reader; a device holds it once.
        for positions, size in self._shared:
            first, stop = (torch.searchsorted(positions, bound) for bound in (begin, end))
            owned = owned - size * (stop - first - 1).clamp(min=0)
        if self.training:
            return self.copies * owned + self._written[end] - self._written[begin]
        return self.copies * owned + 2 * self._max_written(begin, end)

    def span(self, begin: int, end: int) -> float:
        """Return the bytes for the nodes from `begin` to before `end`."""
        return float(self.nodes(_numbers([begin]), _numbers([end])))

    def entry(self, parameters: int, state: int) -> float:
        """Return the bytes for the preprocessing operator and coarse propagator of a stage.

        Args:
            parameters: Number of parameters of both.
            state: Bytes of the entering state.
        """
        return float(self.copies * _BYTES_PER_PARAMETER * parameters + self.sweep * state)


def last_fitting_ends(
    memory: Memory, begins: Sequence[int], entry: Sequence[float], ends: Sequence[int], limit: float
) -> list[int]:
    """Find, for each begin, the last end up to which the nodes fit into a device.

    Args:
        memory: Memory of the nodes.
        begins: First nodes of stages.
        entry: Bytes of the preprocessing operator and coarse propagator of each stage.
        ends: Candidates for the nodes after the stages, ascending.
        limit: Memory of the device in bytes.

    Returns:
        For each begin an index into `ends`; -1 if no end fits.
    """
    first, extra = _numbers(begins), _numbers(entry, torch.float64)
    stops = _numbers(ends)
    # More nodes never need less memory: one binary search for all begins at once.
    low, high = torch.zeros_like(first), torch.full_like(first, len(ends))
    while bool((low < high).any()):
        middle = (low + high) // 2
        stop = torch.maximum(stops[middle.clamp(max=len(ends) - 1)], first)
        fits = memory.nodes(first, stop) + extra <= limit
        searching = low < high
        low = torch.where(searching & fits, middle + 1, low)
        high = torch.where(searching & ~fits, middle, high)
    return [int(count) - 1 for count in low]


def _numbers(values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _prefix_sums(values: Sequence[float]) -> Tensor:
    return _numbers([0.0, *values], torch.float64).cumsum(0)


class _RangeMaximum:
    """Maximum over many ranges of values at once, by a sparse table.

    Level k holds the maxima of all ranges of 2**k values. Two of them that overlap cover any range:

    >>> maximum = _RangeMaximum(torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]))
    >>> maximum(torch.tensor([0, 1, 2]), torch.tensor([2, 4, 2]))  # of an empty range: 0
    tensor([3., 4., 0.])
    """

    def __init__(self, values: Tensor) -> None:
        levels = [values]
        while (half := 1 << (len(levels) - 1)) * 2 <= len(values):
            below = levels[-1]
            levels.append(torch.maximum(below[:-half], below[half:]))
        size = len(values)
        self.table = torch.stack(
            [torch.cat([row, row.new_zeros(size - len(row))]) for row in levels]
        )

    def __call__(self, begin: Tensor, end: Tensor) -> Tensor:
        length = end - begin
        # The largest power of two that is at most the length.
        level = (torch.frexp(length.clamp(min=1).double()).exponent.long() - 1).clamp(min=0)
        last = self.table.shape[1] - 1
        left = self.table[level, begin.clamp(max=last)]
        right = self.table[level, (end - (1 << level)).clamp(min=0)]
        return torch.where(length > 0, torch.maximum(left, right), left.new_zeros(()))
